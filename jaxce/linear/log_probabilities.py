"""Log-probabilities of hidden states and a kernel, without their logits."""

from __future__ import annotations

import functools
from typing import Any, Generic, Literal, Unpack, overload

import jax
from jax import Array
from jax.lax import PrecisionLike

from jaxce import checks
from jaxce.arguments import Examples, Options, Projection, Shared, of_terms
from jaxce.linear import VocabAxis, blocks, mesh, recompute
from jaxce.linear.arguments import checked_linear, prepared
from jaxce.log_probabilities import CommonOptions, LogProbsAux, Result, composed, log_probs_of_logits, shaped_as
from jaxce.reverse_mode import reverse_mode_only
from jaxce.sharding import explicit_mesh, shard_count
from jaxce.targets import Ids
from jaxce.types import Array_, ArrayLike, AxisName, LinearImplementation, takes_variables


class LinearOptions(CommonOptions[Array_], Generic[Array_], total=False):
    bias: Array_ | None
    vocab_axis: VocabAxis
    where: Array_ | None
    mode: Literal["recompute"] | None
    memory_budget: int | None
    implementation: LinearImplementation | None
    precision: PrecisionLike


@overload
def linear_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    ids: ArrayLike,
    *,
    return_aux: Literal[True],
    **options: Unpack[LinearOptions[ArrayLike]],
) -> tuple[Array, LogProbsAux]: ...


@overload
def linear_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    ids: ArrayLike,
    *,
    return_aux: Literal[False] = False,
    **options: Unpack[LinearOptions[ArrayLike]],
) -> Array: ...


@overload
def linear_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    ids: ArrayLike,
    *,
    return_aux: bool,
    **options: Unpack[LinearOptions[ArrayLike]],
) -> Result: ...


@takes_variables
def linear_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    ids: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    vocab_axis: VocabAxis = 1,
    where: ArrayLike | None = None,
    logit_softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    ignore_index: int | None = None,
    axis_name: AxisName = None,
    return_aux: bool = False,
    implementation: LinearImplementation | None = None,
    mode: Literal["recompute"] | None = None,
    memory_budget: int | None = None,
    precision: PrecisionLike = None,
) -> Result:
    r"""Log-probabilities of given classes under the logits `hidden @ kernel + bias`, without ever holding the logits.

    For hidden state :math:`h`, kernel :math:`W` and bias :math:`b`, it equals

    .. math:: \mathrm{log\_probs}(h W + b,\ \text{ids}, \ldots)

    in value and in every gradient, with any cotangent for each token and id. Logits exist one block of the vocabulary
    at a time, once for the log-probabilities and all of the aux record, and once for the gradients.

    Args:
      hidden: floats `[..., D]`.
      kernel: floats `[D, V]`; or `[V, D]`, such as a tied embedding table, with `vocab_axis=0`.
      ids: integers from 0 to V-1, `[...]` or `[..., K]`.
      bias: floats `[V]`.
      vocab_axis: which axis of the kernel has the classes.
      where: bools that broadcast to `[..., V]`: the classes that take part; of shape `[...]`: the tokens that do.
      logit_softcap, temperature, ignore_index: as in `jaxce.log_probs`.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes, major first) that the classes are split over. `kernel`,
        `bias` and `where` are then this device's share; hidden states and ids are whole.
      return_aux: also return a `jaxce.LogProbsAux`.
      implementation: `"autodiff"` is plain JAX for forward mode (jvp, jacfwd, linearize), and does hold the logits.
        `"pallas_tpu"` asks for kernels on TPU, not yet run on one, as in `jaxce.linear_cross_entropy`; not with
        `return_aux`.
      mode: only `"recompute"` of `jaxce.linear_cross_entropy` gives a number per token. It keeps a few numbers for each
        (and the hidden states once more, if tokens may be left out).
      memory_budget, precision: as in `jaxce.linear_cross_entropy`.

    Returns:
      Log-probabilities in nats, shaped as `ids`, float64 if hidden or kernel is and float32 otherwise; with
      `return_aux`, `(log_probs, aux)` with a `jaxce.LogProbsAux`.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range, or a budget too small for any plan.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> hidden = jnp.array([[1.0, -0.5], [0.2, 2.0]])
      >>> embedding = jnp.array([[0.5, 1.0], [-1.0, 0.3], [2.0, 0.1]])  # [V, D]
      >>> sampled = jnp.array([2, 0])
      >>> chosen, aux = jaxce.linear_log_probs(hidden, embedding, sampled, vocab_axis=0, return_aux=True)
      >>> print(chosen, aux.entropy)
      [-0.17170142 -0.34061632] [0.5229848  0.79960835]

    Note:
      See `jaxce.log_probs`; blocks of the vocabulary as in `jaxce.linear_cross_entropy`.
    """
    checks.one_of("mode", mode, (None, "recompute"))
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "kernel": kernel,
        "targets": Ids(ids),
        "bias": bias,
        "vocab_axis": vocab_axis,
        "where": where,
        "logit_softcap": logit_softcap,
        "temperature": temperature,
        "ignore_index": ignore_index,
        "reduction": "none",
        "axis_name": axis_name,
        "return_aux": return_aux,
        "implementation": implementation,
        "memory_budget": memory_budget,
        "precision": precision,
    }
    if (explicit := explicit_mesh(hidden, kernel)) is not None:
        mesh.no_axis_names(arguments)
        checked_linear(**arguments | {"memory_budget": None})  # this is for each device
        return mesh.over_mesh(_checked_log_probs, explicit, arguments)
    return _checked_log_probs(**arguments)


def _checked_log_probs(**arguments: Any) -> Result:
    projection, examples, _, options, schedules, _ = checked_linear(**arguments, targets_name="ids")
    result: Result = _log_probs(projection, examples, options=options, schedules=schedules)
    return shaped_as(arguments["targets"].ids, result)


@functools.partial(jax.jit, static_argnames=("options", "schedules"))
def _log_probs(projection: Projection, examples: Examples, *, options: Options, schedules: blocks.Schedules) -> Result:
    projection, examples, shared, counts = prepared(schedules, options, projection, examples, Shared())
    if options.implementation == "autodiff":
        return log_probs_of_logits(options, blocks.all_logits(schedules, *projection), examples)
    arguments = reverse_mode_only((projection, *of_terms(options, examples, shared)))
    terms, record = recompute.linear_terms(schedules, options, *arguments)
    num_classes = projection.kernel.shape[schedules[0].vocab_axis] * shard_count(options.axis_name)
    return composed(options, terms, examples, counts, num_classes, record.argmax)
