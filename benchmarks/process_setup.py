"""Settings from before JAX or PyTorch starts a thread: `compare_open_clip` imports this first."""

import os

from clip_jax.host_memory import keep_freed_memory

# JAX would take most of a GPU's memory at once and leave PyTorch none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# As training does on a CPU, for both libraries: a thread that starts earlier may have an arena of
# its own, which asks the kernel anew for every large block.
keep_freed_memory()
