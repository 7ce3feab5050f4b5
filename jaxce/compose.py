"""From the terms of each row to the loss: targets, class weights, smoothing, z-loss, example weights, reduction.

Plain differentiable JAX on per-row numbers, shared by every implementation, so that each option is written once and
its gradient follows by itself. What makes this delicate is what must *not* count: an ignored example, or one of
weight 0, may hold NaN, and 0·NaN is NaN in the loss and again in the gradient. Such terms are replaced before they
are used, never multiplied away.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce import checks
from jaxce.serialization import serializable
from jaxce.sharding import AxisNames, explicitly_sharded, sum_over
from jaxce.stats import Spec, Terms, times, working_dtype
from jaxce.targets import Targets, class_weight_at, entry_probs, nan_where_unknown

REDUCTIONS = ("none", "sum", "mean", "mean_count")
IMPLEMENTATIONS = ("xla", "autodiff")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that are constants of the compiled program."""

    label_smoothing: bool = False  # whether there is any: its amount is an array
    z_loss: bool = False
    logit_softcap: float | None = None
    ignore_index: int | None = None
    reduction: str = "none"
    return_aux: bool = False
    implementation: str = "xla"
    axis_name: AxisNames = ()
    batch_axis_name: AxisNames = ()

    @property
    def spec(self) -> Spec:
        """Which terms the loss is composed from."""
        return Spec(self.logit_softcap, self.label_smoothing, self.return_aux, self.axis_name)

    @property
    def nll_spec(self) -> Spec:
        """The same for the negative log-likelihood alone."""
        return Spec(self.logit_softcap, axis_name=self.axis_name)


class Amounts(NamedTuple):
    """The options that are arrays: they may be traced and differentiated."""

    weights: Array | None = None
    class_weights: Array | None = None
    label_smoothing: Array | None = None
    z_loss: Array | None = None


def checked_options(
    batch: tuple[int, ...],
    num_classes: int,
    dtype: DTypeLike,
    *,
    weights: Any = None,
    class_weights: Any = None,
    label_smoothing: Any = 0.0,
    ignore_index: int | None = None,
    z_loss: Any = 0.0,
    logit_softcap: float | None = None,
    reduction: str = "none",
    axis_name: Any = None,
    batch_axis_name: Any = None,
    return_aux: bool = False,
    implementation: str | None = None,
) -> tuple[Options, Amounts]:
    """Checks the options of a public loss and parts them into constants and arrays of the working dtype.

    `num_classes` is the length of the class axis, on this device if it is split. `ignore_index` has been checked with
    the targets.
    """
    checks.scalar("label_smoothing", label_smoothing, 0, 1)
    checks.scalar("z_loss", z_loss, 0, math.inf)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("implementation", implementation, (None, *IMPLEMENTATIONS))
    checks.one_of("return_aux", return_aux, (False, True))
    class_axes, batch_axes = checks.mesh_axes(axis_name, batch_axis_name, reduction)
    if logit_softcap is not None:
        checks.softcap(logit_softcap)
    dtype = working_dtype(dtype)
    options = Options(
        label_smoothing=not _is_zero(label_smoothing),
        z_loss=not _is_zero(z_loss),
        logit_softcap=None if logit_softcap is None else float(logit_softcap),
        ignore_index=ignore_index,
        reduction=reduction,
        return_aux=return_aux,
        implementation=implementation or "xla",
        axis_name=class_axes,
        batch_axis_name=batch_axes,
    )
    amounts = Amounts(
        weights=None if weights is None else checks.example_weights(weights, batch).astype(dtype),
        class_weights=None if class_weights is None else checks.class_weights(class_weights, num_classes).astype(dtype),
        label_smoothing=jnp.asarray(label_smoothing, dtype) if options.label_smoothing else None,
        z_loss=jnp.asarray(z_loss, dtype) if options.z_loss else None,
    )
    return options, amounts


