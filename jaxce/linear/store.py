"""Blocks of tokens with the whole vocabulary, and their gradients in the same breath.

For a loss that is one number, every token's share in the gradient is known as soon as its logits are, up to the one
number that the backward pass brings. So the logits are computed once and kept until their gradient is taken: three
matmuls for loss and gradient. What stays is the gradients themselves, and one block of logits at a time.

On CPU, where matmuls take most of the time, it is the faster method wherever it applies
(`benchmarks/results/linear-cpu.json`), in parts of a block of 2²¹ numbers. Up to 2²⁴ logits it works on all of them at
once. If that is all there are, it is the same as the other method in one block, whose second logits a compiler finds to
be the first: so it computes them again in a separate backward pass, and keeps no gradient for it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce.arguments import Examples, Options, Projection, Shared, of_nll, of_terms
from jaxce.compose import Counts, CrossEntropyAux, compose, mean_divisor, mean_or_0
from jaxce.linear import costs, recompute, vocabulary
from jaxce.linear.blocks import Schedule, Schedules, by_platform, over_blocks, put, take
from jaxce.linear.chips import Gpu
from jaxce.linear.costs import Problem
from jaxce.linear.mesh import row_axes
from jaxce.reverse_mode import is_symbolic_zero, is_used, jvp, materialised, reverse_mode_only
from jaxce.sharding import shard_count, sum_over, vary, varying
from jaxce.stats import Terms, finish, finite, matmul_dtype, times, working_dtype
from jaxce.versions import empty

Sum = tuple[Array, CrossEntropyAux | None]
Tree = TypeVar("Tree")
Arguments = tuple[Projection, Examples, Shared]  # or gradients in them
Forward = tuple[Array, CrossEntropyAux | None, Arguments]


def loss(
    schedules: Schedules,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    counts: Counts,
) -> Array | tuple[Array, CrossEntropyAux]:
    """The loss of hidden states `[N, D]`, one number: on platforms that store, gradients are computed along with it.

    The divisor of a mean comes first, so that gradients are divided by it before they are rounded.
    """
    arguments = reverse_mode_only((projection, examples, shared))
    rows = row_axes(options, *arguments)
    divisor, nothing = mean_divisor(options, counts)
    sums = dataclasses.replace(options, reduction="sum", batch_axis_name=())
    total, aux = _summed_loss(schedules, sums, *arguments, counts, vary(divisor, rows))
    total = mean_or_0(sum_over(total, options.batch_axis_name), nothing)
    return total if aux is None else (total, aux._replace(weight=counts.weight))


def _recomputed_sum(
    schedules: Schedules,
    options: Options,
    arguments: Arguments,
    counts: Counts,
    divisor: Array,
    known: recompute.Records = (None, None),
    rule: bool = True,
) -> tuple[Sum, recompute.Records]:
    cpu, tpu, other = (schedule.without_gradients or schedule for schedule in schedules)
    result, records = recompute.loss((cpu, tpu, other), options, *arguments, counts, known, rule)
    total, aux = result if isinstance(result, tuple) else (result, None)
    return (total / divisor, aux), records


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(
    schedules: Schedules,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    counts: Counts,
    divisor: Array,
) -> Sum:
    """Where no gradient is wanted, none is computed: then this is the forward pass of the other mode."""
    return _recomputed_sum(schedules, options, (projection, examples, shared), counts, divisor)[0]


def _summed_fwd(
    schedules: Schedules, options: Options, projection: Any, examples: Any, shared: Any, counts: Any, divisor: Any
) -> tuple[Sum, tuple[Any, ...]]:
    # A token of weight 0 has no part in any gradient but that of its weight, which is its loss.
    unweighted = examples.weights is not None and not examples.weights.perturbed
    given = jax.tree.map(lambda x: x.value, ((projection, examples, shared), counts, divisor))
    arguments, counts, divisor = given
    rows = row_axes(options, *arguments)
    asked = jax.tree.map(lambda x: x.perturbed, _floats((projection, examples, shared)))

    # What a platform does not keep is zeros there, which no program computes: the results must be of one type.
    def stored(schedule: Schedule, arguments: Arguments, counts: Counts, divisor: Array) -> tuple[Any, ...]:
        projection, examples, shared = arguments
        inputs = of_terms(options, examples, shared)
        without = of_nll(options, *inputs)
        records: recompute.Records = vocabulary.no_classes(options, projection, inputs[0]), None
        if without is not None:
            records = records[0], vocabulary.no_classes(without[0], projection, without[1])
        records = vary(jax.tree.map(jnp.zeros_like, records), rows)
        forward = _forward_of_used if unweighted else _forward
        return *forward(schedule, options, arguments, counts, divisor), records

    def recomputed(schedule: Schedule, arguments: Arguments, counts: Counts, divisor: Array) -> tuple[Any, ...]:
        (loss, aux), records = _recomputed_sum((schedule,) * 3, options, arguments, counts, divisor, rule=False)
        grads = jax.tree.map(lambda x: jnp.zeros_like(x, divisor.dtype), _floats(arguments))
        return loss, aux, grads, records

    def either(schedule: Schedule, *args: Any) -> tuple[Any, ...]:
        loss, aux, grads, records = (stored if schedule.block_n else recomputed)(schedule, *args)
        return loss, aux, only_asked(asked, grads), records

    loss, aux, grads, records = by_platform(schedules, either, *given)
    return (loss, aux), (arguments, counts, divisor, loss, grads, records)


def _summed_bwd(schedules: Schedules, options: Options, residuals: tuple[Any, ...], cts: Any) -> tuple[Any, ...]:
    arguments, *residuals_of_rows = residuals
    of_aux = any(map(is_used, jax.tree.leaves(cts[1], is_leaf=is_symbolic_zero)))
    cts = materialised(cts)

    def backward(
        schedule: Schedule,
        floats: Arguments,
        fixed: dict[str, Array | None],
        counts: Counts,
        divisor: Array,
        loss: Array,
        grads: Arguments,
        records: recompute.Records,
        cts: Sum,
    ) -> tuple[Arguments, Array]:
        if schedule.block_n and not of_aux:
            return scaled(cts[0], floats, grads), -cts[0] * loss / divisor

        # What the aux record adds is known only now, so it takes the matmuls of the other mode.
        def again(floats: Arguments, divisor: Array) -> Sum:
            projection, examples, shared = floats
            arguments = projection, examples._replace(**fixed), shared
            known: recompute.Records = (None, None) if schedule.block_n else records
            return _recomputed_sum((schedule,) * 3, options, arguments, counts, divisor, known)[0]

        dfloats, ddivisor = jax.vjp(again, floats, divisor)[1](cts)
        return those_asked(grads, dfloats), ddivisor

    fixed = {"indices": arguments[1].indices, "where": arguments[1].where}
    dfloats, ddivisor = by_platform(schedules, backward, _floats(arguments), fixed, *residuals_of_rows, cts)
    return *dfloats, None, ddivisor


# Nothing is left of a gradient that is not asked for, so that a compiler leaves its product and its sum out. It is an
# empty array, not None: JAX takes what is left to be one tree of arrays, whatever is asked for.


def only_asked(asked: Tree, grads: Tree) -> Tree:
    """The gradients, as they are kept; `asked` says which of them are."""
    kept: Tree = jax.tree.map(lambda asked, g: g if asked else jnp.zeros((0,), g.dtype), asked, grads)
    return kept


def those_asked(kept: Tree, grads: Tree) -> Tree:
    """Other gradients, None where none was kept."""
    some: Tree = jax.tree.map(lambda k, g: g if k.shape == g.shape else None, kept, grads)
    return some


def scaled(ct: Array, arguments: Tree, kept: Tree) -> Tree:
    """The gradients in the arguments, of those kept, for the cotangent of what they are gradients of."""
    grads: Tree = jax.tree.map(
        lambda x, k: times(ct, k.astype(ct.dtype)).astype(x.dtype) if k.shape == x.shape else None, arguments, kept
    )
    return grads


def _floats(arguments: Arguments) -> Arguments:
    projection, examples, shared = arguments
    return projection, examples._replace(indices=None, where=None), shared


_summed_loss.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)


# --- block by block -------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    kernel: Array
    bias: Array | None
    shared: Shared


class _State(NamedTuple):
    total: Array
    aux: CrossEntropyAux | None
    hidden: Array  # gradients of tokens
    examples: Examples
    sums: _Sums  # and of what they share, summed up
    logits: Array  # of the block at hand: one array for all blocks, which nobody has to clear


def _forward(
    schedule: Schedule,
    options: Options,
    arguments: Arguments,
    counts: Counts,
    divisor: Array,
    unweighted: bool = False,
) -> Forward:
    """The sum of the losses over the divisor, the aux record, and the gradients of the former in the working dtype.

    With `unweighted`, the gradient in the weights is not wanted of tokens whose weight is 0.
    """
    (hidden, kernel, bias), examples, shared = arguments
    n, block_n = hidden.shape[0], schedule.block_n
    dtype = working_dtype(matmul_dtype(hidden.dtype, kernel.dtype))
    logits = empty((min(block_n, n), kernel.shape[schedule.vocab_axis]), dtype)
    logits = vary(logits, varying(arguments))
    if 0 < n <= block_n:  # nothing to add up
        total, aux, dhidden, dexamples, sums, _ = _block(schedule, options, arguments, counts, divisor, None, logits)
        return total, aux, (Projection(dhidden, sums.kernel, sums.bias), dexamples, sums.shared)
    order = None
    if not options.return_aux:  # which says something of unused tokens too
        (hidden, examples, counts), order = _used_first(options, hidden, examples, counts, unweighted)
    used = jnp.sum(~counts.unused if unweighted else counts.counted)

    def block(start: Any, size: int, state: _State) -> _State:
        def add(state: _State) -> _State:
            part = hidden, examples, counts
            if size < n:
                part = jax.tree.map(lambda a: take(a, start, size, 0, schedule), part)
            given = (Projection(part[0], kernel, bias), part[1], shared), part[2], divisor
            total, aux, dhidden, dexamples, sums, logits = _block(schedule, options, *given, state.sums, state.logits)

            def write(whole: Array, part: Array) -> Array:
                return put(whole, part, start, 0)

            return _State(
                state.total + total,
                jax.tree.map(write, state.aux, aux),
                write(state.hidden, dhidden),
                jax.tree.map(write, state.examples, dexamples),
                sums,
                logits,
            )

        return add(state) if order is None else lax.cond(start < used, add, lambda state: state, state)

    total, rows = vary((jnp.zeros((), dtype), jnp.zeros((n,), dtype)), row_axes(options, *arguments))
    projection, of_examples, of_all = jax.tree.map(
        lambda x: jnp.zeros_like(x, dtype), _floats((Projection(hidden, kernel, bias), examples, shared))
    )
    aux = CrossEntropyAux(rows, rows, rows, rows.astype(jnp.int32), rows) if options.return_aux else None
    sums = _Sums(projection.kernel, projection.bias, of_all)
    state = _State(total, aux, projection.hidden, of_examples, sums, logits)
    if n:
        state = over_blocks(n, block_n, block, state)
    of_tokens = state.hidden, state.examples
    if order is not None:
        of_tokens = jax.tree.map(lambda x: jnp.zeros_like(x).at[order].set(x, unique_indices=True), of_tokens)
    sums = state.sums
    return state.total, state.aux, (Projection(of_tokens[0], sums.kernel, sums.bias), of_tokens[1], sums.shared)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _forward_of_used(
    schedule: Schedule, options: Options, arguments: Arguments, counts: Counts, divisor: Array
) -> Forward:
    return _forward(schedule, options, arguments, counts, divisor, unweighted=True)


def _forward_of_used_jvp(
    schedule: Schedule, options: Options, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Forward, Forward]:
    """Of all tokens: the other gradients of a token vary with its weight, and do where that is 0."""
    return jvp(functools.partial(_forward, schedule, options), primals, tangents)


_forward_of_used.defjvp(_forward_of_used_jvp, symbolic_zeros=True)


def _used_first(
    options: Options, hidden: Array, examples: Examples, counts: Counts, unweighted: bool
) -> tuple[tuple[Array, Examples, Counts], Array | None]:
    """The tokens with the unused ones last, and their order.

    Not where all are used, and not where probabilities or a mask `[N, V]` would have to be moved with them.
    """
    tokens = hidden, examples, counts
    heavy = examples.indices is None or (examples.where is not None and examples.where.shape[0] > 1)
    if heavy or (options.ignore_index is None and not unweighted):
        return tokens, None
    order = jnp.argsort(counts.unused if unweighted else ~counts.counted, stable=True)
    return jax.tree.map(lambda x: x if x.shape[0] == 1 else jnp.take(x, order, axis=0), tokens), order


def _block(
    schedule: Schedule,
    options: Options,
    arguments: Arguments,
    counts: Counts,
    divisor: Array,
    sums: _Sums | None,
    logits: Array,
) -> tuple[Array, CrossEntropyAux | None, Array, Examples, _Sums, Array]:
    """Loss over divisor, aux record and gradients of a block of tokens; what belongs to all tokens is added to `sums`.

    The last result is the array `logits`, overwritten with those of this block.

    Without `sums` there is nothing to add to.
    """
    projection, examples, shared = arguments
    inputs = of_terms(options, examples, shared)
    stats, kept = vocabulary.forward(schedule, options, projection, *inputs, keep_in=logits)
    assert kept is not None  # asked for
    unweighted = None
    if (without := of_nll(options, *inputs)) is not None:
        unweighted = finish(vocabulary.forward(schedule, without[0], projection, *without[1:], kept=kept)[0]).target
    num_classes = projection.kernel.shape[schedule.vocab_axis] * shard_count(options.axis_name)

    def composed(terms: Terms, floats: Examples, shared: Shared) -> Sum:
        x = floats._replace(indices=examples.indices, where=examples.where)
        given = options, terms, x, shared, counts, num_classes
        result = compose(*given, unweighted=unweighted, prediction=stats.argmax)
        total, aux = result if isinstance(result, tuple) else (result, None)
        return total / divisor, aux

    floats = examples._replace(indices=None, where=None)
    total, pullback, aux = jax.vjp(composed, finish(stats), floats, shared, has_aux=True)
    ct, dexamples, dshared = pullback(jnp.ones_like(total))
    # Class weights come into the loss here, and in the terms: at probability targets, and by smoothing.
    numbers: Shared = dshared if sums is None else jax.tree.map(jnp.add, sums.shared, dshared)
    by_class = None if sums is None else (sums.kernel, sums.bias, numbers.class_weights)
    (dhidden, dkernel, dbias), of_rows, (dweights, *_) = vocabulary.backward(
        schedule, options, projection, *inputs, *finite(stats), ct, kept=kept, sums=by_class
    )
    if by_class is None and numbers.class_weights is not None:
        dweights = numbers.class_weights if dweights is None else numbers.class_weights + dweights
    dexamples = dexamples._replace(temperature=of_rows.temperature)
    if of_rows.probs is not None:
        dexamples = dexamples._replace(probs=of_rows.probs)
    return total, aux, dhidden, dexamples, _Sums(dkernel, dbias, numbers._replace(class_weights=dweights)), kept


# --- when it applies, and what it costs -------------------------------------------------------------------------------

MATMULS = 3
_KEPT = 2**26  # logits of a block of tokens; more of them are summed up faster, but take more memory
_MOST_TOKENS, _FEWEST_TOKENS = 1024, 256
_ROOMY, _MANY_TOKENS = 16, 4096  # times as many tokens, on TPU where memory is allowed for so many
_KEPT_BLOCK = 2**21  # the part of them that is worked on at once
_KEPT_WHOLE = 2**24  # all of them at once up to here: without slices of the kernel, and never written twice


def applies(p: Problem, platform: str) -> bool:
    return p.options.reduction != "none" and isinstance(p.N, int)


def rank(p: Problem, platform: str, block_n: int, roomy: bool) -> int:
    """In small blocks of tokens it spends its time adding up dkernel: then the fourth matmul is cheaper.

    Compiled for v5e and v6e (32768 x 2048 x 131072), blocks of 4096 tokens take 0.86 and 0.89 of the estimated cycles
    of "recompute", blocks of 8192 0.83 and 0.85, and 5.4 and 8.6 GB for 0.3: where so much is allowed. In parts of rows
    they take more cycles than "recompute"; so do all tokens at once, on v6e.
    """
    if platform == "tpu" and block_n > _MOST_TOKENS:
        return 0 if roomy and _MANY_TOKENS <= block_n < p.N else 4
    small = block_n < min(_FEWEST_TOKENS, p.N)
    return 3 if small else 0 if platform == "cpu" else 2


def blocks(p: Problem, platform: str, scale: int) -> list[tuple[int, int]]:
    scale = max(scale, _ROOMY) if platform == "tpu" else scale
    sizes = costs.sizes(p.N, max(min(_KEPT // p.V, _MOST_TOKENS), 1) * scale, 8)

    def part(n: int) -> int:
        if (p.plain and n * p.V <= _KEPT_WHOLE) or (platform == "tpu" and n > _MOST_TOKENS):
            return p.V
        return costs.sizes(p.V, max(_KEPT_BLOCK // max(n, 1), 4 * costs.LANES), costs.LANES)[0]

    return [(n, part(n)) for n in sizes]


def gpu_blocks(p: Problem) -> list[tuple[int, int]]:
    """Not in parts of rows, which reads and writes twice as much."""
    return [(block_n, p.V) for block_n in costs.sizes(p.N, p.N, 8)]


def temp_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    if costs.in_one(p, block_n, block_v):
        return recompute.temp_bytes(p, platform, block_n, block_v)
    rows = block_n + p.N % max(block_n, 1)  # the block that is left at the end has memory of its own
    sums = 0 if p.kernel == p.working else p.D * p.V * p.working.itemsize
    skips = block_n < p.N and (p.weights or p.options.ignore_index is not None)
    logits = block_n * p.V  # one array for all blocks
    slopes = p.options.logit_softcap is not None  # of the cap, which are kept beside the logits
    if block_v == p.V and not skips and not slopes:  # the gradient takes its place
        logits = 0
    if p.narrow_probs:
        logits += p.N * p.V  # their gradient
    same_tokens = int(((p.entries is None) + p.mask_per_token / 4) * rows * p.V)  # of probabilities and masks
    written_out = p.N * p.V if p.mask_broadcast else 0
    of_block = costs.block_bytes(p, platform, rows, block_v)
    if platform == "cpu" and block_v == p.V and p.hidden == p.kernel == p.working:
        sums += p.D * p.V * p.working.itemsize  # what these tokens add to dkernel; otherwise block_bytes counts it
    return (logits + same_tokens) * p.working.itemsize + sums + of_block + written_out + costs.row_bytes(p, platform)


def kept_bytes(p: Problem, block_n: int, block_v: int) -> int:
    if costs.in_one(p, block_n, block_v):
        return recompute.kept_bytes(p, block_n, block_v)
    per_class = p.D + p.class_weights + (p.N if p.entries is None else 0)
    return (p.N * p.D + p.V * per_class) * p.working.itemsize + costs.cleaned_bytes(p, 1)


def gpu_cost(p: Problem, block_n: int, block_v: int, card: Gpu) -> costs.Cost:
    rows, classes = block_n, min(block_v, p.V)
    s, w = p.matmul.itemsize, p.working.itemsize
    hidden, kernel, narrow = rows * p.D, p.D * classes, p.matmul != p.working
    dhidden = costs.product(p, kernel * s + hidden * w, rows, classes, s)
    dkernel = costs.product(p, hidden * s + 2 * kernel * w, rows, classes, s)  # added to a sum
    moved = costs.Kernel(hidden * (2 * s + 4 * w))  # hidden states sliced, dhidden written
    kernels = [*costs.of_block(p, rows, classes), dhidden, dkernel, moved]
    rounds = -(-p.N // max(rows, 1)) * -(-p.V // classes)
    # As under JAX 0.10; XLA of JAX 0.12 fuses one of the 13 into another, which saves 3 us a block.
    launches = 4 + 2 * narrow + rounds * (13 + costs.more_launches(rows, classes))
    once = costs.cleared_and_rounded(p, p.N * p.D + p.D * p.V)
    return costs.on_gpu(p, once, kernels, launches, rows, classes, card)
