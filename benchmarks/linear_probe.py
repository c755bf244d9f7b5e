"""The linear probe against scikit-learn's LogisticRegression, at the same C, in one process.

    python -m benchmarks.linear_probe [--rows 50000 --width 512 --classes 100]

Features are drawn as CLIP's are: unit vectors in a narrow cone, whose variance falls off by
direction. Needs scikit-learn (the `[parity]` extra).
"""

import argparse
import time

import numpy as np
from sklearn.linear_model import LogisticRegression

from clip_jax.evaluation.linear_probe import fit


def make_features(
    rows: int, width: int, classes: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit features [rows, width] and labels [rows]: class centres in noise, on a common offset."""
    rng = np.random.default_rng(seed)
    spread_D = 1 / np.sqrt(1 + np.arange(width))
    centres_MD = rng.normal(size=(classes, width)) * spread_D
    label_B = rng.integers(classes, size=rows)
    z_BD = centres_MD[label_B] + 1.2 * rng.normal(size=(rows, width)) * spread_D
    z_BD += 4 * rng.normal(size=width) / np.sqrt(width) * np.linalg.norm(spread_D)
    z_BD /= np.linalg.norm(z_BD, axis=1, keepdims=True)
    return z_BD.astype(np.float32), label_B


def main() -> None:
    """Fit both at a few C and print seconds, steps and accuracies."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--c", type=float, nargs="+", default=[0.316, 10.0])
    args = parser.parse_args()
    z_BD, label_B = make_features(args.rows + 10_000, args.width, args.classes)
    train, test = slice(0, args.rows), slice(args.rows, None)
    print(f"{args.rows:,} x {args.width}, {args.classes} classes, 10,000 test rows")
    for c in args.c:
        start = time.perf_counter()
        probe = fit(z_BD[train], label_B[train], num_classes=args.classes, c=c)
        ours = time.perf_counter() - start
        guess_B = probe.logits(z_BD[test]).argmax(axis=1)
        start = time.perf_counter()
        theirs = LogisticRegression(C=c, max_iter=1000).fit(z_BD[train], label_B[train])
        seconds = time.perf_counter() - start
        accuracy = (guess_B == label_B[test]).mean()
        print(
            f"C {c:g}: clip_jax {ours:.1f} s (compilation included), {probe.steps} steps, "
            f"accuracy {accuracy:.2%}; scikit-learn {seconds:.1f} s, {theirs.n_iter_[0]} steps, "
            f"{theirs.score(z_BD[test], label_B[test]):.2%}; {seconds / ours:.1f} times faster",
            flush=True,
        )


if __name__ == "__main__":
    main()
