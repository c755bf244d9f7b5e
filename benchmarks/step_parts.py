"""Parts of a training step, compiled and timed one by one: where its time goes.

    python -m benchmarks.step_parts --batch 32

Each part is a program of its own: a tower forward, a tower forward and backward, the loss with its
gradients, the update. A backward pass is the difference of two of them. The parts are interleaved
with the whole step, and what they leave unexplained of it is printed: near 0, the shares can be
trusted. Utilization is of the matrix products' rate, measured in every round.
"""

import statistics

import jax
import jax.numpy as jnp
import optax

from benchmarks import compare_open_clip
from benchmarks.interleaved import make_parser, report, spread, time_interleaved
from benchmarks.runs import Run, Stepper, make_run
from clip_jax.data.images import IMAGE_MEAN, IMAGE_STD
from clip_jax.losses import make_loss
from clip_jax.models.clip import unit_length
from clip_jax.models.flops import image_flops, text_flops
from clip_jax.parallel.mesh import BATCH_AXES
from clip_jax.training.metrics import measure_matmul_flops, peak_flops
from clip_jax.training.step import compiler_options, normalize_images, unit_range


def tower_calls(run: Run) -> dict[str, tuple]:
    """Return {part: (function, arguments)} of both towers, forward and with the backward pass."""
    model, params = run.components.model, run.state.params
    stats = run.state.batch_stats

    def images(params, images_BHWC):
        x_BHWC = normalize_images(unit_range(images_BHWC), IMAGE_MEAN, IMAGE_STD)
        variables = {"params": params, "batch_stats": stats}
        return unit_length(model.apply(variables, x_BHWC, method="encode_image"))

    def texts(params, tokens_BL):
        return unit_length(model.apply({"params": params}, tokens_BL, method="encode_text"))

    calls = {}
    for name, encode, x in (
        ("image tower", images, run.batch["image"]),
        ("text tower", texts, run.batch["text"]),
    ):

        def forward_backward(params, x, z_BD, encode=encode):
            return jax.vjp(lambda p: encode(p, x), params)[1](z_BD)

        # A gradient of the features' own size and kind, as the loss would hand it down.
        z_BD = jax.random.normal(jax.random.key(0), jax.eval_shape(encode, params, x).shape)
        calls[f"{name} forward"] = jax.jit(encode), (params, x)
        calls[f"{name} both ways"] = jax.jit(forward_backward), (params, x, z_BD)
    return calls


def loss_call(run: Run) -> tuple:
    """Return (function, arguments) of the loss and its gradients on random unit features."""
    loss_fn = make_loss(
        "softmax",
        mesh=run.components.mesh,
        batch_axes=BATCH_AXES,
        platform=run.components.model.target.platform,
        tile_size=0,
        mask_equal_captions=False,
    )
    rows, size = len(run.batch["text"]), run.components.model.config.embed_dim
    z = [unit_length(jax.random.normal(jax.random.key(i), (rows, size))) for i in range(2)]

    def loss(*inputs):
        return loss_fn(*inputs).loss

    loss_and_grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    scale, bias = jnp.float32(14), jnp.float32(0)
    return loss_and_grads, (*z, scale, bias, run.batch["valid"], run.batch["caption_id"])


class Updater:
    """The optimizer's update of its own copy of the parameters, whose memory it donates."""

    def __init__(self, run: Run):
        optimizer = run.components.optimizer

        def update(grads, opt_state, params):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return opt_state, optax.apply_updates(params, updates)

        params = jax.tree.map(jnp.copy, run.state.params)
        options = compiler_options(run.components.model.target)
        self.step = jax.jit(update, donate_argnums=(1, 2), compiler_options=options)
        self.grads = jax.tree.map(jnp.ones_like, params)
        self.state = optimizer.init(params), params

    def __call__(self) -> None:
        self.state = jax.block_until_ready(self.step(self.grads, *self.state))


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=1, repeats=5)
    compare_open_clip.add_arguments(parser, batch=32)
    options = parser.parse_args(argv)
    _, loaded, batch = compare_open_clip.prepare(options)
    run = make_run(options, loaded, batch.images, batch.tokens)
    parts = tower_calls(run) | {"loss": loss_call(run)}
    calls = {
        name: (lambda f=f, x=x: jax.block_until_ready(f(*x))) for name, (f, x) in parts.items()
    }
    calls["update"] = Updater(run)
    # The towers' parts read the loaded weights: the whole step takes a copy of its state.
    whole = Run(run.components, run.step, jax.tree.map(jnp.copy, run.state), run.batch)
    calls["whole step"] = Stepper(whole)
    rates: list[float] = []
    published_peak = peak_flops(jax.devices()[0].device_kind, options.dtype)
    calls["matmul"] = lambda: rates.append(published_peak or measure_matmul_flops(options.dtype))
    times = time_interleaved(calls, warmup=options.warmup, repeats=options.repeats)
    peak = statistics.median(rates[options.warmup :])
    rows = shares(times)
    flops = {"image tower": image_flops(loaded.config)}
    flops["text tower"] = text_flops(loaded.config, batch.tokens.shape[1])
    for row in rows:
        tower, _, direction = row["part"].rpartition(" ")
        if tower in flops:
            operations = options.batch * flops[tower] * (1 if direction == "forward" else 2)
            row["utilization"] = operations / row["s"].median / peak
    report(
        "step_parts",
        options,
        rows,
        matrix_products_GFLOP_s=peak / 1e9,
        tokens_computed=batch.tokens.shape[1],
    )


def shares(times: dict[str, list[float]]) -> list[dict]:
    """Return a row for each part: its seconds, and its share of the whole step's."""
    parts = {}
    for tower in ("image tower", "text tower"):
        forward, both_ways = times[f"{tower} forward"], times[f"{tower} both ways"]
        parts[f"{tower} forward"] = forward
        parts[f"{tower} backward"] = [b - f for f, b in zip(forward, both_ways, strict=True)]
    parts |= {"loss": times["loss"], "update": times["update"]}
    rest = [w - sum(p) for w, *p in zip(times["whole step"], *parts.values(), strict=True)]
    parts |= {"unexplained": rest, "whole step": times["whole step"]}
    whole = spread(times["whole step"]).median
    return [
        {"part": name, "s": spread(t), "share, %": 100 * spread(t).median / whole}
        for name, t in parts.items()
    ]


if __name__ == "__main__":
    main()
