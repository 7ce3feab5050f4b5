"""Distillation: the divergence of a student's distribution from its teacher's, both given as logits."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce import checks
from jaxce.arguments import Examples, Options, Shared, checked_options
from jaxce.autodiff import log_sum_exp
from jaxce.compose import compose, who_counts
from jaxce.divergence import (
    KINDS,
    Divergence,
    Models,
    Row,
    Side,
    compare,
    divergence_of,
    finish,
    gradient,
    side_of,
    sums,
    temperature_gradient,
)
from jaxce.layout import class_count, classes_last, sharded_alike
from jaxce.on_cpu import written
from jaxce.reverse_mode import reverse_mode_only
from jaxce.sharding import mask_like, shard_count, sum_over, vary, varying
from jaxce.stats import Terms, finite, merge_shards, tempered, working_dtype
from jaxce.sums import Rows, effective, row_stats
from jaxce.types import ArrayLike, Axis, AxisName, DivergenceName, Implementation, Reduction, takes_variables


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Constants of the compiled program; the options of the teacher have its soft cap."""

    divergence: Divergence
    options: Options
    teacher_options: Options

    @property
    def of_models(self) -> Models[Options]:
        return Models(self.options, self.teacher_options)


@takes_variables
def distillation_loss(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    temperature: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    reduction: Reduction = "none",
    axis_name: AxisName = None,
    batch_axis_name: AxisName = None,
    implementation: Implementation | None = None,
) -> Array:
    r"""The divergence between a student's distribution and its teacher's, both given as logits.

    With teacher :math:`p`, student :math:`q` and :math:`m = \beta p + (1-\beta)\,q`, the loss of one example is

    .. math::
        \operatorname{KL}(p\,\|\,q) = \sum_c p_c \log \frac{p_c}{q_c}, \qquad
        \operatorname{KL}(q\,\|\,p) \qquad\text{or}\qquad
        \beta \operatorname{KL}(p\,\|\,m) + (1-\beta) \operatorname{KL}(q\,\|\,m)

    computed as a sum of terms that are not negative: of two models that nearly agree it has its digits, and of two that
    agree it is exactly 0.

    The teacher is a constant: its gradient is 0.

    Args:
      logits: the student's, floats of 8 to 64 bits, `[..., V]`; the class axis may be anywhere, see `axis`. −inf means
        probability 0.
      teacher_logits: the teacher's, floats of any such dtype, of the shape of logits.
      axis: the class axis. A tuple of axes makes them one class axis; None means all axes.
      where: bools that broadcast to the shape of logits: the classes that take part, in both models. Of the batch
        shape: the examples that take part.
      divergence: `"forward_kl"`, KL(p‖q), whose student covers all that the teacher does; `"reverse_kl"`, KL(q‖p),
        whose student keeps to what is likely for the teacher; `"jsd"`, the generalised Jensen-Shannon divergence.
      beta: β of `"jsd"`, a Python number from 0 to 1. 0 stands for the forward and 1 for the reverse divergence,
        as in other libraries (near them the formula is β, and 1 − β, times these).
      temperature: T > 0, a number or numbers that broadcast to the batch shape: the logits of both models are divided
        by it (after the soft caps). The loss is differentiable in it. The usual factor T² is not applied: multiply the
        loss by it, so that the gradient does not shrink as T grows.
      weights: numbers that broadcast to the batch shape, one weight per example; 0 leaves it out.
      logit_softcap, teacher_logit_softcap: Python numbers c > 0: the student's, and the teacher's, logits become
        c·tanh(logits/c) (before `where`).
      reduction: `"none"`: the batch shape. `"sum"`. `"mean"`: the sum divided by the sum of the weights.
        `"mean_count"`: the sum divided by the number of examples that take part. A mean over nothing is 0, with
        gradient 0.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes, major first) that the classes are split over. Both
        models' logits and `where` are then this device's share. Devices exchange a few numbers per example.
      batch_axis_name: inside `jax.shard_map`, the mesh axis (or axes) that the examples are split over, to reduce over
        all of them: the same number on every device.
      implementation: `"xla"` (the default) has a hand-written reverse-mode rule, which itself can be differentiated;
        `"autodiff"` is the same loss in plain JAX, for forward mode (jvp, jacfwd, linearize).

    Returns:
      The loss in nats, float64 if either model's logits are and float32 otherwise. KL(p‖q) is +inf where a class has
      probability 0 for the student and not for the teacher, KL(q‖p) the other way about; a class of probability 0 for
      both changes nothing. A NaN logit of either model, or a row of nothing but −inf, gives NaN and a NaN gradient row.
      Examples that are masked or have weight 0 give exactly 0 and gradient exactly 0, even if their logits are NaN.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range; the message says what to do.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> logits, teacher_logits = jnp.array([[2.0, 0.5, 0.1]]), jnp.array([[2.5, 0.2, 0.4]])
      >>> print(jaxce.distillation_loss(logits, teacher_logits, temperature=2.0))
      [0.01233179]
      >>> jsd = jaxce.distillation_loss(logits, teacher_logits, divergence="jsd", beta=0.1, reduction="mean")
      >>> print(f"{jsd:.6f}")
      0.002747

    Note:
      Hinton et al., "Distilling the Knowledge in a Neural Network", 2015. The generalised Jensen-Shannon divergence:
      Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024.
    """
    logits, teacher_logits = (
        checks.float_array(name, x) for name, x in (("logits", logits), ("teacher_logits", teacher_logits))
    )
    if teacher_logits.shape != logits.shape:
        expected = f"the shape of logits, {logits.shape}"
        checks.fail(ValueError, "teacher_logits", expected, checks.describe(teacher_logits))
    axes = checks.class_axes(axis, logits.ndim)
    checks.num_classes("logits", math.prod(logits.shape[i] for i in axes))
    checks.one_of("divergence", divergence, KINDS)
    checks.beta(beta, divergence)
    if teacher_logit_softcap is not None:
        checks.softcap("teacher_logit_softcap", teacher_logit_softcap)
        teacher_logit_softcap = float(teacher_logit_softcap)
    examples, _, options = checked_options(
        logits.shape,
        axes,
        _joint_dtype(logits, teacher_logits),
        where=where,
        weights=weights,
        logit_softcap=logit_softcap,
        temperature=temperature,
        reduction=reduction,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        implementation=implementation,
    )
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        checks.split_over(name, x, options.axis_name, "classes")
        checks.split_over(name, x, options.batch_axis_name, "examples")
    teacher_options = dataclasses.replace(options, logit_softcap=teacher_logit_softcap)
    constants = Distillation(divergence_of(divergence, float(beta)), options, teacher_options)
    # The teacher goes where probability targets would: it has their shape, and moves and is sharded as they are.
    result: Array = _loss(logits, examples._replace(probs=teacher_logits), axes=axes, of=constants)
    return result


