"""Forward mode through a rule that only has a reverse mode is an error, and this one says what to do instead.

`jax.custom_vjp` raises an error of its own, but not until the program is compiled, and it does not know of
`implementation="autodiff"`. So a function with such a rule takes its arguments through an identity whose tangent is
never computed: reverse mode transposes it away, and anything that would compute it is told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from jaxce import checks
from jaxce.primitives import Primitive
from jaxce.sharding import explicit_mesh, place, spec_of, vary
from jaxce.versions import varying_axes

Tree = TypeVar("Tree")


def reverse_mode_only(tree: Tree) -> Tree:
    """The arrays themselves, which cannot be differentiated in forward mode."""
    _register_jet_rule()
    leaves, structure = jax.tree.flatten(tree)
    floats = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    for i, x in zip(floats, _arguments_p.bind(*(leaves[i] for i in floats)), strict=True):
        leaves[i] = x
    same: Tree = jax.tree.unflatten(structure, leaves)
    return same


# --- cotangents that nothing depends on, in rules that ask for them (`symbolic_zeros=True`) --------------------------


def is_symbolic_zero(ct: Any) -> bool:
    return isinstance(ct, jax.custom_derivatives.SymbolicZero)


def is_used(ct: Any) -> bool:
    return not is_symbolic_zero(ct) and ct.dtype != jax.dtypes.float0


def materialised(cts: Tree) -> Tree:
    """The cotangents, with an array for every symbolic zero."""

    def array(ct: Any) -> Any:
        if not is_symbolic_zero(ct):
            return ct
        zeros = vary(jnp.zeros(ct.shape, ct.dtype), varying_axes(ct.aval))
        mesh = explicit_mesh()
        return zeros if mesh is None else place(zeros, mesh, spec_of(ct.aval))

    arrays: Tree = jax.tree.map(array, cts, is_leaf=is_symbolic_zero)
    return arrays


def jvp(f: Callable[..., Tree], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Tree, Tree]:
    """`jax.jvp`, which computes nothing for tangents that are symbolic zeros."""
    xs, structure = jax.tree.flatten(primals)
    dxs = jax.tree.leaves(tangents, is_leaf=is_symbolic_zero)
    moving = [i for i, dx in enumerate(dxs) if is_used(dx)]

    def of_moving(*moved: Array) -> Tree:
        own = dict(zip(moving, moved, strict=True))
        return f(*jax.tree.unflatten(structure, [own.get(i, x) for i, x in enumerate(xs)]))

    values, slopes = jax.jvp(of_moving, [xs[i] for i in moving], [dxs[i] for i in moving])
    return values, slopes


# --- the identity -----------------------------------------------------------------------------------------------------


def _refuse(*_: Any, **__: Any) -> NoReturn:
    hint = (
        "Pass implementation='autodiff' to the loss: the default has a rule for reverse mode alone, grad, vjp, jacrev, "
        "hessian, and jvp of grad."
    )
    expected = "'autodiff' for forward mode (jvp, jacfwd, linearize)"
    checks.fail(TypeError, "implementation", expected, "the default, 'xla'", hint)


def _jvp(primals: list[Any], tangents: list[Any]) -> tuple[list[Any], list[Any]]:
    # The primals themselves: a derivative of this derivative must not meet the identity again, in any argument.
    return list(primals), [t if isinstance(t, ad.Zero) else _tangent_p.bind(t) for t in tangents]


_arguments_p, _tangent_p = Primitive("reverse_mode_only"), Primitive("reverse_mode_only_tangent")
_arguments_p.multiple_results = True
_arguments_p.def_abstract_eval(lambda *xs: list(xs))
_tangent_p.def_abstract_eval(lambda x: x)
batching.primitive_batchers[_arguments_p] = lambda xs, axes: (_arguments_p.bind(*xs), axes)
batching.primitive_batchers[_tangent_p] = _refuse
_arguments_p.def_impl(lambda *xs: list(xs))
mlir.register_lowering(_arguments_p, mlir.lower_fun(lambda *xs: list(xs), multiple_results=True))
ad.primitive_jvps[_arguments_p] = _jvp
_tangent_p.def_impl(_refuse)
mlir.register_lowering(_tangent_p, _refuse)
ad.primitive_transposes[_tangent_p] = lambda ct, _: [ct]
ad.primitive_jvps[_tangent_p] = _refuse


@functools.cache
def _register_jet_rule() -> None:
    from jax.experimental import jet

    jet.jet_rules[_arguments_p] = _refuse
