"""The command `python -m clip_jax.search`, written in `clip_jax.tools.search`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.search", run_name="__main__")
