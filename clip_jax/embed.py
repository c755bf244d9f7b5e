"""The command `python -m clip_jax.embed`, written in `clip_jax.tools.embed`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("clip_jax.tools.embed", run_name="__main__")
