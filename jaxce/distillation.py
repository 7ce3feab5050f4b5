"""Distillation: the divergence of a student's distribution from its teacher's, both given as logits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce import checks
from jaxce.arguments import Examples, Options, Shared, checked_options
from jaxce.autodiff import log_sum_exp
from jaxce.compose import Counts, compose, usable_temperature, who_counts
from jaxce.divergence import (
    KINDS,
    Divergence,
    Models,
    Row,
    Side,
    Sums,
    compare,
    divergence_of,
    divergence_of_log_probs,
    finish,
    gradient,
    side_of,
    sums,
    temperature_gradient,
)
from jaxce.layout import class_count, classes_last, sharded_alike
from jaxce.log_probabilities import LogProbsAux, log_probs
from jaxce.lookup import repeated_entries, sums_of_same
from jaxce.on_cpu import written
from jaxce.reverse_mode import reverse_mode_only
from jaxce.selection import select
from jaxce.sharding import (
    alike,
    explicit_mesh,
    mask_like,
    place_together,
    shard_count,
    spec_of,
    sum_over,
    taking_part,
    vary,
    varying,
)
from jaxce.stats import Terms, finite, merge_shards, tempered, working_dtype
from jaxce.sums import Rows, effective, row_stats
from jaxce.targets import SparseTargets, Targets, checked_sparse, is_class
from jaxce.types import (
    ArrayLike,
    Axis,
    AxisName,
    DivergenceName,
    Implementation,
    Reduction,
    array_of,
    takes_variables,
)


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
    teacher_logits: Targets,
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
    tail: bool = True,
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
      teacher_logits: the teacher's, floats of any such dtype, of the shape of logits; or, of a teacher of whom no more
        is known than its K most likely classes, `jaxce.SparseTargets` with their probabilities, taken as they are.
      axis: the class axis. A tuple of axes makes them one class axis; None means all axes.
      where: bools that broadcast to the shape of logits: the classes that take part, in both models (but a teacher of K
        classes keeps the probabilities of those it names). Of the batch shape: the examples that take part.
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
      tail: for a teacher of K classes: whether what their probabilities leave, 1 − Σ p, is one more class, beside the
        student's probability of all the others; a sum above 1.01 gives NaN. Where they round to 1, KL(q‖p) is +inf.
        False: the others have probability 0 for the teacher, and the loss, Σ p log(p/q) of the K classes, may be
        negative.

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
    logits = checks.float_array("logits", logits)
    axes = checks.class_axes(axis, logits.ndim)
    checks.num_classes("logits", math.prod(logits.shape[i] for i in axes))
    options: dict[str, Any] = {
        "divergence": divergence,
        "beta": beta,
        "teacher_logit_softcap": teacher_logit_softcap,
        "where": where,
        "weights": weights,
        "logit_softcap": logit_softcap,
        "temperature": temperature,
        "reduction": reduction,
        "axis_name": axis_name,
        "batch_axis_name": batch_axis_name,
        "implementation": implementation,
    }
    checks.one_of("tail", tail, (False, True))
    if isinstance(teacher_logits, SparseTargets):
        _, split_batch = checks.mesh_axes(axis_name, batch_axis_name, reduction)
        checks.split_over("logits", logits, split_batch, "examples")

        def of_student(_unused: Array, **given: Any) -> tuple[Array, LogProbsAux]:
            found: tuple[Array, LogProbsAux] = log_probs(logits, axis=axis, **given)
            return found

        given = of_student, "teacher_logits", teacher_logits, tail, logits.shape, axes, logits.dtype, options
        return top_k_loss(*given, logits)
    teacher_logits = checks.float_array("teacher_logits", teacher_logits)
    if teacher_logits.shape != logits.shape:
        expected = f"the shape of logits, {logits.shape}"
        checks.fail(ValueError, "teacher_logits", expected, checks.describe(teacher_logits))
    examples, constants = checked_distillation(logits.shape, axes, _joint_dtype(logits, teacher_logits), **options)
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        checks.split_over(name, x, constants.options.axis_name, "classes")
        checks.split_over(name, x, constants.options.batch_axis_name, "examples")
    if isinstance(teacher_logits, jax.core.Tracer):  # others have no derivative
        teacher_logits = lax.stop_gradient(teacher_logits)
    # The teacher goes where probability targets would: it has their shape, and moves and is sharded as they are.
    result: Array = _loss(logits, examples._replace(probs=teacher_logits), axes=axes, of=constants)
    return result


def checked_distillation(
    full: tuple[Any, ...],
    class_axes: Sequence[int],
    dtype: DTypeLike,
    *,
    divergence: Any,
    beta: Any,
    teacher_logit_softcap: Any,
    **options: Any,
) -> tuple[Examples, Distillation]:
    """Checks what goes with two models' logits of shape `full`, of which this is the wider dtype."""
    checks.one_of("divergence", divergence, KINDS)
    checks.beta(beta, divergence)
    if teacher_logit_softcap is not None:
        checks.softcap("teacher_logit_softcap", teacher_logit_softcap)
        teacher_logit_softcap = float(teacher_logit_softcap)
    examples, _, constants = checked_options(full, class_axes, dtype, **options)
    teacher = dataclasses.replace(constants, logit_softcap=teacher_logit_softcap)
    return examples, Distillation(divergence_of(divergence, float(beta)), constants, teacher)


