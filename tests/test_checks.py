"""Every wrong argument gives an error for the person who made it: "name: expected X; got Y. hint"."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import SparseTargets, checks, diagnostics

pytestmark = pytest.mark.every_case

LOGITS = np.zeros((2, 3), np.float32)
LABELS = np.array([0, 1], np.int32)
PROBS = np.full((2, 3), 1 / 3, np.float32)


def loss(logits: Any = LOGITS, targets: Any = LABELS, axis: Any = -1, where: Any = None, **options: Any) -> Any:
    return jaxce.softmax_cross_entropy(logits, targets, axis, where, **options)


class Wrong(NamedTuple):
    """A call, and what each part of its message must say (regular expressions)."""

    call: Callable[[], Any]
    kind: type[Exception]
    name: str
    expected: str
    got: str
    hint: str = ""


def keys(*shape: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), shape)


LOGITS_CASES = {
    "list": Wrong(lambda: loss([[0.0, 1.0, 2.0]] * 2), TypeError, "logits", "array of floats", "list", "jnp.asarray"),
    "none": Wrong(lambda: loss(None), TypeError, "logits", "array of floats", "NoneType"),
    "dict": Wrong(lambda: loss({"logits": LOGITS}), TypeError, "logits", "array of floats", "dict", "^$"),
    "string": Wrong(lambda: loss("x"), TypeError, "logits", "array of floats", "str"),
    "string array": Wrong(lambda: loss(np.full((2, 3), "a")), TypeError, "logits", "array of floats", "<U1"),
    "object array": Wrong(lambda: loss(LOGITS.astype(object)), TypeError, "logits", "array of floats", "object"),
    "ints": Wrong(
        lambda: loss(LOGITS.astype(np.int32)), TypeError, "logits", "floats", r"int32 of shape \(2, 3\)", "astype"
    ),
    "complex": Wrong(lambda: loss(LOGITS.astype(np.complex64)), TypeError, "logits", "floats", "complex64"),
    "bools": Wrong(lambda: loss(LOGITS.astype(bool)), TypeError, "logits", "floats", "bool"),
    "keys": Wrong(lambda: loss(keys(2, 3)), TypeError, "logits", "floats", "key<fry>"),
    "scalar": Wrong(lambda: loss(jnp.float32(1), np.array(0)), ValueError, "logits", "one axis", r"shape \(\)"),
    "Python scalar": Wrong(lambda: loss(1.0, 0), ValueError, "logits", "one axis", r"shape \(\)"),
    "no classes": Wrong(lambda: loss(LOGITS[:, :0]), ValueError, "logits", "at least one class", "length 0"),
}

TARGETS_CASES = {
    "list": Wrong(lambda: loss(targets=[0, 1]), TypeError, "targets", "class indices", "list", "jnp.asarray"),
    "none": Wrong(lambda: loss(targets=None), TypeError, "targets", "class indices", "neither"),
    "string": Wrong(lambda: loss(targets="0"), TypeError, "targets", "class indices", "str"),
    "string array": Wrong(lambda: loss(targets=np.array(["a", "b"])), TypeError, "targets", "class indices", "<U1"),
    "tuple": Wrong(lambda: loss(targets=(LABELS, PROBS)), TypeError, "targets", "SparseTargets", "tuple"),
    "complex": Wrong(lambda: loss(targets=PROBS.astype(np.complex64)), TypeError, "targets", "integers", "complex64"),
    "keys": Wrong(lambda: loss(targets=keys(2)), TypeError, "targets", "integers", "key<fry>"),
    "one-hot bools": Wrong(
        lambda: loss(targets=np.eye(2, 3) > 0), TypeError, "targets", "integers", r"bool of shape \(2, 3\)", "one-hot"
    ),
    "one-hot integers": Wrong(
        lambda: loss(targets=np.eye(2, 3, dtype=np.int32)),
        ValueError,
        "targets",
        r"shape \(2,\)",
        r"int32 of shape \(2, 3\)",
        r"one-hot labels, make them floats: targets\.astype\(logits\.dtype\)",
    ),
    "labels [B, 1]": Wrong(
        lambda: loss(targets=LABELS[:, None]),
        ValueError,
        "targets",
        r"shape \(2,\)",
        r"shape \(2, 1\)",
        r"never broadcast.*targets\.reshape\(\(2,\)\)",
    ),
    "one label for all": Wrong(
        lambda: loss(targets=np.int32(0)), ValueError, "targets", r"shape \(2,\)", r"int32 of shape \(\)"
    ),
    "too many labels": Wrong(lambda: loss(targets=np.zeros(3, int)), ValueError, "targets", r"\(2,\)", r"\(3,\)"),
    "probabilities [1, V]": Wrong(
        lambda: loss(targets=PROBS[:1]),
        ValueError,
        "targets",
        r"shape \(2, 3\)",
        r"float32 of shape \(1, 3\)",
        "never broadcast",
    ),
    "probabilities [V]": Wrong(lambda: loss(targets=PROBS[0]), ValueError, "targets", r"\(2, 3\)", r"\(3,\)", "never"),
    "labels as floats": Wrong(
        lambda: loss(targets=LABELS.astype(np.float32)),
        ValueError,
        "targets",
        r"\(2, 3\)",
        r"\(2,\)",
        r"integer dtype: targets\.astype\(int\)\.$",
    ),
    "labels [B, 1] as floats": Wrong(  # to broadcast these would give a loss, a wrong one
        lambda: loss(targets=LABELS[:, None].astype(np.float32)),
        ValueError,
        "targets",
        r"\(2, 3\)",
        r"\(2, 1\)",
        r"integer dtype: targets\.astype\(int\)\.reshape\(\(2,\)\)\.$",
    ),
    "labels [B, 1] as floats, linear": Wrong(
        lambda: jaxce.linear_cross_entropy(LOGITS, np.ones((3, 4), np.float32), LABELS[:, None].astype(np.float32)),
        ValueError,
        "targets",
        r"\(2, 4\)",
        r"\(2, 1\)",
        r"integer dtype: targets\.astype\(int\)\.reshape\(\(2,\)\)\.$",
    ),
    "labels [1, B] as floats, classes first": Wrong(
        lambda: loss(targets=np.ones((1, 3), np.float32), axis=0),
        ValueError,
        "targets",
        r"\(2, 3\)",
        r"\(1, 3\)",
        r"integer dtype: targets\.astype\(int\)\.reshape\(\(3,\)\)\.$",
    ),
}

SPARSE_CASES = {
    "indices [B]": Wrong(
        lambda: loss(targets=SparseTargets(LABELS, np.ones(2, np.float32))),
        ValueError,
        "targets.indices",
        r"batch shape \(2,\) and one more axis",
        r"int32 of shape \(2,\)",
        r"targets\.indices\[\.\.\., None\]",
    ),
    "indices []": Wrong(
        lambda: loss(targets=SparseTargets(np.int32(0), np.float32(1))),
        ValueError,
        "targets.indices",
        "one more axis",
        r"shape \(\)",
    ),
    "indices [1, K]": Wrong(
        lambda: loss(targets=SparseTargets(LABELS[None], np.ones((1, 2), np.float32))),
        ValueError,
        "targets.indices",
        "one more axis",
        r"shape \(1, 2\)",
    ),
    "K = 0": Wrong(
        lambda: loss(targets=SparseTargets(np.zeros((2, 0), int), np.zeros((2, 0), np.float32))),
        ValueError,
        "targets.indices",
        "K >= 1",
        r"shape \(2, 0\)",
    ),
    "float indices": Wrong(
        lambda: loss(targets=SparseTargets(PROBS[:, :1], PROBS[:, :1])),
        TypeError,
        "targets.indices",
        "integers",
        "float32",
    ),
    "list of indices": Wrong(
        lambda: loss(targets=SparseTargets([[0], [1]], PROBS[:, :1])), TypeError, "targets.indices", "integers", "list"
    ),
    "probs [B]": Wrong(
        lambda: loss(targets=SparseTargets(LABELS[:, None], PROBS[:, 0])),
        ValueError,
        "targets.probs",
        r"shape \(2, 1\)",
        r"shape \(2,\)",
        r"never broadcast\.$",
    ),
    "probs of another K": Wrong(
        lambda: loss(targets=SparseTargets(LABELS[:, None], PROBS)),
        ValueError,
        "targets.probs",
        r"shape \(2, 1\)",
        r"shape \(2, 3\)",
    ),
    "integer probs": Wrong(
        lambda: loss(targets=SparseTargets(LABELS[:, None], LABELS[:, None])),
        TypeError,
        "targets.probs",
        "floats",
        "int32",
    ),
    "no probs": Wrong(
        lambda: loss(targets=SparseTargets(LABELS[:, None], None)), TypeError, "targets.probs", "floats", "NoneType"
    ),
}

AXIS_CASES = {
    "too large": Wrong(lambda: loss(axis=2), ValueError, "axis", "numbers from -2 to 1", "2"),
    "too small": Wrong(lambda: loss(axis=-3), ValueError, "axis", "numbers from -2 to 1", "-3"),
    "one of a tuple": Wrong(lambda: loss(axis=(0, 5)), ValueError, "axis", "from -2 to 1", r"\(0, 5\)"),
    "twice": Wrong(lambda: loss(axis=(0, 0)), ValueError, "axis", "differ", r"\(0, 0\)"),
    "twice, by two names": Wrong(lambda: loss(axis=(1, -1)), ValueError, "axis", "differ", r"\(1, -1\)"),
    "none of them": Wrong(lambda: loss(axis=()), TypeError, "axis", "an int or a tuple of ints", r"\(\)"),
    "float": Wrong(lambda: loss(axis=1.0), TypeError, "axis", "an int", "1.0"),
    "string": Wrong(lambda: loss(axis="1"), TypeError, "axis", "an int", "'1'"),
    "list": Wrong(lambda: loss(axis=[1]), TypeError, "axis", "a tuple of ints", r"\[1\]"),
    "bool": Wrong(lambda: loss(axis=True), TypeError, "axis", "an int", "True"),
    "array": Wrong(lambda: loss(axis=np.array([1])), TypeError, "axis", "an int", "array"),
}

WHERE_CASES = {
    "floats": Wrong(lambda: loss(where=PROBS), TypeError, "where", "bools", r"float32 of shape \(2, 3\)", "astype"),
    "an int": Wrong(lambda: loss(where=1), TypeError, "where", "bools", "int32"),
    "list": Wrong(lambda: loss(where=[True, True, False]), TypeError, "where", "bools", "list"),
    "string": Wrong(lambda: loss(where="all"), TypeError, "where", "bools", "str"),
    "wrong length": Wrong(
        lambda: loss(where=np.ones(4, bool)),
        ValueError,
        "where",
        r"broadcasts to that of logits, \(2, 3\), or the batch shape \(2,\)",
        r"bool of shape \(4,\)",
    ),
    "more axes": Wrong(lambda: loss(where=np.ones((1, 2, 3), bool)), ValueError, "where", "broadcasts", r"\(1, 2, 3\)"),
    "classes or examples": Wrong(
        lambda: loss(np.zeros((3, 3), np.float32), np.zeros(3, np.int32), where=np.ones(3, bool)),
        ValueError,
        "where",
        "one way",
        r"shape \(3,\) beside logits \(3, 3\)",
        r"where\[None, :\] for classes, where\[:, None\] for examples",
    ),
}

WEIGHTS_CASES = {
    "class shape": Wrong(
        lambda: loss(weights=PROBS), ValueError, "weights", r"batch shape \(2,\)", r"shape \(2, 3\)", "class_weights"
    ),
    "[V]": Wrong(lambda: loss(weights=PROBS[0]), ValueError, "weights", r"\(2,\)", r"\(3,\)", "class_weights"),
    "[B, 1]": Wrong(lambda: loss(weights=PROBS[:, :1]), ValueError, "weights", r"\(2,\)", r"\(2, 1\)"),
    "list": Wrong(lambda: loss(weights=[1.0, 1.0]), TypeError, "weights", "numbers", "list", "jnp.asarray"),
    "string array": Wrong(lambda: loss(weights=np.array(["a", "b"])), TypeError, "weights", "numbers", "<U1"),
    "complex": Wrong(lambda: loss(weights=np.ones(2, np.complex64)), TypeError, "weights", "numbers", "complex64"),
    "keys": Wrong(lambda: loss(weights=keys(2)), TypeError, "weights", "numbers", "key<fry>"),
}

CLASS_WEIGHTS_CASES = {
    "too short": Wrong(
        lambda: loss(class_weights=np.ones(2)),
        ValueError,
        "class_weights",
        r"shape \(3,\), one weight per class",
        r"shape \(2,\)",
        "Weights per example go into weights",
    ),
    "scalar": Wrong(lambda: loss(class_weights=2.0), ValueError, "class_weights", r"\(3,\)", r"shape \(\)"),
    "[1, V]": Wrong(lambda: loss(class_weights=PROBS[:1]), ValueError, "class_weights", r"\(3,\)", r"\(1, 3\)"),
    "list": Wrong(lambda: loss(class_weights=[1.0] * 3), TypeError, "class_weights", "numbers", "list", "jnp.asarray"),
    "dict": Wrong(lambda: loss(class_weights={0: 1.0}), TypeError, "class_weights", "numbers", "dict"),
    "object array": Wrong(
        lambda: loss(class_weights=np.array([1, 2, None])), TypeError, "class_weights", "numbers", "object"
    ),
    "complex": Wrong(
        lambda: loss(class_weights=np.ones(3, np.complex64)), TypeError, "class_weights", "numbers", "complex64"
    ),
    "keys": Wrong(lambda: loss(class_weights=keys(3)), TypeError, "class_weights", "numbers", "key<fry>"),
}

SCALAR_CASES = {
    "smoothing above 1": Wrong(
        lambda: loss(label_smoothing=1.5), ValueError, "label_smoothing", "a number between 0 and 1", r"1\.5"
    ),
    "smoothing below 0": Wrong(lambda: loss(label_smoothing=-0.1), ValueError, "label_smoothing", "between", r"-0\.1"),
    "smoothing NaN": Wrong(lambda: loss(label_smoothing=np.nan), ValueError, "label_smoothing", "between", "nan"),
    "smoothing per class": Wrong(
        lambda: loss(label_smoothing=np.array([0.1, 0.2])), ValueError, "label_smoothing", "one number", r"shape \(2,\)"
    ),
    "smoothing string": Wrong(lambda: loss(label_smoothing="0.1"), TypeError, "label_smoothing", "number", "'0.1'"),
    "smoothing None": Wrong(lambda: loss(label_smoothing=None), TypeError, "label_smoothing", "number", "None"),
    "smoothing bool": Wrong(lambda: loss(label_smoothing=True), TypeError, "label_smoothing", "number", "True"),
    "smoothing fraction": Wrong(
        lambda: loss(label_smoothing=Fraction(1, 10)), TypeError, "label_smoothing", "number", "Fraction"
    ),
    "smoothing complex": Wrong(
        lambda: loss(label_smoothing=jnp.complex64(0.1)), TypeError, "label_smoothing", "number", "complex64|0.1"
    ),
    "smoothing NumPy complex": Wrong(
        lambda: loss(label_smoothing=np.complex64(0.1)), TypeError, "label_smoothing", "number", "complex64|0.1"
    ),
    "smoothing key": Wrong(
        lambda: loss(label_smoothing=jax.random.key(0)), TypeError, "label_smoothing", "number", "key"
    ),
    "z_loss negative": Wrong(lambda: loss(z_loss=-1.0), ValueError, "z_loss", "a number >= 0", r"-1\.0"),
    "z_loss NumPy negative": Wrong(lambda: loss(z_loss=np.float32(-1)), ValueError, "z_loss", ">= 0", r"-1\.0"),
    "z_loss NaN": Wrong(lambda: loss(z_loss=np.nan), ValueError, "z_loss", ">= 0", "nan"),
    "z_loss infinite": Wrong(lambda: loss(z_loss=np.inf), ValueError, "z_loss", "a number >= 0", "inf"),
    "z_loss None": Wrong(lambda: loss(z_loss=None), TypeError, "z_loss", "number", "None"),
    "z_loss complex": Wrong(lambda: loss(z_loss=np.complex64(1)), TypeError, "z_loss", "number", "complex64|1"),
    "temperature 0": Wrong(lambda: loss(temperature=0.0), ValueError, "temperature", "finite numbers > 0", r"0\.0"),
    "temperature NaN": Wrong(lambda: loss(temperature=np.nan), ValueError, "temperature", "> 0", "nan"),
    "temperature inf": Wrong(lambda: loss(temperature=np.inf), ValueError, "temperature", "finite", "inf"),
    "temperature of one example": Wrong(
        lambda: loss(temperature=np.where(np.arange(len(LABELS)) == 1, -1.0, 1.0)),
        ValueError,
        "temperature",
        "> 0",
        r"-1\.0 in float32",
    ),
    "temperature by class": Wrong(
        lambda: loss(temperature=jnp.ones(7)), ValueError, "temperature", "broadcasts to the batch shape", r"\(7,\)"
    ),
    "temperature string": Wrong(lambda: loss(temperature="1"), TypeError, "temperature", "real numbers", "str"),
    "softcap 0": Wrong(lambda: loss(logit_softcap=0.0), ValueError, "logit_softcap", "> 0", r"0\.0", "None means"),
    "softcap negative": Wrong(lambda: loss(logit_softcap=-1), ValueError, "logit_softcap", "> 0", "-1"),
    "softcap inf": Wrong(lambda: loss(logit_softcap=np.inf), ValueError, "logit_softcap", "> 0", "inf"),
    "softcap NaN": Wrong(lambda: loss(logit_softcap=np.nan), ValueError, "logit_softcap", "> 0", "nan"),
    "softcap string": Wrong(lambda: loss(logit_softcap="30"), TypeError, "logit_softcap", "Python number", "str"),
    "softcap bool": Wrong(lambda: loss(logit_softcap=True), TypeError, "logit_softcap", "Python number", "True"),
    "softcap array": Wrong(
        lambda: loss(logit_softcap=jnp.array(2.0)),
        TypeError,
        "logit_softcap",
        "Python number",
        r"float32 of shape \(\)",
        "constant",
    ),
    "softcap traced": Wrong(
        lambda: jax.jit(lambda c: loss(logit_softcap=c))(2.0),
        TypeError,
        "logit_softcap",
        "Python number",
        "float32",
        "constant of the compiled program",
    ),
}

CHOICE_CASES = {
    "reduction unknown": Wrong(
        lambda: loss(reduction="avg"), ValueError, "reduction", "one of 'none', 'sum', 'mean', 'mean_count'", "'avg'"
    ),
    "reduction None": Wrong(lambda: loss(reduction=None), ValueError, "reduction", "one of 'none'", "None"),
    "reduction list": Wrong(lambda: loss(reduction=["mean"]), ValueError, "reduction", "one of", r"\['mean'\]"),
    "implementation unknown": Wrong(
        lambda: loss(implementation="triton"), ValueError, "implementation", "None, 'xla', 'autodiff'", "'triton'"
    ),
    "return_aux string": Wrong(lambda: loss(return_aux="yes"), ValueError, "return_aux", "False, True", "'yes'"),
    "return_aux int": Wrong(lambda: loss(return_aux=1), ValueError, "return_aux", "False, True", "1"),
    "ignore_index with probabilities": Wrong(
        lambda: loss(targets=PROBS, ignore_index=0),
        ValueError,
        "ignore_index",
        "None for probability targets",
        "0",
        "weights=mask",
    ),
    "ignore_index float": Wrong(lambda: loss(ignore_index=1.0), TypeError, "ignore_index", "a Python int", r"1\.0"),
    "ignore_index bool": Wrong(lambda: loss(ignore_index=True), TypeError, "ignore_index", "a Python int", "True"),
    "ignore_index of no label dtype": Wrong(
        lambda: loss(ignore_index=2**40), ValueError, "ignore_index", r"a label can be \(int32\)", "1099511627776"
    ),
    "ignore_index array": Wrong(
        lambda: loss(ignore_index=jnp.array(1)), TypeError, "ignore_index", "a Python int", r"int32 of shape \(\)"
    ),
}

INTEGER_LABELS_CASES = {
    "probabilities": Wrong(
        lambda: jaxce.softmax_cross_entropy_with_integer_labels(LOGITS, PROBS),
        TypeError,
        "labels",
        "integers",
        r"float32 of shape \(2, 3\)",
        "jaxce.softmax_cross_entropy",
    ),
    "sparse": Wrong(
        lambda: jaxce.softmax_cross_entropy_with_integer_labels(LOGITS, SparseTargets(LABELS[:, None], PROBS[:, :1])),
        TypeError,
        "labels",
        "integers",
        "SparseTargets",
        "jaxce.softmax_cross_entropy",
    ),
    "list": Wrong(
        lambda: jaxce.softmax_cross_entropy_with_integer_labels(LOGITS, [0, 1]), TypeError, "labels", "integers", "list"
    ),
    "[B, 1]": Wrong(
        lambda: jaxce.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS[:, None]),
        ValueError,
        "labels",  # the name of this function's argument, not that of the function it calls
        r"shape \(2,\)",
        r"shape \(2, 1\)",
        r"labels\.reshape\(\(2,\)\)",
    ),
}

PROBS_CASES = {
    "ints": Wrong(
        lambda: jaxce.cross_entropy_from_probs(LABELS[None], LABELS[:1]), TypeError, "probs", "floats", "int32"
    ),
    "list": Wrong(lambda: jaxce.cross_entropy_from_probs([0.5, 0.5], 0), TypeError, "probs", "floats", "list"),
    "scalar": Wrong(
        lambda: jaxce.cross_entropy_from_probs(jnp.float32(0.5), 0), ValueError, "probs", "one axis", r"\(\)"
    ),
    "no classes": Wrong(
        lambda: jaxce.cross_entropy_from_probs(PROBS[:, :0], LABELS), ValueError, "probs", "one class", "length 0"
    ),
    "labels [B, 1]": Wrong(
        lambda: jaxce.cross_entropy_from_probs(PROBS, LABELS[:, None]), ValueError, "targets", r"\(2,\)", r"\(2, 1\)"
    ),
    "axis": Wrong(lambda: jaxce.cross_entropy_from_probs(PROBS, LABELS, 2), ValueError, "axis", "from -2 to 1", "2"),
    "ignore_index": Wrong(
        lambda: jaxce.cross_entropy_from_probs(PROBS, PROBS, ignore_index=0), ValueError, "ignore_index", "None", "0"
    ),
    "reduction": Wrong(
        lambda: jaxce.cross_entropy_from_probs(PROBS, LABELS, reduction="x"), ValueError, "reduction", "one of", "'x'"
    ),
    "smoothing": Wrong(
        lambda: jaxce.cross_entropy_from_probs(PROBS, LABELS, label_smoothing=2),
        ValueError,
        "label_smoothing",
        "between 0 and 1",
        "2",
    ),
}

HIDDEN, KERNEL = np.ones((2, 4), np.float32), np.ones((4, 3), np.float32)


def linear(hidden: Any = HIDDEN, kernel: Any = KERNEL, targets: Any = LABELS, **options: Any) -> Any:
    return jaxce.linear_cross_entropy(hidden, kernel, targets, **options)


LINEAR_CASES = {
    "hidden ints": Wrong(lambda: linear(HIDDEN.astype(np.int32)), TypeError, "hidden", "floats", "int32", "astype"),
    "hidden scalar": Wrong(lambda: linear(np.float32(1)), ValueError, "hidden", "at least one axis", r"shape \(\)"),
    "kernel list": Wrong(
        lambda: linear(HIDDEN, [[1.0]]), TypeError, "kernel", "array of floats", "list", "jnp.asarray"
    ),
    "kernel of one axis": Wrong(lambda: linear(HIDDEN, KERNEL[0]), ValueError, "kernel", r"\[4, V\]", r"shape \(3,\)"),
    "kernel the other way": Wrong(
        lambda: linear(HIDDEN, KERNEL.T), ValueError, "kernel", "4 features", r"\(3, 4\)", "pass vocab_axis=0"
    ),
    "kernel of another size": Wrong(
        lambda: linear(HIDDEN, np.ones((5, 3), np.float32)), ValueError, "kernel", r"\[4, V\]", r"\(5, 3\)"
    ),
    "kernel and vocab_axis": Wrong(
        lambda: linear(vocab_axis=0), ValueError, "kernel", r"\[V, 4\].*vocab_axis=0", r"\(4, 3\)", "vocab_axis=1"
    ),
    "no classes": Wrong(lambda: linear(HIDDEN, KERNEL[:, :0]), ValueError, "kernel", "at least one class", "length 0"),
    "vocab_axis": Wrong(lambda: linear(vocab_axis=2), ValueError, "vocab_axis", "one of 0, 1, -2, -1", "2"),
    "bias": Wrong(lambda: linear(bias=np.ones(4, np.float32)), ValueError, "bias", r"shape \(3,\)", r"\(4,\)"),
    "bias ints": Wrong(lambda: linear(bias=np.ones(3, np.int32)), TypeError, "bias", "floats", "int32", "astype"),
    "targets": Wrong(
        lambda: linear(targets=LABELS[:, None]), ValueError, "targets", r"shape \(2,\)", r"\(2, 1\)", "reshape"
    ),
    "class weights": Wrong(
        lambda: linear(class_weights=np.ones(4)), ValueError, "class_weights", r"shape \(3,\)", r"\(4,\)", "weights"
    ),
    "where": Wrong(lambda: linear(where=np.ones(4, bool)), ValueError, "where", r"\(2, 3\)", r"\(4,\)"),
    "mode": Wrong(lambda: linear(mode="fast"), ValueError, "mode", "None, 'recompute', 'store'", "'fast'"),
    "store without reduction": Wrong(
        lambda: linear(mode="store"),
        ValueError,
        "mode",
        "'recompute' for reduction='none'",
        "'store'",
        "reduction='sum'",
    ),
    "memory_budget": Wrong(
        lambda: linear(memory_budget=1e9), TypeError, "memory_budget", "None or a number of bytes", "1000000000.0"
    ),
    "memory_budget bool": Wrong(lambda: linear(memory_budget=True), TypeError, "memory_budget", "bytes", "True"),
    "memory_budget small": Wrong(
        lambda: linear(memory_budget=0), ValueError, "memory_budget", r"at least [\d,]+ bytes", "0", "Fewer tokens"
    ),
    "a precision that nobody has": Wrong(
        lambda: linear(precision="best"), ValueError, "precision", "jax.lax.Precision", "'best'", "dot_general"
    ),
    "precision 1": Wrong(lambda: linear(precision=1), ValueError, "precision", "'highest'", "1, int32"),
    "autodiff with a mode": Wrong(
        lambda: linear(implementation="autodiff", mode="recompute"),
        ValueError,
        "implementation",
        "'xla'",
        "'autodiff'",
        "leave mode",
    ),
    "reduction": Wrong(lambda: linear(reduction="avg"), ValueError, "reduction", "'mean_count'", "'avg'"),
}

# What can be got wrong in every loss. Each takes what it makes of `[2, 3]` numbers, targets and options.
SCORES = np.array([[0.5, -1.0, 2.0], [-0.25, 1.5, -2.0]], np.float32)
LOSSES: dict[str, Callable[..., Any]] = {
    "dense": jaxce.softmax_cross_entropy,
    "integer": jaxce.softmax_cross_entropy_with_integer_labels,
    "from_probs": jaxce.cross_entropy_from_probs,
    "linear": lambda x, targets, **options: linear(x, np.eye(3, dtype=np.float32), targets, **options),
    "plan": lambda x, targets, **options: jaxce.plan_linear_cross_entropy(x, KERNEL[:3], targets, **options),
    "tune": lambda x, targets, **options: jaxce.tune_linear_cross_entropy(x, KERNEL[:3], targets, **options),
    "report": diagnostics.report,
}
RAGGED = [[1.0, 2.0], [3.0]]


def of_every_loss(name: str, f: Callable[..., Any]) -> dict[str, Wrong]:
    x = {"from_probs": "probs", "linear": "hidden", "plan": "hidden", "tune": "hidden"}.get(name, "logits")
    t = "labels" if name == "integer" else "targets"
    one_hot, order = np.eye(2, 3, dtype=np.int32), f"the order is {x}, {t}"
    wrong_dtype = TypeError if name in ("integer", "report") else ValueError
    objects, ragged = SCORES.astype(object), np.array([*map(np.array, RAGGED)], object)
    cases = {
        "swapped": Wrong(
            lambda: f(LABELS, SCORES), TypeError, x, "floats", r"int32 of shape \(2,\)", f"^They look swapped: {order}"
        ),
        "swapped, or integers": Wrong(
            lambda: f(one_hot, SCORES),
            TypeError,
            x,
            "floats",
            "int32",
            rf"{x}\.astype\(jnp\.float32\)\. Or swap them: {order}",
        ),
        "integers": Wrong(
            lambda: f(one_hot, LABELS), TypeError, x, "floats", "int32", rf"with {x}\.astype\(jnp\.float32\)\.$"
        ),
        "labels as floats": Wrong(
            lambda: f(SCORES, LABELS.astype(np.float32)), wrong_dtype, t, "", "float32", rf"{t}\.astype\(int\)"
        ),
        "labels as bools": Wrong(
            lambda: f(SCORES, LABELS > 0), TypeError, t, "class indices", "bool", rf"{t}\.astype\(int\)"
        ),
        "objects": Wrong(lambda: f(objects, LABELS), TypeError, x, "floats", "object", rf"{x}\.astype"),
        "labels as objects": Wrong(
            lambda: f(SCORES, LABELS.astype(object)), TypeError, t, "indices", "object", rf"{t}\.astype\(int\)"
        ),
        "ragged list": Wrong(lambda: f(RAGGED, LABELS), TypeError, x, "floats", "list", "differ in length: pad"),
        "ragged array": Wrong(lambda: f(ragged, LABELS), TypeError, x, "floats", "object", "differ in length: pad"),
        "ragged labels": Wrong(lambda: f(SCORES, RAGGED), TypeError, t, "indices", "list", "differ in length: pad"),
        "another library's keyword": Wrong(
            lambda: f(SCORES, LABELS, ignore_idx=0),
            TypeError,
            "ignore_idx",
            "argument of",
            "unexpected",
            "ignore_index",
        ),
        "unknown keyword": Wrong(lambda: f(SCORES, LABELS, q=0), TypeError, "q", "", "unexpected", f"There are .*{t}"),
    }
    if name in ("dense", "from_probs", "linear"):
        for kind, targets in {
            "logits": SCORES,
            "some": np.where([[True], [False]], PROBS, SCORES),
            "log-probabilities": np.log(PROBS),
            "masked logits": np.array([[1, 2, -np.inf], [1, 0, 0]], np.float32),
            "JAX array": jnp.asarray(SCORES),
            "bfloat16": jnp.asarray(SCORES, jnp.bfloat16),
        }.items():
            cases[f"logits as targets: {kind}"] = Wrong(
                lambda targets=targets: f(PROBS, targets),
                ValueError,
                t,
                "probabilities >= 0",
                r"of shape \(2, 3\) with entries from -",
                "They look like logits or log-probabilities.*softmax.*The order is logits, targets",
            )
    options = {
        "dense": ("weights", "class_weights", "where", "temperature"),
        "linear": ("weights", "class_weights", "where", "temperature", "bias"),
        "from_probs": ("weights", "class_weights"),
        "report": ("weights",),
    }
    for option in options.get({"plan": "linear", "tune": "linear"}.get(name, name), ()):
        for kind, value, hint in (("objects", objects, rf"{option}\.astype"), ("ragged", RAGGED, "pad them")):
            cases[f"{option}: {kind}"] = Wrong(
                lambda option=option, value=value: f(SCORES, LABELS, **{option: value}),
                TypeError,
                option,
                "array of",
                "object|list",
                hint,
            )
    return cases


class Column:
    """As a column of a table is: `astype` gives another, and `jnp.asarray` takes it."""

    dtype, shape = np.dtype(np.int64), (2,)

    def astype(self, dtype):
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(LABELS, dtype)


ONE_HOT = np.eye(2, 3, dtype=np.int32)
ADVICE_CASES = {
    **{
        f"a column of a table, {f.__name__}": Wrong(
            lambda f=f: f(LOGITS, Column()), TypeError, name, "integers", "Column", r"jnp\.asarray\("
        )
        for f, name in {
            loss: "targets",
            jaxce.softmax_cross_entropy_with_integer_labels: "labels",
            jaxce.diagnostics.report: "targets",
        }.items()
    },
    "weights by class, in a dict": Wrong(
        lambda: loss(class_weights={0: 1.0, 1: 2.0, 2: 3.0}),
        TypeError,
        "class_weights",
        "array of real",
        "dict",
        r"\[class_weights\[c\] for c in range\(V\)\]",
    ),
    "one-hot integers in a report": Wrong(
        lambda: jaxce.diagnostics.report(LOGITS, ONE_HOT),
        ValueError,
        "targets",
        "shape",
        "int32",
        r"targets\.argmax\(-1\)",
    ),
    "one-hot integers as integer labels": Wrong(
        lambda: jaxce.softmax_cross_entropy_with_integer_labels(LOGITS, ONE_HOT),
        ValueError,
        "labels",
        "shape",
        "int32",
        r"for jaxce\.softmax_cross_entropy, as floats: labels\.astype",
    ),
    "one distribution for all": Wrong(
        lambda: loss(targets=np.full(3, 1 / 3, np.float32)),
        ValueError,
        "targets",
        "shape",
        "float32",
        r"jnp\.broadcast_to\(targets, \(2, 3\)\)",
    ),
    "from_logits of probabilities": Wrong(
        lambda: jaxce.cross_entropy_from_probs(PROBS, LABELS, from_logits=False),
        TypeError,
        "from_logits",
        "argument of",
        "unexpected",
        r"logits go to jaxce\.softmax_cross_entropy",
    ),
    "weight of examples": Wrong(
        lambda: jaxce.diagnostics.report(LOGITS, LABELS, weight=1.0),
        TypeError,
        "weight",
        "argument of",
        "unexpected",
        r"Its name here is weights\.",
    ),
    "an axis of the linear loss": Wrong(
        lambda: jaxce.linear_cross_entropy(LOGITS, np.ones((3, 4), np.float32), LABELS, axis=-1),
        TypeError,
        "axis",
        "argument of",
        "unexpected",
        r"vocab_axis says which axis of the kernel",
    ),
    "a longer name": Wrong(
        lambda: loss(z_loss_weight=1e-4), TypeError, "z_loss_weight", "argument of", "unexpected", r"is z_loss\."
    ),
}

# The same of one loss: what others call it, and what it is here.
NAMES = {
    "weight": "class_weights",
    "sample_weight": "weights",
    "mask": "weights",
    "ignore_label": "ignore_index",
    "label_smoothing_factor": "label_smoothing",
    "example_weights": "weights",
    "padding_mask": "weights",
    "logits_softcap": "logit_softcap",
    "reducton": "reduction",
    "target": "targets",
}
WORDS = {
    None: "none",
    "MEAN": "mean",
    "avg": "mean",
    "batchmean": "mean_count",
    "sum_over_batch_size": "mean_count",
    "mean-count": "mean_count",
}
ELSEWHERE_CASES = {
    **{
        name: Wrong(
            lambda name=name: loss(**{name: 0}),
            TypeError,
            name,
            "softmax_cross_entropy",
            "unexpected",
            rf"(name here is|mean) {ours}[.?]$",
        )
        for name, ours in NAMES.items()
    },
    **{
        f"reduction {word}": Wrong(
            lambda word=word: loss(reduction=word), ValueError, "reduction", "'none'", repr(word), f"mean '{ours}'"
        )
        for word, ours in WORDS.items()
    },
    "from_logits": Wrong(
        lambda: loss(from_logits=True), TypeError, "from_logits", "", "unexpected", "jaxce.cross_entropy_from_probs"
    ),
    "an option of the other function": Wrong(
        lambda: jaxce.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS, reduction="mean"),
        TypeError,
        "reduction",
        "argument of softmax_cross_entropy_with_integer_labels",
        "unexpected",
        "Use jaxce.softmax_cross_entropy, which has reduction",
    ),
    "an option of the other linear function": Wrong(
        lambda: jaxce.linear_log_probs(LOGITS, np.eye(3, dtype=np.float32), LABELS[:, None], reduction="mean"),
        TypeError,
        "reduction",
        "argument of linear_log_probs",
        "unexpected",
        "Use jaxce.linear_cross_entropy, which has reduction",
    ),
    "a mask of tokens": Wrong(
        lambda: jaxce.log_probs(LOGITS, LABELS[:, None], mask=LABELS > 0),
        TypeError,
        "mask",
        "argument of log_probs",
        "unexpected",
        "where=",
    ),
    "ignored tokens of a teacher": Wrong(
        lambda: jaxce.distillation_loss(LOGITS, LOGITS, ignore_index=-1),
        TypeError,
        "ignore_index",
        "argument of distillation_loss",
        "unexpected",
        "weight 0",
    ),
    "nothing like it": Wrong(lambda: loss(reduction="x"), ValueError, "reduction", "'none'", "'x'", "^$"),
}

VMAP_CASES = {
    f"{name}: {option}": Wrong(
        lambda f=f, options={option: "i"}: jax.vmap(
            lambda z: f(z, LABELS, reduction="sum", **options), axis_name="i"
        )(SCORES[None]),
        ValueError,
        option,
        "mesh of a surrounding jax.shard_map",
        r"'i', an axis of jax\.vmap",
        "one device",
    )
    for name, f in LOSSES.items()
    if name in ("dense", "linear")
    for option in ("axis_name", "batch_axis_name")
}  # fmt: skip

GROUPS = {
    **{f"every loss, {name}": of_every_loss(name, f) for name, f in LOSSES.items()},
    "elsewhere": ELSEWHERE_CASES,
    "advice": ADVICE_CASES,
    "vmap": VMAP_CASES,
    "linear": LINEAR_CASES,
    "logits": LOGITS_CASES,
    "targets": TARGETS_CASES,
    "sparse": SPARSE_CASES,
    "axis": AXIS_CASES,
    "where": WHERE_CASES,
    "weights": WEIGHTS_CASES,
    "class_weights": CLASS_WEIGHTS_CASES,
    "scalars": SCALAR_CASES,
    "choices": CHOICE_CASES,
    "integer_labels": INTEGER_LABELS_CASES,
    "from_probs": PROBS_CASES,
}
CASES = [pytest.param(case, id=f"{group}: {name}") for group, cases in GROUPS.items() for name, case in cases.items()]


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    with pytest.raises(case.kind) as caught:
        case.call()
    assert caught.type is case.kind  # not a subclass that JAX raised for reasons of its own
    parts = re.fullmatch(r"(.+?): expected (.+?); got (.+?)\.(?: ([A-Z].*\.?))?", str(caught.value), re.DOTALL)
    assert parts, f"not of the form 'name: expected X; got Y. hint': {caught.value}"
    name, expected, got, hint = parts.groups()
    assert name == case.name
    for pattern, text in ((case.expected, expected), (case.got, got), (case.hint, hint or "")):
        assert re.search(pattern, text), f"{pattern!r} is not in {text!r}, of: {caught.value}"


# Rows that sum to 3 ln(3) at most, in size, in the first of which the entries below 0 have a meaning.
SIGNED = {
    "weighted labels": np.array([[0, -7, 0], [0, 0, 2]], np.float32),
    "weighted and smooth": np.array([[-5.6, -0.7, -0.7], [0.1, 0.1, 0.8]], np.float32),
    "weighted, with rounding": np.array([[3, -1e-7, 3], [0, 1, 0]], np.float32),
    "negative smoothing": np.array([[1.2, -0.1, -0.1], [-0.1, 1.2, -0.1]], np.float32),
    "a difference": np.array([[1, 0, -1], [0, 1, -1]], np.float32),
    "sums other than 1": np.array([[2, 3, 4], [0, 0, 0]], np.float32),
}


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("targets", SIGNED.values(), ids=SIGNED)
def test_targets_that_are_no_logits(targets, make):
    """At equal logits a target costs ln 3 times its sum, which is what such targets mean."""
    wanted = targets.sum(-1) * np.log(3)
    np.testing.assert_allclose(loss(targets=make(targets)), wanted, rtol=1e-6, atol=1e-6)


def test_targets_are_looked_at_where_that_is_cheap(monkeypatch):
    """And where every row counts: what does not may hold anything."""
    wanted = SCORES.sum(-1) * np.log(3)
    np.testing.assert_allclose(jax.jit(loss)(LOGITS, SCORES), wanted, rtol=1e-6)
    np.testing.assert_allclose(loss(targets=SCORES, weights=np.ones(2)), wanted, rtol=1e-6)
    np.testing.assert_allclose(loss(targets=SCORES, where=np.ones((2, 3), bool)), wanted, rtol=1e-6)
    monkeypatch.setattr(checks, "_LOOKED_AT", 5)
    np.testing.assert_allclose(loss(targets=SCORES), wanted, rtol=1e-6)


def test_errors_come_while_tracing():
    with pytest.raises(ValueError, match=r"^targets: expected shape \(2,\)"):
        jax.eval_shape(loss, LOGITS, LABELS[:, None])
    with pytest.raises(ValueError, match=r"^label_smoothing: expected a number between 0 and 1"):
        jax.jit(lambda z: loss(z, label_smoothing=1.5))(LOGITS)


@pytest.mark.parametrize("make", [jnp.asarray, lambda x: jax.jit(jnp.add)(x, 0.0)], ids=["array", "computed"])
def test_jax_arrays_are_taken_as_they_are(make):
    """The values of JAX arrays are not looked at, since that would wait for the device, and traced ones have none."""
    assert np.isfinite(loss(label_smoothing=make(1.5))).all()
    traced = jax.jit(lambda s, z: loss(label_smoothing=s, z_loss=z))
    assert np.isfinite(traced(make(1.5), make(-1.0))).all()


@pytest.mark.parametrize("number", [0.1, np.float32(0.1), np.float64(0.1), np.array(0.1), jnp.float32(0.1)])
def test_numbers_of_every_type(number):
    """Strict promotion or not, a number is a number."""
    wanted = 0.9 * np.log(3) + 0.1 * np.log(3) + 0.1 * np.log(3) ** 2
    np.testing.assert_allclose(loss(label_smoothing=number, z_loss=number), wanted, rtol=1e-6)


@pytest.mark.parametrize("edge", [0, 0.0, 1, 1.0])
def test_the_ends_of_the_range_are_inside(edge):
    np.testing.assert_allclose(loss(label_smoothing=edge), np.log(3), rtol=1e-6)


@pytest.mark.parametrize("cap", [30, 30.0, np.float32(30), np.float64(30), np.int32(30)])
def test_softcap_takes_python_and_numpy_numbers(cap):
    np.testing.assert_allclose(loss(logit_softcap=cap), np.log(3), rtol=1e-6)


def test_masked_arrays_are_refused():
    """NumPy's: a JAX array would drop the mask."""
    masked = np.ma.masked_array(LABELS, mask=[True, False])
    numbers = np.ma.masked_array(np.ones(2, np.float32), mask=[True, False])
    for name, x in ("targets", masked), ("weights", numbers), ("logits", np.ma.masked_array(LOGITS, mask=LOGITS > 0)):
        with pytest.raises(TypeError, match=rf"^{name}: expected .*; got a masked array, .*\. .*Fill it"):
            loss(**{"targets": LABELS, "logits": LOGITS, name: x})


