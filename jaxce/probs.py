"""Cross-entropy of probabilities: for models that end in a softmax, or predictions that never had logits."""

from __future__ import annotations

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce import checks
from jaxce.arguments import Examples, Options, Shared, checked, with_targets_checked
from jaxce.compose import compose, usable_probs, who_counts
from jaxce.layout import classes_last, sharded_alike
from jaxce.lookup import pick
from jaxce.selection import select
from jaxce.stats import Terms, times, working_dtype
from jaxce.targets import Targets, class_weight_at, entry_probs, is_class
from jaxce.types import ArrayLike, Axis, Reduction, takes_variables


@takes_variables
def cross_entropy_from_probs(
    probs: ArrayLike,
    targets: Targets,
    axis: Axis = -1,
    *,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    ignore_index: int | None = None,
    reduction: Reduction = "none",
) -> Array:
    r"""Cross-entropy between predicted probabilities and targets.

    .. math:: \ell = -\sum_c w_c\, t'_c \log p_c, \qquad t' = (1-\varepsilon)\,t + \varepsilon/V

    If you have logits, use `softmax_cross_entropy`: a probability near 1 has already lost the digits of its loss, and
    one that has underflowed to 0 has an infinite loss. The probabilities are taken as they are, neither rescaled to
    sum to 1 nor clipped.

    Args:
      probs: floats `[..., V]` between 0 and 1; the class axis may be anywhere, see `axis`.
      targets: class indices, probabilities or `jaxce.SparseTargets`, as for `softmax_cross_entropy`.
      axis, weights, class_weights, label_smoothing, ignore_index, reduction: as for `softmax_cross_entropy`.

    Returns:
      The loss in nats, float64 for float64 probabilities and float32 for all others. A target on a class of
      probability 0 gives +inf; a target probability of 0 contributes 0 there. A probability that is NaN, negative
      or above 1, target or not, makes its row NaN, and so does a label outside 0..V-1.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> probs = jnp.array([0.1, 0.5, 0.1, 0.1, 0.2])
      >>> print(jaxce.cross_entropy_from_probs(probs, jnp.array(0)))
      2.3025851

    Note:
      Kullback and Leibler (1951); the same loss as `keras.losses.CategoricalCrossentropy` without its clipping at 1e-7
      and its division by the sum of the probabilities.
    """
    probs = checks.float_array("probs", probs, targets)
    axes = checks.class_axes(axis, probs.ndim)
    checks.num_classes("probs", math.prod(probs.shape[i] for i in axes))
    examples, shared, options = checked(
        targets,
        probs.shape,
        axes,
        probs.dtype,
        weights=weights,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    loss = _loss(probs, examples, shared, axes=axes, options=options)
    return cast(Array, with_targets_checked(loss, targets, examples, axes, options))


@functools.partial(jax.jit, static_argnames=("axes", "options"))
def _loss(p: Array, examples: Examples, shared: Shared, *, axes: tuple[int, ...], options: Options) -> Array:
    examples, shared = sharded_alike(options, p, examples, shared, axes)
    p, examples = classes_last(p, examples, axes)
    indices, class_weights = examples.indices, shared.class_weights
    dtype = working_dtype(p.dtype)
    p = p.astype(dtype)
    if examples.probs is not None:  # used more than once: their gradients are added before they are rounded
        examples = examples._replace(probs=examples.probs.astype(dtype))
    like = jnp.sum(p, -1)
    counts = who_counts(options, examples, shared, like)
    examples = usable_probs(options, examples, counts)
    unused = counts.unused
    slack = 16 * jnp.finfo(dtype).eps  # a softmax may round to a little more than 1
    valid = jnp.all((p >= 0) & (p <= 1 + slack), -1)
    if indices is not None:
        entries = entry_probs(indices, examples.probs, options.ignore_index)
        idle = jnp.zeros(indices.shape, jnp.bool_) if entries is None else entries == 0
        idle |= unused[..., None]
        valid &= jnp.all(is_class(indices, p.shape[-1]) | idle, -1)
    p = select((unused & ~valid)[..., None], jnp.ones_like(p), p)
    p = p * select(valid | unused, 1, jnp.nan)[..., None]  # a factor, so that the gradient of such a row is NaN too

    def counted(surprise: Array) -> Array:
        """Finite in unused rows: multiplied by a cotangent of 0, infinity would be NaN in what rows share."""
        return select(unused[..., None] & jnp.isinf(surprise), 0, surprise)

    amount = jnp.zeros((), dtype) if shared.label_smoothing is None else shared.label_smoothing
    if indices is not None:
        if class_weights is not None:
            idle |= class_weight_at(class_weights, indices, ()) == 0
        target = _surprise(pick(p, indices), idle | (amount == 1))
    else:
        assert examples.probs is not None  # targets are either indices or probabilities
        t = examples.probs
        if class_weights is not None:
            t = t * jnp.broadcast_to(class_weights, t.shape)
        target = jnp.sum(times(t, counted(_surprise(p, (t == 0) | unused[..., None] | (amount == 1)))), -1)
    smoothing = None
    if options.label_smoothing:
        v = jnp.ones_like(p) if class_weights is None else jnp.broadcast_to(class_weights, p.shape)
        smoothing = jnp.sum(times(v, counted(_surprise(p, (v == 0) | unused[..., None] | (amount == 0)))), -1)
    terms = Terms(jnp.zeros_like(like), target, smoothing)
    return cast(Array, compose(options, terms, examples, shared, counts, p.shape[-1]))


def _surprise(p: Array, idle: Array) -> Array:
    """−log p; without a derivative where it is multiplied by 0 and p has no logarithm."""
    return -jnp.log(select(idle & ~(p > 0), lax.stop_gradient(p), p))
