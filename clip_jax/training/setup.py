"""The parts of a run, made from its config: model, optimizer, mesh, loss, step and loader."""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.data import caption_packing
from clip_jax.data.caption_packing import CaptionPacking, choose_packing, parse_shares
from clip_jax.data.dataset import TrainingData, open_sources, steps_per_epoch
from clip_jax.data.formats.remote import is_url
from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.data.loader import Loader, make_train_loader
from clip_jax.data.manifest import ProcessShare
from clip_jax.data.order import BatchPart
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.skip_log import SKIPPED_FILENAME, SkipLog
from clip_jax.errors import UserError
from clip_jax.evaluation.in_training import EncodeWith, Evaluator, make_evaluator
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.losses import LossFn, make_loss
from clip_jax.models.clip import CLIP, CLIPConfig, choose_kernels, variable_shapes
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.models.projection import Projections
from clip_jax.models.target import Target
from clip_jax.models.vit import ViTConfig
from clip_jax.models.zoo import model_config
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import (
    BATCH_AXES,
    batch_part,
    batch_shards,
    check_batch_size,
    make_mesh,
    mesh_target,
)
from clip_jax.pretrained.work_folder import RunDescription
from clip_jax.sections import Config, EvalSection, ModelSection, OptimSection, TrainSection
from clip_jax.tokenizers import TokenizerSpec, make_tokenizer, tokenizer_spec
from clip_jax.training.device_augment import DrawFn, kept_patches, make_draws
from clip_jax.training.distillation import (
    Distillation,
    Distiller,
    make_distillation,
    projections_of,
)
from clip_jax.training.optimizer import ELEMENTWISE, make_optimizer, make_schedule
from clip_jax.training.rates import Rates, frozen_towers, parameter_rates, trains_all
from clip_jax.training.state import Init, TrainState, make_init, state_shapes, with_extras
from clip_jax.training.step import GradientFn, TrainStep, make_gradient, make_train_step
from clip_jax.training.stored_features import open_stored
from clip_jax.training.teachers import load_teachers
from clip_jax.training.warm_start import (
    SourceCheckpoint,
    has_checkpoints,
    read_source,
    source_tokenizer,
    warm_start_sizes,
    warm_start_state,
)
from clip_jax.typing import Tokenizer, leaves_by_path


@dataclasses.dataclass(frozen=True)
class RunComponents:
    """The parts of a run that need no data: model, optimizer, mesh and the state's layout.

    Attributes:
      config: the experiment.
      mesh: all devices.
      tokenizer_spec, preprocess: belong to the trained model; they are a checkpoint's own, where
        the run starts from one.
      tokenizer: made from its spec.
      model: the towers, sized for tokenizer and images.
      schedule: the learning rate of a step.
      optimizer: of the parameters that are trained.
      shapes: the state as ShapeDtypeStructs with their shardings.
      source: the checkpoint that the run starts from.
      distiller: gives the teachers' features of its batches; None without teachers, and where
        nothing is trained.
    """

    config: Config
    mesh: Mesh
    tokenizer_spec: TokenizerSpec
    tokenizer: Tokenizer
    preprocess: Preprocess
    model: CLIP
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    shapes: TrainState
    source: SourceCheckpoint | None
    distiller: Distiller | None = None

    @property
    def projections(self) -> Projections:
        """Return the projections that it learns beside its model."""
        return projections_of_run(self.config, self.model.config, self.distiller)

    @functools.cached_property
    def caption_packing(self) -> CaptionPacking | None:
        """How a device's captions lie in a micro-batch; None trims them to the longest."""
        shares, text = self.config.data.caption_packing, self.model.config.text
        if shares in caption_packing.CHOICES or not text.supports_trimming:
            return None
        rows = rows_of_device(self.config, self.mesh)
        return choose_packing(parse_shares(shares), rows, text.context_length)


def rows_of_device(config: Config, mesh: Mesh) -> int:
    """Return the pairs of one device in a micro-batch."""
    return (config.train.microbatch_size or config.train.batch_size) // batch_shards(mesh)


def check_batch_sizes(section: TrainSection, shape: Mapping[str, int]) -> None:
    """Raise UserError if a mesh of this shape does not divide a run's batches evenly."""
    check_batch_size("config.train.batch_size", section.batch_size, shape)
    if section.microbatch_size:
        check_batch_size("config.train.microbatch_size", section.microbatch_size, shape)


