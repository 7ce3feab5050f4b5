"""Whether probabilities can be believed: reliability bins, calibration errors, the Brier score."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxce import checks
from jaxce.diagnostics.outcomes import Outcomes, checked, flat, outcomes, sums_by
from jaxce.serialization import serializable
from jaxce.types import ArrayLike, takes_variables


class Calibration(NamedTuple):
    """Examples binned by confidence, the probability of the predicted class. Bins are of equal width, `(low, high]`.

    Attributes:
      weight: `[B]`, the number of examples in each bin (the sum of their weights).
      confidences: `[B]`, the sum of their confidences.
      hits: `[B]`, how many of them are right.
    """

    weight: Array
    confidences: Array
    hits: Array

    @property
    def edges(self) -> Array:
        """`[B+1]`, from 0 to 1."""
        return bin_edges(self.weight.shape[0], self.weight.dtype)

    @property
    def confidence(self) -> Array:
        """`[B]`, the mean confidence; NaN in an empty bin."""
        return self.confidences / self.weight

    @property
    def accuracy(self) -> Array:
        """`[B]`, the share that is right; NaN in an empty bin."""
        return self.hits / self.weight

    @property
    def expected_error(self) -> Array:
        """The ECE, the mean over examples of their bin's distance between confidence and accuracy; 0 over nothing."""
        total = jnp.sum(self.weight)
        return jnp.sum(jnp.abs(self.confidences - self.hits)) / jnp.where(total == 0, 1, total)

    @property
    def maximum_error(self) -> Array:
        """The MCE, the largest such distance of a bin; 0 over nothing."""
        return jnp.max(jnp.abs(self.confidences - self.hits) / jnp.where(self.weight == 0, 1, self.weight))

    def merge(self, other: Calibration) -> Calibration:
        """The bins of both sets of examples together."""
        if self.weight.shape != other.weight.shape:
            checks.fail(ValueError, "other", f"{len(self.weight)} bins", f"{len(other.weight)}")
        both: Calibration = jax.tree.map(jnp.add, self, other)
        return both


serializable(Calibration)


def bin_edges(num_bins: int, dtype: Any) -> Array:
    return jnp.linspace(0, 1, num_bins + 1, dtype=dtype)


def binned(made: Outcomes, num_bins: int) -> Calibration:
    # As in scikit-learn: a confidence on an inner edge is in the bin below; 0 is in the first bin and 1 in the last.
    which = jnp.searchsorted(bin_edges(num_bins, made.confidence.dtype)[1:-1], made.confidence)

    def by_bin(values: Array) -> Array:
        return sums_by(which, made.weighted(values), num_bins)

    return Calibration(by_bin(jnp.ones_like(made.nll)), by_bin(made.confidence), by_bin(made.hit))


@takes_variables
def calibration(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    num_bins: int = 15,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
) -> Calibration:
    r"""How often predictions made with a given confidence are right.

    .. math::
        \mathrm{ECE} = \sum_b \frac{n_b}{n} \lvert \mathrm{conf}_b - \mathrm{acc}_b \rvert, \qquad
        \mathrm{MCE} = \max_b \lvert \mathrm{conf}_b - \mathrm{acc}_b \rvert

    Args:
      logits: floats `[..., V]`.
      targets: integers `[...]`, class indices.
      num_bins: B, a Python int.
      weights: numbers that broadcast to `[...]`, >= 0.
      ignore_index: examples with this label count nowhere.

    Returns:
      A `Calibration`, whose `expected_error` and `maximum_error` are these, and which has a method `merge`.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxce import diagnostics
      >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]))
      >>> found = diagnostics.calibration(logits, jnp.array([0, 1, 1]))
      >>> print(found.expected_error, found.maximum_error)
      0.39999998 0.40000004

    Note:
      Guo et al., "On Calibration of Modern Neural Networks", 2017, equations 3 and 5. An ECE depends on the number
      of bins and is never quite 0 on finite data: compare it between models on the same examples.
    """
    checks.count("num_bins", num_bins, 1)
    found: Calibration = _calibration(*checked(logits, targets, weights, ignore_index), int(num_bins))
    return found


@functools.partial(jax.jit, static_argnums=(3, 4))
def _calibration(logits: Array, labels: Array, weights: Array, ignore_index: int | None, num_bins: int) -> Calibration:
    return binned(outcomes(*flat(logits, labels, weights), ignore_index), num_bins)


@takes_variables
def brier(
    logits: ArrayLike, targets: ArrayLike, *, weights: ArrayLike | None = None, ignore_index: int | None = None
) -> Array:
    r"""The mean squared error of the probabilities.

    .. math::
        \frac1N \sum_n \sum_c (p_{nc} - [c = y_n])^2

    Args:
      logits: floats `[..., V]`.
      targets: integers `[...]`, class indices.
      weights: numbers that broadcast to `[...]`, >= 0.
      ignore_index: examples with this label count nowhere.

    Returns:
      One number from 0 (perfect) to 2; 1 − 1/V is guessing. With two classes it is twice the score that counts the
      positive class alone.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxce import diagnostics
      >>> print(diagnostics.brier(jnp.zeros((1, 4)), jnp.array([2])))
      0.75

    Note:
      Brier, "Verification of forecasts expressed in terms of probability", 1950, equation 2.
    """
    score: Array = _brier(*checked(logits, targets, weights, ignore_index))
    return score


@functools.partial(jax.jit, static_argnums=3)
def _brier(logits: Array, labels: Array, weights: Array, ignore_index: int | None) -> Array:
    made = outcomes(*flat(logits, labels, weights), ignore_index)
    return made.mean(made.brier)
