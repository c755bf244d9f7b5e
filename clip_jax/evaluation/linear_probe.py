"""Fit a linear probe: multinomial logistic regression by L-BFGS on frozen features, over a mesh.

The minimum is scikit-learn's `LogisticRegression`'s: `C * sum of cross-entropies + |W|^2 / 2`, the
bias left alone. The way there is shorter. CLIP's features lie in a narrow cone, so the loss is
much steeper in some directions than in others, and L-BFGS takes hundreds of steps; here the
features and the bias are first turned and stretched by the Hessian that all-equal probabilities
would have, and the penalty with them. The same function in other coordinates has the same minimum.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float32, Int

from clip_jax.parallel.mesh import batch_shards, place_batch

# The paper's sweep (appendix A.3): 1 / C from 1e-6 to 1e6, eight steps a decade at the finest.
C_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
STEPS_PER_DECADE = 8
# Fits of a search: the seven, and for each of the four spans down to an eighth two more.
MAX_FITS = len(C_EXPONENTS) + 2 * 4
STEPS_PER_CALL = 20


class Probe(NamedTuple):
    """A fitted probe, whose logits are z_BD @ weights_MD.T + bias_M.

    Attributes:
      steps: of L-BFGS that it took.
    """

    weights_MD: Float32[np.ndarray, "M D"]
    bias_M: Float32[np.ndarray, " M"]
    steps: int

    def logits(self, z_BD: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B M"]:
        """Return the logits of any number of features."""
        return z_BD @ self.weights_MD.T + self.bias_M


def fit(
    z_BD: Float32[np.ndarray, "B D"],
    label_B: Int[np.ndarray, " B"],
    *,
    num_classes: int,
    c: float,
    mesh: Mesh | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 1000,
    steps_per_call: int = STEPS_PER_CALL,
    on_steps: Callable[[int], object] = lambda steps: None,
) -> Probe:
    """Fit the probe of one C.

    Args:
      mesh: splits the rows between its devices; every process passes all rows. None is one device.
      tolerance: stops where no element of the mean loss's gradient is larger, in the stretched
        coordinates; scikit-learn's default is the same number in its own.
      steps_per_call: that a device takes before the host looks, calls back, and can be interrupted.
      on_steps: called with the number of steps, from time to time.
    """
    penalty = 1.0 / (c * len(z_BD))
    center_D = z_BD.mean(axis=0, dtype=np.float64)
    stretch_DD = _stretch(z_BD, center_D, num_classes, penalty)
    placed_BD, *rest = _place(z_BD, label_B, mesh)
    rows = _move(placed_BD, center_D.astype(np.float32), stretch_DD), *rest
    carry = _begin(num_classes, z_BD.shape[1])
    if mesh is not None:  # where the next round finds it too
        carry = jax.device_put(carry, NamedSharding(mesh, PartitionSpec()))
    function = *rows, jnp.asarray(stretch_DD), jnp.float32(penalty)
    steps = 0
    while steps < max_steps and float(carry.largest) > tolerance:
        until = min(steps + steps_per_call, max_steps)
        carry = _advance(carry, *function, tolerance, until)
        steps = int(carry.steps)
        on_steps(steps)
    v_MD, b_M = carry.params
    weights_MD = np.asarray(v_MD, np.float64) @ stretch_DD.T.astype(np.float64)
    bias_M = np.asarray(b_M, np.float64) * num_classes**0.5 - weights_MD @ center_D
    return Probe(weights_MD.astype(np.float32), bias_M.astype(np.float32), steps)


def _stretch(
    z_BD: np.ndarray, center_D: np.ndarray, num_classes: int, penalty: float
) -> Float32[np.ndarray, "D D"]:
    """Return H^-1/2 for H = covariance / M + penalty, the Hessian at equal probabilities."""
    second_DD = (z_BD.T @ z_BD).astype(np.float64) / len(z_BD)
    covariance_DD = second_DD - np.outer(center_D, center_D)
    values_D, turn_DD = np.linalg.eigh(covariance_DD)
    # Rounding in float32 leaves eigenvalues that are a little negative or mean nothing.
    floor = max(values_D[-1], 0.0) * 1e-7 + 1e-12
    scale_D = 1 / np.sqrt(np.maximum(values_D, floor) / num_classes + penalty)
    return (turn_DD * scale_D).astype(np.float32)


@jax.jit
def _move(z_BD, center_D, stretch_DD):
    return jnp.matmul(z_BD - center_D, stretch_DD, precision=jax.lax.Precision.HIGHEST)


def _place(x_BD: np.ndarray, label_B: np.ndarray, mesh: Mesh | None) -> tuple[jax.Array, ...]:
    """Place features, labels and weights of the rows; padding of the last share weighs nothing."""
    weight_B = np.full(len(x_BD), 1 / len(x_BD), np.float32)
    arrays = {"x": x_BD, "label": label_B.astype(np.int32), "weight": weight_B}
    if mesh is None:
        return tuple(jnp.asarray(a) for a in arrays.values())
    share = -(-len(x_BD) // (batch_shards(mesh) * jax.process_count())) * batch_shards(mesh)
    local = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    filled = {
        name: np.pad(a, ((0, share * jax.process_count() - len(a)), *((0, 0),) * (a.ndim - 1)))
        for name, a in arrays.items()
    }
    return tuple(place_batch({n: a[local] for n, a in filled.items()}, mesh).values())


class _Carry(NamedTuple):
    """The state of the minimization.

    Attributes:
      params: stretched weights and bias; state: L-BFGS's memory.
      largest: the largest element of the gradient before the last step.
    """

    params: tuple[jax.Array, jax.Array]
    state: optax.OptState
    steps: jax.Array
    largest: jax.Array


def _solver() -> optax.GradientTransformationExtraArgs:
    return optax.lbfgs(memory_size=10)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(num_classes, width):
    params = jnp.zeros((num_classes, width), jnp.float32), jnp.zeros(num_classes, jnp.float32)
    return _Carry(params, _solver().init(params), jnp.int32(0), jnp.float32(jnp.inf))


@jax.jit
def _advance(carry, x_BD, label_B, weight_B, stretch_DD, penalty, tolerance, until):
    """Take steps down to the tolerance or up to the step `until`."""

    def loss(params):
        v_MD, b_M = params
        precise = jax.lax.Precision.HIGHEST
        # With equal probabilities the bias's Hessian is 1 / M: stretched like the rest, it is 1.
        logits_BM = jnp.matmul(x_BD, v_MD.T, precision=precise) + len(b_M) ** 0.5 * b_M
        # A mask, where a gather of the labels' logits makes the CPU's gradient a quarter slower.
        target_B = jnp.sum(
            jnp.where(label_B[:, None] == jnp.arange(len(b_M)), logits_BM, 0), axis=1
        )
        entropy_B = jax.nn.logsumexp(logits_BM, axis=1) - target_B
        w_MD = jnp.matmul(v_MD, stretch_DD.T, precision=precise)
        return jnp.sum(weight_B * entropy_B) + penalty / 2 * jnp.sum(w_MD**2)

    solver = _solver()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, steps, _ = carry
        value, grad = value_and_grad(params, state=state)
        largest = jnp.maximum(jnp.abs(grad[0]).max(), jnp.abs(grad[1]).max())
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return _Carry(optax.apply_updates(params, updates), state, steps + 1, largest)

    def going_on(carry):
        return (carry.steps < until) & (carry.largest > tolerance)

    return jax.lax.while_loop(going_on, step, carry)


def choose_c(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    fit_one: Callable[..., Probe],
) -> tuple[float, dict[float, float]]:
    """Choose C by accuracy on validation data; return it and the accuracy of every C tried.

    It is the paper's search: seven powers of ten, then ever nearer on both sides of the best one,
    down to eight steps a decade. Of equal accuracies the smaller C is taken.

    Args:
      train, validation: features and labels.
      fit_one: called with training features, their labels and `c`.
    """
    tried: dict[float, float] = {}

    def accuracy(exponent: float) -> float:
        if exponent not in tried:
            probe = fit_one(*train, c=10.0**exponent)
            guess_B = probe.logits(validation[0]).argmax(axis=1)
            tried[exponent] = float((guess_B == validation[1]).mean())
        return tried[exponent]

    best = max(C_EXPONENTS, key=accuracy)
    span = 1.0
    while span >= 1 / STEPS_PER_DECADE:
        near: Sequence[float] = (best - span, best, best + span)
        best = max([e for e in near if abs(e) <= C_EXPONENTS[-1]], key=accuracy)
        span /= 2
    return 10.0**best, {10.0**e: a for e, a in sorted(tried.items())}


def hold_out(
    label_B: Int[np.ndarray, " B"], *, share: float = 0.2, seed: int = 0
) -> tuple[Int[np.ndarray, " fit"], Int[np.ndarray, " held"]]:
    """Split into rows to fit on and rows to choose C by, where there is no validation set."""
    order = np.random.default_rng(seed).permutation(len(label_B))
    count = max(1, round(share * len(label_B)))
    return np.sort(order[count:]), np.sort(order[:count])


def draw_shots(
    label_B: Int[np.ndarray, " B"], shots: int, *, seed: int
) -> Int[np.ndarray, " rows"]:
    """Draw `shots` rows of every class that has so many; take all of a class that has fewer."""
    order = np.random.default_rng(seed).permutation(len(label_B))
    counts: dict[int, int] = {}
    rows = []
    for row in order:
        label = int(label_B[row])
        if counts.get(label, 0) < shots:
            counts[label] = counts.get(label, 0) + 1
            rows.append(row)
    return np.sort(np.array(rows, np.int64))