def sized_model(
    name: str, tokenizer: Tokenizer, *, image_size: int, context_length: int
) -> CLIPConfig:
    """Return an entry of the zoo, its text tower sized for a tokenizer.

    Sizes of 0 are the entry's own.

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
        elif not isinstance(vision, ViTConfig):
            takes = "" if image_size % 32 == 0 else "multiples of 32"
        else:
            takes = "" if image_size >= vision.patch_size else f"{vision.patch_size} or more"
        if takes:
            raise UserError(f"config.model.image_size is {image_size}; {name} takes {takes}")
        vision = dataclasses.replace(vision, image_size=image_size)
    return dataclasses.replace(config, vision=vision, text=text)


def build_run(
    config: Config,
    steps: int,
    workdir: str | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    description: RunDescription | None = None,
    distiller: Distiller | None = None,
) -> RunComponents:
    """Build what a run of this many steps needs; nothing is allocated on devices.

    A run that is resumed in `workdir` needs the checkpoint it started from no more: it has its own.
    Without a `workdir` nothing is run, and a checkpoint to start from may be yet to come.
    `devices` are a topology's, to compile for; None are this process's own. A `description` says
    what was trained, whatever the config's names stand for now.

    Raises:
      UserError: the model, the tokenizer, the mesh or the checkpoint does not fit the config.
    """
    m, t = config.model, config.train
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    check_batch_sizes(t, mesh.shape)
    source = None if description else find_source(m, workdir)
    preprocess = source.checkpoint.preprocess if source else OPENAI
    given = config.data.tokenizer
    spec = source_tokenizer(source, given) if source else tokenizer_spec(given)
    if description is not None:
        spec, preprocess = description.tokenizer or spec, description.preprocess
    tokenizer = make_tokenizer(spec)
    sizes = description.model if description else model_sizes(config, tokenizer, source)
    model = CLIP(
        sizes,
        dtype=jnp.dtype(m.dtype),
        attention=m.attention,
        remat=m.remat,
        scan=m.scan,
        target=mesh_target(mesh),
    )
    schedule = make_schedule(config.optim, steps)
    projections = projections_of_run(config, sizes, distiller)
    optimizer = make_optimizer(schedule, config.optim, rates_of(model, t, projections))
    shapes = state_shapes(
        model,
        optimizer,
        mesh,
        t,
        split_update=splits_update(config.optim, model.target),
        projections=projections,
    )
    check_dropout(config, sizes, frozen_towers(shapes.params, t))
    if description is None:  # earlier versions took such shares and did not pack
        check_caption_packing(config, sizes)
    return RunComponents(
        config=config,
        mesh=mesh,
        tokenizer_spec=spec,
        tokenizer=tokenizer,
        preprocess=preprocess,
        model=model,
        schedule=schedule,
        optimizer=optimizer,
        shapes=shapes,
        source=source,
        distiller=distiller,
    )


def projections_of_run(
    config: Config, sizes: CLIPConfig, distiller: Distiller | None
) -> Projections:
    """Return the projections that a run learns beside its model."""
    infos = () if distiller is None else distiller.infos
    return projections_of(config.distill, infos, sizes.embed_dim)


def rates_of(model: CLIP, section: TrainSection, projections: Projections = ()) -> Rates | None:
    """Return the factors of the learning rate of a model's parameters; None where all are 1."""
    if trains_all(section):
        return None
    plain = variable_shapes(model)["params"]
    shapes = jax.eval_shape(lambda params: with_extras(params, section, 0, projections), plain)
    return parameter_rates(leaves_by_path(shapes), section)


def splits_update(section: OptimSection, target: Target) -> bool:
    """Return whether the copies of the model share the update."""
    if section.split == "auto":
        return target.platform != "cpu" and section.name in ELEMENTWISE
    return section.split == "on"


def find_source(section: ModelSection, workdir: str | None) -> SourceCheckpoint | None:
    """Return the checkpoint that a run starts from, or the run's own where it is resumed.

    Raises:
      UserError: nothing there can be read.
    """
    path = section.init_from
    if not path or (workdir is None and not is_url(path) and not Path(path).exists()):
        return None
    if workdir is not None and has_checkpoints(workdir):
        path = str(workdir)
    tag = section.init_tag
    return read_source(path, f"{section.name}:{tag}" if tag else section.name)


