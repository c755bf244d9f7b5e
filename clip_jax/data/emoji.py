"""The command `python -m clip_jax.data.emoji`, written in `clip_jax.tools.data_emoji`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.data_emoji", run_name="__main__")
