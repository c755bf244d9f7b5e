"""Save, verify and restore a run, over Orbax.

Orbax keeps no checksum of array data: a flipped bit restores silently. So a digest of every
array, computed on the device, travels in the checkpoint's `meta` item and is compared after
reading; a checkpoint that fails is moved to `quarantine/` and the one before it is tried. Orbax
also casts another dtype silently and knows nothing of the data: `meta` holds a fingerprint too.

A checkpoint has three items: `model` (parameters and batch statistics), `train` (the step and
the optimizer's state) and `meta` (JSON); a run that keeps moving averages has them in a fourth,
`ema`, laid out as `model`. The data order is a function of the step alone, so it needs no state of
its own. A checkpoint with its blocks stacked for a loop restores into a model that has them one by
one, and the other way round.

With several processes all of them save and restore, each its own parts of the arrays, on a file
system they share; process 0 alone renames and reads what decides for all.
"""

import dataclasses
import functools
import json
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import checkpoint_managers

from clip_jax.errors import UserError, short
from clip_jax.models.lora import LORA, adapter_scale, make_adapters, merge_adapters
from clip_jax.models.projection import PROJECTIONS, without_projections
from clip_jax.models.stack import stack_layers, unstack_layers
from clip_jax.parallel.distributed import (
    from_first,
    gather,
    is_first,
    print_on_main,
    process_count,
    process_index,
)
from clip_jax.pretrained.work_folder import CHECKPOINT_DIRNAME
from clip_jax.training.save_errors import mute_orbax, saving
from clip_jax.training.state import TrainState
from clip_jax.typing import leaves_by_path

FORMAT = 1
QUARANTINE_DIRNAME = "quarantine"
COOLED_DIRNAME = "cooled"
"""Where the checkpoints of a cool-down lie when a run has gone on from before it."""


DIGEST = 2
"""The version of the digests that are saved; those of a checkpoint say theirs. 1 mixes no bits."""


@functools.partial(jax.jit, static_argnums=1)
def _digests(tree: Any, version: int) -> list[jax.Array]:
    return [_digest(x, version) for x in jax.tree.leaves(tree)]


def _digest(x: jax.Array, version: int) -> jax.Array:
    """Compute a uint32 over an array's raw bits, the same however it is sharded.

    The sum of mixed bits weighted by odd numbers, modulo 2^32: a change of any one element changes
    it, since an odd number has an inverse and the mixing too. Without the mixing an even number of
    signs could flip unseen, for each moves the sum by 2^31.
    """
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    bits = jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32)
    bits = bits if version == 1 else _mixed(bits)
    weight = jnp.ones((), jnp.uint32)
    stride = 2
    for axis in reversed(range(x.ndim)):
        weight = weight + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(
            stride % 2**32
        )
        stride *= x.shape[axis]
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _mixed(bits: jax.Array) -> jax.Array:
    """Return MurmurHash3's finalizer of 32 bits, in which each bit moves half of the others."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def tree_digests(tree: Any, version: int = 1) -> dict[str, int]:
    """Compute a digest of every array of a tree, by its path."""
    digests = jax.device_get(_digests(tree, version))
    return {path: int(d) for path, d in zip(leaves_by_path(tree), digests, strict=True)}


def meta_check(meta: dict[str, Any]) -> int:
    """Return a checksum of what `meta` says beside it."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


@jax.jit
def _finite(tree: Any) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]


def not_finite(tree: Any) -> list[str]:
    """Return the paths of the arrays that hold a value that is not finite."""
    finite = jax.device_get(_finite(tree))
    paths = zip(leaves_by_path(tree), finite, strict=True)
    return [path for path, is_finite in paths if not is_finite]


def replay_hint(workdir: Path, step: int) -> str:
    """Return the command that makes a step again."""
    return f"to look into it: python -m clip_jax.replay {workdir} --step {step}"


