"""The calibration temperature."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxce import checks
from jaxce.diagnostics.outcomes import checked, flat
from jaxce.sharding import vary, varying
from jaxce.softmax import softmax_cross_entropy
from jaxce.types import ArrayLike, takes_variables

_State = tuple[Array | int, Array, Array, Array, Array]  # step, bracket, where it is, and where it was before
_MAX_STEPS = 60  # bisection alone gets from [1e-3, 1e3] to float64's last digit in fewer


@takes_variables
def fit_temperature(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    bounds: tuple[float, float] = (1e-3, 1e3),
) -> Array:
    r"""The temperature T that makes the mean loss of `logits / T` least.

    .. math::
        \operatorname*{argmin}_{T > 0} \frac1N \sum_n \ell(z_n / T, y_n)

    Dividing by it makes probabilities believable and leaves every prediction as it is: above 1 the model was
    overconfident, below 1 underconfident. Fit it on held-out examples, not on those of the training. In a
    `jax.shard_map` every device fits one to the examples it has.

    Args:
      logits: floats `[..., V]`.
      targets: integers `[...]`, class indices.
      weights: numbers that broadcast to `[...]`, >= 0.
      ignore_index: examples with this label count nowhere.
      bounds: the least and the largest T to consider.

    Returns:
      One number, T. The lower bound if every prediction is right: then the loss falls for ever as T goes to 0. The
      upper bound if the logits are no better than guessing: then nothing beats T = ∞. NaN for a NaN logit, a row of
      nothing but −inf, a label that is no class, or one whose logit is −inf (no T makes that loss finite). 1, or
      the bound next to it, if no example counts or every row's logits are equal.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxce import diagnostics
      >>> logits = jnp.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])  # sure, and right 3 times of 4
      >>> print(diagnostics.fit_temperature(logits, jnp.array([0, 0, 1, 1])))
      3.6409569

    Note:
      Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2. The loss is convex in 1/T, in which
      Newton's method runs inside a bracket; it halves the bracket (in the logarithm) where a step leaves it.
    """
    both = tuple(bounds) if np.iterable(bounds) else ()
    if len(both) != 2:
        checks.fail(ValueError, "bounds", "two numbers, the least T and the largest", repr(bounds))
    for name, x in zip(("bounds[0]", "bounds[1]"), both, strict=True):
        checks.scalar(name, x, 0, float("inf"))
    if not 0 < both[0] < both[1]:
        checks.fail(ValueError, "bounds", "0 < lower < upper", repr(bounds))
    best: Array = _fit(*checked(logits, targets, weights, ignore_index), *map(float, both))
    return best


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _fit(logits: Array, labels: Array, weights: Array, ignore_index: int | None, low: float, high: float) -> Array:
    logits, labels, weights = flat(logits, labels, weights)
    dtype = weights.dtype
    # A class of probability 0 stays one at every temperature: taken out, so that 0·∞ does not come up.
    possible = ~(logits == -jnp.inf)
    possible |= ~jnp.any(possible, -1, keepdims=True)  # nothing but −inf is no distribution: it becomes NaN below
    top = jnp.max(logits, -1, keepdims=True).astype(dtype)
    scores = jnp.where(possible, logits.astype(dtype) - top, 0)
    scores = jnp.where((weights == 0)[:, None], 0, scores)
    if ignore_index is not None:
        scores = jnp.where((labels == ignore_index)[:, None], 0, scores)

    def loss(inverse: Array) -> Array:
        return softmax_cross_entropy(
            inverse * scores, labels, where=possible, weights=weights, ignore_index=ignore_index, reduction="mean"
        )

    slope = jax.grad(loss)
    smallest, largest = jnp.asarray(1 / high, dtype), jnp.asarray(1 / low, dtype)

    def wants_more(state: _State) -> Array:
        step, least, most, at, before = state
        return (step < _MAX_STEPS) & (at != before) & (least < most)

    def improve(state: _State) -> _State:
        step, least, most, at, _ = state
        rise, curvature = jax.jvp(slope, (at,), (jnp.ones_like(at),))
        least, most = jnp.where(rise < 0, at, least), jnp.where(rise > 0, at, most)
        newton = at - rise / curvature
        inside = (newton > least) & (newton < most)
        after = jnp.where(inside, newton, jnp.sqrt(least * most))
        return step + 1, least, most, jnp.where(rise == 0, at, after), at

    # In a `shard_map` every device fits its own: to a number that all share their gradients would be added up.
    smallest, largest = vary((smallest, largest), varying(logits, labels, weights))
    start = jnp.clip(jnp.asarray(1, dtype), smallest, largest)
    state: _State = (0, smallest, largest, start, start + 1)
    found = lax.while_loop(wants_more, improve, state)[3]
    first, last = slope(smallest), slope(largest)
    separable = (first < 0) & (last <= 0)  # the slope of a perfect model underflows to 0 long before the bound
    found = jnp.where(first > 0, smallest, jnp.where(separable, largest, found))
    return jnp.where(jnp.isfinite(loss(found)), 1 / found, jnp.nan)
