"""Blocks of logits that never leave the chip: Pallas kernels for TPU, one for the loss and one for its gradients.

They take the products of `jaxce.linear.recompute`, four in all, and what they leave of a row is the same record. Here
the exponentials of a block are computed while the matrix units multiply, which XLA does not do in the rounds of a loop.

**Forward.** For each block of tokens, through all blocks of classes. Every 128th class makes a record of its own, one
in each lane of the chip's vectors: nothing moves between lanes before the last block, where the 128 records are merged.

**Backward.** For each block of classes, through all blocks of tokens. The kernel's gradient of the block is summed in
on-chip memory and written once. The gradient of the hidden states is summed in float32: on chip, if all of it has room
there, else in HBM, where each block of it is read, added to and written. A device of two cores splits the classes
between them, and sums a gradient of the hidden states in each.

Numbers of rows travel as `[numbers, N]`, and are transposed on chip: `[N, numbers]` would be padded to 128 of them. The
classes at the end that fill no block go the way of `jaxce.linear.vocabulary`, as second derivatives do.

**Compiled for TPU v4, v5e, v5p, v6e and TPU7x, and interpreted by the tests; not yet run on a TPU.**
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce import checks
from jaxce.arguments import Examples, Options, Projection, Shared, flat
from jaxce.gradient import Factors, factors, gradient
from jaxce.linear import chips, costs, vocabulary
from jaxce.linear.blocks import Schedule
from jaxce.linear.chips import Tpu
from jaxce.linear.costs import LANES, Problem
from jaxce.sharding import on_this_device, shard_start, sum_like, vary, varying
from jaxce.stats import (
    Gap,
    RowStats,
    Terms,
    low_and_high,
    matmul_dtype,
    merge,
    merge_along,
    merged_gaps,
    shift,
    times,
    without_largest,
)
from jaxce.sums import effective, left_out, rows_of, smoothing_distribution
from jaxce.versions import described

Tree = TypeVar("Tree")
_F32 = jnp.float32
INTERPRET: Any = False  # of `pallas_call`; set by the tests


class Blocks(NamedTuple):
    """Constants of the compiled kernels.

    forward, backward: tokens and classes in a block.
    resident: whether the gradient of the hidden states is summed on chip.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]
    resident: bool
    chip: Tpu


