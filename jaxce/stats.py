"""What a softmax loss needs to know of a row of logits: one record, and how two of them merge.

The record is a handful of numbers per row. It can be taken from a whole row, from blocks of it, or from the shards
of it on different devices; `merge` joins the records of disjoint classes. Everything in it is relative to the row's
maximum, so a common offset of the logits changes nothing but `max`.

Why `rest` and not Σ exp(z − max): the maximal class adds exactly 1 to that sum, and beside the 1 the digits of
everything else are lost: a confident row would have loss 0 and gradient 0. Without the 1 they are all there, and the
sum is `1 + rest`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce.selection import select
from jaxce.sharding import AxisNames


class Gap(NamedTuple):
    """A weighted distance below the maximum: Σ_c a_c·(max − z_c) and the weights' own sum Σ_c a_c."""

    sum: Array
    mass: Array


class RowStats(NamedTuple):
    """The record of one row (all fields have the batch shape, `picked` has one more axis, K).

    max: largest logit; −inf if the row holds nothing but −inf.
    rest: Σ exp(z − max) without one maximal entry; −1 where max is −inf, so that `1 + rest` is always the sum. For rows
      with one label, it has digits of its own only where the label has the maximum: then the loss needs them.
    picked: the logits at the K target indices; 0 where an index is not among these classes.
    target: the gap under probability targets.
    smoothing: the gap under the uniform (or class-weighted) smoothing distribution.
    spread: Σ exp(z − max)·(max − z), from which the entropy follows.
    argmax: the first class that reaches max.
    outside: the record of the classes that are not among the target indices, whose mass may be tiny beside the row's.
    """

    max: Array
    rest: Array
    picked: Array | None = None
    target: Gap | None = None
    smoothing: Gap | None = None
    spread: Array | None = None
    argmax: Array | None = None
    outside: RowStats | None = None


class Terms(NamedTuple):
    """What the options are composed from, per row; every entry but the first is free of a common offset.

    log_normalizer: logsumexp of the row.
    target: index targets: −log p of each of the K indices, [..., K]; probability targets: −Σ_c t_c log p_c, [...].
    smoothing: −Σ_c v_c log p_c for the smoothing distribution v, or None.
    entropy: −Σ_c p_c log p_c, or None.
    tail: log of the mass of the classes outside the target indices, or None. It has no digits where that is nearly 1.
    """

    log_normalizer: Array
    target: Array
    smoothing: Array | None = None
    entropy: Array | None = None
    tail: Array | None = None


