"""Log-probabilities of given classes, and what else of the distribution a policy or a student is trained with."""

from __future__ import annotations

import functools
import math
from typing import Any, Generic, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce import checks
from jaxce.arguments import Examples, Options, Shared, checked
from jaxce.compose import Counts, zero_if_too_large
from jaxce.layout import classes_last, sharded_alike
from jaxce.lookup import repeated_entries
from jaxce.selection import select
from jaxce.serialization import serializable
from jaxce.sharding import shard_count
from jaxce.softmax import rows_of_logits
from jaxce.stats import Terms
from jaxce.targets import Ids, nan_where_unknown
from jaxce.types import Array_, ArrayLike, Axis, AxisName, Implementation, takes_variables


class LogProbsAux(NamedTuple):
    """What `return_aux=True` returns beside the log-probabilities: four arrays of the batch shape.

    All but `prediction` are in the working dtype and differentiable, alone or together with the log-probabilities. Of
    rows that are left out, by `where` or with all ids ignored, they are finite and mean nothing.

    Attributes:
      entropy: −Σ_c p_c log p_c, in nats.
      log_normalizer: logsumexp of the logits, after soft cap, temperature and mask.
      prediction: int32, the class with the largest logit (the first of equals).
      tail: log of the probability of all classes but the ids, log(1 − Σ_k p_k) with each id counted once, exact
        where that is tiny and where it is nearly 1; −inf if there are no others.
    """

    entropy: Array
    log_normalizer: Array
    prediction: Array
    tail: Array


serializable(LogProbsAux)
Result = Array | tuple[Array, LogProbsAux]


class CommonOptions(TypedDict, Generic[Array_], total=False):
    """What both functions take by keyword, but for `return_aux`, which makes the result."""

    logit_softcap: float | None
    temperature: Array_
    ignore_index: int | None
    axis_name: AxisName


class DenseOptions(CommonOptions[ArrayLike], total=False):
    implementation: Implementation | None


@overload
def log_probs(
    logits: ArrayLike,
    ids: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_aux: Literal[True],
    **options: Unpack[DenseOptions],
) -> tuple[Array, LogProbsAux]: ...


