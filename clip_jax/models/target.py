"""The devices that a program is traced for, as a value.

Kernels, product forms, tiles and compiler options are chosen by it, and nothing asks the process
for its own devices. So one process can lower programs for CPUs, GPUs and TPUs.
`parallel.mesh.mesh_target` makes it from a mesh.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a program is traced for; the default is one CPU, whose forms run anywhere.

    Attributes:
      platform: "cpu", "cuda", "rocm" or "tpu".
      generation: of a TPU, "v5e" say; of another device the name it gives itself.
      capability: an NVIDIA GPU's compute capability.
      mesh: the devices, where there are several; None is one.
      batch_axes: the axes of the mesh that split the rows of a batch.
      interpret: Pallas kernels are interpreted, as tests on CPUs do.
    """

    platform: str = "cpu"
    generation: str = ""
    capability: tuple[int, int] = (0, 0)
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    interpret: bool = False

    @property
    def batch_shards(self) -> int:
        """The number of parts in which the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes) if self.mesh else 1

    @property
    def alone(self) -> "Target":
        """One of these devices."""
        return dataclasses.replace(self, mesh=None, batch_axes=())

    def shares(self, batch: int) -> bool:
        """Return whether the devices have equally many rows of such a batch.

        One that they have not is small: one to draw parameters with.
        """
        return batch % self.batch_shards == 0

    @property
    def splits_rows_alone(self) -> bool:
        """Whether no axis of the mesh splits anything but rows of a batch."""
        return self.mesh is None or self.mesh.size == self.batch_shards

    def split_rows(self, x: jax.Array) -> jax.Array:
        """Constrain an array's rows to stay split over the batch axes; other axes stay free."""
        if self.mesh is None:
            return x
        spec = P(self.batch_axes, *[P.UNCONSTRAINED] * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def map_gathered(self, function: Callable[..., Any], rows: jax.Array, whole: jax.Array) -> Any:
        """Call `function(rows, whole)` on each device, with all devices' rows, gathered once.

        All results are whole. It must not be differentiated.
        """

        def gather_and_call(rows: jax.Array, whole: jax.Array) -> Any:
            return function(jax.lax.all_gather(rows, self.batch_axes, tiled=True), whole)

        return jax.shard_map(
            gather_and_call,
            mesh=self.mesh,
            in_specs=(P(self.batch_axes), P()),
            out_specs=P(),
            check_vma=False,  # which does not know that what is gathered is equal everywhere
        )(rows, whole)

    def map_rows(
        self, function: Callable[..., Any], rows: tuple[jax.Array, ...], whole: tuple[Any, ...]
    ) -> Any:
        """Call `function(*rows, *whole)` on each device's own rows.

        The compiler cannot partition a Pallas kernel by itself. All results have their rows split
        as `rows` have; `whole` is the same on all devices. It must not be differentiated: a
        kernel's derivative is another call.
        """
        if self.mesh is None:
            return function(*rows, *whole)
        split = P(self.batch_axes)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(split,) * len(rows) + (P(),) * len(whole),
            out_specs=split,
            check_vma=False,
        )(*rows, *whole)


ONE_CPU = Target()
"""The default: plain forms, which run anywhere."""