# --- forward ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def forward(
    schedule: Schedule, options: Options, projection: Projection, examples: Examples, shared: Shared
) -> RowStats:
    """As `jaxce.linear.vocabulary.forward`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    assert schedule.kernels is not None
    (bn, bv), vmem = schedule.kernels.forward, schedule.kernels.chip.vmem
    *batch, D = projection.hidden.shape
    V = projection.kernel.shape[schedule.vocab_axis]
    projection, examples = flat(batch, projection, examples)
    every = varying(projection, examples, shared)
    N, classes = len(projection.hidden), V // bv * bv
    indices = _indices(options, examples, V)
    hidden, rows, unpack = _rows(_whole(N, bn), projection.hidden, indices, every)
    by_class, class_parts = _by_class(options, V, projection, examples, shared, every)
    fields, structure = jax.tree.flatten(_no_classes(options, indices, (bn, LANES)))
    numbers = len(fields)

    def kernel(rows_ref: Any, hidden_ref: Any, kernel_ref: Any, *refs: Any) -> None:
        *class_refs, out_ref, columns_ref = refs[: len(by_class) + 2]
        state_refs = refs[len(by_class) + 2 :]
        j = pl.program_id(1)

        def state() -> Any:
            return jax.tree.unflatten(structure, [ref[...] for ref in state_refs])

        def set_state(lanes: _Lanes) -> None:
            for ref, x in zip(state_refs, jax.tree.leaves(lanes), strict=True):
                ref[...] = x

        @pl.when(j == 0)
        def _() -> None:
            columns_ref[...] = rows_ref[...].T
            set_state(_no_classes(options, indices, (bn, LANES)))

        parts = class_parts(*(ref[...] for ref in class_refs))
        z = _logits(schedule, hidden_ref[...], kernel_ref[...], parts)
        labels = unpack(columns_ref[...]) - j * bv
        set_state(_with_block(options, state(), z, labels, parts, j * bv))

        @pl.when(j == pl.num_programs(1) - 1)
        def _() -> None:
            columns = jax.tree.leaves(_joint(options, state(), unpack(columns_ref[...]), classes))
            lane = lax.broadcasted_iota(jnp.int32, (bn, numbers), 1)
            placed = jnp.zeros((bn, numbers), _F32)
            for i, column in enumerate(columns):
                placed = jnp.where(lane == i, column, placed)
            out_ref[...] = placed.T

    call = pl.pallas_call(
        kernel,
        grid=(len(hidden) // bn, classes // bv),
        in_specs=[
            pl.BlockSpec((len(rows), bn), lambda i, j: (0, i)),
            pl.BlockSpec((bn, D), lambda i, j: (i, 0)),
            _classes_spec(schedule, D, bv, lambda i, j: j),
            *(pl.BlockSpec((len(x), bv), lambda i, j: (0, j)) for x in by_class),
        ],
        out_specs=pl.BlockSpec((numbers, bn), lambda i, j: (0, i)),
        out_shape=described((numbers, len(hidden)), _F32, rows),
        scratch_shapes=[pltpu.VMEM((bn, len(rows)), _F32), *(pltpu.VMEM(x.shape, _F32) for x in fields)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
        name="cross_entropy_forward",
        interpret=INTERPRET,
    )
    with jax.enable_x64(False):  # there are no 64-bit integers in a kernel
        out = call(rows, hidden, projection.kernel, *by_class)
    stats, picked = jax.tree.unflatten(structure, list(out[:, :N]))
    if stats.argmax is not None:
        argmax = stats.argmax.astype(jnp.int32) + jnp.asarray(shard_start(V, options.axis_name), jnp.int32)
        stats = stats._replace(argmax=argmax)
    stats = stats._replace(picked=jnp.stack(picked, -1))
    stats, _ = vocabulary.forward(schedule, options, projection, examples, shared, done=(classes, stats))
    shaped: RowStats = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), stats)
    return shaped


@forward.defjvp
def _forward_jvp(schedule: Schedule, options: Options, primals: Any, tangents: Any) -> tuple[RowStats, RowStats]:
    def in_blocks(*args: Any) -> RowStats:
        return vocabulary.forward(schedule, options, *args)[0]

    return forward(schedule, options, *primals), jax.jvp(in_blocks, primals, tangents)[1]


class _Lanes(NamedTuple):
    """The record of the classes in each lane `[tokens, 128]`, its `argmax` a float, and the logits at K indices.

    Where the sums leave the label out, `rest` is the sum without it, and its logit is −inf until it is found.
    """

    stats: RowStats
    picked: tuple[Array, ...]


def _no_classes(options: Options, indices: Array, shape: tuple[int, int]) -> _Lanes:
    zero, none = jnp.zeros(shape, _F32), jnp.full(shape, -jnp.inf, _F32)
    label = left_out(options, indices) is not None
    stats = RowStats(
        max=none,
        rest=zero if label else zero - 1,
        smoothing=Gap(zero, zero) if options.label_smoothing else None,
        spread=zero if options.return_aux else None,
        argmax=zero if options.return_aux else None,
    )
    return _Lanes(stats, (none if label else zero,) * indices.shape[-1])


def _with_block(
    options: Options, before: _Lanes, logits: Array, indices: Array, parts: _ClassParts, start: Array
) -> _Lanes:
    """The record with the classes of a block of logits, whose first is `start`."""
    shape = len(logits), LANES
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    columns = [slice(k, k + LANES) for k in range(0, logits.shape[-1], LANES)]
    of = [parts.of(at, shape) for at in columns]
    masks = [Examples(where=part.where) for part in of]
    z = [
        effective(options, rows_of(options, logits[:, at], mask, Shared()))
        for at, mask in zip(columns, masks, strict=True)
    ]
    picked = before.picked
    found_at = [jnp.broadcast_to(indices[:, k : k + 1], shape) - lane for k in range(len(picked))]
    for at, x in zip(columns, z, strict=True):
        picked = tuple(jnp.where(k == at.start, x, value) for k, value in zip(found_at, picked, strict=True))
    by_label = left_out(options, indices) is not None
    maximum = functools.reduce(jnp.maximum, z, before.stats.max) if by_label else functools.reduce(jnp.maximum, z)
    top = shift(maximum)
    e = [jnp.exp(x - top) for x in z]
    if by_label:
        others = _sum(jnp.where(found_at[0] == at.start, 0, x) for at, x in zip(columns, e, strict=True))
        rest = before.stats.rest * jnp.exp(before.stats.max - top) + others
    else:
        low, high = zip(*map(low_and_high, e), strict=True)
        rest = without_largest(_sum(low), _sum(high))
    stats = RowStats(maximum, rest)
    below = [top - x for x in z]
    if options.label_smoothing:
        shares = [smoothing_distribution(x, _F32, part.weights, part.where) for x, part in zip(z, of, strict=True)]
        gap = _sum(times(share, d) for share, d in zip(shares, below, strict=True))
        stats = stats._replace(smoothing=Gap(gap, _sum(shares)))
    if options.return_aux:
        near = [jnp.minimum(d, jnp.finfo(_F32).max) for d in below]
        argmax = jnp.zeros(shape, _F32)
        for at, x in reversed([*zip(columns, z, strict=True)]):
            argmax = jnp.where(x == maximum, (lane + (start + at.start)).astype(_F32), argmax)
        stats = stats._replace(spread=_sum(x * d for x, d in zip(e, near, strict=True)), argmax=argmax)
    if not by_label:
        stats = merge(before.stats, stats)
    elif before.stats.smoothing is not None and stats.smoothing is not None:
        stats = stats._replace(
            smoothing=merged_gaps(before.stats.smoothing, before.stats.max, stats.smoothing, maximum)
        )
    return _Lanes(stats, picked)


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


def _joint(options: Options, lanes: _Lanes, indices: Array, classes: int) -> _Lanes:
    """The record of whole rows, `[tokens, 1]`, of so many classes."""
    stats, picked = lanes
    if left_out(options, indices) is not None:
        stats = stats._replace(rest=stats.rest + (jnp.exp(picked[0] - shift(stats.max)) - 1))
        lane = lax.broadcasted_iota(jnp.int32, stats.max.shape, 1)
        found = (indices >= 0) & (indices < classes) & (lane == indices % LANES)
        picked = (jnp.where(found, picked[0], 0),)

    def total(tree: Tree) -> Tree:
        sums: Tree = jax.tree.map(lambda x: jnp.sum(x, -1, keepdims=True), tree)
        return sums

    joint = merge_along(stats, lambda x: jnp.max(x, -1, keepdims=True), total)
    if stats.argmax is not None:
        first = jnp.min(jnp.where(stats.max == joint.max, stats.argmax, jnp.inf), -1, keepdims=True)
        joint = joint._replace(argmax=jnp.where(first < jnp.inf, first, 0))
    return _Lanes(joint, total(picked))


# --- backward ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def backward(
    schedule: Schedule,
    options: Options,
    projection: Projection,
    examples: Examples,
    shared: Shared,
    stats: RowStats,
    alive: Array,
    ct: Terms,
) -> vocabulary.Gradients:
    """As `jaxce.linear.vocabulary.backward`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    assert schedule.kernels is not None
    _, (bn, bv), resident, chip = schedule.kernels
    *batch, D = projection.hidden.shape
    V = projection.kernel.shape[schedule.vocab_axis]
    whole, (projection, examples) = projection.hidden, flat(batch, projection, examples)
    stats, alive, ct = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), (stats, alive, ct))
    every = varying(projection, examples, shared, ct)
    cores, in_turn = chip.cores, V // (bv * chip.cores)
    classes = in_turn * bv * cores
    # Rows that fill up the last block are as dead as those on which nothing depends.
    length = _filled_up(len(projection.hidden), bn, resident)
    indices, stats, alive, ct = _padded(length, (_indices(options, examples, V), stats, alive, ct))
    of_rows = factors(indices, stats, alive, ct)
    log_sum = of_rows.log_sum if options.label_smoothing else None  # nothing else needs it, of class indices
    needed = of_rows.max, of_rows.scale, of_rows.at_targets, of_rows.smoothing, of_rows.entropy, log_sum
    hidden, rows, unpack = _rows(length, projection.hidden, (indices, needed), every)
    by_class, class_parts = _by_class(options, V, projection, examples, shared, every)
    asked = [x for x in (projection.bias, shared.class_weights) if x is not None]  # beside hidden states and kernel
    dhidden_dtype = whole.dtype if resident and _rounds(options, V, bv, cores) else _F32
    dtype = matmul_dtype(whole.dtype, projection.kernel.dtype)

    def kernel(rows_ref: Any, hidden_ref: Any, kernel_ref: Any, *refs: Any) -> None:
        of_classes, refs = refs[: len(by_class)], refs[len(by_class) :]
        sums_before, refs = refs[: not resident], refs[not resident :]
        dkernel_ref, dhidden_ref, *refs = refs  # type: ignore[assignment]
        sums_by_class, (dkernel_sum, *dhidden_sum) = refs[: len(asked) > 0], refs[len(asked) > 0 :]
        i, j = pl.program_id(2), pl.program_id(0) * in_turn + pl.program_id(1)
        here = pl.ds(pl.multiple_of(i * bn, bn), bn)

        @pl.when(i == 0)
        def _() -> None:
            for ref in (dkernel_sum, *sums_by_class):
                ref[...] = jnp.zeros(ref.shape, _F32)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            for ref in dhidden_sum:
                ref[here, :] = jnp.zeros((bn, D), _F32)

        h, w = hidden_ref[...].astype(dtype), kernel_ref[...].astype(dtype)
        parts = class_parts(*(ref[...] for ref in of_classes))
        z = _logits(schedule, h, w, parts)
        labels, (largest, scale, at_targets, smoothing, entropy, log_sum) = unpack(rows_ref[...].T)
        dead, log_sum = largest == jnp.inf, largest if log_sum is None else log_sum
        of = Factors(dead, largest, log_sum, scale, at_targets, scale, smoothing, entropy, None)  # no target in it
        where, weights = parts.of(slice(None), z.shape)[1:]
        given = Examples(labels - j * bv, where=where), Shared(weights)
        dz, _of_examples, dshared = gradient(options, z, *given, of)
        for ref in sums_by_class:
            of_bias = [] if projection.bias is None else [jnp.sum(dz, 0)]
            for k, x in enumerate([*of_bias, *jax.tree.leaves(dshared)]):
                ref[k, :] += x
        dz = dz.astype(dtype)
        dhidden = _dot(dz, w, 1, schedule.vocab_axis)
        for ref in dhidden_sum:
            ref[here, :] += dhidden
        for ref in sums_before:
            dhidden_ref[...] = ref[...] + dhidden
        dkernel_sum[...] += _dot(h, dz, 0, 0) if schedule.vocab_axis else _dot(dz, h, 0, 0)

        @pl.when(i == pl.num_programs(2) - 1)
        def _() -> None:
            dkernel_ref[...] = dkernel_sum[...].astype(dkernel_ref.dtype)

        @pl.when(pl.program_id(1) == in_turn - 1)
        def _() -> None:
            for ref in dhidden_sum:
                dhidden_ref[...] = ref[here, :].astype(dhidden_ref.dtype)

    def rows_spec(c: Any, j: Any, i: Any) -> Any:  # what is summed on chip is written in the last round only
        return (c, jnp.where(j == in_turn - 1, i, 0) if resident else i, 0)

    sums_shape = (cores, length, D)
    of_block = _classes_spec(schedule, D, bv, lambda c, j, i: c * in_turn + j)
    of_hidden = pl.BlockSpec((None, bn, D), rows_spec)
    of_class = functools.partial(pl.BlockSpec, index_map=lambda c, j, i: (0, c * in_turn + j))
    sums_in_hbm = [] if resident else [vary(jnp.zeros(sums_shape, _F32), every)]
    operands = [rows, hidden, projection.kernel, *by_class, *sums_in_hbm]
    of_asked = [of_class((len(asked), bv))] if asked else []
    call = pl.pallas_call(
        kernel,
        grid=(cores, in_turn, length // bn),
        in_specs=[
            pl.BlockSpec((len(rows), bn), lambda c, j, i: (0, i)),
            pl.BlockSpec((bn, D), lambda c, j, i: (i, 0)),
            of_block,
            *(of_class((len(x), bv)) for x in by_class),
            *(of_hidden for _ in sums_in_hbm),
        ],
        out_specs=[of_block, of_hidden, *of_asked],
        out_shape=[
            described(projection.kernel.shape, projection.kernel.dtype, rows),
            described(sums_shape, dhidden_dtype, rows),
            *(described((len(asked), V), _F32, rows) for _ in of_asked),
        ],
        scratch_shapes=[
            pltpu.VMEM((D, bv) if schedule.vocab_axis else (bv, D), _F32),
            *([pltpu.VMEM((length, D), _F32)] if resident else []),
        ],
        input_output_aliases={} if resident else {len(operands) - 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=chip.vmem
        ),
        name="cross_entropy_backward",
        interpret=INTERPRET,
    )
    with jax.enable_x64(False):
        dkernel, dhidden, *sums = call(*operands)
    by_kind = iter([x for of_each in sums for x in of_each])
    dbias, dweights = (
        None if x is None else next(by_kind).astype(x.dtype) for x in (projection.bias, shared.class_weights)
    )
    dhidden = (dhidden[0] if cores == 1 else jnp.sum(dhidden, 0))[: len(projection.hidden)]
    grads = Projection(dhidden, dkernel, dbias), Examples(), Shared(dweights)
    if classes < V:
        of_rows = jax.tree.map(lambda x: x[: len(projection.hidden)], (stats, alive, ct))
        grads = vocabulary.backward(schedule, options, projection, examples, shared, *of_rows, done=(classes, grads))
    dhidden = sum_like(grads[0].hidden, whole).astype(whole.dtype).reshape(whole.shape)
    return grads[0]._replace(hidden=dhidden), *grads[1:]


@backward.defjvp
def _backward_jvp(schedule: Schedule, options: Options, primals: Any, tangents: Any) -> tuple[Any, Any]:
    in_blocks = functools.partial(vocabulary.backward, schedule, options)
    return backward(schedule, options, *primals), jax.jvp(in_blocks, primals, tangents)[1]


# --- what both have in common -----------------------------------------------------------------------------------------


def _indices(options: Options, examples: Examples, num_classes: int) -> Array:
    """The class indices, as this device counts its classes; those that 32 bits do not hold are no class."""
    assert examples.indices is not None  # probabilities [N, V] are refused
    indices = on_this_device(examples.indices, num_classes, options.axis_name)
    return jnp.clip(indices, -1, num_classes).astype(jnp.int32)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    axes = ((a_axis,), (b_axis,)), ((), ())
    return lax.dot_general(a, b, axes, precision=lax.Precision.DEFAULT, preferred_element_type=_F32)


class _ClassParts(NamedTuple):
    """What belongs to a block of classes, `[1, classes]`."""

    bias: Array | None = None
    where: Array | None = None
    weights: Array | None = None

    def of(self, columns: slice, shape: tuple[int, ...]) -> _ClassParts:
        """Of some columns of the block, in the shape of their logits."""
        whole: _ClassParts = jax.tree.map(lambda x: jnp.broadcast_to(x[:, columns], shape), self)
        return whole._replace(where=None if whole.where is None else whole.where > 0)


def _logits(schedule: Schedule, hidden: Array, kernel: Array, parts: _ClassParts) -> Array:
    dtype = matmul_dtype(hidden.dtype, kernel.dtype)
    z = _dot(hidden.astype(dtype), kernel.astype(dtype), 1, 1 - schedule.vocab_axis)
    return z if parts.bias is None else z + parts.bias


def _by_class(
    options: Options, V: int, projection: Projection, examples: Examples, shared: Shared, every: frozenset[str]
) -> tuple[list[Array], Callable[..., _ClassParts]]:
    """One array `[numbers, V]` of what belongs to classes, or none; and what makes the parts of a block of it."""
    weights = shared.class_weights if options.label_smoothing else None
    given = projection.bias, examples.where, weights
    parts = _ClassParts(*(None if x is None else jnp.broadcast_to(x.reshape(1, -1), (1, V)) for x in given))
    leaves, structure = jax.tree.flatten(parts)
    stacked = [jnp.concatenate([vary(x, every).astype(_F32) for x in leaves])] if leaves else []

    def of_block(*blocks: Array) -> _ClassParts:
        parts: _ClassParts = jax.tree.unflatten(structure, [x[k : k + 1] for x in blocks for k in range(len(x))])
        return parts

    return stacked, of_block


def _rows(
    length: int, hidden: Array, tree: Tree, every: frozenset[str]
) -> tuple[Array, Array, Callable[[Array], Tree]]:
    """Hidden states and one array `[numbers, N]` of what belongs to rows, both filled up; and what unpacks columns.

    Class indices are exact as float32 up to 2²⁴.
    """
    hidden, tree = _padded(length, (hidden, tree))
    leaves, structure = jax.tree.flatten(tree)
    widths = [1 if x.ndim == 1 else x.shape[-1] for x in leaves]
    numbers = [vary(x, every).astype(_F32).reshape(len(x), -1).T for x in leaves]
    rows = jnp.concatenate(numbers)

    def unpack(columns: Array) -> Tree:
        found, at = [], 0
        for x, width in zip(leaves, widths, strict=True):
            own = columns[:, at] if x.ndim == 1 else columns[:, at : at + width]
            found.append(own.astype(x.dtype))
            at += width
        unpacked: Tree = jax.tree.unflatten(structure, found)
        return unpacked

    return vary(hidden, every), rows, unpack


def _padded(length: int, tree: Tree) -> Tree:
    padded: Tree = jax.tree.map(lambda x: jnp.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1))), tree)
    return padded


