"""Image and text encoding of clip_jax and open_clip, side by side: the same weights and inputs.

    python -m benchmarks.encoding --batch 32

Unit-length features on both sides, through `LoadedCLIP.encode_image` / `encode_text` and through
open_clip's, without gradients. Images are uint8 and normalized within the call. clip_jax's
captions are trimmed to the bucket of the longest, as its evaluation and training do; `untrimmed`
is the same call at the full context. Each library has a process of
its own (`benchmarks/subprocess_calls.py`).
"""

import argparse
import contextlib
from collections.abc import Callable

import jax
import numpy as np
import torch

from benchmarks import compare_open_clip
from benchmarks.interleaved import make_parser, ratio, report, seconds, spread, time_interleaved
from benchmarks.subprocess_calls import Calls, in_subprocess


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=1, repeats=7)
    compare_open_clip.add_arguments(parser, batch=32)
    options = parser.parse_args(argv)
    torch_calls, _ = in_subprocess(torch_side, options)
    _, loaded, batch = compare_open_clip.prepare(options, options.dtype)
    images, tokens = jax.device_put(batch.images), jax.device_put(batch.tokens)
    untrimmed = jax.device_put(np.asarray(batch.torch_tokens.cpu(), np.int32))
    calls = {
        ("image", "clip_jax"): lambda: np.asarray(loaded.encode_image(images)),
        ("image", "open_clip"): torch_calls["image"],
        ("text", "clip_jax"): lambda: np.asarray(loaded.encode_text(tokens)),
        ("text", "untrimmed"): lambda: np.asarray(loaded.encode_text(untrimmed)),
        ("text", "open_clip"): torch_calls["text"],
    }
    first_seconds, features = {}, {}
    for key, call in calls.items():
        first_seconds[key] = seconds(lambda key=key, call=call: features.__setitem__(key, call()))
    times = time_interleaved(calls, warmup=options.warmup, repeats=options.repeats)
    rows = [
        {
            "encodes": what,
            "library": name,
            "a second": spread(times[what, name]).per(options.batch),
            "call, s": spread(times[what, name]),
            "faster than open_clip": ratio(times[what, "open_clip"], times[what, name]),
            "largest difference": float(
                np.abs(features[what, name] - features[what, "open_clip"]).max()
            ),
            "first call, s": first_seconds[what, name],
        }
        for what, name in calls
    ]
    report(
        "encoding",
        options,
        rows,
        tokens_a_caption=batch.tokens_a_caption,
        tokens_computed=batch.tokens.shape[1],
    )


def torch_side(options: argparse.Namespace) -> tuple[Calls, None]:
    """Return open_clip's encoders of one batch, which return features as numpy arrays."""
    model, _, batch = compare_open_clip.prepare(options)
    forward_image = compare_open_clip.torch_compiled(options, model.eval().encode_image)
    forward_text = compare_open_clip.torch_compiled(options, model.encode_text)

    def torch_call(encode: Callable[[], torch.Tensor]) -> Callable[[], np.ndarray]:
        def call() -> np.ndarray:
            with torch.inference_mode(), contextlib.ExitStack() as stack:
                stack.enter_context(compare_open_clip.torch_precision(options))
                return encode().float().cpu().numpy()

        return call

    calls = {
        "image": lambda: forward_image(
            compare_open_clip.torch_normalized(batch.torch_images), normalize=True
        ),
        "text": lambda: forward_text(batch.torch_tokens, normalize=True),
    }
    return {name: torch_call(call) for name, call in calls.items()}, None


if __name__ == "__main__":
    main()
