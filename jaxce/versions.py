"""What is called otherwise in older versions of JAX: each piece with the version from which on it can go.

Two more differences are where they belong, since they cost nothing there: what checkify hands on
(`jaxce.label_check`), and how TPU7x lays out blocks (`jaxce.linear.chips`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.interpreters import mlir
from jax.typing import DTypeLike

from jaxce.primitives import Primitive

# XLA has libraries for bfloat16 on CPU: products and sums (seen in 0.12; 0.10 widens what it is given, in memory).
BFLOAT16_ON_CPU = jax.__version_info__ >= (0, 12)


def varying_axes(aval: Any) -> frozenset[str]:
    """The mesh axes of a `shard_map` along which arrays of this type differ: `aval.mat.varying` from JAX 0.10.2 on."""
    axes: frozenset[str] = aval.mat.varying if hasattr(aval, "mat") else aval.vma
    return axes


def described(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> jax.ShapeDtypeStruct:
    """An array that differs along the same mesh axes as `like`: `manual_axis_type=aval.mat` from JAX 0.10.2 on."""
    aval: Any = jax.typeof(like)
    axes: dict[str, Any] = {"manual_axis_type": aval.mat} if hasattr(aval, "mat") else {"vma": aval.vma}
    return jax.ShapeDtypeStruct(shape, dtype, **axes)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """`lax.empty`, which any `vmap` around it batches before JAX 0.11: `jax.hessian` then refuses the gradient."""
    new: Callable[..., Array] = lax.empty if jax.__version_info__ >= (0, 11) else _empty_p.bind
    return new(shape=shape, dtype=dtype)


_empty_p = Primitive("empty")
_empty_p.def_abstract_eval(lambda *, shape, dtype: jax.core.ShapedArray(shape, dtype))
_empty_p.def_impl(lax.empty)
mlir.register_lowering(_empty_p, mlir.lower_fun(lax.empty, multiple_results=False))


def platform_of(device: Any) -> str:
    """The platform of a device: `device.platform`, which abstract ones have from JAX 0.10.1 on."""
    kind = device.device_kind
    known: str | None = getattr(device, "platform", None)
    return known or ("tpu" if kind.startswith("TPU") else "gpu" if kind.startswith("NVIDIA") else "cpu")
