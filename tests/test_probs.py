"""Cross-entropy of probabilities: the formula, its edges at 0 and 1, and the options of the loss on logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxce import SparseTargets, cross_entropy_from_probs, softmax_cross_entropy

EPS = float(np.finfo(np.float32).eps)
RTOL = 16 * EPS
N, V = 5, 6
LABELS = np.array([0, 3, 5, 3, 1], np.int32)


@pytest.fixture
def probs(rng):
    """Probabilities from 0.02 up: there log p loses nothing, and both losses can be compared."""
    p = 0.02 + rng.dirichlet(np.ones(V), N)
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def class_weights(rng):
    return rng.uniform(0.2, 3, V).astype(np.float32)


@pytest.fixture
def targets_of(rng):
    second = (LABELS + np.array([1, 0, 1, 2, 3])) % V
    return {
        "index": LABELS,
        "probs": rng.dirichlet(np.ones(V), N).astype(np.float32),
        "sparse": SparseTargets(
            np.stack([LABELS, second], -1).astype(np.int32), rng.dirichlet(np.ones(2), N).astype(np.float32)
        ),
    }


def dense(targets):
    if isinstance(targets, SparseTargets):
        return np.einsum("nkv,nk->nv", np.eye(V)[targets.indices], targets.probs.astype(np.float64))
    return np.eye(V)[targets] if targets.dtype == np.int32 else targets.astype(np.float64)


def test_the_value_depends_on_the_target_alone():
    probs = np.array([0.1, 0.5, 0.1, 0.1, 0.2], np.float32)
    one_hot = np.array([1, 0, 0, 0, 0], np.float32)
    for targets in (np.int32(0), one_hot, SparseTargets(np.array([0]), np.ones(1, np.float32))):
        np.testing.assert_allclose(cross_entropy_from_probs(probs, targets), 2.302585, atol=5e-7)
    np.testing.assert_allclose(cross_entropy_from_probs(probs[[0, 4, 3, 2, 1]], np.int32(0)), 2.302585, atol=5e-7)


def test_a_factor_of_0_takes_the_gradient_of_a_probability_of_0():
    """Of a class of weight 0, and of an amount of smoothing, whether it is a number of the program or not."""
    p = jnp.array([[0.0, 0.25, 0.75]])
    weights = jnp.array([0.0, 1.0, 1.0])
    for targets in jnp.array([0]), jnp.eye(3)[:1], SparseTargets(jnp.array([[0, 0]]), jnp.full((1, 2), 0.5)):
        loss = jax.value_and_grad(lambda p, t=targets: cross_entropy_from_probs(p, t, class_weights=weights).sum())
        np.testing.assert_array_equal(loss(p)[0], 0)
        np.testing.assert_array_equal(loss(p)[1], 0)
    for amount, target, wanted in (0.0, 1, [0, -4, 0]), (1.0, 0, None):
        q = p if wanted else jnp.array([[0.0, 0.25, 0.75]]) + 0.25 * jnp.eye(3)[:1]
        found = jax.grad(lambda p, e, y=target: cross_entropy_from_probs(p, jnp.array([y]), label_smoothing=e).sum())(
            q, jnp.float32(amount)
        )
        np.testing.assert_allclose(found[0], wanted or -1 / (3 * q[0]), rtol=RTOL)


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "class weights": {"class_weights": True},
    "both": {"label_smoothing": 0.2, "class_weights": True},
    "weights": {"weights": np.array([1, 0, 2, 0.5, 3], np.float32)},
    "ignore_index": {"ignore_index": 3},
}


@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
@pytest.mark.parametrize("option", OPTIONS)
def test_value_and_gradient(option, kind, probs, class_weights, targets_of):
    """Σ_c w_c t'_c (−log p_c) in float64, and −w_c t'_c / p_c; each term is positive, so that errors do not add up."""
    if option == "ignore_index" and kind == "probs":
        pytest.skip("there is no label in it to ignore")
    targets = targets_of[kind]
    options = dict(OPTIONS[option])
    if options.pop("class_weights", None):
        options["class_weights"] = class_weights
    p, t = probs.astype(np.float64), dense(targets)
    counted = np.ones(N)
    if option == "ignore_index":
        ids = LABELS[:, None] if kind == "index" else targets.indices
        counted = np.any(ids != 3, -1).astype(float)
        t = t * (np.arange(V) != 3)
    smoothing = options.get("label_smoothing", 0.0)
    weights = options.get("weights", np.ones(N)).astype(np.float64)
    w = options.get("class_weights", np.ones(V)).astype(np.float64)
    coefficients = (counted * weights)[:, None] * w * ((1 - smoothing) * t + smoothing / V)
    rows = -(coefficients * np.log(p)).sum(-1)
    applied = counted * weights * ((t * w).sum(-1) if "class_weights" in options else 1)
    divisors = {"sum": 1, "mean": applied.sum(), "mean_count": counted.sum()}

    np.testing.assert_allclose(cross_entropy_from_probs(probs, targets, **options), rows, rtol=RTOL)
    for reduction, divisor in divisors.items():
        function = lambda x, r=reduction: cross_entropy_from_probs(x, targets, reduction=r, **options)  # noqa: E731
        if reduction != "mean":
            np.testing.assert_allclose(function(probs), rows.sum() / divisor, rtol=RTOL)
        else:
            value, grad = jax.jit(jax.value_and_grad(function))(probs)
            np.testing.assert_allclose(value, rows.sum() / divisor, rtol=RTOL)
            np.testing.assert_allclose(grad, -coefficients / p / divisor, rtol=RTOL)


@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
@pytest.mark.parametrize("option", ["plain", "both"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_it_is_the_loss_of_the_logarithms(reduction, option, kind, probs, class_weights, targets_of):
    options = dict(OPTIONS[option])
    if options.pop("class_weights", None):
        options["class_weights"] = class_weights
    # log p and the sum of p are off by ε each, at a loss of 0.02 or more: −log 0.98.
    np.testing.assert_allclose(
        cross_entropy_from_probs(probs, targets_of[kind], reduction=reduction, **options),
        softmax_cross_entropy(np.log(probs), targets_of[kind], reduction=reduction, **options),
        rtol=RTOL,
        atol=4 * EPS * 3 * 3,  # times the largest weights
    )


@pytest.mark.parametrize("axis", [0, 1, -2, (0, 2), None])
def test_axes(axis, rng):
    p = rng.random((2, 3, 4)).astype(np.float32)
    t = rng.random((2, 3, 4)).astype(np.float32)
    axes = tuple(range(3)) if axis is None else axis
    wanted = -(t.astype(np.float64) * np.log(p.astype(np.float64))).sum(axes)
    np.testing.assert_allclose(cross_entropy_from_probs(p, t, axis), wanted, rtol=RTOL)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(dtype, probs):
    p = jnp.asarray(probs).astype(dtype)
    loss, back = jax.vjp(lambda p: cross_entropy_from_probs(p, LABELS), p)
    assert loss.dtype == jnp.float32
    assert back(jnp.ones_like(loss))[0].dtype == p.dtype
    exact = -np.log(np.asarray(p.astype(jnp.float32), np.float64)[np.arange(N), LABELS])
    np.testing.assert_allclose(loss, exact, rtol=RTOL)


@pytest.mark.usefixtures("x64")
def test_float64(probs):
    p = probs.astype(np.float64)
    loss = cross_entropy_from_probs(p, LABELS)
    assert loss.dtype == jnp.float64
    np.testing.assert_allclose(loss, -np.log(p[np.arange(N), LABELS]), rtol=16 * np.finfo(np.float64).eps)


# --- the edges ------------------------------------------------------------------------------------------------------


def targets_on(kind, label, num_classes=3):
    if kind == "index":
        return np.array([label])
    if kind == "probs":
        return np.eye(num_classes, dtype=np.float32)[[label]]
    return SparseTargets(np.array([[label, 0]]), np.array([[1, 0]], np.float32))


@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
def test_probability_0(kind):
    """Where the target is 0 too it contributes nothing; where it is not, the loss is infinite, and so is its slope."""
    probs = np.array([[0.0, 0.25, 0.75]], np.float32)
    loss = lambda p, label: cross_entropy_from_probs(p, targets_on(kind, label), reduction="sum")  # noqa: E731
    value, grad = jax.value_and_grad(loss)(probs, 1)
    np.testing.assert_allclose(value, np.log(4), rtol=RTOL)
    np.testing.assert_allclose(grad, [[0, -4, 0]], rtol=RTOL)
    value, grad = jax.value_and_grad(loss)(probs, 0)
    assert value == np.inf
    np.testing.assert_array_equal(grad, [[-np.inf, 0, 0]])


@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
def test_probability_1(kind):
    loss = lambda p: cross_entropy_from_probs(p, targets_on(kind, 2), reduction="sum")  # noqa: E731
    value, grad = jax.value_and_grad(loss)(np.array([[0.0, 0.0, 1.0]], np.float32))
    assert value == 0
    np.testing.assert_array_equal(grad, [[0, 0, -1]])


def test_what_a_softmax_rounds_to_is_no_error():
    """Its sum may be a little more than 1, and so may the probability of a sure class."""
    above = np.nextafter(np.float32(1), np.float32(2))
    np.testing.assert_allclose(cross_entropy_from_probs(np.array([above, 0]), np.int32(0)), -EPS, rtol=1e-3)


WRONG = [1.1, -0.1, np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
def test_what_is_no_probability_gives_nan(kind):
    loss = lambda p: cross_entropy_from_probs(p, targets_on(kind, 1), reduction="sum")  # noqa: E731
    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    for wrong in WRONG:
        value, grad = loss_and_gradient(np.array([[0.2, wrong, 0.5]], np.float32))
        assert np.isnan(value), wrong
        assert np.isnan(grad[0, 1]), wrong  # a finite gradient would train on as if nothing had happened


@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
def test_it_need_not_be_the_target(kind):
    """The docstring: "A probability that is NaN, negative or above 1 gives NaN", wherever in the row it is."""
    for wrong in WRONG:
        probs = np.array([[0.2, wrong, 0.5]], np.float32)
        assert np.isnan(cross_entropy_from_probs(probs, targets_on(kind, 0))).all(), wrong


@pytest.mark.parametrize("label", [-1, 3, 100])
@pytest.mark.parametrize("kind", ["index", "sparse"])
def test_a_label_outside_the_classes_gives_nan(label, kind):
    """In the whole row of the gradient, as in the loss of logits; other rows are untouched."""
    probs = np.array([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]], np.float32)
    labels = np.array([1, label])
    targets = labels if kind == "index" else SparseTargets(labels[:, None], np.ones((2, 1), np.float32))
    loss, back = jax.vjp(lambda p: cross_entropy_from_probs(p, targets), probs)
    np.testing.assert_array_equal(np.isnan(loss), [False, True])
    for cotangent in [1.0, 0.0], [1.0, 1.0]:
        (gradient,) = back(jnp.array(cotangent))
        np.testing.assert_allclose(gradient[0], [0, -1 / 0.3, 0], rtol=4 * EPS)
    np.testing.assert_array_equal(np.isnan(gradient[1]), True)


@pytest.mark.parametrize("how", ["ignored", "weight 0", "sparse"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_does_not_count_may_hold_anything(how, smoothing, probs):
    options = {"label_smoothing": smoothing}
    targets = LABELS
    if how == "weight 0":
        options["weights"] = np.array([1, 0, 1, 0, 1], np.float32)
    else:
        options["ignore_index"] = 3
    if how == "sparse":
        targets = SparseTargets(LABELS[:, None], np.ones((N, 1), np.float32))

    @jax.jit
    def loss_and_gradient(p):
        loss, back = jax.vjp(lambda p: cross_entropy_from_probs(p, targets, **options), p)
        return loss, back(jnp.ones_like(loss))[0]

    for content in (np.nan, np.inf, -1.0, 0.0):
        probs[[1, 3]] = content
        loss, grad = loss_and_gradient(probs)
        np.testing.assert_array_equal(loss[np.array([1, 3])], [0, 0])
        np.testing.assert_array_equal(grad[np.array([1, 3])], np.zeros((2, V)))
        assert np.isfinite(grad).all()
        assert np.isfinite(loss).all()
        assert np.abs(grad).sum(-1)[[0, 2, 4]].min() > 0
    mean = cross_entropy_from_probs(probs, targets, reduction="mean", **options)
    np.testing.assert_allclose(mean, np.asarray(loss).sum() / 3, rtol=RTOL)


def test_transforms(probs):
    rows = jax.vmap(cross_entropy_from_probs)(probs, LABELS)
    np.testing.assert_array_equal(rows, cross_entropy_from_probs(probs, LABELS))
    tangent = jax.jvp(lambda p: cross_entropy_from_probs(p, LABELS), (probs,), (jnp.ones_like(probs),))[1]
    np.testing.assert_allclose(tangent, -1 / probs[np.arange(N), LABELS], rtol=RTOL)
    hessian = jax.hessian(lambda p: cross_entropy_from_probs(p, LABELS[0]))(probs[0])
    wanted = np.zeros((V, V))
    wanted[0, 0] = 1 / np.float64(probs[0, 0]) ** 2
    np.testing.assert_allclose(hessian, wanted, rtol=RTOL)
