"""What sharded arrays need: Explicit meshes, and arrays that vary over the axes of a `shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def explicitly_sharded(*arrays: Array) -> bool:
    """Whether any of the arrays carries its sharding in its type (a mesh with Explicit axes)."""
    return any(jax.sharding.AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types for a in arrays)


def class_numbers(like: Array, dtype: DTypeLike) -> Array:
    """0 to V-1 along the last axis of an array shaped and sharded as `like`."""
    sharding = jax.typeof(like).sharding if explicitly_sharded(like) else None
    return lax.broadcasted_iota(dtype, like.shape, like.ndim - 1, out_sharding=sharding)


def mask_like(mask: Array, like: Array) -> Array:
    """`mask`, shaped and sharded as `like`: a select wants all its arguments sharded alike."""
    return mask & jnp.full_like(like, True, dtype=jnp.bool_)


def vary_alike(*arrays: Array | None) -> list[Array | None]:
    """The arrays, all varying over the mesh axes of a `shard_map` that any of them varies over.

    A gradient has the type of its argument, so what is the same on all devices must be made to vary before it meets the
    logits in a function with a hand-written rule. The derivative of doing so adds the devices' gradients up.
    """
    axes = frozenset().union(*(jax.typeof(a).mat.varying for a in arrays if a is not None))
    return [a if a is None else _vary(a, axes - jax.typeof(a).mat.varying) for a in arrays]


def _vary(a: Array, axes: frozenset[str]) -> Array:
    return lax.pcast(a, tuple(sorted(axes)), to="varying") if axes else a