def _joint_dtype(logits: Array, teacher_logits: Array) -> jnp.dtype:
    return max(working_dtype(logits.dtype), working_dtype(teacher_logits.dtype), key=lambda dtype: dtype.itemsize)


@functools.partial(jax.jit, static_argnames=("axes", "of"))
def _loss(logits: Array, examples: Examples, *, axes: tuple[int, ...], of: Distillation) -> Array:
    examples, _ = sharded_alike(logits, examples, Shared(), axes)
    logits, examples = classes_last(logits, examples, axes)
    options, names = of.options, of.options.axis_name
    assert examples.probs is not None
    dtype, where, V = _joint_dtype(logits, examples.probs), examples.where, logits.shape[-1]
    models = Models(logits, examples.probs)
    classes = None if where is None else sum_over(class_count(where, logits.shape), names)
    if options.implementation == "autodiff":
        # Without a rule of its own, the derivative of a row is only kept from NaN by never computing with it.
        if where is not None:
            models = Models(*(jnp.where(mask_like(where, z), z, jnp.zeros_like(z)) for z in models))
        largest = Models(*(jnp.max(z, -1, keepdims=True) for z in models))
        unused = who_counts(options, examples, Shared(), largest.student[..., 0].astype(dtype), classes).unused
        fine = [jnp.all(jnp.isfinite(m - z), -1) for m, z in zip(largest, models, strict=True)]
        bad = sum_over((~(fine[0] & fine[1])).astype(jnp.int32), names) > 0
        models = Models(*(_zero_unless(~(unused & bad), z) for z in models))
    rows = models, Examples(where=where, temperature=examples.temperature)
    rows = vary(rows, varying(rows))
    if options.implementation == "autodiff":
        value = _plain(of, *rows)
    else:
        models, rest = rows
        student, rest = reverse_mode_only((models.student, rest))
        value = row_divergence(of, models._replace(student=student), rest)
    counts = who_counts(options, examples, Shared(), value, classes)
    terms = Terms(jnp.zeros_like(value), value)
    return cast(Array, compose(options, terms, examples, Shared(), counts, V * shard_count(names)))


def _zero_unless(kept: Array, x: Array) -> Array:
    """Rows of `x [..., V]` or numbers of rows."""
    kept = kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim))
    return jnp.where(mask_like(kept, x), x, jnp.zeros_like(x))


def _plain(of: Distillation, models: Models[Array], examples: Examples) -> Array:
    """The divergence of each row in plain differentiable JAX."""
    names, temperature = of.options.axis_name, examples.temperature

    def side(z: Array) -> Side:
        largest = lax.stop_gradient(jnp.max(z, -1))
        largest = lax.pmax(largest, names) if names else largest
        below = z - largest[..., None]
        log_sum = log_sum_exp(below if temperature is None else tempered(below, temperature[..., None], None), names)
        return Side(largest, log_sum, jnp.exp(-log_sum))

    z = _effective(of, models, examples)
    z = Models(*(x + jnp.where(x == jnp.inf, jnp.nan, 0) for x in z))
    return _row(of, z, Models(*map(side, z)), examples).value


