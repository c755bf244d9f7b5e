"""The command `python -m clip_jax.data.inspect`, written in `clip_jax.tools.data_inspect`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.data_inspect", run_name="__main__")
