"""The record of each token's row, and the gradient from it, a block of the vocabulary at a time.

Nothing outlives a block but numbers per row and the gradients themselves, unless the logits are kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce.arguments import Examples, Options, Projection, Shared
from jaxce.gradient import factors, gradient
from jaxce.linear.blocks import (
    Schedule,
    gradients,
    logits,
    over_blocks,
    put,
    put_or_add,
    retiled_classes,
    row_major,
    take,
)
from jaxce.sharding import on_this_device, shard_start, sum_like, vary, varying
from jaxce.stats import Gap, RowStats, Terms, matmul_dtype, merge, merge_shards, working_dtype
from jaxce.sums import effective, row_stats, rows_of
from jaxce.versions import empty


def forward(
    schedule: Schedule,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    *,
    keep_in: Array | None = None,
    kept: Array | None = None,
    done: tuple[int, RowStats] | None = None,
) -> tuple[RowStats, Array | None]:
    """The record of every row; and its logits, if they have been kept, or are to be, in an array of enough rows.

    done: how many classes need no block, and their record.

    Of the arguments it is given what `jaxce.arguments.of_terms` leaves. With the classes split over devices, all of it
    is of this device's classes, but for the class indices.
    """

    def block(start: Any, size: int, state: tuple[RowStats, Array | None]) -> tuple[RowStats, Array | None]:
        before, all_logits = state
        part, x, w = _classes(schedule, options, projection, examples, shared, start, size)
        z = _logits(part, schedule, start, kept)
        if keep_in is not None and all_logits is not None:
            all_logits = put(all_logits, z, start, -1)
        rows = rows_of(options, z, x, w)
        stats = row_stats(options, rows)
        if options.return_aux:
            z = effective(options, rows)
            stats = stats._replace(argmax=jnp.argmax(z, -1).astype(jnp.int32) + jnp.asarray(first + start, jnp.int32))
        return merge(before, stats), all_logits

    V = projection.kernel.shape[schedule.vocab_axis]
    first = shard_start(V, options.axis_name)
    begin, before = done or (0, no_classes(options, projection, examples))
    state = vary((before, keep_in if kept is None else kept), varying(projection, examples, shared))
    stats, all_logits = over_blocks(V, schedule.forward_v, block, state, begin)
    return merge_shards(stats, options.axis_name), all_logits


Gradients = tuple[Projection, Examples, Shared]


def backward(
    schedule: Schedule,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    stats: RowStats,
    alive: Array,
    ct: Terms,
    *,
    kept: Array | None = None,
    sums: tuple[Array, Array | None, Array | None] | None = None,
    done: tuple[int, Gradients] | None = None,
) -> Gradients:
    """The gradients in the arguments, for cotangents of the terms of each row, whose record is as `finite` leaves it.

    With `sums`, of kernel, bias and class weights, which tokens share, theirs are added to them. With `kept` logits,
    gradients stay in the working dtype: the backward pass will scale them before they are rounded.

    done: how many classes need no block, and the gradients from them.
    """
    given, kernel, bias = projection
    hidden, rows = given, tuple(range(given.ndim - 1))
    hidden_t = lax.optimization_barrier(jnp.moveaxis(hidden, -1, 0)) if schedule.transposes else None

    def block(start: Any, size: int, grads: Gradients) -> Gradients:
        part, x, w = _classes(schedule, options, projection, examples, shared, start, size)
        z = _logits(part, schedule, start, kept)
        dz, dexamples, dshared = gradient(options, z, x, w, of_rows)
        dhidden, dkernel = gradients(dz, part.hidden, part.kernel, schedule, hidden_t)

        def written(whole: Array, part: Array, axis: int) -> Array:
            return put_or_add(whole, part, start, axis, add=sums is not None)

        (of_hidden, of_kernel, of_bias), of_examples, of_shared = grads
        of_kernel = _row_major(written(of_kernel, dkernel, schedule.vocab_axis), schedule)
        if of_bias is not None:
            of_bias = written(of_bias, jnp.sum(dz, rows), 0)
        if of_examples.probs is not None and dexamples.probs is not None:
            of_examples = of_examples._replace(probs=put(of_examples.probs, dexamples.probs, start, -1))
        if of_examples.temperature is not None and dexamples.temperature is not None:
            of_examples = of_examples._replace(temperature=of_examples.temperature + dexamples.temperature)
        if of_shared.class_weights is not None and dshared.class_weights is not None:
            of_shared = Shared(written(of_shared.class_weights, dshared.class_weights, 0))
        return Projection(of_hidden + dhidden, of_kernel, of_bias), of_examples, of_shared

    # Every block of these is written before it is read; only those of hidden states and temperature are sums.
    working = working_dtype(matmul_dtype(hidden.dtype, kernel.dtype))

    def own(x: Array) -> DTypeLike:
        return x.dtype if kept is None else working

    dhidden = jnp.zeros(hidden.shape, working)
    dtemperature = None if examples.temperature is None else jnp.zeros_like(examples.temperature)
    dprobs, by_class = jax.tree.map(
        lambda x: empty(x.shape, own(x)), (examples.probs, (kernel, bias, shared.class_weights))
    )
    by_class = by_class if sums is None else sums
    every = varying(projection, examples, shared)
    dhidden, dtemperature, dprobs, by_class = vary((dhidden, dtemperature, dprobs, by_class), every)
    # Tied to the forward pass, or one of them takes up memory meanwhile: dhidden on chip, or hidden states retiled.
    # And what belongs to whole rows is not computed anew in every block.
    of_rows = factors(_indices(options, projection, examples, schedule), stats, alive, ct)
    if schedule.retiles:
        hidden, of_rows = lax.optimization_barrier((hidden, of_rows))
        projection = projection._replace(hidden=hidden)
    else:
        dhidden, of_rows = lax.optimization_barrier((dhidden, of_rows))
    grads: Gradients = (
        Projection(dhidden, by_class[0], by_class[1]),
        Examples(probs=dprobs, temperature=dtemperature),
        Shared(by_class[2]),
    )
    begin, grads = done or (0, grads)
    V = kernel.shape[schedule.vocab_axis]
    of_all, of_examples, of_shared = over_blocks(V, schedule.backward_v, block, grads, begin)

    def whole(dx: Array, x: Array) -> Array:
        return sum_like(dx, x).astype(own(x))

    if of_examples.temperature is not None and examples.temperature is not None:
        of_examples = of_examples._replace(temperature=whole(of_examples.temperature, examples.temperature))
    return of_all._replace(hidden=whole(of_all.hidden, given)), of_examples, of_shared


def no_classes(options: Options, projection: Projection, examples: Examples) -> RowStats:
    """The record of a row of no classes, which changes nothing when merged."""
    hidden, kernel, _ = projection
    zero = jnp.zeros(hidden.shape[:-1], working_dtype(matmul_dtype(hidden.dtype, kernel.dtype)))
    return RowStats(
        max=zero - jnp.inf,
        rest=zero - 1,
        outside=RowStats(zero - jnp.inf, zero - 1) if options.tail else None,
        picked=None if examples.indices is None else jnp.zeros(examples.indices.shape, zero.dtype),
        target=None if examples.probs is None else Gap(zero, zero),
        smoothing=Gap(zero, zero) if options.label_smoothing else None,
        spread=zero if options.return_aux else None,
        argmax=jnp.zeros(zero.shape, jnp.int32) if options.return_aux else None,
    )


def _indices(options: Options, projection: Projection, examples: Examples, schedule: Schedule) -> Array | None:
    """Numbers of this device's classes."""
    V = projection.kernel.shape[schedule.vocab_axis]
    return None if examples.indices is None else on_this_device(examples.indices, V, options.axis_name)


