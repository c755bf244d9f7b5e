"""The loss alone over N, side by side in one process: time, memory, and FLOPs over 8 devices.

    python -m benchmarks.loss --rows 1024 4096 8192 --beyond 32768

Each figure is one value and its gradients on one device. `dense` is the definition, one matrix of
logits; `two-block` computes the matrix for each direction, as open_clip does on several devices;
`tiled` is what training uses, tiles chosen by the rule; `open_clip` is its ClipLoss, on a GPU as
`torch.compile` makes it. At `--beyond` rows only `tiled` runs. Memory is what the compiled program
asks for beside its inputs and outputs, and PyTorch's peak on a GPU; it has no such count on a CPU.
FLOPs are the compiler's count of one device's program of 8.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.interleaved import make_parser, ratio, report, spread, time_interleaved
from clip_jax.losses import LOSSES, make_loss

DEVICES = 8
FLOP_ROWS = 1024
"""Rows at which FLOPs are counted: one tile, for the compiler counts a loop's body once."""


def make_inputs(rows: int, features: int, dtype: str) -> tuple:
    """Return random unit features, a scale and a bias as in a fresh model, and all rows valid."""
    rng = np.random.default_rng(0)
    z_image_BD, z_text_BD = rng.normal(size=(2, rows, features))
    z_image_BD, z_text_BD = (
        jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), dtype)
        for z in (z_image_BD, z_text_BD)
    )
    scale, bias = jnp.float32(1 / 0.07), jnp.float32(-10)
    valid_B, caption_id_B = jnp.ones(rows, bool), jnp.arange(rows, dtype=jnp.uint32)
    return z_image_BD, z_text_BD, scale, bias, valid_B, caption_id_B


def make_mesh(devices: int) -> Mesh:
    """Return a mesh of the first devices, along one axis."""
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def two_block(mesh: Mesh) -> Callable:
    """Return softmax of each device's images against all texts, and texts against all images."""

    def direction(a_bD, b_bD, scale):
        b_BD = jax.lax.all_gather(b_bD, "data", tiled=True)
        logits_bB = scale * jnp.einsum(
            "bD,BD->bB", a_bD, b_BD, precision="highest", preferred_element_type=jnp.float32
        )
        positive_b = jax.lax.axis_index("data") * len(a_bD) + jnp.arange(len(a_bD))
        positive_logit_b = jnp.take_along_axis(logits_bB, positive_b[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits_bB, axis=1) - positive_logit_b)

    def local(z_image_bD, z_text_bD, scale):
        mean = (
            direction(z_image_bD, z_text_bD, scale) + direction(z_text_bD, z_image_bD, scale)
        ) / 2
        return jax.lax.pmean(mean, "data")

    r, a = P("data"), P()
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(r, r, a), out_specs=a)
    return lambda z_image_BD, z_text_BD, scale, *rest: sharded(z_image_BD, z_text_BD, scale)


def losses_on(mesh: Mesh, options: argparse.Namespace) -> dict[str, Callable]:
    """Return the forms by name, each as inputs -> loss."""

    def loss_of(form: str) -> Callable:
        loss_fn = make_loss(
            options.loss,
            mesh=mesh,
            batch_axes=("data",),
            platform=mesh.devices.flat[0].platform,
            tile_size=options.tile_size,
            mask_equal_captions=False,
            form=form,
        )
        return lambda *inputs: loss_fn(*inputs).loss

    forms = {form: loss_of(form) for form in ("dense", "tiled")}
    return forms | ({"two-block": two_block(mesh)} if options.loss == "softmax" else {})


def compile_gradient(loss: Callable, inputs: tuple, mesh: Mesh) -> jax.stages.Compiled:
    """Compile value and gradients of features, scale and bias, rows split over the mesh."""
    r, a = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), in_shardings=(r, r, a, a, r, r))
    return step.lower(*inputs).compile()


