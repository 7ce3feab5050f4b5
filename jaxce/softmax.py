"""Softmax cross-entropy on logits: the public functions, and the primitive whose backward rule they share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack, cast, overload

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce import autodiff, checks, types
from jaxce.arguments import Examples, Options, Shared, checked, of_nll, of_terms, with_targets_checked
from jaxce.compose import Counts, CrossEntropyAux, compose, usable_probs, usable_temperature, who_counts
from jaxce.gradient import factors, gradient, without_unused_tail
from jaxce.layout import class_count, classes_last, sharded_alike
from jaxce.on_cpu import written
from jaxce.reverse_mode import reverse_mode_only
from jaxce.selection import select
from jaxce.sharding import mask_like, on_this_device, shard_count, shard_start, sum_over, vary, varying
from jaxce.stats import RowStats, Terms, finish, finite, merge_argmax, merge_shards, working_dtype
from jaxce.sums import Rows, effective, row_stats, rows_of
from jaxce.targets import Targets
from jaxce.types import ArrayLike, Axis, AxisName, Implementation, Reduction, takes_variables


class DenseOptions(types.CommonOptions[ArrayLike], total=False):
    implementation: Implementation | None
    labels: Targets


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: Targets | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_aux: Literal[True],
    **options: Unpack[DenseOptions],
) -> tuple[Array, CrossEntropyAux]: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: Targets | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_aux: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Array: ...


@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: Targets | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_aux: bool,
    **options: Unpack[DenseOptions],
) -> Array | tuple[Array, CrossEntropyAux]: ...


@takes_variables
def softmax_cross_entropy(
    logits: ArrayLike,
    targets: Targets | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    logit_softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Reduction = "none",
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    return_aux: bool = False,
    implementation: Implementation | None = None,
    labels: Targets | None = None,
) -> Array | tuple[Array, CrossEntropyAux]:
    r"""Softmax cross-entropy between logits and class indices, probabilities or sparse probabilities.

    For logits :math:`z`, target :math:`t` and smoothing :math:`\varepsilon`, with
    :math:`t' = (1-\varepsilon)\,t + \varepsilon/V` and class weights :math:`w`, the loss of one example is

    .. math::
        \ell = \sum_c w_c\, t'_c\, (\operatorname{lse}(z) - z_c) + \lambda \operatorname{lse}(z)^2,
        \qquad \operatorname{lse}(z) = \log \sum_c e^{z_c}

    computed relative to the largest logit, so that a common offset changes no digit of it and a small loss keeps all
    of its digits. The gradient for an index target is :math:`p_c` for the other classes and minus their sum for the
    target, never :math:`p_y - 1`.

    Args:
      logits: floats of 8 to 64 bits, `[..., V]`; the class axis may be anywhere, see `axis`. −inf means
        probability 0.
      targets: integers of any dtype and of the batch shape `[...]` (the shape of logits without the class axis), from 0
        to V-1; or floats of exactly the shape of logits, probabilities that sum to 1 along the class axis; or
        `jaxce.SparseTargets`. They are never broadcast. Probabilities are computed with as they are, whatever their sum
        and sign (weights multiplied in, negative smoothing), and the loss may then be negative. Rows that must be
        logits instead are an error: with entries of both signs that sum to neither 0 nor 1, with a −inf, or the
        logarithms of probabilities. They are looked for without `where` and `weights`, under
        `jax.experimental.checkify` or, outside of a trace, in up to 65,536 entries on the CPU; elsewhere the loss of
        such targets is a number that means nothing.
      axis: the class axis. A tuple of axes makes them one class axis, row-major (index targets are then flat indices);
        None means all axes.
      where: bools that broadcast to the shape of logits: the classes that take part. The others get no probability and
        no gradient and are not counted in V; a target on one makes the loss +inf. Of the batch shape: the
        examples that take part.
      weights: numbers that broadcast to the batch shape, one weight per example.
      class_weights: `[V]`, a weight per class, as in torch.
      label_smoothing: ε in [0, 1].
      ignore_index: examples with this label count for nothing, whatever their logits hold. Any integer.
      z_loss: λ >= 0, the coefficient of lse(z)².
      logit_softcap: a Python number c > 0: the logits become c·tanh(logits/c) (before `where`).
      temperature: T > 0, a number or numbers that broadcast to the batch shape: the logits are divided by it (after the
        soft cap). The loss is differentiable in it; no factor of T² is put in front.
      reduction: `"none"`: the batch shape. `"sum"`. `"mean"`: the sum divided by the sum of the weights that were
        applied (`weights` times the class weight of the target). `"mean_count"`: the sum divided by the number of
        examples that are not ignored. A mean over nothing is 0, with gradient 0: where all are ignored, and where
        the weights sum to 0, even if some of them are not 0 themselves.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes, major first) that the classes are split over. `logits`,
        `where`, `class_weights` and probability targets are then this device's share, in the order of the devices;
        class indices are global. Devices exchange a few numbers per example.
      batch_axis_name: inside `jax.shard_map`, the mesh axis (or axes) that the examples are split over, to reduce over
        all of them: the same number on every device.
      return_aux: also return a `jaxce.CrossEntropyAux`.
      implementation: `"xla"` (the default) has a hand-written reverse-mode rule, which itself can be differentiated;
        `"autodiff"` is the same loss in plain JAX, for forward mode (jvp, jacfwd, linearize).
      labels: optax's name for `targets`: give one of the two.

    Returns:
      The loss in nats, float64 for float64 logits and float32 for all others; with `return_aux`, `(loss, aux)`.
      A label outside 0..V-1, a NaN logit, or a row of nothing but −inf gives NaN and a NaN gradient row (under
      `jax.experimental.checkify`, such a label is an error). Examples that are ignored or have weight 0 give exactly 0
      and gradient exactly 0, even if their logits are NaN.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range; the message says what to do.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> labels = jnp.array([0, 1])
      >>> print(jaxce.softmax_cross_entropy(logits, labels))
      [0.2761297 2.951799 ]
      >>> print(jaxce.softmax_cross_entropy(logits, labels, label_smoothing=0.1, reduction="mean"))
      1.6022977

    Note:
      Label smoothing: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7.
      z-loss: Zoph et al., "ST-MoE", 2022, equation 5, applied to the output logits as in PaLM (2022), section 5.
      Soft cap: Gemma 2 (2024), section 2.
    """
    if (targets is None) == (labels is None):
        got = "neither" if targets is None else "both"
        expected = "class indices, probabilities or jaxce.SparseTargets, as targets or (optax's name for them) labels"
        checks.fail(TypeError, "targets", expected, got)
    return _checked_loss(
        logits,
        labels if targets is None else targets,
        axis,
        where,
        "targets" if labels is None else "labels",
        weights=weights,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        temperature=temperature,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        return_aux=return_aux,
        implementation=implementation,
    )


@takes_variables
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike, labels: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Array:
    r"""Softmax cross-entropy between logits and class indices, under optax's name and with its arguments.

    .. math:: \ell = \operatorname{lse}(z) - z_y

    Args:
      logits: floats `[..., V]`; the class axis may be anywhere, see `axis`.
      labels: integers of the batch shape, from 0 to V-1.
      axis: the class axis, or a tuple of axes that hold the classes row-major.
      where: the classes (or, of the batch shape, the examples) that take part.

    Returns:
      The loss in nats, of the batch shape; float64 for float64 logits, float32 for all others.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> print(jaxce.softmax_cross_entropy_with_integer_labels(jnp.array([[0.0, -20.0]]), jnp.array([0])))
      [2.0611537e-09]

    Note:
      `optax.losses.softmax_cross_entropy_with_integer_labels`. `jaxce.softmax_cross_entropy` takes the same labels
      and has the options.
    """
    if not checks.is_integers(labels):
        ndim = checks.float_array("logits", logits, labels, "labels").ndim
        checks.not_labels("labels", labels, ndim, "Probabilities go to jaxce.softmax_cross_entropy.")
    return cast(Array, _checked_loss(logits, labels, axis, where, targets_name="labels"))


def _checked_loss(
    logits: Any, targets: Any, axis: Any, where: Any, targets_name: str = "targets", **options: Any
) -> Array | tuple[Array, CrossEntropyAux]:
    logits = checks.float_array("logits", logits, targets, targets_name)
    axes = checks.class_axes(axis, logits.ndim)
    checks.num_classes("logits", math.prod(logits.shape[i] for i in axes))
    examples, shared, constants = checked(
        targets, logits.shape, axes, logits.dtype, targets_name, where=where, **options
    )
    checks.split_over("logits", logits, constants.axis_name, "classes")
    checks.split_over("logits", logits, constants.batch_axis_name, "examples")
    result = _loss(logits, examples, shared, axes=axes, options=constants)
    return cast(
        "Array | tuple[Array, CrossEntropyAux]", with_targets_checked(result, targets, examples, axes, constants)
    )


@functools.partial(jax.jit, static_argnames=("axes", "options"))
def _loss(
    logits: Array, examples: Examples, shared: Shared, *, axes: tuple[int, ...], options: Options
) -> Array | tuple[Array, CrossEntropyAux]:
    examples, shared = sharded_alike(options, logits, examples, shared, axes)
    logits, examples = classes_last(logits, examples, axes)
    return loss_of_logits(options, logits, examples, shared)


def loss_of_logits(
    options: Options, logits: Array, examples: Examples, shared: Shared
) -> Array | tuple[Array, CrossEntropyAux]:
    """The loss, from checked arguments with the classes last."""
    if examples.indices is None and examples.probs is not None and shared.class_weights is not None:
        # Several uses below, of logits too with aux: their gradients must not be rounded before they are added.
        dtype = shared.class_weights.dtype
        examples = examples._replace(probs=examples.probs.astype(dtype))
        if options.return_aux:
            logits = logits.astype(dtype)
    rows = rows_of_logits(options, logits, examples, shared)
    num_classes = logits.shape[-1] * shard_count(options.axis_name)
    given = options, rows.terms, examples, shared, rows.counts, num_classes
    return compose(*given, unweighted=rows.unweighted, prediction=rows.prediction)


class RowsOfLogits(NamedTuple):
    """What a loss is composed from: see there."""

    terms: Terms
    counts: Counts
    unweighted: Array | None
    prediction: Array | None


def rows_of_logits(options: Options, logits: Array, examples: Examples, shared: Shared) -> RowsOfLogits:
    axes, V = options.axis_name, logits.shape[-1]
    classes = None if examples.where is None else sum_over(class_count(examples.where, logits.shape), axes)
    if examples.temperature is not None or options.implementation == "autodiff":
        largest = jnp.max(effective(options, Rows(logits, where=examples.where)), -1)
        largest = lax.stop_gradient(largest.astype(working_dtype(logits.dtype)))
        largest = lax.pmax(largest, axes) if axes else largest
        counts = who_counts(options, examples, shared, largest, classes)
        examples = usable_temperature(options, examples, counts)
        if options.implementation == "autodiff":
            logits, examples = _without_bad(options, logits, examples, shared, counts, largest)
        if examples.temperature is not None:
            examples = examples._replace(offset=select(jnp.isfinite(largest), largest, 0))
    own, own_shared = of_terms(options, examples, shared)
    if own.indices is not None:
        own = own._replace(indices=on_this_device(own.indices, V, axes))
    rows = logits, own, own_shared
    rows = vary(rows, varying(rows))
    terms_of: Callable[..., Terms] = autodiff.terms
    if options.implementation != "autodiff":
        terms_of, rows = softmax_terms, reverse_mode_only(rows)
    terms = terms_of(options, *rows)
    if examples.temperature is not None and examples.offset is not None:
        # A NaN is in the log-normalizer already, and must not turn a cotangent of 0 into NaN.
        temperature = select(jnp.isnan(examples.temperature), 1, examples.temperature)
        terms = terms._replace(log_normalizer=terms.log_normalizer + examples.offset / temperature)
    counts = who_counts(options, examples, shared, terms.log_normalizer, classes)
    unweighted = prediction = None
    if (without := of_nll(options, *rows[1:])) is not None:
        unweighted = terms_of(without[0], rows[0], *without[1:]).target
    if options.return_aux:
        z = effective(Options(), Rows(logits, where=examples.where))
        argmax = jnp.argmax(z, -1).astype(jnp.int32) + shard_start(V, axes)
        prediction = merge_argmax(jnp.max(z, -1).astype(working_dtype(z.dtype)), argmax, axes)
    return RowsOfLogits(terms, counts, unweighted, prediction)


def _without_bad(
    options: Options, logits: Array, examples: Examples, shared: Shared, counts: Counts, largest: Array
) -> tuple[Array, Examples]:
    """Harmless numbers in unused rows that are not sound: without a rule of its own, a derivative is only kept from
    NaN by never computing with one.
    """
    z = effective(options, Rows(logits, where=examples.where)).astype(largest.dtype)
    none = z == -jnp.inf  # a class of probability 0 is sound
    bad = ~jnp.all(none | jnp.isfinite(largest[..., None] - z), -1)
    bad = (sum_over(bad.astype(jnp.int32), options.axis_name) > 0) | ~jnp.isfinite(largest)
    examples = usable_probs(options, examples, counts)
    if options.label_smoothing:  # which is infinite at such a class
        some = ~(counts.unused[..., None] & none)
        examples = examples._replace(where=some if examples.where is None else mask_like(examples.where, z) & some)
    if examples.indices is None and (probs := examples.probs) is not None:  # such a class has an infinite term
        weighs = none & (probs != 0)
        if shared.class_weights is not None:
            weighs &= jnp.broadcast_to(shared.class_weights != 0, probs.shape)
        infinite = sum_over(jnp.any(weighs, -1).astype(jnp.int32), options.axis_name) > 0
        gone = (counts.unused & infinite)[..., None]
        examples = examples._replace(probs=select(gone, jnp.zeros_like(probs), probs))
    return select((counts.unused & bad)[..., None], jnp.zeros_like(logits), logits), examples


# --- the primitive --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def softmax_terms(options: Options, logits: Array, examples: Examples, shared: Shared) -> Terms:
    """The terms of each row of logits, for what `jaxce.arguments.of_terms` leaves of the arguments.

    With the classes split over devices, all of it is of this device's classes, numbered from 0, and the terms are of
    all of them.
    Differentiable in logits, probabilities and class weights. The residuals are the arguments and per-row numbers.
    """
    return _terms_and_record(False, options, logits, examples, shared)[0]


def _terms_and_record(
    keep: bool, options: Options, logits: Array, examples: Examples, shared: Shared
) -> tuple[Terms, RowStats]:
    stats = row_stats(options, rows_of(options, logits, examples, shared), keep)
    stats = merge_shards(stats, options.axis_name)
    return written(finish(stats)), stats


_Residuals = tuple[Array, Examples, Shared, RowStats, Array]


def _terms_fwd(options: Options, *perturbed: Any) -> tuple[Terms, _Residuals]:
    logits, examples, shared = jax.tree.map(lambda x: x.value, perturbed)
    terms, stats = _terms_and_record(not options.axis_name, options, logits, examples, shared)
    return terms, (logits, examples, shared, *finite(stats))


def _terms_bwd(options: Options, residuals: _Residuals, ct: Terms) -> tuple[Array, Examples, Shared]:
    logits, examples, shared, stats, alive = residuals
    of_rows = written(factors(examples.indices, stats, alive, without_unused_tail(ct)))
    dlogits, dexamples, dshared = gradient(options, logits, examples, shared, of_rows, again=not options.axis_name)
    if examples.probs is not None and dexamples.probs is not None:
        dexamples = dexamples._replace(probs=dexamples.probs.astype(examples.probs.dtype))
    return dlogits, dexamples, dshared


softmax_terms.defvjp(_terms_fwd, _terms_bwd, symbolic_zeros=True)
