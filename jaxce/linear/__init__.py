"""Softmax cross-entropy of hidden states and a kernel: check, plan, compute, compose."""

from __future__ import annotations

import functools
import math
from typing import Any, Generic, Literal, Unpack, cast, overload

import jax
import numpy as np
from jax import Array
from jax.lax import PrecisionLike

from jaxce import checks, types
from jaxce.arguments import Examples, Options, Projection, Shared, flat, with_targets_checked
from jaxce.compose import CrossEntropyAux
from jaxce.linear import blocks, chips, mesh, recompute, store
from jaxce.linear import plan as plans
from jaxce.linear.arguments import checked_linear, prepared
from jaxce.linear.costs import Problem
from jaxce.linear.plan import LinearPlan
from jaxce.sharding import explicit_mesh
from jaxce.softmax import loss_of_logits
from jaxce.targets import Targets
from jaxce.types import (
    Array_,
    ArrayLike,
    AxisName,
    LinearImplementation,
    Mode,
    Platform,
    Reduction,
    Shape,
    takes_variables,
)

VocabAxis = Literal[0, 1, -1, -2]


class LinearOptions(types.CommonOptions[Array_], Generic[Array_], total=False):
    bias: Array_ | None
    vocab_axis: VocabAxis
    where: Array_ | None
    mode: Mode | None
    memory_budget: int | None
    plan: LinearPlan | None
    implementation: LinearImplementation | None
    precision: PrecisionLike


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: Targets,
    *,
    return_aux: Literal[True],
    **options: Unpack[LinearOptions[ArrayLike]],
) -> tuple[Array, CrossEntropyAux]: ...


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: Targets,
    *,
    return_aux: Literal[False] = False,
    **options: Unpack[LinearOptions[ArrayLike]],
) -> Array: ...


@overload
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: Targets,
    *,
    return_aux: bool,
    **options: Unpack[LinearOptions[ArrayLike]],
) -> Array | tuple[Array, CrossEntropyAux]: ...