def _row(of: Distillation, z: Models[Array], sides: Models[Side], examples: Examples) -> Row:
    total = sums(of.divergence, compare(z, sides, examples.temperature))
    return finish(of.divergence, sum_over(total, of.options.axis_name))


def _effective(of: Distillation, models: Models[Array], examples: Examples, kept: Array | None = None) -> Models[Array]:
    """Capped and masked, but not divided; 0 in rows that are not to be kept."""
    dtype, models = _joint_dtype(*models), models._replace(teacher=lax.stop_gradient(models.teacher))
    pairs = zip(of.of_models, models, strict=True)
    z = (effective(options, Rows(x.astype(dtype), where=examples.where)) for options, x in pairs)
    return Models(*(x if kept is None else _zero_unless(kept, x) for x in z))


# --- the primitive --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def row_divergence(of: Distillation, models: Models[Array], examples: Examples) -> Array:
    """The divergence of each row of logits, of which `examples` has the mask and the temperature.

    With the classes split over devices, the logits are of this device's classes, and the divergence is of all of them.
    Differentiable in the student's logits and the temperature. The residuals are the arguments and per-row numbers.
    """
    return _forward(of, models, examples)[0]


class _Rows(NamedTuple):
    """What the backward pass knows of rows: 0 for what is not finite, and which of both records and divergences are."""

    sides: Models[Side]
    row: Row
    sound: Array
    bounded: Array


def _forward(of: Distillation, models: Models[Array], examples: Examples) -> tuple[Array, _Rows]:
    dtype, models = _joint_dtype(*models), models._replace(teacher=lax.stop_gradient(models.teacher))
    records = [_side(options, x, examples, dtype) for options, x in zip(of.of_models, models, strict=True)]
    sound = records[0][1] & records[1][1]
    sides = Models(*(side for side, _ in records))
    sides = written(jax.tree.map(functools.partial(_zero_unless, sound), sides))
    row = _row(of, _effective(of, models, examples, sound), sides, examples)
    bounded = jnp.isfinite(row.value)
    value = jnp.where(sound, row.value, jnp.nan)
    return value, _Rows(sides, jax.tree.map(functools.partial(_zero_unless, sound & bounded), row), sound, bounded)


def _side(options: Options, logits: Array, examples: Examples, dtype: jnp.dtype) -> tuple[Side, Array]:
    """What the classes of a row have in common, and whether it has a finite maximum and sum."""
    names, offset = options.axis_name, None
    rows = Rows(logits if working_dtype(logits.dtype) == dtype else logits.astype(dtype), where=examples.where)
    if examples.temperature is not None:
        offset = lax.stop_gradient(jnp.max(effective(options, rows), -1).astype(dtype))
        offset = lax.pmax(offset, names) if names else offset
        offset = jnp.where(jnp.isfinite(offset), offset, 0)
        rows = rows._replace(temperature=examples.temperature[..., None], offset=offset[..., None])
    stats, sound = finite(merge_shards(row_stats(options, rows), names))
    return side_of(stats, offset), sound


_Residuals = tuple[Models[Array], Examples, _Rows]


def _fwd(of: Distillation, models: Models[Array], examples: Examples) -> tuple[Array, _Residuals]:
    value, rows = _forward(of, models, examples)
    return value, (models, examples, rows)


def _bwd(of: Distillation, residuals: _Residuals, ct: Array) -> tuple[Models[Array | None], Examples]:
    models, examples, (sides, row, sound, bounded) = residuals
    logits, temperature = models.student, examples.temperature
    # Nothing depends on a dead row, so it gives 0, whatever it holds; one on which something does may give NaN.
    dead = ~(sound & bounded) & (ct == 0)
    kept = sound & ~dead
    scale = jnp.where(kept, ct, jnp.where(dead, 0, jnp.nan))
    row = jax.tree.map(lambda x: jnp.where(bounded | dead, x, jnp.inf), row)._replace(slip=row.slip)
    sides = written(jax.tree.map(functools.partial(_zero_unless, kept), sides))
    pair = compare(_effective(of, models, examples, kept), sides, temperature)
    student = gradient(of.divergence, pair, row)
    dz, dtemperature = scale[..., None] * student, None
    if temperature is not None:
        dz = dz / temperature[..., None]
        dtemperature = scale * temperature_gradient(of.divergence, pair, row, student) / temperature
    if (cap := of.options.logit_softcap) is not None:
        t = jnp.tanh(_zero_unless(kept, logits.astype(ct.dtype)) / cap)
        dz = dz * ((1 - t) * (1 + t))
    if examples.where is not None:  # last: a masked logit may be NaN
        dz = jnp.where(mask_like(examples.where, dz), dz, jnp.zeros_like(dz))
    return Models(dz.astype(logits.dtype), None), Examples(temperature=dtemperature)


row_divergence.defvjp(_fwd, _bwd)
