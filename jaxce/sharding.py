"""What sharded arrays need: Explicit meshes, and arrays that vary over the axes of a `shard_map`.

Inside `shard_map` a mesh axis may split the classes (`axis_name`), the examples (`batch_axis_name`), or neither. Its
types say which arrays differ along which axes, and derivatives are right because they do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxce.selection import select
from jaxce.versions import varying_axes

Tree = TypeVar("Tree")
AxisNames = tuple[str, ...]


def explicitly_sharded(*arrays: Array) -> bool:
    """Whether any of the arrays carries its sharding in its type (a mesh with Explicit axes)."""
    return any(jax.sharding.AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types for a in arrays)


def class_numbers(like: Array, dtype: DTypeLike) -> Array:
    """0 to V-1 along the last axis of an array shaped and sharded as `like`."""
    sharding = jax.typeof(like).sharding if explicitly_sharded(like) else None
    return lax.broadcasted_iota(dtype, like.shape, like.ndim - 1, out_sharding=sharding)


def mask_like(mask: Array, like: Array) -> Array:
    """`mask`, shaped and sharded as `like`: a select wants all its arguments sharded alike."""
    return mask & jnp.full_like(like, True, dtype=jnp.bool_)


def taking_part(where: Array | None, x: Array) -> Array:
    """`x [..., V]`, but 0 for classes that the mask leaves out, whatever it holds there."""
    return x if where is None else select(mask_like(where, x), x, jnp.zeros_like(x))


def varying(*trees: Any) -> frozenset[str]:
    """The mesh axes of a `shard_map` along which any of the arrays differs."""
    return frozenset().union(*(varying_axes(jax.typeof(a)) for a in jax.tree.leaves(trees)))


def vary(tree: Tree, axes: frozenset[str]) -> Tree:
    """The arrays, varying over `axes` as well.

    A gradient has the type of its argument, so what is the same on all devices must be made to vary before it meets the
    logits in a function with a hand-written rule. The derivative of doing so adds the devices' gradients up.
    """

    def cast(a: Array) -> Array:
        missing = axes - varying(a)
        return lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    varied: Tree = jax.tree.map(cast, tree)
    return varied


def alike(tree: Tree, axes: AxisNames, ignore_index: int | None = None) -> Tree:
    """The arrays, of one type on all devices along the axes: what was gathered there varies by its type alone.

    Where it does differ, numbers are NaN, and indices those of no class. The derivative adds the devices' gradients up
    and gives each its share.
    """

    def no_class(x: Array) -> int:
        limits = jnp.iinfo(x.dtype)
        return int(limits.max if ignore_index == limits.min else limits.min)

    def same(x: Array) -> Array:
        over = tuple(sorted(varying(x) & set(axes)))
        if not over:
            return x
        fixed = lax.stop_gradient(x)
        largest, least = lax.pmax(fixed, over), lax.pmin(fixed, over)
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        value: Array = select(largest == least, largest, jnp.nan if floats else no_class(x))
        return value + lax.pmean(select(jnp.isfinite(x), x - fixed, 0), over) if floats else value

    same_tree: Tree = jax.tree.map(same, tree)
    return same_tree


def sum_over(tree: Tree, axes: AxisNames) -> Tree:
    """The sums over the devices along the mesh axes; the arrays themselves if there are none."""
    return lax.psum(tree, axes) if axes else tree


def sum_like(dx: Array, x: Array) -> Array:
    """The gradient in what devices share, of which each has the part from its own classes."""
    return sum_over(dx, tuple(sorted(varying(dx) - varying(x))))


def shard_count(axes: AxisNames) -> int:
    return lax.axis_size(axes) if axes else 1


def shard_start(size: int, axes: AxisNames) -> Array | int:
    """The number of this device's first class, if each holds `size`."""
    return lax.axis_index(axes) * size if axes else 0


def on_this_device(indices: Array, size: int, axes: AxisNames) -> Array:
    """Class indices as seen from this device, whose first of `size` classes is 0."""
    return indices - jnp.asarray(shard_start(size, axes), indices.dtype) if axes else indices


def explicit_mesh(*arrays: Any) -> Any:
    """The mesh with Explicit axes that is in use, or that an array is sharded over; None if there is none."""
    meshes = [jax.typeof(a).sharding.mesh for a in arrays if isinstance(a, jax.Array)]
    explicit = jax.sharding.AxisType.Explicit
    return next((m for m in (jax.sharding.get_abstract_mesh(), *meshes) if explicit in m.axis_types), None)


def spec_of(x: Any) -> Any:
    """How every axis of `x`, an array or the type of one, is split."""
    described: Any = x if isinstance(x, jax.core.AbstractValue) else jax.typeof(x)
    spec = described.sharding.spec
    return jax.P(*spec, *[None] * (x.ndim - len(spec)))


def place(x: Array, mesh: Any, spec: Sequence[Any]) -> Array:
    """`x`, sharded over the mesh by `spec`, which is of the shape that its own broadcasts to."""
    own = [None if n == 1 else s for n, s in zip(x.shape, spec[len(spec) - x.ndim :], strict=True)]
    placed: Array = jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.P(*own)))
    return placed


def place_together(mesh: Any, arrays: dict[str, tuple[Any, Sequence[Any]]]) -> dict[str, Any]:
    """Each tree of arrays, sharded over the mesh by its spec.

    In one program: where no mesh is set, those that are on it already say which devices it has.
    """
    specs = tuple((name, tuple(spec)) for name, (_, spec) in arrays.items())
    return cast(dict[str, Any], _placed({name: tree for name, (tree, _) in arrays.items()}, mesh=mesh, specs=specs))


@functools.partial(jax.jit, static_argnames=("mesh", "specs"))
def _placed(arrays: dict[str, Any], *, mesh: Any, specs: tuple[tuple[str, tuple[Any, ...]], ...]) -> dict[str, Any]:
    return {name: jax.tree.map(lambda x, spec=spec: place(x, mesh, spec), arrays[name]) for name, spec in specs}
