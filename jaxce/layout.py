"""Class axes to the end, and what goes with the logits placed as they are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxce.arguments import Examples, Options, Shared
from jaxce.sharding import alike, explicit_mesh, place, spec_of


def alike_on_devices(options: Options, examples: Examples, shared: Shared) -> tuple[Examples, Shared]:
    """What has no class axis is the same on all devices of the classes: then so is the loss of a row."""
    same = functools.partial(alike, axes=options.axis_name, ignore_index=options.ignore_index)
    weights, *numbers = shared
    return examples.by_kind(row=same, entries=same), Shared(weights, *same(numbers))


def sharded_alike(
    options: Options, logits: Array, examples: Examples, shared: Shared, axes: tuple[int, ...]
) -> tuple[Examples, Shared]:
    """On a mesh with Explicit axes, targets, mask and weights are sharded as the logits are."""
    examples, shared = alike_on_devices(options, examples, shared)
    if (mesh := explicit_mesh(logits)) is None:
        return examples, shared
    full = spec_of(logits)
    batch = [s for i, s in enumerate(full) if i not in axes]

    def placed(*spec: Any) -> Callable[[Array], Array]:
        return lambda x: place(x, mesh, spec)

    examples = examples.by_kind(row=placed(*batch), entries=placed(*batch, None), classes=placed(*full))
    if shared.class_weights is not None:
        by_class = placed(full[axes[0]])  # as the one axis is that several become
        shared = shared._replace(class_weights=by_class(shared.class_weights))
    return examples, shared


def classes_last(logits: Array, examples: Examples, axes: tuple[int, ...]) -> tuple[Array, Examples]:
    """Logits `[..., V]`, targets to match, and a mask that still broadcasts."""

    def moved(x: Array) -> Array:
        if len(axes) > 1:  # these axes become one, so a mask must span them
            x = jnp.broadcast_to(x, [n if i in axes else x.shape[i] for i, n in enumerate(logits.shape)])
        return _move(x, axes)

    return moved(logits), examples.by_kind(classes=moved)


def _move(x: Array, axes: tuple[int, ...]) -> Array:
    if axes == (x.ndim - 1,):
        return x
    last = tuple(range(x.ndim - len(axes), x.ndim))
    x = jnp.moveaxis(x, axes, last)
    return x if len(axes) == 1 else x.reshape(*x.shape[: -len(axes)], math.prod(x.shape[-len(axes) :]))


def class_count(where: Array, shape: tuple[int, ...]) -> Array:
    """How many classes of each row of `shape [..., V]` the mask lets take part."""
    count = jnp.sum(where, -1, dtype=jnp.int32) * (shape[-1] if where.shape[-1] == 1 else 1)
    return jnp.broadcast_to(count, shape[:-1])
