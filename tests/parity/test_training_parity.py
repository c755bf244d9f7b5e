"""Forty training steps beside open_clip's own loop, from the weights that it makes: the losses.

open_clip's side is `open_clip_train.train.train_one_epoch` as it is, with its losses, its micro-
batches (`--accum-freq`) and PyTorch's AdamW; ours is the step that `clip_jax.main` compiles. Both
get the same batches and, step by step, the same learning rate.
"""

import argparse
import copy
import dataclasses
import math

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
train = pytest.importorskip("open_clip_train.train")

from steps import one_device_mesh  # noqa: E402
from test_models_parity import build, small, to_flax  # noqa: E402

from clip_jax.data.images import Preprocess  # noqa: E402
from clip_jax.losses import make_loss  # noqa: E402
from clip_jax.models.clip import CLIP, CLIPConfig  # noqa: E402
from clip_jax.parallel.mesh import BATCH_AXES, place_batch  # noqa: E402
from clip_jax.sections import DataSection, ModelSection, OptimSection, TrainSection  # noqa: E402
from clip_jax.training.device_augment import make_draws  # noqa: E402
from clip_jax.training.optimizer import make_optimizer, make_schedule  # noqa: E402
from clip_jax.training.state import init_state, state_shapes  # noqa: E402
from clip_jax.training.step import make_train_step  # noqa: E402

