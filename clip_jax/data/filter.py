"""The command `python -m clip_jax.data.filter`, written in `clip_jax.tools.data_filter`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.data_filter", run_name="__main__")