def _is_zero(x: Any) -> bool:
    return isinstance(x, (int, float)) and x == 0


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["nll", "log_normalizer", "entropy", "prediction", "weight"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class CrossEntropyAux:
    """What `return_aux=True` returns beside the loss: five arrays of the batch shape, whatever the reduction.

    All but `prediction` are in the working dtype. `nll`, `log_normalizer` and `entropy` are differentiable, alone or
    together with the loss.

    Attributes:
      nll: −Σ_c t_c log p_c of the targets as given: without smoothing, weights or z-loss; 0 for ignored examples.
      log_normalizer: logsumexp of the logits.
      entropy: −Σ_c p_c log p_c of the predicted distribution, in nats.
      prediction: int32, the class with the largest logit (the first of equals).
      weight: the weight the example was given: `weights` times its class weight; 0 for ignored examples. `"mean"`
        divides by the sum of these.
    """

    nll: Array
    log_normalizer: Array
    entropy: Array
    prediction: Array
    weight: Array


serializable(CrossEntropyAux)


def compose(
    terms: Terms,
    targets: Targets,
    num_classes: int,
    amounts: Amounts,
    options: Options,
    *,
    participating: Array | None = None,
    unweighted: Array | None = None,
    prediction: Array | None = None,
) -> Array | tuple[Array, CrossEntropyAux]:
    """The loss, and the aux record if asked for.

    Args:
      terms: per row; `terms.target` and `terms.smoothing` of probability targets hold the class weights already.
      num_classes: V, on all devices together.
      participating: how many classes take part in each row, if not all do. A row without any does not count.
      unweighted: `terms.target` of probability targets without class weights, where that differs.
      prediction: argmax of each row, needed for the aux record.
    """
    like = terms.log_normalizer
    dtype, ones = like.dtype, jnp.ones_like(like)
    probs = None if targets.indices is None else entry_probs(targets, options.ignore_index)
    weights = ones if amounts.weights is None else ones * jnp.broadcast_to(amounts.weights, like.shape)
    counted = counted_examples(targets, like, options, participating)
    weight = applied_weights(targets, like, options, amounts, participating)
    unused = unused_examples(targets, like, options, amounts, participating)
    terms = jax.tree.map(lambda x: _zero_if_too_large(x, unused), terms)

    if targets.indices is None:
        target = terms.target
        nll = target if unweighted is None else _zero_if_too_large(unweighted, unused)
    else:
        idle = unused[..., None] if probs is None else unused[..., None] | (probs == 0)
        known = nan_where_unknown(targets.indices, num_classes, idle).astype(dtype)
        surprise = terms.target * known
        probs = jnp.ones_like(surprise) if probs is None else probs.astype(dtype)
        nll = jnp.sum(times(probs, surprise), -1)
        target = nll
        if amounts.class_weights is not None:
            target = jnp.sum(times(_weighted_entries(targets, amounts.class_weights, options), surprise), -1)

    loss = target
    if options.label_smoothing:
        share = amounts.label_smoothing / _class_count(participating, num_classes, dtype)
        loss = times(1 - amounts.label_smoothing, target) + times(share, terms.smoothing)
    if options.z_loss:
        # What is not finite has no derivative: it must not turn a cotangent of 0 into NaN.
        lse = terms.log_normalizer
        lse = jnp.where(jnp.isfinite(lse), lse, lax.stop_gradient(lse))
        loss = loss + times(amounts.z_loss, lse * lse)
    zero = jnp.zeros_like(loss)
    if targets.indices is not None and (options.label_smoothing or amounts.class_weights is not None):
        # No 0 that a term was multiplied with hides a label that is no class, and its gradient is NaN as well.
        sound = jnp.prod(known, -1)
        loss, nll = (x * sound + times(sound - 1, terms.log_normalizer) for x in (loss, nll))
    loss = jnp.where(counted, weights * loss, zero)
    reduced = reduce(loss, weight, counted, options)
    if not options.return_aux:
        return reduced
    nll = jnp.where(counted, nll, zero)
    return reduced, CrossEntropyAux(nll, terms.log_normalizer, terms.entropy, prediction, weight)


def counted_examples(targets: Targets, like: Array, options: Options, participating: Array | None = None) -> Array:
    """Which examples count: those not ignored, with a class that takes part. Shaped and sharded as `like`."""
    counted = jnp.full_like(like, True, dtype=jnp.bool_)
    if participating is not None:
        counted &= participating > 0
    if options.ignore_index is not None:
        counted &= jnp.any(targets.indices != options.ignore_index, -1)
    return counted


def applied_weights(
    targets: Targets, like: Array, options: Options, amounts: Amounts, participating: Array | None = None
) -> Array:
    """The weight each example is given in the loss: its own times that of its class."""
    weight = jnp.ones_like(like)
    if amounts.class_weights is not None:
        weight = _class_weight_of_examples(targets, amounts.class_weights, options)
    if amounts.weights is not None:
        weight = jnp.broadcast_to(amounts.weights, weight.shape) * weight
    return jnp.where(counted_examples(targets, like, options, participating), weight, jnp.zeros_like(weight))


def _weighted_entries(targets: Targets, class_weights: Array, options: Options) -> Array:
    """w_c t_c at each of the K index entries."""
    by_class = class_weight_at(class_weights, targets.indices, options.axis_name)
    probs = entry_probs(targets, options.ignore_index)
    return by_class if probs is None else times(by_class, probs.astype(by_class.dtype))


def _class_weight_of_examples(targets: Targets, class_weights: Array, options: Options) -> Array:
    """Σ_c w_c t_c, which is w_y for an index."""
    if targets.indices is not None:
        return jnp.sum(_weighted_entries(targets, class_weights, options), -1)
    probs = targets.probs.astype(class_weights.dtype)
    if explicitly_sharded(probs):  # a product over a sharded axis would have to be told how its result is sharded
        return jnp.sum(probs * jnp.broadcast_to(class_weights, probs.shape), -1)
    return sum_over(jnp.matmul(probs, class_weights, precision="highest"), options.axis_name)


def unused_examples(
    targets: Targets, like: Array, options: Options, amounts: Amounts, participating: Array | None = None
) -> Array:
    """Which examples must leave no trace, whatever they hold: those that do not count, and those of weight 0."""
    unused = ~counted_examples(targets, like, options, participating)
    return unused if amounts.weights is None else unused | (jnp.broadcast_to(amounts.weights, like.shape) == 0)


def reduce(loss: Array, weight: Array, counted: Array, options: Options) -> Array:
    """The four reductions."""
    if options.reduction == "none":
        return loss
    total = sum_over(jnp.sum(loss), options.batch_axis_name)
    if options.reduction == "sum":
        return total
    divisor, nothing = mean_divisor(weight, counted, options)
    return jnp.where(nothing, 0, total / divisor)


def mean_divisor(weight: Array, counted: Array, options: Options) -> tuple[Array, Array]:
    """What the sum of the losses is divided by; and whether that is nothing: then the mean is 0, with gradient 0."""
    divisor = jnp.sum(weight) if options.reduction == "mean" else jnp.sum(counted.astype(weight.dtype))
    divisor = sum_over(divisor, options.batch_axis_name)
    nothing = divisor == 0
    return jnp.where(nothing, 1, divisor), nothing


def _zero_if_too_large(x: Array, unused: Array) -> Array:
    """`x`, but 0 in unused rows where it is not finite or so large that its square or a sum of such might not be."""
    unused = jnp.broadcast_to(unused.reshape(unused.shape + (1,) * (x.ndim - unused.ndim)), x.shape)
    limit = 1e-3 * float(jnp.finfo(x.dtype).max) ** 0.5
    return jnp.where(unused & ~(jnp.abs(x) < limit), jnp.zeros_like(x), x)


def _class_count(participating: Array | None, num_classes: int, dtype: jnp.dtype) -> Array:
    if participating is None:
        return jnp.asarray(num_classes, dtype)
    return jnp.maximum(participating, 1).astype(dtype)
