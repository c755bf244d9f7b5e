"""List the commands: `python -m clip_jax`."""

import sys

from clip_jax.errors import run_command
from clip_jax.tools.commands import main

if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