def model_sizes(
    config: Config, tokenizer: Tokenizer, source: SourceCheckpoint | None
) -> CLIPConfig:
    """Return the sizes of a run's model.

    Raises:
      UserError: they do not fit the config's images or the checkpoint that the run starts from.
    """
    m = config.model
    sizes = sized_model(m.name, tokenizer, image_size=m.image_size, context_length=m.context_length)
    if config.train.loss == "sigmoid":
        # Where SigLIP begins (arXiv:2303.15343, section 3.2).
        sizes = dataclasses.replace(sizes, init_logit_scale=math.log(10.0), init_logit_bias=-10.0)
    return warm_start_sizes(source, sizes) if source else sizes


def check_dropout(config: Config, sizes: CLIPConfig, frozen: Collection[str]) -> None:
    """Raise UserError if patches or paths are to be dropped that are not there, or must all be."""
    if config.model.text_drop_path and "text" in frozen:
        raise UserError(
            "config.model.text_drop_path is set and nothing of the text tower is trained: leave "
            "one of them out"
        )
    dropped = {"patch_dropout": "patches", "drop_path": "blocks"}
    for field, what in dropped.items():
        if not getattr(config.model, field):
            continue
        if not isinstance(sizes.vision, ViTConfig):
            raise UserError(
                f"config.model.{field} is set and {config.model.name} has no {what} to drop; "
                "take a ViT or set it to 0"
            )
        if "image" in frozen:
            raise UserError(
                f"config.model.{field} is set and nothing of the image tower is trained: a frozen "
                "tower sees whole images; leave one of them out"
            )


def check_caption_packing(config: Config, sizes: CLIPConfig) -> None:
    """Raise UserError if captions are to be packed whose padding the text tower sees."""
    has_shares = config.data.caption_packing not in caption_packing.CHOICES
    if has_shares and not sizes.text.supports_trimming:
        raise UserError(
            f"the text tower of {config.model.name} takes captions at their full length, for which"
            ' they are not packed: leave config.data.caption_packing "auto" or "off"'
        )


def count_patches(model: CLIP) -> int:
    """Count the patches of an image; 0 for a tower that has none."""
    vision = model.config.vision
    return vision.grid_size**2 if isinstance(vision, ViTConfig) else 0


def count_kept_patches(run: RunComponents) -> int | None:
    """Count the patches of a training image that its tower sees; None where that is all of them."""
    patches, dropout = count_patches(run.model), run.config.model.patch_dropout
    return kept_patches(patches, dropout) if patches and dropout else None


def pair_flops(run: RunComponents, length: int | CaptionPacking) -> int:
    """Count the operations of training on one pair, its caption trimmed to `length`.

    Of packed captions it is that of one of the mean length.
    """
    if isinstance(length, CaptionPacking):
        length = round(length.mean_length)
    return train_flops_per_pair(
        run.model.config,
        length,
        num_patches=count_kept_patches(run),
        frozen=frozen_towers(run.shapes.params, run.config.train),
        captions=2 if run.config.data.negatives else 1,
    )


def attention_kernels(run: RunComponents) -> str:
    """Return one line on what computes the attention of each tower on these devices."""
    kernels = choose_kernels(run.model, count_kept_patches(run))
    causal = ", causal" if run.model.config.text.causal else ""
    text = str(kernels.text)
    if run.caption_packing is not None and kernels.text.name == "cudnn":
        text = f"xla, and {text} where captions are not packed"
    return f"attention: image tower {kernels.image or 'none'}, text tower {text}{causal}"


def loss_of_run(run: RunComponents) -> LossFn:
    """Make the loss of a run's global batch."""
    return loss_of_section(run.config.train, run.mesh, run.model.target)


def loss_of_section(section: TrainSection, mesh: Mesh, target: Target) -> LossFn:
    """Make the loss of a global batch that is split over a mesh."""
    return make_loss(
        section.loss,
        mesh=mesh,
        batch_axes=BATCH_AXES,
        platform=target.platform,
        tile_size=section.loss_tile,
        mask_equal_captions=section.mask_equal_captions,
    )


def draws_of_run(run: RunComponents) -> DrawFn:
    """Make the random numbers of a run's steps."""
    config = run.config
    vision = run.model.config.vision
    return make_draws(
        config.model,
        config.data,
        seed=config.seed,
        patches=count_patches(run.model),
        layers=vision.layers if isinstance(vision, ViTConfig) else 0,
        text_layers=run.model.config.text.layers,
    )