@takes_variables
def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    targets: Targets,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: VocabAxis = 1,
    where: ArrayLike | None = None,
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
    implementation: LinearImplementation | None = None,
    mode: Mode | None = None,
    memory_budget: int | None = None,
    plan: LinearPlan | None = None,
    precision: PrecisionLike = None,
) -> Array | tuple[Array, CrossEntropyAux]:
    r"""Softmax cross-entropy of the logits `hidden @ kernel + bias`, without ever holding the logits.

    For hidden state :math:`h`, kernel :math:`W` and bias :math:`b`, it equals

    .. math:: \mathrm{softmax\_cross\_entropy}(h W + b,\ \text{targets}, \ldots)

    in value and in every gradient, for every option and every kind of target. Logits exist one block at a time, in
    float32; a language model with N tokens and V classes needs no memory that grows with N·V (on GPU, if a
    `memory_budget` says so).

    Args:
      hidden: floats `[..., D]`.
      kernel: floats `[D, V]`; or `[V, D]`, such as a tied embedding table, with `vocab_axis=0`. No transposed
        copy is made of it or its gradient.
      targets: integers `[...]` from 0 to V-1, floats `[..., V]`, or `jaxce.SparseTargets`.
      bias: floats `[V]`.
      vocab_axis: which axis of the kernel has the classes.
      where: bools that broadcast to `[..., V]`: the classes that take part.
      weights, class_weights, label_smoothing, ignore_index, z_loss, logit_softcap, temperature, reduction: as in
        `jaxce.softmax_cross_entropy`.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes, major first) that the classes are split over. `kernel`,
        `bias`, `where`, `class_weights` and probability targets are then this device's share, in the order of the
        devices; hidden states and class indices are whole (`jax.lax.all_gather` them: tokens that differ along it are
        NaN). Devices exchange a few numbers per token, and the gradient of the hidden states.
      batch_axis_name: inside `jax.shard_map`, the mesh axis (or axes) that the tokens are split over, to reduce over
        all of them: the same number on every device.
      return_aux: also return a `jaxce.CrossEntropyAux`.
      implementation: `"autodiff"` is plain JAX for forward mode (jvp, jacfwd, linearize), and does hold the logits.
        `"pallas_tpu"` asks for kernels on TPU: "recompute" with the exponentials computed while the next product is
        under way; compiled for v4 to TPU7x and interpreted, not yet run on a TPU. It is for bfloat16 and float32,
        class indices or sparse targets of up to 8 classes, and masks that are the same for all tokens, without
        temperature; on other platforms the loss is computed as without it.
      mode: `"recompute"` goes through blocks of the vocabulary, twice: once for the loss and once for the gradient,
        which takes four matmuls and hardly any memory. `"store"` goes through blocks of tokens and computes the
        gradients along with the loss, three matmuls; it is for losses that are one number (`reduction` not "none"), and
        holds one block of logits with the whole vocabulary. It leaves blocks out that hold only ignored examples or
        examples of weight 0 (the latter if no gradient in the weights is asked for; none with `return_aux`,
        probability targets or a mask per token), and keeps the gradients for the backward pass: `jax.lax.scan` over
        batches keeps them for every step if its gradient is taken from outside (take it inside, or use "recompute").
        In both, a gradient that is not asked for, as of a frozen kernel, takes no matmul and no memory. None: chosen by
        the platform that is compiled for, and the shapes.
      memory_budget: bytes that loss and gradient may take beyond arguments and results; blocks are made smaller until
        they fit. See `jaxce.plan_linear_cross_entropy`. None: as many as the fastest plan takes; on GPU, half of what
        logits and their gradient would.
      plan: mode and blocks as `jaxce.tune_linear_cross_entropy` found them fastest, in place of `mode` and
        `memory_budget`; for these tokens, features and classes.
      precision: of the matmuls, as in `jax.lax.dot_general`.

    Returns:
      The loss in nats, float64 if hidden or kernel is and float32 otherwise; with `return_aux`, `(loss, aux)`.
      Gradients have the dtype of their argument and are summed in float32.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range, or a budget too small for any plan.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> hidden = jnp.array([[1.0, -0.5], [0.2, 2.0]])
      >>> embedding = jnp.array([[0.5, 1.0], [-1.0, 0.3], [2.0, 0.1]])  # [V, D]
      >>> labels = jnp.array([2, 0])
      >>> print(jaxce.linear_cross_entropy(hidden, embedding, labels, vocab_axis=0, reduction="mean"))
      0.25615886

    Note:
      Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; Hsu et al., "Liger Kernel", 2024,
      section 3.2, for gradients computed along with the loss.
    """
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "kernel": kernel,
        "targets": targets,
        "bias": bias,
        "vocab_axis": vocab_axis,
        "where": where,
        "weights": weights,
        "class_weights": class_weights,
        "label_smoothing": label_smoothing,
        "ignore_index": ignore_index,
        "z_loss": z_loss,
        "logit_softcap": logit_softcap,
        "temperature": temperature,
        "reduction": reduction,
        "axis_name": axis_name,
        "batch_axis_name": batch_axis_name,
        "return_aux": return_aux,
        "implementation": implementation,
        "mode": mode,
        "memory_budget": memory_budget,
        "plan": plan,
        "precision": precision,
    }
    if (explicit := explicit_mesh(hidden, kernel)) is not None:
        mesh.no_axis_names(arguments)
        checked_linear(**arguments | {"memory_budget": None, "plan": None})  # these are for each device
        return mesh.over_mesh(linear_cross_entropy, explicit, arguments)
    projection, examples, shared, options, schedules, _ = checked_linear(**arguments)
    result = _loss(projection, examples, shared, options=options, schedules=schedules)
    features = projection.hidden.ndim - 1  # the axis of the classes in targets
    return cast(
        "Array | tuple[Array, CrossEntropyAux]", with_targets_checked(result, targets, examples, (features,), options)
    )