def _classes_spec(schedule: Schedule, features: int, block_v: int, block: Callable[..., Any]) -> Any:
    """A block of the kernel, or of its gradient."""
    from jax.experimental import pallas as pl

    if schedule.vocab_axis:
        return pl.BlockSpec((features, block_v), lambda *at: (0, block(*at)))
    return pl.BlockSpec((block_v, features), lambda *at: (block(*at), 0))


def _filled_up(tokens: int, block_n: int, resident: bool) -> int:
    """Of the backward pass. Sums in HBM need four blocks, or one is read again before it was written."""
    return max(_whole(tokens, block_n), 0 if resident else 4 * block_n)


def _rounds(options: Options, num_classes: int, block_v: int, cores: int) -> bool:
    """Whether the sum on chip is the whole gradient of the hidden states, and can be rounded as it is written."""
    return cores == 1 and num_classes % block_v == 0 and not options.axis_name


def _whole(length: int, size: int) -> int:
    """The least multiple of `size` that is no less."""
    return -(-length // size) * size


# --- when it applies, and what it costs -------------------------------------------------------------------------------

MATMULS = 4
PLATFORMS = ("tpu",)
# Tokens and classes in a block, the fastest first. How often the backward pass reads and writes the gradient of the
# hidden states depends on the classes, which is why there are more of them.
_SHAPES = ((1024, 1024), (512, 1024), (512, 512), (256, 512), (256, 256), (128, 256), (128, 128))
_MOST_CLASSES = 2**24  # the number of one travels as a float32
_FEWEST_CLASSES = 2 * LANES  # fewer are no block for each of two cores
_ROOM = 0.92  # of the on-chip memory, for what the kernels ask for
_ENTRIES = 8  # of a target


def check(p: Problem, precision: Any) -> None:
    """Raises for what the kernels do not take."""

    def refuse(name: str, expected: str, got: str) -> None:
        hint = "Leave implementation out."
        checks.fail(ValueError, name, f"{expected} with implementation='pallas_tpu'", got, hint)

    if p.matmul not in (jnp.bfloat16, jnp.float32):
        refuse("hidden", "bfloat16 or float32, like the kernel,", f"{p.hidden} and {p.kernel}")
    if p.matmul == jnp.float32 and precision not in (None, "default", lax.Precision.DEFAULT):
        refuse("precision", "None of float32", repr(precision))
    if p.entries is None:
        refuse("targets", "class indices or sparse targets", "probabilities of every class")
    elif p.entries > _ENTRIES:
        refuse("targets", f"at most {_ENTRIES} classes of each token", str(p.entries))
    if p.mask_per_token:
        refuse("where", "a mask [V]", "one for each token")
    if p.options.temperature:
        refuse("temperature", "1", "another")
    if p.options.tail:
        refuse("return_aux", "False", "True")
    if not isinstance(p.N, int):
        refuse("hidden", "a known number of tokens", "a symbolic one")
    if p.V > _MOST_CLASSES:
        refuse("kernel", f"at most {_MOST_CLASSES:,} classes", f"{p.V:,}")
    if kernels(p, chips.kind_of("tpu")) is None:
        refuse("hidden", "features of which 128 tokens and 128 classes fit in on-chip memory", f"D = {p.D}")


def applies(p: Problem, platform: str) -> bool:
    return p.options.implementation == "pallas_tpu" and platform in PLATFORMS and p.N > 0 and p.V >= _FEWEST_CLASSES


def rank(p: Problem, platform: str, block_n: int, roomy: bool) -> int:
    return -1


def kernels(p: Problem, kind: str) -> Blocks | None:
    """The fastest blocks that the chip has room for."""
    chip = chips.tpu(kind)
    fits = [_shape(p, chip, shape) for shape in _SHAPES]
    forward = next((s for s in fits if forward_bytes(p, *s) <= _ROOM * chip.vmem), None)
    both = ((s, resident) for s in fits for resident in (True, False))
    backward = next(((s, r) for s, r in both if backward_bytes(p, *s, r, chip.cores) <= _ROOM * chip.vmem), None)
    return None if forward is None or backward is None else Blocks(forward, *backward, chip)


def _shape(p: Problem, chip: Tpu, shape: tuple[int, int]) -> tuple[int, int]:
    """About these tokens and classes in a block, with as little as possible at the end that fills none."""
    block_n, block_v = shape
    tokens = -(-p.N // max(-(-p.N // block_n), 1))
    return max(_whole(tokens, LANES), LANES), max(min(block_v, p.V // chip.cores // LANES * LANES), LANES)


def forward_bytes(p: Problem, block_n: int, block_v: int) -> int:
    """On-chip memory that the kernel takes: operands twice, as the next ones arrive while it works on these."""
    operands = 2 * p.D * (block_n * p.hidden.itemsize + block_v * p.kernel.itemsize)
    fields = 2 + (p.entries or 0) + 2 * p.options.label_smoothing + 2 * p.options.return_aux
    return operands + 4 * block_n * (2 * block_v + (2 * fields + 1) * LANES)


def backward_bytes(p: Problem, block_n: int, block_v: int, resident: bool, cores: int) -> int:
    """The same; and the sums of the gradients."""
    operands = 2 * p.D * (block_n * p.hidden.itemsize + 2 * block_v * p.kernel.itemsize)
    logits = block_n * block_v * (2 * 4 + p.matmul.itemsize) + 4 * block_n * LANES
    sums = 4 * p.D * block_v
    if resident:
        itemsize = p.hidden.itemsize if _rounds(p.options, p.V, block_v, cores) else 4
        return operands + logits + sums + p.D * (4 * _whole(p.N, block_n) + 2 * itemsize * block_n)
    return operands + logits + sums + 4 * 4 * p.D * block_n


def blocks(p: Problem, platform: str, scale: int) -> list[tuple[int, int]]:
    found = kernels(p, chips.kind_of(platform))
    assert found is not None  # it was checked
    return [found.backward]


def temp_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    found = kernels(p, chips.kind_of(platform))
    assert found is not None
    cores, length = found.chip.cores, _filled_up(p.N, block_n, found.resident)
    on_chip = found.resident and _rounds(p.options, p.V, block_v, cores)
    dhidden = 0 if on_chip else 4 * cores * length * p.D
    padded = (length > p.N) * length * p.D * p.hidden.itemsize
    left = p.V % (block_v * cores)  # of the classes, for which there is no kernel
    rest = costs.block_bytes(dataclasses.replace(p, V=left), platform, p.N, min(block_v, left)) if left else 0
    return dhidden + padded + rest + costs.row_bytes(p, platform)


def kept_bytes(p: Problem, block_n: int, block_v: int) -> int:
    return costs.record_bytes(p) + costs.cleaned_bytes(p, 1 + p.hidden.itemsize)
