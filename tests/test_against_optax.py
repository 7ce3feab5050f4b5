"""jaxce against optax: equal where optax is right; where it is wrong, both answers and the truth."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import jaxce

F32 = np.finfo(np.float32)


@contextlib.contextmanager
def lenient():
    """optax mixes dtypes and ranks as it likes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def loss_and_gradient(loss, logits, targets, cotangent, **options):
    @jax.jit
    def run(logits, targets, options, cotangent):
        value, pull = jax.vjp(lambda z: loss(z, targets, **static, **options), logits)
        return value, pull(cotangent)[0]

    static = {"axis": options.pop("axis")} if "axis" in options else {}
    return run(logits, targets, options, cotangent)


def assert_equal_within_optax_error(ours, theirs, logits, ct):
    """optax rounds a log-probability like a number of the size of the logits, of their logsumexp and of their range
    (up to 3·max|z| + log V) and multiplies it by targets that sum to 1; p − t is uncertain by ε times that."""
    size = 3 * np.max(np.abs(np.float64(logits)), initial=0) + np.log(max(logits.size, 1)) + 1
    tolerance = 16 * F32.eps * size
    chex.assert_tree_all_finite(ours)
    chex.assert_trees_all_close(ours[0], theirs[0], rtol=0, atol=tolerance)
    gradient, expected = (np.asarray(x[1]).astype(np.float64) for x in (ours, theirs))
    # Gradients of narrow logits are rounded to their dtype; optax was given the same logits in f32.
    rounding = oracle.half_ulp(expected, ours[1].dtype) if ours[1].dtype != jnp.float32 else 0
    oracle.assert_within(gradient, expected, tolerance * np.max(np.abs(ct), initial=0) + rounding, "gradient")


def assert_rows_left_out(result, where, axis):
    """A mask of the batch shape makes loss and gradient of the other rows exactly 0."""
    loss, gradient = result
    np.testing.assert_array_equal(np.asarray(loss)[~where], 0)
    rows = np.broadcast_to(np.expand_dims(where, axis), gradient.shape)
    np.testing.assert_array_equal(np.asarray(gradient)[~rows], 0)


SHAPES_AND_AXES = [
    ((5,), -1),
    ((4, 7), -1),
    ((4, 7), 0),
    ((2, 3, 5), 1),
    ((2, 3, 5), -3),
    ((2, 3, 5), (2, 1)),
    ((2, 3, 5), (-1, 0)),
    ((2, 3, 5), (0, 1, 2)),
    ((3, 2, 4, 5), (3, 1)),
    ((0, 7), -1),
]
GRID = [(jnp.float32, *case) for case in SHAPES_AND_AXES] + [(jnp.bfloat16, (4, 7), -1), (jnp.bfloat16, (2, 3, 5), 1)]
CASES = [(*case, mask) for case in GRID for mask in ("classes", "batch")] + [(*case, None) for case in GRID[::4]]


def named(x) -> str:
    return x.__name__ if isinstance(x, type) else str(x).replace(" ", "")


def problem(rng, shape, axis, dtype, mask, kind):
    axes = range(len(shape)) if axis is None else [axis] if isinstance(axis, int) else axis
    axes = tuple(a % len(shape) for a in axes)
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    num_classes = int(np.prod([shape[a] for a in axes]))
    where = None
    last = (*(i for i in range(len(shape)) if i not in axes), *axes)
    allowed = np.ones((*batch, num_classes), bool)
    if mask == "classes":
        allowed = rng.random(allowed.shape) < 0.7
        allowed[..., 0] = True
        unflat = allowed.reshape(*batch, *(shape[a] for a in axes))
        where = unflat.transpose(np.argsort(last))
    elif mask == "batch":
        where = rng.random(batch) < 0.6
    ct = rng.standard_normal(batch).astype(np.float32)
    if kind == "index":  # a class that takes part
        targets = np.argmax(rng.random(allowed.shape) * allowed, -1).astype(np.int32)
    else:
        t = rng.random(allowed.shape) * allowed
        t = t / np.sum(t, -1, keepdims=True)
        t = t.reshape(*batch, *(shape[a] for a in axes)).transpose(np.argsort(last))
        targets = t.astype(dtype)
    return logits, targets, where, ct


