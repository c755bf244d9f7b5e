"""The linear probe against scikit-learn's LogisticRegression, at the same C, in one process.

    python -m benchmarks.linear_probe --rows 50000 --width 512 --classes 100

Features are drawn as CLIP's are: unit vectors in a narrow cone, whose variance falls off by
direction. Needs scikit-learn (the `[parity]` extra).
"""

from typing import Any

import benchmarks.first  # noqa: F401

# isort: split
import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.turns import arguments, ratio, report, seconds, spread, take_turns
from clip_jax.evaluation.linear_probe import fit


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
        z_BD, label_B = make_features(options.rows + 10_000, options.width, options.classes, noise)
        train, test = slice(0, options.rows), slice(options.rows, None)
        for c in options.c:
            found: dict[str, Any] = {}

            def ours(c=c, found=found, data=(z_BD[train], label_B[train])) -> None:
                found["clip_jax"] = fit(*data, num_classes=options.classes, c=c)

            def theirs(c=c, found=found, data=(z_BD[train], label_B[train])) -> None:
                found["scikit-learn"] = LogisticRegression(C=c, max_iter=1000).fit(*data)

            first = first or seconds(ours)
            calls = {"clip_jax": ours, "scikit-learn": theirs}
            times = take_turns(calls, warmup=options.warmup, repeats=options.repeats)
            probe, reference = found["clip_jax"], found["scikit-learn"]
            guess_B = probe.logits(z_BD[test]).argmax(axis=1)
            table.append(
                {
                    "noise": noise,
                    "C": c,
                    "clip_jax, s": spread(times["clip_jax"]),
                    "scikit-learn, s": spread(times["scikit-learn"]),
                    "faster": ratio(times["scikit-learn"], times["clip_jax"]),
                    "steps": f"{probe.steps}, {reference.n_iter_[0]}",
                    "accuracy": f"{(guess_B == label_B[test]).mean():.2%}",
                    "scikit-learn's": f"{reference.score(z_BD[test], label_B[test]):.2%}",
                }
            )
    report("linear_probe", options, table, first_fit_with_compilation_s=first)


if __name__ == "__main__":
    main()
