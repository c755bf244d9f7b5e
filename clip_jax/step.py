"""One training step: uint8 images and tokens in, the next state and its metrics out."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from clip_jax.augment import ColorJitter
from clip_jax.losses import LossFn
from clip_jax.models.clip import CLIP
from clip_jax.state import TrainState

Metrics = dict[str, jax.Array]


@runtime_checkable
class TrainStep(Protocol):
    """A jitted step. The state is donated: use the returned one."""

    def __call__(
        self, state: TrainState, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, Metrics]:
        """`batch` holds image uint8 [B, H, W, 3], text int32 [B, L], caption_id uint32 [B] and
        ok bool [B], split over the mesh's batch axes."""
        ...


def unit_range(images_BHWC: jax.Array) -> jax.Array:
    """uint8 images to float32 in 0..1."""
    return images_BHWC.astype(jnp.float32) / 255


def normalize_images(
    images_BHWC: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
    """Images in 0..1, less this mean and over this standard deviation."""
    return (images_BHWC - jnp.array(mean)) / jnp.array(std)


def make_train_step(
    model: CLIP,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    shapes: TrainState,
    *,
    image_mean: tuple[float, ...],
    image_std: tuple[float, ...],
    color_jitter: ColorJitter,
) -> TrainStep:
    """The step of one model, loss and optimiser, its state laid out as `shapes`.

    A loss or gradient that is not finite leaves the whole state as it was; the metric `finite`
    says so.
    """

    def loss_of(params, batch_stats, batch, step):
        images_BHWC = color_jitter(unit_range(batch["image"]), step)
        images_BHWC = normalize_images(images_BHWC, image_mean, image_std)
        variables = {"params": params, "batch_stats": batch_stats}
        (z_image_BD, z_text_BD), updated = model.apply(
            variables, images_BHWC, batch["text"], True, batch["ok"], mutable=["batch_stats"]
        )
        out = loss_fn(
            z_image_BD,
            z_text_BD,
            jnp.exp(params["logit_scale"]),
            params.get("logit_bias", jnp.zeros(())),
            batch["ok"],
            batch["caption_id"],
        )
        return out.loss, (out, updated.get("batch_stats", {}))

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        (loss, (out, batch_stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.batch_stats, batch, state.step
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = TrainState(state.step + 1, params, batch_stats, opt_state)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {
            "loss": loss,
            "image_accuracy": out.image_accuracy,
            "text_accuracy": out.text_accuracy,
            "logit_scale": state.params["logit_scale"],
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            "ok": jnp.mean(batch["ok"]),
            "finite": finite,
        }
        return new, metrics

    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_encoders(
    model: CLIP, *, image_mean: tuple[float, ...], image_std: tuple[float, ...]
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Jitted `encode_image(variables, images)` and `encode_text(variables, tokens)`.

    Images are uint8, normalised on the device, or float, taken as normalised already. Features
    are float32 [B, D] and not of unit length.
    """

    @jax.jit
    def encode_image(variables, images_BHWC):
        if images_BHWC.dtype == jnp.uint8:
            images_BHWC = normalize_images(unit_range(images_BHWC), image_mean, image_std)
        z_BD = model.apply(variables, images_BHWC, method="encode_image")
        return z_BD.astype(jnp.float32)

    @jax.jit
    def encode_text(variables, tokens_BL):
        return model.apply(variables, tokens_BL, method="encode_text").astype(jnp.float32)

    return encode_image, encode_text
