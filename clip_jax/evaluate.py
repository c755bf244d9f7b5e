"""The command `python -m clip_jax.evaluate`, written in `clip_jax.tools.evaluate`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.evaluate", run_name="__main__")
