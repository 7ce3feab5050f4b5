"""The record of each token's row, and the gradient from it, a block of the vocabulary at a time.

Nothing outlives a block but numbers per row and the gradients themselves, unless the logits are kept.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce.arguments import Examples, Options, Shared
from jaxce.gradient import factors, gradient
from jaxce.linear.blocks import (
    Schedule,
    gradients,
    logits,
    over_blocks,
    put,
    retiled_classes,
    row_major,
    take,
)
from jaxce.sharding import on_this_device, shard_start, sum_over, vary, varying
from jaxce.stats import Gap, RowStats, Terms, matmul_dtype, merge, merge_shards, working_dtype
from jaxce.sums import effective, row_stats, rows_of


def forward(
    schedule: Schedule,
    options: Options,
    examples: Examples,
    shared: Shared,
    *,
    keep_in: Array | None = None,
    kept: Array | None = None,
) -> tuple[RowStats, Array | None]:
    """The record of every row; and its logits, if they have been kept, or are to be, in an array of enough rows.

    Of the arguments it is given what `jaxce.arguments.of_terms` leaves. With the classes split over devices, all of it
    is of this device's classes, but for the class indices.
    """

    def block(start: Any, size: int, state: tuple[RowStats, Array | None]) -> tuple[RowStats, Array | None]:
        before, all_logits = state
        x, w = _classes(schedule, options, examples, shared, start, size)
        z = _logits(x, w, schedule, start, kept)
        if keep_in is not None:
            all_logits = put(all_logits, z, start, -1)
        stats = row_stats(options, rows_of(options, z, x, w))
        if options.return_aux:
            z = effective(options, z, x.where)
            stats = stats._replace(argmax=jnp.argmax(z, -1).astype(jnp.int32) + jnp.asarray(first + start, jnp.int32))
        return merge(before, stats), all_logits

    V = shared.kernel.shape[schedule.vocab_axis]
    first = shard_start(V, options.axis_name)
    state = no_classes(options, examples, shared), keep_in if kept is None else kept
    state = vary(state, varying(examples, shared))
    stats, all_logits = over_blocks(V, schedule.forward_v, block, state)
    return merge_shards(stats, options.axis_name), all_logits


def backward(
    schedule: Schedule,
    options: Options,
    examples: Examples,
    shared: Shared,
    stats: RowStats,
    alive: Array,
    ct: Terms,
    *,
    kept: Array | None = None,
    sums: Shared | None = None,
) -> tuple[Examples, Shared]:
    """The gradients in the arguments, for cotangents of the terms of each row, whose record is as `finite` leaves it.

    With `sums`, what is shared between tokens is added to them. With `kept` logits, gradients stay in the working
    dtype: the backward pass will scale them before they are rounded.
    """
    rows = tuple(range(examples.hidden.ndim - 1))
    hidden_t = lax.optimization_barrier(jnp.moveaxis(examples.hidden, -1, 0)) if schedule.transposes else None

    def block(start: Any, size: int, grads: tuple[Examples, Shared]) -> tuple[Examples, Shared]:
        x, w = _classes(schedule, options, examples, shared, start, size)
        z = _logits(x, w, schedule, start, kept)
        dz, dprobs, dclass_weights = gradient(options, z, x, w, of_rows)
        dbias = None if w.bias is None else jnp.sum(dz, rows)
        dhidden, dkernel = gradients(dz, x.hidden, w.kernel, schedule, hidden_t)

        def written(whole: Array | None, part: Array | None, axis: int, add: bool = True) -> Array | None:
            if part is None:
                return whole
            if add and sums is not None:
                part = take(whole, start, size, axis) + part.astype(whole.dtype)
            return put(whole, part, start, axis)

        of_examples, of_all = grads
        dprobs = written(of_examples.probs, dprobs, -1, add=False)
        return of_examples._replace(hidden=of_examples.hidden + dhidden, probs=dprobs), of_all._replace(
            kernel=_row_major(written(of_all.kernel, dkernel, schedule.vocab_axis), schedule),
            bias=written(of_all.bias, dbias, 0),
            class_weights=written(of_all.class_weights, dclass_weights, 0),
        )

    # Every block of these is written before it is read; only dhidden is a sum.
    working = working_dtype(matmul_dtype(examples.hidden.dtype, shared.kernel.dtype))

    def own(x: Array) -> jnp.dtype:
        return x.dtype if kept is None else working

    dhidden = jnp.zeros(examples.hidden.shape, working)
    dprobs, by_class = jax.tree.map(lambda x: lax.empty(x.shape, own(x)), (examples.probs, shared))
    by_class = by_class if sums is None else sums
    dhidden, dprobs, by_class = vary((dhidden, dprobs, by_class), varying(examples, shared))
    # Tied to the forward pass, or one of them takes up memory meanwhile: dhidden on chip, or hidden states retiled.
    # And what belongs to whole rows is not computed anew in every block.
    indices = _indices(options, examples, shared, schedule)
    of_rows = factors(options, indices, stats, alive, ct)
    if schedule.retiles:
        hidden, of_rows = lax.optimization_barrier((examples.hidden, of_rows))
        examples = examples._replace(hidden=hidden)
    else:
        dhidden, of_rows = lax.optimization_barrier((dhidden, of_rows))
    grads = Examples(hidden=dhidden, probs=dprobs), by_class
    of_examples, of_all = over_blocks(shared.kernel.shape[schedule.vocab_axis], schedule.backward_v, block, grads)
    # Of hidden states that devices share, each has the gradient from its own classes.
    split = tuple(sorted(varying(of_examples.hidden) - varying(examples.hidden)))
    dhidden = sum_over(of_examples.hidden, split).astype(own(examples.hidden))
    return of_examples._replace(hidden=dhidden), of_all


def no_classes(options: Options, examples: Examples, shared: Shared) -> RowStats:
    """The record of a row of no classes, which changes nothing when merged."""
    dtype = working_dtype(matmul_dtype(examples.hidden.dtype, shared.kernel.dtype))
    zero = jnp.zeros(examples.hidden.shape[:-1], dtype)
    return RowStats(
        max=zero - jnp.inf,
        rest=zero - 1,
        picked=None if examples.indices is None else jnp.zeros(examples.indices.shape, zero.dtype),
        target=None if examples.probs is None else Gap(zero, zero),
        smoothing=Gap(zero, zero) if options.label_smoothing else None,
        spread=zero if options.return_aux else None,
        argmax=jnp.zeros(zero.shape, jnp.int32) if options.return_aux else None,
    )


def _indices(options: Options, examples: Examples, shared: Shared, schedule: Schedule) -> Array | None:
    """Numbers of this device's classes."""
    V = shared.kernel.shape[schedule.vocab_axis]
    return None if examples.indices is None else on_this_device(examples.indices, V, options.axis_name)


