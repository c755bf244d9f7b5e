"""The command `python -m clip_jax.report`, written in `clip_jax.tools.report`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.report", run_name="__main__")
