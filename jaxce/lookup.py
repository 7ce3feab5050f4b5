"""Values at target classes: taken from rows, and put into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce.selection import select
from jaxce.sharding import class_numbers, explicitly_sharded, vary, varying

# Up to this many target classes per row are found by comparing class numbers, which fuses into the pass over the
# logits; more of them are found by a gather, whose cost does not grow with K times V.
_MAX_COMPARED = 8


def sums_of_same(indices: Array, values: Array) -> Array:
    """Of each of the K entries `[..., K]`: the sum of the values of all that have its index."""
    if indices.shape[-1] == 1:
        return values

    def at_once(indices: Array, values: Array) -> Array:
        return jnp.sum(select(_same(indices), values[..., None, :], jnp.zeros_like(values[..., None, :])), -1)

    def add(k: Any, indices: Array, values: Array, sums: Array) -> Array:
        same = indices == lax.dynamic_index_in_dim(indices, k, -1)
        value = lax.dynamic_index_in_dim(values, k, -1)
        return sums + select(same, value, jnp.zeros_like(value))

    return _by_entry(at_once, add, values.dtype, indices, values)


def repeated_entries(indices: Array) -> Array:
    """Which of the K indices are the same number as one before them."""

    def at_once(indices: Array) -> Array:
        repeated: Array = jnp.any(jnp.tril(_same(indices), -1), -1)
        return repeated

    def find(k: Any, indices: Array, found: Array) -> Array:
        same = indices == lax.dynamic_index_in_dim(indices, k, -1)
        both: Array = found | (same & (class_numbers(indices, jnp.int32) > k))
        return both

    return _by_entry(at_once, find, jnp.bool_, indices)


def _same(indices: Array) -> Array:
    return indices[..., :, None] == indices[..., None, :]


def _by_entry(at_once: Callable[..., Array], step: Callable[..., Array], dtype: DTypeLike, *arrays: Array) -> Array:
    """`at_once(*arrays)`, or one after the other on CPU, which would write out what many entries `[..., K, K]` make.

    Then `step(k, *arrays, state)` folds the k-th entry into what begins as zeros `[..., K]`.
    """
    K = arrays[0].shape[-1]
    if K <= _MAX_COMPARED:
        return at_once(*arrays)

    def in_turn(*arrays: Array) -> Array:
        state = vary(jnp.zeros_like(arrays[-1], dtype=dtype), varying(arrays))
        return cast(Array, lax.fori_loop(0, K, lambda k, state: step(k, *arrays, state), state))

    result: Array = lax.platform_dependent(*arrays, cpu=in_turn, default=at_once)
    return result


def pick(array: Array, indices: Array) -> Array:
    """The values `[..., K]` of `array [..., V]` at `indices [..., K]`; 0 for an index outside the row."""
    if explicitly_sharded(array, indices):  # a gather would have to be told how its result is sharded
        return compared(array, indices)
    if indices.shape[-1] > _MAX_COMPARED:
        return gathered(array, indices)
    values: Array = lax.platform_dependent(array, indices, cpu=gathered, default=compared)
    return values


def compared(array: Array, indices: Array) -> Array:
    """`pick` by class numbers."""
    hits = (select(is_class(array, indices[..., k]), array, jnp.zeros_like(array)) for k in range(indices.shape[-1]))
    return jnp.stack([jnp.sum(hit, -1, dtype=array.dtype) for hit in hits], -1)


def gathered(array: Array, indices: Array) -> Array:
    """`pick` by address."""
    inside = (indices >= 0) & (indices < array.shape[-1])
    found = jnp.take_along_axis(array, select(inside, indices, 0), -1, mode="promise_in_bounds")
    return select(inside, found, jnp.zeros_like(found))


def put(array: Array, indices: Array, values: Array) -> Array:
    """`array [..., V]` with `values [..., K]` at `indices [..., K]`; an index outside the row is passed over."""
    if indices.shape[-1] <= _MAX_COMPARED or explicitly_sharded(array, indices):
        for k in range(indices.shape[-1]):
            array = select(is_class(array, indices[..., k]), values[..., k, None], array)
        return array
    return scattered(array, indices, values)


def scattered(array: Array, indices: Array, values: Array) -> Array:
    """`put` by address."""
    size = array.shape[-1]
    inside = select((indices >= 0) & (indices < size), indices, size)  # a negative index would count from the end

    def of_row(row: Array, indices: Array, values: Array) -> Array:
        return row.at[indices].set(values, mode="drop")

    for _ in array.shape[:-1]:  # `jnp.put_along_axis` takes no batch of a symbolic size
        of_row = jax.vmap(of_row)
    return of_row(array, inside, values)


def is_class(like: Array, index: Array) -> Array:
    """Where in `like [..., V]` the class `index [...]` is."""
    return class_numbers(like, index.dtype) == index[..., None]
