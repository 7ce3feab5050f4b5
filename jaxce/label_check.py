"""A label outside the classes is an error under `jax.experimental.checkify`, and costs nothing elsewhere.

`checkify.debug_check` would say the same, but it marks the compiled function as having a side effect, which takes it
off JAX's fast dispatch path: about 0.1 ms a call, checkify or not. So the check is a primitive of its own, an identity
without effects, that checkify is told how to read.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.interpreters import batching, mlir

from jaxce.primitives import Primitive

MESSAGE = (
    "targets: label {label} is not one of the {num_classes} classes, 0 to num_classes-1. "
    "If it marks examples to leave out, pass ignore_index={label}."
)

_check_p = Primitive("check_labels")


def check_labels(known: Array, labels: Array, num_classes: int) -> Array:
    """`known`, which says of each label whether it is a class (or does not matter)."""
    _register_rules()
    checked: Array = _check_p.bind(known, labels, num_classes=num_classes)
    return checked


def _identity(known: Array, labels: Array, *, num_classes: int) -> Array:
    return known


_check_p.def_impl(_identity)
_check_p.def_abstract_eval(_identity)
mlir.register_lowering(_check_p, mlir.lower_fun(_identity, multiple_results=False))
batching.defbroadcasting(_check_p)


def _checkify_rule(internals: Any, *args: Any, num_classes: int) -> tuple[Any, Array]:
    *context, error, enabled_errors, known, labels = args  # JAX 0.12 hands on a context first
    if internals.FailedCheckError in enabled_errors and known.size:
        label = labels.reshape(-1)[jnp.argmin(known.reshape(-1))]
        failure = internals.FailedCheckError(
            internals.get_traceback(), MESSAGE, label=label, num_classes=jnp.asarray(num_classes)
        )
        error = internals.assert_func(*context, error, ~jnp.all(known), failure)
    return error, known


@functools.cache
def _register_rules() -> None:
    from jax.experimental import jet

    jet.jet_rules[_check_p] = functools.partial(jet.zero_prop, _check_p)
    # There is no public way to give a primitive a checkify rule. Without one such a label is NaN, as ever.
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import checkify

        checkify.error_checks[_check_p] = functools.partial(_checkify_rule, checkify)
