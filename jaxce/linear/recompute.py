"""Blocks of the vocabulary, twice: once for the loss, and again for the gradient.

The loss leaves numbers per token. Its backward pass computes each block of logits anew, and the part of the kernel's
gradient that belongs to it once: four matmuls.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import Array

from jaxce.arguments import Examples, Options, Shared, of_nll, of_terms
from jaxce.compose import Counts, CrossEntropyAux, compose
from jaxce.linear import vocabulary
from jaxce.linear.blocks import Schedule, Schedules, by_platform
from jaxce.reverse_mode import reverse_mode_only
from jaxce.sharding import shard_count
from jaxce.stats import RowStats, Terms, finish, finite

Result = Array | tuple[Array, CrossEntropyAux]
# Of the loss; and of the aux record's nll, where class weights make it another.
Records = tuple[RowStats | None, RowStats | None]


def loss(
    schedules: Schedules,
    options: Options,
    examples: Examples,
    shared: Shared,
    counts: Counts,
    known: Records = (None, None),
) -> tuple[Result, Records]:
    """The loss of hidden states `[..., D]`, and the records of their rows, which an earlier pass may have left."""
    rows = reverse_mode_only(of_terms(options, examples, shared))
    terms, record = linear_terms(schedules, options, *rows, known[0])
    unweighted = other = None
    if (without := of_nll(options, *rows)) is not None:
        (_, unweighted, *_), other = linear_terms(schedules, *without, known[1])
    num_classes = shared.kernel.shape[schedules[0].vocab_axis] * shard_count(options.axis_name)
    given = options, terms, examples, shared, counts, num_classes
    return compose(*given, unweighted=unweighted, prediction=record.argmax), (record, other)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_terms(
    schedules: Schedules, options: Options, examples: Examples, shared: Shared, known: RowStats | None = None
) -> tuple[Terms, RowStats]:
    """The terms of each row of hidden @ kernel + bias, for what `of_terms` leaves of the arguments; and its record."""
    return _terms_fwd(schedules, options, examples, shared, known)[0]


def _terms_fwd(schedules, options, examples, shared, known):
    def forward(schedule: Schedule, examples: Examples, shared: Shared) -> RowStats:
        return vocabulary.forward(schedule, options, examples, shared)[0]

    stats = known if known is not None else by_platform(schedules, forward, examples, shared)
    return (finish(stats), stats), (examples, shared, *finite(stats))


def _terms_bwd(schedules, options, residuals, cts):
    def backward(schedule: Schedule, *residuals_and_cotangents: Any) -> tuple[Examples, Shared]:
        return vocabulary.backward(schedule, options, *residuals_and_cotangents)

    return *by_platform(schedules, backward, *residuals, cts[0]), None


linear_terms.defvjp(_terms_fwd, _terms_bwd)
