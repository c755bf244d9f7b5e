"""The share of a GPU's memory that a run takes, which is what a plan counts on."""

import os

SHARE = 0.9
"""The rest is for what JAX does not allocate: CUDA itself, and NCCL's buffers."""

VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""What jaxlib reads it from when it starts the GPUs; the second name is the older one."""


def take_gpu_memory() -> None:
    """Let JAX take `SHARE` of each GPU's memory, unless the environment says how much.

    By itself it takes three quarters, and a step that needs more ends for want of memory beside a
    quarter that is free. Call before JAX starts its devices.
    """
    if not any(os.environ.get(name) for name in VARIABLES):
        os.environ[VARIABLES[0]] = str(SHARE)
