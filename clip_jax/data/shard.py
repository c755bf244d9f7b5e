"""The command `python -m clip_jax.data.shard`, written in `clip_jax.tools.data_shard`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.data_shard", run_name="__main__")