def _joint_dtype(logits: Array, teacher_logits: Array) -> jnp.dtype:
    return max(working_dtype(logits.dtype), working_dtype(teacher_logits.dtype), key=lambda dtype: dtype.itemsize)


@functools.partial(jax.jit, static_argnames=("axes", "of"))
def _loss(logits: Array, examples: Examples, *, axes: tuple[int, ...], of: Distillation) -> Array:
    examples, _ = sharded_alike(of.options, logits, examples, Shared(), axes)
    logits, examples = classes_last(logits, examples, axes)
    assert examples.probs is not None
    return loss_of_models(of, Models(logits, examples.probs), examples._replace(probs=None))


def loss_of_models(of: Distillation, models: Models[Array], examples: Examples) -> Array:
    """The loss, from checked arguments with the classes last."""
    options, names = of.options, of.options.axis_name
    where = examples.where
    classes = None if where is None else sum_over(class_count(where, models.student.shape), names)
    like = lax.stop_gradient(jnp.max(models.student, -1)).astype(_joint_dtype(*models))
    like = lax.pmax(like, names) if names else like
    counts = who_counts(options, examples, Shared(), like, classes)
    examples = usable_temperature(options, examples, counts)
    if options.implementation == "autodiff":
        models = Models(*(taking_part(where, z) for z in models))
    rows = models, Examples(where=where, temperature=examples.temperature)
    rows = vary(rows, varying(rows))
    if options.implementation == "autodiff":
        # Without a rule of its own, the derivative of a row is only kept from NaN by never computing with it.
        fine = jnp.isfinite(_plain(of, *jax.tree.map(lax.stop_gradient, rows))) | ~counts.unused
        models, rest = rows
        value = _plain(of, Models(*(_zero_unless(fine, z) for z in models)), rest)
    else:
        models, rest = rows
        student, rest = reverse_mode_only((models.student, rest))
        value = row_divergence(of, models._replace(student=student), rest)
    return composed(of, value, examples, counts)


def composed(of: Distillation, value: Array, examples: Examples, counts: Counts) -> Array:
    """The loss, from the divergence of each row."""
    terms = Terms(jnp.zeros_like(value), value)
    num_classes = 1  # of which nothing depends without smoothing and class indices
    return cast(Array, compose(of.options, terms, examples, Shared(), counts, num_classes))


def _zero_unless(kept: Array, x: Array) -> Array:
    """Rows of `x [..., V]` or numbers of rows."""
    kept = kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim))
    return select(mask_like(kept, x), x, jnp.zeros_like(x))


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
    z = Models(*(x + select(x == jnp.inf, jnp.nan, 0) for x in z))
    total = sums(of.divergence, compare(z, Models(*map(side, z)), temperature))
    return finish(of.divergence, sum_over(total, names)).value


