"""The command `python -m clip_jax.convert`, written in `clip_jax.tools.convert`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.convert", run_name="__main__")
