"""Blocks of the vocabulary, twice: once for the loss, and again for the gradient.

The loss leaves numbers per token. Its backward pass computes each block of logits anew, and the part of the kernel's
gradient that belongs to it once: four matmuls. Compiled for TPU, everything it needs stays in on-chip memory.

A block of logits of 2²³ numbers, 32 MiB, fits the on-chip memory of every TPU beside the other operands: 1024 classes
for 8192 tokens. Smaller blocks make the compiled programs slower (512: 67 M cycles for 54 M on v6e), larger ones spill
(2048: 68 MB). On CPU products run at full speed while their result stays in the cache: up to 2²² numbers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import Array

from jaxce.arguments import Examples, Options, Projection, Shared, of_nll, of_terms
from jaxce.compose import Counts, CrossEntropyAux, compose
from jaxce.gradient import without_unused_tail
from jaxce.linear import costs, pallas_tpu, vocabulary
from jaxce.linear.blocks import Schedule, Schedules, by_platform
from jaxce.linear.chips import Gpu
from jaxce.linear.costs import Problem
from jaxce.reverse_mode import reverse_mode_only
from jaxce.sharding import shard_count
from jaxce.stats import RowStats, Terms, finish, finite

Result = Array | tuple[Array, CrossEntropyAux]
# Of the loss; and of the aux record's nll, where class weights make it another.
Records = tuple[RowStats | None, RowStats | None]


def loss(
    schedules: Schedules,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    counts: Counts,
    known: Records = (None, None),
    rule: bool = True,
) -> tuple[Result, Records]:
    """The loss of hidden states `[..., D]`, and the records of their rows, which an earlier pass may have left.

    rule: with a rule for reverse mode. Without it, what another rule's forward pass is made of, which is differentiated
      in forward mode where a gradient is.
    """
    rows = of_terms(options, examples, shared)
    if rule:
        projection, rows = reverse_mode_only((projection, rows))
    terms_of = linear_terms if rule else _terms_and_record
    terms, record = terms_of(schedules, options, projection, *rows, known[0])
    unweighted = other = None
    if (without := of_nll(options, *rows)) is not None:
        (_, unweighted, *_), other = terms_of(schedules, without[0], projection, *without[1:], known[1])
    num_classes = projection.kernel.shape[schedules[0].vocab_axis] * shard_count(options.axis_name)
    given = options, terms, examples, shared, counts, num_classes
    return compose(*given, unweighted=unweighted, prediction=record.argmax), (record, other)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_terms(
    schedules: Schedules,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    known: RowStats | None = None,
) -> tuple[Terms, RowStats]:
    """The terms of each row of hidden @ kernel + bias, for what `of_terms` leaves of the arguments; and its record."""
    return _terms_and_record(schedules, options, projection, examples, shared, known)


def _terms_and_record(
    schedules: Schedules,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    known: RowStats | None,
) -> tuple[Terms, RowStats]:
    def forward(schedule: Schedule, projection: Projection, examples: Examples, shared: Shared) -> RowStats:
        if schedule.kernels is not None:
            return pallas_tpu.forward(schedule, options, projection, examples, shared)
        return vocabulary.forward(schedule, options, projection, examples, shared)[0]

    stats: RowStats = known if known is not None else by_platform(schedules, forward, projection, examples, shared)
    return finish(stats), stats


_Residuals = tuple[Projection, Examples, Shared, RowStats, Array]


def _terms_fwd(schedules: Schedules, options: Options, *perturbed: Any) -> tuple[tuple[Terms, RowStats], _Residuals]:
    given = jax.tree.map(lambda x: x.value, perturbed)
    terms, stats = _terms_and_record(schedules, options, *given)
    return (terms, stats), (*given[:3], *finite(stats))


def _terms_bwd(
    schedules: Schedules, options: Options, residuals: _Residuals, cts: tuple[Terms, RowStats]
) -> tuple[Projection, Examples, Shared, None]:
    def backward(schedule: Schedule, residuals: _Residuals, ct: Terms) -> vocabulary.Gradients:
        if schedule.kernels is not None:
            return pallas_tpu.backward(schedule, options, *residuals, ct)
        return vocabulary.backward(schedule, options, *residuals, ct)

    gradients: vocabulary.Gradients = by_platform(schedules, backward, residuals, without_unused_tail(cts[0]))
    return *gradients, None


linear_terms.defvjp(_terms_fwd, _terms_bwd, symbolic_zeros=True)


# --- when it applies, and what it costs -------------------------------------------------------------------------------

MATMULS = 4
_BLOCK = {"cpu": 2**22, "tpu": 2**23, "gpu": 2**23}  # logits in a block
_KERNEL_BLOCK = 2**22  # numbers in a block of the kernel
_TOKENS = 8192  # assumed where their number is a symbol


def applies(p: Problem, platform: str) -> bool:
    return True


def rank(p: Problem, platform: str, block_n: int, roomy: bool) -> int:
    return 1


def blocks(p: Problem, platform: str, scale: int) -> list[tuple[int, int]]:
    tokens = max(p.N, 1) if isinstance(p.N, int) else _TOKENS
    target = min(_BLOCK[platform] // tokens, _KERNEL_BLOCK // max(p.D, 1))
    sizes = costs.sizes(p.V, max(target, 4 * costs.LANES) * scale, costs.LANES)
    return [(p.N, block_v) for block_v in sizes]


def gpu_blocks(p: Problem) -> list[tuple[int, int]]:
    return [(p.N, block_v) for block_v in costs.sizes(p.V, p.V, costs.LANES)]


def temp_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    return costs.block_bytes(p, platform, block_n, block_v) + costs.row_bytes(p, platform)


def kept_bytes(p: Problem, block_n: int, block_v: int) -> int:
    wide_probs = p.N * p.V * p.working.itemsize if p.narrow_probs and p.class_weights else 0
    return costs.record_bytes(p) + costs.cleaned_bytes(p, 1 + p.hidden.itemsize) + wide_probs


def gpu_cost(p: Problem, block_n: int, block_v: int, card: Gpu) -> costs.Cost:
    rows, classes = p.N, min(block_v, p.V)
    s, w = p.matmul.itemsize, p.working.itemsize
    hidden, kernel, narrow = rows * p.D, p.D * classes, p.matmul != p.working
    kernels = costs.of_block(p, rows, classes)
    dkernel = costs.product(p, (hidden + kernel) * s, rows, classes, s)
    more = costs.more_launches(rows, classes)
    if classes == p.V:  # the second logits are found to be the first
        kernels += [costs.product(p, kernel * s + hidden * w, rows, classes, s), dkernel]
        launches = 11 + more
    else:  # dhidden is added to a sum; the kernel is sliced twice, and dkernel put
        dhidden = costs.product(p, kernel * s + 2 * hidden * w, rows, classes, s)
        kernels += [kernels[0], dhidden, dkernel, *3 * [costs.Kernel(2 * kernel * s)]]
        launches = 9 + narrow + -(-p.V // classes) * (14 + more + (rows * classes >= 2**24))
    return costs.on_gpu(p, costs.cleared_and_rounded(p, hidden), kernels, launches, rows, classes, card)
