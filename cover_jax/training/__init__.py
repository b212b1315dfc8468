"""The loop, its microbatches, its metrics, and numbers that are none."""
