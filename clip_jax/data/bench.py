"""The command `python -m clip_jax.data.bench`, written in `clip_jax.tools.data_bench`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.data_bench", run_name="__main__")