@takes_variables
def plan_linear_cross_entropy(
    hidden: Shape,
    kernel: Shape,
    targets: Targets | jax.ShapeDtypeStruct,
    *,
    platform: Platform | None = None,
    return_aux: bool = False,
    **options: Unpack[LinearOptions[Shape]],
) -> LinearPlan:
    r"""What `jaxce.linear_cross_entropy` will do with the same arguments: mode, block sizes, memory, operations.

    For N tokens of D features and V classes the matmuls of loss and gradients take

    .. math:: 2 N D V \cdot \begin{cases} 4 & \text{mode "recompute"} \\ 3 & \text{mode "store"} \end{cases}

    floating-point operations.

    Args:
      hidden, kernel, targets: as there; arrays or `jax.ShapeDtypeStruct`. Nothing is computed. Of what is split over
        devices, give one device's share: plan and budget are for each.
      platform: `"cpu"`, `"tpu"` or `"gpu"`: what the program is compiled for. None: what this process runs on.
      return_aux, options: as there.

    Returns:
      A `LinearPlan`; `print` shows it.

    Raises:
      TypeError, ValueError: what `jaxce.linear_cross_entropy` would raise; of a budget, on that platform. The loss
        itself holds a budget against the platform at hand: for another give it a plan, `plan=`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> hidden = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
      >>> kernel = jax.ShapeDtypeStruct((512, 50304), jnp.float32)
      >>> labels = jax.ShapeDtypeStruct((4096,), jnp.int32)
      >>> plan = jaxce.plan_linear_cross_entropy(hidden, kernel, labels, mode="recompute")
      >>> plan.flops
      843961073664

    Note:
      The block sizes and the defaults of `jaxce.linear.plan` come from measurements and from compiled programs; on GPU
      from a model, `jaxce.linear.costs`.
    """
    checks.one_of("platform", platform, (None, *plans.PLATFORMS))
    given = {"hidden": hidden, "kernel": kernel, "targets": targets, "return_aux": return_aux, **options}
    problem = problem_of(**given, platform=platform)
    mode, memory_budget = options.get("mode"), options.get("memory_budget")
    return options.get("plan") or plans.make_plan(problem, platform or chips.chip()[0], mode, memory_budget)


def problem_of(**arguments: Any) -> Problem:
    """What a plan depends on, from arrays or `jax.ShapeDtypeStruct`."""
    if arguments.get("implementation") == "autodiff":
        checks.fail(ValueError, "implementation", "'xla' or 'pallas_tpu'", "'autodiff'", "It holds all the logits.")
    arrays, constants = arrays_and_constants(arguments)
    found: list[Problem] = []
    jax.eval_shape(lambda arrays: found.append(checked_linear(**arrays, **constants)[-1]), arrays)
    return found[0]


def arrays_and_constants(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that are arrays, or trees of them, or only describe arrays; and the others."""
    arrays = {
        name: x
        for name, x in arguments.items()
        if name not in _CONSTANTS and (leaves := jax.tree.leaves(x)) and all(map(_describes_array, leaves))
    }
    return arrays, {name: x for name, x in arguments.items() if name not in arrays}


_CONSTANTS = "ignore_index", "memory_budget", "logit_softcap", "vocab_axis"  # which may be NumPy's numbers


def _describes_array(x: Any) -> bool:
    """As JAX takes it: arrays of objects, for one, are left to the checks, and numbers are numbers of the program."""
    return (
        not isinstance(x, np.generic)
        and hasattr(x, "shape")
        and hasattr(x, "dtype")
        and not (isinstance(x, np.ndarray) and not checks.is_array(x))
    )


@functools.partial(jax.jit, static_argnames=("options", "schedules"))
def _loss(
    projection: Projection, examples: Examples, shared: Shared, *, options: Options, schedules: blocks.Schedules
) -> Array | tuple[Array, CrossEntropyAux]:
    *batch, _ = projection.hidden.shape
    projection, examples, shared, counts = prepared(schedules, options, projection, examples, shared)
    if options.implementation == "autodiff":
        return loss_of_logits(options, blocks.all_logits(schedules, *projection), examples, shared)
    if not any(schedule.block_n for schedule in schedules):
        return recompute.loss(schedules, options, projection, examples, shared, counts)[0]
    counts = jax.tree.map(lambda x: x.reshape(math.prod(batch)), counts)
    result = store.loss(schedules, options, *flat(batch, projection, examples), shared, counts)
    if not isinstance(result, tuple):
        return result
    loss, aux = result
    return loss, jax.tree.map(lambda x: x.reshape(batch), aux)
