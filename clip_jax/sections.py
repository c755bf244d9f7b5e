"""Every field of an experiment with its default: the sections of the config, frozen.

This is the one place where a default stands. A room takes the section it is about, or plain
arguments without defaults; `clip_jax.config` makes and checks sections from an experiment file.

A resumed run may change what `may_change` marks: what cannot change the numbers, how long the run
is, and what its fingerprint covers in another way. `fixed_values` are all the others.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


def may_change(default: Any) -> Any:
    """Declare a field that may have another value when a run is resumed.

    Every other field is part of the run's fingerprint: a resumed run with another value is refused.
    """
    return dataclasses.field(default=default, metadata={"may_change": True})


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a number of the config may be: `low` to `high`, or less than `below`."""

    low: float
    high: float = math.inf
    below: float = math.inf

    def hold(self, value: float) -> bool:
        """Return whether a value lies inside."""
        return self.low <= value <= self.high and value < self.below

    def __str__(self) -> str:
        """Return them for a message."""
        if self.below < math.inf:
            return f"{self.low:g} <= value < {self.below:g}"
        return f"{self.low:,} to {self.high:,}"


MAX_STEPS = 2**31 - 1


def bounded(
    default: Any,
    *,
    low: float,
    high: float = math.inf,
    below: float = math.inf,
    may_change: bool = False,
) -> Any:
    """Declare a number, or a tuple of numbers, with the bounds that each is checked against."""
    metadata = {"bounds": Bounds(low, high, below), "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The model that is trained."""

    name: str = "ViT-B/32"
    """A name of `clip_jax.list_models()`."""
    dtype: str = "float32"
    """Of activations and matrix products, float32 or bfloat16; parameters stay float32."""
    init_from: str = ""
    """A checkpoint to start from, as `clip_jax.load` takes it: a path or a published model's name;
    empty is random."""
    init_tag: str = ""
    """open_clip's tag of a bare weights file in `init_from`: tells activation and preprocessing."""
    image_size: int = bounded(0, low=0, high=2**14, may_change=True)
    """Side of the images, pixels; 0 is the model's own. Resumed: the model's sizes decide."""
    context_length: int = bounded(0, low=0, high=2**16, may_change=True)
    """Tokens of a caption; 0 is the model's own. Resumed: the model's sizes decide."""
    patch_dropout: float = bounded(0.0, low=0, below=1)
    """Share of a training image's patches that are left out (FLIP, arXiv:2212.00794)."""
    drop_path: float = bounded(0.0, low=0, below=1)
    """Share of images that pass by the branches of the image transformer's last block (stochastic
    depth, arXiv:1603.09382); of the blocks before it, evenly less, down to 0 of the first."""
    text_drop_path: float = bounded(0.0, low=0, below=1)
    """The same of captions and the text transformer; they are not packed then."""
    attention: str = may_change("auto")
    """"xla", "cudnn" (NVIDIA GPUs), "pallas" (TPUs), or "auto": what can run there, else xla."""
    remat: str = may_change("auto")
    """What the backward pass computes again instead of keeping: "none"; all but matrix products, in
    blocks with a backward pass of their own ("minimal") or by JAX ("dots"); the inside of every
    block ("blocks"); whole towers ("full"). "auto" is none on CPUs and minimal elsewhere."""
    scan: bool = may_change(False)
    """Compile a tower's block once and loop over it: for deep models; the same numbers."""


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """The length of a run, its batch, and its loss."""

    steps: int = bounded(0, low=0, high=MAX_STEPS, may_change=True)
    """Optimizer steps of the whole run; or give `epochs`. A run can be resumed to become longer:
    the cosine then ends at its new end."""
    epochs: float = bounded(0.0, low=0, high=1e6, may_change=True)
    """Passes over the training data; steps = epochs * pairs / batch_size, rounded down."""
    batch_size: int = bounded(256, low=1, high=2**24)
    """Pairs in a global batch."""
    microbatch_size: int = bounded(0, low=0, high=2**24, may_change=True)
    """Pairs of the global batch that the towers hold at once (GradCache, arXiv:2101.06983): the
    gradient of the whole batch in the memory of this many. 0 takes the batch whole. It may change
    on a resume: the gradient is the same, except where a tower has batch norms."""
    freeze: str = ""
    """The tower that stays as it is, "image" (LiT, arXiv:2111.07991) or "text"; empty is none."""
    rates: tuple[str, ...] = ()
    """Factors of the learning rate by parameter, "PATTERN=FACTOR": the first pattern that is found
    in a parameter's path ("visual/transformer/resblocks_0/attn/q_proj/kernel") gives its factor; 0
    freezes it, and without a pattern it is 1. A pattern is a regular expression, or one of "image",
    "text", "norms", "biases"; ("norms=1", "=0") trains the norms alone. `--dry-run` shows the
    result."""
    image_layer_decay: float = bounded(1.0, low=1e-3, high=1)
    """Factor of the learning rate from each block of the image tower to the one below it."""
    text_layer_decay: float = bounded(1.0, low=1e-3, high=1)
    """The same of the text tower."""
    image_last_blocks: int = bounded(-1, low=-1, high=1000)
    """Train so many last blocks of the image tower, and what stands behind them; -1: all of it."""
    text_last_blocks: int = bounded(-1, low=-1, high=1000)
    """The same of the text tower."""
    lora_rank: int = bounded(0, low=0, high=2**14)
    """Train low-rank adapters of this rank (LoRA, arXiv:2106.09685) in the towers' place, which
    stay as they are; 0 has none. A run is loaded and converted with them merged."""
    lora_alpha: float = bounded(16.0, low=0, high=1e6)
    """An adapter's product is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("q", "v")
    """The matrices that have adapters: "q", "k", "v", "out", "fc", "proj", "conv", "head", or
    regular expressions on paths, such as "^text/.*/c_fc/kernel$"."""
    ema_decay: float = bounded(0.0, low=0, below=1)
    """Of the parameters' moving average, which evaluation and `load` then use; 0 is none."""
    loss: str = "softmax"
    """"softmax" (InfoNCE, the CLIP paper) or "sigmoid" (SigLIP)."""
    loss_tile: int = bounded(0, low=0, high=2**24, may_change=True)
    """Most columns of the logits in memory at a time; 0 chooses by the batch and the devices."""
    mask_equal_captions: bool = False
    """Leave pairs with the same caption out of the negatives."""
    log_every: int = bounded(10, low=1, high=MAX_STEPS, may_change=True)
    """Steps between two lines of metrics."""
    report_to: str = may_change("")
    """Where the metrics go beside TensorBoard's file: "wandb" or "trackio", each an extra; empty is
    nowhere. Their environment variables decide the rest, such as WANDB_MODE=offline."""
    report_project: str = may_change("clip_jax")
    """The project there. A run keeps its id when it is resumed."""
    report_name: str = may_change("")
    """The name of the run there; empty takes the work folder's."""
    compile_cache: str = may_change("auto")
    """Folder of compiled programs, which a next start reads instead of compiling; "off", "none" or
    "" keeps none (a folder of such a name is "./off"). "auto" is the user's cache folder, with
    several processes a folder in the work folder. JAX_COMPILATION_CACHE_DIR in the environment
    comes first."""
    compile_ahead: str = may_change("auto")
    """Programs that are compiled while the run starts and goes on: of every caption length and of
    the evaluations during the run ("all"), or none before it is needed ("none"). "auto" is all
    where there are accelerators, none on CPUs, whose cores the steps take."""


@dataclasses.dataclass(frozen=True)
class OptimSection:
    """The optimizer: AdamW, warm-up and cosine by default (paper, section 2.5 and table 18)."""

    name: str = "adamw"
    """"adamw", "lion", "adafactor" or "muon": see `training.optimizer` for the numbers."""
    learning_rate: float = bounded(5e-4, low=0, high=100)
    """At the end of the warm-up."""
    warmup_steps: int = bounded(2000, low=0, high=MAX_STEPS)
    """Steps of linear warm-up from 0; a shorter run warms up over a tenth of its steps at most."""
    schedule: str = "cosine"
    """The learning rate behind the warm-up: "cosine" or "linear" to 0 at the end, "constant", or
    "inverse_sqrt"."""
    cooldown_steps: int = bounded(0, low=0, high=MAX_STEPS, may_change=True)
    """Last steps over which "constant" and "inverse_sqrt" fall to 0, linearly. The state before
    them is kept, and a run that is resumed to become longer goes on from it."""
    start_decay: float = bounded(0.0, low=0, high=100)
    """Decay of trained parameters towards the weights that the run began with (L2-SP,
    arXiv:1802.01483), multiplied by the learning rate as `weight_decay` is; 0 keeps none."""
    weight_decay: float = bounded(0.2, low=0, high=100)
    """On matrices and embeddings; gains, biases and the temperature have none."""
    beta1: float = bounded(0.9, low=0, below=1)
    beta2: float = bounded(0.98, low=0, below=1)
    eps: float = bounded(1e-6, low=1e-30, high=1)
    clip_norm: float = bounded(0.0, low=0, high=1e9)
    """Largest global norm of a gradient; 0 leaves it alone."""
    max_logit_scale: float = bounded(100.0, low=1, high=1e6)
    """The scale exp(logit_scale) is held at or below this after every update."""
    split: str = may_change("auto")
    """Whether the copies of the model on `config.mesh.data` share the update and keep a part of the
    optimizer's state each (ZeRO stage 1): "on", "off", or "auto": on GPUs and TPUs, by AdamW and
    Lion, whose update of a number needs no other."""


@dataclasses.dataclass(frozen=True)
class DataSection:
    """The training pairs and what is done to them."""

    train: str | tuple[str, ...] = may_change("")
    """A source, or a tuple of them: tar shards, tables, records, a folder, a URL or tfds:NAME, by
    path, brace range, glob, or several joined by "::"; see docs/data.md. Resumed: the fingerprint
    of the data and the number of pairs decide, not the path."""
    weights: tuple[float, ...] = bounded((), low=1e-9, high=1e9)
    """Shares of a batch that the sources in `train` have; empty takes every pair alike."""
    filter: str = ""
    """Conditions on a sample's fields, such as "width>=200,similarity>0.3"; the samples that do
    not meet them are not in the data."""
    unique_keys: bool = False
    """Keep only the first sample of every key."""
    repeat: bool = True
    """Begin again when every pair was seen; off, the run is one pass and needs train.epochs 1."""
    max_skip_fraction: float = bounded(0.1, low=0, high=1, may_change=True)
    """Largest share of samples, and of shards, that may be unreadable before the run ends."""
    max_pixels: int = bounded(89_478_485, low=1, high=2**40)
    """Images with more are skipped before they are decoded."""
    decode_seconds: float = bounded(300.0, low=0.1, high=1e6, may_change=True)
    """Longest that decoding an image may take, reading aside: one that hangs is skipped, and its
    thread replaced."""
    log_keys: bool = may_change(False)
    """Write the keys of every step's samples to keys-N.jsonl in the work folder."""
    tokenizer: str = may_change("clip")
    """"clip" (with `model.init_from`: the checkpoint's own), or a sentencepiece .model file.
    Resumed: the content of the file decides, not its path."""
    streams: int = bounded(8, low=1, high=2**20)
    """Parallel streams of samples; a multiple of every number of hosts the run may use."""
    window: int = bounded(8, low=1, high=2**20)
    """Shards of a stream that are shuffled together."""
    threads: int = bounded(4, low=-1, high=2**12, may_change=True)
    """Threads that decode, of all processes together; -1 takes one for every core that the run may
    use on its host."""
    processes: int = bounded(-1, low=-1, high=2**12, may_change=True)
    """Processes among which these threads are shared out, so that Python's lock is not what bounds
    them; 0 decodes in the run's own. -1 takes one for every 4 threads that have a core, from two
    on, where the data are tar shards."""
    cache_bytes: int = bounded(0, low=0, high=2**50, may_change=True)
    """Memory for decoded images kept between epochs; 0 keeps none. Processes that decode have equal
    shares of it, and any of them may be given a row: with `processes` 0 more is found again."""
    caption_packing: str = may_change("auto")
    """How a batch's captions lie: packed, several in a row, in as many rows as follow from the
    shares of captions that have at most so many tokens ("16:0.64,32:0.85"), or one in a row, all
    trimmed to the longest ("off"). "auto" counts the lengths of the first captions on accelerators,
    where packing pays, and writes what it found into the work folder's config.json, which a resumed
    run reads."""
    captions: tuple[str, ...] = ()
    """The kinds of captions with their weights, "KEY=WEIGHT", of which a sample has one a step: `*`
    is what the source has by itself, ".blip.txt" a file of that ending beside the image, any other
    key a column or a field. A sample that lacks a kind shares out its weight; () is `*=1` alone."""
    negatives: str = ""
    """The kind of texts, named as in `captions`, of which a sample has one a step that is a
    negative of every image and nobody's positive (NegCLIP, arXiv:2210.01936); empty has none."""
    word_dropout: float = bounded(0.0, low=0, below=1)
    """Share of a caption's words that are left out, each by itself; one stays."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of the image's area that a training crop keeps."""
    crop_ratio: tuple[float, float] = bounded((3 / 4, 4 / 3), low=1e-3, high=1e3)
    """Width over height of a training crop."""
    flip: float = bounded(0.0, low=0, high=1)
    """Share of training images that are mirrored."""
    grayscale: float = bounded(0.0, low=0, high=1)
    """Share of training images that lose their colors."""
    color_jitter: tuple[float, float, float] = bounded((0.0, 0.0, 0.0), low=0, high=1)
    """Most by which a training image's brightness, contrast and saturation change, in 0..1."""
    rand_augment: int = bounded(0, low=0, high=14)
    """Operations that RandAugment applies to a training image (arXiv:1909.13719), 2 in the paper;
    list and magnitudes are torchvision's."""
    rand_augment_magnitude: int = bounded(9, low=0, high=30)
    """Their strength, 0 to 30."""
    random_erasing: float = bounded(0.0, low=0, high=1)
    """Share of training images of which a box of 2 to 33 % is erased (arXiv:1708.04896), as timm
    does it."""
    erasing_mode: str = "const"
    """What is in the box: the mean color ("const"), a random color ("rand"), or noise ("pixel")."""


@dataclasses.dataclass(frozen=True)
class DistillSection:
    """Teachers, whose features of the very crops and captions a run learns from beside its loss."""

    teachers: tuple[str, ...] = may_change(())
    """Models as `clip_jax.load` takes them: a run, a path or a published model's name; none trains
    as ever. Resumed: the weights decide, not the path."""
    features: str = may_change("")
    """Folder of the teachers' features that `python -m clip_jax.data.reinforce` has stored; they
    are then not computed, and `teachers` may be empty. Resumed: the weights decide."""
    affinity_weight: float = bounded(1.0, low=0, high=1e6)
    """Of the divergence of the student's softmax over the batch from the teachers', image to text
    and text to image, averaged over the teachers (MobileCLIP, arXiv:2311.17049)."""
    feature_weight: float = bounded(0.0, low=0, high=1e6)
    """Of the squared distance between unit features (CLIP-KD, arXiv:2307.12732), the student's
    through a learned projection where a teacher's are of another width."""
    contrastive_weight: float = bounded(1.0, low=0, high=1e6)
    """Of the run's own loss beside them."""
    temperature: float = bounded(1.0, low=1e-3, high=1e3)
    """Divides the scaled cosines of student and teachers in the affinity, which is multiplied by
    its square (arXiv:1503.02531); above 1 is softer."""
    dtype: str = "float32"
    """Of the teachers' activations and matrix products, float32 or bfloat16."""


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """The number of devices along each axis; their product is the number of all devices."""

    data: int = bounded(-1, low=-1, high=2**20, may_change=True)
    """Copies of the model; -1 takes the devices the other axes leave."""
    fsdp: int = bounded(1, low=1, high=2**20, may_change=True)
    """Devices that split the batch and the parameters between them."""
    tensor: int = bounded(1, low=1, high=2**20, may_change=True)
    """Devices that split each matrix product between them."""


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """The evaluation at a run's end and, every `every` steps, during it; no `data` means none."""

    data: str = may_change("")
    """Tar shards, named like `data.train`; classification needs their .cls members."""
    classnames: str = may_change("")
    """File of class names, one a line or a JSON list, or a shipped data set ("imagenet1k"); empty
    leaves classification out."""
    templates: tuple[str, ...] = may_change(("a photo of a {}.",))
    """Prompts whose embeddings are averaged; {} is the class name. A name ("imagenet_7",
    "imagenet_80", "food101") stands for its shipped list."""
    tasks: tuple[str, ...] = may_change(("zeroshot_classification", "zeroshot_retrieval"))
    """Those, "linear_probe", "knn" and "few_shot"."""
    train_data: str = may_change("")
    """Labeled shards that "linear_probe", "knn" and "few_shot" learn from."""
    every: int = bounded(0, low=0, high=MAX_STEPS, may_change=True)
    """Steps between two evaluations during the run; 0 evaluates at its end alone."""
    best: str = may_change("")
    """Metric of these, "acc1" say, whose highest value's state is kept in `best/`."""
    keep: str = may_change("")
    """A second source, of what the model shall not forget, evaluated like `data` at the run's
    beginning and every `every` steps; its metrics are called keep_acc1 and so on."""
    keep_classnames: str = may_change("")
    """Class names of `keep`; empty takes `classnames`."""
    keep_loss: float = bounded(0.01, low=0, high=1, may_change=True)
    """Most by which the metric `best` (acc1 without one) may fall on `keep` from the run's
    beginning, as a share: a state that lost more is not taken for the best, and ends the run."""
    batch_size: int = bounded(256, low=1, high=2**24, may_change=True)
    ablate: tuple[str, ...] = may_change(())
    """Templates (or names of lists) that the report compares, each by itself, at the run's end."""


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    """The steps at which to save, and how many of them to keep."""

    every: int = bounded(1000, low=1, high=MAX_STEPS, may_change=True)
    """Steps between saves; the last step is always saved."""
    keep: int = bounded(3, low=1, high=10**6, may_change=True)
    """Newest checkpoints that stay."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    seed: int = bounded(0, low=0, high=2**32 - 1)
    """Fixes the first parameters, the order of samples, crops, and all other random numbers."""
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    data: DataSection = DataSection()
    distill: DistillSection = DistillSection()
    mesh: MeshSection = MeshSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()


def config_from_saved(values: Mapping[str, Any]) -> Config:
    """Return the config that nested dicts hold, as `dataclasses.asdict` and JSON left them.

    A field that an earlier version did not have is at its default.
    """
    sections: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        default, saved = getattr(Config(), field.name), values.get(field.name)
        if not dataclasses.is_dataclass(default) or isinstance(default, type):
            sections[field.name] = default if saved is None else saved
            continue
        names = {inner.name for inner in dataclasses.fields(default)}
        known = {name: _frozen(value) for name, value in (saved or {}).items() if name in names}
        sections[field.name] = dataclasses.replace(default, **known)
    return Config(**sections)


def replace_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the config with these values, by the names that `all_values` gives them."""
    for name, value in values.items():
        section, _, field = name.removeprefix("config.").partition(".")
        if field:
            value = dataclasses.replace(getattr(config, section), **{field: _frozen(value)})
        config = dataclasses.replace(config, **{section: value})
    return config


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def all_values(config: Config, *, fixed: bool = False) -> dict[str, Any]:
    """Return every value by name: "config.seed", "config.model.name" and so on.

    Args:
      config: the experiment.
      fixed: leave out what a resume may change.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            values[f"config.{field.name}"] = value
            continue
        for inner in dataclasses.fields(value):
            if not (fixed and inner.metadata.get("may_change")):
                values[f"config.{field.name}.{inner.name}"] = getattr(value, inner.name)
    return values


def bounds_of(config: Config) -> dict[str, Bounds]:
    """Return the bounds of every number that has them, by name."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        named = [(f"config.{field.name}.{f.name}", f) for f in inner]
        for name, one in named or [(f"config.{field.name}", field)]:
            if "bounds" in one.metadata:
                found[name] = one.metadata["bounds"]
    return found


def fixed_values(config: Config) -> dict[str, Any]:
    """Return what no resume may change unasked, by name."""
    return all_values(config, fixed=True)
