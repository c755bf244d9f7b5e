"""The command `python -m clip_jax.doctor`, written in `clip_jax.tools.doctor`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.doctor", run_name="__main__")
