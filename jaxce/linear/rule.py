"""The linear loss and its gradients, in either mode."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxce.compose import CrossEntropyAux, Options, applied_weights, compose, counted_examples, mean_divisor
from jaxce.linear import store, vocabulary
from jaxce.linear.blocks import Schedule, Schedules, by_platform, participating
from jaxce.linear.tokens import Shared, Tokens, amounts_of, inputs_of, row_axes, targets_of, without_class_weights
from jaxce.linear.vocabulary import Inputs, no_classes
from jaxce.reverse_mode import reverse_mode_only
from jaxce.sharding import shard_count, sum_over, vary
from jaxce.stats import RowStats, Spec, Terms, finish, finite, matmul_dtype, times, working_dtype

Result = Array | tuple[Array, CrossEntropyAux]
# Of the loss; and of the aux record's nll, where class weights make it another.
Records = tuple[RowStats | None, RowStats | None]

# --- recompute ------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_terms(
    schedules: Schedules, spec: Spec, inputs: Inputs, known: RowStats | None = None
) -> tuple[Terms, RowStats]:
    """The terms of each row of hidden @ kernel + bias, and its record, which an earlier pass may have left."""
    return _terms_fwd(schedules, spec, inputs, known)[0]


def _terms_fwd(schedules, spec, inputs, known):
    stats = known
    if known is None:
        stats = by_platform(schedules, lambda schedule, x: vocabulary.forward(schedule, spec, x)[0], inputs)
    return (finish(stats), stats), (inputs, *finite(stats))


def _terms_bwd(schedules, spec, residuals, cts):
    def backward(schedule: Schedule, inputs: Inputs, stats: RowStats, alive: Array, ct: Terms) -> Inputs:
        return vocabulary.backward(schedule, spec, inputs, stats, alive, ct)

    return by_platform(schedules, backward, *residuals, cts[0]), None


linear_terms.defvjp(_terms_fwd, _terms_bwd)


def recomputed_loss(
    schedules: Schedules, options: Options, tokens: Tokens, shared: Shared, known: Records = (None, None)
) -> tuple[Result, Records]:
    """The loss of tokens `[..., D]`: each block of logits is computed for the loss, and again for the gradient."""
    vocab_axis = schedules[0].vocab_axis
    inputs = reverse_mode_only(inputs_of(tokens, shared, vocab_axis, options))
    terms, record = linear_terms(schedules, options.spec, inputs, known[0])
    unweighted = other = None
    if (without := without_class_weights(inputs, options)) is not None:
        (_, unweighted, *_), other = linear_terms(schedules, options.nll_spec, without, known[1])
    shape = (*tokens.hidden.shape[:-1], shared.kernel.shape[vocab_axis])
    result = compose(
        terms,
        targets_of(tokens),
        shape[-1] * shard_count(options.axis_name),
        amounts_of(tokens, shared),
        options,
        participating=participating(tokens.where, shape, schedules[0].forward_v, options.axis_name),
        unweighted=unweighted,
        prediction=record.argmax,
    )
    return result, (record, other)


# --- store ----------------------------------------------------------------------------------------------------------


def stored_loss(schedules: Schedules, options: Options, tokens: Tokens, shared: Shared) -> Result:
    """The loss of tokens `[N, D]`, one number: on platforms that store, its gradients are computed along with it.

    The divisor of a mean comes first, so that gradients are divided by it before they are rounded.
    """
    tokens, shared = reverse_mode_only((tokens, shared))
    targets, amounts = targets_of(tokens), amounts_of(tokens, shared)
    rows = row_axes(tokens, shared, options.axis_name)
    dtype = working_dtype(matmul_dtype(tokens.hidden.dtype, shared.kernel.dtype))
    like = vary(jnp.zeros(tokens.hidden.shape[:1], dtype), rows)
    divisor, nothing = jnp.ones((), dtype), jnp.zeros((), jnp.bool_)
    if options.reduction != "sum":
        shape = (like.size, shared.kernel.shape[schedules[0].vocab_axis])
        classes = participating(tokens.where, shape, schedules[0].forward_v, options.axis_name)
        weight = applied_weights(targets, like, options, amounts, classes)
        divisor, nothing = mean_divisor(weight, counted_examples(targets, like, options, classes), options)
    sums = dataclasses.replace(options, reduction="sum", batch_axis_name=())
    loss, aux = _summed_loss(schedules, sums, tokens, shared, vary(divisor, rows))
    loss = jnp.where(nothing, 0, sum_over(loss, options.batch_axis_name))
    return (loss, aux) if options.return_aux else loss


def _recomputed_sum(
    schedules: Schedules,
    options: Options,
    tokens: Tokens,
    shared: Shared,
    divisor: Array,
    known: Records = (None, None),
) -> tuple[tuple[Array, CrossEntropyAux | None], Records]:
    result, records = recomputed_loss(schedules, options, tokens, shared, known)
    total, aux = result if isinstance(result, tuple) else (result, None)
    return (total / divisor, aux), records


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(
    schedules: Schedules, options: Options, tokens: Tokens, shared: Shared, divisor: Array
) -> tuple[Array, CrossEntropyAux | None]:
    """Where no gradient is wanted, none is computed: then this is the forward pass of the other mode."""
    return _recomputed_sum(schedules, options, tokens, shared, divisor)[0]


def _summed_fwd(schedules, options, tokens, shared, divisor):
    # A token of weight 0 has no part in any gradient but that of its weight, which is its loss.
    unweighted = tokens.weights is None or not tokens.weights.perturbed
    tokens, shared, divisor = jax.tree.map(lambda x: x.value, (tokens, shared, divisor))
    rows = row_axes(tokens, shared, options.axis_name)

    # What a platform does not keep is zeros there, which no program computes: the results must be of one type.
    def stored(schedule, tokens, shared, divisor):
        inputs = inputs_of(tokens, shared, schedule.vocab_axis, options)
        without = without_class_weights(inputs, options)
        records = no_classes(options.spec, inputs), without and no_classes(options.nll_spec, without)
        records = vary(jax.tree.map(jnp.zeros_like, records), rows)
        return *store.forward(schedule, options, tokens, shared, divisor, unweighted), records

    def recomputed(schedule, tokens, shared, divisor):
        (loss, aux), records = _recomputed_sum((schedule,) * 3, options, tokens, shared, divisor)
        grads = jax.tree.map(lambda x: jnp.zeros_like(x, divisor.dtype), _floats(tokens, shared))
        return loss, aux, grads, records

    def either(schedule, *args):
        return (stored if schedule.block_n else recomputed)(schedule, *args)

    loss, aux, grads, records = by_platform(schedules, either, tokens, shared, divisor)
    return (loss, aux), (tokens, shared, divisor, loss, grads, records)


def _summed_bwd(schedules, options, residuals, cts):
    tokens, shared, *residuals = residuals
    of_aux = any(_used(x) for x in jax.tree.leaves(cts[1], is_leaf=_is_symbolic))
    cts = jax.tree.map(_materialised, cts, is_leaf=_is_symbolic)

    def backward(schedule, floats, fixed, divisor, loss, grads, records, cts):
        if schedule.block_n and not of_aux:
            dfloats = jax.tree.map(lambda x, g: times(cts[0], g.astype(cts[0].dtype)).astype(x.dtype), floats, grads)
            return dfloats, -cts[0] * loss / divisor

        # What the aux record adds is known only now, so it takes the matmuls of the other mode.
        def again(floats, divisor):
            tokens, shared = floats
            tokens = tokens._replace(**fixed)
            known = (None, None) if schedule.block_n else records
            return _recomputed_sum((schedule,) * 3, options, tokens, shared, divisor, known)[0]

        return jax.vjp(again, floats, divisor)[1](cts)

    fixed = {"indices": tokens.indices, "where": tokens.where}
    (dtokens, dshared), ddivisor = by_platform(schedules, backward, _floats(tokens, shared), fixed, *residuals, cts)
    return dtokens, dshared, ddivisor


def _floats(tokens: Tokens, shared: Shared) -> tuple[Tokens, Shared]:
    return tokens._replace(indices=None, where=None), shared


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _used(ct: Any) -> bool:
    return not _is_symbolic(ct) and ct.dtype != jax.dtypes.float0


def _materialised(ct: Any) -> Array:
    return vary(jnp.zeros(ct.shape, ct.dtype), ct.aval.mat.varying) if _is_symbolic(ct) else ct


_summed_loss.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)
