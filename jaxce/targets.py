"""The three kinds of target (class indices, probabilities, sparse probabilities) and the weight each example gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce import checks
from jaxce.label_check import check_labels
from jaxce.selection import select
from jaxce.serialization import serializable
from jaxce.sharding import AxisNames, explicitly_sharded, on_this_device, sum_over
from jaxce.stats import working_dtype
from jaxce.types import ArrayLike, array_of


class SparseTargets(NamedTuple):
    """A target distribution with K classes of probability other than zero, whatever the number of classes.

    It stands for t with t[indices[k]] += probs[k]: the same class may occur more than once (mixup of two examples of
    one class), and entries of probability 0 count for nothing, whatever their index. An index that is `ignore_index`
    counts as one of probability 0, and an example whose indices all are is ignored. It is a pytree, so it goes through
    jit, vmap and grad like an array.

    Args:
      indices: integers `[..., K]`, class indices. K is their last axis whatever the class axis of the logits is: beside
        logits `[N, V, H, W]` with `axis=1` they are `[N, H, W, K]`.
      probs: floats `[..., K]`, usually summing to 1.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[2.0, 1.0, 0.1]])
      >>> mixed = jaxce.SparseTargets(indices=jnp.array([[0, 2]]), probs=jnp.array([[0.7, 0.3]]))
      >>> print(jaxce.softmax_cross_entropy(logits, mixed))
      [0.98702997]
    """

    indices: Any
    probs: Any


serializable(SparseTargets)


class Ids(NamedTuple):
    """Classes whose log-probabilities are asked for, `[...]` or `[..., K]`."""

    ids: Any


Targets = ArrayLike | SparseTargets


def sort_by_kind(
    targets: Any,
    full: tuple[int, ...],
    class_axes: Sequence[int],
    dtype: DTypeLike,
    ignore_index: int | None,
    name: str = "targets",
) -> tuple[Array | None, Array | None, int | None]:
    """Checks `targets` against logits of this dtype and of shape `full`.

    Class indices are indices `[..., K]` with probs `[..., K]` or None (1 each); probabilities are probs alone, shaped
    as logits. The last result is the number that ignored labels have in the first.
    """
    batch = checks.batch_shape(full, class_axes)
    if isinstance(targets, SparseTargets):
        return checked_sparse("targets", targets, batch, full, dtype, ignore_index)
    if isinstance(targets, Ids):
        indices, ignored = class_indices(name, targets.ids, ignore_index)
        checks.ids(name, indices, batch)
        return indices if indices.ndim > len(batch) else indices[..., None], None, ignored
    if checks.is_integers(targets):
        indices, ignored = class_indices(name, targets, ignore_index)
        one_hot = f"If these are one-hot labels, make them floats: {name}.astype(logits.dtype)."
        if name == "labels":
            one_hot = "One-hot labels are for jaxce.softmax_cross_entropy, as floats: labels.astype(logits.dtype)."
        checks.indices(name, indices, batch, full, one_hot=one_hot)
        return indices[..., None], None, ignored
    if not checks.is_array(targets) or not jnp.issubdtype(jnp.result_type(targets), jnp.floating):
        hint = f"Convert one-hot bools with {name}.astype(logits.dtype)."
        if not checks.is_array(targets) or jnp.shape(targets) == batch:
            hint = checks.convert(name, targets, "int")
        expected = "class indices (integers), probabilities (floats) or jaxce.SparseTargets"
        checks.fail(TypeError, name, expected, checks.describe(targets), hint)
    checks.probabilities(name, targets, full, class_axes)
    probs = checks.float_array(name, targets)
    if ignore_index is not None:
        hint = "Give the examples to leave out weight 0: weights=mask."
        checks.fail(ValueError, "ignore_index", "None for probability targets", repr(ignore_index), hint)
    return None, probs, None


def checked_sparse(
    name: str,
    targets: SparseTargets,
    batch: tuple[int, ...],
    full: tuple[int, ...],
    dtype: DTypeLike,
    ignore_index: int | None = None,
) -> tuple[Array, Array, int | None]:
    """`sort_by_kind` of sparse probabilities."""
    indices, ignored = class_indices(f"{name}.indices", array_of(targets.indices), ignore_index)
    checks.indices(f"{name}.indices", indices, batch, full, sparse=True)
    probs = checks.float_array(f"{name}.probs", array_of(targets.probs))
    checks.probabilities(f"{name}.probs", probs, indices.shape)
    # In the working dtype: where they are used more than once, their gradients are added before they are rounded.
    return indices, probs.astype(working_dtype(dtype)), ignored


def class_indices(name: str, x: Any, ignore_index: int | None) -> tuple[Array, int | None]:
    """Labels of any integer dtype as int32 or, with x64, int64; and the number that ignored ones have there.

    A label that is too large for it becomes another number that is no class and is not ignored, and an `ignore_index`
    that is too large becomes the smallest number. So NumPy and JAX arrays of every dtype mean the same.
    """
    if not checks.is_integers(x):
        checks.not_labels(name, x, 0)
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    given, used = x.dtype, jnp.dtype(jnp.int32)
    if jnp.iinfo(given).max > jnp.iinfo(used).max:
        used = jnp.result_type(int)
    limits = jnp.iinfo(used)
    if ignore_index is not None:
        checks.ignore_index(ignore_index, given, used)
        ignore_index = int(ignore_index)
    if jnp.iinfo(given).max <= limits.max:
        return jnp.asarray(x.astype(used)), ignore_index
    xp: Any = jnp if isinstance(x, jax.Array) else np
    fits = x <= given.type(limits.max)
    if jnp.iinfo(given).min < limits.min:
        fits &= x >= given.type(limits.min)
    other = limits.max - (ignore_index == limits.max)
    labels = xp.where(fits, x, given.type(other)).astype(used)
    if ignore_index is not None and not limits.min <= ignore_index <= limits.max:
        ignored = x == given.type(ignore_index)
        labels = xp.where(ignored, used.type(limits.min), xp.where(labels == limits.min, used.type(other), labels))
        ignore_index = limits.min
    return jnp.asarray(labels), ignore_index


def entry_probs(indices: Array, probs: Array | None, ignore_index: int | None) -> Array | None:
    """The probability of each of the K index entries, 0 for ignored ones; None if each is plainly 1."""
    if ignore_index is None:
        return probs
    if probs is None:
        probs = jnp.ones_like(indices, dtype=jnp.float32)
    return select(indices == ignore_index, jnp.zeros_like(probs), probs)


def is_class(indices: Array, num_classes: int) -> Array:
    return (indices >= 0) & (indices < num_classes)


def class_weight_at(class_weights: Array, indices: Array, axis_name: AxisNames = ()) -> Array:
    """`class_weights [V]` at `indices [..., K]`; arbitrary for an index outside the classes."""
    if explicitly_sharded(class_weights, indices):
        classes = lax.broadcasted_iota(indices.dtype, (*indices.shape, class_weights.size), indices.ndim)
        weights = jnp.broadcast_to(class_weights, classes.shape)
        hit = (classes == indices[..., None]).astype(weights.dtype) * jnp.ones_like(weights)  # sharded as both are
        return jnp.sum(select(hit == 0, jnp.zeros_like(hit), hit * weights), -1)  # a weight may be infinite
    local = on_this_device(indices, class_weights.size, axis_name)
    found = jnp.take(class_weights, jnp.clip(local, 0, class_weights.size - 1), mode="clip")
    if not axis_name:
        return found
    here = is_class(local, class_weights.size)
    return sum_over(select(here, found, jnp.zeros_like(found)), axis_name)


def nan_where_unknown(indices: Array, num_classes: int, unused: Array, what: str = "targets: label") -> Array:
    """A factor for −log p at each index: 1, or NaN for a label that is no class and is used.

    A factor and not a select, so that the gradient of such a row is NaN too.
    """
    known = is_class(indices, num_classes) | unused
    known = check_labels(known, indices, num_classes, what)
    return select(known, 1.0, jnp.nan)
