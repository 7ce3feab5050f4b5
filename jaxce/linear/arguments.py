"""The arguments of the losses of hidden states and a kernel: checked, planned for, and made ready to compute with."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce import checks
from jaxce.arguments import Examples, Options, Projection, Shared, checked
from jaxce.compose import Counts, usable_temperature, who_counts
from jaxce.layout import alike_on_devices
from jaxce.linear import blocks, mesh, pallas_tpu
from jaxce.linear import plan as plans
from jaxce.linear.costs import Problem
from jaxce.linear.plan import LinearPlan
from jaxce.selection import select
from jaxce.sharding import alike, vary, varying
from jaxce.stats import matmul_dtype, working_dtype
from jaxce.types import LinearImplementation


def checked_linear(
    hidden: Any,
    kernel: Any,
    targets: Any,
    targets_name: str = "targets",
    *,
    bias: Any = None,
    vocab_axis: int = 1,
    mode: str | None = None,
    memory_budget: int | None = None,
    plan: LinearPlan | None = None,
    precision: Any = None,
    platform: str | None = None,
    **options: Any,
) -> tuple[Projection, Examples, Shared, Options, blocks.Schedules, Problem]:
    """What the losses and their plans are made from. `platform`: where a budget must do, if not at hand."""
    projection, vocab_axis = checked_projection(hidden, kernel, bias, vocab_axis, targets, targets_name)
    hidden, kernel, _ = projection
    (*batch, D), V = hidden.shape, kernel.shape[vocab_axis]
    dtype = matmul_dtype(hidden.dtype, kernel.dtype)
    implementations = get_args(LinearImplementation)
    examples, shared, constants = checked(
        targets, (*batch, V), (len(batch),), dtype, targets_name, **options, implementations=implementations
    )
    checks.split_over("kernel", kernel, constants.axis_name, "classes")
    checks.split_over("hidden", hidden, constants.batch_axis_name, "tokens")
    check_mode(mode, memory_budget, constants)
    N = math.prod(batch)
    _check_plan(plan, (N, D, V), mode, memory_budget, constants)
    if not isinstance(N, int) and (mode == "store" or memory_budget is not None):
        name, x = ("mode", mode) if mode == "store" else ("memory_budget", memory_budget)
        hint = "Blocks of tokens cannot be chosen while exporting with a symbolic batch."
        checks.fail(ValueError, name, "None for hidden states of unknown length", f"{x!r}, hidden {hidden.shape}", hint)
    if not isinstance(D * V, int):
        hint = "Only the batch may be symbolic."
        checks.fail(ValueError, "kernel", "a shape of numbers", checks.describe(kernel), hint)
    narrow_probs = False
    if examples.indices is None and examples.probs is not None:
        narrow_probs = examples.probs.dtype != working_dtype(matmul_dtype(hidden.dtype, kernel.dtype))
        if shared.class_weights is not None:
            # Used more than once: their gradients are added before they are rounded.
            examples = examples._replace(probs=examples.probs.astype(shared.class_weights.dtype))
    *of_tokens, of_classes = (1, 1) if examples.where is None else examples.where.shape
    problem = Problem(
        N,
        D,
        V,
        hidden.dtype,
        kernel.dtype,
        None if examples.indices is None else examples.indices.shape[-1],
        constants,
        weights=examples.weights is not None,
        class_weights=shared.class_weights is not None,
        mask_per_token=any(n != 1 for n in of_tokens),
        mask=examples.where is not None,
        mask_broadcast=any(n != 1 for n in of_tokens) and of_tokens != batch and of_classes != 1,
        narrow_probs=narrow_probs,
    )
    precision = chosen_precision(precision)
    if constants.implementation == "pallas_tpu":
        pallas_tpu.check(problem, precision)
    schedules = plans.make_schedules(problem, vocab_axis, precision, mode, memory_budget, plan, platform)
    return projection, examples, shared, constants, schedules, problem


def chosen_precision(precision: Any) -> Any:
    """What `jax.default_matmul_precision` says where the loss is called: its gradient may be traced elsewhere."""
    if precision is None:
        return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if not (isinstance(precision, Hashable) and _is_precision(precision)):
        expected = "None, a jax.lax.Precision, or its name as 'highest'"
        checks.fail(ValueError, "precision", expected, checks.describe(precision), "See jax.lax.dot_general.")
    return precision


@functools.cache
def _is_precision(x: Any) -> bool:
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(functools.partial(lax.dot, precision=x), one, one)
    except (ValueError, TypeError):
        return False
    return True


def checked_projection(
    hidden: Any,
    kernel: Any,
    bias: Any,
    vocab_axis: Any,
    targets: Any = None,
    targets_name: str = "targets",
    *,
    prefix: str = "",
) -> tuple[Projection, int]:
    """A model, whose arguments have names that begin so, and which axis of its kernel has the classes, 0 or 1.

    targets: with which hidden states or kernel may have been swapped.
    """
    hidden = checks.float_array(f"{prefix}hidden", hidden, targets, targets_name)
    kernel = checks.float_array(f"{prefix}kernel", kernel, targets, targets_name)
    checks.one_of(f"{prefix}vocab_axis", vocab_axis, (0, 1, -2, -1))
    vocab_axis = int(vocab_axis) % 2
    checks.kernel(kernel, hidden.shape[-1], vocab_axis, prefix)
    V = kernel.shape[vocab_axis]
    checks.num_classes(f"{prefix}kernel", V)
    return Projection(hidden, kernel, None if bias is None else checks.bias(bias, V, f"{prefix}bias")), vocab_axis


def check_mode(mode: str | None, memory_budget: Any, options: Options) -> None:
    checks.one_of("mode", mode, (None, *plans.MODES))
    if memory_budget is not None and (
        isinstance(memory_budget, bool) or not isinstance(memory_budget, (int, np.integer))
    ):
        checks.fail(TypeError, "memory_budget", "None or a number of bytes, an int", checks.describe(memory_budget))
    if mode == "store" and options.reduction == "none":
        hint = "Reduce in the loss, reduction='sum' for instance, or use mode='recompute'."
        checks.fail(ValueError, "mode", "'recompute' for reduction='none'", "'store', which needs one number", hint)
    if options.implementation != "xla" and (mode, memory_budget) != (None, None):
        why = "It holds all the logits" if options.implementation == "autodiff" else "It has blocks of its own"
        hint = f"{why}; leave mode and memory_budget out."
        expected = "'xla' with a mode or a memory budget"
        checks.fail(ValueError, "implementation", expected, repr(options.implementation), hint)


def _check_plan(plan: Any, shape: tuple[Any, ...], mode: str | None, memory_budget: Any, options: Options) -> None:
    if plan is None:
        return
    if not isinstance(plan, LinearPlan):
        checks.fail(TypeError, "plan", "None or a jaxce.LinearPlan", checks.describe(plan))
    if (mode, memory_budget) != (None, None):
        given = f"mode={mode!r}, memory_budget={memory_budget!r}"
        checks.fail(ValueError, "plan", "None with a mode or a memory budget", given, "A plan has a mode and blocks.")
    if plan.shape != shape:
        hint = "Make one for these arguments."
        checks.fail(ValueError, "plan", f"one for N, D, V = {shape}", f"one for {plan.shape}", hint)
    if plan.mode == "store" and options.reduction == "none":
        hint = "Reduce in the loss, reduction='sum' for instance, or make a plan for reduction='none'."
        checks.fail(ValueError, "plan", "mode 'recompute' for reduction='none'", repr(plan.mode), hint)
    if plan.mode == "pallas_tpu" and options.implementation != "pallas_tpu":
        hint = "Pass implementation='pallas_tpu' as well."
        checks.fail(ValueError, "plan", "mode 'recompute' or 'store'", repr(plan.mode), hint)
    if options.implementation == "autodiff":
        checks.fail(ValueError, "implementation", "'xla' with a plan", "'autodiff'", "It holds all the logits.")


class Prepared(NamedTuple):
    """What is computed with: no trace of unused tokens, and arrays that vary over a mesh as their results must."""

    projection: Projection
    examples: Examples
    shared: Shared
    counts: Counts


def prepared(
    schedules: blocks.Schedules, options: Options, projection: Projection, examples: Examples, shared: Shared
) -> Prepared:
    hidden, kernel, _ = projection
    hidden = nan_unless_gathered(options, hidden)
    examples, shared = alike_on_devices(options, examples, shared)
    shape = (*hidden.shape[:-1], kernel.shape[schedules[0].vocab_axis])
    classes = blocks.participating(examples.where, shape, schedules[0].forward_v, options.axis_name)
    like = of_rows(hidden, working_dtype(matmul_dtype(hidden.dtype, kernel.dtype)), options)
    counts = who_counts(options, examples, shared, like, classes)
    projection = projection._replace(hidden=_without_unused_of(options, hidden, examples, shared, counts))
    examples = usable_temperature(options, examples, counts)
    projection, examples, shared = mesh.vary_by_kind(options, projection, examples, shared)
    return Prepared(projection, examples, shared, vary(counts, mesh.row_axes(options, projection, examples, shared)))


def nan_unless_gathered(options: Options, hidden: Array) -> Array:
    """NaN in place of tokens that are not the same on all devices of the classes, as they have to be.

    Those that were gathered cannot be told from those that were not by their types, but by what they hold.
    """
    if not set(options.axis_name) & varying(hidden):
        return hidden
    sums = alike(lax.stop_gradient(jnp.sum(hidden, -1, dtype=working_dtype(hidden.dtype))), options.axis_name)
    return select(jnp.isnan(sums)[..., None], jnp.full_like(hidden, jnp.nan), hidden)


def of_rows(hidden: Array, dtype: DTypeLike, options: Options) -> Array:
    """Numbers of the shape and the type of what belongs to rows: the same on all devices of the classes."""
    like = lax.stop_gradient(jnp.sum(hidden, -1)).astype(dtype)
    return lax.pmax(like, options.axis_name) if options.axis_name else like


def _without_unused_of(options: Options, hidden: Array, examples: Examples, shared: Shared, counts: Counts) -> Array:
    """The hidden states, but 0 for what is not finite in unused tokens: in a matmul 0·NaN would reach everything."""
    unused = counts.unused
    given = options.ignore_index, examples.weights, examples.where, shared.class_weights
    if all(x is None for x in given):
        return hidden
    if not (options.label_smoothing or options.z_loss or options.return_aux):  # which a class of weight 0 does not stop
        unused = unused | (counts.weight == 0)
    return without_unused(unused, hidden)


def without_unused(unused: Array, hidden: Array) -> Array:
    # Not zeros_like: of an array that a program closes over it is not sharded as that is.
    return select(unused[..., None] & ~jnp.isfinite(hidden), 0, hidden)
