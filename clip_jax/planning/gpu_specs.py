"""What XLA's compiler for NVIDIA GPUs must know of a GPU that is not there.

The numbers are those that each GPU's driver gives, as OpenXLA publishes them:
github.com/openxla/xla, xla/backends/gpu/target_config/specs.
"""

from typing import NamedTuple


class GpuSpec(NamedTuple):
    """Numbers of one kind of GPU.

    Attributes:
      name: as its driver calls it.
      capability: compute capability, the first number of two; the second is 0.
      cores: streaming multiprocessors.
      fpus_per_core: float32 units in each.
      shared_memory_per_core, shared_memory_per_block: bytes, the latter where a kernel asks for
        more than 48 KiB.
      memory, memory_bandwidth, l2_cache: bytes, bytes a second, bytes.
      clock_ghz: the highest.
    """

    name: str
    capability: int
    cores: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    memory: int
    memory_bandwidth: int
    l2_cache: int
    clock_ghz: float


A100_40 = GpuSpec(
    "NVIDIA A100-SXM4-40GB",
    *(8, 108, 64, 167936, 166912),
    *(42331013120, 1555200000000, 41943040, 1.41),
)
H100 = GpuSpec(
    "NVIDIA H100 80GB HBM3",
    *(9, 132, 128, 233472, 232448),
    *(84942979072, 3352320000000, 52428800, 1.98),
)
GPU_SPECS = {
    "a100-40gb": A100_40,
    "a100": A100_40._replace(
        name="NVIDIA A100-SXM4-80GB", memory=85100068864, memory_bandwidth=2039040000000
    ),
    "h100": H100,
    "h200": H100._replace(
        name="NVIDIA H200 141GB HBM3e", memory=151397597184, memory_bandwidth=4800000000000
    ),
    "b200": GpuSpec(
        "NVIDIA B200",
        *(10, 148, 128, 233472, 232448),
        *(191514411008, 7672320000000, 132644864, 1.965),
    ),
}
"""By the names of `hardware.DEVICES`."""

_TARGET_CONFIG = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {spec.shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {spec.cores}
  fpus_per_core: {spec.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {spec.memory_bandwidth}
  l2_cache_size: {spec.l2_cache}
  clock_rate_ghz: {spec.clock_ghz}
  device_memory_size: {spec.memory}
  shared_memory_per_block_optin: {spec.shared_memory_per_block}
  cuda_compute_capability {{ major: {spec.capability} feature_extension: {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{spec.name}"
"""


def target_config(spec: GpuSpec) -> str:
    """Return XLA's GpuTargetConfigProto of a GPU, as text."""
    features = "ACCELERATED_FEATURES" if spec.capability >= 9 else "NONE"
    return _TARGET_CONFIG.format(spec=spec, features=features)
