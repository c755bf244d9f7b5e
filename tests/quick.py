"""XLA flags for tests, which compile far more than they compute: no expensive LLVM passes."""

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
