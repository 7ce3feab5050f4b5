"""The record of a row, from its logits: the sums, exact, and in the form that each platform's compiler does fast.

**One class left out.** The plain sum of e_j = exp(z_j − max) holds the 1 of the maximum, beside which small terms lose
their digits: a confident row would have loss 0 and gradient 0. For a label, it is the sum of all the other classes that
matters, and its class is left out by its number:

    rest = Σ_{j≠y} e_j + expm1(z_y − max)

is exact where the label has the maximum; elsewhere the loss is not small, and needs no more than ε of the whole sum.

**The maximum left out.** Other targets may have several classes, and the entropy all of them. No term is told apart by
being equal to the maximum: a compiler that computes the logits anew for each pass may round them differently. So the
terms are summed in two parts, low = min(e, max(3 − 4e, 0)) and high = e − low: up to e = 0.6 all of a term is low,
from 0.75 on all of it is high. If both together are below 1.5 then the maximum is the only high term and Σ low is
`rest`; otherwise it is Σ low + (Σ high − 1), and Σ high − 1 is 0 or no smaller than what it could be off.

**On CPU** XLA is fast where it adds up what is in memory, or a plain expression of it, through a library kernel, and
slow where it has to select what it adds up. So the classes of a row are added up in groups, of which all but that of
the class left out are plain. Elsewhere the exponentials are written to memory, and the one at the label is set to 0
there; in chunks of rows that stay in the cache that costs hardly anything. If a gradient is wanted and will be as large
as they are, they are written where the gradient will be: it is computed from them in place. Chunks would be gathered on
one device if the rows are on several, which is known when a program is lowered: then it is the form of the other
platforms.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce.arguments import Examples, Options, Shared
from jaxce.lookup import compared, gathered, is_class, pick, put, scattered
from jaxce.on_cpu import on_one_cpu, slice_of
from jaxce.selection import select
from jaxce.sharding import explicitly_sharded, mask_like, taking_part
from jaxce.stats import (
    Gap,
    RowStats,
    low_and_high,
    shift,
    tempered,
    times,
    weighted,
    without_largest,
    working_dtype,
)
from jaxce.versions import BFLOAT16_ON_CPU

# Numbers in a chunk, 4 MB of float32. The loss of 256 x 32768 takes 1.5 times as long in chunks of 16 MB, 3 times as
# long in one piece, and no less in chunks of 1 MB.
_CHUNK = 2**20
# Rows of up to so many classes are added up by a product with a vector of ones, 1.3 times as fast with 10 classes. It
# adds one number after the other, so that longer ones lose their last digits (6 ε with 1000 classes, 47 ε with 50257).
_SHORT = 128
# In rows of up to so many the label is found by comparing class numbers, in longer ones by its address, which takes
# 0.85 of the time with 100 classes. But where logits are widened meanwhile, addresses pay beyond `_SHORT` only.
_COMPARED = 32
# Of no more numbers than this the plain sum is as fast, and a program with it compiles 20 ms sooner.
_FEW = 2**14
# The most classes in a group: with 4096 of them the loss of 256 x 32768 takes 1.2 times as long as with 256.
_GROUP = 2048
# In longer rows than this the library kernel does not apply, and sums take ten times as long.
_KERNEL = 32768


class Rows(NamedTuple):
    """Rows of logits `[..., V]`, of all classes or of some, and what else is needed for their terms.

    indices: `[..., K]`, perhaps not among these classes. In the sums, the class to leave out, `[..., 1]`; None: one
      that has the maximum.
    probs: `[..., V]`, times the class weights.
    smoothing_weights: the class weights, for smoothing.
    temperature, offset: `[..., 1]`, of `jaxce.arguments.Examples`.
    """

    logits: Array
    indices: Array | None = None
    probs: Array | None = None
    smoothing_weights: Array | None = None
    where: Array | None = None
    temperature: Array | None = None
    offset: Array | None = None


class _Sums(NamedTuple):
    """The record, with `picked` the logit that is left out; and the sum of the gap of uniform smoothing."""

    stats: RowStats
    uniform: Array | None = None


def rows_of(options: Options, logits: Array, examples: Examples, shared: Shared) -> Rows:
    """The rows of logits, with class weights where they come in: at probability targets, and by smoothing."""
    weights, probs = shared.class_weights, examples.probs
    if probs is not None and weights is not None:
        probs = weighted(probs.astype(weights.dtype), weights)
    temperature, offset = (None if x is None else x[..., None] for x in (examples.temperature, examples.offset))
    weights = weights if options.label_smoothing else None
    return Rows(logits, examples.indices, probs, weights, examples.where, temperature, offset)


def row_stats(options: Options, rows: Rows, keep: bool = False) -> RowStats:
    """The record of rows, whose logits are capped and masked by `where` first.

    keep: `exponentials_for_gradient` will be called for the same logits.
    """
    label, weights = left_out(options, rows.indices), rows.smoothing_weights
    if weights is not None:
        weights = weights.reshape((1,) * (rows.logits.ndim - 1) + weights.shape)
    stats, uniform = _sums(options, keep, rows._replace(indices=label, smoothing_weights=weights))
    if uniform is not None:
        stats = stats._replace(smoothing=Gap(uniform, jnp.full_like(uniform, rows.logits.shape[-1])))
    if options.tail and rows.indices is not None:
        z = effective(options, rows)
        others = Rows(put(z, rows.indices, jnp.full(rows.indices.shape, -jnp.inf, z.dtype)))
        stats = stats._replace(outside=_sums(Options(axis_name=options.axis_name), False, others)[0])
    if stats.picked is not None:
        return stats._replace(picked=stats.picked[..., None])
    if rows.indices is None:
        return stats
    z = effective(options, rows)
    return stats._replace(picked=pick(z, rows.indices).astype(stats.max.dtype))


def left_out(options: Options, indices: Array | None) -> Array | None:
    """The class that the sums of each row leave out by its number, `[..., 1]`; None if it is one with the maximum."""
    return None if indices is None or indices.shape[-1] > 1 or options.return_aux else indices


def effective(options: Options, rows: Rows) -> Array:
    """The logits that the softmax sees: capped, divided, then masked. Without any of it they keep their dtype.

    But for those of 8 bits, most of which have no −inf.
    """
    z = rows.logits if rows.logits.dtype.itemsize > 1 else rows.logits.astype(working_dtype(rows.logits.dtype))
    if options.logit_softcap is not None:
        z = taking_part(rows.where, z.astype(working_dtype(z.dtype)))  # at NaN a tanh has no derivative
        z = options.logit_softcap * jnp.tanh(z / options.logit_softcap)
    if rows.temperature is not None:
        z = tempered(z.astype(working_dtype(z.dtype)), rows.temperature, rows.offset)
    return z if rows.where is None else select(mask_like(rows.where, z), z, -jnp.inf)


def smoothing_distribution(like: Array, dtype: DTypeLike, weights: Array | None, where: Array | None) -> Array:
    """The (unnormalised) weight that smoothing gives each class, shaped and sharded as `like`.

    Under `jax.vmap` over class weights alone these have a batch that `like` has not: then it has theirs.
    """
    v = jnp.ones_like(like, dtype)
    if weights is not None:
        v = v * jnp.broadcast_to(weights, jnp.broadcast_shapes(weights.shape, like.shape))
    return v if where is None else v * where.astype(dtype)


@jax.custom_jvp
def exponentials(logits: Array, maximum: Array) -> Array:
    """exp(z − max) in the working dtype: the expression of the forward pass, so that a compiler can share it."""
    return jnp.exp(logits.astype(maximum.dtype) - shift(maximum)[..., None])


# What is not finite has no derivative: it must not turn a zero cotangent into NaN on the way back.


@exponentials.defjvp
def _exponentials_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    e = exponentials(*primals)
    return e, select(jnp.isfinite(e), e, 0) * (tangents[0].astype(e.dtype) - tangents[1][..., None])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def exponentials_for_gradient(options: Options, again: bool, rows: Rows, maximum: Array) -> Array:
    """exp(z − max) in the working dtype, but 0 where that is NaN, and anything at the class that is left out.

    again: the maximum is that of these logits, and `row_stats` was to keep them. On CPU it is the very expression of
    the forward pass then, which the compiler finds in memory if it compiles both.
    """

    def own(like: Array, operands: tuple[Rows, Array]) -> Array:
        rows, _ = operands
        if not _keeps(options, rows):
            return elsewhere(like, operands)
        e = _written_exponentials(options, _flat(rows, like.shape[:-1]))[2]
        return select(e >= 0, e, 0).reshape(like.shape)

    def elsewhere(like: Array, operands: tuple[Rows, Array]) -> Array:
        rows, maximum = operands
        z = effective(options, rows)
        # Not a select by rows, which takes three times as long on CPU.
        e = select(z.astype(maximum.dtype) - maximum[..., None] < 1, exponentials(z, maximum), 0)
        return jnp.broadcast_to(e, like.shape)

    like = rows.logits.astype(maximum.dtype)
    if not again or explicitly_sharded(rows.logits):
        return elsewhere(like, (rows, maximum))
    return on_one_cpu(own, elsewhere, like, (rows, maximum))


@exponentials_for_gradient.defjvp
def _exponentials_for_gradient_jvp(
    options: Options, again: bool, primals: tuple[Rows, Array], tangents: tuple[Rows, Array]
) -> tuple[Array, Array]:
    rows, maximum = primals
    e = exponentials_for_gradient(options, again, rows, maximum)
    dz = jax.jvp(functools.partial(effective, options), (rows,), (tangents[0],))[1]
    return e, e * (dz.astype(e.dtype) - tangents[1][..., None])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sums(options: Options, keep: bool, rows: Rows) -> _Sums:
    if explicitly_sharded(rows.logits):
        return _fused(options, rows)
    like = rows.logits[..., 0].astype(working_dtype(rows.logits.dtype))
    alike = _smooths_alike(options, rows)
    stats = RowStats(
        max=like,
        rest=like,
        picked=None if rows.indices is None else like,
        target=None if rows.probs is None else Gap(like, like),
        smoothing=Gap(like, like) if options.label_smoothing and not alike else None,
        spread=like if options.return_aux else None,
    )

    def elsewhere(likes: _Sums, rows: Rows) -> _Sums:
        sums: _Sums = jax.tree.map(lambda like, x: jnp.broadcast_to(x, like.shape), likes, _fused(options, rows))
        return sums

    likes = _Sums(stats, like if alike else None)
    return on_one_cpu(functools.partial(_on_cpu, options, keep), elsewhere, likes, rows)


def _smooths_alike(options: Options, rows: Rows) -> bool:
    return options.label_smoothing and rows.smoothing_weights is None and rows.where is None


@_sums.defjvp
def _sums_jvp(options: Options, keep: bool, primals: tuple[Rows], tangents: tuple[Rows]) -> tuple[_Sums, _Sums]:
    sums = _sums(options, keep, *primals)

    def plainly(rows: Rows) -> _Sums:
        z = effective(options, rows)
        maximum = lax.stop_gradient(sums.stats.max)
        if not options.axis_name:
            # `max` only fixes where the other numbers are measured from, so anything may stand for its derivative. With
            # that of the largest logit, the derivative of `rest` is as free of the largest class as `rest` is.
            largest = pick(z, jnp.argmax(z, -1, keepdims=True))[..., 0].astype(maximum.dtype)
            largest = select(jnp.isfinite(largest), largest, 0)
            maximum = maximum + (largest - lax.stop_gradient(largest))
        return _record(options, rows, z, maximum, jnp.sum(exponentials(z, maximum), -1), jnp.sum)

    return sums, jax.jvp(plainly, primals, tangents)[1]


def _record(
    options: Options,
    rows: Rows,
    z: Array,
    maximum: Array,
    rest: Array,
    add: Any,
    take: Any = pick,
    product: Any = times,
) -> _Sums:
    """The other sums of rows with effective logits `z`.

    `add` sums up the last axis; `take` is a form of `pick`, and `product` one of `times`.
    """

    def below() -> Array:
        """max − z: not negative, and inf at −inf."""
        return shift(maximum)[..., None] - z.astype(maximum.dtype)

    def gap(weights: Array) -> Gap:
        weights = weights.astype(maximum.dtype)
        total = add(product(weights, below()), -1)
        return Gap(total, jnp.broadcast_to(add(weights, -1), total.shape))  # one row of them may be for all

    target = smoothing = spread = uniform = None
    if rows.probs is not None:
        target = gap(rows.probs)
    if _smooths_alike(options, rows):
        uniform = add(below(), -1)
    elif options.label_smoothing:
        smoothing = gap(smoothing_distribution(z, maximum.dtype, rows.smoothing_weights, rows.where))
    if options.return_aux:
        # exp(−inf)·inf must count as 0: with a finite stand-in for the distance it does.
        distance = jnp.minimum(below(), jnp.finfo(maximum.dtype).max)
        spread = add(jnp.exp(-distance) * distance, -1)
    picked = None if rows.indices is None else take(z, rows.indices)[..., 0].astype(maximum.dtype)
    return _Sums(RowStats(maximum, rest, picked, target, smoothing, spread), uniform)


def _fused(options: Options, rows: Rows) -> _Sums:
    """For compilers that fuse: passes over the logits, the first of which finds the maximum and the label's logit."""
    z = effective(options, rows)
    if rows.indices is None:
        maximum = jnp.max(z, -1).astype(working_dtype(z.dtype))
        rest = _without_maximum(exponentials(z, maximum), jnp.sum)
    else:
        z_label = _label_or_nothing(z, rows.indices, compared)
        others = select(is_class(z, rows.indices[..., 0]), -jnp.inf, z)
        maximum = jnp.maximum(jnp.max(others, -1).astype(z_label.dtype), z_label)
        rest = jnp.sum(exponentials(others, maximum), -1) + jnp.expm1(z_label - shift(maximum))
    return _record(options, rows, z, maximum, rest, jnp.sum, compared)


