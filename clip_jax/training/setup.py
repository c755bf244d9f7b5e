"""The parts of a run, made from its config: model, optimizer, mesh, loss, step and loader."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.data.dataset import TrainingData, open_sources, steps_per_epoch
from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.data.loader import Loader, make_train_loader
from clip_jax.data.manifest import ProcessShare
from clip_jax.data.order import BatchPart
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.skip_log import SKIPPED_FILENAME, SkipLog
from clip_jax.errors import UserError
from clip_jax.evaluation.in_training import Evaluator, make_evaluator
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.losses import make_loss
from clip_jax.models.attention import this_accelerator
from clip_jax.models.clip import CLIP, CLIPConfig, attention_line
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.flops import image_flops, text_flops, train_flops_per_pair
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.models.zoo import model_config
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import (
    BATCH_AXES,
    batch_part,
    batch_shards,
    check_batch_size,
    make_mesh,
    mesh_text,
)
from clip_jax.sections import Config
from clip_jax.tokenizers import TokenizerSpec, make_tokenizer, tokenizer_spec
from clip_jax.training.device_augment import kept_patches, make_draws
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import TrainState, device_bytes, parameter_counts, state_shapes
from clip_jax.training.step import TrainStep, make_encoders, make_train_step
from clip_jax.training.warm_start import (
    SourceCheckpoint,
    has_checkpoints,
    read_source,
    source_tokenizer,
    started_from,
)
from clip_jax.typing import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunComponents:
    """The parts of a run that need no data: model, optimizer, mesh and the state's layout.

    Attributes:
      tokenizer_spec, preprocess: what the trained model is used with; a checkpoint's own, where the
        run starts from one.
      origin: that checkpoint.
    """

    mesh: Mesh
    tokenizer_spec: TokenizerSpec
    tokenizer: Tokenizer
    model: CLIP
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    shapes: TrainState
    preprocess: Preprocess = OPENAI
    origin: SourceCheckpoint | None = None


def sized_model(
    name: str, tokenizer: Tokenizer, *, image_size: int = 0, context_length: int = 0
) -> CLIPConfig:
    """A row of the zoo, its text tower sized for a tokenizer; sizes of 0 are the row's own.

    Raises:
      UserError: the image tower does not take images of that size.
    """
    config = model_config(name)
    vision = config.vision
    text = dataclasses.replace(
        config.text,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        context_length=context_length or config.text.context_length,
    )
    if image_size and image_size != vision.image_size:
        if isinstance(vision, ConvNetConfig):
            takes = f"{vision.image_size} alone"
        elif isinstance(vision, ResNetConfig):
            takes = "" if image_size % 32 == 0 else "multiples of 32"
        else:
            takes = "" if image_size >= vision.patch_size else f"{vision.patch_size} or more"
        if takes:
            raise UserError(f"config.model.image_size is {image_size}; {name} takes {takes}")
        vision = dataclasses.replace(vision, image_size=image_size)
    return dataclasses.replace(config, vision=vision, text=text)


def build_run(config: Config, steps: int, workdir: str | None = None) -> RunComponents:
    """Build what a run of this many steps needs, allocating nothing on devices.

    A run in `workdir` that goes on needs the checkpoint it began from no more: it has its own.
    Without a `workdir` nothing is run, and a checkpoint to start from may be yet to come.

    Raises:
      UserError: the model, the tokenizer, the mesh or the checkpoint does not fit the config.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_batch_size("config.train.batch_size", config.train.batch_size, mesh)
    if config.train.microbatch_size:
        check_batch_size("config.train.microbatch_size", config.train.microbatch_size, mesh)
    m, given = config.model, config.data.tokenizer
    origin, preprocess = None, OPENAI
    if m.init_from and (workdir is not None or Path(m.init_from).exists()):
        goes_on = workdir is not None and has_checkpoints(workdir)
        known_as = f"{m.name}:{m.init_tag}" if m.init_tag else m.name
        origin = read_source(str(workdir) if goes_on else m.init_from, known_as)
        preprocess = origin.checkpoint.preprocess
    spec = source_tokenizer(origin, given) if origin else tokenizer_spec(given)
    tokenizer = make_tokenizer(spec)
    sizes = sized_model(m.name, tokenizer, image_size=m.image_size, context_length=m.context_length)
    if config.train.loss == "sigmoid":
        # Where SigLIP begins (arXiv:2303.15343, section 3.2).
        sizes = dataclasses.replace(sizes, init_logit_scale=math.log(10.0), init_logit_bias=-10.0)
    if origin:
        sizes = started_from(origin, sizes)
    check_patch_dropout(config, sizes)
    model = CLIP(sizes, dtype=jnp.dtype(m.dtype), attention=m.attention, remat=m.remat, scan=m.scan)
    o = dataclasses.asdict(config.optim)
    schedule = make_schedule(o.pop("learning_rate"), o.pop("warmup_steps"), steps)
    optimizer = make_optimizer(schedule, **o)
    t = config.train
    shapes = state_shapes(model, optimizer, mesh, freeze=t.freeze, ema=t.ema_decay > 0)
    return RunComponents(
        mesh, spec, tokenizer, model, schedule, optimizer, shapes, preprocess, origin
    )


