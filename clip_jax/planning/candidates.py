"""The settings of a run that a search compiles, in an order in which few need to be compiled.

What does not fit while it keeps little does not fit while it keeps more. Micro-batches cost another
forward pass, and so does computing whole towers again: they are tried where nothing quicker fits.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from clip_jax.planning.hardware import Device
from clip_jax.sections import Config

REMAT_RANKS = {"full": 0, "blocks": 1, "minimal": 2, "dots": 2, "none": 3}
"""Values of `config.model.remat`, from the least memory to the most.

"minimal" and "dots" need no matrix product again, and which of them takes less is the compiler's
and the program's: neither says anything of the other.
"""
REMAT_ORDER = ("minimal", "blocks", "full", "dots", "none")
"""The order they are tried in: the answer of one spares others."""
FSDP = (1, 8, 64, 512)
"""Sizes of the axis that are tried beside the run's own, those that divide the devices: one copy of
the state, a machine's worth of parts, and more."""
TENSOR = (1, 2)
MICROBATCHES = (1, 2, 4, 8, 16)
"""In how many parts the global batch is taken, beside the run's own."""
KERNELS = {"tpu": ("auto", "xla"), "cuda": ("auto", "xla"), "cpu": ()}
"""Values of `config.model.attention` by the compiler's platform."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings of a run.

    Attributes:
      fsdp, tensor: sizes of the mesh's axes; `data` takes what they leave.
      remat, scan, attention: fields of `config.model`.
      parts: in how many micro-batches the global batch is taken; 1 is whole.
    """

    fsdp: int
    tensor: int
    remat: str
    scan: bool
    attention: str
    parts: int

    def settings(self, config: Config) -> dict[str, Any]:
        """Return the fields of the config that it sets, by their dotted names."""
        batch = config.train.batch_size
        return {
            "mesh.data": -1,
            "mesh.fsdp": self.fsdp,
            "mesh.tensor": self.tensor,
            "model.remat": self.remat,
            "model.scan": self.scan,
            "model.attention": self.attention,
            "train.microbatch_size": batch // self.parts if self.parts > 1 else 0,
        }

    def needs_at_least(self, other: "Candidate") -> bool:
        """Return whether it cannot need less memory than another."""
        return (
            self.scan == other.scan
            and self.tensor == other.tensor
            and self.fsdp <= other.fsdp
            and _keeps_at_least(self.remat, other.remat)
            and self.parts <= other.parts
            and self.attention == other.attention
        )

    def is_slower_than(self, other: "Candidate") -> bool:
        """Return whether it only computes more than another."""
        if dataclasses.replace(self, parts=other.parts, remat=other.remat) != other:
            return False
        if other.remat == "full":
            return False
        # Whole towers again, and their blocks once more, cost more than micro-batches do.
        if self.remat == "full" or self.parts > other.parts:
            return True
        return self.remat == "blocks" != other.remat and self.parts == other.parts


def _keeps_at_least(remat: str, other: str) -> bool:
    one, two = ("minimal" if name == "auto" else name for name in (remat, other))
    return one == two or REMAT_RANKS[one] > REMAT_RANKS[two]


def make_candidates(config: Config, devices: int, vary: frozenset[str]) -> list[Candidate]:
    """Return the settings to try on so many devices, those that may save others first.

    Kernels of attention are not among them: the best settings are compiled with each. Nor are
    those whose mesh does not take all devices, or does not split the batch evenly: there may be
    none.

    Args:
      config: the run; what is not varied stays as it says.
      devices: how many.
      vary: what to vary, names in `tools.plan.AXES`.
    """
    scans = (False, True) if "scan" in vary else (config.model.scan,)
    remats = REMAT_ORDER if "remat" in vary else (config.model.remat,)
    made = [
        Candidate(fsdp, tensor, remat, scan, config.model.attention, parts)
        for fsdp, tensor in _meshes(config, devices, vary)
        for scan in scans
        for parts in _parts(config, devices // tensor, vary)
        for remat in remats
    ]
    # Every mesh with what is likely to be quickest, then every mesh with the next.
    return sorted(made, key=lambda c: (c.parts, remats.index(c.remat)))


def with_other_kernels(best: Candidate, platform: str, vary: frozenset[str]) -> list[Candidate]:
    """Return settings with each kernel of attention that they do not have."""
    kernels = KERNELS[platform] if "attention" in vary else ()
    return [dataclasses.replace(best, attention=k) for k in kernels if k != best.attention]


def _meshes(config: Config, devices: int, vary: frozenset[str]) -> Iterator[tuple[int, int]]:
    own = config.mesh
    if "mesh" not in vary:
        takes_all = own.data in (-1, devices // (own.fsdp * own.tensor))
        if takes_all and _divides(config, devices, own.fsdp, own.tensor):
            yield own.fsdp, own.tensor
        return
    # A second axis is for what one device cannot hold, with the first at a machine's worth.
    meshes = {*((fsdp, 1) for fsdp in (*FSDP, devices)), *((8, tensor) for tensor in TENSOR)}
    for fsdp, tensor in sorted(meshes | {(own.fsdp, own.tensor)}, key=lambda m: (m[1], m[0])):
        if _divides(config, devices, fsdp, tensor):
            yield fsdp, tensor


def _divides(config: Config, devices: int, fsdp: int, tensor: int) -> bool:
    """Return whether the axes divide the devices, and what splits the rows divides the batch."""
    batch = config.train.batch_size
    return devices % (fsdp * tensor) == 0 and batch % (devices // tensor) == 0


def _parts(config: Config, shards: int, vary: frozenset[str]) -> Iterator[int]:
    batch = config.train.batch_size
    own = batch // (config.train.microbatch_size or batch)
    for parts in sorted({own, *MICROBATCHES}) if "microbatch" in vary else (own,):
        if batch % parts == 0 and (batch // parts) % shards == 0:
            yield parts


def parameter_bytes(parameters: int, candidate: Candidate) -> int:
    """Return the bytes of a device's part of the parameters, less than which no step takes.

    Moments are left out: the copies of a model may share them, and frozen towers have none.
    """
    return 4 * parameters // (candidate.fsdp * candidate.tensor)


def least_days(
    flops: float, devices: int, device: Device, dtype: str, steps: int, share: float = 0.9
) -> float:
    """Return the days that a run takes if all devices reach that share of their peak.

    Args:
      flops: of a step, on all devices.
      devices: how many.
      device: their rates.
      dtype: of the products.
      steps: of the run.
      share: more than any run reaches.
    """
    return steps * flops / (share * device.peak(dtype) * devices) / 86_400


def is_pruned(candidate: Candidate, fits: Mapping[Candidate, bool]) -> bool:
    """Return whether those that were compiled say that it does not fit, or is not the quickest."""
    return any(
        candidate.is_slower_than(other) if fitting else candidate.needs_at_least(other)
        for other, fitting in fits.items()
    )
