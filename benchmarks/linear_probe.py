"""The linear probe against scikit-learn's LogisticRegression, at the same C, in one process.

    python -m benchmarks.linear_probe --rows 50000 --width 512 --classes 100

Features are drawn as CLIP's are: unit vectors in a narrow cone, whose variance falls off by
direction. Needs scikit-learn (the `[parity]` extra).
"""

import argparse
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.turns import arguments, ratio, report, seconds, spread, take_turns
from clip_jax.evaluation.linear_probe import Probe, fit


def make_features(
    rows: int, width: int, classes: int, noise: float, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit features [rows, width] and labels [rows]: class centres in noise, on a common offset."""
    rng = np.random.default_rng(seed)
    spread_D = 1 / np.sqrt(1 + np.arange(width))
    centres_MD = rng.normal(size=(classes, width)) * spread_D
    label_B = rng.integers(classes, size=rows)
    z_BD = centres_MD[label_B] + noise * rng.normal(size=(rows, width)) * spread_D
    z_BD += 4 * rng.normal(size=width) / np.sqrt(width) * np.linalg.norm(spread_D)
    z_BD /= np.linalg.norm(z_BD, axis=1, keepdims=True)
    return z_BD.astype(np.float32), label_B


def ours(options: argparse.Namespace, z_BD: np.ndarray, label_B: np.ndarray, c: float) -> Probe:
    """Fitted on the first `options.rows`."""
    rows = options.rows
    return fit(z_BD[:rows], label_B[:rows], num_classes=options.classes, c=c)


def compare(
    options: argparse.Namespace, z_BD: np.ndarray, label_B: np.ndarray, c: float
) -> dict[str, Any]:
    """Fits of both in turns, and what they say of the rows behind `options.rows`."""
    rows = options.rows
    reference = LogisticRegression(C=c, max_iter=1000)
    probes: list[Probe] = []
    calls = {
        "clip_jax": lambda: probes.append(ours(options, z_BD, label_B, c)),
        "scikit-learn": lambda: reference.fit(z_BD[:rows], label_B[:rows]),
    }
    times = take_turns(calls, warmup=options.warmup, repeats=options.repeats)
    guess_B = probes[-1].logits(z_BD[rows:]).argmax(axis=1)
    return {
        "C": c,
        "clip_jax, s": spread(times["clip_jax"]),
        "scikit-learn, s": spread(times["scikit-learn"]),
        "faster": ratio(times["scikit-learn"], times["clip_jax"]),
        "steps": f"{probes[-1].steps}, {reference.n_iter_[0]}",
        "accuracy": f"{(guess_B == label_B[rows:]).mean():.2%}",
        "scikit-learn's": f"{reference.score(z_BD[rows:], label_B[rows:]):.2%}",
    }


def main(argv: list[str] | None = None) -> None:
    """Fits of both in turns at a few C and a few amounts of noise: seconds, steps, accuracies."""
    parser = arguments(__doc__, warmup=0, repeats=3)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--noise", type=float, nargs="+", default=[1.2, 2.5, 4.0])
    parser.add_argument("--c", type=float, nargs="+", default=[0.316, 10.0])
    options = parser.parse_args(argv)
    table, first = [], 0.0
    for noise in options.noise:
        features = make_features(options.rows + 10_000, options.width, options.classes, noise)
        for c in options.c:
            # What the first fit of all takes more than the others is its compilation.
            first = first or seconds(lambda features=features, c=c: ours(options, *features, c))
            table.append({"noise": noise} | compare(options, *features, c))
    report("linear_probe", options, table, first_fit_with_compilation_s=first)


if __name__ == "__main__":
    main()
