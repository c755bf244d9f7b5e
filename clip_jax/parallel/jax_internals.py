"""The private parts of JAX that this project uses, all of them in this file.

They have no public counterpart. A JAX that has moved one of them fails here, on import or by an
AttributeError, and nowhere else.
"""

from contextlib import AbstractContextManager
from typing import Any

from jax._src import compilation_cache, config, xla_bridge
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state


def process_index() -> int:
    """Return this process's number; `jax.process_index` would start the devices.

    It breaks if the state that `jax.distributed.initialize` fills has no `process_id` any more.
    """
    return global_state.process_id


def process_count() -> int:
    """Return the number of processes; `jax.process_count` would start the devices.

    It breaks if the state that `jax.distributed.initialize` fills has no `num_processes` any more.
    """
    return global_state.num_processes


def coordinator_address() -> str | None:
    """Return HOST:PORT of process 0, where it is known.

    It breaks if that state has no `coordinator_address` any more.
    """
    return global_state.coordinator_address


def coordination_client() -> Any:
    """Return the client of the key-value store in process 0.

    It breaks if that state has no `client` any more, or the client none of `key_value_set`,
    `blocking_key_value_get`, `key_value_dir_get` and `key_value_delete`.
    """
    return global_state.client


def cluster_kinds() -> list[type[ClusterEnv]]:
    """Return the clusters that JAX looks for without being told, first to last.

    It breaks if `ClusterEnv` keeps its kinds elsewhere. Of a kind, callers use `is_env_present`,
    `get_process_count` and `get_process_id`.
    """
    return [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]


def devices_started() -> bool:
    """Return whether JAX has started its devices.

    It breaks if `xla_bridge` has no `backends_are_initialized` any more.
    """
    return xla_bridge.backends_are_initialized()


def use_compilation_cache(cache: Any) -> None:
    """Let the compiler keep its programs in `cache`, from the next one on.

    It breaks if `compilation_cache` keeps the object of `get(key)` and `put(key, value)` elsewhere
    than in `_cache`, or knows in another way than by `_cache_initialized` that it is there.
    """
    compilation_cache.reset_cache()
    compilation_cache._cache, compilation_cache._cache_initialized = cache, True


def draws_as_gpu_kernels() -> AbstractContextManager:
    """Lower each draw of random numbers to one kernel of jaxlib's on a GPU; same numbers.

    XLA compiles the unrolled rounds of every draw by itself: ViT-B/32's weights take 32 s of two
    cores so, and 5 as kernels. These cannot be partitioned: each device makes whole arrays.

    It breaks if the config has no `threefry_gpu_kernel_lowering` any more.
    """
    return config.threefry_gpu_kernel_lowering(True)
