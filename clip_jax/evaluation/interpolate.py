"""Weights between a start and what became of it, evaluated on a new task and on the one before.

Wortsman et al. 2022 (WiSE-FT, arXiv:2109.01903): (1 - alpha) * start + alpha * tuned.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

CURVE_FILENAME = "wiseft.json"


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """The metrics at one alpha: 0 is the start, 1 the end.

    Attributes:
      new: of the task that the model was tuned for.
      kept: of the one that it shall not forget.
    """

    alpha: float
    new: dict[str, float]
    kept: dict[str, float]


def interpolate(start: Any, tuned: Any, alpha: float) -> Any:
    """Return weights between two trees of one structure; at 0 and 1 they are the very ones.

    >>> float(interpolate({"a": jnp.zeros(())}, {"a": jnp.ones(())}, 0.25)["a"])
    0.25
    """
    if alpha in (0, 1):
        return tuned if alpha else start
    return jax.tree.map(lambda a, b: ((1 - alpha) * a + alpha * b).astype(a.dtype), start, tuned)


def measure_curve(
    start: Any,
    tuned: Any,
    alphas: Sequence[float],
    *,
    new: Callable[[Any], dict[str, float]],
    kept: Callable[[Any], dict[str, float]],
) -> list[CurvePoint]:
    """Evaluate both tasks at every alpha."""
    points = []
    for alpha in alphas:
        weights = interpolate(start, tuned, alpha)
        points.append(CurvePoint(alpha, new(weights), kept(weights)))
    return points


def best_point(points: Sequence[CurvePoint], metric: str, max_loss: float) -> CurvePoint:
    """Return the point that is best at the new task and loses at most so much of the kept one.

    What is lost is counted from the first point, which is always good enough.
    """
    floor = points[0].kept[metric] - max_loss
    good = [point for point in points if point.kept[metric] >= floor]
    return max(good or points[:1], key=lambda point: point.new[metric])


def curve_to_json(
    points: Sequence[CurvePoint], best: CurvePoint, **fields: Any
) -> Mapping[str, Any]:
    """Return the curve as `wiseft.json` has it."""
    return {**fields, "best": best.alpha, "points": [dataclasses.asdict(p) for p in points]}
