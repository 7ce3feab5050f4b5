"""Labels outside the classes and logits in place of targets are errors under checkify, and cost nothing elsewhere.

`checkify.debug_check` would say the same, but it marks the compiled function as having a side effect, which takes it
off JAX's fast dispatch path: about 0.1 ms a call, checkify or not. So the check is a primitive of its own, an identity
without effects, that checkify is told how to read.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, cast

import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from jaxce.checks import LIKE_LOGITS, like_logits
from jaxce.primitives import Primitive
from jaxce.selection import select

MESSAGE = (
    " {label} is not one of the {num_classes} classes, 0 to num_classes-1. "
    "If it marks examples to leave out, pass ignore_index={label}."
)

_check_p, _targets_p = Primitive("check_labels"), Primitive("check_targets")


def check_labels(known: Array, labels: Array, num_classes: int, what: str) -> Array:
    """`known`, which says of each label whether it is a class (or does not matter). `what`: argument and kind."""
    _register_rules()
    checked: Array = _check_p.bind(known, labels, num_classes=num_classes, what=what)
    return checked


def check_targets(loss: Array, probs: Array, axes: tuple[int, ...]) -> Array:
    """The loss, with probability targets that are looked at under checkify alone.

    It is the loss that passes through: of the targets, a rule that keeps them would keep what came out of here, beside
    what went in.
    """
    _register_rules()
    checked: Array = _targets_p.bind(loss, probs, axes=axes)
    return checked


def _identity(x: Array, *_: Array, **__: Any) -> Array:
    return x


for _p in _check_p, _targets_p:
    _p.def_impl(_identity)
    _p.def_abstract_eval(_identity)
    mlir.register_lowering(_p, mlir.lower_fun(_identity, multiple_results=False))
batching.defbroadcasting(_check_p)


def _with_tangents(primals: Any, tangents: Any, **params: Any) -> tuple[Array, Any]:
    return check_targets(*primals, **params), tangents[0]


def _batched(args: tuple[Array, Array], dims: tuple[Any, Any], *, axes: tuple[int, ...]) -> tuple[Array, Any]:
    of_loss, of_probs = dims
    if of_probs is not None:
        axes = tuple(a + (a >= of_probs) for a in axes)
    return check_targets(*args, axes), of_loss


ad.primitive_jvps[_targets_p] = _with_tangents
batching.primitive_batchers[_targets_p] = _batched


def _checkify_targets(internals: Any, *args: Any, axes: tuple[int, ...]) -> tuple[Any, Array]:
    *context, error, enabled_errors, loss, probs = args
    if internals.FailedCheckError in enabled_errors and probs.size:
        message = "targets: expected probabilities >= 0; got entries from {least} to {largest}. " + LIKE_LOGITS
        ends = {"least": jnp.min(probs), "largest": jnp.max(probs)}
        failure = internals.FailedCheckError(internals.get_traceback(), message, **ends)
        wrong = like_logits(probs.astype(jnp.float32), axes, jnp, probs.dtype)
        error = internals.assert_func(*context, error, jnp.any(wrong), failure)
    return error, loss


def _checkify_rule(internals: Any, *args: Any, num_classes: int, what: str) -> tuple[Any, Array]:
    *context, error, enabled_errors, known, labels = args  # JAX 0.12 hands on a context first
    if internals.FailedCheckError in enabled_errors and known.size:
        label = jnp.max(select(known, jnp.iinfo(labels.dtype).min, labels))  # one of those that are none
        failure = internals.FailedCheckError(
            internals.get_traceback(), what + MESSAGE, label=label, num_classes=jnp.asarray(num_classes)
        )
        error = internals.assert_func(*context, error, ~jnp.all(known), failure)
    return error, known


@functools.cache
def _register_rules() -> None:
    from jax.experimental import jet

    jet.jet_rules[_check_p] = functools.partial(jet.zero_prop, _check_p)
    jet.jet_rules[_targets_p] = cast(Any, _with_tangents)
    # There is no public way to give a primitive a checkify rule. Without one such a label is NaN, as ever.
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import checkify

        checkify.error_checks[_check_p] = functools.partial(_checkify_rule, checkify)
        checkify.error_checks[_targets_p] = functools.partial(_checkify_targets, checkify)
