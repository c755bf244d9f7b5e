"""Make any step of a run again, and look into it.

Order, crops and draws are functions of seed and step, so the checkpoint before a step and the
steps in between give the very state, batch and loss that the run had. On as many devices of the
same kind they are equal to the bit; otherwise up to rounding.
"""

import dataclasses
import json
import re
import shutil
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.data.dataset import TrainingData
from clip_jax.data.manifest import RUN_MANIFEST_FILENAME
from clip_jax.errors import UserError
from clip_jax.losses.dense import pair_losses
from clip_jax.models.lora import adapter_scale
from clip_jax.models.stack import unstack_layers
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import batch_part
from clip_jax.parallel.program_cache import start_program_cache
from clip_jax.pretrained.work_folder import RunDescription, read_description
from clip_jax.sections import (
    Config,
    MeshSection,
    all_values,
    config_from_saved,
    fixed_values,
    replace_values,
)
from clip_jax.training.batch_feed import BatchFeed, PlacedBatch
from clip_jax.training.bucket_copy import local_copy
from clip_jax.training.checkpoint import Checkpoints, not_finite
from clip_jax.training.device_wait import DeviceWait
from clip_jax.training.fingerprint import (
    CONTENTS,
    DATA,
    PAIRS,
    TEACHERS,
    TOKENIZER,
    Fingerprint,
)
from clip_jax.training.history import devices, read_history
from clip_jax.training.metrics import to_json
from clip_jax.training.rates import frozen_towers, split_frozen
from clip_jax.training.setup import (
    RunComponents,
    build_run,
    draws_of_run,
    find_source,
    gradient_of_run,
    init_of_run,
    make_loader,
    make_step,
    open_data,
    open_distiller,
    steps_of_run,
    warm_start_of_run,
)
from clip_jax.training.signals import StopRequest
from clip_jax.training.skip_limit import SkipLimit
from clip_jax.training.state import TrainState
from clip_jax.training.step import TrainStep, make_features, split_negatives
from clip_jax.training.trainer import make_fingerprint
from clip_jax.typing import leaves_by_path

DATA_KEYS = (PAIRS, DATA, CONTENTS, TOKENIZER)
_NUMBERED = re.compile(r"_\d+$")


