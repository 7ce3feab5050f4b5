"""Code written for optax, with the import changed: its documented examples, and the cases its tests are about."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce as optax


def shown(x) -> str:
    """As printed after `jnp.set_printoptions(precision=4)`, the first line of each example."""
    with np.printoptions(precision=4):
        return str(np.asarray(x))


# --- the docstrings of optax --------------------------------------------------------------------------------------


def test_the_example_of_softmax_cross_entropy():
    logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
    labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert shown(optax.softmax_cross_entropy(logits, labels)) == "[0.2761 2.9518]"


def test_the_first_example_of_integer_labels():
    logits = jnp.array([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]])
    labels = jnp.array([0, 1])
    assert shown(optax.softmax_cross_entropy_with_integer_labels(logits, labels)) == "[0.2761 2.9518]"


def test_the_second_example_of_integer_labels():
    shape = (1, 2, 3, 4)
    logits = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    ix = jnp.array([[1, 2]])
    jx = jnp.array([[1, 3]])
    labels = jnp.ravel_multi_index((ix, jx), shape[2:])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=(2, 3))
    assert shown(cross_entropy) == "[[6.4587 0.4587]]"


# --- what optax's tests are about -----------------------------------------------------------------------------------

LOGITS = np.array([[10.0, 1.0, -2.0], [1.0, 4.0, 0.2]], np.float32)
PROBS = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], np.float32)
# −log softmax, taken with pen and paper: for each row the sum over classes of exp(z − z_y), whose log it is.
EXPECTED = np.array([np.log(np.exp(9.0) + 1 + np.exp(-3.0)), np.log(1 + np.exp(3.0) + np.exp(-0.8))])


@pytest.mark.parametrize("jit", [True, False])
def test_a_batch_and_one_example(jit):
    loss = jax.jit(optax.softmax_cross_entropy) if jit else optax.softmax_cross_entropy
    np.testing.assert_allclose(loss(LOGITS, PROBS), EXPECTED, rtol=1e-6)
    np.testing.assert_allclose(loss(LOGITS[0], PROBS[0]), EXPECTED[0], rtol=1e-6)
    loss = optax.softmax_cross_entropy_with_integer_labels
    loss = jax.jit(loss) if jit else loss
    labels = np.argmax(PROBS, -1).astype(np.int32)
    np.testing.assert_allclose(loss(LOGITS, labels), EXPECTED, rtol=1e-6)
    np.testing.assert_allclose(loss(LOGITS[0], labels[0]), EXPECTED[0], rtol=1e-6)


def test_positional_arguments():
    """logits, labels, axis, where: in this order, for both."""
    where = jnp.array([[True, True, False]] * 2)
    kept, t = LOGITS.T[:2].T, PROBS[:, :2]
    expected = optax.softmax_cross_entropy(kept, t)
    np.testing.assert_allclose(optax.softmax_cross_entropy(LOGITS, PROBS, -1, where), expected, rtol=1e-6)
    labels = np.argmax(PROBS, -1).astype(np.int32)
    by_label = optax.softmax_cross_entropy_with_integer_labels(LOGITS, labels, -1, where)
    np.testing.assert_allclose(by_label, expected, rtol=1e-6)
    named = optax.softmax_cross_entropy_with_integer_labels(logits=LOGITS, labels=labels, axis=-1, where=where)
    np.testing.assert_array_equal(named, by_label)


@pytest.mark.parametrize("size", [5, 10])
def test_a_mask_equals_leaving_the_classes_out(rng, size):
    preds, targets = rng.standard_normal((2, size)).astype(np.float32)
    targets = np.exp(targets) / np.sum(np.exp(targets))
    mask = rng.integers(0, 2, size).astype(bool) | (np.arange(size) == 0)
    masked = optax.softmax_cross_entropy(preds[mask], targets[mask])
    # The targets of classes that take no part must be 0: optax drops them, and a loss of probability 0 is infinite.
    np.testing.assert_allclose(optax.softmax_cross_entropy(preds, targets * mask, where=mask), masked, rtol=1e-6)
    label = np.int32(np.flatnonzero(mask)[-1])
    np.testing.assert_allclose(
        optax.softmax_cross_entropy_with_integer_labels(preds, label, where=mask),
        optax.softmax_cross_entropy_with_integer_labels(preds[mask], np.int32(mask[:label].sum())),
        rtol=1e-6,
    )


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("shape", [(4, 5, 6)])
def test_any_axis_equals_that_axis_moved_to_the_end(rng, shape, axis):
    preds = rng.standard_normal(shape).astype(np.float32)
    targets = rng.dirichlet(np.ones(shape[axis]), [n for i, n in enumerate(shape) if i != axis % 3])
    targets = np.moveaxis(targets, -1, axis).astype(np.float32)
    np.testing.assert_array_equal(
        optax.softmax_cross_entropy(preds, targets, axis=axis),
        optax.softmax_cross_entropy(np.moveaxis(preds, axis, -1), np.moveaxis(targets, axis, -1)),
    )
    labels = np.argmax(targets, axis).astype(np.int32)
    np.testing.assert_array_equal(
        optax.softmax_cross_entropy_with_integer_labels(preds, labels, axis=axis),
        optax.softmax_cross_entropy_with_integer_labels(np.moveaxis(preds, axis, -1), labels),
    )


@pytest.mark.parametrize("axis", [(2, 3), (3, 2), (0, 2), (-1, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_a_tuple_of_axes_is_one_axis_of_flat_indices(rng, axis):
    shape = (2, 3, 4, 5)
    logits = rng.standard_normal(shape).astype(np.float32)
    classes = tuple(a % 4 for a in axis)
    batch = tuple(a for a in range(4) if a not in classes)
    flat = logits.transpose(*batch, *classes).reshape(*(shape[a] for a in batch), -1)
    labels = rng.integers(0, flat.shape[-1], flat.shape[:-1]).astype(np.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=axis)
    np.testing.assert_array_equal(loss, optax.softmax_cross_entropy_with_integer_labels(flat, labels))
    # And the same number from one-hot labels in the shape of the logits.
    hot = np.float32(labels[..., None] == np.arange(flat.shape[-1]))
    hot = hot.reshape(*(shape[a] for a in batch), *(shape[a] for a in classes))
    hot = hot.transpose(np.argsort((*batch, *classes)))
    np.testing.assert_allclose(optax.softmax_cross_entropy(logits, hot, axis=axis), loss, rtol=1e-6)


def test_the_gradient_by_finite_differences(rng):
    logits = rng.standard_normal((2, 3)).astype(np.float32)
    labels = np.int32([1, 0])
    probs = rng.dirichlet(np.ones(3), 2).astype(np.float32)
    for targets in (labels, probs):
        jax.test_util.check_grads(
            lambda z, targets=targets: optax.softmax_cross_entropy(z, targets),
            (logits,),
            1,
            ["rev"],
            atol=1e-2,
            rtol=1e-2,
        )


def test_integer_logits_are_refused():
    with pytest.raises(TypeError, match="logits: expected an array of floats"):
        optax.softmax_cross_entropy(jnp.array([[1, 2, 3]]), jnp.array([[0.0, 1.0, 0.0]]))
    with pytest.raises(TypeError, match="logits: expected an array of floats"):
        optax.softmax_cross_entropy_with_integer_labels(jnp.array([[1, 2, 3]]), jnp.array([0]))


def test_a_training_step(rng):
    """The usual loop body: value_and_grad of the mean, and the loss falls."""
    x, y = rng.standard_normal((64, 5)).astype(np.float32), rng.integers(0, 3, 64).astype(np.int32)

    @jax.jit
    def step(w):
        def loss_fn(w):
            return optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(w)
        return loss, w - 0.1 * gradient

    w = jnp.zeros((5, 3))
    losses = []
    for _ in range(10):
        loss, w = step(w)
        losses.append(float(loss))
    np.testing.assert_allclose(losses[0], np.log(3), rtol=1e-6)
    assert np.all(np.diff(losses) < 0)
    chex.assert_tree_all_finite(w)
