"""Encoding by one model of each family, clip_jax and open_clip side by side: the same weights.

    python -m benchmarks.families --only PE-Core-B-16

Unit-length features of uint8 images and of whole rows of token ids, without gradients, open_clip as
its users run it (`torch.inference_mode`; MobileCLIP's branches folded by timm). Each library has a
process of its own for every model (`benchmarks/subprocess_calls.py`), and calls alternate. With
`--one-core` each has one thread on one core, and its processor's seconds are counted instead of the
clock's: on a machine that does other work too, threads that wait for each other would be measured.
Where a family has no model of a size that two cores are for, its blocks are
fewer (`layers`); an encoder's vocabulary is small, which its time does not depend on.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.interleaved import make_parser, ratio, report, spread
from benchmarks.subprocess_calls import Calls, in_subprocess


class Family(NamedTuple):
    """One family, by a model of it.

    Attributes:
      family: its name.
      model: open_clip's name.
      towers: those that are the family's: "image", "text" or both.
      layers: blocks of the image tower; 0 is its own number.
    """

    family: str
    model: str
    towers: tuple[str, ...]
    layers: int = 0


IMAGE, TEXT = ("image",), ("text",)
FAMILIES = (
    Family("ViT", "ViT-B-32", IMAGE + TEXT),
    Family("ResNet", "RN50", IMAGE),
    Family("SigLIP", "ViT-B-16-SigLIP", IMAGE + TEXT),
    Family("Perception Encoder", "PE-Core-B-16", IMAGE),
    Family("ConvNeXt", "convnext_base", IMAGE),
    Family("EVA-02", "EVA02-B-16", IMAGE),
    Family("EVA-01", "EVA01-g-14", IMAGE, 4),
    Family("MobileCLIP", "MobileCLIP-S1", IMAGE),
    Family("ViTamin", "ViTamin-S", IMAGE),
    Family("CoCa", "coca_ViT-B-32", IMAGE + TEXT),
    Family("RoBERTa texts", "roberta-ViT-B-32", TEXT),
    Family("NLLB texts", "nllb-clip-base", TEXT),
)
VOCABULARY = 1000
# Of transformers' encoders what their `config.json` has beside the defaults of its class.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-base": (
        "roberta",
        {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "facebook/nllb-200-distilled-600M": (
        "m2m_100",
        {
            "d_model": 1024,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "encoder_ffn_dim": 4096,
            "decoder_layers": 1,
            "scale_embedding": True,
            "activation_function": "relu",
        },
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=1, repeats=7)
    parser.add_argument("--images", type=int, default=4, help="at a time")
    parser.add_argument("--texts", type=int, default=16, help="at a time")
    parser.add_argument("--one-core", action="store_true", help="count its processor's seconds")
    parser.add_argument("--only", nargs="*", help="open_clip's names of some of the models")
    options = parser.parse_args(argv)
    families = [f for f in FAMILIES if not options.only or f.model in options.only]
    rows = [row for family in families for row in compare(options, family)]
    report("families", options, rows)


def compare(options: argparse.Namespace, family: Family) -> list[dict[str, Any]]:
    """Return one row for each tower of a family."""
    with tempfile.TemporaryDirectory() as folder:
        torch_calls, _ = in_subprocess(torch_side, options, family, folder)
        jax_calls, _ = in_subprocess(jax_side, options, family, folder)
    calls = {
        (tower, library): side[tower]
        for tower in family.towers
        for library, side in (("clip_jax", jax_calls), ("open_clip", torch_calls))
    }
    features = {key: call()[1] for key, call in calls.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for round_index in range(options.warmup + options.repeats):
        for key, call in calls.items():
            seconds, _ = call()
            if round_index >= options.warmup:
                times[key].append(seconds)
    blocks = f", {family.layers} blocks" if family.layers else ""
    rows = []
    for tower in family.towers:
        here, there = times[tower, "clip_jax"], times[tower, "open_clip"]
        rows.append(
            {
                "family": family.family,
                "tower": f"{tower} of {family.model}{blocks}",
                "clip_jax, s": spread(here),
                "open_clip, s": spread(there),
                "faster than open_clip": ratio(there, here),
                "largest difference": float(
                    abs(features[tower, "clip_jax"] - features[tower, "open_clip"]).max()
                ),
            }
        )
        print(rows[-1], flush=True)
    return rows


def take_cores(options: argparse.Namespace) -> int:
    """Keep to one core if that is asked for, before a library counts them; return their number."""
    if options.one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return len(os.sched_getaffinity(0))


def timed(options: argparse.Namespace, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that gives the seconds of a call, and its result."""
    clock = time.process_time if options.one_core else time.perf_counter

    def measured() -> tuple[float, Any]:
        start = clock()
        result = call()
        return clock() - start, result

    return measured


