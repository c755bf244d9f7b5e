"""The command `python -m clip_jax.replay`, written in `clip_jax.tools.replay`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.replay", run_name="__main__")
