"""The command `python -m clip_jax.data.reinforce`, written in `clip_jax.tools.data_reinforce`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.data_reinforce", run_name="__main__")
