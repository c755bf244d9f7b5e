"""The command `python -m clip_jax.plan`, written in `clip_jax.tools.plan`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.plan", run_name="__main__")