def _effective(of: Distillation, models: Models[Array], examples: Examples, kept: Array | None = None) -> Models[Array]:
    """Capped and masked, but not divided; 0 in rows that are not to be kept."""
    dtype, models = _joint_dtype(*models), models._replace(teacher=lax.stop_gradient(models.teacher))
    pairs = zip(of.of_models, models, strict=True)
    z = (effective(options, Rows(x.astype(dtype), where=examples.where)) for options, x in pairs)
    return Models(*(x if kept is None else _zero_unless(kept, x) for x in z))


# --- a teacher of K classes -----------------------------------------------------------------------------------------

_MOST = 1.01  # what probabilities may sum to by rounding


def top_k_loss(
    log_probs_of: Callable[..., tuple[Array, LogProbsAux]],
    name: str,
    teacher: SparseTargets,
    tail: bool,
    full: tuple[int, ...],
    class_axes: Sequence[int],
    dtype: DTypeLike,
    options: dict[str, Any],
    like: Array,
) -> Array:
    """The loss beside a teacher's probabilities of K classes, from a student's log-probabilities of ids and their rest.

    `log_probs_of` is told which rows are unused, beside the arguments of `log_probs`. `full` and `class_axes` are those
    of the student's logits, whose dtype it is. The batch is sharded as in `like`.
    """
    batch = checks.batch_shape(full, class_axes)
    indices, probs, _ = checked_sparse(name, teacher, batch, full, dtype)
    if options["teacher_logit_softcap"] is not None:
        given = repr(options["teacher_logit_softcap"])
        checks.fail(ValueError, "teacher_logit_softcap", "None beside a teacher's probabilities", given)
    examples, of = checked_distillation(full, class_axes, dtype, **options)
    same = functools.partial(alike, axes=of.options.axis_name)
    (indices, probs), examples = same((indices, probs)), examples.by_kind(row=same)
    classes = None
    if examples.where is not None:
        count = jnp.sum(examples.where, tuple(class_axes), dtype=jnp.int32)
        classes = sum_over(jnp.broadcast_to(count, batch), of.options.axis_name)
    if (mesh := explicit_mesh(like)) is not None:
        rows = [s for i, s in enumerate(spec_of(like)) if i not in class_axes]
        # Beside an array that is on the mesh already, which says what devices that has.
        placed = place_together(
            mesh,
            {
                "like": (like, spec_of(like)),
                "entries": ((indices, probs), (*rows, None)),
                "classes": (classes, rows),
                "rows": (examples._replace(where=None), rows),
            },
        )
        (indices, probs), classes = placed["entries"], placed["classes"]
        examples = placed["rows"]._replace(where=examples.where)
    counts = who_counts(of.options, examples, Shared(), jnp.sum(probs, -1), classes)
    # Entries of probability 0 count for nothing, whatever their index; nor does what is no class, at a weight of 0.
    num_classes = math.prod(full[i] for i in class_axes) * shard_count(of.options.axis_name)
    unknown = counts.unused[..., None] & ~is_class(indices, num_classes)
    idle = ~counts.counted[..., None] | (probs == 0) | unknown
    ids = select(idle, jnp.full_like(indices, _IDLE), jnp.maximum(indices, -1))
    kept = {name: options[name] for name in ("where", "logit_softcap", "temperature", "axis_name", "implementation")}
    if isinstance(kept["temperature"], jax.core.Tracer):  # any other has been looked at
        kept["temperature"] = usable_temperature(of.options, examples, counts).temperature
    log_q, aux = log_probs_of(counts.unused, ids=ids, ignore_index=_IDLE, return_aux=True, **kept)
    epsilon = max(float(jnp.finfo(x).eps) for x in (probs.dtype, jnp.result_type(array_of(teacher.probs))))
    rounding = min(16 * epsilon, _MOST - 1)
    loss: Array = _of_top_k(ids, probs, log_q, aux.tail, examples, counts, of=of, tail=tail, rounding=rounding)
    return loss


