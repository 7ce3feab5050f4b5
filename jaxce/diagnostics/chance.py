"""A loss beside that of guessing, and in other units."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxce import checks
from jaxce.stats import working_dtype
from jaxce.types import ArrayLike, takes_variables


def _real(name: str, x: Any) -> Array:
    """A number or an array of numbers, in the working dtype."""
    if not checks.is_real(x):
        checks.fail(TypeError, name, "a real number or an array of them", checks.describe(x))
    array = jnp.asarray(x)
    return array.astype(working_dtype(array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else jnp.float32))


@takes_variables
def chance_loss(num_classes: int | None = None, *, priors: ArrayLike | None = None) -> Array:
    r"""The loss of guessing: without knowledge, or knowing how frequent each class is.

    .. math::
        \ln C \qquad\text{or}\qquad -\sum_c q_c \ln q_c

    Args:
      num_classes: C >= 1, a Python int: every class gets probability 1/C.
      priors: `[..., C]`, floats: the class frequencies q, which sum to 1 along the last axis. Give one of the two.

    Returns:
      nats, `[...]`; NaN where traced priors are not probabilities.

    Raises:
      TypeError, ValueError: neither or both are given, or (outside a trace) priors are not probabilities.

    Example:
      >>> from jaxce import diagnostics
      >>> print(diagnostics.chance_loss(10), diagnostics.chance_loss(priors=[0.95, 0.05]))
      2.3025851 0.19851524

    Note:
      The entropy of the labels, below which only looking at the input leads: Shannon, "A Mathematical Theory of
      Communication", 1948, section 6.
    """
    if (num_classes is None) == (priors is None):
        checks.fail(TypeError, "num_classes, priors", "one of the two", "neither" if priors is None else "both")
    if num_classes is not None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)):
            checks.fail(TypeError, "num_classes", "a Python int", checks.describe(num_classes))
        if num_classes < 1:
            checks.fail(ValueError, "num_classes", "at least 1", repr(num_classes))
        return jnp.asarray(math.log(num_classes), jnp.result_type(float))
    if isinstance(priors, (list, tuple)):
        priors = np.asarray(priors)
    priors = checks.float_array("priors", priors)
    checks.num_classes("priors", priors.shape[-1])
    tolerance = max(1e-4, 4 * float(jnp.finfo(priors.dtype).eps))  # frequencies as people round them
    q = priors.astype(working_dtype(priors.dtype))
    total = jnp.sum(q, -1)
    valid = jnp.all(q >= 0, -1) & (jnp.abs(total - 1) <= tolerance)
    if not isinstance(valid, jax.core.Tracer) and not bool(jnp.all(valid)):
        got = f"sums from {float(jnp.min(total)):.6g} to {float(jnp.max(total)):.6g}, least entry {float(jnp.min(q)):g}"
        hint = "Counts become frequencies with counts / counts.sum(); a rate r of positives is [1 - r, r]."
        checks.fail(ValueError, "priors", "probabilities >= 0 that sum to 1", got, hint)
    entropy = jnp.sum(jax.scipy.special.entr(q), -1)
    return jnp.where(valid, entropy, jnp.nan)


@takes_variables
def perplexity(loss: ArrayLike) -> Array:
    r"""How many equally likely classes the model hesitates between.

    .. math::
        e^{\ell}

    Args:
      loss: nats, of any shape: a mean cross-entropy.

    Returns:
      The same shape: 1 is perfect, C is guessing among C classes.

    Raises:
      TypeError: not real numbers.

    Example:
      >>> from jaxce import diagnostics
      >>> print(diagnostics.perplexity(2.302585))
      9.999999

    Note:
      Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks", 1977.
    """
    return jnp.exp(_real("loss", loss))


@takes_variables
def bits(loss: ArrayLike) -> Array:
    r"""A loss in bits instead of nats.

    .. math::
        \ell / \ln 2

    Args:
      loss: nats, of any shape.

    Returns:
      The same shape, in bits.

    Raises:
      TypeError: not real numbers.

    Example:
      >>> from jaxce import diagnostics
      >>> print(diagnostics.bits(0.6931472))
      1.0

    Note:
      Shannon, "A Mathematical Theory of Communication", 1948, introduction.
    """
    return _real("loss", loss) / math.log(2)


@takes_variables
def skill(
    loss: ArrayLike, num_classes: int | None = None, *, priors: ArrayLike | None = None, chance: ArrayLike | None = None
) -> Array:
    r"""Which part of the loss of guessing is gone: 0 is guessing, 1 is perfect, below 0 is worse than guessing.

    .. math::
        1 - \ell / \ell_\text{chance}

    Args:
      loss: nats, of any shape: a mean cross-entropy.
      num_classes: as for `chance_loss`.
      priors: as for `chance_loss`.
      chance: the loss of guessing itself, nats. Give one of these three.

    Returns:
      The shape of loss. It is the percentage people look for in a loss, and it is not the accuracy.

    Raises:
      TypeError, ValueError: not one of the three, or not real numbers.

    Example:
      >>> from jaxce import diagnostics
      >>> print(diagnostics.skill(0.65, 10))
      0.7177086

    Note:
      McFadden's pseudo-R²: "Conditional logit analysis of qualitative choice behavior", 1974; a skill score as in
      weather forecasting.
    """
    if sum(x is not None for x in (num_classes, priors, chance)) != 1:
        checks.fail(TypeError, "num_classes, priors, chance", "one of the three", "none or several")
    guess = _real("chance", chance) if chance is not None else chance_loss(num_classes, priors=priors)
    nats = _real("loss", loss)
    dtype = nats.dtype if num_classes is not None else jnp.promote_types(nats.dtype, guess.dtype)
    return 1 - nats.astype(dtype) / guess.astype(dtype)


@takes_variables
def accuracy_bound(loss: ArrayLike) -> Array:
    r"""The least accuracy that goes with a mean loss, whatever the number of classes.

    .. math::
        \text{accuracy} \ge \max(0,\; 1 - \ell / \ln 2)

    A wrong prediction leaves the true class at most probability 1/2, so every mistake costs at least ln 2.

    Args:
      loss: nats, of any shape: the mean of cross-entropies without smoothing.

    Returns:
      The same shape, from 0 to 1. There is no upper bound: one confident mistake can cost anything.

    Raises:
      TypeError: not real numbers.

    Example:
      >>> from jaxce import diagnostics
      >>> print(diagnostics.accuracy_bound(0.0693147))
      0.90000004

    Note:
      Markov's inequality. Surrogate losses in general: Bartlett, Jordan and McAuliffe, "Convexity, Classification,
      and Risk Bounds", 2006.
    """
    return jnp.maximum(1 - bits(loss), 0)
