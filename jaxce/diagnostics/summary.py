"""The mergeable record a report is made from: sums over examples, and the costliest of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxce import checks
from jaxce.diagnostics.outcomes import Outcomes, checked, flat, outcomes, sums_by
from jaxce.diagnostics.reliability import Calibration, binned
from jaxce.types import ArrayLike, takes_variables

# Inner edges of the histogram of losses, five to a decade, so that records of any two runs can be merged. All that is
# below the first is in the first bin, all above the last in the last.
LOSS_EDGES = np.logspace(-6, 2, 41)


class Costliest(NamedTuple):
    """The m examples with the largest cost (weight times loss), largest first; NaN counts as inf, −1 fills up.

    `example` is the number of each among all that were seen.
    """

    example: Array
    label: Array
    prediction: Array
    loss: Array
    cost: Array

    def merge(self, other: Costliest, offset: Array) -> Costliest:
        other = other._replace(example=other.example + offset)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self, other)
        # Not NaN itself, which top_k orders differently from one version of JAX to the next.
        _, best = jax.lax.top_k(jnp.where(jnp.isnan(both.cost), jnp.inf, both.cost), self.cost.shape[0])
        costliest: Costliest = jax.tree.map(lambda x: x[best], both)
        return costliest


class Summary(NamedTuple):
    """Sums over examples, weighted unless they are counts: a pytree of fixed size, for up to 2³¹ − 1 examples.

    Attributes:
      seen: int32, all examples, those that do not count included.
      examples: int32, those that count.
      weight_squares: the sum of squared weights.
      loss_squares: the sum of squared losses.
      brier: the sum of Brier scores.
      right_loss, wrong_loss: the sum of the losses of right, and of wrong predictions.
      top_k_hits: by k.
      class_examples: int32 `[V]`, by label.
      class_weight, class_loss, class_hits: `[V]`, by label.
      predicted_weight: `[V]`, by prediction.
      right_histogram, wrong_histogram: `[H]`, of losses.
      probability_rows: int32, rows of logits that look like probabilities.
      calibration: reliability bins.
      unattributed: 0, or NaN if an example's label was no class, so that no class can show it.
      costliest: the examples with the largest costs, weight times loss.
    """

    seen: Array
    examples: Array
    weight_squares: Array
    loss_squares: Array
    brier: Array
    right_loss: Array
    wrong_loss: Array
    top_k_hits: dict[int, Array]
    class_examples: Array
    class_weight: Array
    class_loss: Array
    class_hits: Array
    predicted_weight: Array
    right_histogram: Array
    wrong_histogram: Array
    probability_rows: Array
    calibration: Calibration
    unattributed: Array
    costliest: Costliest


@takes_variables
def summarize(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    top_k: int | tuple[int, ...] | None = None,
    num_bins: int = 15,
    num_costliest: int = 10,
) -> Summary:
    r"""The record of a batch of examples, for `merge` and `finish`.

    .. math::
        \Big(\sum_n w_n,\; \sum_n w_n \ell_n,\; \sum_n w_n [\hat y_n = y_n],\; \dots\Big)

    Args:
      logits: floats `[..., V]`.
      targets: integers `[...]`, class indices.
      weights: numbers that broadcast to `[...]`, >= 0.
      ignore_index: examples with this label count nowhere.
      top_k: count a prediction as right among the k largest logits; one or several k. None: 5 if there are more
        classes than that.
      num_bins: of confidence.
      num_costliest: how many of the examples with the largest costs, weight times loss, to keep.

    Returns:
      A `Summary`, which is a pytree: compute it under jit, sum up with `merge`.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxce import diagnostics
      >>> logits, labels = jnp.eye(4), jnp.array([0, 1, 2, 0])
      >>> batches = [diagnostics.summarize(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
      >>> print(diagnostics.finish(diagnostics.merge(*batches)).accuracy)
      0.75

    Note:
      Sums are in the working dtype of the logits, as in `softmax_cross_entropy`.
    """
    logits, labels, weights, ignore_index = checked(logits, targets, weights, ignore_index)
    if top_k is None:
        top_k = (5,) if logits.shape[-1] > 5 else ()
    top_k = tuple(top_k) if np.iterable(top_k) else (top_k,)
    for name, x, least in (
        *(("top_k", k, 1) for k in top_k),
        ("num_bins", num_bins, 1),
        ("num_costliest", num_costliest, 0),
    ):
        checks.count(name, x, least)
    top_k = tuple(sorted({int(k) for k in top_k}))
    record: Summary = _summarize(logits, labels, weights, ignore_index, top_k, int(num_bins), int(num_costliest))
    return record


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _summarize(
    logits: Array,
    labels: Array,
    weights: Array,
    ignore_index: int | None,
    top_k: tuple[int, ...],
    num_bins: int,
    num_costliest: int,
) -> Summary:
    logits, labels, weights = flat(logits, labels, weights)
    made = outcomes(logits, labels, weights, ignore_index)
    num_classes = logits.shape[-1]
    ones = jnp.ones_like(made.nll)
    unknown = jnp.isnan(made.nll)
    right = made.hit == 1  # where it is unknown whether, the loss is NaN and counts as one of the wrong

    def by_class(values: Array, index: Array = made.label) -> Array:
        return sums_by(index, values, num_classes)

    def histogram(chosen: Array) -> Array:
        edges = jnp.asarray(LOSS_EDGES, made.nll.dtype)
        which = jnp.searchsorted(edges, made.nll, side="right")
        counted = made.weighted(jnp.where(chosen & ~unknown, ones, 0))
        return sums_by(which, counted, len(LOSS_EDGES) + 1)

    def hits(k: int) -> Array:
        return made.total(jnp.where(unknown, made.nll, (made.rank < k).astype(ones.dtype)))

    return Summary(
        seen=jnp.asarray(labels.shape[0], jnp.int32),
        examples=jnp.sum(made.used, dtype=jnp.int32),
        weight_squares=made.total(made.weight),
        loss_squares=made.total(jnp.square(made.nll)),
        brier=made.total(made.brier),
        right_loss=made.total(jnp.where(right, made.nll, 0)),
        wrong_loss=made.total(jnp.where(right, 0, made.nll)),
        top_k_hits={k: hits(k) for k in top_k},
        class_examples=by_class(made.used.astype(jnp.int32)),
        class_weight=by_class(made.weighted(ones)),
        class_loss=by_class(made.weighted(made.nll)),
        class_hits=by_class(made.weighted(made.hit)),
        predicted_weight=by_class(made.weighted(ones), made.prediction),
        right_histogram=histogram(right),
        wrong_histogram=histogram(~right),
        probability_rows=jnp.sum(made.used & _like_probabilities(logits), dtype=jnp.int32),
        calibration=binned(made, num_bins),
        unattributed=made.total(jnp.where(made.used & (made.label >= num_classes), jnp.nan, 0)),
        costliest=_costliest(made, num_costliest),
    )


def _like_probabilities(logits: Array) -> Array:
    """Entries from 0 to 1 that sum to 1, to the digits that the input's dtype leaves them."""
    tolerance = max(1e-4, 4 * float(jnp.finfo(logits.dtype).eps))
    inside = jnp.all((logits >= 0) & (logits <= 1), -1)
    return inside & (jnp.abs(jnp.sum(logits.astype(jnp.float32), -1) - 1) <= tolerance)


def _costliest(made: Outcomes, count: int) -> Costliest:
    nothing = jnp.full(count, -1, jnp.int32)
    no_loss = jnp.full(count, -1, made.nll.dtype)  # and not −inf, which `jax_debug_infs` would stop at
    cost = jnp.where(made.used, made.weight * made.nll, -1)
    index = jnp.where(made.used, jnp.arange(cost.shape[0], dtype=jnp.int32), -1)
    found = Costliest(index, made.label, made.prediction, made.nll, cost)
    return Costliest(nothing, nothing, nothing, no_loss, no_loss).merge(found, jnp.asarray(0, jnp.int32))


def merge(a: Summary, b: Summary) -> Summary:
    r"""The record of the examples of `a` followed by those of `b`.

    .. math::
        \Sigma_{a \cup b} = \Sigma_a + \Sigma_b

    Args:
      a: a `Summary`.
      b: another, with the same number of classes, `top_k`, `num_bins` and `num_costliest`.

    Returns:
      A `Summary`. The indices of the costliest examples of `b` go on from the number of examples in `a`.

    Raises:
      ValueError: the two do not have the same shapes, or are several, stacked.

    Example:
      >>> import functools, jax.numpy as jnp
      >>> from jaxce import diagnostics
      >>> batches = [diagnostics.summarize(jnp.eye(3), jnp.array([0, 1, label])) for label in (0, 1, 2)]
      >>> print(diagnostics.finish(functools.reduce(diagnostics.merge, batches)).examples)
      9

    Note:
      Associative, up to the rounding of sums. In a `lax.scan` carry the summary and merge into it. Summaries that were
      stacked, by `jax.vmap`, `lax.map` or `multihost_utils.process_allgather`, are merged one after the other; a
      `psum` would add up the numbers of the costliest examples too.
    """
    for name, summary in ("a", a), ("b", b):
        check_one(name, summary)
    shapes = [jax.tree.map(jnp.shape, s) for s in (a, b)]
    if shapes[0] != shapes[1]:
        hint = "Summarize every batch with the same number of classes, top_k, num_bins and num_costliest."
        checks.fail(ValueError, "b", "a Summary shaped as a", f"{shapes[1]} beside {shapes[0]}", hint)
    both: Summary = _merge(a, b)
    return both


def check_one(name: str, summary: Summary) -> None:
    if shape := jnp.shape(summary.seen):
        each = f"jax.tree.map(lambda x: x[i], {name})"
        hint = f"Merge them: functools.reduce(merge, [{each} for i in range({shape[0]})])."
        checks.fail(ValueError, name, "one Summary", f"several, stacked as {shape}", hint)


@jax.jit
def _merge(a: Summary, b: Summary) -> Summary:
    both: Summary = jax.tree.map(
        lambda x, y: x.merge(y, a.seen) if isinstance(x, Costliest) else jnp.add(x, y),
        a,
        b,
        is_leaf=lambda x: isinstance(x, Costliest),
    )
    wrapped = (a.seen < 0) | (b.seen < 0) | (both.seen < 0)
    return both._replace(seen=jnp.where(wrapped, -1, both.seen))
