"""The record of each token's row, and the gradient from it, a block of the vocabulary at a time.

Nothing outlives a block but numbers per row and the gradients themselves, unless the logits are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxce.gradient import Row, factors, gradient
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
from jaxce.sharding import shard_start, sum_over, vary, varying
from jaxce.stats import (
    Gap,
    RowStats,
    Spec,
    Terms,
    matmul_dtype,
    merge,
    merge_shards,
    times,
    weighted,
    working_dtype,
)
from jaxce.sums import effective, row_stats


class Inputs(NamedTuple):
    """What the terms of the rows depend on; all but `hidden` and `indices` have a class axis.

    `target_weights` and `smoothing_weights` are the class weights of probability targets and of smoothing. With the
    classes split over devices, all of it is of this device's classes, numbered from 0.
    """

    hidden: Array
    kernel: Array
    bias: Array | None = None
    indices: Array | None = None
    probs: Array | None = None
    target_weights: Array | None = None
    smoothing_weights: Array | None = None
    where: Array | None = None


_SHARED = ("kernel", "bias", "target_weights", "smoothing_weights")


def forward(
    schedule: Schedule,
    spec: Spec,
    inputs: Inputs,
    *,
    keep_in: Array | None = None,
    kept: Array | None = None,
) -> tuple[RowStats, Array | None]:
    """The record of every row; and its logits, if they have been kept, or are to be, in an array of enough rows."""

    def block(start: Any, size: int, state: tuple[RowStats, Array | None]) -> tuple[RowStats, Array | None]:
        before, all_logits = state
        x = _classes(inputs, schedule, start, size)
        z = _logits(x, schedule, start, kept)
        if keep_in is not None:
            all_logits = put(all_logits, z, start, -1)
        stats = row_stats(z, spec, x.indices, _weighted(x), x.smoothing_weights, x.where)
        if spec.entropy:
            z = effective(spec, z, x.where)
            stats = stats._replace(argmax=jnp.argmax(z, -1).astype(jnp.int32) + jnp.asarray(first + start, jnp.int32))
        return merge(before, stats), all_logits

    V = inputs.kernel.shape[schedule.vocab_axis]
    first = shard_start(V, spec.axis_name)
    state = vary((no_classes(spec, inputs), keep_in if kept is None else kept), varying(inputs))
    stats, all_logits = over_blocks(V, schedule.forward_v, block, state)
    return merge_shards(stats, spec.axis_name), all_logits


def backward(
    schedule: Schedule,
    spec: Spec,
    inputs: Inputs,
    stats: RowStats,
    alive: Array,
    ct: Terms,
    *,
    kept: Array | None = None,
    sums: Inputs | None = None,
) -> Inputs:
    """The gradients in the inputs, for the cotangents of the terms of each row, whose record is as `finite` leaves it.

    With `sums`, what is shared between tokens is added to them. With `kept` logits, gradients stay in the working
    dtype: the backward pass will scale them before they are rounded.
    """
    rows = tuple(range(inputs.hidden.ndim - 1))
    hidden_t = lax.optimization_barrier(jnp.moveaxis(inputs.hidden, -1, 0)) if schedule.transposes else None

    def block(start: Any, size: int, grads: Inputs) -> Inputs:
        x = _classes(inputs, schedule, start, size)
        z = _logits(x, schedule, start, kept)
        row = Row(z, x.indices, _weighted(x), x.smoothing_weights, x.where)
        dz, dprobs, dsmoothing_weights = gradient(spec, row, of_rows)
        dbias = dtarget_weights = None
        if x.bias is not None:
            dbias = jnp.sum(dz, rows)
        if x.target_weights is not None:
            dtarget_weights = jnp.sum(times(x.probs.astype(dprobs.dtype), dprobs), rows)
            dprobs = times(x.target_weights, dprobs)
        dhidden, dkernel = gradients(dz, x.hidden, x.kernel, schedule, hidden_t)
        parts = Inputs(None, dkernel, dbias, None, dprobs, dtarget_weights, dsmoothing_weights)
        written = {"hidden": grads.hidden + dhidden}
        for name, axis in zip(Inputs._fields, _class_axes(schedule), strict=True):
            whole, part = getattr(grads, name), getattr(parts, name)
            if part is not None:
                if sums is not None and name in _SHARED:
                    part = take(whole, start, size, axis) + part.astype(whole.dtype)
                written[name] = put(whole, part, start, axis)
        return grads._replace(**written | {"kernel": _row_major(written["kernel"], schedule)})

    # Every block of these is written before it is read; only dhidden is a sum.
    working = working_dtype(matmul_dtype(inputs.hidden.dtype, inputs.kernel.dtype))

    def own(x: Array) -> jnp.dtype:
        return x.dtype if kept is None else working

    grads = Inputs(*(None if x is None else lax.empty(x.shape, own(x)) for x in inputs))
    if sums is not None:
        grads = grads._replace(**{name: getattr(sums, name) for name in _SHARED})
    dhidden = jnp.zeros(inputs.hidden.shape, working)
    grads, dhidden = vary((grads, dhidden), varying(inputs))
    # Tied to the forward pass, or one of them takes up memory meanwhile: dhidden on chip, or hidden states retiled.
    # And what belongs to whole rows is not computed anew in every block.
    of_rows = factors(spec, inputs.indices, stats, alive, ct)
    if schedule.retiles:
        hidden, of_rows = lax.optimization_barrier((inputs.hidden, of_rows))
        inputs = inputs._replace(hidden=hidden)
    else:
        dhidden, of_rows = lax.optimization_barrier((dhidden, of_rows))
    grads = grads._replace(hidden=dhidden, indices=None, where=None)
    grads = over_blocks(inputs.kernel.shape[schedule.vocab_axis], schedule.backward_v, block, grads)
    # Of hidden states that devices share, each has the gradient from its own classes.
    dhidden = sum_over(grads.hidden, tuple(sorted(varying(grads.hidden) - varying(inputs.hidden))))
    return grads._replace(hidden=dhidden.astype(own(inputs.hidden)))


def no_classes(spec: Spec, inputs: Inputs) -> RowStats:
    """The record of a row of no classes, which changes nothing when merged."""
    zero = jnp.zeros(inputs.hidden.shape[:-1], working_dtype(matmul_dtype(inputs.hidden.dtype, inputs.kernel.dtype)))
    return RowStats(
        max=zero - jnp.inf,
        rest=zero - 1,
        picked=None if inputs.indices is None else jnp.zeros(inputs.indices.shape, zero.dtype),
        target=None if inputs.probs is None else Gap(zero, zero),
        smoothing=Gap(zero, zero) if spec.smoothing else None,
        spread=zero if spec.entropy else None,
        argmax=jnp.zeros(zero.shape, jnp.int32) if spec.entropy else None,
    )


def _class_axes(schedule: Schedule) -> tuple[int | None, ...]:
    """Which axis of each of the inputs has the classes."""
    return None, schedule.vocab_axis, 0, None, -1, 0, 0, -1


def _classes(inputs: Inputs, schedule: Schedule, start: Any, size: int) -> Inputs:
    """The inputs of `size` classes from `start` on, which become classes 0 to size-1."""
    parts = Inputs(
        *(
            x if x is None or axis is None else take(x, start, size, axis)
            for x, axis in zip(inputs, _class_axes(schedule), strict=True)
        )
    )
    if schedule.retiles and size < inputs.kernel.shape[schedule.vocab_axis]:
        parts = parts._replace(kernel=retiled_classes(inputs.kernel, start, size, schedule.vocab_axis))
    indices = None if inputs.indices is None else inputs.indices - start
    # Both products of a block read it, from on-chip memory if it is brought there first.
    return parts._replace(kernel=lax.optimization_barrier(parts.kernel), indices=indices)


def _logits(x: Inputs, schedule: Schedule, start: Any, kept: Array | None) -> Array:
    if kept is not None:
        return take(kept, start, x.kernel.shape[schedule.vocab_axis], -1)[: len(x.hidden)]
    return logits(x.hidden, x.kernel, x.bias, schedule)


def _weighted(x: Inputs) -> Array | None:
    if x.target_weights is None:
        return x.probs
    return weighted(x.probs.astype(x.target_weights.dtype), x.target_weights)


def _row_major(dkernel: Array, schedule: Schedule) -> Array:
    """dkernel, laid out as it is returned. The TPU compiler prefers the other way round for [D, V], and a copy."""
    return row_major(dkernel) if schedule.vocab_axis else dkernel
