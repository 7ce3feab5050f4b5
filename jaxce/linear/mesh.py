"""The linear loss over devices: what differs along which axes of a mesh.

Arrays that carry their sharding in their type (a mesh with Explicit axes) have the same loss inside a `shard_map`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxce import checks
from jaxce.arguments import Examples, Options, Projection, Shared
from jaxce.sharding import place_together, spec_of, vary, varying
from jaxce.targets import Ids, SparseTargets, class_indices

Result = TypeVar("Result")  # an array, or one and an aux record


def row_axes(options: Options, projection: Projection, examples: Examples, shared: Shared) -> frozenset[str]:
    """The mesh axes along which the numbers of a row differ, once they are merged over those of the classes."""
    return varying(projection, examples, shared) - set(options.axis_name)


def vary_by_kind(
    options: Options, projection: Projection, examples: Examples, shared: Shared
) -> tuple[Projection, Examples, Shared]:
    """What has a class axis differs along every mesh axis in play, and the rest along those of the rows."""
    rows = row_axes(options, projection, examples, shared)
    classes = rows | set(options.axis_name)
    of_rows, of_classes = (functools.partial(vary, axes=axes) for axes in (rows, classes))
    hidden, kernel, bias = projection
    class_weights, *numbers = shared
    return (
        Projection(of_rows(hidden), of_classes(kernel), of_classes(bias)),
        examples.by_kind(row=of_rows, entries=of_rows, classes=of_classes),
        Shared(of_classes(class_weights), *of_rows(numbers)),
    )


def no_axis_names(arguments: dict[str, Any]) -> None:
    for name in "axis_name", "batch_axis_name":
        if (x := arguments.get(name)) is not None:
            hint = "Types say how hidden states and kernel are split; or name every axis in a shard_map."
            checks.fail(ValueError, name, "None on a mesh with Explicit axes", repr(x), hint)


def over_mesh(loss: Callable[..., Result], mesh: Any, arguments: dict[str, Any]) -> Result:
    """`loss(**arguments)`, with the tokens split as `hidden` is and the classes as `kernel` is.

    What belongs to tokens or classes is brought to the same sharding; these are small beside the two.
    """
    explicit = {n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit}
    if AxisType.Manual in mesh.axis_types:  # JAX cannot compile the derivative of one shard_map inside another
        left = ", ".join(map(repr, sorted(explicit)))
        hint = "Name those in its axis_names too."
        checks.fail(ValueError, "hidden", "a shard_map over all axes of the mesh, or none", f"{left} left out", hint)
    hidden, kernel = jnp.asarray(arguments["hidden"]), jnp.asarray(arguments["kernel"])
    vocab_axis = arguments["vocab_axis"] % 2
    *tokens, hidden_features = spec_of(hidden)
    classes, kernel_features = (spec_of(kernel)[i] for i in (vocab_axis, 1 - vocab_axis))
    for name, x, features in ("hidden", hidden, hidden_features), ("kernel", kernel, kernel_features):
        if features is not None:
            hint = "Gather them first, with jax.sharding.reshard; only tokens and classes may be split."
            checks.fail(ValueError, name, "features that are not split over devices", str(spec_of(x)), hint)
    token_axes, class_axes = _names(tokens), _names([classes])
    if shared := set(token_axes) & set(class_axes):
        hint = "Use another mesh axis for one of them, or gather one with jax.sharding.reshard."
        expected = f"classes that are not split over the axes of the tokens, {token_axes}"
        checks.fail(ValueError, "kernel", expected, ", ".join(map(repr, sorted(shared))), hint)

    *batch, _ = hidden.shape
    full = (*batch, kernel.shape[vocab_axis])
    if arguments["where"] is not None:
        arguments["where"] = checks.where_mask(arguments["where"], full, tuple(batch), (len(batch),))

    def labels(name: str, x: Any) -> Array:
        # Before anything else: a JAX array would wrap those that are too large for it.
        indices, arguments["ignore_index"] = class_indices(name, x, arguments["ignore_index"])
        return indices

    def targets_and_spec(x: Any) -> tuple[Any, tuple[Any, ...]]:
        if isinstance(x, Ids):
            ids = labels("ids", x.ids)
            return Ids(ids), (*tokens, None)[: ids.ndim]
        if isinstance(x, SparseTargets):
            return x._replace(indices=labels("targets.indices", x.indices)), (*tokens, None)
        return (labels("targets", x), tuple(tokens)) if checks.is_integers(x) else (x, (*tokens, classes))

    arrays, specs = {"hidden": hidden, "kernel": kernel}, {"hidden": spec_of(hidden), "kernel": spec_of(kernel)}
    if "targets" in arguments:
        arrays["targets"], specs["targets"] = targets_and_spec(arguments["targets"])
    for name, spec in {
        "where": (*tokens, classes),
        "weights": tuple(tokens),
        "temperature": tuple(tokens) if jnp.ndim(arguments["temperature"]) else (),
        "bias": (classes,),
        "teacher_hidden": (*tokens, None),
        "teacher_kernel": (None, classes) if arguments.get("teacher_vocab_axis", 1) % 2 else (classes, None),
        "teacher_bias": (classes,),
        "class_weights": (classes,),
        "label_smoothing": (),
        "z_loss": (),
    }.items():
        given = arguments.get(name)
        if isinstance(given, jax.Array) or (spec and given is not None):
            arrays[name], specs[name] = given, spec
    arrays = place_together(mesh, {n: (jax.tree.map(jnp.asarray, x), specs[n]) for n, x in arrays.items()})
    constants = {name: x for name, x in arguments.items() if name not in arrays}
    constants["axis_name"] = class_axes or None
    if arguments["reduction"] != "none":
        constants["batch_axis_name"] = token_axes or None
    out_specs: Any = P(*tokens) if arguments["reduction"] == "none" else P()
    if arguments.get("return_aux"):
        out_specs = (out_specs, P(*tokens))
    mapped: Callable[..., Result] = jax.shard_map(
        lambda arrays: loss(**arrays, **constants),
        mesh=mesh,
        axis_names=explicit,
        in_specs=(jax.tree.map(spec_of, arrays),),
        out_specs=out_specs,
    )
    return mapped(arrays)


def _names(entries: Sequence[Any]) -> tuple[str, ...]:
    """The mesh axes that any of the axes is split over."""
    return tuple(n for entry in entries if entry is not None for n in (entry if isinstance(entry, tuple) else (entry,)))
