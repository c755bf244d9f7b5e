"""The command `python -m clip_jax.relevance`, written in `clip_jax.tools.relevance`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.relevance", run_name="__main__")