_IDLE = -2  # no class, and not the number of other indices that are none
_NOTHING = -1e4  # log of a probability that is 0 in every dtype: that of classes which a number masks, too


@functools.partial(jax.jit, static_argnames=("of", "tail", "rounding"))
def _of_top_k(
    ids: Array,
    p: Array,
    log_q: Array,
    log_rest: Array,
    examples: Examples,
    counts: Counts,
    *,
    of: Distillation,
    tail: bool,
    rounding: float,
) -> Array:
    """rounding: what the teacher's probabilities may lack of 1 if they are all there are."""
    first = ~(repeated_entries(ids) | (ids == _IDLE))
    p = select(first, sums_of_same(ids, p), 0)  # of a class given twice
    log_q = select(first | jnp.isnan(log_q), log_q, -jnp.inf)
    mass = jnp.sum(p, -1)
    rest = jnp.maximum(_left_of_one(p), 0) if tail else jnp.zeros_like(mass)
    if tail:
        rest = select(mass > _MOST, jnp.nan, rest)
        # Of no other class.
        rest = select((log_rest < _NOTHING) & (rest <= rounding), 0, rest)
    p, log_q = (jnp.concatenate([x, y[..., None]], -1) for x, y in ((p, rest), (log_q, log_rest)))
    divergence = functools.partial(divergence_of_log_probs, of.divergence, whole=tail)
    first_value = divergence(lax.stop_gradient(log_q), p)
    # A row of NaN log-probabilities has the derivatives of a plain sum: 0 if nothing depends on it.
    dead = counts.unused & ~jnp.isfinite(first_value)
    broken = jnp.isnan(first_value) & ~dead
    kept = ~(broken | dead)[..., None]
    # KL(q‖p) where p has nothing and q has: infinite, and its derivatives those for a p that is hardly more.
    unbounded = jnp.isinf(first_value) & (of.divergence.kind == "reverse_kl")
    least = select(unbounded[..., None] & (p == 0), jnp.finfo(p.dtype).tiny, p)
    value = divergence(select(kept, log_q, 0), select(kept, least, 1))
    value = select(unbounded, jnp.inf + (value - lax.stop_gradient(value)), value)
    slope = select(broken & ~jnp.any(jnp.isnan(log_q), -1), jnp.nan, 1)
    value = select(broken, slope * jnp.sum(log_q, -1), value)
    return composed(of, value, examples, counts)


