"""What a machine and its packages are fit for: the answers of `python -m clip_jax.doctor`."""
