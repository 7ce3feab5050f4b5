"""`select` gives what `jnp.where` gives, and leaves no function of its own in a program."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce.selection import select

VALUES = {
    "float": 1.5,
    "int": 2,
    "float32": jnp.float32([0.5, -1.0]),
    "bfloat16": jnp.bfloat16([[1.0], [2.0]]),
    "one": np.float32(3),
}


@pytest.mark.parametrize(("x", "y"), [*itertools.product(VALUES, VALUES)])
def test_as_where(x, y):
    condition, x, y = jnp.array([[True], [False]]), VALUES[x], VALUES[y]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for of in condition, condition[0, 0]:
            found, wanted = select(of, x, y), jnp.where(of, x, y)
            chex.assert_trees_all_equal(found, wanted)
            assert found.aval == wanted.aval  # weak types, too


LOGITS, LABELS = np.zeros((3, 7), np.float32), np.zeros(3, np.int32)
KERNEL, WEIGHTS = np.zeros((7, 9), np.float32), np.ones(3, np.float32)
LOSSES = {
    "labels": lambda z: jaxce.softmax_cross_entropy(z, LABELS, reduction="mean"),
    "most options": lambda z: jaxce.softmax_cross_entropy(
        z, LABELS, weights=WEIGHTS, label_smoothing=0.1, z_loss=0.1, ignore_index=0, where=WEIGHTS > 0, reduction="mean"
    ),
    "probabilities": lambda z: jaxce.softmax_cross_entropy(z, LOGITS, class_weights=KERNEL[:, 0], reduction="mean"),
    "linear": lambda h: jaxce.linear_cross_entropy(h, KERNEL, LABELS, weights=WEIGHTS, reduction="mean"),
    "divergence": lambda z: jaxce.distillation_loss(z, LOGITS, weights=WEIGHTS, reduction="mean"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_has_no_function_for_each_select(loss):
    text = jax.jit(jax.value_and_grad(LOSSES[loss])).lower(LOGITS).as_text()
    assert "@_loss" in text  # it is a function of its own
    assert "@_where" not in text


IDS = np.zeros((3, 2), np.int32)
SPARSE = jaxce.SparseTargets(IDS, np.full((3, 2), 0.5, np.float32))
OF_LOGITS = {
    "aux": lambda z: jaxce.softmax_cross_entropy(z, LABELS, return_aux=True),
    "sparse": lambda z: jaxce.softmax_cross_entropy(z, SPARSE),
    "where": lambda z: jaxce.softmax_cross_entropy(z, LABELS, where=WEIGHTS > 0),
    "autodiff": lambda z: jaxce.softmax_cross_entropy(z, LABELS, where=WEIGHTS > 0, implementation="autodiff"),
    "probabilities": lambda z: jaxce.softmax_cross_entropy(z, z, where=WEIGHTS > 0),
    "log-probabilities": lambda z: jaxce.log_probs(z, IDS, return_aux=True),
    "teacher": lambda z: jaxce.distillation_loss(z, SPARSE),
    "report": lambda z: jaxce.diagnostics.summarize(z, LABELS),
}


@pytest.mark.parametrize("loss", OF_LOGITS)
def test_logits_of_a_weak_type_are_of_their_type(loss):
    """As those of `jnp.full` are, made before x64 was turned on; beside a number they would become float64."""
    weak = jnp.full((3, 7), 0.5)
    assert weak.weak_type
    with jax.enable_x64(True):
        chex.assert_trees_all_equal_shapes_and_dtypes(*map(OF_LOGITS[loss], (weak, jnp.asarray(weak, np.float32))))
