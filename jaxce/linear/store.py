"""Blocks of tokens with the whole vocabulary, and their gradients in the same breath.

For a loss that is one number, every token's share in the gradient is known as soon as its logits are, up to the one
number that the backward pass brings. So the logits are computed once and kept until their gradient is taken: three
matmuls for loss and gradient. What stays is the gradients themselves, and one block of logits at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce.compose import Amounts, CrossEntropyAux, Options, compose, unused_examples
from jaxce.linear import vocabulary
from jaxce.linear.blocks import Schedule, over_blocks, participating, put, take
from jaxce.linear.tokens import Shared, Tokens, amounts_of, inputs_of, row_axes, targets_of, without_class_weights
from jaxce.sharding import shard_count, vary, varying
from jaxce.stats import Terms, finish, finite, matmul_dtype, working_dtype
from jaxce.targets import Targets


class _State(NamedTuple):
    total: Array
    aux: CrossEntropyAux | None
    tokens: Tokens  # gradients
    shared: Shared  # gradients, summed up
    logits: Array  # of the block at hand: one array for all blocks, which nobody has to clear


def forward(
    schedule: Schedule, options: Options, tokens: Tokens, shared: Shared, divisor: Array, unweighted: bool
) -> tuple[Array, CrossEntropyAux | None, tuple[Tokens, Shared]]:
    """The sum of the losses over the divisor, the aux record, and the gradients of the former in the working dtype.

    With `unweighted`, the gradient in the weights is not wanted of tokens whose weight is 0.
    """
    n, block_n = tokens.hidden.shape[0], schedule.block_n
    dtype = working_dtype(matmul_dtype(tokens.hidden.dtype, shared.kernel.dtype))
    logits = lax.empty((min(block_n, n), shared.kernel.shape[schedule.vocab_axis]), dtype)
    logits = vary(logits, varying(tokens, shared))
    if 0 < n <= block_n:  # nothing to add up
        nothing = Shared(None, None, *(None if x is None else jnp.zeros_like(x, dtype) for x in shared[2:]))
        total, aux, dtokens, dshared, _ = _block(schedule, options, tokens, shared, divisor, nothing, logits)
        return total, aux, (dtokens, dshared)
    count, order = n, None
    if block_n < n and not options.return_aux:  # which says something of unused tokens too
        tokens, count, order = _used_first(tokens, shared, options, schedule, unweighted)

    def block(start: Any, size: int, state: _State) -> _State:
        def add(state: _State) -> _State:
            x = jax.tree.map(lambda a: take(a, start, size, 0), tokens) if size < n else tokens
            total, aux, written, sums, logits = _block(
                schedule, options, x, shared, divisor, state.shared, state.logits
            )

            def write(whole: Array, part: Array) -> Array:
                return put(whole, part, start, 0)

            return _State(
                state.total + total,
                jax.tree.map(write, state.aux, aux),
                jax.tree.map(write, state.tokens, written),
                sums,
                logits,
            )

        return add(state) if order is None else lax.cond(start < count, add, lambda state: state, state)

    total, rows = vary((jnp.zeros((), dtype), jnp.zeros((n,), dtype)), row_axes(tokens, shared, options.axis_name))
    state = _State(
        total,
        CrossEntropyAux(rows, rows, rows, rows.astype(jnp.int32), rows) if options.return_aux else None,
        jax.tree.map(lambda x: jnp.zeros_like(x, dtype), tokens._replace(indices=None, where=None)),
        jax.tree.map(lambda x: jnp.zeros_like(x, dtype), shared),
        logits,
    )
    if n:
        state = over_blocks(n, block_n, block, state)
    dtokens = state.tokens
    if order is not None:
        dtokens = jax.tree.map(lambda x: jnp.zeros_like(x).at[order].set(x, unique_indices=True), dtokens)
    return state.total, state.aux, (dtokens, state.shared)


def _used_first(
    tokens: Tokens, shared: Shared, options: Options, schedule: Schedule, unweighted: bool
) -> tuple[Tokens, Any, Array | None]:
    """The tokens with the unused ones last, the number of the others, and their order.

    Not where all are used, and not where probabilities or a mask `[N, V]` would have to be moved with them.
    """
    heavy = tokens.indices is None or (tokens.where is not None and tokens.where.shape[0] > 1)
    weights = tokens.weights if unweighted else None
    if heavy or (options.ignore_index is None and weights is None):
        return tokens, tokens.hidden.shape[0], None
    shape = (tokens.hidden.shape[0], shared.kernel.shape[schedule.vocab_axis])
    classes = participating(tokens.where, shape, schedule.forward_v, options.axis_name)
    like = jnp.sum(tokens.hidden, -1)
    amounts = amounts_of(tokens, shared)._replace(weights=weights)
    unused = unused_examples(targets_of(tokens), like, options, amounts, classes)
    order = jnp.argsort(unused, stable=True)
    ordered = jax.tree.map(lambda x: x if x.shape[0] == 1 else jnp.take(x, order, axis=0), tokens)
    return ordered, jnp.sum(~unused), order


def _block(
    schedule: Schedule,
    options: Options,
    tokens: Tokens,
    shared: Shared,
    divisor: Array,
    sums: Shared,
    logits: Array,
) -> tuple[Array, CrossEntropyAux | None, Tokens, Shared, Array]:
    """Loss over divisor, aux record and gradients of a block of tokens; what belongs to all tokens is added to `sums`.

    The last result is the array `logits`, overwritten with those of this block.

    Without a kernel in `sums`, the gradients of kernel and bias are written as they are.
    """
    spec, inputs = options.spec, inputs_of(tokens, shared, schedule.vocab_axis, options)
    stats, kept = vocabulary.forward(schedule, spec, inputs, keep_in=logits)
    unweighted = None
    if (without := without_class_weights(inputs, options)) is not None:
        unweighted = vocabulary.forward(schedule, options.nll_spec, without, kept=kept)[0]
    shape = (tokens.hidden.shape[0], shared.kernel.shape[schedule.vocab_axis])

    def loss(terms: Terms, probs: Array | None, amounts: Amounts) -> tuple[Array, CrossEntropyAux | None]:
        result = compose(
            terms,
            Targets(tokens.indices, probs),
            shape[-1] * shard_count(options.axis_name),
            amounts,
            options,
            participating=participating(tokens.where, shape, schedule.forward_v, options.axis_name),
            unweighted=None if unweighted is None else finish(unweighted).target,
            prediction=stats.argmax,
        )
        total, aux = result if isinstance(result, tuple) else (result, None)
        return total / divisor, aux

    total, pullback, aux = jax.vjp(loss, finish(stats), tokens.probs, amounts_of(tokens, shared), has_aux=True)
    ct, dprobs, damounts = pullback(jnp.ones_like(total))
    # Class weights come into the loss in three ways: here, at probability targets, and by smoothing.
    summed = inputs._replace(
        kernel=sums.kernel,
        bias=sums.bias,
        target_weights=None if inputs.target_weights is None else jnp.zeros_like(sums.class_weights),
        smoothing_weights=None if inputs.smoothing_weights is None else jnp.zeros_like(sums.class_weights),
    )
    grads = vocabulary.backward(
        schedule, spec, inputs, *finite(stats), ct, kept=kept, sums=None if sums.kernel is None else summed
    )
    dshared = Shared(None, None, damounts.class_weights, damounts.label_smoothing, damounts.z_loss)
    sums = jax.tree.map(
        lambda x, d: x if d is None else x + d.astype(x.dtype), sums, dshared, is_leaf=lambda x: x is None
    )
    for by_class in (grads.target_weights, grads.smoothing_weights):
        if by_class is not None:
            sums = sums._replace(class_weights=sums.class_weights + by_class)
    sums = sums._replace(kernel=grads.kernel, bias=grads.bias)
    if inputs.probs is not None:
        dprobs = grads.probs
    return total, aux, Tokens(grads.hidden, None, dprobs, damounts.weights), sums, kept