def working_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float64 for float64, float32 for every narrower float."""
    return jnp.dtype(dtype if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def matmul_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """What the factors of a product are cast to, to be summed in its working dtype. bfloat16 holds all of 8 bits."""
    wide = [jnp.bfloat16 if jnp.dtype(d).itemsize == 1 else d for d in dtypes]
    return jnp.promote_types(*wide)


def times(a: Array, x: Array) -> Array:
    """a·x, but 0 where a is 0 and x is not finite. Differentiable in both: where x is finite it is a plain product."""
    a, x = jnp.broadcast_arrays(a, x)
    return a * select((a == 0) & ~jnp.isfinite(x), jnp.zeros_like(x), x)


def tempered(z: Array, temperature: Array, offset: Array | None) -> Array:
    """(z − offset)/temperature, where z is finite; elsewhere it has no derivative in the temperature."""
    z = z if offset is None else z - offset
    finite = jnp.isfinite(z)
    return select(finite, select(finite, z, 0) / temperature, z)


@jax.custom_jvp
def weighted(probs: Array, weights: Array) -> Array:
    """The product, whose derivatives take an infinite cotangent, that of a class of probability 0, times 0 as 0."""
    return probs * jnp.broadcast_to(weights, probs.shape)


@weighted.defjvp
def _weighted_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (a, b), (da, db) = (jnp.broadcast_arrays(*x) for x in (primals, tangents))
    zero = jnp.zeros_like(a)
    return a * b, select(b == 0, zero, b * da) + select(a == 0, zero, a * db)


def finish(stats: RowStats) -> Terms:
    """From the record of a complete row to the terms of its loss. A row without a finite maximum gives NaN."""
    log_sum = jnp.log1p(select(stats.max == -jnp.inf, jnp.nan, stats.rest))

    def surprise(gap: Gap) -> Array:
        return gap.sum + gap.mass * log_sum

    if stats.picked is not None:
        target = (stats.max[..., None] - stats.picked) + log_sum[..., None]
    else:
        assert stats.target is not None  # targets are either indices or probabilities
        target = surprise(stats.target)
    smoothing = None if stats.smoothing is None else surprise(stats.smoothing)
    entropy = None if stats.spread is None else log_sum + stats.spread / (1 + stats.rest)
    tail = None
    if stats.outside is not None:
        # Of no other class its maximum says so, and the sum, −1, has no derivative.
        rest = select(stats.outside.max == -jnp.inf, 0, stats.outside.rest)
        tail = (stats.outside.max - stats.max) + (jnp.log1p(rest) - log_sum)
    return Terms(stats.max + log_sum, target, smoothing, entropy, tail)


def finite(stats: RowStats) -> tuple[RowStats, Array]:
    """The record with 0 for every number of a row without finite maximum, sum and targets; and which rows have them.

    This is what the backward pass is left: an ignored row may hold NaN, and a debugger would stop at it.
    """
    alive = jnp.isfinite(stats.max) & jnp.isfinite(stats.rest)
    if stats.target is not None:
        alive &= jnp.isfinite(stats.target.mass)

    def kept(x: Array) -> Array:
        return select(alive.reshape(alive.shape + (1,) * (x.ndim - alive.ndim)), x, jnp.zeros_like(x))

    return jax.tree.map(kept, stats), alive


def merge(a: RowStats, b: RowStats) -> RowStats:
    """The record of the classes of `a` followed by those of `b` (their `argmax` already counted in the joint row)."""
    # One of both, and not `jnp.maximum`: where they are equal, that has the mean of their derivatives, and `high` is
    # relative to one of them.
    swap = b.max > a.max
    maximum, smaller = select(swap, b.max, a.max), select(swap, a.max, b.max)
    high, low = select(swap, b.rest, a.rest), select(swap, a.rest, b.rest)
    scale = jnp.exp(smaller - shift(maximum))
    merged = RowStats(maximum, high + (1 + low) * scale)
    if a.picked is not None and b.picked is not None:
        merged = merged._replace(picked=a.picked + b.picked)
    if a.target is not None and b.target is not None:
        merged = merged._replace(target=merged_gaps(a.target, a.max, b.target, b.max))
    if a.smoothing is not None and b.smoothing is not None:
        merged = merged._replace(smoothing=merged_gaps(a.smoothing, a.max, b.smoothing, b.max))
    if a.spread is not None and b.spread is not None:
        merged = merged._replace(spread=_rescaled_spread(a.spread, a, maximum) + _rescaled_spread(b.spread, b, maximum))
    if a.argmax is not None and b.argmax is not None:
        merged = merged._replace(argmax=select(swap, b.argmax, a.argmax))
    if a.outside is not None and b.outside is not None:
        merged = merged._replace(outside=merge(a.outside, b.outside))
    return merged


def merge_shards(stats: RowStats, axes: AxisNames) -> RowStats:
    """The record of the joint row of the devices along the mesh axes (`argmax` already counted in the joint row).

    What goes between devices is one maximum and one sum of each of the record's numbers.
    """
    if not axes:
        return stats
    merged = merge_along(stats, lambda x: lax.pmax(lax.stop_gradient(x), axes), lambda tree: lax.psum(tree, axes))
    argmax = None if stats.argmax is None else merge_argmax(stats.max, stats.argmax, axes)
    outside = None if stats.outside is None else merge_shards(stats.outside, axes)
    return merged._replace(argmax=argmax, outside=outside)


def merge_along(
    stats: RowStats,
    largest: Callable[[Array], Array],
    total: Callable[[tuple[RowStats, Array]], tuple[RowStats, Array]],
) -> RowStats:
    """The record of the joint rows, but for `argmax` and `outside`, of parts whose maximum and sums these find."""
    maximum = largest(stats.max)
    # The largest of all is left out as `jaxce.sums` leaves it out of a row, not told apart by being equal to it.
    scale = jnp.exp(stats.max - shift(maximum))
    low, high = low_and_high(scale)
    parts = RowStats(
        max=high,
        rest=scale * stats.rest,
        picked=stats.picked,
        target=None if stats.target is None else _moved(stats.target, stats.max, maximum),
        smoothing=None if stats.smoothing is None else _moved(stats.smoothing, stats.max, maximum),
        spread=None if stats.spread is None else _rescaled_spread(stats.spread, stats, maximum),
    )
    sums, low = total((parts, low))
    return sums._replace(max=maximum, rest=sums.rest + without_largest(low, sums.max))


def low_and_high(e: Array) -> tuple[Array, Array]:
    """Each e = exp(z − max) in two parts: up to 0.6 all of it is low, from 0.75 on all of it is high."""
    low = jnp.minimum(e, jnp.maximum(3 - 4 * e, 0))
    return low, e - low


def without_largest(low: Array, high: Array) -> Array:
    """The sum of e without its largest term, 1, from the sums of both parts; of no term at all it is 0 − 1."""
    return select((low + high >= 0.5) & (low + high < 1.5), low, low + (high - 1))


def merge_argmax(maximum: Array, argmax: Array, axes: AxisNames) -> Array:
    """The first class of the joint row that reaches its maximum, for the maximum and its class on each device."""
    if not axes:
        return argmax
    none = jnp.iinfo(argmax.dtype).max
    maximum = lax.optimization_barrier(lax.stop_gradient(maximum))
    largest = lax.pmax(maximum, axes)
    # A compiler may compute a logit for each of its uses, and round it in another way: then no device has the largest.
    leads = (maximum == largest) | jnp.isnan(maximum)
    near = leads | (maximum > largest - 0.5)
    first, nearby = lax.pmin(tuple(select(those, argmax, none) for those in (leads, near)), axes)
    return select(first == none, nearby, first)


def merged_gaps(a: Gap, a_max: Array, b: Gap, b_max: Array) -> Gap:
    maximum = select(b_max > a_max, b_max, a_max)
    a, b = _moved(a, a_max, maximum), _moved(b, b_max, maximum)
    return Gap(a.sum + b.sum, a.mass + b.mass)


def _moved(gap: Gap, old: Array, new: Array) -> Gap:
    """The gap below another maximum."""
    return gap._replace(sum=gap.sum + times(gap.mass, shift(new) - shift(old)))


def _rescaled_spread(spread: Array, stats: RowStats, maximum: Array) -> Array:
    # Limited to where exp(-down) is 0: times the number of classes, that of a mask of finfo.min would be infinite.
    down = select(stats.max == -jnp.inf, 0, jnp.minimum(maximum - shift(stats.max), 1e4))
    return jnp.exp(-down) * (spread + times(1 + stats.rest, down))


def shift(maximum: Array) -> Array:
    """What to subtract from the logits: the maximum, or 0 in a row of nothing but −inf (−inf − −inf is NaN)."""
    return select(maximum == -jnp.inf, 0, maximum)
