"""Argument checks, made while tracing, and every message they give: name, what was expected, what came, what to do."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxce.versions import varying_axes


def fail(kind: type[Exception], name: str, expected: str, got: str, hint: str = "") -> NoReturn:
    raise kind(f"{name}: expected {expected}; got {got}." + (f" {hint}" if hint else ""))


def describe(x: Any) -> str:
    if isinstance(x, np.ma.MaskedArray):
        return f"a masked array, {x.dtype} of shape {x.shape}"
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return f"{x.dtype} of shape {x.shape}"
    if isinstance(x, (int, float, complex)):
        return f"{x!r}, {jnp.result_type(x)} of shape ()"
    return f"{x!r} ({type(x).__name__})" if isinstance(x, str) else type(x).__name__


# What other libraries call it, and what it is here: arguments and words, or a sentence.
_ELSEWHERE = {
    "dim": "axis", "input": "logits", "labels": "targets", "target": "targets", "y_pred": "logits", "y_true": "targets",
    "class_weight": "class_weights", "weight": "class_weights", "mask": "weights", "sample_weight": "weights",
    "example_weights": "weights", "loss_mask": "weights", "loss_weights": "weights", "padding_mask": "weights",
    "ignore_class": "ignore_index", "ignore_idx": "ignore_index", "ignore_label": "ignore_index",
    "label_smoothing_factor": "label_smoothing", "softcap": "logit_softcap",
    "lse_square_scale": "z_loss", "z_loss_weight": "z_loss",
    "reduce": "reduction", "size_average": "reduction", "average": "mean", "avg": "mean", "batchmean": "mean_count",
    "mean_with_sample_weight": "mean", "sum_over_batch_size": "mean_count",
    "from_logits": "Logits are always expected; probabilities go to jaxce.cross_entropy_from_probs.",
}  # fmt: skip


def _nearest(word: str, choices: Collection[str]) -> str:
    """Which of the choices is meant by a word of another library, or one that is misspelt; "" if none is."""
    import difflib

    if (ours := _ELSEWHERE.get(word, word)) in choices:
        return ours
    return next(iter(difflib.get_close_matches(word.lower(), choices, 1)), "")


def keywords(function: str, given: Iterable[str], known: Collection[str], of_loss: Collection[str]) -> None:
    """`known` are the arguments of the function, `of_loss` the options of the losses that have them all."""
    for name in given:
        if name in known:
            continue
        ours = _ELSEWHERE.get(name, name)
        if ours == "class_weights" and ours not in known and "weights" in known:
            ours = "weights"
        if name == "from_logits" and "probs" in known:
            hint = "Probabilities are always expected; logits go to jaxce.softmax_cross_entropy."
        elif " " in ours:
            hint = ours
        elif ours in known:
            hint = f"Its name here is {ours}."
        elif ours == "axis" and "kernel" in known:
            hint = "Features are on the last axis of hidden; vocab_axis says which axis of the kernel is the classes."
        elif ours == "weights" and "ids" in known:
            hint = "A mask of the examples that count is where=; log-probabilities have no weights."
        elif ours == "ignore_index" and "weights" in known:
            hint = "Give those examples weight 0: weights=labels != ignore_index."
        elif ours in of_loss:
            of_labels = "linear_cross_entropy" if "kernel" in known else "softmax_cross_entropy"
            hint = f"Use jaxce.{of_labels}, which has {ours}."
        elif nearest := _nearest(name, known):
            hint = f"Did you mean {nearest}?"
        else:
            hint = f"There are {', '.join(sorted(known))}."
        fail(TypeError, name, f"an argument of {function}", "an unexpected keyword", hint)


# Floats of eight bits are taken as arguments: whatever is computed with them is computed in a wider dtype.
_EIGHT_BITS = ("e3m4", "e4m3", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
FLOATS = tuple(map(jnp.dtype, ("float16", "bfloat16", "float32", "float64", *(f"float8_{x}" for x in _EIGHT_BITS))))


def as_array(x: Any) -> jax.Array:
    """`x` as an array of a dtype that JAX uses now. No JAX array is made: `jax_debug_nans` would look at it.

    Nothing is done with a NumPy array that a JAX array would not do as well, so it passes for one.
    """
    if isinstance(x, jax.Array):
        return x
    with np.errstate(over="ignore"):  # JAX, too, makes inf of a float64 that is too large
        return cast(jax.Array, np.asarray(x, jnp.result_type(x)))


def real_array(x: Any) -> jax.Array:
    """`as_array` of real numbers; NumPy's and Python's integers as floats: JAX may have no integers for them now."""
    if not isinstance(x, jax.Array) and is_integers(x):
        return cast(jax.Array, np.asarray(x, jnp.result_type(float)))
    return as_array(x)


def is_array(x: Any) -> bool:
    """Whether `x` is an array of numbers or bools that JAX has a dtype for, or a Python number it takes for one."""
    if isinstance(x, np.ma.MaskedArray):  # whose mask a JAX array would drop
        return False
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        if isinstance(x.dtype, np.dtype) and (not x.dtype.isnative or x.dtype in (np.longdouble, np.clongdouble)):
            return False
        return jnp.issubdtype(x.dtype, np.number) or x.dtype == np.bool_
    return isinstance(x, (int, float, complex))


def is_real(x: Any) -> bool:
    if not is_array(x):
        return False
    dtype = jnp.result_type(x)
    return dtype in FLOATS or not jnp.issubdtype(dtype, jnp.inexact)


def is_integers(x: Any) -> bool:
    return is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.integer)


def float_array(name: str, x: Any, targets: Any = None, targets_name: str = "targets") -> jax.Array:
    """`x` as a JAX array of floats with at least one axis. `targets`: with which it may have been swapped."""
    if not is_array(x) or jnp.result_type(x) not in FLOATS:
        hint = _swapped(name, x, targets, targets_name) or convert(name, x)
        fail(TypeError, name, "an array of floats, of 8 to 64 bits", describe(x), hint)
    array = as_array(x)
    if array.ndim == 0:
        fail(ValueError, name, "at least one axis, the classes", describe(array))
    if getattr(array, "weak_type", False) and array.dtype != jnp.result_type(float):
        # As of jnp.full(shape, 0.5), made before x64 was turned on: beside a Python number it would become float64.
        array = jax.lax.convert_element_type(array, array.dtype)
    return array


def convert(name: str, x: Any, dtype: str = "jnp.float32") -> str:
    """What to do about an array of the wrong dtype, or something that is no array."""
    if isinstance(x, np.ma.MaskedArray):
        return f"Fill it, {name}.filled(0), and give what is masked weight 0."
    if isinstance(x, (list, tuple)) or (isinstance(x, np.ndarray) and x.dtype == object):
        try:
            np.array(x.tolist() if isinstance(x, np.ndarray) else x)
        except ValueError:
            return "Its rows differ in length: pad them, and give what was added weight 0, or a label to ignore."
        except TypeError:  # a list of traced numbers
            pass
    if isinstance(x, dict):
        order = f"Put it in the order of the classes: jnp.asarray([{name}[c] for c in range(V)])."
        return order if name == "class_weights" else ""
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return f"Convert it with {name}.astype({dtype})."
    return f"Convert it with jnp.asarray({name})." if _may_be_array(x) else ""


def _may_be_array(x: Any) -> bool:
    """Whether `jnp.asarray` is likely to take it: a list, a number, another library's array or a column of a table."""
    plain = isinstance(x, (list, tuple, int, float)) and not hasattr(x, "_fields")
    return plain or hasattr(x, "__array__")


