"""The command `python -m clip_jax.wiseft`, written in `clip_jax.tools.wiseft`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.wiseft", run_name="__main__")