@dataclasses.dataclass(frozen=True)
class ReplayedSample:
    """A row of the step's batch.

    Attributes:
      key: "shard/key".
      caption: as the tower read it: cut to the context.
      image_loss, text_loss: what it adds to the loss in each direction.
      valid: False is a sample that could not be read.
    """

    key: str
    caption: str
    image_loss: float
    text_loss: float
    valid: bool


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step that was made again.

    Attributes:
      step: its number.
      start: the step of the checkpoint that it was made from; 0 is the run's beginning.
      metrics: of the step, as `metrics.jsonl` has them.
      logged: that line of `metrics.jsonl`; None where there is none.
      samples: the batch, in order.
      images_BHWC: as the tower got them but for the normalization, uint8.
      gradient_norms: of each module, in the tree's order; block by block inside the towers.
      parameter_norms: of the same modules before the step.
      not_finite: where a value first was not finite, stage by stage; empty if all were.
      curve: the metrics of the steps around it.
      devices: what it was made on, and what the run was on if that was something else.
    """

    step: int
    start: int
    metrics: dict[str, Any]
    logged: dict[str, Any] | None
    samples: list[ReplayedSample]
    images_BHWC: np.ndarray
    gradient_norms: dict[str, float]
    parameter_norms: dict[str, float]
    not_finite: dict[str, str]
    curve: list[dict[str, Any]]
    devices: tuple[str, str]

    @property
    def is_equal(self) -> bool | None:
        """Whether the loss is the logged one to the bit; None where none was logged."""
        # A loss that is not finite is a text in both.
        loss = to_json(self.metrics["loss"])
        return None if self.logged is None else self.logged["loss"] == loss


def replay(workdir: str | Path, step: int, *, around: int = 0, data: str = "") -> Replay:
    """Make a step of a run again; nothing in the work folder is touched.

    Args:
      workdir: of the run; also the URL of one in a bucket.
      step: from 1.
      around: how many steps before and after are made for the curve.
      data: where the training data lie now; empty is where they lay.

    Raises:
      UserError: there is no such run or step, or its data are not there any more.
    """
    if step < 1 or around < 0:
        raise UserError(f"--step {step} --around {around}: steps count from 1")
    if distributed.process_count() > 1:
        raise UserError("a replay is of one process: start it without --coordinator")
    first = max(1, step - around)
    folder = Path(local_copy(workdir, last=first - 1))
    description = read_description(folder)
    if not description.config:
        raise UserError(f"{workdir} is a converted model, not a run: it has no steps")
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="clip_jax_replay_"))
        if (folder / RUN_MANIFEST_FILENAME).exists():
            shutil.copy(folder / RUN_MANIFEST_FILENAME, scratch)
        checkpoints = stack.enter_context(closing(Checkpoints(folder, read_only=True)))
        meta = checkpoints.latest_meta(last=first - 1)
        run, shards = _rebuild(folder, description, meta, step, data, scratch)
        restored = checkpoints.restore(run.shapes, last=first - 1) if meta else None
        state = restored[0] if restored else _first_state(run)
        return _replay(run, shards, state, folder, step, around)


def _rebuild(
    folder: Path,
    description: RunDescription,
    meta: dict[str, Any] | None,
    step: int,
    data: str,
    scratch: str,
) -> tuple[RunComponents, TrainingData]:
    """Build the run as it was at a step, and open its data."""
    saved: Fingerprint = meta["fingerprint"] if meta else {}
    config = _config_at(folder, config_from_saved(description.config), saved, step)
    if data:
        config = replace_values(config, {"config.data.train": data})
    if description.tokenizer is not None and description.tokenizer.file:
        config = replace_values(config, {"config.data.tokenizer": description.tokenizer.file})
    start_program_cache(config.train.compile_cache, folder)
    shards = open_data(config, scratch)
    pairs = sum(map(len, shards.shards))
    starts = _starts_until(read_history(folder), step)
    steps = starts[-1]["steps"] if starts else steps_of_run(config, pairs)
    if step > steps:
        raise UserError(f"--step {step}: the run has {steps} steps")
    distiller = open_distiller(config, steps, shards)
    run = build_run(config, steps, description=description, distiller=distiller)
    now = make_fingerprint(run, shards, pairs)
    since = int(meta["step"]) if meta else 0
    changed = {key for line in starts if line["step"] >= since for key in line["changes"]}
    for key in DATA_KEYS:
        if key not in changed and key in saved and key in now and saved[key] != now[key]:
            raise UserError(f"{key} is another than the run in {folder} had; give its --data")
    if TEACHERS not in changed and saved.get(TEACHERS, now[TEACHERS]) != now[TEACHERS]:
        raise UserError(f"{TEACHERS} are others than the run in {folder} had")
    return run, shards


def _starts_until(history: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return the lines of a history up to the last start that came to a step."""
    last = max((i for i, line in enumerate(history) if line["step"] < step), default=-1)
    return history[: last + 1]


def _config_at(folder: Path, config: Config, saved: Fingerprint, step: int) -> Config:
    """Return the config that a step had: what later starts changed is as it was before them."""
    names = all_values(config).keys() - {"config.data.tokenizer"}
    history = read_history(folder)
    for line in reversed(history[len(_starts_until(history, step)) :]):
        before = {key: old for key, (old, _) in line["changes"].items() if key in names}
        config = replace_values(config, before)
    if not history:  # an earlier version's
        known = {key: saved[key] for key in fixed_values(config) if key in saved}
        config = replace_values(config, known)
    mesh, devices = config.mesh, jax.device_count()
    if devices % (mesh.fsdp * mesh.tensor) or mesh.data * mesh.fsdp * mesh.tensor > devices:
        config = dataclasses.replace(config, mesh=MeshSection())
    return config


