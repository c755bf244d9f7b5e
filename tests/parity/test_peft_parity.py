"""Adapters in PEFT's files, both ways: its model with adapters beside, ours with them merged."""

import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("open_clip")

from published import SAVERS, Case, difference, save_hf  # noqa: E402

import clip_jax  # noqa: E402
from clip_jax.models.lora import make_adapters  # noqa: E402
from clip_jax.pretrained.peft import write_peft  # noqa: E402
from clip_jax.typing import leaves_by_path  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.disable(logging.WARNING)

HF = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# Float32 sums in another order: an adapter beside a matrix, or added to it.
LIMIT = 1e-6


def moved(model):
    """Give the second matrices of fresh adapters, which are zero, random values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model.eval()


@pytest.mark.parametrize(
    ("case", "targets", "options"),
    [
        (Case("clip", "Hugging Face folder", 2, 600), HF, {}),
        (Case("siglip", "Hugging Face folder", 2, 600), HF[:4], {"use_rslora": True}),
        (Case("ViT-B-32", "open_clip folder", 2, 600), ["attn", "c_fc", "c_proj"], {}),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else "",
)
def test_what_peft_wrote_gives_its_features(case, targets, options, tmp_path):
    (tmp_path / "base").mkdir()
    model, path, name = SAVERS[case.form](case, tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options)
    if case.name == "siglip":
        config.exclude_modules = r".*\.head\..*"
    tuned = moved(peft.get_peft_model(model, config))
    tuned.save_pretrained(tmp_path / "adapters")
    clip = clip_jax.load(path, model=name, adapters=tmp_path / "adapters")
    image, text, _ = difference(tuned.get_base_model(), clip)
    print(f"{case.name}: image {image:.2e}, text {text:.2e}")
    assert image < LIMIT and text < LIMIT
    plain = clip_jax.load(path, model=name)
    assert min(difference(tuned.get_base_model(), plain)[:2]) > 1e-4


def test_what_we_wrote_loads_in_peft(tmp_path):
    case = Case("clip", "Hugging Face folder", 2, 600)
    model, path, _ = save_hf(case, tmp_path / "base")
    plain = clip_jax.load(path)
    targets = ("q", "k", "v", "out", "fc", "proj")
    adapters = make_adapters(plain.params, rank=3, targets=targets, seed=0)
    rng = np.random.default_rng(0)
    leaves = {
        name: rng.normal(scale=0.03, size=x.shape).astype(np.float32)
        for name, x in leaves_by_path(adapters).items()
    }
    (tmp_path / "adapters").mkdir()
    write_peft(tmp_path / "adapters", leaves, plain.config, alpha=6.0, base=str(path))
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "adapters").eval()
    assert sum("lora_" in name for name, _ in tuned.named_parameters()) == len(leaves)
    clip = clip_jax.load(path, adapters=tmp_path / "adapters")
    image, text, _ = difference(tuned.get_base_model(), clip)
    print(f"ours in PEFT: image {image:.2e}, text {text:.2e}")
    assert image < LIMIT and text < LIMIT
    assert min(difference(tuned.get_base_model(), plain)[:2]) > 1e-4
