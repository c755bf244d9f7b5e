"""One training step: uint8 images and tokens in, the next state and its metrics out."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.data.images import Preprocess
from clip_jax.losses import LossFn, Negatives
from clip_jax.models.clip import CLIP
from clip_jax.models.lora import adapter_scale, merge_adapters
from clip_jax.models.naflex import ImagePatches
from clip_jax.models.projection import without_projections
from clip_jax.models.target import Target
from clip_jax.models.text import PackedTokens
from clip_jax.parallel.mesh import BATCH_AXES, batch_shards
from clip_jax.parallel.sharding import rows_stay_split, with_whole_table
from clip_jax.sections import TrainSection
from clip_jax.training.device_augment import DrawFn, adjust_colors, erase_boxes
from clip_jax.training.distillation import Distillation
from clip_jax.training.rates import frozen_towers, join_for_model, join_frozen, split_frozen
from clip_jax.training.state import TrainState, state_mesh, update_shardings
from clip_jax.typing import Features, Params

TOWERS, LOSS, UPDATE = "towers", "loss", "update"
"""Scopes of the step's parts in the compiled program, which the planner reads them by."""

Metrics = dict[str, jax.Array]
Batch = Mapping[str, jax.Array]


@runtime_checkable
class TrainStep(Protocol):
    """A jitted step. The state is donated: use the returned one."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Return the next state and the metrics of this step.

        `batch` holds image uint8 [B, H, W, 3], text int32 [B, L], caption_id uint32 [B] and
        valid bool [B], split over the mesh's batch axes; or in place of the text its captions
        packed, as `data.caption_packing.pack_captions` makes them. With negatives it holds negative
        int32 [B, L], negative_id uint32 [B] and negative_valid bool [B], too.
        """
        ...


@runtime_checkable
class FeaturesFn(Protocol):
    """Both towers over rows of a batch."""

    def __call__(
        self, params: Params, batch_stats: Any, rows: Batch
    ) -> tuple[Features, jax.Array, Any]:
        """Return unit features of images and texts, and the batch statistics after these rows.

        Of texts they are [B, D], with negatives [B, 2, D]: see `split_negatives`.
        """
        ...


class StepOutput(NamedTuple):
    """What the loss of a batch tells, float32 scalars.

    Attributes:
      loss: what is minimized.
      image_accuracy, text_accuracy: as `LossOutput` has them.
      parts: of the loss of a run with teachers, unweighted, by the names of their metrics.
    """

    loss: jax.Array
    image_accuracy: jax.Array
    text_accuracy: jax.Array
    parts: dict[str, jax.Array]


@runtime_checkable
class GradientFn(Protocol):
    """The loss of a batch and its gradient."""

    def __call__(
        self, trained: Params, frozen: Params, batch_stats: Any, rows: Batch
    ) -> tuple[StepOutput, Any, Params]:
        """Return the loss, the batch statistics after it, and the gradient of what is trained."""
        ...


def unit_range(images_BHWC: jax.Array) -> jax.Array:
    """Convert uint8 images to float32 in 0..1."""
    return images_BHWC.astype(jnp.float32) / 255


