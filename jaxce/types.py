"""The types of public arguments, for editors and type checkers; and variables of frameworks, taken as their arrays."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar, cast, get_args, get_origin, get_type_hints

import jax
from jax import Array

from jaxce import checks

Reduction = Literal["none", "sum", "mean", "mean_count"]
Implementation = Literal["xla", "autodiff"]
LinearImplementation = Literal["xla", "autodiff", "pallas_tpu"]
DivergenceName = Literal["forward_kl", "reverse_kl", "jsd"]
Mode = Literal["recompute", "store"]
Platform = Literal["cpu", "tpu", "gpu"]
Axis = int | tuple[int, ...] | None
AxisName = str | tuple[str, ...] | None


class Variable(Protocol):
    """What holds an array, as a Flax NNX `Param` or a Keras variable does."""

    def __jax_array__(self) -> Array: ...


ArrayLike = jax.typing.ArrayLike | Variable
Shape = ArrayLike | jax.ShapeDtypeStruct
Array_ = TypeVar("Array_")  # ArrayLike, or Shape where nothing is computed


class CommonOptions(TypedDict, Generic[Array_], total=False):
    """What the losses of logits and of hidden states take by keyword, but for `return_aux`, which makes the result."""

    weights: Array_ | None
    class_weights: Array_ | None
    label_smoothing: Array_
    ignore_index: int | None
    z_loss: Array_
    logit_softcap: float | None
    temperature: Array_
    reduction: Reduction
    axis_name: AxisName
    batch_axis_name: AxisName


Function = TypeVar("Function", bound=Callable[..., Any])


def takes_variables(function: Function) -> Function:
    """The function, with the array of every variable among its arguments in its place: gradients flow to it.

    A keyword that it does not have is an error that says which it may have meant.
    """

    @functools.cache
    def keywords() -> set[str]:  # found at the first call: an import should not wait for it
        parameters = inspect.signature(function).parameters
        known = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        if len(known) < len(parameters):
            known |= get_origin(get_args(get_type_hints(function)["options"])[0]).__annotations__.keys()
        return known

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not keywords().issuperset(kwargs):
            checks.keywords(function.__name__, kwargs, keywords(), CommonOptions.__annotations__)
        return function(*map(array_of, args), **{name: array_of(x) for name, x in kwargs.items()})

    return cast(Function, wrapped)


def array_of(x: Any) -> Any:
    """The array of a variable; anything else as it is."""
    return x.__jax_array__() if hasattr(x, "__jax_array__") and not isinstance(x, jax.Array) else x