def _classes(
    schedule: Schedule, options: Options, examples: Examples, shared: Shared, start: Any, size: int
) -> tuple[Examples, Shared]:
    """What belongs to `size` classes from `start` on, which become classes 0 to size-1."""

    def part(x: Array | None, axis: int) -> Array | None:
        return None if x is None else take(x, start, size, axis)

    kernel = part(shared.kernel, schedule.vocab_axis)
    if schedule.retiles and size < shared.kernel.shape[schedule.vocab_axis]:
        kernel = retiled_classes(shared.kernel, start, size, schedule.vocab_axis)
    indices = _indices(options, examples, shared, schedule)
    examples = examples._replace(
        indices=None if indices is None else indices - start,
        probs=part(examples.probs, -1),
        where=part(examples.where, -1),
    )
    # Both products of a block read it, from on-chip memory if it is brought there first.
    kernel = lax.optimization_barrier(kernel)
    return examples, Shared(kernel, part(shared.bias, 0), part(shared.class_weights, 0))


def _logits(examples: Examples, shared: Shared, schedule: Schedule, start: Any, kept: Array | None) -> Array:
    if kept is not None:
        return take(kept, start, shared.kernel.shape[schedule.vocab_axis], -1)[: len(examples.hidden)]
    return logits(examples.hidden, shared.kernel, shared.bias, schedule)


def _row_major(dkernel: Array, schedule: Schedule) -> Array:
    """dkernel, laid out as it is returned. The TPU compiler prefers the other way round for [D, V], and a copy."""
    return row_major(dkernel) if schedule.vocab_axis else dkernel