def _first_state(run: RunComponents) -> TrainState:
    config = run.config
    source = find_source(config.model, None)
    if source is not None:
        return warm_start_of_run(run, source)
    if config.model.init_from:
        raise UserError(
            f"no checkpoint is before that step, and config.model.init_from "
            f"{config.model.init_from} is not there; take a later --step"
        )
    return init_of_run(run)()


def _replay(
    run: RunComponents,
    shards: TrainingData,
    state: TrainState,
    folder: Path,
    step: int,
    around: int,
) -> Replay:
    start, train_step = int(state.step), make_step(run)
    curve: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    with make_loader(run, shards, start) as loader, closing(DeviceWait()) as device_wait:
        feed = BatchFeed(
            run,
            loader,
            count=step + around - start,
            limit=SkipLimit(shards.log, batch_part(run.mesh)[0], loader),
            stop_request=StopRequest(),
            device_wait=device_wait,
        )
        for number in range(start + 1, step + around + 1):
            batch = feed.place_next()
            if batch is None:
                break
            if number == step:
                before = jax.tree.map(jnp.copy, state)
                state, metrics = _step(train_step, state, batch)
                found = _look_into(run, before, state, batch, metrics)
            else:
                state, metrics = _step(train_step, state, batch)
            if number >= step - around:
                curve.append({"step": number, **metrics})
            if not metrics["finite"]:
                break
    if not found:
        raise UserError(f"step {number} is not finite and ends the run; give --step {number}")
    starts = _starts_until(read_history(folder), step)
    return Replay(
        step=step,
        start=start,
        logged=_logged(folder, step),
        curve=curve,
        devices=(devices(), str(starts[-1].get("devices", "")) if starts else ""),
        **found,
    )


def _step(
    train_step: TrainStep, state: TrainState, batch: PlacedBatch
) -> tuple[TrainState, dict[str, Any]]:
    state, metrics = train_step(state, batch.arrays)
    return state, {name: value.item() for name, value in jax.device_get(metrics).items()}


def _logged(folder: Path, step: int) -> dict[str, Any] | None:
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = None
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line.get("step") == step and "loss" in line:
            found = line
    return found


def _look_into(
    run: RunComponents,
    before: TrainState,
    after: TrainState,
    batch: PlacedBatch,
    metrics: dict[str, Any],
) -> dict[str, Any]:
    """Return what a replay says of the step itself."""
    details, modules = look_at_step(run, before, batch.arrays)
    losses, gradient_norms = details["losses"], details["gradient_norms"]
    samples = [
        ReplayedSample(
            key=key,
            caption=run.tokenizer.decode(batch.text[i].tolist()) if key else "",
            image_loss=float(losses.image_B[i]),
            text_loss=float(losses.text_B[i]),
            valid=bool(details["valid"][i]),
        )
        for i, key in enumerate(batch.keys)
    ]
    return {
        "metrics": metrics,
        "samples": samples,
        "images_BHWC": np.asarray(jax.device_get(batch.arrays["image"])),
        "gradient_norms": {name: float(norm) for name, norm in gradient_norms.items()},
        "parameter_norms": {k: float(norm) for k, norm in details["parameter_norms"].items()},
        "not_finite": _first_not_finite(before, after, metrics, details, modules),
    }


