"""A TPU whose kernels are interpreted, for tests on CPUs."""

from clip_jax.models.target import Target

INTERPRETED = Target("tpu", "v5e", interpret=True)