def count_flops(options: argparse.Namespace) -> list[dict]:
    """Count the FLOPs of one device's program of 8, also over the two-block form's."""
    if len(jax.devices()) < DEVICES or options.loss != "softmax":
        return []
    mesh = make_mesh(DEVICES)
    inputs = make_inputs(FLOP_ROWS, options.features, options.dtype)
    forms = losses_on(mesh, options)
    del forms["dense"]  # the compiler would split it as it likes
    programs = {name: compile_gradient(loss, inputs, mesh) for name, loss in forms.items()}
    flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
    return [
        {
            "8 devices, 1,024 rows": name,
            "MFLOP a device": flops[name] / 1e6,
            "over two-block": flops[name] / flops["two-block"],
        }
        for name in flops
    ]


def torch_loss(inputs: tuple) -> tuple[Callable[[], float], Callable[[], float | str]] | None:
    """Return open_clip's ClipLoss with its gradients, and the MB it has held on a GPU.

    None where it is not installed.
    """
    try:
        from benchmarks.compare_open_clip import open_clip, torch
    except ImportError:
        return None
    on_gpu = jax.default_backend() == "gpu"
    dtype = torch.bfloat16 if inputs[0].dtype == jnp.bfloat16 else torch.float32
    z_image, z_text = (
        torch.tensor(np.asarray(x, np.float32), dtype=dtype, device="cuda" if on_gpu else "cpu")
        for x in inputs[:2]
    )
    scale = torch.tensor(float(inputs[2]), device=z_image.device)
    for x in (z_image, z_text, scale):
        x.requires_grad_()
    loss_fn = open_clip.ClipLoss()
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True
        loss_fn = torch.compile(loss_fn)

    def call() -> float:
        z_image.grad = z_text.grad = scale.grad = None
        loss = loss_fn(z_image, z_text, scale)
        loss.backward()
        return loss.item()

    def memory() -> float | str:
        return torch.cuda.max_memory_allocated() / 1e6 if on_gpu else ""

    return call, memory


def measure(rows: int, options: argparse.Namespace, forms: list[str]) -> list[dict]:
    """Return a row for each form at this N."""
    mesh = make_mesh(1)
    inputs = make_inputs(rows, options.features, options.dtype)
    losses = losses_on(mesh, options)
    programs = {
        name: compile_gradient(losses[name], inputs, mesh) for name in forms if name in losses
    }
    calls: dict[str, Callable] = {
        name: (lambda program=program: float(jax.block_until_ready(program(*inputs))[0]))
        for name, program in programs.items()
    }
    compares = "open_clip" in forms and options.loss == "softmax"
    peer = torch_loss(inputs) if compares else None
    calls |= {} if peer is None else {"open_clip": peer[0]}
    values = {name: call() for name, call in calls.items()}
    repeats = options.repeats if len(calls) > 1 else min(options.repeats, 2)
    warmup = options.warmup if len(calls) > 1 else 0
    times = time_interleaved(calls, warmup=warmup, repeats=repeats)
    table = []
    for name in calls:
        row = {"rows": rows, "form": name, "ms": spread(times[name]).scaled(1e3)}
        row["over dense"] = str(ratio(times[name], times["dense"])) if "dense" in times else ""
        memory: float | str = ""
        if name in programs:
            memory = programs[name].memory_analysis().temp_size_in_bytes / 1e6
        elif peer is not None:
            memory = peer[1]()
        table.append(row | {"MB": memory, "loss": f"{values[name]:.7f}"})
    return table


def main(argv: list[str] | None = None) -> None:
    """Measure and print two tables."""
    parser = make_parser(__doc__, warmup=1, repeats=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--beyond", type=int, nargs="*", default=[32768])
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--tile-size", type=int, default=0, help="0 is the rule's choice")
    parser.add_argument("--loss", choices=sorted(LOSSES), default="softmax")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    flops = count_flops(options)
    table = []
    for rows in options.rows:
        table += measure(rows, options, ["dense", "two-block", "tiled", "open_clip"])
    for rows in options.beyond:
        table += measure(rows, options, ["tiled"])
    report("loss", options, table, device=jax.devices()[0].device_kind, loss=options.loss)
    report("loss_flops", options, flops)


if __name__ == "__main__":
    main()
