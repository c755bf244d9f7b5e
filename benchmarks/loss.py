"""The dense loss against the tiled one, side by side in one process: time and memory.

    python -m benchmarks.loss --rows 1024 2048 4096 8192

Each figure is one value and its gradients (features, scale, bias) on one device. The two forms take
turns, so that whatever else the machine does falls on both. Memory is what the compiled program
asks for beside its inputs and outputs; for the tiled form that includes the gathered texts.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.losses import FORMS, LOSSES, make_loss


def make_inputs(rows: int, features: int, dtype: str) -> tuple:
    """Random unit features, a scale and a bias as at the start of training, all rows good."""
    rng = np.random.default_rng(0)
    z_image_BD, z_text_BD = rng.normal(size=(2, rows, features))
    z_image_BD, z_text_BD = (
        jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True), dtype)
        for z in (z_image_BD, z_text_BD)
    )
    scale, bias = jnp.float32(1 / 0.07), jnp.float32(-10)
    ok_B, caption_id_B = jnp.ones(rows, bool), jnp.arange(rows, dtype=jnp.uint32)
    return z_image_BD, z_text_BD, scale, bias, ok_B, caption_id_B


def compile_form(name: str, form: str, tile_size: int, inputs: tuple) -> jax.stages.Compiled:
    """Value and gradients on the first device alone, compiled."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    loss_fn = make_loss(name, mesh=mesh, tile_size=tile_size, mask_equal_captions=True, form=form)

    def loss(*inputs):
        return loss_fn(*inputs).loss

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    return step.lower(*inputs).compile()


def seconds(program: jax.stages.Compiled, inputs: tuple) -> float:
    """One call, waited for."""
    start = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    return time.perf_counter() - start


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--tile-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loss", choices=sorted(LOSSES), default="softmax")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()

    device = jax.devices()[0]
    print(f"{device.device_kind}, {options.loss}, {options.features} features, {options.dtype}")
    print("median of", options.repeats, "calls, and the quartiles around it")
    print(f"{'rows':>6}  {'form':<6}  {'ms':>8}  {'quartiles':>17}  {'MiB':>8}  {'loss':>10}")
    for rows in options.rows:
        inputs = make_inputs(rows, options.features, options.dtype)
        programs = {
            form: compile_form(options.loss, form, options.tile_size, inputs) for form in FORMS
        }
        values = {form: float(program(*inputs)[0]) for form, program in programs.items()}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(options.repeats):
            for form, program in programs.items():
                times[form].append(1e3 * seconds(program, inputs))
        for form, program in programs.items():
            low, median, high = statistics.quantiles(times[form], n=4, method="inclusive")
            memory = program.memory_analysis().temp_size_in_bytes / 2**20
            spread = f"{low:.1f} - {high:.1f}"
            print(
                f"{rows:>6}  {form:<6}  {median:>8.1f}  {spread:>17}  {memory:>8.1f}"
                f"  {values[form]:>10.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
