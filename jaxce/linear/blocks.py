"""Hidden states times a kernel, a block of it at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from jaxce import on_cpu
from jaxce.layout import class_count
from jaxce.primitives import Primitive
from jaxce.reverse_mode import jvp
from jaxce.sharding import AxisNames, sum_over, vary, varying
from jaxce.stats import matmul_dtype, working_dtype

State = TypeVar("State")
Own = TypeVar("Own")  # what differs by platform


class Schedule(NamedTuple):
    """How the loss is computed on one platform: constants of the compiled program (chosen in `jaxce.linear.plan`)."""

    vocab_axis: int = 1  # of the kernel: 1 for [D, V], 0 for [V, D]
    precision: Any = None
    block_n: int = 0  # tokens in a block, where gradients are computed along with the loss; else 0
    forward_v: int = 0  # classes in a block
    backward_v: int = 0
    widens: bool = False  # narrow factors of a product before it, for a backend that lacks (some) narrow products
    retiles: bool = False  # for a chip that copies sliced kernels
    row_major: bool = False  # the gradient of the logits, for a compiler that transposes the kernel otherwise
    transposes: bool = False  # hidden states once, rather than in the product of every block
    kernels: Any = None  # `jaxce.linear.pallas_tpu.Blocks`, where its kernels go through the blocks
    without_gradients: Any = None  # with blocks of tokens, the `Schedule` where no gradient is computed along


# For "cpu", "tpu" and every other platform: which one it is, is known when the program is lowered, and not before.
Schedules = tuple[Schedule, Schedule, Schedule]


def by_platform(schedules: tuple[Own, Own, Own], compute: Callable[..., Any], *args: Any) -> Any:
    """`compute(schedule, *args)`, with the schedule of the platform that is compiled for.

    It is one operation to a `jax.checkpoint` around the loss, whose policy may save products: not those of every block.
    """
    cpu, tpu, default = schedules
    own = {"cpu": cpu, "tpu": tpu}
    branches = {name: functools.partial(compute, s) for name, s in own.items() if s != default}

    def chosen(*args: Any) -> Any:
        if not branches:
            return compute(default, *args)
        return lax.platform_dependent(*args, **branches, default=functools.partial(compute, default))

    operation = jax.custom_jvp(chosen)
    operation.defjvp(functools.partial(jvp, chosen), symbolic_zeros=True)
    return operation(*args)


def over_blocks(
    length: int, size: int, block: Callable[[Any, int, State], State], state: State, done: int = 0
) -> State:
    """Folds `block(start, size, state)` over done..length. The rest at the end is a block of its own, not padded."""
    whole, left = divmod(length - done, size)
    if whole == 1:
        state = block(done, size, state)
    elif whole:
        # Where the loop itself is differentiated in reverse, its blocks must not be kept.
        def step(i: Array, state: State) -> State:
            return block(i * size + done if done else i * size, size, state)

        state = lax.fori_loop(0, whole, jax.checkpoint(step, prevent_cse=False), state)
    return block(done + whole * size, left, state) if left else state


def take(x: Array, start: Any, size: int, axis: int, schedule: Schedule | None = None) -> Array:
    """The elements from `start` on, and all of `x` if one stands for every element.

    With the schedule of a platform that has no slices of narrow numbers, so that not all of `x` is widened for one.
    """
    widens = schedule is not None and schedule.widens and x.dtype in (jnp.bfloat16, jnp.float16)
    slice_of = on_cpu.slice_of if widens else lax.dynamic_slice_in_dim
    return x if x.shape[axis] == 1 else slice_of(x, start, size, axis % x.ndim)


def put(whole: Array, part: Array, start: Any, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis % whole.ndim)


def put_or_add(whole: Array, part: Array, start: Any, axis: int, add: bool) -> Array:
    """`put`, or with `add` the sum of what is there and the part."""
    if add:
        part = take(whole, start, part.shape[axis % part.ndim], axis) + part.astype(whole.dtype)
    return put(whole, part, start, axis)


def row_major(x: Array) -> Array:
    """`x`, on TPU laid out in memory with its last axis innermost."""
    laid_out: Array = _row_major_p.bind(x)
    return laid_out


def _laid_out(ctx: mlir.LoweringRuleContext, *operands: Any) -> Any:
    # `jax.export` cannot serialise a layout: such a program does without it, and may copy the gradient once.
    for_export = ctx.module_context.lowering_parameters.for_export
    return (_unchanged if for_export else _constrained)(ctx, *operands)


_row_major_p = Primitive("row_major")
_row_major_p.def_impl(lambda x: x)
_row_major_p.def_abstract_eval(lambda x: x)
_unchanged = mlir.lower_fun(lambda x: x, multiple_results=False)
_constrained = mlir.lower_fun(lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), multiple_results=False)
mlir.register_lowering(_row_major_p, _unchanged)
mlir.register_lowering(_row_major_p, _laid_out, platform="tpu")
batching.defvectorized(_row_major_p)
ad.deflinear2(_row_major_p, lambda ct, _: [ct])


def retiled_classes(kernel: Array, start: Any, size: int, vocab_axis: int) -> Array:
    """`take` of a block of the kernel, retiled on its way (see "TPU7x" in `jaxce.linear.chips`)."""
    if vocab_axis == 0:
        rows = kernel.at[jnp.asarray(start, jnp.int32) + jnp.arange(size, dtype=jnp.int32)]
        return rows.get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)
    part = take(kernel, start, size, 1)
    return _widened_and_narrowed(part) if kernel.dtype.itemsize == 2 else part


@jax.custom_jvp
def _widened_and_narrowed(x: Array) -> Array:
    """`x`, in 32 bits on its way. As integers: compilers drop a detour by way of float32."""
    wide = lax.optimization_barrier(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32))
    return lax.bitcast_convert_type(wide.astype(jnp.uint16), x.dtype)


@_widened_and_narrowed.defjvp
def _widened_and_narrowed_jvp(  # integers would have no derivative
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return _widened_and_narrowed(*primals), tangents[0]


def participating(where: Array | None, shape: tuple[int, ...], block_v: int, axis_name: AxisNames = ()) -> Array | None:
    """`class_count` on all devices together: of a mask `[..., V]`, which is not written out as numbers, in blocks."""
    if where is None:
        return None
    if all(n == 1 for n in where.shape[:-1]):
        return sum_over(class_count(where, shape), axis_name)

    def block(start: Any, size: int, count: Array) -> Array:
        return count + class_count(take(where, start, size, -1), (*shape[:-1], size))

    count = vary(jnp.zeros(shape[:-1], jnp.int32), varying(where))
    return sum_over(over_blocks(shape[-1], block_v, block, count), axis_name)


def logits(hidden: Array, kernel: Array, bias: Array | None, schedule: Schedule) -> Array:
    """hidden @ kernel + bias, in the working dtype."""
    dtype = matmul_dtype(hidden.dtype, kernel.dtype)
    narrow = schedule.widens and on_cpu.multiplies(dtype)
    if schedule.widens and not narrow:
        dtype = working_dtype(dtype)
    z = contract(hidden, -1, kernel, 1 - schedule.vocab_axis, dtype, schedule)
    if narrow:  # a product whose result is transposed may become one that XLA's CPU runtime lacks
        z = lax.optimization_barrier(z)
    return z if bias is None else z + jnp.broadcast_to(bias.astype(z.dtype), z.shape)


def all_logits(schedules: Schedules, hidden: Array, kernel: Array, bias: Array | None) -> Array:
    """Of wide factors, whatever the platform: the derivatives are made of products that no schedule sees."""
    dtype = working_dtype(matmul_dtype(hidden.dtype, kernel.dtype))
    schedule = Schedule(schedules[0].vocab_axis, schedules[0].precision)
    return logits(hidden.astype(dtype), kernel.astype(dtype), bias, schedule)


def gradients(
    dz: Array, hidden: Array, kernel: Array, schedule: Schedule, hidden_t: Array | None = None
) -> tuple[Array, Array]:
    """dhidden and dkernel, in the working dtype, for the gradient of the logits. `hidden_t` has D first."""
    dtype = matmul_dtype(hidden.dtype, kernel.dtype)
    if schedule.widens or dtype == jnp.float16:  # the gradients of unlikely classes would vanish in it
        dtype = dz.dtype
    # Without the barriers TPU compilers compute dz once for each of the two products.
    dz = lax.optimization_barrier(dz.astype(dtype))
    if schedule.row_major:
        dz = row_major(dz)
    rows = tuple(range(dz.ndim - 1))
    dhidden = contract(dz, -1, kernel, schedule.vocab_axis, dtype, schedule)
    if hidden_t is not None:
        dkernel = contract(hidden_t, tuple(i + 1 for i in rows), dz, rows, dtype, schedule)
        dkernel = dkernel if schedule.vocab_axis else dkernel.T
    elif schedule.vocab_axis:
        dkernel = contract(hidden, rows, dz, rows, dtype, schedule)
    else:
        dkernel = contract(dz, rows, hidden, rows, dtype, schedule)
    return dhidden, lax.optimization_barrier(dkernel) if schedule.retiles else dkernel


def contract(a: Array, a_axes: Any, b: Array, b_axes: Any, dtype: DTypeLike, schedule: Schedule) -> Array:
    """The sum over an axis (or several) of both of the products of `a` and `b`, which are cast to `dtype`."""

    def axes_of(x: Array, axes: Any) -> tuple[int, ...]:
        return tuple(i % x.ndim for i in (axes if isinstance(axes, tuple) else (axes,)))

    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        ((axes_of(a, a_axes), axes_of(b, b_axes)), ((), ())),
        precision=schedule.precision,
        preferred_element_type=working_dtype(dtype),
    )
