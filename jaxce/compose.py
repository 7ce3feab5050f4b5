"""From the terms of each row to the loss: targets, class weights, smoothing, z-loss, example weights, reduction.

Plain differentiable JAX on per-row numbers, shared by every implementation, so that each option is written once and
its gradient follows by itself. What makes this delicate is what must *not* count: an ignored example, or one of
weight 0, may hold NaN, and 0·NaN is NaN in the loss and again in the gradient. Such terms are replaced before they
are used, never multiplied away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce.arguments import Examples, Options, Shared
from jaxce.reverse_mode import jvp
from jaxce.selection import select
from jaxce.serialization import serializable
from jaxce.sharding import explicitly_sharded, sum_over
from jaxce.stats import Terms, times
from jaxce.targets import class_weight_at, entry_probs, is_class, nan_where_unknown


class CrossEntropyAux(NamedTuple):
    """What `return_aux=True` returns beside the loss: five arrays of the batch shape, whatever the reduction.

    All but `prediction` are in the working dtype. `nll`, `log_normalizer` and `entropy` are differentiable, alone or
    together with the loss.

    Attributes:
      nll: −Σ_c t_c log p_c of the targets as given: without smoothing, weights or z-loss; 0 for ignored examples.
      log_normalizer: logsumexp of the logits, after soft cap, temperature and mask.
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


class Counts(NamedTuple):
    """Who counts, of a batch of rows; from `who_counts`.

    classes: how many classes take part in each row, on all devices; None if all of them do.
    counted: which examples count: those not ignored, with a class that takes part.
    weight: the weight each is given in the loss, its own times that of its class; 0 where it does not count.
    unused: which must leave no trace, whatever they hold: those that do not count, and those whose own weight is 0.
    """

    classes: Array | None
    counted: Array
    weight: Array
    unused: Array


def who_counts(
    options: Options, examples: Examples, shared: Shared, like: Array, classes: Array | None = None
) -> Counts:
    """Shaped and sharded as `like`, whose dtype the weights have."""
    counted = jnp.full_like(like, True, dtype=jnp.bool_)
    if classes is not None:
        counted &= classes > 0
    if options.ignore_index is not None:
        counted &= jnp.any(examples.indices != options.ignore_index, -1)
    weight = jnp.ones_like(like)
    if examples.weights is not None:
        weight = weight * jnp.broadcast_to(examples.weights, like.shape)
    weight = select(counted, weight, jnp.zeros_like(weight))
    unused = ~counted if examples.weights is None else weight == 0
    counts = Counts(classes, counted, weight, unused)
    if shared.class_weights is not None:
        of_class = _class_weight_of_examples(options, examples, counts, shared.class_weights)
        of_class = select(unused & ~jnp.isfinite(of_class), jnp.zeros_like(of_class), of_class)
        counts = counts._replace(weight=select(counted, weight * of_class, jnp.zeros_like(weight)))
    return counts


# Padding holds targets normalised by 0 and temperatures of 0. Multiplied by 0, these would be NaN in what rows share.


def usable_probs(options: Options, examples: Examples, counts: Counts) -> Examples:
    """Of unused rows those that are not finite as 0."""
    if (probs := examples.probs) is None or not _may_be_unused(options, examples):
        return examples
    return examples._replace(probs=_without(probs, counts.unused))


def _without(probs: Array, unused: Array) -> Array:
    return select(unused[..., None] & ~jnp.isfinite(probs), jnp.zeros_like(probs), probs)


def usable_temperature(options: Options, examples: Examples, counts: Counts) -> Examples:
    """One that is not positive, as a traced one may be, as NaN; of unused rows as 1."""
    if (T := examples.temperature) is None:
        return examples
    ones = jnp.ones_like(counts.weight)
    T = ones * jnp.broadcast_to(T, ones.shape)
    T = T + select(T > 0, 0, jnp.nan)  # which leaves a NaN gradient NaN
    return examples._replace(temperature=select(counts.unused & jnp.isnan(T), ones, T))


def _may_be_unused(options: Options, examples: Examples) -> bool:
    return not (examples.weights is None and examples.where is None and options.ignore_index is None)