def _swapped(name: str, x: Any, targets: Any, targets_name: str) -> str:
    """What to say of `x` if targets may have come in its place, and the other way about."""
    if not is_real(x) or not is_array(targets) or jnp.result_type(targets) not in FLOATS:
        return ""
    order = f"the order is {name}, {targets_name}."
    fewer = jnp.ndim(x) < jnp.ndim(targets)
    return f"They look swapped: {order}" if fewer else f"{convert(name, x)} Or swap them: {order}"


def not_labels(name: str, x: Any, ndim: int, hint: str = "") -> NoReturn:
    """`ndim`: of the logits; `hint`: about probabilities, of which there are as many as logits."""
    if (_may_be_array(x) and not is_array(x)) or (is_real(x) and jnp.ndim(x) < ndim):
        hint = convert(name, x, "int")
    fail(TypeError, name, "an array of integers, class indices", describe(x), hint)


def class_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """`axis` (an int, a tuple of ints, or None for all) as non-negative ints, in the order given."""
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, tuple) else (axis,)
    if not given or not all(isinstance(a, (int, np.integer)) and not isinstance(a, bool) for a in given):
        fail(TypeError, "axis", "an int or a tuple of ints", repr(axis))
    if not all(-ndim <= a < ndim for a in given):
        fail(ValueError, "axis", f"numbers from {-ndim} to {ndim - 1} for logits with {ndim} axes", repr(axis))
    axes = tuple(int(a) % ndim for a in given)
    if len(set(axes)) != len(axes):
        fail(ValueError, "axis", "axes that differ", repr(axis))
    return axes


