"""The command `python -m clip_jax.export`, written in `clip_jax.tools.export`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.export", run_name="__main__")