def kept_in_training(config: Config, w: RunComponents) -> int | None:
    """Patches of a training image that its tower sees; None where that is all of them."""
    vision, dropout = w.model.config.vision, config.model.patch_dropout
    if not isinstance(vision, ViTConfig) or not dropout:
        return None
    return kept_patches(vision.grid_size**2, dropout)


def pair_flops(config: Config, w: RunComponents, length: int) -> int:
    """Operations that training on one pair of this run takes, its caption trimmed to `length`."""
    kept = kept_in_training(config, w)
    return train_flops_per_pair(
        w.model.config, length, kept_patches=kept, freeze=config.train.freeze
    )


def kernels(config: Config, w: RunComponents) -> str:
    """One line on what computes the attention of each tower on these devices."""
    return attention_line(w.model, this_accelerator(), kept_in_training(config, w))


def describe(config: Config) -> str:
    """What `--dry_run` prints: the config, parameters, mesh, and bytes per device."""
    w = build_run(config, max(1, config.train.steps))  # epochs would need the data; no shape does
    counts = parameter_counts(w.shapes.params)
    c = w.model.config
    rows = config.train.batch_size // batch_shards(w.mesh)
    size, length = c.vision.image_size, c.text.context_length
    mib = 1 / 2**20
    lines = [
        json.dumps(dataclasses.asdict(config), indent=2),
        f"model       {config.model.name}: image tower {counts['image']:,} parameters, "
        f"text tower {counts['text']:,}, in all {counts['total']:,}",
        *(
            [f"start       {config.model.init_from}" + ("" if w.origin else ", which is not there")]
            if config.model.init_from
            else []
        ),
        f"forward     {image_flops(c) / 1e9:.2f} GFLOP an image, "
        f"{text_flops(c, length) / 1e9:.2f} GFLOP a caption of {length} tokens",
        f"mesh        {mesh_text(w.mesh.shape)} over {jax.device_count()} "
        f"{jax.devices()[0].device_kind} devices",
        f"per device  {rows} pairs of the global batch of {config.train.batch_size:,}",
        f"            parameters {device_bytes(w.shapes.params) * mib:,.1f} MiB, "
        f"optimizer {device_bytes(w.shapes.opt_state) * mib:,.1f} MiB, "
        f"images {rows * size * size * 3 * mib:,.1f} MiB (activations come on top)",
    ]
    return "\n".join(lines)


