"""The linear loss and its gradients, in either mode."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxce.compose import CrossEntropyAux, Options, applied_weights, average, compose, counted_examples
from jaxce.linear import store, vocabulary
from jaxce.linear.blocks import Projection, participating
from jaxce.linear.tokens import Shared, Tokens, amounts_of, inputs_of, targets_of, without_class_weights
from jaxce.linear.vocabulary import Inputs
from jaxce.sharding import shard_count, vary, varying
from jaxce.stats import Spec, Terms, finish

# --- recompute ------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def linear_terms(projection: Projection, block_v: int, spec: Spec, inputs: Inputs) -> tuple[Terms, Array | None]:
    """The terms of each row of hidden @ kernel + bias; and its most likely class, if the entropy is wanted."""
    return _terms_fwd(projection, block_v, spec, inputs)[0]


def _terms_fwd(projection, block_v, spec, inputs):
    stats, _ = vocabulary.forward(projection, block_v, spec, inputs)
    return (finish(stats), stats.argmax), (inputs, stats)


def _terms_bwd(projection, block_v, spec, residuals, cts):
    inputs, stats = residuals
    return (vocabulary.backward(projection, block_v, spec, inputs, stats, cts[0]),)


linear_terms.defvjp(_terms_fwd, _terms_bwd)


def recomputed_loss(
    projection: Projection, block_v: int, options: Options, tokens: Tokens, shared: Shared
) -> Array | tuple[Array, CrossEntropyAux]:
    """The loss of tokens `[..., D]`: each block of logits is computed for the loss, and again for the gradient."""
    inputs = inputs_of(tokens, shared, projection, options)
    terms, prediction = linear_terms(projection, block_v, options.spec, inputs)
    unweighted = None
    if (without := without_class_weights(inputs, options)) is not None:
        unweighted = linear_terms(projection, block_v, options.nll_spec, without)[0].target
    shape = (*tokens.hidden.shape[:-1], shared.kernel.shape[projection.vocab_axis])
    return compose(
        terms,
        targets_of(tokens),
        shape[-1] * shard_count(options.axis_name),
        amounts_of(tokens, shared),
        options,
        participating=participating(tokens.where, shape, block_v, options.axis_name),
        unweighted=unweighted,
        prediction=prediction,
    )


# --- store ----------------------------------------------------------------------------------------------------------


def stored_loss(
    projection: Projection, block_n: int, block_v: int, options: Options, tokens: Tokens, shared: Shared
) -> Array | tuple[Array, CrossEntropyAux]:
    """The loss of tokens `[N, D]`, one number: its gradients are computed along with it."""
    sums = dataclasses.replace(options, reduction="sum", batch_axis_name=())
    total, aux = _summed_loss(projection, block_n, block_v, sums, tokens, shared)
    targets, amounts = targets_of(tokens), amounts_of(tokens, shared)
    rows = vary(jnp.zeros(tokens.hidden.shape[:1], total.dtype), varying(total))
    shape = (rows.size, shared.kernel.shape[projection.vocab_axis])
    classes = participating(tokens.where, shape, block_v, options.axis_name)
    weight = applied_weights(targets, rows, options, amounts, classes)
    counted = counted_examples(targets, rows, options, classes)
    loss = average(total, weight, counted, options)
    return (loss, aux) if options.return_aux else loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _summed_loss(
    projection: Projection, block_n: int, block_v: int, options: Options, tokens: Tokens, shared: Shared
) -> tuple[Array, CrossEntropyAux | None]:
    """Where no gradient is wanted, none is computed: then this is the forward pass of the other mode."""
    result = recomputed_loss(projection, block_v, options, tokens, shared)
    return result if isinstance(result, tuple) else (result, None)


def _summed_fwd(projection, block_n, block_v, options, tokens, shared):
    tokens, shared = jax.tree.map(lambda x: x.value, (tokens, shared))
    total, aux, *grads = store.forward(projection, block_n, block_v, options, tokens, shared)
    return (total, aux), (tokens, shared, tuple(grads))


def _summed_bwd(projection, block_n, block_v, options, residuals, cts):
    tokens, shared, grads = residuals
    ct, ct_aux = cts
    known = jax.tree.map(lambda x, g: (ct * g.astype(ct.dtype)).astype(x.dtype), _floats(tokens, shared), grads)
    if not any(_used(x) for x in jax.tree.leaves(ct_aux, is_leaf=_is_symbolic)):
        return known

    # What the aux record adds is known only now, so it takes the matmuls of the other mode.
    def aux(tokens, shared):
        return recomputed_loss(projection, block_v, options, tokens, shared)[1]

    _, pullback = jax.vjp(aux, tokens, shared)
    added = pullback(jax.tree.map(_materialised, ct_aux, is_leaf=_is_symbolic))
    return jax.tree.map(lambda a, b: a + b, known, _floats(*added))


def _floats(tokens: Tokens, shared: Shared) -> tuple[Tokens, Shared]:
    return tokens._replace(indices=None, where=None), shared


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _used(ct: Any) -> bool:
    return not _is_symbolic(ct) and ct.dtype != jax.dtypes.float0


def _materialised(ct: Any) -> Array:
    return vary(jnp.zeros(ct.shape, ct.dtype), ct.aval.mat.varying) if _is_symbolic(ct) else ct


_summed_loss.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)