def compose(
    options: Options,
    terms: Terms,
    examples: Examples,
    shared: Shared,
    counts: Counts,
    num_classes: int,
    *,
    unweighted: Array | None = None,
    prediction: Array | None = None,
) -> Array | tuple[Array, CrossEntropyAux]:
    """The loss, and the aux record if asked for.

    Args:
      terms: per row; `terms.target` and `terms.smoothing` of probability targets hold the class weights already.
      num_classes: V, on all devices together.
      unweighted: `terms.target` of probability targets without class weights, where that differs.
      prediction: argmax of each row, needed for the aux record.
    """
    like = terms.log_normalizer
    dtype, ones = like.dtype, jnp.ones_like(like)
    weights = ones
    if examples.weights is not None:
        weights = select(counts.counted, ones * jnp.broadcast_to(examples.weights, like.shape), ones)
    if examples.indices is not None:
        examples = usable_probs(options, examples, counts)
    if _may_be_unused(options, examples):
        terms = jax.tree.map(lambda x: zero_if_too_large(x, counts.unused), terms)

    if examples.indices is None:
        target = terms.target
        nll = target if unweighted is None else zero_if_too_large(unweighted, counts.unused)
    else:
        probs = entry_probs(examples.indices, examples.probs, options.ignore_index)
        idle = counts.unused[..., None] if probs is None else counts.unused[..., None] | (probs == 0)
        known = nan_where_unknown(examples.indices, num_classes, idle).astype(dtype)
        nothing = idle & ~is_class(examples.indices, num_classes)  # whose term is that of no class
        surprise = select(nothing, 0, terms.target) * known
        probs = jnp.ones_like(surprise) if probs is None else probs.astype(dtype)
        nll = jnp.sum(times(probs, surprise), -1)
        target = nll
        if shared.class_weights is not None:
            by_class = _weighted_entries(options, examples.indices, examples.probs, shared.class_weights)
            by_class = select(counts.unused[..., None] & ~jnp.isfinite(by_class), 0, by_class)
            target = jnp.sum(times(by_class, surprise), -1)

    loss = target
    if shared.label_smoothing is not None and terms.smoothing is not None:
        share = shared.label_smoothing / _class_count(counts.classes, num_classes, dtype)
        loss = times(1 - shared.label_smoothing, target) + times(share, terms.smoothing)
    if shared.z_loss is not None:
        # What is not finite has no derivative: it must not turn a cotangent of 0 into NaN.
        lse = terms.log_normalizer
        lse = select(jnp.isfinite(lse), lse, lax.stop_gradient(lse))
        loss = loss + times(shared.z_loss, lse * lse)
    zero = jnp.zeros_like(loss)
    if examples.indices is not None and (options.label_smoothing or shared.class_weights is not None):
        # No 0 that a term was multiplied with hides a label that is no class, and its gradient is NaN as well.
        sound = jnp.prod(known, -1)
        loss, nll = (x * sound + times(sound - 1, terms.log_normalizer) for x in (loss, nll))
    loss = select(counts.counted, weights * loss, zero)
    reduced = reduce(options, loss, counts)
    if not options.return_aux:
        return reduced
    nll = select(counts.counted, nll, zero)
    assert terms.entropy is not None  # the aux record is why it was computed
    assert prediction is not None
    return reduced, CrossEntropyAux(nll, terms.log_normalizer, terms.entropy, prediction, counts.weight)


def _weighted_entries(options: Options, indices: Array, probs: Array | None, class_weights: Array) -> Array:
    """w_c t_c at each of the K index entries."""
    by_class = class_weight_at(class_weights, indices, options.axis_name)
    probs = entry_probs(indices, probs, options.ignore_index)
    return by_class if probs is None else times(probs.astype(by_class.dtype), by_class)


def _class_weight_of_examples(options: Options, examples: Examples, counts: Counts, class_weights: Array) -> Array:
    """Σ_c w_c t_c, which is w_y for an index."""
    if (indices := examples.indices) is not None:
        probs = usable_probs(options, examples, counts).probs
        return jnp.sum(_weighted_entries(options, indices, probs, class_weights), -1)
    assert examples.probs is not None  # targets are either indices or probabilities
    probs = examples.probs.astype(class_weights.dtype)
    if explicitly_sharded(probs):  # a product over a sharded axis would have to be told how its result is sharded
        if _may_be_unused(options, examples):
            probs = _without(probs, counts.unused)
        return sum_over(jnp.sum(probs * jnp.broadcast_to(class_weights, probs.shape), -1), options.axis_name)
    if not _may_be_unused(options, examples):
        return sum_over(jnp.matmul(probs, class_weights, precision="highest"), options.axis_name)
    return sum_over(_weights_of_used(probs, class_weights, counts.unused), options.axis_name)


@jax.custom_jvp
def _weights_of_used(probs: Array, class_weights: Array, unused: Array) -> Array:
    """The product, whose derivative is one of what is finite in unused rows.

    A select of the probabilities would write them out again, which the product itself does not need.
    """
    return jnp.matmul(probs, class_weights, precision="highest")


def _weights_of_used_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    def selected(probs: Array, class_weights: Array, unused: Array) -> Array:
        return jnp.matmul(_without(probs, unused), class_weights, precision="highest")

    return _weights_of_used(*primals), jvp(selected, primals, tangents)[1]


_weights_of_used.defjvp(_weights_of_used_jvp, symbolic_zeros=True)


def reduce(options: Options, loss: Array, counts: Counts) -> Array:
    """The four reductions."""
    if options.reduction == "none":
        return loss
    total = sum_over(jnp.sum(loss), options.batch_axis_name)
    if options.reduction == "sum":
        return total
    divisor, nothing = mean_divisor(options, counts)
    return mean_or_0(total / divisor, nothing)


def mean_divisor(options: Options, counts: Counts) -> tuple[Array, Array]:
    """What the sum of the losses is divided by; and whether that is nothing: then the mean is 0, with gradient 0."""
    if options.reduction == "sum":
        return jnp.ones((), counts.weight.dtype), jnp.zeros((), jnp.bool_)
    divisor = jnp.sum(counts.weight)
    if options.reduction == "mean_count":
        divisor = jnp.sum(counts.counted.astype(divisor.dtype))
    divisor = sum_over(divisor, options.batch_axis_name)
    nothing = divisor == 0
    return select(nothing, 1, divisor), nothing


def mean_or_0(mean: Array, nothing: Array) -> Array:
    """0 over nothing, but NaN stays: labels that are no class may weigh nothing where classes are split."""
    return select(nothing & ~jnp.isnan(mean), jnp.zeros_like(mean), mean)


def zero_if_too_large(x: Array, unused: Array) -> Array:
    """`x`, but 0 in unused rows where it is not finite or so large that its square or a sum of such might not be."""
    unused = jnp.broadcast_to(unused.reshape(unused.shape + (1,) * (x.ndim - unused.ndim)), x.shape)
    limit = 1e-3 * float(jnp.finfo(x.dtype).max) ** 0.5
    return select(unused & ~(jnp.abs(x) < limit), jnp.zeros_like(x), x)


def _class_count(classes: Array | None, num_classes: int, dtype: jnp.dtype) -> Array:
    if classes is None:
        return jnp.asarray(num_classes, dtype)
    return jnp.maximum(classes, 1).astype(dtype)