def normalize_images(
    images_BHWC: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Subtract a mean from images in 0..1 and divide them by a standard deviation."""
    return (images_BHWC - jnp.array(mean)) / jnp.array(std)


def model_images(
    images: jax.Array | ImagePatches, preprocess: Preprocess
) -> jax.Array | ImagePatches:
    """Return images or patches as towers take them: uint8 normalized, floats as they are."""
    pixels = images.patches if isinstance(images, ImagePatches) else images
    if pixels.dtype != jnp.uint8:
        return images
    colors = jnp.asarray(pixels).reshape(*pixels.shape[:-1], -1, 3)
    colors = normalize_images(unit_range(colors), preprocess.mean, preprocess.std)
    normalized = colors.reshape(pixels.shape)
    return images._replace(patches=normalized) if isinstance(images, ImagePatches) else normalized


def tokens_of(rows: Batch, parts: int) -> jax.Array | PackedTokens:
    """Return the captions of rows that are split into so many parts."""
    if "text" in rows:
        return rows["text"]
    return PackedTokens(rows["text_tokens"], rows["text_positions"], rows["text_end"], parts)


def with_negatives(rows: Batch, parts: int) -> jax.Array | PackedTokens:
    """Return the captions of rows; where they have negatives, each behind its caption."""
    if "negative" not in rows:
        return tokens_of(rows, parts)
    # Side by side and not one behind the other: every device keeps its rows.
    tokens_B2L = jnp.stack([rows["text"], rows["negative"]], axis=1)
    return tokens_B2L.reshape(-1, tokens_B2L.shape[2])


def split_negatives(z_text_BD: jax.Array, rows: Batch) -> tuple[Features, Negatives | None]:
    """Return the features of captions, and of the negatives that `make_features` gives beside."""
    if "negative" not in rows:
        return z_text_BD, None
    valid_B = rows["negative_valid"] & rows["valid"]
    return z_text_BD[:, 0], Negatives(z_text_BD[:, 1], valid_B, rows["negative_id"])


def make_features(
    model: CLIP,
    *,
    mesh: Mesh,
    preprocess: Preprocess,
    frozen: Collection[str],
    lora_scale: float = 0.0,
) -> FeaturesFn:
    """Make the function that runs both towers over rows of a batch.

    Adapters among the parameters, which `lora_scale` multiplies, are merged before.
    A `frozen` image tower runs as in evaluation: its batch norms use their running statistics.
    """
    train = "image" not in frozen
    split = rows_stay_split(mesh)

    def features(params: Params, batch_stats: Any, rows: Batch) -> tuple[Features, jax.Array, Any]:
        text_paths_BK2 = rows.get("text_path_scale_BK2")
        if "negative" in rows and text_paths_BK2 is not None:
            text_paths_BK2 = jnp.repeat(text_paths_BK2, 2, axis=0)
        images_BHWC = unit_range(rows["image"])
        if "colors_B3" in rows:
            images_BHWC = adjust_colors(images_BHWC, rows["colors_B3"])
        params = merge_adapters(params, lora_scale)
        with jax.named_scope(TOWERS), nn.intercept_methods(split):
            images_BHWC = normalize_images(images_BHWC, preprocess.mean, preprocess.std)
            if "erase_B" in rows:
                images_BHWC = erase_boxes(images_BHWC, rows)
            (z_image_BD, z_text_BD), updated = model.apply(
                {"params": with_whole_table(params, mesh), "batch_stats": batch_stats},
                images_BHWC,
                with_negatives(rows, batch_shards(mesh)),
                train,
                rows["valid"],
                rows.get("patch_ids_Bl"),
                rows.get("path_scale_BK2"),
                text_paths_BK2,
                mutable=["batch_stats"],
            )
        if "negative" in rows:
            z_text_BD = z_text_BD.reshape(len(z_image_BD), 2, -1)
        return z_image_BD, z_text_BD, updated.get("batch_stats", batch_stats)

    return features


def feature_loss(
    loss_fn: LossFn,
    distillation: Distillation | None,
    z_image_BD: Features,
    z_text_BD: jax.Array,
    params: Params,
    rows: Batch,
) -> tuple[jax.Array, StepOutput]:
    """Return the loss of a batch's features, twice: alone, and with all that the loss tells.

    Of the parameters it takes the temperature, the bias and the projections.
    """
    bias = params.get("logit_bias", jnp.zeros(()))
    scale = jnp.exp(params["logit_scale"])
    z_text_BD, negatives = split_negatives(z_text_BD, rows)
    with jax.named_scope(LOSS):
        out = loss_fn(
            z_image_BD, z_text_BD, scale, bias, rows["valid"], rows["caption_id"], negatives
        )
        if distillation is None:
            return out.loss, StepOutput(*out, parts={})
        parts = distillation.losses(z_image_BD, z_text_BD, params, rows)
        loss = distillation.total(out.loss, parts)
    parts = {"contrastive_loss": out.loss} | parts
    return loss, StepOutput(loss, out.image_accuracy, out.text_accuracy, parts)


def make_whole_gradient(
    features: FeaturesFn, loss_fn: LossFn, distillation: Distillation | None = None
) -> GradientFn:
    """Make the plain form: every activation of the batch is held until its gradient is taken."""

    def gradient(trained: Params, frozen: Params, batch_stats: Any, rows: Batch):
        def loss_of(trained: Params):
            params = join_for_model(trained, frozen)
            z_image_BD, z_text_BD, stats = features(params, batch_stats, rows)
            loss, out = feature_loss(loss_fn, distillation, z_image_BD, z_text_BD, params, rows)
            return loss, (out, stats)

        grads, (out, stats) = jax.grad(loss_of, has_aux=True)(trained)
        return out, stats, grads

    return gradient


def make_cached_gradient(
    features: FeaturesFn,
    loss_fn: LossFn,
    shardings: Params,
    *,
    mesh: Mesh,
    microbatch_size: int,
    distillation: Distillation | None = None,
) -> GradientFn:
    """Make the form of GradCache: the activations of one micro-batch are held at a time.

    Gao et al. 2021 (arXiv:2101.06983). Equal to the plain form by the chain rule: the loss meets
    the towers only through the features, so its gradient on all features, taken once, can be sent
    through each micro-batch by itself. Both visits see the same rows, draws included. Where a tower
    has batch norms, their statistics are each micro-batch's own, which is another function than the
    plain form's.
    """
    shards = batch_shards(mesh)

    def split(x: jax.Array, count: int) -> jax.Array:
        """Reshape [B, ...] to [micro-batches, rows, ...], so many of them.

        Each device gives rows of its own to every micro-batch, so nothing travels. Segments of
        packed captions are split like the rows whose captions they hold.
        """
        x = x.reshape(shards, count, -1, *x.shape[1:])
        x = jnp.moveaxis(x, 0, 1).reshape(count, -1, *x.shape[3:])
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, BATCH_AXES)))

    def join(x: jax.Array) -> jax.Array:
        """Undo `split`."""
        x = x.reshape(x.shape[0], shards, -1, *x.shape[2:])
        x = jnp.moveaxis(x, 1, 0).reshape(-1, *x.shape[3:])
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))

    def gradient(trained: Params, frozen: Params, batch_stats: Any, rows: Batch):
        count = rows["valid"].size // microbatch_size
        parts = {name: split(x, count) for name, x in rows.items()}

        def embed(stats: Any, part: Batch):
            z_image, z_text, stats = features(join_for_model(trained, frozen), stats, part)
            return stats, (z_image, z_text)

        stats, z = lax.scan(embed, batch_stats, parts)

        def loss_of(z: tuple[Features, jax.Array], trained: Params):
            params = join_for_model(trained, frozen)
            return feature_loss(loss_fn, distillation, *z, params, rows)

        (dz, grads), out = jax.grad(loss_of, argnums=(0, 1), has_aux=True)(
            jax.tree.map(join, z), trained
        )

        def add_part(grads: Params, part):
            part_rows, dz_part = part

            def embed_again(trained: Params):
                return features(join_for_model(trained, frozen), batch_stats, part_rows)[:2]

            (part_grads,) = jax.vjp(embed_again, trained)[1](dz_part)
            grads = jax.tree.map(jnp.add, grads, part_grads)
            return lax.with_sharding_constraint(grads, shardings), None

        grads, _ = lax.scan(add_part, grads, (parts, jax.tree.map(lambda x: split(x, count), dz)))
        return out, stats, grads

    return gradient


def make_gradient(
    model: CLIP,
    loss_fn: LossFn,
    shapes: TrainState,
    section: TrainSection,
    *,
    preprocess: Preprocess,
    distillation: Distillation | None = None,
) -> GradientFn:
    """Make the gradient of a run, in the form that its `microbatch_size` asks for."""
    mesh = state_mesh(shapes)
    frozen = frozen_towers(shapes.params, section)
    features = make_features(
        model,
        mesh=mesh,
        preprocess=preprocess,
        frozen=frozen,
        lora_scale=adapter_scale(section.lora_rank, section.lora_alpha),
    )
    if not section.microbatch_size:
        return make_whole_gradient(features, loss_fn, distillation)
    trained_shardings = split_frozen(update_shardings(shapes), section)[0]
    return make_cached_gradient(
        features,
        loss_fn,
        trained_shardings,
        mesh=mesh,
        microbatch_size=section.microbatch_size,
        distillation=distillation,
    )


def place_params(state: TrainState, shardings: Params) -> TrainState:
    """Return a state whose parameters lie so."""
    placed = lax.with_sharding_constraint(state.params, shardings)
    return dataclasses.replace(state, params=placed)


def make_train_step(
    model: CLIP,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shapes: TrainState,
    section: TrainSection,
    *,
    preprocess: Preprocess,
    draws: DrawFn,
    distillation: Distillation | None = None,
) -> TrainStep:
    """Make the jitted step of one model, loss and optimizer.

    A loss or gradient that is not finite leaves the whole state as it was; the metric `finite`
    says so.

    Args:
      model: the towers.
      loss_fn: the loss of a global batch.
      optimizer: gets the gradients of the parameters that are trained.
      schedule: the learning rate of a step, for the metrics.
      shapes: the layout of the state on its mesh.
      section: its `microbatch_size`, `ema_decay`, and what it says of what is trained.
      preprocess: the mean and the standard deviation of the images.
      draws: the random numbers of a step, see `device_augment`.
      distillation: what is learned from teachers, whose features are in the batch then.
    """
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    param_shardings = update_shardings(shapes)
    trained_shardings = split_frozen(param_shardings, section)[0]
    gradient = make_gradient(
        model, loss_fn, shapes, section, preprocess=preprocess, distillation=distillation
    )
    update = make_update(optimizer, section)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        trained, frozen = split_frozen(state.params, section)
        rows = {**batch, **draws(state.step, batch["valid"].size)}
        out, batch_stats, grads = gradient(trained, frozen, state.batch_stats, rows)
        # Gradients lie where their parameters are updated, and are summed into place, not copied
        # whole. The new parameters are spread behind the guard.
        grads = lax.with_sharding_constraint(grads, trained_shardings)
        state = place_params(state, param_shardings)
        new = update(state, grads, batch_stats)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(out.loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        new = place_params(new, param_shardings)
        metrics = {
            "loss": out.loss,
            "image_accuracy": out.image_accuracy,
            "text_accuracy": out.text_accuracy,
            "logit_scale": state.params["logit_scale"],
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            "ok": jnp.mean(batch["valid"]),
            "finite": finite,
        }
        return new, metrics | out.parts

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(model.target),
    )


def make_update(
    optimizer: optax.GradientTransformation, section: TrainSection
) -> Callable[[TrainState, Params, Any], TrainState]:
    """Make `update(state, grads, batch_stats)`, which returns the state of the next step."""

    def update(state: TrainState, grads: Params, batch_stats: Any) -> TrainState:
        trained, frozen = split_frozen(state.params, section)
        with jax.named_scope(UPDATE):
            updates, opt_state = optimizer.update(grads, state.opt_state, trained)
            params = join_frozen(optax.apply_updates(trained, updates), frozen)
            ema = state.ema
            if section.ema_decay:
                newest = {"params": without_projections(params), "batch_stats": batch_stats}
                ema = optax.incremental_update(newest, ema, 1 - section.ema_decay)
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema)

    return update


NEVER_MIB = 1_000_000


ASYNC_GATHERS = (
    "xla_tpu_prefer_async_allgather_to_allreduce",
    "xla_enable_async_all_gather",
)
"""Options of libtpu, which alone change nothing."""

GATHERS_IN_PRODUCTS = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
)
"""The products then leave room for the gather, and take longer."""

COLLECTIVES_ON_SPARSE_CORES = (
    "xla_tpu_enable_sparse_core_collective_offload_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
)
"""Of gathers the first takes those along a line of chips, and others those over a plane or more."""

SPARSE_CORE_GENERATIONS = ("v5p", "v6e")
"""TPUs on whose SparseCores libtpu schedules collectives, as compiled; v5e ignores the
options, and v4 was not tried."""


def compiler_options(target: Target) -> dict[str, Any] | None:
    """Return XLA's options for a program that overwrites its state.

    On a CPU they turn on the analysis that GPUs and TPUs have anyway: without it XLA copies both
    moments of AdamW in every step, twice the parameters, before it overwrites them.

    On several TPUs they keep XLA from cutting a product into one piece for each device that holds
    or updates a part of its kernel: by its own estimate the step of ViT-B/32 takes 118 ms cut and
    99 ms whole, that of ViT-S/16 on eight devices that share it 168 and 51.

    On TPUs whose devices share the model they let gathers of parameters run beside computation:
    left to itself, libtpu writes some of them as sums of whole arrays, which all devices wait for.
    On TPUs with SparseCores these exchange parameters and gradients beside the TensorCore, on
    others gathers are parts of the products that they run beside.

    On NVIDIA GPUs they leave matrix products to cuBLAS, which adds the bias and the residual in
    the same kernel. XLA would first try its own kernels for each product, for minutes, and where
    cuBLAS wins after all, as it did for all 332 of ViT-B/16's step on an H100 (jax 0.11.2), the
    sums are left in kernels of their own.
    """
    if target.platform == "cpu":
        return {"xla_cpu_copy_insertion_use_region_analysis": True}
    if target.platform == "tpu" and target.mesh is not None:
        options: dict[str, Any] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": NEVER_MIB}
        if target.mesh.shape["fsdp"] > 1:
            has_sparse_cores = target.generation in SPARSE_CORE_GENERATIONS
            beside = COLLECTIVES_ON_SPARSE_CORES if has_sparse_cores else GATHERS_IN_PRODUCTS
            options |= dict.fromkeys(ASYNC_GATHERS + beside, True)
        return options
    if target.platform == "cuda":
        return {"xla_gpu_enable_triton_gemm": False}
    return None


def make_encoders(
    model: CLIP, preprocess: Preprocess
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Make jitted `encode_image(variables, images)` and `encode_text(variables, tokens)`.

    Images (or patches) are uint8, normalized on the device, or float, taken as normalized. Features
    are float32 [B, D] and not of unit length.
    """

    @jax.jit
    def encode_image(variables, images):
        images = model_images(images, preprocess)
        z_BD = model.apply(variables, images, method="encode_image")
        return z_BD.astype(jnp.float32)

    @jax.jit
    def encode_text(variables, tokens_BL):
        return model.apply(variables, tokens_BL, method="encode_text").astype(jnp.float32)

    return encode_image, encode_text