@dataclasses.dataclass(frozen=True)
class KeepSteps:
    """A policy of Orbax's: checkpoints of some steps stay."""

    steps: Collection[int]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Return which of the checkpoints stay."""
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of a work folder. Saving is asynchronous; `close` waits for it.

    Attributes:
      folder: the folder that holds them.

    Args:
      workdir: the work folder.
      keep: how many of the newest checkpoints stay.
      keep_steps: steps that stay however old they are.
      read_only: save nothing, and leave damaged checkpoints where they are.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        keep: int = 1,
        keep_steps: Collection[int] = (),
        read_only: bool = False,
    ) -> None:
        self.folder = Path(workdir).absolute() / CHECKPOINT_DIRNAME
        self._read_only = read_only
        self._keep, self._keep_steps = keep, keep_steps
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        mute_orbax()
        policy: Any = checkpoint_managers.LatestN(self._keep)
        if self._keep_steps:
            policies = [policy, KeepSteps(self._keep_steps)]
            policy = checkpoint_managers.AnyPreservationPolicy(policies)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            cleanup_tmp_directories=not self._read_only,
            create=not self._read_only,
            read_only=self._read_only,
            multiprocessing_options=self._multiprocessing(),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _multiprocessing(self) -> ocp.options.MultiprocessingOptions:
        if process_count() == 1 or not self._read_only:
            return ocp.options.MultiprocessingOptions()
        # Reading waits for nobody, so that one process may do it alone.
        index = process_index()
        return ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"reader_{index}"
        )

    def steps(self) -> list[int]:
        """Return the steps with a committed checkpoint, newest first."""
        with saving(self.folder):
            self._manager.wait_until_finished()
        return sorted(self._manager.all_steps(), reverse=True)

    def save(
        self,
        state: TrainState,
        step: int,
        fingerprint: dict[str, Any],
        *,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start saving the state after `step` updates; a step that is saved already is left alone.

        Args:
          state: the state.
          step: the number of its updates.
          fingerprint: of the run.
          metrics: of an evaluation of this state.

        Raises:
          UserError: the disk has no room for it, or the state holds what is not finite.
        """
        if step in self._manager.all_steps():
            return
        if not from_first(self.folder.is_dir()):
            raise UserError(
                f"{self.folder} was removed while the run went on, and step {step} cannot be saved"
            )
        self.require_room(state)
        items = _items(state)
        self._require_finite(items, step)
        meta = {
            "format": FORMAT,
            "step": step,
            "fingerprint": fingerprint,
            "digest": DIGEST,
            "digests": tree_digests(items, DIGEST),
            "metrics": metrics or {},
        }
        # Of what is read back: JSON turns tuples into lists.
        meta = json.loads(json.dumps(meta))
        meta["check"] = meta_check(meta)
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        composite = ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta))
        with saving(self.folder):
            self._manager.save(step, args=composite, force=True)

    def _require_finite(self, items: dict[str, Any], step: int) -> None:
        # The step's guard sees its loss and gradients; what the update makes of them is seen here.
        paths = not_finite(items)
        if not paths:
            return
        earlier = self.steps()
        kept = f"step {earlier[0]} in {self.folder} stays" if earlier else "none was saved before"
        raise UserError(
            f"the state after step {step} is not finite, first in {paths[0]}, and is not saved; "
            f"{kept}; lower config.optim.learning_rate; {replay_hint(self.folder.parent, step)}"
        )

    def require_room(self, state: TrainState) -> None:
        """Raise UserError if the disk has no room for one more checkpoint of this size.

        Orbax finds that out in many threads at once, and ends in pages of their errors.
        """
        total, _, free = from_first(shutil.disk_usage(self.folder) if is_first() else None)
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        if total and free < needed:  # a file system in the cloud may have no size
            raise UserError(
                f"a checkpoint is {needed / 1e6:,.1f} MB and {self.folder} has room for "
                f"{free / 1e6:,.1f} MB; make room and run the same command again"
            )

    def restore(
        self, shapes: TrainState, *, last: int | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Restore the newest undamaged state, laid out as `shapes`, and its meta; None without any.

        `last` leaves out those after that step. Damaged checkpoints are moved into `quarantine/`
        and named on the way.

        Raises:
          UserError: there were checkpoints and none of them is whole, or they hold the arrays of
            another model or optimizer.
        """
        restored = self._restore(_items(shapes), last)
        if restored is None:
            return None
        items, meta = restored
        state = TrainState(
            step=items["train"]["step"],
            params=items["model"]["params"] | _projections(items["train"]),
            batch_stats=items["model"]["batch_stats"],
            opt_state=items["train"]["opt_state"],
            ema=items.get("ema", {}),
        )
        return state, meta

    def restore_model(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restore the newest undamaged `{"params", "batch_stats"}` and its meta; None without any.

        They are the moving averages where the run keeps them: that is what it is trained for.
        Adapters are merged into the kernels.
        """
        restored = self.restore_parts(shapes)
        if restored is None:
            return None
        variables, meta = restored
        return merged_variables(variables, _adapter_scale(meta)), meta

    def restore_parts(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restore as `restore_model` does, adapters as they are, under "lora" in the parameters."""
        meta = self.latest_meta()
        averaged = meta is not None and any(name.startswith("ema/") for name in meta["digests"])
        item = "ema" if averaged else "model"
        if meta is not None and any(f"/{LORA}/" in name for name in meta["digests"]):
            shapes = shapes | {"params": _with_adapter_shapes(shapes["params"], meta)}
        restored = self._restore({item: shapes})
        return None if restored is None else (restored[0][item], restored[1])

    def latest_meta(self, *, last: int | None = None) -> dict[str, Any] | None:
        """Return the meta item of the newest checkpoint that has a readable one, up to a step."""
        metas = (self._read_meta(step) for step in self.steps() if last is None or step <= last)
        meta = next((meta for meta in metas if meta is not None), None)
        return meta if self._read_only else from_first(meta)

    def _read_meta(self, step: int) -> dict[str, Any] | None:
        try:
            meta = json.loads((self.folder / str(step) / "meta" / "metadata").read_text())
            # Checkpoints of earlier versions have no checksum here.
            is_earlier = not {"digest", "check"} & meta.keys()
            whole = is_earlier or meta.get("check") == meta_check(meta)
            return meta if whole and meta.get("format") == FORMAT and "digests" in meta else None
        except (OSError, ValueError, AttributeError):
            return None

    def _saved_layout(self, meta: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
        """Return the shapes in the layout of the checkpoint: blocks stacked or one by one.

        Raises:
          UserError: it holds other arrays.
        """
        saved = frozenset(name for name in meta["digests"] if name.split("/")[0] in shapes)
        layout = _with_names(shapes, saved)
        if _names(layout) != saved:
            raise UserError(
                f"the checkpoints in {self.folder} hold other arrays than this model and "
                f"optimizer have, the first is {min(saved ^ _names(layout))}; choose another "
                "--workdir"
            )
        return layout

    def _restore(
        self, shapes: dict[str, Any], last: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        # What one process cannot read none restores: they agree before they go on together.
        together = not all(x.sharding.is_fully_addressable for x in jax.tree.leaves(shapes))
        steps = from_first(self.steps()) if together else self.steps()
        steps = [step for step in steps if last is None or step <= last]
        for step in steps:
            meta = from_first(self._read_meta(step)) if together else self._read_meta(step)
            if meta is None:
                self._quarantine(step, "its meta item is missing or unreadable")
                continue
            items, fault = self._try_read(step, self._saved_layout(meta, shapes))
            if together:
                fault = next((f for f in gather(fault) if f), None)
            fault = fault or _first_difference(items, meta)
            if fault is None:
                return _lay_out(items, shapes), meta
            self._quarantine(step, fault)
        if steps:
            raise UserError(
                f"none of the {len(steps)} checkpoints in {self.folder} can be read; "
                "start again in another --workdir"
            )
        return None

    def _try_read(self, step: int, shapes: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """Read the items of a checkpoint; return them, or why they cannot be read."""
        # The handler, not the manager: that one waits for all processes, and one may have failed.
        handler = ocp.StandardCheckpointHandler()
        try:
            items = {
                name: handler.restore(
                    self.folder / str(step) / name, args=ocp.args.StandardRestore(tree)
                )
                for name, tree in shapes.items()
            }
            return items, None
        except Exception as error:  # Orbax raises many kinds for a damaged file
            return {}, short(error)[:200]
        finally:
            handler.close()

    def _quarantine(self, step: int, fault: str) -> None:
        """Move a damaged checkpoint away, and name it."""
        if self._read_only:
            print_on_main(f"checkpoint {step} is damaged and left out ({fault})")
            return
        self._manager.close()
        if is_first():
            self._rename(step, fault)
        gather(None)  # nobody looks into the folder before it is as it should be
        self._manager = self._open()

    def _rename(self, step: int, fault: str) -> None:
        target = self._move(step, QUARANTINE_DIRNAME)
        print_on_main(f"checkpoint {step} is damaged and moved to {target} ({fault})")

    def _move(self, step: int, dirname: str) -> Path:
        target = self.folder.parent / dirname / str(step)
        target.parent.mkdir(exist_ok=True)
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{step}-{number}")
        (self.folder / str(step)).rename(target)
        return target

    def set_aside(self, after: int, dirname: str) -> None:
        """Move the checkpoints after a step into another folder of the work folder."""
        steps = [step for step in from_first(self.steps()) if step > after]
        self._manager.close()
        if is_first():
            for step in steps:
                self._move(step, dirname)
        gather(None)  # nobody looks into the folder before it is as it should be
        self._manager = self._open()

    def close(self) -> None:
        """Wait for what is being saved, and close the folder.

        Raises:
          UserError: it could not be written.
        """
        with saving(self.folder):
            self._manager.wait_until_finished()
        self._manager.close()


def merged_variables(variables: dict[str, Any], scale: float) -> dict[str, Any]:
    """Return {"params", "batch_stats"} with adapters merged, each kernel where it lies."""
    params = variables["params"]
    if LORA not in params:
        return variables
    own = {name: tree for name, tree in params.items() if name != LORA}
    shardings = jax.tree.map(lambda x: x.sharding, own)
    merge = jax.jit(merge_adapters, static_argnums=1, out_shardings=shardings)
    return variables | {"params": merge(params, scale)}


def _adapter_fields(meta: dict[str, Any]) -> tuple[int, float, tuple[str, ...]]:
    """Return rank, alpha and targets of a run's adapters."""
    names = ("lora_rank", "lora_alpha", "lora_targets")
    rank, alpha, targets = (meta["fingerprint"].get(f"config.train.{name}") for name in names)
    return int(rank or 0), float(alpha or 0), tuple(targets or ())


def _adapter_scale(meta: dict[str, Any]) -> float:
    return adapter_scale(*_adapter_fields(meta)[:2])


def _with_adapter_shapes(params: Any, meta: dict[str, Any]) -> Any:
    """Return the shapes of parameters with those of the run's adapters, whole on every device."""
    rank, _, targets = _adapter_fields(meta)
    make = functools.partial(make_adapters, rank=rank, targets=targets, seed=0)
    whole: Any = jax.tree.leaves(params)[0].sharding
    if isinstance(whole, NamedSharding):
        whole = NamedSharding(whole.mesh, P())
    return params | {
        LORA: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            jax.eval_shape(make, params),
        )
    }


def _projections(train: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in train.items() if name == PROJECTIONS}


def _items(state: TrainState) -> dict[str, Any]:
    params = without_projections(state.params)
    items = {
        "model": {"params": params, "batch_stats": state.batch_stats},
        "train": {"step": state.step, "opt_state": state.opt_state},
    }
    if PROJECTIONS in state.params:
        items["train"][PROJECTIONS] = state.params[PROJECTIONS]
    return items | {"ema": state.ema} if state.ema else items


def _names(tree: Any) -> frozenset[str]:
    return frozenset(leaves_by_path(tree))


def _with_names(items: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Return the items, each part's blocks stacked or one by one, whichever has these names."""

    def layout(item: str, key: str, part: Any) -> Any:
        forms = (part, stack_layers(part), unstack_layers(part))
        return next((form for form in forms if _names({item: {key: form}}) <= names), part)

    return {
        item: {key: layout(item, key, part) for key, part in parts.items()}
        for item, parts in items.items()
    }


def _lay_out(items: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the items in the layout and the shardings of `shapes`."""
    names = _names(shapes)
    if _names(items) == names:
        return items
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(lambda tree: _with_names(tree, names), out_shardings=shardings)(items)


def _first_difference(items: dict[str, Any], meta: dict[str, Any]) -> str | None:
    """Return which array differs from what was saved, if one does."""
    actual = tree_digests(items, meta.get("digest", 1))
    expected = {k: v for k, v in meta["digests"].items() if k.split("/")[0] in items}
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            return f"{name} differs from what was saved"
    return None
