"""One model in open_clip and in clip_jax, from the same weights, for benchmarks.

open_clip makes its random weights; they travel through a file into `clip_jax.load`. The images
are random uint8, the captions `captions.make_captions`, and each library tokenizes for itself.
On a GPU (bfloat16) open_clip runs as it trains there: autocast, `torch.compile`, and PyTorch's
flash attention inside.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import benchmarks.process_setup  # noqa: F401

# isort: split
import jax
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    # One that does not fit this torch fails for want of two operators, which nothing here uses.
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip

import clip_jax
from benchmarks.captions import make_captions
from clip_jax.api import LoadedCLIP
from clip_jax.data.images import IMAGE_MEAN, IMAGE_STD
from clip_jax.data.loader import trim_to_bucket

TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
"""A model that takes no time, for trying the benchmarks themselves."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch as each library's user has it.

    Attributes:
      images: uint8 [B, H, W, 3].
      tokens: int32 [B, L], trimmed to the bucket of the longest caption, as clip_jax's loader does;
        whole under `--untrimmed`.
      torch_images: uint8 [B, 3, H, W], on the device.
      torch_tokens: int64 [B, context], on the device.
      tokens_a_caption: the mean number of tokens, start and end included.
    """

    images: np.ndarray
    tokens: np.ndarray
    torch_images: torch.Tensor
    torch_tokens: torch.Tensor
    tokens_a_caption: float


def add_arguments(parser: argparse.ArgumentParser, *, batch: int) -> None:
    """Add the flags of a comparison of models."""
    parser.add_argument("--model", default="ViT-B-32-quickgelu", help="open_clip's name, or tiny")
    parser.add_argument("--batch", type=int, default=batch, help="pairs")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile (on a GPU always)")
    parser.add_argument(
        "--untrimmed", action="store_true", help="clip_jax computes the whole context too"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="a field of clip_jax's config: model.remat=none",
    )


def configure_devices(options: argparse.Namespace) -> None:
    """Choose the device and use every core, before either library computes anything."""
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise SystemExit("--device gpu: JAX and PyTorch must both see a GPU")
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    # float32 products as TF32 on both sides, JAX's default there.
    torch.backends.cuda.matmul.allow_tf32 = True


def make_models(
    options: argparse.Namespace, dtype: str = "float32"
) -> tuple[torch.nn.Module, LoadedCLIP]:
    """Return (open_clip's model on its device, clip_jax's from the same weights, in `dtype`)."""
    cfg = dict(TINY if options.model == "tiny" else open_clip.get_model_config(options.model))
    model = open_clip.CLIP(**cfg)
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_cfg": cfg, "preprocess_cfg": {}}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
        torch.save(model.state_dict(), Path(folder) / "open_clip_pytorch_model.bin")
        loaded = clip_jax.load(folder, dtype=dtype)
        jax.block_until_ready(loaded.params)
    return model.to(torch_device(options)), loaded


def make_batch(options: argparse.Namespace, loaded: LoadedCLIP) -> Batch:
    """Return random images and captions of real length."""
    size = loaded.config.vision.image_size
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (options.batch, size, size, 3), dtype=np.uint8)
    captions = make_captions(options.batch)
    tokens = loaded.tokenize(captions)
    torch_tokens = open_clip.tokenize(captions)
    if not np.array_equal(torch_tokens.numpy(), tokens):
        raise SystemExit("the two tokenizers disagree")
    device = torch_device(options)
    return Batch(
        images,
        tokens if options.untrimmed else trim_to_bucket(tokens, loaded.config.text.eot_id),
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device),
        torch_tokens.to(device),
        float((tokens != 0).sum() / len(tokens)),
    )


def prepare(
    options: argparse.Namespace, dtype: str = "float32"
) -> tuple[torch.nn.Module, LoadedCLIP, Batch]:
    """Configure the process; return both models and the batch, for a side to keep its own of.

    `dtype`: of the loaded model; a training step has its own, and weights in float32.
    """
    configure_devices(options)
    model, loaded = make_models(options, dtype)
    return model, loaded, make_batch(options, loaded)


def count_torch_flops(options: argparse.Namespace, model: torch.nn.Module, batch: Batch) -> int:
    """Return the operations of a step's matrix products, by PyTorch's own count.

    It cannot look into a compiled program, so a plain step on 8 of the pairs is counted; the
    loss's own product, which grows with the square, is not seen beside the towers'.
    """
    rows = min(8, options.batch)
    plain = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter, torch_precision(options):
        features = plain(torch_normalized(batch.torch_images[:rows]), batch.torch_tokens[:rows])
        open_clip.ClipLoss()(*features).backward()
    return counter.get_total_flops() * options.batch // rows


def torch_device(options: argparse.Namespace) -> str:
    """Return PyTorch's name of the device."""
    return "cuda" if options.device == "gpu" else "cpu"


def torch_normalized(images_BCHW: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as open_clip's models take them."""
    shape = (1, 3, 1, 1)
    mean = torch.tensor(IMAGE_MEAN, device=images_BCHW.device).reshape(shape)
    std = torch.tensor(IMAGE_STD, device=images_BCHW.device).reshape(shape)
    return (images_BCHW.float() / 255 - mean) / std


def torch_precision(options: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Return the context of open_clip's `--precision amp_bf16`, or one that does nothing."""
    if options.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch_device(options), dtype=torch.bfloat16)


def torch_compiled(options: argparse.Namespace, function: Callable) -> Callable:
    """Apply `torch.compile` under `--compile`, and always on a GPU."""
    compiled = options.compile or options.device == "gpu"
    return torch.compile(function) if compiled else function


def torch_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW with open_clip's two groups (`open_clip_train/main.py`): no decay on gains
    and biases.

    `fused` is PyTorch's fastest form, on a CPU as on a GPU.
    """
    undecayed, decayed = [], []
    for name, p in model.named_parameters():
        gain = p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        (undecayed if gain else decayed).append(p)
    groups = [{"params": undecayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def make_torch_step(
    options: argparse.Namespace, model: torch.nn.Module, batch: Batch
) -> Callable[[], torch.Tensor]:
    """Return a training step as `open_clip_train/train.py` has it, which returns the loss.

    It waits for nothing: on a GPU the loss is on its way.
    """
    optimizer = torch_optimizer(model, 1e-5)
    forward, loss_fn = torch_compiled(options, model.train()), open_clip.ClipLoss()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch_precision(options):
            z_image, z_text, scale = forward(
                torch_normalized(batch.torch_images), batch.torch_tokens
            )
            loss = loss_fn(z_image, z_text, scale)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    return step
