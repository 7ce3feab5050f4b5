"""Class axes to the end, and the masks that go with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxce.arguments import Examples, Shared
from jaxce.sharding import explicit_mesh, place, spec_of


def sharded_alike(examples: Examples, shared: Shared, axes: tuple[int, ...]) -> tuple[Examples, Shared]:
    """On a mesh with Explicit axes, targets, mask and weights are sharded as the logits are."""
    if (mesh := explicit_mesh(examples.logits)) is None:
        return examples, shared
    full = spec_of(examples.logits)
    batch = [s for i, s in enumerate(full) if i not in axes]

    def placed(x: Array | None, spec: Sequence[Any]) -> Array | None:
        return x if x is None else place(x, mesh, spec)

    entries = [*batch, None]
    by_class = [full[axes[0]] if len(axes) == 1 else None]
    examples = examples._replace(
        indices=placed(examples.indices, entries),
        probs=placed(examples.probs, full if examples.indices is None else entries),
        weights=placed(examples.weights, batch),
        where=placed(examples.where, full),
    )
    return examples, shared._replace(class_weights=placed(shared.class_weights, by_class))


def classes_last(examples: Examples, axes: tuple[int, ...]) -> Examples:
    """Logits `[..., V]`, targets to match, and a mask that still broadcasts."""
    full, probs, where = examples.logits.shape, examples.probs, examples.where
    if probs is not None and examples.indices is None:
        probs = _move(probs, axes)
    if where is not None:
        if len(axes) > 1:  # these axes become one, so the mask must span them
            where = jnp.broadcast_to(where, [n if i in axes else where.shape[i] for i, n in enumerate(full)])
        where = _move(where, axes)
    return examples._replace(logits=_move(examples.logits, axes), probs=probs, where=where)


def _move(x: Array, axes: tuple[int, ...]) -> Array:
    if axes == (x.ndim - 1,):
        return x
    last = tuple(range(x.ndim - len(axes), x.ndim))
    x = jnp.moveaxis(x, axes, last)
    return x if len(axes) == 1 else x.reshape(*x.shape[: -len(axes)], math.prod(x.shape[-len(axes) :]))


def class_count(where: Array | None, shape: tuple[int, ...]) -> Array | None:
    """How many classes of each row of `shape [..., V]` the mask lets take part; None without a mask."""
    if where is None:
        return None
    count = jnp.sum(where, -1, dtype=jnp.int32) * (shape[-1] if where.shape[-1] == 1 else 1)
    return jnp.broadcast_to(count, shape[:-1])