STEPS, PAIRS, BATCHES = 40, 32, 4
OPTIM = OptimSection(learning_rate=1e-4, warmup_steps=4)
HALF = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Attributes:
      model: the zoo's entry, which is made small.
      loss: "softmax" or "sigmoid".
      microbatch_size: pairs of a micro-batch; 0 takes the batch whole.
    """

    model: str
    loss: str = "softmax"
    microbatch_size: int = 0


CASES = {
    "vit": Case("ViT-M-16-alt"),
    "resnet": Case("RN50"),
    "siglip": Case("ViT-B-16-SigLIP", loss="sigmoid"),
    "gradcache": Case("ViT-M-16-alt", microbatch_size=8),
}


def sizes(case: Case) -> CLIPConfig:
    """Return the small model's sizes, with SigLIP's start of scale and bias for its loss."""
    config = small(case.model)
    if case.loss == "sigmoid":
        config = dataclasses.replace(config, init_logit_scale=math.log(10), init_logit_bias=-10.0)
    return config


def make_batches(config: CLIPConfig) -> list[dict[str, np.ndarray]]:
    """Return a few batches of random images and captions of every length."""
    rng = np.random.default_rng(0)
    size, text = config.vision.image_size, config.text
    batches = []
    for _ in range(BATCHES):
        tokens = np.zeros((PAIRS, text.context_length), np.int32)
        for row in tokens:
            end = rng.integers(3, text.context_length)
            row[:end] = rng.integers(3, 88, end)
            row[end] = text.eot_id
        batches.append(
            {
                "image": rng.integers(0, 256, (PAIRS, size, size, 3)).astype(np.uint8),
                "text": tokens,
                "caption_id": np.arange(PAIRS, dtype=np.uint32),
                "valid": np.ones(PAIRS, bool),
            }
        )
    return batches


class Loader(list):
    """Micro-batches, with what open_clip asks of a loader and of the set that holds it."""

    num_samples = STEPS * PAIRS

    @property
    def dataloader(self):
        return self

    @property
    def num_batches(self):
        return len(self)

    def set_epoch(self, epoch):
        pass


def adamw(model) -> torch.optim.Optimizer:
    """Return PyTorch's AdamW with open_clip's groups: no decay on gains, biases and vectors.

    The latent query of SigLIP's attention pool is among them, as in ours; open_clip decays it.
    """
    undecayed, decayed = [], []
    for name, p in model.named_parameters():
        parts = ("bn", "ln", "bias", "logit_scale", "latent")
        (undecayed if p.ndim < 2 or any(x in name for x in parts) else decayed).append(p)
    groups = [
        {"params": undecayed, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": OPTIM.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)


def open_clip_losses(model, case: Case, batches: list[dict[str, np.ndarray]]) -> list[float]:
    """Return the loss of every step of open_clip's training loop."""
    rows = case.microbatch_size or PAIRS
    parts, losses = PAIRS // rows, []
    loader = Loader()
    for i in range(STEPS):
        batch = batches[i % BATCHES]
        images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(model.logit_scale.dtype)
        images = (images / 255 - 0.5) / 0.5
        tokens = torch.from_numpy(batch["text"]).long()
        loader += zip(images.split(rows), tokens.split(rows), strict=True)
    loss_fn = open_clip.loss.SigLipLoss() if case.loss == "sigmoid" else open_clip.ClipLoss()

    def recorded(*args, **kwargs):
        output = loss_fn(*args, **kwargs)
        losses.append(sum(output.values()).item())
        return output

    optimizer, schedule = adamw(model), make_schedule(OPTIM, STEPS)

    def set_rate(step):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))

    options = argparse.Namespace(
        device="cpu",
        precision="fp32",
        accum_freq=parts,
        skip_scheduler=False,
        distill=False,
        horovod=False,
        grad_clip_norm=None,
        rank=0,
        world_size=1,
        log_local=False,
        log_every_n_steps=STEPS,
        batch_size=rows,
        wandb=False,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models: several threads wait for each other more than they do
    train.train_one_epoch(
        model, {"train": loader}, recorded, 0, optimizer, None, set_rate, None, options
    )
    torch.set_num_threads(threads)
    # Each micro-batch's backward pass sees the loss of the whole batch.
    assert len(losses) == STEPS * parts
    return losses[::parts]


def our_losses(
    config: CLIPConfig, variables: dict, case: Case, batches: list[dict[str, np.ndarray]]
) -> list[float]:
    """Return the loss of every step of ours."""
    mesh, model = one_device_mesh(), CLIP(config)
    section = TrainSection(
        steps=STEPS, batch_size=PAIRS, microbatch_size=case.microbatch_size, loss=case.loss
    )
    schedule = make_schedule(OPTIM, STEPS)
    optimizer = make_optimizer(schedule, OPTIM)
    shapes = state_shapes(model, optimizer, mesh, section)
    loss_fn = make_loss(
        case.loss,
        mesh=mesh,
        batch_axes=BATCH_AXES,
        platform="cpu",
        tile_size=0,
        mask_equal_captions=False,
    )
    draws = make_draws(ModelSection(), DataSection(), seed=0, patches=0, layers=0, text_layers=0)
    step = make_train_step(
        model, loss_fn, optimizer, schedule, shapes, section, preprocess=HALF, draws=draws
    )
    state = init_state(model, optimizer, shapes, section, seed=0).replace(**variables)
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, place_batch(batches[i % BATCHES], mesh))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize("name", CASES)
def test_forty_losses_are_open_clips(name):
    """Compare to the last digits, or as far as float32 itself goes.

    The gradients of batch norms over few values lose digits, and Adam, which divides by a
    gradient's size, keeps the error. How much that is, open_clip's loop in float64 tells: ours is
    no further from it than its own float32 is, or than 3e-6, twice what SigLIP's losses were, ours
    that lay furthest.
    """
    case = CASES[name]
    config = sizes(case)
    model, batches = build(config, output_dict=True), make_batches(config)
    exact = np.array(open_clip_losses(copy.deepcopy(model).double(), case, batches))
    ours = np.array(our_losses(config, to_flax(model, config), case, batches))
    theirs = np.array(open_clip_losses(model, case, batches))
    difference = np.abs(ours / theirs - 1)
    our_error, their_error = (np.abs(x / exact - 1).max() for x in (ours, theirs))
    print(
        f"{name}: {theirs[0]:.4f} to {theirs[-1]:.4f}; apart {difference[0]:.1e} at first, "
        f"{difference.max():.1e} at most; from float64 {our_error:.1e} and {their_error:.1e}"
    )
    # It learns: the batches come ten times each.
    assert theirs[-BATCHES:].mean() < 0.95 * theirs[:BATCHES].mean()
    assert difference[0] < 1e-6
    assert our_error < max(3e-6, 3 * their_error)
