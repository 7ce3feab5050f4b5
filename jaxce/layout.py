"""Class axes to the end, and the masks that go with them."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

from jaxce.targets import Targets


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