WITHOUT_A_BATCH = [(jnp.float32, (2, 3, 5), None, mask) for mask in (None, "classes")]


@pytest.mark.parametrize(("dtype", "shape", "axis", "mask"), CASES + WITHOUT_A_BATCH, ids=named)
def test_softmax_cross_entropy(rng, dtype, shape, axis, mask):
    logits, targets, where, ct = problem(rng, shape, axis, dtype, mask, "probabilities")
    options = {"axis": axis} | ({} if where is None else {"where": where})
    ours = loss_and_gradient(jaxce.softmax_cross_entropy, logits, targets, ct, **options)
    chex.assert_type(ours, [jnp.float32, dtype])
    with lenient():
        if mask == "batch" and not isinstance(axis, int):
            options["where"] = np.expand_dims(where, axis)
        wide = np.float32(logits), np.float32(targets)
        theirs = loss_and_gradient(optax.softmax_cross_entropy, *wide, ct, **options)
    if mask == "batch":
        assert_rows_left_out(ours, where, axis)
    assert_equal_within_optax_error(ours, theirs, logits, ct)


@pytest.mark.parametrize(("dtype", "shape", "axis", "mask"), CASES, ids=named)
def test_integer_labels(rng, dtype, shape, axis, mask):
    logits, labels, where, ct = problem(rng, shape, axis, dtype, mask, "index")
    options = {"axis": axis} | ({} if where is None else {"where": where})
    ours = loss_and_gradient(jaxce.softmax_cross_entropy_with_integer_labels, logits, labels, ct, **options)
    chex.assert_type(ours, [jnp.float32, dtype])
    if mask == "batch" and not isinstance(axis, int):
        full = np.broadcast_to(np.expand_dims(where, axis), shape)  # optax flattens the mask as it flattens the logits
        options["where"] = full
    with lenient():
        theirs = loss_and_gradient(
            optax.softmax_cross_entropy_with_integer_labels, np.float32(logits), labels, ct, **options
        )
    if mask == "batch":
        assert_rows_left_out(ours, where, axis)
    assert_equal_within_optax_error(ours, theirs, logits, ct)


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_soft_cap_is_that_of_the_capped_logits(rng, cap):
    logits = (5 * rng.standard_normal((4, 7))).astype(np.float32)
    labels = rng.integers(0, 7, 4).astype(np.int32)
    ct = rng.standard_normal(4).astype(np.float32)

    def capped(z, y):
        return optax.softmax_cross_entropy_with_integer_labels(cap * jnp.tanh(z / cap), y)

    def ours(z, y):
        return jaxce.softmax_cross_entropy(z, y, logit_softcap=cap)

    theirs = loss_and_gradient(capped, logits, labels, ct)
    assert_equal_within_optax_error(
        loss_and_gradient(ours, logits, labels, ct), theirs, np.maximum(cap, abs(logits)), ct
    )


def test_label_smoothing_is_that_of_smoothed_labels(rng):
    logits = rng.standard_normal((4, 7)).astype(np.float32)
    labels = rng.integers(0, 7, 4).astype(np.int32)
    ct = rng.standard_normal(4).astype(np.float32)

    def smoothed(z, y):
        return optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(y, 7), 0.1))

    def ours(z, y):
        return jaxce.softmax_cross_entropy(z, y, label_smoothing=0.1)

    with lenient():
        theirs = loss_and_gradient(smoothed, logits, labels, ct)
    assert_equal_within_optax_error(loss_and_gradient(ours, logits, labels, ct), theirs, logits, ct)


# --- where optax is wrong -------------------------------------------------------------------------------------------
# Each test asserts optax's answer as well, so that it says so when optax is put right.


def both(logits, labels, **options):
    with lenient():
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, labels, **options)
    return jaxce.softmax_cross_entropy_with_integer_labels(logits, labels, **options), theirs


def truth(logits, label):
    z = np.asarray(logits).astype(np.float64)[None]
    return oracle.Problem(z, oracle.one_hot([label], z.shape[-1])).losses().loss.value[0]


