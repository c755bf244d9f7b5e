"""The command `python -m clip_jax.benchmark`, written in `clip_jax.tools.benchmark`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.benchmark", run_name="__main__")
