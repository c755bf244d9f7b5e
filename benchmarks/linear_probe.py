"""The linear probe against scikit-learn's LogisticRegression at the same C, a process each.

    python -m benchmarks.linear_probe --rows 50000 --width 512 --classes 100

Features are drawn as CLIP's are: unit vectors in a narrow cone, whose variance falls off by
direction. Needs scikit-learn (the `[parity]` extra).
"""

import argparse
from typing import Any

import numpy as np

from benchmarks.interleaved import make_parser, ratio, report, seconds, spread, time_interleaved
from benchmarks.subprocess_calls import Calls, in_subprocess

TEST_ROWS = 10_000


def make_features(
    rows: int, width: int, classes: int, noise: float, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw unit features [rows, width] and labels [rows]: class centers in noise, on an offset."""
    rng = np.random.default_rng(seed)
    spread_D = 1 / np.sqrt(1 + np.arange(width))
    centers_MD = rng.normal(size=(classes, width)) * spread_D
    label_B = rng.integers(classes, size=rows)
    z_BD = centers_MD[label_B] + noise * rng.normal(size=(rows, width)) * spread_D
    z_BD += 4 * rng.normal(size=width) / np.sqrt(width) * np.linalg.norm(spread_D)
    z_BD /= np.linalg.norm(z_BD, axis=1, keepdims=True)
    return z_BD.astype(np.float32), label_B


def probe_side(options: argparse.Namespace, noise: float, c: float) -> tuple[Calls, None]:
    """Return the fit on the first `options.rows`, and its (steps, accuracy) on the rows behind."""
    from clip_jax.evaluation.linear_probe import Probe, fit

    z_BD, label_B = make_features(options.rows + TEST_ROWS, options.width, options.classes, noise)
    rows, probes = options.rows, []

    def fit_once() -> None:
        probes.append(fit(z_BD[:rows], label_B[:rows], num_classes=options.classes, c=c))

    def evaluate() -> tuple[int, float]:
        probe: Probe = probes[-1]
        guess_B = probe.logits(z_BD[rows:]).argmax(axis=1)
        return probe.steps, float((guess_B == label_B[rows:]).mean())

    return {"fit": fit_once, "evaluate": evaluate}, None


def sklearn_side(options: argparse.Namespace, noise: float, c: float) -> tuple[Calls, None]:
    """Return the same of scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    z_BD, label_B = make_features(options.rows + TEST_ROWS, options.width, options.classes, noise)
    rows, reference = options.rows, LogisticRegression(C=c, max_iter=1000)

    def fit_once() -> None:
        reference.fit(z_BD[:rows], label_B[:rows])

    def evaluate() -> tuple[int, float]:
        return int(reference.n_iter_[0]), float(reference.score(z_BD[rows:], label_B[rows:]))

    return {"fit": fit_once, "evaluate": evaluate}, None


def compare(options: argparse.Namespace, noise: float, c: float) -> dict[str, Any]:
    """Time interleaved fits of both, and measure their accuracy on other rows."""
    probe_calls, _ = in_subprocess(probe_side, options, noise, c)
    sklearn_calls, _ = in_subprocess(sklearn_side, options, noise, c)
    first_seconds = seconds(probe_calls["fit"])
    calls = {"clip_jax": probe_calls["fit"], "scikit-learn": sklearn_calls["fit"]}
    times = time_interleaved(calls, warmup=options.warmup, repeats=options.repeats)
    steps, accuracy = probe_calls["evaluate"]()
    sklearn_steps, sklearn_accuracy = sklearn_calls["evaluate"]()
    return {
        "noise": noise,
        "C": c,
        "clip_jax, s": spread(times["clip_jax"]),
        "scikit-learn, s": spread(times["scikit-learn"]),
        "faster": ratio(times["scikit-learn"], times["clip_jax"]),
        "first fit, s": first_seconds,
        "steps": f"{steps}, {sklearn_steps}",
        "accuracy": f"{accuracy:.2%}",
        "scikit-learn's": f"{sklearn_accuracy:.2%}",
    }


def main(argv: list[str] | None = None) -> None:
    """Measure at a few C and a few amounts of noise, and print one table."""
    parser = make_parser(__doc__, warmup=0, repeats=3)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--noise", type=float, nargs="+", default=[1.2, 2.5, 4.0])
    parser.add_argument("--c", type=float, nargs="+", default=[0.316, 10.0])
    options = parser.parse_args(argv)
    table = [compare(options, noise, c) for noise in options.noise for c in options.c]
    report("linear_probe", options, table)


if __name__ == "__main__":
    main()