@pytest.mark.parametrize("vocab_axis", [np.int64(1), np.int32(-1), np.array(1)[()]])
def test_vocab_axis_takes_numpy_integers(vocab_axis):
    np.testing.assert_array_equal(linear(vocab_axis=vocab_axis), linear(vocab_axis=1))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int4", "uint4"])
def test_labels_of_every_integer_dtype(dtype):
    np.testing.assert_allclose(loss(targets=jnp.asarray(LABELS).astype(dtype)), np.log(3), rtol=1e-6)


@pytest.mark.parametrize("weights", [2.0, np.float32(2), np.int32(2), np.array([2]), np.array([2, 2])])
def test_weights_of_every_dtype_and_shape(weights):
    np.testing.assert_allclose(loss(weights=weights), 2 * np.log(3), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_that_jax_has_no_dtype_for_are_weights(dtype):
    """Counts of aggregated data: 2**32 is not 0, nor 3e9 below 0."""
    z, labels = np.array([[2, 0], [0, 1]], np.float32), np.array([0, 1])
    counts, floats = np.array([2**32, 3 * 10**9], dtype), np.float32([2**32, 3e9])
    for option in "weights", "class_weights":
        found, wanted = (loss(z, labels, reduction="mean", **{option: w}) for w in (counts, floats))
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(loss(z, labels, weights=2**32), loss(z, labels) * 2.0**32)
    assert jaxce.diagnostics.report(z, labels, weights=counts).weight == float(floats.sum())


def test_masks_of_bools_are_weights():
    np.testing.assert_allclose(loss(weights=np.array([True, False])), [np.log(3), 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "to", "yes"),
    [((), (2, 3), True), ((3,), (2, 3), True), ((1, 3), (2, 3), True), ((2, 1), (2, 3), True)]
    + [((2,), (2, 3), False), ((1, 2, 3), (2, 3), False), ((3,), (1,), False), ((0,), (1,), False), ((1,), (0,), True)],
)
def test_broadcastable(shape, to, yes):
    assert checks.broadcastable(shape, to) is yes


def test_class_axes_keep_their_order():
    assert checks.class_axes(-1, 3) == (2,)
    assert checks.class_axes((2, 0), 3) == (2, 0)
    assert checks.class_axes((-1, np.int64(0)), 3) == (2, 0)
    assert checks.class_axes(None, 3) == (0, 1, 2)
