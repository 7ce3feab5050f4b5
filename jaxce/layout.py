"""Class axes to the end, and the masks that go with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxce.compose import Amounts
from jaxce.sharding import explicit_mesh, place, spec_of
from jaxce.targets import Targets


def sharded_alike(
    logits: Array, targets: Targets, where: Array | None, amounts: Amounts, axes: tuple[int, ...]
) -> tuple[Targets, Array | None, Amounts]:
    """Targets, mask and weights, on a mesh with Explicit axes sharded as the logits are."""
    if (mesh := explicit_mesh(logits)) is None:
        return targets, where, amounts
    full = spec_of(logits)
    batch = [s for i, s in enumerate(full) if i not in axes]

    def placed(x: Array | None, spec: Sequence[Any]) -> Array | None:
        return x if x is None else place(x, mesh, spec)

    entries = [*batch, None]
    probs = placed(targets.probs, full if targets.indices is None else entries)
    by_class = [full[axes[0]] if len(axes) == 1 else None]
    amounts = amounts._replace(
        weights=placed(amounts.weights, batch), class_weights=placed(amounts.class_weights, by_class)
    )
    return Targets(placed(targets.indices, entries), probs), placed(where, full), amounts


def classes_last(
    logits: Array, targets: Targets, where: Array | None, axes: tuple[int, ...]
) -> tuple[Array, Targets, Array | None]:
    """Logits `[..., V]`, targets to match, and a mask that still broadcasts."""
    full = logits.shape
    probs = targets.probs
    if probs is not None and targets.indices is None:
        probs = _move(probs, axes)
    if where is not None:
        if len(axes) > 1:  # these axes become one, so the mask must span them
            where = jnp.broadcast_to(where, [n if i in axes else where.shape[i] for i, n in enumerate(full)])
        where = _move(where, axes)
    return _move(logits, axes), Targets(targets.indices, probs), where


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