@overload
def log_probs(
    logits: ArrayLike,
    ids: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_aux: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Array: ...


@overload
def log_probs(
    logits: ArrayLike,
    ids: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    return_aux: bool,
    **options: Unpack[DenseOptions],
) -> Result: ...


@takes_variables
def log_probs(
    logits: ArrayLike,
    ids: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    logit_softcap: float | None = None,
    temperature: ArrayLike = 1.0,
    ignore_index: int | None = None,
    axis_name: AxisName = None,
    return_aux: bool = False,
    implementation: Implementation | None = None,
) -> Result:
    r"""Log-probabilities of given classes: of the tokens that were sampled, or of a teacher's K most likely.

    For logits :math:`z` and temperature :math:`T`,

    .. math:: \log p_k = \frac{z_k}{T} - \operatorname{lse}\Bigl(\frac{z}{T}\Bigr)

    computed relative to the largest logit, so that a common offset changes no digit of it and a probability of nearly 1
    has a logarithm with all of its digits.

    Args:
      logits: floats of 8 to 64 bits, `[..., V]`; the class axis may be anywhere, see `axis`. −inf means probability 0.
      ids: integers of any dtype from 0 to V-1: of the batch shape `[...]`, one class per example, or `[..., K]`. Of
        several entries with the same class each gets its log-probability.
      axis: the class axis. A tuple of axes makes them one class axis, row-major; None means all axes.
      where: bools that broadcast to the shape of logits: the classes that take part. The others have log-probability
        −inf. Of the batch shape: the examples that take part; the others give 0.
      logit_softcap: a Python number c > 0: the logits become c·tanh(logits/c) (before `where`).
      temperature: T > 0, a number or numbers that broadcast to the batch shape; differentiable.
      ignore_index: ids with this number get 0, whatever the logits hold. Any integer.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes, major first) that the classes are split over. `logits`
        and `where` are then this device's share; ids are global.
      return_aux: also return a `jaxce.LogProbsAux`: entropy, log-normalizer, prediction, and the tail.
      implementation: `"autodiff"` is plain JAX for forward mode (jvp, jacfwd, linearize), as in
        `jaxce.softmax_cross_entropy`.

    Returns:
      Log-probabilities in nats, shaped as `ids`, float64 for float64 logits and float32 for all others; with
      `return_aux`, `(log_probs, aux)`. An id outside 0..V-1, a NaN logit, or a row of nothing but −inf gives NaN and a
      NaN gradient row (under `jax.experimental.checkify`, such an id is an error).

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range; the message says what to do.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
      >>> print(jaxce.log_probs(logits, jnp.array([0, 1])))
      [-0.2761297 -2.951799 ]
      >>> chosen, aux = jaxce.log_probs(logits, jnp.array([[0, 2], [2, 0]]), return_aux=True)
      >>> print(jnp.exp(aux.tail))  # of the third class
      [0.10268085 0.05224564]

    Note:
      The ratios of PPO (Schulman et al., 2017, equation 6) and of DPO (Rafailov et al., 2023, equation 7) are
      differences of these.
    """
    logits = checks.float_array("logits", logits, ids, "ids")
    axes = checks.class_axes(axis, logits.ndim)
    checks.num_classes("logits", math.prod(logits.shape[i] for i in axes))
    examples, _, options = checked(
        Ids(ids),
        logits.shape,
        axes,
        logits.dtype,
        "ids",
        where=where,
        logit_softcap=logit_softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        axis_name=axis_name,
        return_aux=return_aux,
        implementation=implementation,
    )
    checks.split_over("logits", logits, options.axis_name, "classes")
    result: Result = _log_probs(logits, examples, axes=axes, options=options)
    return shaped_as(ids, result)


@functools.partial(jax.jit, static_argnames=("axes", "options"))
def _log_probs(logits: Array, examples: Examples, *, axes: tuple[int, ...], options: Options) -> Result:
    examples, _ = sharded_alike(options, logits, examples, Shared(), axes)
    logits, examples = classes_last(logits, examples, axes)
    return log_probs_of_logits(options, logits, examples)


def log_probs_of_logits(options: Options, logits: Array, examples: Examples) -> Result:
    """From checked arguments with the classes last; shaped `[..., K]`."""
    rows = rows_of_logits(options, logits, examples, Shared())
    num_classes = logits.shape[-1] * shard_count(options.axis_name)
    return composed(options, rows.terms, examples, rows.counts, num_classes, rows.prediction)


def composed(
    options: Options, terms: Terms, examples: Examples, counts: Counts, num_classes: int, prediction: Array | None
) -> Result:
    """Log-probabilities `[..., K]`, and the aux record if asked for, from the terms of each row."""
    indices = examples.indices
    assert indices is not None  # ids are
    ignored = jnp.zeros_like(indices, dtype=jnp.bool_)
    if options.ignore_index is not None:
        ignored = indices == options.ignore_index
    idle = ignored | counts.unused[..., None]
    terms = jax.tree.map(lambda x: zero_if_too_large(x, counts.unused), terms)
    known = nan_where_unknown(indices, num_classes, idle, "ids: id").astype(terms.target.dtype)
    log_p = select(idle, 0, 0 - terms.target * known)
    if not options.return_aux:
        return log_p
    # A mass of nearly 1 has the digits of its logarithm in what it lacks: the probabilities of the ids.
    # NaN has no derivative: it must not turn a cotangent of 0 into NaN.
    fixed = select(jnp.isnan(log_p), lax.stop_gradient(log_p), log_p)
    mass = jnp.sum(select(repeated_entries(indices) | ignored, 0, jnp.exp(fixed)), -1)
    assert terms.entropy is not None  # the aux record is why it was computed
    assert terms.tail is not None
    assert prediction is not None
    tail = select(mass < 0.5, jnp.log1p(-jnp.minimum(mass, 0.5)), terms.tail) * jnp.prod(known, -1)
    return log_p, LogProbsAux(terms.entropy, terms.log_normalizer, prediction, tail)


def shaped_as(ids: Any, result: Result) -> Result:
    """Without the axis of the entries, if the ids have none."""
    if isinstance(result, tuple):
        return result[0].reshape(jnp.shape(ids)), result[1]
    return result.reshape(jnp.shape(ids))