def _classes(
    schedule: Schedule,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    start: Any,
    size: int,
) -> tuple[Projection, Examples, Shared]:
    """What belongs to `size` classes from `start` on, which become classes 0 to size-1."""

    def part(x: Array | None, axis: int) -> Array | None:
        return None if x is None else take(x, start, size, axis, schedule)

    hidden, whole, bias = projection
    if schedule.retiles and size < whole.shape[schedule.vocab_axis]:
        kernel = retiled_classes(whole, start, size, schedule.vocab_axis)
    else:
        kernel = take(whole, start, size, schedule.vocab_axis, schedule)
    indices = _indices(options, projection, examples, schedule)
    examples = examples._replace(
        indices=None if indices is None else indices - start,
        probs=part(examples.probs, -1),
        where=part(examples.where, -1),
    )
    # Both products of a block read it, from on-chip memory if it is brought there first.
    kernel = lax.optimization_barrier(kernel)
    return Projection(hidden, kernel, part(bias, 0)), examples, Shared(part(shared.class_weights, 0))


def _logits(projection: Projection, schedule: Schedule, start: Any, kept: Array | None) -> Array:
    hidden, kernel, bias = projection
    if kept is not None:
        return take(kept, start, kernel.shape[schedule.vocab_axis], -1)[: len(hidden)]
    return logits(hidden, kernel, bias, schedule)


def _row_major(dkernel: Array, schedule: Schedule) -> Array:
    """dkernel, laid out as it is returned. The TPU compiler prefers the other way round for [D, V], and a copy."""
    return row_major(dkernel) if schedule.vocab_axis else dkernel
