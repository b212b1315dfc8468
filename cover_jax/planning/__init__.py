"""What a run costs on devices that are not here; `cover_jax.plan` is the command."""