def _label_or_nothing(z: Array, label: Array, take: Any) -> Array:
    """The label's logit in the working dtype; −inf if it is not one of these classes."""
    present = ((label >= 0) & (label < z.shape[-1]))[..., 0]
    return select(present, take(z, label)[..., 0].astype(working_dtype(z.dtype)), -jnp.inf)


def _without_maximum(e: Array, add: Any) -> Array:
    """`rest`."""
    low, high = (add(part, -1) for part in low_and_high(e))
    return without_largest(low, high)


# --- on CPU ---------------------------------------------------------------------------------------------------------


def _on_cpu(options: Options, keep: bool, likes: _Sums, rows: Rows) -> _Sums:
    like = likes.stats.max
    rows = _flat(rows, like.shape)
    N, V = rows.logits.shape

    def step(i: Array, sums: _Sums) -> _Sums:
        start = jnp.minimum(i * size, N - size)  # the last rows may be worked on twice
        part: Rows = jax.tree.map(lambda x: x if len(x) == 1 else slice_of(x, start, size, 0), rows)
        new = _of_chunk(options, part)
        changed: _Sums = jax.tree.map(lambda old, new: lax.dynamic_update_slice_in_dim(old, new, start, 0), sums, new)
        return changed

    if keep and _keeps(options, rows):
        sums = _of_chunk(options, rows)
    elif (group := _group(options, keep, rows)) is not None:
        sums = _in_groups(options, rows, group)
    elif _is_small(rows.logits) or not isinstance(N, int):
        sums = _of_chunk(options, rows)
    else:
        chunks = -(-N // max(_CHUNK // V, 1))
        size = -(-N // chunks)
        sums = lax.fori_loop(0, chunks, step, jax.tree.map(lambda x: x.reshape(N), likes))
    shaped: _Sums = jax.tree.map(lambda x: x.reshape(like.shape), sums)
    return shaped


def _flat(rows: Rows, batch: tuple[int, ...]) -> Rows:
    """The same with one leading axis. What is the same for all rows keeps a single row, but for the first two."""

    def own(x: Array) -> Array:
        return jnp.broadcast_to(x, (*batch, x.shape[-1])).reshape(math.prod(batch), x.shape[-1])

    def shared(x: Array) -> Array:
        return x.reshape(1, x.shape[-1]) if all(n == 1 for n in x.shape[:-1]) else own(x)

    flat: Rows = jax.tree.map(shared, rows)
    return flat._replace(logits=own(rows.logits), indices=None if rows.indices is None else own(rows.indices))


def _group(options: Options, keep: bool, rows: Rows) -> int | None:
    """The classes of a group, about as many as there are groups; None if rows are better not divided, or cannot be."""
    dtype, V = rows.logits.dtype, rows.logits.shape[-1]
    changed = (options.logit_softcap, rows.temperature, rows.where, rows.smoothing_weights)
    if any(x is not None for x in changed) or options.return_aux or V <= _SHORT:
        return None
    if dtype != jnp.float32 and not (BFLOAT16_ON_CPU and dtype == jnp.bfloat16 and rows.indices is not None):
        return None
    if dtype == jnp.bfloat16 and options.label_smoothing and keep:  # or they would be widened for both passes at once
        return None
    if V > _KERNEL and (options.label_smoothing or rows.probs is not None):
        return None
    return next((n for n in range(math.isqrt(V - 1) + 1, min(V // 2, _GROUP) + 1) if V % n == 0), None)


def _in_groups(options: Options, rows: Rows, size: int) -> _Sums:
    """Each group of classes is added up by itself, by the library; and that of the class left out once more."""
    z, label = rows.logits, rows.indices
    # Behind a barrier, or XLA widens narrow logits in rows, and has no kernel for what follows.
    groups = lax.optimization_barrier(z.reshape(*z.shape[:-1], z.shape[-1] // size, size))
    if label is None:
        largest = jnp.max(groups, -1)
        maximum, own = jnp.max(largest, -1), jnp.argmax(largest, -1, keepdims=True)
    else:
        maximum, own = jnp.max(z, -1), label // size
    maximum = maximum.astype(working_dtype(z.dtype))
    whole = put(jnp.sum(exponentials(groups, maximum[:, None]), -1), own, jnp.zeros_like(maximum[:, None]))
    inside = (own >= 0) & (own < groups.shape[1])
    group = jnp.take_along_axis(groups, select(inside, own, 0)[..., None], 1, mode="promise_in_bounds")[:, 0]
    others = exponentials(group, maximum)
    if label is None:
        rest = _without_maximum(lax.optimization_barrier(others), jnp.sum)
    else:
        others = put(others, label % size, jnp.zeros_like(maximum[:, None]))
        rest = jnp.sum(select(inside, others, 0), -1)
        rest = rest + _label_less_1(_label_or_nothing(z, label, gathered), maximum)
    return _record(options, rows, z, maximum, jnp.sum(whole, -1) + rest, jnp.sum, gathered, _times_without_select)


def _times_without_select(a: Array, x: Array) -> Array:
    """`times`, of operations that the library has: where a is 0, x is limited to 0; elsewhere, to more than any number.

    |a| is at least 2**-126. The limit is a·2**254, in two steps that must not be made one: 2**254 is no float32.
    """
    large = lax.optimization_barrier(jnp.asarray(2.0**127, a.dtype))
    return a * jnp.minimum(x, jnp.abs(a) * large * large)


def _of_chunk(options: Options, rows: Rows) -> _Sums:
    def add(x: Array, axis: int) -> Array:
        if x.shape[axis] <= _SHORT and _is_small(x) and x.size > _FEW:
            return jnp.matmul(lax.optimization_barrier(x), jnp.ones(x.shape[axis], x.dtype), precision="highest")
        return jnp.sum(x, axis)

    z, maximum, e = _written_exponentials(options, rows)
    if rows.indices is None:
        rest = _without_maximum(e, add)
    else:
        z_label = _label_or_nothing(z, rows.indices, gathered)
        rest = add(e, -1) + _label_less_1(z_label, maximum)
    return _record(options, rows, z, maximum, rest, add, gathered)


def _written_exponentials(options: Options, rows: Rows) -> tuple[Array, Array, Array]:
    """Effective logits, their maximum, and exp(z − max) in memory, 0 at the class that is left out."""
    z = effective(options, rows)
    if z is not rows.logits:  # or each sum would cap them anew, and might round them differently
        z = lax.optimization_barrier(z)
    maximum = jnp.max(z, -1).astype(working_dtype(z.dtype))
    e = exponentials(z, maximum)
    if rows.indices is not None:
        compare = z.shape[-1] <= (_COMPARED if z.dtype == e.dtype else _SHORT)
        e = (put if compare else scattered)(e, rows.indices, jnp.zeros_like(e[..., :1]))
    return z, maximum, lax.optimization_barrier(e)


def _label_less_1(z_label: Array, maximum: Array) -> Array:
    """exp(z_y − max) − 1, which compiles sooner than expm1.

    It is as good: exp(0) is 1 on CPU, and where the label is not the largest, the sum it goes to has a 1 in it.
    """
    return jnp.exp(z_label - shift(maximum)) - 1


def _is_small(x: Array) -> bool:
    """Whether it is no more than a chunk; false if its size is a symbol, as in a program that is exported."""
    return isinstance(x.size, int) and x.size <= _CHUNK


def _keeps(options: Options, rows: Rows) -> bool:
    """Whether the backward pass should find the exponentials of the forward pass in memory, rather than compute them.

    The gradient of a label's loss is made of them in place, where it is of their dtype. Elsewhere they would take
    memory of their own, and more time, beyond what the cache holds.
    """
    z = rows.logits
    in_place = rows.indices is not None and not options.label_smoothing and z.dtype == working_dtype(z.dtype)
    return in_place or _is_small(z)