def make_step(config: Config, w: RunComponents) -> TrainStep:
    """The jitted step of a run."""
    vision = w.model.config.vision
    loss_fn = make_loss(
        config.train.loss,
        mesh=w.mesh,
        batch_axes=BATCH_AXES,
        tile_size=config.train.loss_tile,
        mask_equal_captions=config.train.mask_equal_captions,
    )
    return make_train_step(
        w.model,
        loss_fn,
        w.optimizer,
        w.schedule,
        w.shapes,
        mesh=w.mesh,
        image_mean=w.preprocess.mean,
        image_std=w.preprocess.std,
        draws=make_draws(
            seed=config.seed,
            color_jitter=config.data.color_jitter,
            patches=vision.grid_size**2 if isinstance(vision, ViTConfig) else 0,
            patch_dropout=config.model.patch_dropout,
        ),
        microbatch_size=config.train.microbatch_size,
        freeze=config.train.freeze,
        ema_decay=config.train.ema_decay,
    )


def check_patch_dropout(config: Config, sizes: CLIPConfig) -> None:
    """Raises UserError when patches are to be dropped that are not there, or must all be seen."""
    if not config.model.patch_dropout:
        return
    if not isinstance(sizes.vision, ViTConfig):
        raise UserError(
            f"config.model.patch_dropout is set and {config.model.name} has no patches to drop; "
            "take a ViT or set it to 0"
        )
    if config.train.freeze == "image":
        raise UserError(
            "config.model.patch_dropout is set and config.train.freeze is 'image': a frozen "
            "tower sees whole images; leave one of them out"
        )


def make_evaluation(config: Config, w: RunComponents) -> Evaluator | None:
    """What `config.eval.every` runs during a run, over the run's mesh; None where it is 0."""
    if not config.eval.data or not config.eval.every:
        return None
    encode_image, encode_text = make_encoders(
        w.model, image_mean=w.preprocess.mean, image_std=w.preprocess.std
    )
    return make_evaluator(
        encode_image,
        encode_text,
        EvalSpec.from_section(config.eval),
        w.mesh,
        scale=lambda variables: math.exp(float(variables["params"]["logit_scale"])),
        config=w.model.config,
        tokenizer=w.tokenizer,
        preprocess=w.preprocess,
    )


def open_data(config: Config, workdir: str) -> TrainingData:
    """The training data, counted; what is skipped goes to `skipped.jsonl` in the work folder.

    All processes call it, and see the same shards.

    Raises:
      UserError: a source cannot be read, or too many of its shards.
    """
    d = config.data
    log = SkipLog(
        Path(workdir) / SKIPPED_FILENAME, d.max_skip_fraction, process=distributed.process_index()
    )
    sources = open_sources(
        d.train,
        where=d.filter,
        unique_keys=d.unique_keys,
        log=log,
        cached_shards=windows_in_memory(config, distributed.process_count()),
        workdir=workdir,
        share=ProcessShare(
            distributed.process_index(), distributed.process_count(), distributed.gather
        ),
    )
    return TrainingData(sources, log)


def windows_in_memory(config: Config, processes: int) -> int:
    """How many shards a process may have in memory: the windows it reads from now, and the next."""
    d = config.data
    sources = 1 if isinstance(d.train, str) else len(d.train)
    # Processes that a tensor axis spans load the same rows, so that each has more streams.
    parts = max(1, processes // config.mesh.tensor)
    return 2 * sources * d.window * math.ceil(d.streams / parts)


def steps_of_run(config: Config, pairs: int) -> int:
    """The optimizer steps that the config asks for on data of so many pairs."""
    t = config.train
    if not config.data.repeat:
        return steps_per_epoch(pairs, t.batch_size, config.data.streams)
    return t.steps or int(t.epochs * pairs / t.batch_size)


def make_loader(config: Config, w: RunComponents, data: TrainingData, start: int) -> Loader:
    """Return this process's batches from step `start` on."""
    vision, text = w.model.config.vision, w.model.config.text
    return make_train_loader(
        data,
        config.data,
        w.tokenizer,
        shape=SampleShape(vision.image_size, text.context_length),
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start,
        part=BatchPart(*batch_part(w.mesh)),
    )
