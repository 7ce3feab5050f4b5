"""Values at target classes: taken from rows, and put into them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce.sharding import class_numbers, explicitly_sharded, vary, varying

# Up to this many target classes per row are found by comparing class numbers, which fuses into the pass over the
# logits; more of them are found by a gather, whose cost does not grow with K times V.
_MAX_COMPARED = 8


def sums_of_same(indices: Array, values: Array) -> Array:
    """Of each of the K entries `[..., K]`: the sum of the values of all that have its index."""

    def add(k: Any, same: Array, sums: Array) -> Array:
        value = lax.dynamic_index_in_dim(values, k, -1)
        return sums + jnp.where(same, value, jnp.zeros_like(value))

    return _by_entry(indices, add, jnp.zeros_like(values))


def repeated_entries(indices: Array) -> Array:
    """Which of the K indices are the same number as one before them."""

    def find(k: Any, same: Array, found: Array) -> Array:
        after: Array = class_numbers(indices, jnp.int32) > k
        return found | (same & after)

    return _by_entry(indices, find, jnp.zeros_like(indices, dtype=jnp.bool_))


def _by_entry(indices: Array, step: Callable[[Any, Array, Array], Array], state: Array) -> Array:
    """Folds `step(k, which entries have the k-th index, state)`: all at once they would be `[..., K, K]`."""

    def body(k: Any, state: Array) -> Array:
        return step(k, indices == lax.dynamic_index_in_dim(indices, k, -1), state)

    K = indices.shape[-1]
    if K <= _MAX_COMPARED:
        return functools.reduce(lambda state, k: body(k, state), range(K), state)
    result: Array = lax.fori_loop(0, K, body, vary(state, varying(indices, state)))
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
    hits = (jnp.where(is_class(array, indices[..., k]), array, jnp.zeros_like(array)) for k in range(indices.shape[-1]))
    return jnp.stack([jnp.sum(hit, -1, dtype=array.dtype) for hit in hits], -1)


def gathered(array: Array, indices: Array) -> Array:
    """`pick` by address."""
    inside = (indices >= 0) & (indices < array.shape[-1])
    found = jnp.take_along_axis(array, jnp.where(inside, indices, 0), -1, mode="promise_in_bounds")
    return jnp.where(inside, found, jnp.zeros_like(found))


def put(array: Array, indices: Array, values: Array) -> Array:
    """`array [..., V]` with `values [..., K]` at `indices [..., K]`; an index outside the row is passed over."""
    if indices.shape[-1] <= _MAX_COMPARED or explicitly_sharded(array, indices):
        for k in range(indices.shape[-1]):
            array = jnp.where(is_class(array, indices[..., k]), values[..., k, None], array)
        return array
    return scattered(array, indices, values)


def scattered(array: Array, indices: Array, values: Array) -> Array:
    """`put` by address."""
    size = array.shape[-1]
    inside = jnp.where((indices >= 0) & (indices < size), indices, size)  # a negative index would count from the end

    def of_row(row: Array, indices: Array, values: Array) -> Array:
        return row.at[indices].set(values, mode="drop")

    for _ in array.shape[:-1]:  # `jnp.put_along_axis` takes no batch of a symbolic size
        of_row = jax.vmap(of_row)
    return of_row(array, inside, values)


def is_class(like: Array, index: Array) -> Array:
    """Where in `like [..., V]` the class `index [...]` is."""
    return class_numbers(like, index.dtype) == index[..., None]
