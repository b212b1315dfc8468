"""What `--mode` of `cover_jax.main` does: from a config and a workdir to data, run and results."""