def batch_shape(full: Sequence[int], class_axes: Sequence[int]) -> tuple[int, ...]:
    """The shape of logits without their class axes."""
    return tuple(n for i, n in enumerate(full) if i not in class_axes)


def num_classes(name: str, size: int) -> None:
    if size == 0:
        fail(ValueError, name, "at least one class", "a class axis of length 0")


def indices(
    name: str, x: jax.Array, batch: tuple[int, ...], full: tuple[int, ...], sparse: bool = False, one_hot: str = ""
) -> None:
    """`one_hot`: what to do with labels that are one-hot."""
    shape = (*batch, x.shape[-1]) if sparse and x.ndim else batch
    if x.shape == shape and not (sparse and x.shape[-1:] == (0,)):
        return
    hint = ""
    if sparse and x.shape == batch:
        hint = f"For one class per example, give them a last axis: {name}[..., None]."
    elif x.shape == full and not sparse:
        hint = one_hot
    elif math.prod(x.shape) == math.prod(batch):
        hint = f"Labels are never broadcast; reshape them: {name}.reshape({batch})."
    what = (
        f"the batch shape {batch} and one more axis, the K >= 1 entries"
        if sparse
        else (f"shape {batch}, the shape of logits without the class axis")
    )
    fail(ValueError, name, what, describe(x), hint)


def ids(name: str, x: jax.Array, batch: tuple[int, ...]) -> None:
    if x.shape[: len(batch)] != batch or x.ndim > len(batch) + 1 or x.shape[len(batch) :] == (0,):
        expected = f"the batch shape {batch}, or that and one more axis, the K >= 1 ids of each"
        fail(ValueError, name, expected, describe(x), "Ids are never broadcast.")


def probabilities(name: str, x: Any, shape: tuple[int, ...], class_axes: Sequence[int] = ()) -> None:
    """`class_axes`: which they are, if there could have been labels in place of probabilities."""
    if (given := jnp.shape(x)) == shape:
        return
    batch = batch_shape(shape, class_axes)
    padded = (1,) * (len(shape) - len(given)) + given
    hint = ""
    if class_axes and broadcastable(given, shape) and all(padded[a] == shape[a] for a in class_axes):
        hint = f": jnp.broadcast_to({name}, {shape})"
    elif class_axes:
        hint = "; class indices must have an integer dtype"
        if math.prod(given) == math.prod(batch):
            hint += f": {name}.astype(int)" + (f".reshape({batch})" if given != batch else "")
    fail(ValueError, name, f"shape {shape}", describe(x), f"Probabilities are never broadcast{hint}.")


_LOOKED_AT = 2**16  # entries, of which a look takes microseconds


def no_logits(name: str, x: jax.Array, axes: tuple[int, ...]) -> None:
    """Probability targets outside of a trace are looked at where that is cheap: on the CPU, if they are not many."""
    if not 0 < x.size <= _LOOKED_AT:
        return
    if isinstance(x, jax.Array) and not (x.is_fully_addressable and {d.platform for d in x.devices()} == {"cpu"}):
        return
    t = np.asarray(x).astype(np.float32, copy=False)  # NumPy is slow at comparing bfloat16
    with np.errstate(all="ignore"):
        if np.min(t) < 0 and np.any(like_logits(t, axes, np, x.dtype)):
            got = f"{describe(x)} with entries from {float(np.min(t)):.4g} to {float(np.max(t)):.4g}"
            fail(ValueError, name, "probabilities >= 0", got, LIKE_LOGITS)


LIKE_LOGITS = (
    "They look like logits or log-probabilities: give probabilities, jax.nn.softmax of them. "
    "The order is logits, targets; weights of either sign go into weights."
)


def like_logits(t: Any, axes: tuple[int, ...], xp: Any, dtype: Any) -> Any:
    """Which rows of targets, once of this dtype, must be logits or log-probabilities. `xp`: NumPy or `jax.numpy`.

    Less than 0 alone does not say so: a weight below 0 may have been multiplied in (all entries have one sign, but for
    rounding), smoothing may be negative (the sum is 1), and the difference of two targets sums to 0.
    """
    rounding = 4 * float(jnp.finfo(dtype).eps)
    total, size = xp.sum(t, axes), xp.sum(xp.abs(t), axes)
    near = functools.reduce(xp.logical_or, (xp.abs(total - x) <= (0.01 + rounding) * size for x in (0, 1, size, -size)))
    logarithms = xp.all(t < 0, axes) & (xp.abs(xp.sum(xp.exp(t), axes) - 1) <= 1e-3 + rounding)
    return (xp.isfinite(total) & ~near) | logarithms | xp.any(t == -math.inf, axes)