def look_at_step(
    run: RunComponents, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[dict[str, Any], list[str]]:
    """Compute a step's losses of each pair and norms of each module, on the state before it.

    Returns:
      "losses", "valid", "gradient_norms", "parameter_norms" and "outputs_finite", one for each
      module in the order in which they returned; and the paths of those.
    """
    config, mesh = run.config, run.mesh
    # Plain blocks: what is computed again or in a loop cannot be watched from outside.
    plain = run.model.clone(remat="none", scan=False)
    features = make_features(
        plain,
        mesh=mesh,
        preprocess=run.preprocess,
        frozen=frozen_towers(run.shapes.params, config.train),
        lora_scale=adapter_scale(config.train.lora_rank, config.train.lora_alpha),
    )
    gradient = gradient_of_run(run)
    draws, modules = draws_of_run(run), list[str]()

    def details(state: TrainState, batch: dict[str, jax.Array]) -> dict[str, Any]:
        modules.clear()
        outputs_finite: list[jax.Array] = []

        def watch(next_method, args, kwargs, context: nn.module.InterceptorContext):
            out = next_method(*args, **kwargs)
            arrays = [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]
            floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
            if floats:
                modules.append("/".join(context.module.path) or context.method_name)
                outputs_finite.append(
                    jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
                )
            return out

        rows = {**batch, **draws(state.step, batch["valid"].size)}
        params = unstack_layers(state.params)
        with nn.intercept_methods(watch):
            z_image_BD, z_text_BD, _ = features(params, state.batch_stats, rows)
        z_text_BD, negatives = split_negatives(z_text_BD, rows)
        losses = pair_losses(
            config.train.loss,
            z_image_BD,
            z_text_BD,
            jnp.exp(params["logit_scale"]),
            params.get("logit_bias", jnp.zeros(())),
            valid_B=rows["valid"],
            caption_id_B=rows["caption_id"] if config.train.mask_equal_captions else None,
            negatives=negatives,
        )
        trained, frozen = split_frozen(state.params, config.train)
        grads = gradient(trained, frozen, state.batch_stats, rows)[2]
        return {
            "losses": losses,
            "valid": rows["valid"],
            "gradient_norms": norms_by_module(unstack_layers(grads)),
            "parameter_norms": norms_by_module(params),
            "outputs_finite": outputs_finite,
        }

    return jax.device_get(jax.jit(details)(state, batch)), modules


def norms_by_module(tree: Any) -> dict[str, jax.Array]:
    """Return the norm of each block of a tower, and of each module outside the blocks."""
    groups: dict[str, list[jax.Array]] = {}
    for path, leaf in leaves_by_path(tree).items():
        groups.setdefault(module_of(path), []).append(leaf)
    return {name: optax.tree.norm(leaves) for name, leaves in groups.items()}


def module_of(path: str) -> str:
    """Return what of "visual/transformer/resblocks_3/mlp/c_fc/kernel" norms are told for."""
    parts = path.split("/")
    numbered = [i for i, part in enumerate(parts) if _NUMBERED.search(part)]
    return "/".join(parts[: numbered[0] + 1 if numbered else 2])


def _first_not_finite(
    before: TrainState,
    after: TrainState,
    metrics: dict[str, Any],
    details: dict[str, Any],
    modules: list[str],
) -> dict[str, str]:
    """Return the first place of each stage of a step that was not finite, stage by stage."""
    forward = zip(modules, details["outputs_finite"], strict=True)
    norms = details["gradient_norms"]
    infinite = [name for name, norm in norms.items() if not np.isfinite(norm)]
    # Gradients come into being from the last module to the first.
    backward = [module_of(path) for path in reversed(modules) if module_of(path) in infinite]
    losses = details["losses"]
    rows = np.flatnonzero(details["valid"] & ~np.isfinite(losses.image_B + losses.text_B))
    stages = {
        "the state before the step": not_finite(before)[:1],
        "forward": [path for path, finite in forward if not finite][:1],
        "the loss": [f"row {rows[0]}"] if len(rows) else [],
        "backward": (backward or infinite)[:1],
        # A step that is not finite leaves the state as it was.
        "the state after the step": not_finite(after)[:1] if metrics["finite"] else [],
    }
    return {stage: places[0] for stage, places in stages.items() if places}