def torch_side(options: argparse.Namespace, family: Family, folder: str) -> tuple[Calls, None]:
    """Build open_clip's model, save it in `folder`, and return its encoders of one batch."""
    cores = take_cores(options)
    from benchmarks import compare_open_clip

    # isort: split
    import torch

    torch.set_num_threads(cores)
    torch.manual_seed(0)
    model, cfg = open_clip_model(family)
    config = {"model_cfg": cfg, "preprocess_cfg": {}}
    (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), Path(folder) / "open_clip_pytorch_model.bin")
    if family.family == "MobileCLIP":
        from timm.utils.model import reparameterize_model

        model.visual.trunk = reparameterize_model(model.visual.trunk)
    images, tokens = make_inputs(options, cfg)
    images_BCHW = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    tokens_BL = torch.from_numpy(tokens).long()

    def image() -> Any:
        with torch.inference_mode():
            images = compare_open_clip.torch_normalized(images_BCHW)
            return model.encode_image(images, normalize=True).numpy()

    def text() -> Any:
        with torch.inference_mode():
            return model.encode_text(tokens_BL, normalize=True).numpy()

    return {"image": timed(options, image), "text": timed(options, text)}, None


def open_clip_model(family: Family) -> tuple[Any, dict[str, Any]]:
    """Return open_clip's model of random weights, without a look-up on the network, and its config.

    Its statistics of batch norms are those of the start.
    """
    import functools

    import open_clip
    import timm
    import transformers

    cfg = open_clip.get_model_config(family.model)
    cfg["text_cfg"]["vocab_size"] = VOCABULARY
    if family.layers:
        timm.create_model = functools.partial(timm.create_model, depth=family.layers)
    parts = {key: value for key, value in cfg.items() if key != "custom_text"}
    if "multimodal_cfg" in cfg:
        cfg["multimodal_cfg"]["vocab_size"] = VOCABULARY
        return open_clip.CoCa(**parts).eval(), cfg
    is_custom = cfg.get("custom_text", False)
    if "hf_model_name" in cfg["text_cfg"]:
        kind, values = ENCODERS[cfg["text_cfg"]["hf_model_name"]]
        encoder = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **values)
        transformers.AutoConfig.from_pretrained = lambda name: encoder
        text = parts["text_cfg"] | {"hf_model_pretrained": False}
        parts, is_custom = parts | {"text_cfg": text}, True
    return (open_clip.CustomTextCLIP if is_custom else open_clip.CLIP)(**parts).eval(), cfg


def jax_side(options: argparse.Namespace, family: Family, folder: str) -> tuple[Calls, None]:
    """Load the model that open_clip's side has saved, and return its encoders of one batch."""
    take_cores(options)
    import benchmarks.process_setup  # noqa: F401

    # isort: split
    import jax
    import numpy as np

    import clip_jax
    from clip_jax.models.text_encoders import TEXT_ENCODERS
    from clip_jax.models.timm_towers import TIMM_TOWERS

    jax.config.update("jax_platforms", "cpu")
    cfg = json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"]
    if family.layers:
        name = cfg["vision_cfg"]["timm_model_name"]
        TIMM_TOWERS[name] = dataclasses.replace(TIMM_TOWERS[name], layers=family.layers)
    for name, text in TEXT_ENCODERS.items():
        TEXT_ENCODERS[name] = dataclasses.replace(text, vocab_size=VOCABULARY)
    loaded = clip_jax.load(folder)
    images, tokens = (jax.device_put(x) for x in make_inputs(options, cfg))
    return {
        "image": timed(options, lambda: np.asarray(loaded.encode_image(images))),
        "text": timed(options, lambda: np.asarray(loaded.encode_text(tokens))),
    }, None


def make_inputs(options: argparse.Namespace, cfg: dict[str, Any]) -> tuple[Any, Any]:
    """Return random images, and rows of token ids that end at different places."""
    import numpy as np

    rng = np.random.default_rng(0)
    size, text = cfg["vision_cfg"].get("image_size", 224), cfg["text_cfg"]
    if str(cfg["vision_cfg"].get("timm_model_name", "")).startswith("vit_pe_core_base"):
        size = 224
    images = rng.integers(0, 256, (options.images, size, size, 3), dtype=np.uint8)
    length = text.get("context_length", 77)
    is_encoder = "hf_model_name" in text
    tokens = np.full((options.texts, length), 1 if is_encoder else 0, np.int32)
    for row, end in zip(tokens, rng.integers(4, length, options.texts), strict=True):
        row[:end] = rng.integers(3, VOCABULARY - 2, end)
        row[end] = 2 if is_encoder else VOCABULARY - 1
    return images, tokens


if __name__ == "__main__":
    main()