def init_of_run(run: RunComponents) -> Init:
    """Make the function that returns a run's state before its first step, from random weights."""
    config = run.config
    return make_init(
        run.model, run.optimizer, run.shapes, config.train, config.seed, run.projections
    )


def warm_start_of_run(run: RunComponents, source: SourceCheckpoint) -> TrainState:
    """Make a run's state before its first step, from a checkpoint's weights."""
    sizes, optimizer, shapes = run.model.config, run.optimizer, run.shapes
    return warm_start_state(source, sizes, optimizer, shapes, run.config, run.projections)


def make_step(run: RunComponents) -> TrainStep:
    """Make the jitted step of a run."""
    return make_train_step(
        run.model,
        loss_of_run(run),
        run.optimizer,
        run.schedule,
        run.shapes,
        run.config.train,
        preprocess=run.preprocess,
        draws=draws_of_run(run),
        distillation=distillation_of_run(run),
    )


def gradient_of_run(run: RunComponents) -> GradientFn:
    """Make the gradient of a run's steps."""
    return make_gradient(
        run.model,
        loss_of_run(run),
        run.shapes,
        run.config.train,
        preprocess=run.preprocess,
        distillation=distillation_of_run(run),
    )


def distillation_of_run(run: RunComponents) -> Distillation | None:
    """Make what a run learns from its teachers; None without any."""
    if run.distiller is None:
        return None
    return make_distillation(run.config.distill, run.distiller.infos, run.mesh)


def make_evaluation(
    run: RunComponents, encode_image: EncodeWith, encode_text: EncodeWith, section: EvalSection
) -> Evaluator:
    """Make what `config.eval.every` runs during a run, over its mesh."""
    return make_evaluator(
        encode_image,
        encode_text,
        EvalSpec.from_section(section),
        run.mesh,
        config=run.model.config,
        tokenizer=run.tokenizer,
        preprocess=run.preprocess,
    )


def open_data(config: Config, workdir: str) -> TrainingData:
    """Open and count the training data; what is skipped goes to `skipped.jsonl` in `workdir`.

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


def open_distiller(config: Config, steps: int, data: TrainingData) -> Distiller | None:
    """Return what gives the teachers' features of a run of so many steps; None without teachers.

    Where features are stored, teachers are loaded to be compared, and dropped again.

    Raises:
      UserError: a teacher cannot be loaded, or the features are of something else.
    """
    section = config.distill
    if not section.teachers and not section.features:
        return None
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    live = load_teachers(section.teachers, mesh, dtype=section.dtype)
    if not section.features:
        return live
    return open_stored(
        config,
        steps,
        data,
        image_size=sized_images(config),
        identities=[info.identity for info in live.infos] if live.infos else None,
        mesh=mesh,
        part=BatchPart(*batch_part(mesh)),
    )


def sized_images(config: Config) -> int:
    """Return the side of a run's images, pixels."""
    return config.model.image_size or model_config(config.model.name).vision.image_size


def windows_in_memory(config: Config, processes: int) -> int:
    """Count the shards that a process may hold: the windows that it reads from, and the next."""
    d = config.data
    sources = 1 if isinstance(d.train, str) else len(d.train)
    # Processes that a tensor axis spans load the same rows, so that each has more streams.
    parts = max(1, processes // config.mesh.tensor)
    return 2 * sources * d.window * math.ceil(d.streams / parts)


def steps_of_run(config: Config, pairs: int) -> int:
    """Return the optimizer steps that the config asks for on data of so many pairs."""
    t = config.train
    if not config.data.repeat:
        return steps_per_epoch(pairs, t.batch_size, config.data.streams)
    return t.steps or int(t.epochs * pairs / t.batch_size)


def make_loader(run: RunComponents, data: TrainingData, start_step: int) -> Loader:
    """Make this process's batches from a step on."""
    config, sizes = run.config, run.model.config
    tokenizer, length = run.tokenizer, sizes.text.context_length
    if run.distiller is not None:
        tokenizer, length = run.distiller.tokenizer(tokenizer, length)
    return make_train_loader(
        data,
        config.data,
        tokenizer,
        shape=SampleShape(sizes.vision.image_size, length),
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        part=BatchPart(*batch_part(run.mesh)),
    )
