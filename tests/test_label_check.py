"""Under checkify, a label that is no class and logits for targets are errors. Elsewhere the checks cost nothing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify, jet

import jaxce
from jaxce import SparseTargets

V = 5
LOGITS = np.linspace(-1, 1, 4 * V, dtype=np.float32).reshape(4, V)
IMPLEMENTATIONS = ["xla", "autodiff"]


def labels(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def loss(logits, targets, **options):
    return jaxce.softmax_cross_entropy(logits, targets, reduction="sum", **options)


def scanned(logits, targets, **options):
    """The loss of the batch, row by row."""

    def step(total, row):
        return total + loss(*row, **options), None

    return jax.lax.scan(step, jnp.float32(0), (logits, targets))[0]


TRANSFORMS = {
    "eager": lambda **o: lambda z, t: loss(z, t, **o),
    "jit": lambda **o: jax.jit(lambda z, t: loss(z, t, **o)),
    "vmap": lambda **o: jax.vmap(lambda z, t: loss(z, t, **o)),
    "grad": lambda **o: jax.grad(lambda z, t: loss(z, t, **o)),
    "jit(grad)": lambda **o: jax.jit(jax.grad(lambda z, t: loss(z, t, **o))),
    "vmap(grad)": lambda **o: jax.vmap(jax.grad(lambda z, t: loss(z, t, **o))),
    "scan": lambda **o: lambda z, t: scanned(z, t, **o),
    "grad(scan)": lambda **o: jax.grad(lambda z, t: scanned(z, t, **o)),
    "checkpoint": lambda **o: jax.grad(jax.checkpoint(lambda z, t: loss(z, t, **o))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_label_outside_the_classes(transform):
    check = jax.jit(checkify.checkify(TRANSFORMS[transform]()))
    for label in (V, -1, 2**31 - 1):
        assert (
            check(LOGITS, labels(0, 1, label, 2))[0]
            .get()
            .startswith(f"targets: label {label} is not one of the {V} classes")
        )
    assert check(LOGITS, labels(0, 1, V - 1, 2))[0].get() is None


@pytest.mark.parametrize("transform", ["eager", "vmap(grad)"])
def test_the_same_of_the_other_implementation(transform):
    error, _ = checkify.checkify(TRANSFORMS[transform](implementation="autodiff"))(LOGITS, labels(0, 1, V, 2))
    assert f"label {V} is not one of the {V} classes" in error.get()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_does_not_count_is_no_error(transform):
    check = jax.jit(checkify.checkify(TRANSFORMS[transform](ignore_index=-7)))
    error, value = check(LOGITS, labels(0, -7, 1, -7))
    assert error.get() is None
    assert np.isfinite(value).all()
    error, _ = check(LOGITS, labels(0, -7, 1, -8))
    assert f"label -8 is not one of the {V} classes" in error.get()


def test_the_message_says_how_to_ignore_it():
    error, _ = checkify.checkify(loss)(LOGITS, labels(0, 1, -100, 2))
    assert "pass ignore_index=-100" in error.get()
    with pytest.raises(checkify.JaxRuntimeError, match=r"targets: label -100 .* 5 classes"):
        error.throw()


def test_examples_of_weight_0_are_no_error():
    weights = np.array([1, 1, 0, 1], np.float32)
    check = checkify.checkify(lambda z, t, w: loss(z, t, weights=w))
    assert check(LOGITS, labels(0, 1, 99, 2), weights)[0].get() is None
    assert "label 99" in check(LOGITS, labels(0, 1, 99, 2), weights[::-1])[0].get()


def test_sparse_entries_of_probability_0_are_no_error():
    probs = np.array([[1, 0], [0.5, 0.5], [1, 0], [1, 0]], np.float32)
    padded = np.array([[0, -1], [1, 2], [3, V], [4, 99]], np.int32)
    check = checkify.checkify(loss)
    assert check(LOGITS, SparseTargets(padded, probs))[0].get() is None
    padded[1, 1] = -3
    assert "label -3" in check(LOGITS, SparseTargets(padded, probs))[0].get()


def test_a_row_without_classes_is_no_error():
    """It counts for nothing, whatever its label says."""
    where = np.array([[True], [True], [False], [True]])
    check = checkify.checkify(lambda z, t, w: loss(z, t, where=w))
    assert check(LOGITS, labels(0, 1, V, 2), where)[0].get() is None
    assert f"label {V}" in check(LOGITS, labels(0, 1, V, 2), ~where)[0].get()


def test_every_public_function_checks():
    bad = labels(0, 1, V, 2)
    for function in (jaxce.softmax_cross_entropy_with_integer_labels, jaxce.cross_entropy_from_probs):
        error, _ = checkify.checkify(function)(jax.nn.softmax(LOGITS), bad)
        assert f"label {V} is not one of the {V} classes" in error.get(), function.__name__


def test_ids_are_called_ids():
    for f in jaxce.log_probs, lambda z, ids: jaxce.linear_log_probs(z, np.eye(V, dtype=np.float32), ids):
        error, _ = checkify.checkify(f)(LOGITS, labels(0, 1, V, 2))
        assert error.get().startswith(f"ids: id {V} is not one of the {V} classes")


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_logits_in_place_of_targets(transform):
    check = jax.jit(checkify.checkify(TRANSFORMS[transform]()))
    for wrong in (LOGITS.reshape(V, 4).T, np.log(jax.nn.softmax(LOGITS))):
        assert check(LOGITS, wrong)[0].get().startswith("targets: expected probabilities >= 0; got entries from -")
    assert check(LOGITS, jax.nn.softmax(LOGITS))[0].get() is None


def test_targets_of_a_batch_anywhere():
    """The classes stay the classes, whichever axis is mapped: of these only the columns are distributions."""
    signed = np.array([[1.5, -2.0], [-0.5, 3.0]], np.float32)
    for mapped, fine in ((0, signed.T), (1, signed)):
        check = jax.jit(checkify.checkify(jax.vmap(loss, (mapped, mapped))))
        assert check(signed, fine)[0].get() is None
        assert check(signed, fine.T)[0].get() is not None


def test_the_check_of_targets_is_differentiated_as_nothing():
    targets = jax.nn.softmax(LOGITS)

    def total(t):
        return loss(LOGITS, t, implementation="autodiff")

    wanted = -jax.nn.log_softmax(LOGITS)
    eps = np.finfo(np.float32).eps
    for gradient in jax.grad(total)(targets), jax.jacfwd(total)(targets):
        np.testing.assert_allclose(gradient, wanted, rtol=16 * eps)
    _, (slope, curvature) = jet.jet(total, (targets,), ((jnp.ones_like(targets), jnp.zeros_like(targets)),))
    np.testing.assert_allclose(slope, wanted.sum(), rtol=64 * eps)
    assert curvature == 0


def test_it_is_a_user_check_among_the_others():
    """The set of errors that a caller asks for decides, as for checkify.check."""
    bad = labels(0, 1, V, 2)
    assert checkify.checkify(loss, errors=checkify.user_checks)(LOGITS, bad)[0].get() is not None
    assert checkify.checkify(loss, errors=checkify.float_checks)(LOGITS, labels(0, 1, 2, 3))[0].get() is None
    assert "targets: label" in checkify.checkify(loss, errors=checkify.all_checks)(LOGITS, bad)[0].get()
    assert checkify.checkify(loss, errors=checkify.index_checks)(LOGITS, bad)[0].get() is None


@pytest.mark.parametrize("kind", ["dense", "from_probs", "linear"])
def test_the_check_of_targets_keeps_no_copy_of_them(kind):
    """A scan over batches keeps what it makes for the backward pass of all of them: logits or probabilities at most."""
    steps, N, D, classes = 8, 64, 16, 500
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    loss_of = {
        "dense": lambda h, kernel, t: loss(h @ kernel, t),
        "from_probs": lambda h, kernel, t: jaxce.cross_entropy_from_probs(jnp.exp(h @ kernel), t, reduction="mean"),
        "linear": lambda h, kernel, t: jaxce.linear_cross_entropy(h, kernel, t, mode="recompute", reduction="mean"),
    }[kind]

    def total(kernel, hidden, targets):
        return jax.lax.scan(lambda c, x: (c + loss_of(x[0], kernel, x[1]), None), 0.0, (hidden, targets))[0]

    shapes = struct((D, classes)), struct((steps, N, D)), struct((steps, N, classes))
    program = jax.jit(jax.grad(total)).lower(*shapes).compile()
    made = {"dense": 1, "from_probs": 3, "linear": 0}[kind]  # beside which there are arrays of one step
    assert program.memory_analysis().temp_size_in_bytes < (made + 0.75) * steps * N * classes * 4


def test_an_empty_batch():
    assert checkify.checkify(loss)(LOGITS[:0], labels())[0].get() is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_checkify_nothing_raises_and_nothing_has_effects(implementation):
    bad = labels(0, 1, V, 2)

    def per_row(z):
        return jaxce.softmax_cross_entropy(z, bad, implementation=implementation)

    np.testing.assert_array_equal(np.isnan(jax.jit(per_row)(LOGITS)), [False, False, True, False])
    # An effect would take the function off JAX's fast dispatch path, checkify or not.
    assert not jax.make_jaxpr(per_row)(LOGITS).effects
    assert not jax.make_jaxpr(jax.grad(lambda z: per_row(z).sum()))(LOGITS).effects
    assert "check_labels" in str(jax.make_jaxpr(per_row)(LOGITS))  # or the two lines above would say nothing
    of_targets = jax.make_jaxpr(lambda t: loss(LOGITS, t, implementation=implementation))(LOGITS)
    assert "check_targets" in str(of_targets)
    assert not of_targets.effects
    assert "custom_call" not in jax.jit(per_row).lower(LOGITS).as_text()


def test_a_label_too_large_for_int32_is_no_class():
    """JAX without 64-bit types would wrap 2**32 to class 0."""
    loss = jaxce.softmax_cross_entropy(jnp.zeros((3, 4)), np.array([0, 2**32, -(2**32)]))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True])


def test_64_bits_of_a_label_are_all_compared(x64):
    for labels in (np.array([0, 2**32, -(2**32)]), jnp.array([0, 2**32, -(2**32)])):
        loss = jaxce.softmax_cross_entropy(jnp.zeros((3, 4)), labels)
        np.testing.assert_array_equal(np.isnan(loss), [False, True, True])