def _left_of_one(p: Array) -> Array:
    """1 − Σ p, whose digits a sum of nearly 1 would have lost: of their halves, which add up exactly."""
    scale = 2.0 ** (jnp.finfo(p.dtype).nmant // 2 + 1)
    high = jnp.round(p * scale) / scale
    return (1 - jnp.sum(high, -1)) - jnp.sum(p - high, -1)


# --- of all classes of a row, or of some -----------------------------------------------------------------------------


class Record(NamedTuple):
    """What the backward pass knows of rows: 0 for what is not finite, and which of both records and divergences are."""

    sides: Models[Side]
    row: Row
    sound: Array
    bounded: Array


class Factors(NamedTuple):
    """What the gradients in all the classes of a row have in common: what they are multiplied by; `kept` is `sound`,
    but for rows on which nothing depends.
    """

    sides: Models[Side]
    row: Row
    kept: Array
    scale: Array


def sums_of_classes(
    of: Distillation, models: Models[Array], examples: Examples, sides: Models[Side], sound: Array
) -> Sums:
    """Of logits of these classes, whose mask `examples` has."""
    return sums(of.divergence, compare(_effective(of, models, examples, sound), sides, examples.temperature))


def record_of(of: Distillation, sides: Models[Side], sound: Array, total: Sums) -> tuple[Array, Record]:
    """The divergence of rows and their record, from sums over all classes."""
    row = finish(of.divergence, total)
    bounded = jnp.isfinite(row.value)
    known = jax.tree.map(functools.partial(_zero_unless, sound & bounded), row)
    return select(sound, row.value, jnp.nan), Record(sides, known, sound, bounded)


def factors(record: Record, ct: Array) -> Factors:
    sides, row, sound, bounded = record
    # Nothing depends on a dead row, so it gives 0, whatever it holds; one on which something does may give NaN.
    dead = ~(sound & bounded) & (ct == 0)
    kept = sound & ~dead
    scale = select(kept, ct, select(dead, 0, jnp.nan))
    row = jax.tree.map(lambda x: select(bounded | dead, x, jnp.inf), row)._replace(slip=row.slip)
    return Factors(written(jax.tree.map(functools.partial(_zero_unless, kept), sides)), row, kept, scale)


def gradient_of_classes(
    of: Distillation, models: Models[Array], examples: Examples, of_rows: Factors
) -> tuple[Array, Array | None]:
    """In the student's logits of these classes, and what these classes add to that in the temperature."""
    logits, temperature = models.student, examples.temperature
    sides, row, kept, scale = of_rows
    if temperature is not None:  # which is NaN where it is not positive
        temperature = select(kept, temperature, 1)
    pair = compare(_effective(of, models, examples, kept), sides, temperature)
    student = gradient(of.divergence, pair, row)
    dz, dtemperature = scale[..., None] * student, None
    if temperature is not None:
        dz = dz / temperature[..., None]
        dtemperature = scale * temperature_gradient(of.divergence, pair, row, student) / temperature
    if (cap := of.options.logit_softcap) is not None:
        t = jnp.tanh(taking_part(examples.where, _zero_unless(kept, logits.astype(scale.dtype))) / cap)
        dz = dz * ((1 - t) * (1 + t))
    dz = taking_part(examples.where, dz)  # last: a masked logit may be NaN
    return dz.astype(logits.dtype), dtemperature


# --- the primitive --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def row_divergence(of: Distillation, models: Models[Array], examples: Examples) -> Array:
    """The divergence of each row of logits, of which `examples` has the mask and the temperature.

    With the classes split over devices, the logits are of this device's classes, and the divergence is of all of them.
    Differentiable in the student's logits and the temperature. The residuals are the arguments and per-row numbers.
    """
    return _forward(of, models, examples)[0]


def _forward(of: Distillation, models: Models[Array], examples: Examples) -> tuple[Array, Record]:
    dtype, models = _joint_dtype(*models), models._replace(teacher=lax.stop_gradient(models.teacher))
    records = [_side(options, x, examples, dtype) for options, x in zip(of.of_models, models, strict=True)]
    sound = records[0][1] & records[1][1]
    sides = Models(*(side for side, _ in records))
    sides = written(jax.tree.map(functools.partial(_zero_unless, sound), sides))
    total = sums_of_classes(of, models, examples, sides, sound)
    return record_of(of, sides, sound, sum_over(total, of.options.axis_name))


def _side(options: Options, logits: Array, examples: Examples, dtype: jnp.dtype) -> tuple[Side, Array]:
    """What the classes of a row have in common, and whether it has a finite maximum and sum."""
    names, offset = options.axis_name, None
    rows = Rows(logits if working_dtype(logits.dtype) == dtype else logits.astype(dtype), where=examples.where)
    if examples.temperature is not None:
        offset = lax.stop_gradient(jnp.max(effective(options, rows), -1).astype(dtype))
        offset = lax.pmax(offset, names) if names else offset
        offset = select(jnp.isfinite(offset), offset, 0)
        rows = rows._replace(temperature=examples.temperature[..., None], offset=offset[..., None])
    stats, sound = finite(merge_shards(row_stats(options, rows), names))
    return side_of(stats, offset), sound


_Residuals = tuple[Models[Array], Examples, Record]


def _fwd(of: Distillation, models: Models[Array], examples: Examples) -> tuple[Array, _Residuals]:
    value, record = _forward(of, models, examples)
    return value, (models, examples, record)


def _bwd(of: Distillation, residuals: _Residuals, ct: Array) -> tuple[Models[Array | None], Examples]:
    models, examples, record = residuals
    dz, dtemperature = gradient_of_classes(of, models, examples, factors(record, ct))
    return Models(dz, None), Examples(temperature=dtemperature)


row_divergence.defvjp(_fwd, _bwd)
