"""Computations that take another form where they are compiled for CPU, which is known when a program is lowered.

XLA's CPU compiler fuses little: it runs plain sums of exponentials through a fast library kernel, computes the rows'
numbers anew for every class that reads them, and is slow wherever arrays do not stay in the cache. Compilers for
accelerators fuse everything into passes over the logits, and need no help.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import batching, mlir
from jax.typing import DTypeLike

from jaxce.primitives import Primitive
from jaxce.versions import BFLOAT16_ON_CPU

Tree = TypeVar("Tree")


def written(tree: Tree) -> Tree:
    """The arrays; on CPU they are written to memory, not computed anew by everything that reads them."""
    barriers = functools.partial(jax.tree.map, lax.optimization_barrier)  # one for all would make their types alike
    same: Tree = lax.platform_dependent(tree, cpu=barriers, default=lambda x: x)
    return same


def on_one_cpu(own: Callable[..., Tree], elsewhere: Callable[..., Tree], likes: Tree, operands: Any) -> Tree:
    """`own(likes, operands)` on a single CPU device, or in one's part of a `shard_map`, and `elsewhere(...)` otherwise.

    What works on chunks of rows would gather them if they were on several devices. All operands have the same leading
    axes, or 1 in their place: those of a batch are put before them. `likes` are of the types of the results.
    """
    leaves, tree = jax.tree.flatten((likes, operands))
    chosen = _choice_p.bind(*leaves, tree=tree, own=own, elsewhere=elsewhere)
    results: Tree = jax.tree.unflatten(jax.tree.structure(likes), chosen)
    return results


def slice_of(x: Array, start: Any, size: int, axis: int) -> Array:
    """`lax.dynamic_slice_in_dim` in a loop on CPU.

    XLA takes slices of wide numbers only (in JAX 0.10, not in 0.12), and would widen all of `x` before the loop if it
    did not depend on the loop. The losses of 256 x 32768 and 512 x 50257 in bfloat16 then took two to four times as
    long, and the linear ones held their kernels in float32.

    With JAX 0.12 the process ends (an LLVM error) where a slice of bfloat16 is multiplied in float64, unless it is
    written out.
    """
    x, start = lax.optimization_barrier((x, jnp.asarray(start, jnp.int32)))
    part = lax.dynamic_slice_in_dim(x, start, size, axis)
    return lax.optimization_barrier(part) if jnp.result_type(float) == jnp.float64 else part


def multiplies(dtype: DTypeLike) -> bool:
    """Whether XLA multiplies factors of this type on CPU, and adds up in float32.

    Products of bfloat16 take a quarter of the time of those of float32 where the processor has instructions for them.
    """
    return BFLOAT16_ON_CPU and bool(dtype == jnp.bfloat16)


_choice_p = Primitive("on_one_cpu")
_choice_p.multiple_results = True


def _own(*leaves: Any, tree: Any, own: Callable[..., object], elsewhere: Callable[..., object]) -> list[Any]:
    return jax.tree.leaves(own(*jax.tree.unflatten(tree, leaves)))


def _elsewhere(*leaves: Any, tree: Any, own: Callable[..., object], elsewhere: Callable[..., object]) -> list[Any]:
    return jax.tree.leaves(elsewhere(*jax.tree.unflatten(tree, leaves)))


def _results(*leaves: Any, tree: Any, **_: Any) -> list[Any]:
    return jax.tree.leaves(jax.tree.unflatten(tree, leaves)[0])


def _lower_for_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
    form = _own if _on_one_device(ctx.module_context.axis_context) else _elsewhere
    return mlir.lower_fun(form, multiple_results=True)(ctx, *operands, **params)


def _on_one_device(context: Any) -> bool:
    if (mesh := getattr(context, "mesh", None)) is not None:
        return set(mesh.axis_names) <= set(context.manual_axes)
    return getattr(context, "num_devices", 1) == 1


def _batch(leaves: Any, axes: Any, *, tree: Any, **params: Any) -> tuple[list[Any], list[int]]:
    (size,) = {x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None}
    moved = [x[None] if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(leaves, axes, strict=True)]
    likes, operands = jax.tree.unflatten(tree, moved)
    likes = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape[1:])), likes)
    results = _choice_p.bind(*jax.tree.leaves((likes, operands)), tree=tree, **params)
    return results, [0] * len(results)


_choice_p.def_impl(_elsewhere)
_choice_p.def_abstract_eval(_results)
batching.primitive_batchers[_choice_p] = _batch
mlir.register_lowering(_choice_p, mlir.lower_fun(_elsewhere, multiple_results=True))
mlir.register_lowering(_choice_p, _lower_for_cpu, platform="cpu")
