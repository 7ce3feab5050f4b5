"""Distillation from hidden states: the divergence of two models' logits, of which neither is ever held whole.

As `jaxce.distillation` has it for rows of logits, in blocks of the vocabulary and three passes over them: the record of
each model's row, what is summed up over both, and the gradients.

**"store"**, for a loss that is one number: a block of tokens keeps its logits of both models from the first pass to the
last, and the gradients are computed along with the loss. That takes as many products as with all the logits in memory.

**"recompute"**, for a number per token: every pass computes the logits anew, and nothing is kept but numbers per token.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import PrecisionLike

from jaxce import checks
from jaxce.arguments import Examples, Options, Projection, Shared, flat
from jaxce.compose import Counts, mean_divisor, mean_or_0, usable_temperature, who_counts, zero_if_too_large
from jaxce.distillation import (
    Distillation,
    Factors,
    Record,
    checked_distillation,
    composed,
    factors,
    gradient_of_classes,
    loss_of_models,
    record_of,
    sums_of_classes,
    top_k_loss,
)
from jaxce.divergence import Models, Side, Sums, side_of
from jaxce.layout import alike_on_devices
from jaxce.linear import VocabAxis, blocks, costs, mesh
from jaxce.linear.arguments import (
    check_mode,
    checked_projection,
    chosen_precision,
    nan_unless_gathered,
    of_rows,
    without_unused,
)
from jaxce.linear.blocks import Schedule, by_platform, gradients, logits, over_blocks, put, put_or_add, take
from jaxce.linear.log_probabilities import linear_log_probs
from jaxce.linear.store import only_asked, scaled, those_asked
from jaxce.log_probabilities import LogProbsAux
from jaxce.reverse_mode import reverse_mode_only
from jaxce.sharding import explicit_mesh, sum_like, sum_over, vary, varying
from jaxce.stats import RowStats, finite, matmul_dtype, merge, merge_shards, working_dtype
from jaxce.sums import Rows, row_stats
from jaxce.targets import SparseTargets, Targets
from jaxce.types import ArrayLike, AxisName, DivergenceName, Implementation, Mode, Reduction, takes_variables
from jaxce.versions import empty

# Logits of each model in a block of tokens that keeps them, which adds up the whole of dkernel in float32: half as many
# on CPU where that is one more array. Compiled for TPU it takes longer than to compute the logits again.
_KEPT = {"cpu": 2**25, "tpu": 0, "gpu": 2**27}
_LEAST = 256  # tokens, where any are kept
_PART = {"cpu": 2**21, "tpu": 2**23, "gpu": 2**23}  # logits that are worked on at once


class Plan(NamedTuple):
    """A schedule for each model: they differ in the layout of the kernel."""

    student: Schedule
    teacher: Schedule

    @property
    def keeps(self) -> bool:
        """Whether blocks of tokens keep their logits until their gradients are computed, along with the loss."""
        return self.student.block_n > 0


Plans = tuple[Plan, Plan, Plan]  # for "cpu", "tpu" and every other platform


class Tokens(NamedTuple):
    """A `Projection` for each model, with hidden states `[N, D]`; of `examples` the mask and the temperature."""

    models: Models[Projection]
    examples: Examples


Gradients = tuple[Projection, Array | None]  # of the student, and in the temperature
_Forward = tuple[Models[RowStats], Models[Array] | None]  # records, and the logits that are kept


def _forward(
    plan: Plan, of: Distillation, tokens: Tokens, keep: bool = False
) -> tuple[Array, Record, Models[Array] | None]:
    """The divergence of each row, its record, and if asked for the logits."""
    models, examples = tokens
    dtype, n, V = _working(models), *_shape(plan, models)
    every = varying(tokens)
    none = RowStats(jnp.full(n, -jnp.inf, dtype), jnp.full(n, -1, dtype))
    kept = Models(*(empty((n, V), dtype) for _ in models)) if keep else None
    temperature = None if examples.temperature is None else examples.temperature[:, None]

    def first(start: Any, size: int, state: _Forward) -> _Forward:
        before, all_logits = state
        both, where = _logits(plan, tokens, start, size), _part(examples, start, size).where
        if all_logits is not None:
            all_logits = Models(*(put(whole, z, start, 1) for whole, z in zip(all_logits, both, strict=True)))
        stats = [
            merge(one, row_stats(options, Rows(z, where=where, temperature=temperature)))
            for one, options, z in zip(before, of.of_models, both, strict=True)
        ]
        return Models(*stats), all_logits

    stats, kept = over_blocks(V, plan.student.forward_v, first, vary((Models(none, none), kept), every))
    found = [_side(merge_shards(s, of.options.axis_name), examples.temperature) for s in stats]
    sides, sound = Models(found[0][0], found[1][0]), found[0][1] & found[1][1]

    def second(start: Any, size: int, total: Sums) -> Sums:
        both, part = _logits(plan, tokens, start, size, kept), _part(examples, start, size)
        added: Sums = jax.tree.map(jnp.add, total, sums_of_classes(of, both, part, sides, sound))
        return added

    of_none = Models(*(jnp.zeros((n, 0), dtype) for _ in models))
    total = sums_of_classes(of, of_none, examples._replace(where=None), sides, sound)
    total = over_blocks(V, plan.student.forward_v, second, vary(total, every))
    return *record_of(of, sides, sound, sum_over(total, of.options.axis_name)), kept


def _side(stats: RowStats, temperature: Array | None) -> tuple[Side, Array]:
    """What the classes of a row have in common, from the record of its quotients; and whether that is finite."""
    stats, sound = finite(stats)
    if temperature is None:
        return side_of(stats), sound
    largest = stats.max * temperature
    return side_of(stats._replace(max=stats.max - largest / temperature), largest), sound


def _backward(
    plan: Plan,
    of: Distillation,
    tokens: Tokens,
    of_rows: Factors,
    kept: Models[Array] | None = None,
    sums: tuple[Array, Array | None] | None = None,
) -> Gradients:
    """With `sums`, of kernel and bias, which tokens share, theirs are added to them."""
    (hidden, kernel, bias), schedule = tokens.models.student, plan.student
    dtype, (_, V) = _working(tokens.models), _shape(plan, tokens.models)
    hidden_t = lax.optimization_barrier(hidden.T) if schedule.transposes else None

    def block(start: Any, size: int, state: tuple[Array, Array, Array | None, Array | None]) -> Any:
        of_hidden, of_kernel, of_bias, of_temperature = state
        both = _logits(plan, tokens, start, size, kept)
        dz, dtemperature = gradient_of_classes(of, both, _part(tokens.examples, start, size), of_rows)
        part = take(kernel, start, size, schedule.vocab_axis, schedule)
        dhidden, dkernel = gradients(dz, hidden, part, schedule, hidden_t)

        of_kernel = put_or_add(of_kernel, dkernel, start, schedule.vocab_axis, add=sums is not None)
        if of_bias is not None:
            of_bias = put_or_add(of_bias, jnp.sum(dz, 0), start, 0, add=sums is not None)
        if of_temperature is not None and dtemperature is not None:
            of_temperature = of_temperature + dtemperature
        return of_hidden + dhidden, of_kernel, of_bias, of_temperature

    by_class = jax.tree.map(lambda x: empty(x.shape, x.dtype), (kernel, bias)) if sums is None else sums
    temperature = tokens.examples.temperature
    dtemperature = None if temperature is None else jnp.zeros_like(temperature)
    state = vary((jnp.zeros(hidden.shape, dtype), *by_class, dtemperature), varying(tokens))
    dhidden, dkernel, dbias, dtemperature = over_blocks(V, schedule.backward_v, block, state)
    if dtemperature is not None and temperature is not None:
        dtemperature = sum_like(dtemperature, temperature)
    return Projection(sum_like(dhidden, hidden), dkernel, dbias), dtemperature


def _working(models: Models[Projection]) -> jnp.dtype:
    return jnp.promote_types(*(working_dtype(matmul_dtype(m.hidden.dtype, m.kernel.dtype)) for m in models))


def _shape(plan: Plan, models: Models[Projection]) -> tuple[int, int]:
    """Tokens and classes."""
    return models.student.hidden.shape[0], models.student.kernel.shape[plan.student.vocab_axis]


def _part(examples: Examples, start: Any, size: int) -> Examples:
    return examples._replace(where=None if examples.where is None else take(examples.where, start, size, -1))


def _logits(plan: Plan, tokens: Tokens, start: Any, size: int, kept: Models[Array] | None = None) -> Models[Array]:
    """Of `size` classes from `start` on, of both models."""
    if kept is not None:
        return Models(*(take(z, start, size, 1) for z in kept))

    def of_model(schedule: Schedule, model: Projection) -> Array:
        part = lax.optimization_barrier(take(model.kernel, start, size, schedule.vocab_axis, schedule))
        bias = None if model.bias is None else take(model.bias, start, size, 0, schedule)
        return logits(model.hidden, part, bias, schedule).astype(_working(tokens.models))

    return Models(*(of_model(schedule, model) for schedule, model in zip(plan, tokens.models, strict=True)))


# --- "recompute" ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _divergences(plans: Plans, of: Distillation, tokens: Tokens) -> Array:
    """The divergence of each token."""
    return _divergences_fwd(plans, of, tokens)[0]


def _divergences_fwd(plans: Plans, of: Distillation, tokens: Tokens) -> tuple[Array, tuple[Tokens, Record]]:
    def forward(plan: Plan, tokens: Tokens) -> tuple[Array, Record]:
        return _forward(plan, of, tokens)[:2]

    value, record = by_platform(plans, forward, tokens)
    return value, (tokens, record)


def _divergences_bwd(plans: Plans, of: Distillation, residuals: tuple[Tokens, Record], ct: Array) -> tuple[Tokens]:
    def backward(plan: Plan, tokens: Tokens, record: Record, ct: Array) -> Gradients:
        return _backward(plan, of, tokens, factors(record, ct))

    student, temperature = by_platform(plans, backward, *residuals, ct)
    student = jax.tree.map(lambda g, x: g.astype(x.dtype), student, residuals[0].models.student)
    return (Tokens(cast(Any, Models(student, None)), Examples(temperature=temperature)),)


_divergences.defvjp(_divergences_fwd, _divergences_bwd)


# --- "store" --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted_sum(plans: Plans, of: Distillation, tokens: Tokens, weights: Array) -> Array:
    """The sum of the divergences of all tokens, each times its weight."""

    def forward(plan: Plan, tokens: Tokens, weights: Array) -> Array:
        def block(start: Any, size: int, total: Array) -> Array:
            part, own = _rows((tokens, weights), start, size)
            value = zero_if_too_large(_forward(plan, of, part, keep=plan.keeps)[0], own == 0)
            return total + jnp.sum(own * value)

        zero = vary(jnp.zeros((), weights.dtype), varying(tokens, weights) - set(of.options.axis_name))
        return over_blocks(len(weights), plan.student.block_n or len(weights), block, zero)

    total: Array = by_platform(plans, forward, tokens, weights)
    return total


def _weighted_sum_fwd(
    plans: Plans, of: Distillation, *perturbed: Any
) -> tuple[Array, tuple[Tokens, Array, Array, Gradients, Record]]:
    tokens, weights = jax.tree.map(lambda x: x.value, perturbed)
    asked = jax.tree.map(lambda x: x.perturbed, (perturbed[0].models.student, perturbed[0].examples.temperature))

    # What a platform does not keep is zeros there, which no program computes: the results must be of one type.
    def recomputed(plan: Plan, tokens: Tokens, weights: Array) -> tuple[Array, Array, Gradients, Record]:
        value, record, _ = _forward(plan, of, tokens)
        own = tokens.models.student, tokens.examples.temperature
        grads: Gradients = jax.tree.map(lambda x: jnp.zeros_like(x, weights.dtype), own)
        value = zero_if_too_large(value, weights == 0)
        return jnp.sum(weights * value), value, grads, record

    def stored(plan: Plan, tokens: Tokens, weights: Array) -> tuple[Array, Array, Gradients, Record]:
        def block(start: Any, size: int, state: Any) -> Any:
            total, divergences, (of_hidden, *sums), of_temperature = state
            part, own = _rows((tokens, weights), start, size)
            value, record, kept = _forward(plan, of, part, keep=True)
            value = zero_if_too_large(value, own == 0)
            given = plan, of, part, factors(record, own), kept, tuple(sums)
            (dhidden, *sums), dtemperature = _backward(*given)
            if of_temperature is not None and dtemperature is not None:
                of_temperature = put(of_temperature, dtemperature, start, 0)
            return (
                total + jnp.sum(own * value),
                put(divergences, value, start, 0),
                Projection(put(of_hidden, dhidden, start, 0), *sums),
                of_temperature,
            )

        rows = varying(tokens, weights) - set(of.options.axis_name)
        dtype, (hidden, *shared) = weights.dtype, tokens.models.student
        total, divergences, dhidden = jnp.zeros((), dtype), jnp.zeros_like(weights), jnp.zeros_like(hidden, dtype)
        dtemperature = None if tokens.examples.temperature is None else divergences
        total, divergences, dhidden, dtemperature = vary((total, divergences, dhidden, dtemperature), rows)
        sums = vary(jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shared), rows | set(of.options.axis_name))
        state = total, divergences, Projection(dhidden, *sums), dtemperature
        total, divergences, *grads = over_blocks(len(weights), plan.student.block_n, block, state)
        like = jax.eval_shape(lambda: _forward(plan, of, tokens)[1])
        record = vary(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), rows)
        return total, divergences, cast(Gradients, tuple(grads)), record

    def either(plan: Plan, *given: Any) -> tuple[Array, Array, Gradients, Record]:
        total, divergences, grads, record = (stored if plan.keeps else recomputed)(plan, *given)
        return total, divergences, only_asked(asked, grads), record

    total, *kept = by_platform(plans, either, tokens, weights)
    return total, (tokens, weights, *kept)


def _weighted_sum_bwd(
    plans: Plans, of: Distillation, residuals: tuple[Tokens, Array, Array, Gradients, Record], ct: Array
) -> tuple[Tokens, Array]:
    def backward(plan: Plan, tokens: Tokens, weights: Array, grads: Gradients, record: Record, ct: Array) -> Any:
        own = tokens.models.student, tokens.examples.temperature
        if not plan.keeps:
            new = _backward(plan, of, tokens, factors(record, ct * weights))
            return those_asked(grads, jax.tree.map(lambda x, n: n.astype(x.dtype), own, new))
        return scaled(ct, own, grads)

    tokens, weights, divergences, *kept = residuals
    student, temperature = by_platform(plans, backward, tokens, weights, *kept, ct)
    return Tokens(cast(Any, Models(student, None)), Examples(temperature=temperature)), ct * divergences


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


def _rows(tree: Any, start: Any, size: int) -> Any:
    """The tokens from `start` on: what has one row for all of them stays, and so do kernels and biases."""
    tokens, weights = tree
    models = Models(*(m._replace(hidden=take(m.hidden, start, size, 0)) for m in tokens.models))
    examples = jax.tree.map(lambda x: take(x, start, size, 0), tokens.examples)
    return Tokens(models, examples), take(weights, start, size, 0)


# --- the loss -------------------------------------------------------------------------------------------------------


@takes_variables
def linear_distillation_loss(
    hidden: ArrayLike,
    kernel: ArrayLike,
    teacher_hidden: Targets,
    teacher_kernel: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    vocab_axis: VocabAxis = 1,
    teacher_vocab_axis: VocabAxis | None = None,
    where: ArrayLike | None = None,
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
    mode: Mode | None = None,
    precision: PrecisionLike = None,
    tail: bool = True,
) -> Array:
    r"""The divergence between a student and its teacher from the hidden states of both, without the logits of either.

    For hidden states :math:`h` and :math:`g` and kernels :math:`W` and :math:`U`, it equals

    .. math:: \mathrm{distillation\_loss}(h W + b,\ g U + a, \ldots)

    in value and in every gradient. Logits exist one block at a time, in float32: from a block on, two language models
    with N tokens and V classes need no memory that grows with N·V. The teacher is a constant: its gradients are 0.

    Args:
      hidden: the student's, floats `[..., D]`.
      kernel: the student's, floats `[D, V]`; or `[V, D]`, such as a tied embedding table, with `vocab_axis=0`.
      teacher_hidden: floats `[..., E]`, of as many tokens; E need not be D. Or, of a teacher of whom no more is known
        than its K most likely classes, `jaxce.SparseTargets` with their probabilities, and no kernel.
      teacher_kernel: floats `[E, V]`, or `[V, E]`.
      bias, teacher_bias: floats `[V]`.
      vocab_axis: which axis of the kernel has the classes.
      teacher_vocab_axis: that of the teacher's kernel. None: the same.
      where: bools that broadcast to `[..., V]`: the classes that take part, in both models; of shape `[...]`: the
        tokens that do.
      divergence, beta, temperature, weights, logit_softcap, teacher_logit_softcap, reduction: as in
        `jaxce.distillation_loss`.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes, major first) that the classes are split over. Kernels,
        biases and `where` are then this device's share, and hidden states are whole. Devices exchange a few numbers
        per token, and the gradient of the hidden states.
      batch_axis_name: inside `jax.shard_map`, the mesh axis (or axes) that the tokens are split over, to reduce over
        all of them: the same number on every device.
      implementation: `"autodiff"` is plain JAX for forward mode (jvp, jacfwd, linearize), and does hold the logits.
      mode: `"store"` goes through blocks of tokens and computes the gradients along with the loss, two products for the
        logits and two for the gradients; it is for losses that are one number (`reduction` not "none"), and holds the
        logits of one block of tokens with the whole vocabulary. `"recompute"` goes through blocks of the vocabulary,
        computes the logits of both models three times, and keeps a few numbers per token (and the hidden states of
        both models once more, if tokens may be left out), where "store" keeps the gradients: `jax.lax.scan` over
        batches keeps them for every step if its gradient is taken from outside. None: "store" for one number, but on
        TPU.
      precision: of the matmuls, as in `jax.lax.dot_general`.
      tail: for a teacher of K classes, as in `jaxce.distillation_loss`.

    Returns:
      The loss in nats, float64 if hidden states or a kernel are and float32 otherwise. Gradients have the dtype of
      their argument and are summed in float32.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range; the message says what to do.

    Example:
      >>> import jax.numpy as jnp, jaxce
      >>> hidden, kernel = jnp.array([[1.0, -0.5]]), jnp.array([[0.5, -1.0, 2.0], [1.0, 0.3, 0.1]])
      >>> teacher_hidden = jnp.array([[1.0, 0.2, -0.1]])
      >>> teacher_kernel = jnp.array([[0.1, -0.6, 1.5], [0.3, 0.0, 0.2], [0.2, 1.0, 0.4]])
      >>> print(jaxce.linear_distillation_loss(hidden, kernel, teacher_hidden, teacher_kernel))
      [0.04240666]

    Note:
      Hsu et al., "Liger Kernel", 2024, section 3.2, for gradients computed along with the loss; the divergences as in
      `jaxce.distillation_loss`.
    """
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "kernel": kernel,
        "teacher_hidden": teacher_hidden,
        "teacher_kernel": teacher_kernel,
        "bias": bias,
        "teacher_bias": teacher_bias,
        "vocab_axis": vocab_axis,
        "teacher_vocab_axis": vocab_axis if teacher_vocab_axis is None else teacher_vocab_axis,
        "where": where,
        "divergence": divergence,
        "beta": beta,
        "temperature": temperature,
        "weights": weights,
        "logit_softcap": logit_softcap,
        "teacher_logit_softcap": teacher_logit_softcap,
        "reduction": reduction,
        "axis_name": axis_name,
        "batch_axis_name": batch_axis_name,
        "implementation": implementation,
        "mode": mode,
        "precision": precision,
    }
    checks.one_of("tail", tail, (False, True))
    if isinstance(teacher_hidden, SparseTargets):
        return _of_top_k(tail, arguments)
    if teacher_kernel is None:
        hint = "Only a teacher's probabilities, jaxce.SparseTargets, come without one."
        checks.fail(TypeError, "teacher_kernel", "floats [E, V]", "None", hint)
    if (explicit := explicit_mesh(hidden, kernel)) is not None:
        mesh.no_axis_names(arguments)
        _checked(**arguments)
        return mesh.over_mesh(_checked_loss, explicit, arguments)
    return _checked_loss(**arguments)


def _of_top_k(tail: bool, arguments: dict[str, Any]) -> Array:
    for name in "teacher_kernel", "teacher_bias":
        if arguments[name] is not None:
            checks.fail(ValueError, name, "None beside a teacher's probabilities", checks.describe(arguments[name]))
    if arguments["mode"] == "store":
        hint = "Leave it out: the log-probabilities of the teacher's classes take mode 'recompute'."
        checks.fail(ValueError, "mode", "None or 'recompute' beside a teacher's probabilities", "'store'", hint)
    names = "hidden", "kernel", "bias", "vocab_axis"
    student, vocab_axis = checked_projection(*(arguments[name] for name in names))
    axes = checks.mesh_axes(*(arguments[name] for name in ("axis_name", "batch_axis_name", "reduction")))
    checks.split_over("hidden", student.hidden, axes[1], "tokens")
    own = {name: arguments[name] for name in ("vocab_axis", "bias", "mode", "precision")}
    all_used = arguments["weights"] is None and arguments["where"] is None

    def of_student(unused: Array, **given: Any) -> tuple[Array, LogProbsAux]:
        hidden = student.hidden if all_used else without_unused(unused, student.hidden)
        found: tuple[Array, LogProbsAux] = linear_log_probs(hidden, student.kernel, **own, **given)
        return found

    *batch, _ = student.hidden.shape
    full = (*batch, student.kernel.shape[vocab_axis])
    kept = {name: x for name, x in arguments.items() if name not in {*own, *_OF_MODELS}}
    dtype = matmul_dtype(student.hidden.dtype, student.kernel.dtype)
    given = of_student, "teacher_hidden", arguments["teacher_hidden"], tail, full, (len(batch),), dtype, kept
    return top_k_loss(*given, student.hidden)


_OF_MODELS = ("hidden", "kernel", "teacher_hidden", "teacher_kernel", "teacher_bias", "teacher_vocab_axis")


def _checked_loss(**arguments: Any) -> Array:
    tokens, examples, of, plans = _checked(**arguments)
    loss: Array = _loss(tokens, examples, of=of, plans=plans)
    return loss


def _checked(
    hidden: Any,
    kernel: Any,
    teacher_hidden: Any,
    teacher_kernel: Any,
    *,
    bias: Any,
    teacher_bias: Any,
    vocab_axis: Any,
    teacher_vocab_axis: Any,
    axis_name: Any,
    batch_axis_name: Any,
    mode: Any,
    precision: Any,
    **options: Any,
) -> tuple[Models[Projection], Examples, Distillation, Plans]:
    student, own_axis = checked_projection(hidden, kernel, bias, vocab_axis)
    of_teacher = teacher_hidden, teacher_kernel, teacher_bias, teacher_vocab_axis
    teacher, other_axis = checked_projection(*of_teacher, prefix="teacher_")
    *batch, _ = student.hidden.shape
    V = student.kernel.shape[own_axis]
    if teacher.hidden.shape[:-1] != tuple(batch):
        expected = f"shape {(*batch, 'E')}, hidden states of the same tokens"
        checks.fail(ValueError, "teacher_hidden", expected, checks.describe(teacher.hidden))
    if (found := teacher.kernel.shape[other_axis]) != V:
        hint = "Both models need the same vocabulary: leave out what one of them has at the end, kernel[:, :V]."
        checks.fail(ValueError, "teacher_kernel", f"{V} classes, as kernel has", f"{found}", hint)
    models = Models(student, teacher)
    names = {"axis_name": axis_name, "batch_axis_name": batch_axis_name}
    examples, of = checked_distillation((*batch, V), (len(batch),), _working(models), **names, **options)
    for prefix, model in ("", student), ("teacher_", teacher):
        checks.split_over(f"{prefix}kernel", model.kernel, of.options.axis_name, "classes")
        checks.split_over(f"{prefix}hidden", model.hidden, of.options.batch_axis_name, "tokens")
    check_mode(mode, None, of.options)
    precision = chosen_precision(precision)
    narrow = student.kernel.dtype.itemsize < 4
    plans = _plans(math.prod(batch), V, narrow, (own_axis, other_axis), precision, mode, of.options.reduction)
    return models, examples, of, plans


def _plans(
    N: Any, V: int, narrow: bool, vocab_axes: tuple[int, int], precision: Any, mode: Any, reduction: str
) -> Plans:
    may_keep = mode != "recompute" and reduction != "none" and isinstance(N, int) and N

    def plan(platform: str) -> Plan:
        kept = _KEPT[platform] or (_KEPT["gpu"] if mode == "store" else 0)
        kept = kept // 2 if platform == "cpu" and narrow else kept
        block_n = costs.sizes(N, max(kept // V, _LEAST), 8)[0] if may_keep and kept else 0
        rows = block_n or (max(N, 1) if isinstance(N, int) else 8192)
        block_v = costs.sizes(V, max(_PART[platform] // rows, 4 * costs.LANES), costs.LANES)[0]
        on_cpu = platform == "cpu"
        schedule = Schedule(0, precision, block_n, block_v, block_v, widens=on_cpu, transposes=on_cpu)
        return Plan(*(schedule._replace(vocab_axis=axis) for axis in vocab_axes))

    return plan("cpu"), plan("tpu"), plan("gpu")


@functools.partial(jax.jit, static_argnames=("of", "plans"))
def _loss(models: Models[Projection], examples: Examples, *, of: Distillation, plans: Plans) -> Array:
    *batch, _ = models.student.hidden.shape
    V, options = models.student.kernel.shape[plans[0].student.vocab_axis], of.options
    examples, _ = alike_on_devices(options, examples, Shared())
    classes = blocks.participating(examples.where, (*batch, V), plans[0].student.forward_v, options.axis_name)
    like = of_rows(models.student.hidden, _working(models), options)
    models = Models(*(m._replace(hidden=nan_unless_gathered(options, m.hidden)) for m in models))
    counts = who_counts(options, examples, Shared(), like, classes)
    examples = usable_temperature(options, examples, counts)
    teacher = jax.tree.map(lax.stop_gradient, models.teacher)
    models = Models(models.student, teacher)
    if not (examples.weights is None and examples.where is None):
        models = Models(*(m._replace(hidden=without_unused(counts.unused, m.hidden)) for m in models))
    models, examples, counts = _varied(options, models, examples, counts)
    if options.implementation == "autodiff":
        of_models = (tuple(plan[i] for plan in plans) for i in range(2))
        both = (blocks.all_logits(s, *m) for s, m in zip(cast(Any, of_models), models, strict=True))
        return loss_of_models(of, Models(*both), examples)
    tokens = Tokens(*flat(batch, models, Examples(where=examples.where, temperature=examples.temperature)))
    if not any(plan.keeps for plan in plans):
        value = _divergences(plans, of, reverse_mode_only(tokens)).reshape(batch)
        return composed(of, value, examples, counts)
    divisor, nothing = mean_divisor(options, counts)
    weights = (counts.weight / divisor).reshape(math.prod(batch))
    total = _weighted_sum(plans, of, *reverse_mode_only((tokens, weights)))
    return mean_or_0(sum_over(total, options.batch_axis_name), nothing)


def _varied(
    options: Options, models: Models[Projection], examples: Examples, counts: Counts
) -> tuple[Models[Projection], Examples, Counts]:
    """What has a class axis differs along every mesh axis in play, and the rest along those of the tokens."""
    rows = varying(models, examples) - set(options.axis_name)
    of_rows, of_classes = (functools.partial(vary, axes=axes) for axes in (rows, rows | set(options.axis_name)))
    models = Models(*(Projection(of_rows(m.hidden), of_classes(m.kernel), of_classes(m.bias)) for m in models))
    return models, examples.by_kind(row=of_rows, entries=of_rows, classes=of_classes), of_rows(counts)