def where_mask(mask: Any, full: tuple[int, ...], batch: tuple[int, ...], axes: Sequence[int]) -> jax.Array:
    """`where`, with as many axes as the logits. A mask of the batch shape (optax) takes whole examples out."""
    if not is_array(mask) or jnp.result_type(mask) != jnp.bool_:
        fail(TypeError, "where", "an array of bools", describe(mask), convert("where", mask, "bool"))
    mask = as_array(mask)
    readings: list[jax.Array] = []
    if broadcastable(mask.shape, full):
        readings.append(mask.reshape((1,) * (len(full) - mask.ndim) + mask.shape))
    if mask.shape == batch and mask.ndim < len(full):
        readings.append(jnp.expand_dims(mask, tuple(axes)))
    if not readings:
        expected = f"a shape that broadcasts to that of logits, {full}, or the batch shape {batch}"
        fail(ValueError, "where", expected, describe(mask))
    if len({reading.shape for reading in readings}) > 1:
        hint = "Give it as many axes as logits: where[None, :] for classes, where[:, None] for examples."
        fail(ValueError, "where", "a mask that can be read in one way", f"{describe(mask)} beside logits {full}", hint)
    return readings[0]


def example_weights(x: Any, batch: tuple[int, ...]) -> jax.Array:
    return _by_example("weights", x, batch, "one weight per example", "Weights per class go into class_weights.")


def temperature(x: Any, batch: tuple[int, ...]) -> jax.Array:
    array = _by_example("temperature", x, batch, "one number, or one per example", "")
    if not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True):
        values = np.asarray(array)
        wrong = values[~((values > 0) & np.isfinite(values))]
        if wrong.size:
            got = f"{wrong[0]} in {describe(array)}" if array.ndim else str(array)
            fail(ValueError, "temperature", "finite numbers > 0", got)
    return array


def _by_example(name: str, x: Any, batch: tuple[int, ...], what: str, hint: str) -> jax.Array:
    if not is_real(x):
        fail(TypeError, name, "an array of real numbers", describe(x), convert(name, x))
    if not broadcastable(jnp.shape(x), batch):
        fail(ValueError, name, f"a shape that broadcasts to the batch shape {batch}, {what}", describe(x), hint)
    return real_array(x)


def class_weights(x: Any, size: int) -> jax.Array:
    if not is_real(x):
        fail(
            TypeError,
            "class_weights",
            "an array of real numbers",
            describe(x),
            convert("class_weights", x),
        )
    if jnp.shape(x) != (size,):
        fail(
            ValueError,
            "class_weights",
            f"shape ({size},), one weight per class",
            describe(x),
            "Weights per example go into weights.",
        )
    return real_array(x)


def kernel(x: jax.Array, size: int, vocab_axis: int, prefix: str = "") -> None:
    expected = ("V", size) if vocab_axis == 0 else (size, "V")
    shape = (
        f"shape [{expected[0]}, {expected[1]}] for hidden states of {size} features and {prefix}vocab_axis={vocab_axis}"
    )
    if x.ndim != 2:
        fail(ValueError, f"{prefix}kernel", shape, describe(x))
    if x.shape[1 - vocab_axis] != size:
        hint = f"If its classes are on the other axis, pass {prefix}vocab_axis={1 - vocab_axis}."
        fail(ValueError, f"{prefix}kernel", shape, describe(x), hint if x.shape[vocab_axis] == size else "")


def bias(x: Any, size: int, name: str = "bias") -> jax.Array:
    array = float_array(name, x)
    if array.shape != (size,):
        fail(ValueError, name, f"shape ({size},), one number per class", describe(array))
    return array


def scalar(name: str, x: Any, low: float, high: float) -> None:
    """A number or a scalar array; Python and NumPy numbers must lie in [low, high]."""
    if not is_real(x) or jnp.result_type(x) == jnp.bool_:
        fail(TypeError, name, "a real number", describe(x))
    if jnp.shape(x) != ():
        fail(ValueError, name, "one number", describe(x))
    if not isinstance(x, jax.Array) and not (low <= float(x) <= high and math.isfinite(x)):
        bounds = f"between {low:g} and {high:g}" if math.isfinite(high) else f">= {low:g}"
        fail(ValueError, name, f"a number {bounds}", repr(x))


