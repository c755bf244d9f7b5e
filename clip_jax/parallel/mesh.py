"""The device mesh: its axes, and how a host's batch is placed on it."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.errors import UserError
from clip_jax.models.target import Target

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
"""The axes that split the rows of a batch between them."""


def make_mesh(
    *, data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Make a mesh over all devices; `data` -1 takes what the other axes leave.

    Args:
      data, fsdp, tensor: the number of devices along each axis.
      devices: a topology's, which are not there, in place of this process's own.

    Raises:
      UserError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    # Explicit axes, make_mesh's default, break the look-up of tokens.
    return jax.make_mesh(
        tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def mesh_shape(count: int, *, data: int, fsdp: int, tensor: int) -> dict[str, int]:
    """Return how many of the devices lie along each axis; `data` -1 takes what the others leave.

    Raises:
      UserError: the product is not the number of devices.
    """
    if data == -1:
        data = max(1, count // (fsdp * tensor))
    if data * fsdp * tensor != count:
        raise UserError(
            f"config.mesh asks for {data} x {fsdp} x {tensor} (data x fsdp x tensor) = "
            f"{data * fsdp * tensor} devices and there are {count}; "
            "change config.mesh.fsdp and config.mesh.tensor so that their product divides that"
        )
    return dict(zip(AXES, (data, fsdp, tensor), strict=True))


TPU_GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7",
}
"""The names of TPUs by what their devices say they are."""


def mesh_target(mesh: Mesh) -> Target:
    """Return what a program over this mesh is traced for; its devices may be a topology's."""
    several = mesh.size > 1
    return dataclasses.replace(
        device_target(mesh.devices.flat[0]),
        mesh=mesh if several else None,
        batch_axes=BATCH_AXES if several else (),
    )


def device_target(device: jax.Device) -> Target:
    """Return what a program for one device is traced for."""
    kind = device.device_kind
    if device.platform == "tpu":
        generation = TPU_GENERATIONS.get(kind, kind.removeprefix("TPU").strip())
        return Target("tpu", generation)
    if device.platform not in ("gpu", "cuda", "rocm"):
        return Target(device.platform)
    # AMD's have names, gfx90a say.
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if capability is None:
        return Target("rocm", kind)
    return Target("cuda", kind, (int(capability[1]), int(capability[2])))


def mesh_text(shape: Mapping[str, int]) -> str:
    """Return the shape of a mesh as data=32 x fsdp=8 x tensor=1."""
    return " x ".join(f"{axis}={shape[axis]}" for axis in AXES)


def batch_shards(mesh: Mesh) -> int:
    """Return in how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(name: str, batch_size: int, shape: Mapping[str, int]) -> None:
    """Raise UserError if a mesh of this shape does not divide a batch evenly.

    `name` is the config's field.
    """
    shards = shape["data"] * shape["fsdp"]
    if batch_size % shards:
        raise UserError(
            f"{name} {batch_size} is not a multiple of data x fsdp = "
            f"{shape['data']} x {shape['fsdp']} = {shards} devices; "
            f"the nearest that is: {max(shards, batch_size // shards * shards)}"
        )


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Return which part of a global batch this process loads, and of how many.

    Processes whose devices hold the same rows (an axis that splits no rows spans them) load the
    same part.

    Raises:
      UserError: two processes share some of their rows and not all.
    """
    rows_of: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(batch_shards(mesh), -1)):
        for device in devices:
            rows_of.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if len({row for part in parts for row in part}) != sum(len(part) for part in parts):
        raise UserError(
            f"config.mesh.tensor {mesh.shape['tensor']} spans processes unevenly; take one that "
            f"divides the {jax.local_device_count()} devices of a process, or is a multiple of it"
        )
    return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays, split over the batch axes, of each process's rows of a batch."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
