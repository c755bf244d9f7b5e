"""The image tower of ViT-B/16 with its gradient, compiled for a device that is not there.

`benchmarks.compiled` runs it: `python -m benchmarks.compiled_tower ours tpu-v5e FILE`.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.stock_tower import StockTower
from clip_jax.models.clip import CLIP, variable_shapes
from clip_jax.models.flops import image_flops
from clip_jax.models.zoo import model_config
from clip_jax.parallel.mesh import make_mesh, mesh_target
from clip_jax.planning.compilers import device_platform, find_compiler, start_compiler
from clip_jax.planning.cycles import FREE
from clip_jax.planning.hardware import find_device
from clip_jax.planning.hlo import Program, called_computations, step_visits
from clip_jax.planning.program import compile_program

IMAGES = 128
NAME = "ViT-B/16"


def tower(kind: str, mesh: Any) -> tuple[Any, Any]:
    """Return (function of parameters and images, the parameters' shapes)."""
    config = model_config(NAME)
    if kind == "stock":
        stock = StockTower(config.vision, config.embed_dim)
        images = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3))
        shapes = jax.eval_shape(lambda: stock.init(jax.random.key(0), images))
        return stock.apply, shapes
    model = CLIP(config, dtype=jnp.bfloat16, remat="auto", target=mesh_target(mesh))
    params = variable_shapes(model)["params"]
    shapes = {"params": {k: x for k, x in params.items() if k != "text"}}

    def encode(variables: Any, images_BHWC: jax.Array) -> jax.Array:
        with jax.named_scope("towers"):
            return model.apply(variables, images_BHWC, method="encode_image")

    return encode, shapes


def gpu_kernels(program: Program) -> dict[str, int]:
    """Count what a GPU's program starts, what of it moves axes, and its float32 products."""
    counts = {"kernels": 0, "transposes": 0, "float32_products": 0}
    for line, computation, times in step_visits(program):
        if line.opcode in FREE:
            continue
        counts["kernels"] += times
        inside = [
            inner.opcode
            for name in called_computations(line)
            for inner in program.computations[name].values()
        ]
        counts["transposes"] += times * ("transpose" in inside or line.opcode == "copy")
        if line.opcode == "custom-call" and "matmul" in line.attributes:
            dtype = computation[line.operands[0]].shapes[0].dtype
            counts["float32_products"] += times * (dtype == "f32")
    return counts


def main() -> int:
    """Compile one tower and write its figures."""
    kind, device, path = sys.argv[1:]
    with tempfile.TemporaryDirectory() as dump:
        compiler = find_compiler(device, device_platform(device))
        started = start_compiler(compiler, device, 1, dump)
        mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=started.devices)
        encode, shapes = tower(kind, mesh)
        size, place = model_config(NAME).vision.image_size, NamedSharding(mesh, P())
        images = jax.ShapeDtypeStruct((IMAGES, size, size, 3), jnp.float32)
        shapes, images = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (shapes, images)
        )

        def loss(variables: Any, images_BHWC: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(encode(variables, images_BHWC).astype(jnp.float32)))

        lowered = jax.jit(jax.grad(loss)).lower(shapes, images)
        made = compile_program(lowered, started, utilization=0.5)
    stats: Any = made.compiled.memory_analysis()
    assert made.timing
    seconds = made.timing.seconds
    needed = 3 * IMAGES * image_flops(model_config(NAME))
    used = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    figures = {
        "compiler": vars(compiler),
        "fits": True,
        "memory_bytes": used - stats.alias_size_in_bytes,
        "temp_bytes": stats.temp_size_in_bytes,
        "estimated_seconds": seconds,
        "estimated_by": "cycles" if compiler.platform == "tpu" else "roofline",
        "utilization": needed / find_device(device).peak("bfloat16") / seconds,
        "breakdown": [
            {"tower": part.tower, "pass": part.direction, "part": part.name, "seconds": s}
            for part, s in made.timing.by_part().items()
        ],
    }
    if compiler.platform == "tpu":
        figures["counted_share"] = made.timing.counted_share
    else:
        figures |= gpu_kernels(made.program)
    Path(path).write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
