"""A dry run: what a run would be, found out without its data and without an array."""

import dataclasses

import jax

from clip_jax.models.flops import image_flops, text_flops
from clip_jax.parallel.mesh import batch_shards
from clip_jax.sections import Config
from clip_jax.training.rates import RateRow, rate_table
from clip_jax.training.setup import build_run
from clip_jax.training.state import device_bytes, parameter_counts


@dataclasses.dataclass(frozen=True)
class DryRun:
    """The size of a run.

    Attributes:
      config: the experiment.
      source_found: whether the checkpoint to start from, if any, is there already.
      parameters: their number by tower, as `parameter_counts` has it.
      rates: how many of them have each factor of the learning rate.
      image_flops: operations of one image's forward pass.
      text_flops: operations of the forward pass of a caption of `context_length` tokens.
      mesh: the number of devices along each axis.
      devices, device_kind: all devices, and the name of the first.
      rows: pairs of the global batch on one device.
      parameter_bytes, optimizer_bytes, image_bytes: on one device; activations come on top.
    """

    config: Config
    source_found: bool
    parameters: dict[str, int]
    rates: list[RateRow]
    image_flops: int
    text_flops: int
    context_length: int
    mesh: dict[str, int]
    devices: int
    device_kind: str
    rows: int
    parameter_bytes: int
    optimizer_bytes: int
    image_bytes: int


def dry_run(config: Config) -> DryRun:
    """Build a run and measure it.

    Raises:
      UserError: the model, the tokenizer, the mesh or the checkpoint does not fit the config.
    """
    # The number of steps changes no size, and `epochs` would need the data.
    run = build_run(config, max(1, config.train.steps))
    sizes = run.model.config
    rows = config.train.batch_size // batch_shards(run.mesh)
    return DryRun(
        config=config,
        source_found=run.source is not None,
        parameters=parameter_counts(run.shapes.params),
        rates=rate_table(run.shapes.params, config.train),
        image_flops=image_flops(sizes),
        text_flops=text_flops(sizes, sizes.text.context_length),
        context_length=sizes.text.context_length,
        mesh=dict(run.mesh.shape),
        devices=jax.device_count(),
        device_kind=jax.devices()[0].device_kind,
        rows=rows,
        parameter_bytes=device_bytes(run.shapes.params),
        optimizer_bytes=device_bytes(run.shapes.opt_state),
        image_bytes=rows * sizes.vision.image_size**2 * 3,
    )
