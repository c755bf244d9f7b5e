"""XLA flags for tests, which compile far more than they compute.

No expensive LLVM passes, and fused loops by the older of two emitters, which writes less code: a
step of a tiny model compiles in 0.6 of the time. jaxlib 0.12 has the newer emitter alone, and ends
the process at a flag that it does not know.
"""

import importlib.metadata

from packaging.version import Version

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if Version(importlib.metadata.version("jaxlib")) < Version("0.12"):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