def softcap(name: str, x: Any) -> None:
    if not _is_number(x):
        fail(TypeError, name, "None or a Python number", describe(x), "It is a constant of the compiled program.")
    if not 0 < float(x) < math.inf:
        fail(ValueError, name, "a finite number > 0", repr(x), "None means no cap.")


def beta(x: Any, divergence: str) -> None:
    if not _is_number(x):
        fail(TypeError, "beta", "a Python number", describe(x), "It is a constant of the compiled program.")
    if not 0 <= float(x) <= 1:
        fail(ValueError, "beta", "a number between 0 and 1", repr(x))
    if divergence != "jsd" and x != 0.5:
        fail(ValueError, "beta", "none but for divergence='jsd'", f"{x!r} with divergence={divergence!r}")


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def ignore_index(x: Any, *dtypes: jnp.dtype) -> None:
    """`dtypes`: of the labels as they came, and as they are used."""
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        fail(TypeError, "ignore_index", "None or a Python int", describe(x))
    if not any(jnp.iinfo(dtype).min <= x <= jnp.iinfo(dtype).max for dtype in dtypes):
        fail(ValueError, "ignore_index", f"a number that a label can be ({dtypes[0]})", repr(x))


def mesh_axes(axis_name: Any, batch_axis_name: Any, reduction: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that split the classes and the examples, both as tuples of names, which are empty for None."""
    class_axes, batch_axes = _axis_names("axis_name", axis_name), _axis_names("batch_axis_name", batch_axis_name)
    if shared := set(class_axes) & set(batch_axes):
        expected = f"axes that do not split the classes as well, {class_axes}"
        fail(ValueError, "batch_axis_name", expected, ", ".join(map(repr, sorted(shared))))
    if batch_axes and reduction == "none":
        hint = "It says which devices' examples are added up: give a reduction, or leave it out."
        fail(ValueError, "batch_axis_name", "None for reduction='none'", repr(batch_axis_name), hint)
    return class_axes, batch_axes


def _axis_names(name: str, x: Any) -> tuple[str, ...]:
    names = () if x is None else x if isinstance(x, tuple) else (x,)
    if not all(isinstance(n, str) for n in names):
        fail(TypeError, name, "None, the name of a mesh axis or a tuple of names", repr(x))
    if len(set(names)) != len(names):
        fail(ValueError, name, "axes that differ", repr(x))
    try:
        varies = varying_axes(jax.typeof(jax.lax.axis_index(names))) if names else frozenset()
    except NameError:
        fail(ValueError, name, "axes of the mesh of a surrounding jax.shard_map", repr(x), "Call the loss inside one.")
    if not set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        hint = "Under jax.vmap all is on one device: nothing is split, and no name is needed."
        fail(ValueError, name, "axes of the mesh of a surrounding jax.shard_map", f"{x!r}, an axis of jax.vmap", hint)
    if varies != set(names):
        hint = "Without its types, gradients of what devices share could not be told from those of what they split."
        got = "one that does not check, or jax.pmap"
        fail(ValueError, name, "a jax.shard_map with check_vma=True, its default", got, hint)
    return names


def split_over(name: str, x: jax.Array, axis_name: tuple[str, ...], what: str) -> None:
    """Whether devices along the mesh axes hold different shares of `x`, as far as its type can tell."""
    if missing := set(axis_name) - varying_axes(jax.typeof(x)):
        hint = "Name the axis in in_specs, or do not pass it here: every device would count the same numbers again."
        names = ", ".join(map(repr, sorted(missing)))
        fail(
            ValueError, name, f"this device's share of the {what}", f"the same array on all devices along {names}", hint
        )


def one_of(name: str, x: Any, choices: Sequence[Any]) -> None:
    if not any(x is c or (isinstance(x, (str, np.integer)) and x == c) for c in choices):
        words = [c for c in choices if isinstance(c, str)]
        nearest = _nearest("none" if x is None else x, words) if x is None or isinstance(x, str) else ""
        hint = f"Did you mean {nearest!r}?" if nearest else ""
        fail(ValueError, name, "one of " + ", ".join(map(repr, choices)), repr(x), hint)


def count(name: str, x: Any, least: int) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)) or x < least:
        fail(ValueError, name, f"a Python int >= {least}", repr(x))


def broadcastable(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether `shape` broadcasts to exactly `to`."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