@pytest.mark.parametrize(
    ("logits", "label", "dtype", "optax_says", "true"),
    [
        ([0, -20], 0, jnp.float32, 0.0, 2.0611536e-09),
        ([1e6, 1e6 - 1], 0, jnp.float32, 0.3125, 0.3132617),
        ([256, 255], 0, jnp.bfloat16, 0.0, 0.3132617),
        ([20, 17.375, 0.40625], 2, jnp.bfloat16, 19.75, 19.6636862),
    ],
)
def test_lost_digits(logits, label, dtype, optax_says, true):
    logits = jnp.asarray(logits, dtype)
    ours, theirs = both(logits, jnp.asarray(label))
    assert theirs == optax_says
    np.testing.assert_allclose(truth(logits, label), true, rtol=5e-8)
    np.testing.assert_allclose(ours, truth(logits, label), rtol=4 * F32.eps)
    assert ours.dtype == jnp.float32


def test_the_gradient_of_a_confident_example():
    logits, label = jnp.array([0.0, -20.0]), jnp.array(0)
    theirs = jax.grad(optax.softmax_cross_entropy_with_integer_labels)(logits, label)
    ours = jax.grad(jaxce.softmax_cross_entropy_with_integer_labels)(logits, label)
    true = np.exp(-20.0) / (1 + np.exp(-20.0))
    assert theirs[0] == 0
    np.testing.assert_allclose(ours, [-true, true], rtol=4 * F32.eps)


def test_probability_zero_at_minus_infinity():
    logits, probs = jnp.array([[1.0, -jnp.inf, 2.0]]), jnp.array([[0.5, 0.0, 0.5]])
    assert np.isnan(optax.softmax_cross_entropy(logits, probs)[0])
    true = np.log1p(np.exp(-1)) + 0.5
    np.testing.assert_allclose(jaxce.softmax_cross_entropy(logits, probs), [true], rtol=4 * F32.eps)


def test_labels_that_are_no_classes():
    """optax lets −1 wrap to the last class, and gives V, whose loss is NaN, a gradient as if there were no target."""
    logits, labels = jnp.array([[1.0, 2.0, 3.0]] * 2), jnp.array([-1, 3])
    ours, theirs = both(logits, labels)
    np.testing.assert_allclose(theirs, [truth(logits[0], 2), np.nan], rtol=1e-6)
    np.testing.assert_array_equal(ours, [np.nan, np.nan])

    def gradient(loss):
        return np.asarray(jax.grad(lambda z: jnp.sum(loss(z, labels)))(logits))

    theirs = gradient(optax.softmax_cross_entropy_with_integer_labels)
    p = np.exp([1.0, 2.0, 3.0]) / np.sum(np.exp([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(theirs, [p - [0, 0, 1], p], rtol=1e-5)
    assert np.all(np.isnan(gradient(jaxce.softmax_cross_entropy_with_integer_labels)))


def test_labels_of_the_wrong_shape():
    """optax broadcasts: one label is used for every example, and a column of labels for every class."""
    logits = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])
    with lenient():
        theirs = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([2]))
        np.testing.assert_allclose(theirs, [truth(logits[0], 2), truth(logits[1], 2)], rtol=1e-6)
        theirs = optax.softmax_cross_entropy(logits, jnp.array([[1.0], [2.0]]))
        assert theirs.shape == (2,)
    for labels in (jnp.array([2]), jnp.array([[2], [0]]), jnp.array([[1.0], [2.0]])):
        with pytest.raises(ValueError, match="targets: expected shape"):
            jaxce.softmax_cross_entropy(logits, labels)


def test_a_label_on_a_class_that_takes_no_part():
    """Its probability is 0. optax returns the logsumexp of the others minus the logit that takes no part."""
    logits, where = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[True, False, True]])
    ours, theirs = both(logits, jnp.array([1]), where=where)
    np.testing.assert_allclose(theirs, [np.log(np.exp(1) + np.exp(3)) - 2], rtol=1e-6)
    assert ours[0] == np.inf
    one_hot = jnp.array([[0.0, 1.0, 0.0]])
    assert optax.softmax_cross_entropy(logits, one_hot, where=where)[0] == 0
    assert jaxce.softmax_cross_entropy(logits, one_hot, where=where)[0] == np.inf
