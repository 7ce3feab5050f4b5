"""From the terms of a row to the loss: each option against its formula in float64 NumPy, and what never counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import SparseTargets, softmax_cross_entropy

EPS = float(np.finfo(np.float32).eps)
# A loss is within 16 ε of the truth; reductions and options add a few roundings to each term.
RTOL = 32 * EPS
N, V = 6, 7
LABELS = np.array([3, 0, 6, 3, 2, 0], np.int32)


@pytest.fixture
def logits(rng):
    return (3 * rng.normal(size=(N, V))).astype(np.float32)


@pytest.fixture
def class_weights(rng):
    return rng.uniform(0.2, 3, V).astype(np.float32)


@pytest.fixture
def weights(rng):
    return rng.uniform(0.2, 3, N).astype(np.float32)


def log_softmax(z):
    z = z.astype(np.float64)
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logsumexp(z):
    z = z.astype(np.float64)
    return z.max(-1) + np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))


def one_hot(labels, num_classes=V):
    return np.eye(num_classes)[labels]


def per_row(z, t, w=1.0, smoothing=0.0, where=None):
    """Σ_c w_c ((1−ε) t_c + ε/V) (−log p_c), over the classes that take part."""
    where = np.ones(z.shape, bool) if where is None else np.broadcast_to(where, z.shape)
    log_p = log_softmax(np.where(where, z, -np.inf))
    smoothed = (1 - smoothing) * t.astype(np.float64) + smoothing / where.sum(-1, keepdims=True)
    return -np.sum(np.where(where, w * smoothed * np.where(where, log_p, 0), 0), -1)


def dense(targets):
    """The [N, V] distribution that any kind of target stands for."""
    if isinstance(targets, SparseTargets):
        out = np.zeros((N, V))
        for k in range(targets.indices.shape[-1]):
            out += one_hot(targets.indices[:, k]) * targets.probs[:, k, None].astype(np.float64)
        return out
    return one_hot(targets) if targets.dtype == np.int32 else targets.astype(np.float64)


@pytest.fixture
def targets_of(rng):
    second = (LABELS + np.array([1, 0, 1, 2, 3, 0])) % V  # two rows hold one class twice
    sparse_probs = rng.dirichlet(np.ones(2), N).astype(np.float32)
    return {
        "index": LABELS,
        "probs": rng.dirichlet(np.ones(V), N).astype(np.float32),
        "sparse": SparseTargets(np.stack([LABELS, second], -1).astype(np.int32), sparse_probs),
    }


# --- reductions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["index", "one-hot", "sparse"])
def test_the_worked_case(kind):
    """One data set, one set of class weights, two answers: what PyTorch gives for labels and for one-hot targets."""
    logits = np.array([[2.3, 2.1, 4.5], [4.2, 3.2, 5.1]], np.float32)
    labels = np.array([1, 2])
    targets = {
        "index": labels,
        "one-hot": np.eye(3, dtype=np.float32)[labels],
        "sparse": SparseTargets(labels[:, None], np.ones((2, 1), np.float32)),
    }[kind]
    options = {"class_weights": np.array([25, 25, 100], np.float32)}
    mean = softmax_cross_entropy(logits, targets, reduction="mean", **options)
    mean_count = softmax_cross_entropy(logits, targets, reduction="mean_count", **options)
    np.testing.assert_allclose(mean, 0.8705, atol=5e-5)
    np.testing.assert_allclose(mean_count, 54.4052, atol=5e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", ["", "classes", "examples", "both"])
@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
def test_reductions(kind, weighted, smoothing, logits, class_weights, weights, targets_of):
    targets = targets_of[kind]
    t = dense(targets)
    options = {"label_smoothing": smoothing}
    w, a = np.ones(V), np.ones(N)
    if weighted in ("classes", "both"):
        options["class_weights"], w = class_weights, class_weights.astype(np.float64)
    if weighted in ("examples", "both"):
        options["weights"], a = weights, weights.astype(np.float64)
    loss = a * per_row(logits, t, w, smoothing)
    # PyTorch divides by w_y however much is smoothed; the class weight of a distribution is its mean.
    applied = a * ((t * w).sum(-1) if weighted in ("classes", "both") else 1)
    wanted = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / applied.sum(), "mean_count": loss.sum() / N}
    every = jax.jit(lambda z: {r: softmax_cross_entropy(z, targets, reduction=r, **options) for r in wanted})
    for reduction, got in every(logits).items():
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted[reduction], rtol=RTOL, err_msg=reduction)


def test_what_each_mean_counts(logits):
    """Ignored examples are in neither divisor; those of weight 0 are examples all the same for mean_count."""
    labels = np.array([3, -1, 6, -1, 2, 0])
    weights = np.array([2, 5, 0, 0, 1, 1], np.float32)
    total = (weights * per_row(logits, one_hot(labels)))[[0, 2, 4, 5]].sum()
    options = {"ignore_index": -1, "weights": weights}
    np.testing.assert_allclose(softmax_cross_entropy(logits, labels, reduction="mean", **options), total / 4, RTOL)
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, labels, reduction="mean_count", **options), total / 4, RTOL
    )
    weights[0] = 7  # now Σ weights is 9, and there are still 4 examples
    total = (weights * per_row(logits, one_hot(labels)))[[0, 2, 4, 5]].sum()
    np.testing.assert_allclose(softmax_cross_entropy(logits, labels, reduction="mean", **options), total / 9, RTOL)
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, labels, reduction="mean_count", **options), total / 4, RTOL
    )


NOTHING = {
    "all ignored": {"targets": np.full(N, -1), "ignore_index": -1},
    "all weights 0": {"weights": np.zeros(N, np.float32)},
    "one weight 0": {"weights": np.float32(0)},
    "no classes": {"where": np.zeros((1, V), bool)},
    "no examples": {"where": np.zeros(N, bool)},
}


@pytest.mark.parametrize("reduction", ["mean", "mean_count"])
@pytest.mark.parametrize("case", NOTHING)
def test_nothing_left_to_average(case, reduction, logits, class_weights):
    options = {"targets": LABELS, "weights": np.ones(N, np.float32)} | NOTHING[case]
    targets, weights = options.pop("targets"), options.pop("weights")

    @jax.jit
    def loss_and_gradients(z, a, w):
        def loss(z, a, w, smoothing, z_loss):
            rest = {"label_smoothing": smoothing, "z_loss": z_loss, "reduction": reduction}
            return softmax_cross_entropy(z, targets, weights=a, class_weights=w, **rest, **options)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(z, a, w, 0.1, 0.1)

    for content in (logits, np.full_like(logits, np.nan), np.full_like(logits, np.inf)):
        value, grads = loss_and_gradients(content, weights, class_weights)
        assert value == 0
        for argument, grad in zip(("logits", "weights", "class_weights", "smoothing", "z_loss"), grads, strict=True):
            if argument == "weights" and reduction == "mean_count" and "weight" in case:
                continue  # it does depend on weights that are 0 now: the derivative is the loss they would let in
            np.testing.assert_array_equal(grad, np.zeros_like(grad), err_msg=argument)


def test_class_weights_that_leave_nothing(logits):
    loss = lambda z: softmax_cross_entropy(z, LABELS, class_weights=np.zeros(V, np.float32), reduction="mean")  # noqa: E731
    value, grad = jax.value_and_grad(loss)(logits)
    assert value == 0
    np.testing.assert_array_equal(grad, np.zeros_like(grad))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_count"])
def test_an_empty_batch(reduction):
    loss, aux = softmax_cross_entropy(
        np.zeros((0, V), np.float32), np.zeros(0, int), reduction=reduction, return_aux=True
    )
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert not np.any(loss)
    assert aux.prediction.shape == (0,)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "mean_count"])
def test_one_example_without_batch_axes(reduction, logits):
    np.testing.assert_allclose(
        softmax_cross_entropy(logits[0], LABELS[0], reduction=reduction), per_row(logits, one_hot(LABELS))[0], RTOL
    )


def test_the_gradient_goes_through_the_divisor(logits, weights, class_weights):
    """d(Σ a l / Σ a)/da_i = (l_i − mean)/Σ a, and the same of class weights, summed over the class."""
    rows = per_row(logits, one_hot(LABELS))
    a = weights.astype(np.float64)
    mean = (a * rows).sum() / a.sum()
    grad = jax.grad(lambda a: softmax_cross_entropy(logits, LABELS, weights=a, reduction="mean"))(weights)
    np.testing.assert_allclose(grad, (rows - mean) / a.sum(), atol=RTOL * rows.max() / a.sum())

    w = class_weights.astype(np.float64)[LABELS]
    mean = (w * rows).sum() / w.sum()
    grad = jax.grad(lambda w: softmax_cross_entropy(logits, LABELS, class_weights=w, reduction="mean"))(class_weights)
    wanted = one_hot(LABELS).T @ ((rows - mean) / w.sum())
    np.testing.assert_allclose(grad, wanted, atol=2 * RTOL * rows.max() / w.sum())


# --- options --------------------------------------------------------------------------------------------------------


def test_z_loss(logits, weights, class_weights):
    """λ·lse²: weighed with the example, but not with its class."""
    lse = logsumexp(logits)
    wanted = weights * (per_row(logits, one_hot(LABELS), class_weights.astype(np.float64)) + 0.3 * lse**2)
    options = {"weights": weights, "class_weights": class_weights}
    got = softmax_cross_entropy(logits, LABELS, z_loss=0.3, **options)
    np.testing.assert_allclose(got, wanted, rtol=RTOL)

    p = np.exp(log_softmax(logits))
    with_z, without = (
        jax.grad(lambda z, c=c: softmax_cross_entropy(z, LABELS, z_loss=c, reduction="sum"))(logits) for c in (0.3, 0)
    )
    wanted = 2 * 0.3 * lse[:, None] * p
    np.testing.assert_allclose(with_z - without, wanted, atol=RTOL * (1 + np.abs(wanted).max()))


@pytest.mark.parametrize("implementation", ["xla", "autodiff"])
@pytest.mark.parametrize("first", ["class weights", "targets"])
def test_mixed_second_derivatives_in_class_weights_and_targets(first, implementation, logits):
    """Where either is 0, too: the loss is the product of both with the surprise."""
    weights, targets = np.float32([0, 1, 1, 0, 2, 1, 1]), one_hot(LABELS).astype(np.float32)

    def loss(weights, targets):
        options = {"class_weights": weights, "reduction": "sum", "implementation": implementation}
        return softmax_cross_entropy(logits, targets, **options)

    order = (0, 1) if first == "class weights" else (1, 0)
    mixed = jax.jit(jax.jacrev(jax.grad(loss, order[0]), order[1]))(weights, targets)
    surprise = -log_softmax(logits)
    wanted = np.einsum("nc,cd->cnd", surprise, np.eye(V))  # in w_c and t_nd
    wanted = wanted if first == "class weights" else np.moveaxis(wanted, 0, -1)
    np.testing.assert_allclose(mixed, wanted, rtol=RTOL)


@pytest.mark.parametrize("implementation", ["xla", "autodiff"])
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_softcap(size, implementation, logits):
    """The loss of c·tanh(z/c), masked after it."""
    where = np.arange(V) != 5
    z, c = size * logits, 4.0
    capped = (c * np.tanh(z.astype(np.float64) / c)).astype(np.float32)
    options = {"logit_softcap": c, "implementation": implementation, "reduction": "sum", "label_smoothing": 0.1}
    value, grad = jax.jit(jax.value_and_grad(lambda z: softmax_cross_entropy(z, LABELS, where=where, **options)))(z)
    wanted = per_row(capped, one_hot(LABELS), smoothing=0.1, where=where)
    # The capped logits are rounded: each is off by up to c·ε, whatever the loss does with it.
    np.testing.assert_allclose(value, wanted.sum(), rtol=RTOL, atol=2 * N * c * EPS)

    slope = 1 - np.tanh(z.astype(np.float64) / c) ** 2
    p = np.exp(log_softmax(np.where(where, capped, -np.inf)))
    wanted = slope * (p - np.where(where, 0.9 * one_hot(LABELS) + 0.1 / (V - 1), 0))
    # (1 − t)(1 + t) has the error of t, times 2, where t is close to 1.
    np.testing.assert_allclose(grad, wanted, atol=RTOL)


def test_smoothing_counts_the_classes_that_take_part(logits, class_weights):
    where = np.ones((N, V), bool)
    where[0, 1:5] = [False, True, True, False]
    where[1, 4:] = False
    where[2, :6] = False  # one class left
    for options in ({}, {"class_weights": class_weights}):
        w = options.get("class_weights", np.ones(V)).astype(np.float64)
        got = softmax_cross_entropy(logits, LABELS, where=where, label_smoothing=0.3, **options)
        np.testing.assert_allclose(got, per_row(logits, one_hot(LABELS), w, 0.3, where), rtol=RTOL, atol=EPS)
    assert got[2] == 0


@pytest.mark.parametrize("implementation", ["xla", "autodiff"])
def test_smoothing_of_1_needs_no_target(implementation, logits):
    """The label has weight 0 then, so that it may be a class that takes no part, of infinite loss otherwise."""
    where = np.arange(V) != LABELS[0]
    options = {"where": where, "implementation": implementation}

    def loss(z, smoothing):
        return softmax_cross_entropy(z, LABELS, label_smoothing=smoothing, **options)

    uniform = per_row(logits, np.zeros((N, V)), 1.0, 1.0, where)
    np.testing.assert_allclose(loss(logits, 1.0), uniform, rtol=RTOL)
    assert loss(logits, 0.5)[0] == np.inf
    grad = jax.grad(lambda z: loss(z, 1.0).sum())(logits)
    wanted = np.where(where, np.exp(log_softmax(np.where(where, logits, -np.inf))) - 1 / (V - 1), 0)
    np.testing.assert_allclose(grad, wanted, atol=RTOL)


@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
def test_rows_without_classes_count_for_nothing(kind, logits, targets_of):
    where = np.ones((N, V), bool)
    where[[1, 4]] = False
    logits = logits.copy()
    logits[4] = np.nan
    targets, left = targets_of[kind], [0, 2, 3, 5]
    rows = np.zeros(N)
    rows[left] = per_row(np.nan_to_num(logits), dense(targets), smoothing=0.1)[left]
    options = {"where": where, "label_smoothing": 0.1}
    got, aux = softmax_cross_entropy(logits, targets, return_aux=True, **options)
    np.testing.assert_allclose(got, rows, rtol=RTOL)
    np.testing.assert_array_equal(aux.weight, np.isin(np.arange(N), left))
    mean = jax.jit(jax.value_and_grad(lambda z: softmax_cross_entropy(z, targets, reduction="mean_count", **options)))
    value, grad = mean(logits)
    np.testing.assert_allclose(value, rows.sum() / 4, rtol=RTOL)
    np.testing.assert_array_equal(grad[np.array([1, 4])], np.zeros((2, V)))
    assert np.isfinite(grad).all()
    assert np.abs(grad).sum(-1)[left].min() > 0


def test_a_row_of_one_class_counts():
    where = np.array([[False, True, False], [False, False, False]])

    def loss(z):
        return softmax_cross_entropy(z, np.int32([1, 1]), where=where, z_loss=0.25, reduction="mean_count")

    value, grad = jax.value_and_grad(loss)(jnp.full((2, 3), 2.0))
    assert value == 0.25 * 2.0**2
    np.testing.assert_array_equal(grad, [[0, 2 * 0.25 * 2.0, 0], [0, 0, 0]])


def test_the_gradient_of_narrow_sparse_targets_is_rounded_once(rng, logits, class_weights):
    """It has a part from the loss, one from the negative log-likelihood and, here, one from the weight in the mean."""
    indices = rng.integers(0, V, (N, 3)).astype(np.int32)
    probs = jnp.asarray(rng.dirichlet(np.ones(3), N), jnp.bfloat16)

    def loss(p):
        targets = SparseTargets(indices, p)
        mean, aux = softmax_cross_entropy(
            logits, targets, class_weights=class_weights, reduction="mean", return_aux=True
        )
        return mean + jnp.sum(aux.nll)

    exact = jax.grad(loss)(probs.astype(jnp.float32))
    np.testing.assert_array_equal(jax.grad(loss)(probs), exact.astype(jnp.bfloat16))


def test_ignore_index_of_sparse_targets(logits):
    """An entry with this index has probability 0; an example of nothing else is ignored."""
    indices = np.array([[3, -1], [-1, 0], [-1, -1], [-1, -1], [2, 4], [0, 0]])
    probs = np.tile(np.array([0.75, 0.25], np.float32), (N, 1))
    t = np.zeros((N, V))
    for n, k in np.ndindex(N, 2):
        if indices[n, k] >= 0:
            t[n, indices[n, k]] += probs[n, k]
    logits[2] = np.nan
    rows = per_row(np.nan_to_num(logits), t)
    rows[2:4] = 0
    targets = SparseTargets(indices, probs)
    loss, aux = softmax_cross_entropy(logits, targets, ignore_index=-1, return_aux=True)
    np.testing.assert_allclose(loss, rows, rtol=RTOL)
    np.testing.assert_array_equal(aux.weight, [1, 1, 0, 0, 1, 1])
    mean = softmax_cross_entropy(logits, targets, ignore_index=-1, reduction="mean_count")
    np.testing.assert_allclose(mean, rows.sum() / 4, rtol=RTOL)
    grad = jax.grad(lambda z: softmax_cross_entropy(z, targets, ignore_index=-1, reduction="sum"))(logits)
    np.testing.assert_array_equal(grad[2:4], np.zeros((2, V)))
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("implementation", ["xla", "autodiff"])
def test_a_label_that_is_no_class_in_an_example_of_weight_0(implementation, logits):
    """Padding that is left out by its weight: it has no loss of its own to tell, nor to the gradient in the weight."""
    weights, labels = np.ones(N, np.float32), LABELS.copy()
    weights[[1, 3]], labels[[1, 3]] = 0, [-1, V]

    def loss(weights):
        options = {"reduction": "sum", "return_aux": True, "implementation": implementation}
        return softmax_cross_entropy(logits, labels, weights=weights, **options)

    gradient, aux = jax.grad(loss, has_aux=True)(weights)
    wanted = weights * -log_softmax(logits)[np.arange(N), LABELS]
    np.testing.assert_allclose(gradient, wanted, rtol=RTOL)
    np.testing.assert_allclose(aux.nll, wanted, rtol=RTOL)


@pytest.mark.parametrize("implementation", ["xla", "autodiff"])
def test_the_gradient_in_the_probability_of_an_entry_that_is_no_class(implementation, logits):
    def loss(probs):
        targets = SparseTargets(np.stack([LABELS, np.full(N, V)], -1), probs)
        return jnp.sum(softmax_cross_entropy(logits, targets, implementation=implementation))

    gradient = jax.grad(loss)(np.tile(np.float32([1, 0]), (N, 1)))
    wanted = np.stack([-log_softmax(logits)[np.arange(N), LABELS], np.zeros(N)], -1)
    np.testing.assert_allclose(gradient, wanted, rtol=RTOL)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 255])
def test_any_integer_marks_what_to_ignore(ignore_index, logits):
    labels = LABELS.copy()
    labels[[0, 3]] = ignore_index
    loss = softmax_cross_entropy(logits, labels, ignore_index=ignore_index)
    wanted = np.where(labels == ignore_index, 0, per_row(logits, one_hot(np.clip(labels, 0, V - 1))))
    np.testing.assert_allclose(loss, wanted, rtol=RTOL)


def test_a_weight_broadcasts_over_the_batch(rng):
    logits = rng.normal(size=(2, 3, V)).astype(np.float32)
    labels = rng.integers(0, V, (2, 3))
    rows = softmax_cross_entropy(logits, labels)
    for weights in (np.float32(2), np.array([1, 0, 2], np.float32), np.array([[3], [1]], np.float32)):
        got = softmax_cross_entropy(logits, labels, weights=weights)
        np.testing.assert_array_equal(got, np.asarray(rows) * weights)
        mean = softmax_cross_entropy(logits, labels, weights=weights, reduction="mean")
        np.testing.assert_allclose(mean, np.average(rows, weights=np.broadcast_to(weights, (2, 3))), rtol=RTOL)


# --- aux ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
def test_aux(kind, reduction, dtype, logits, class_weights, weights, targets_of):
    targets = targets_of[kind]
    t = dense(targets)
    logits = jnp.asarray(logits).astype(dtype)
    options = {"label_smoothing": 0.3, "z_loss": 0.1, "weights": weights, "class_weights": class_weights}
    loss, aux = softmax_cross_entropy(logits, targets, reduction=reduction, return_aux=True, **options)
    z = np.asarray(logits.astype(jnp.float32))
    log_p = log_softmax(z)
    assert isinstance(aux, jaxce.CrossEntropyAux)
    assert loss.dtype == jnp.float32
    wanted = {
        "nll": per_row(z, t),
        "log_normalizer": logsumexp(z),
        "entropy": -(np.exp(log_p) * log_p).sum(-1),
        "prediction": z.argmax(-1),
        "weight": weights * (t * class_weights.astype(np.float64)).sum(-1),
    }
    for name, value in wanted.items():
        got = getattr(aux, name)
        assert got.shape == (N,)
        assert got.dtype == (jnp.int32 if name == "prediction" else jnp.float32)
        np.testing.assert_allclose(got, value, rtol=RTOL, atol=RTOL if name == "log_normalizer" else 0, err_msg=name)


@pytest.mark.parametrize("field", ["nll", "log_normalizer", "entropy"])
@pytest.mark.parametrize("implementation", ["xla", "autodiff"])
def test_gradients_of_aux(field, implementation, logits, rng):
    """Each alone, with its own cotangent: p − t, p and −p (log p + H)."""
    log_p = log_softmax(logits)
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(-1, keepdims=True)
    by_field = {"nll": p - one_hot(LABELS), "log_normalizer": p, "entropy": -p * (log_p + entropy)}
    cotangent = rng.normal(size=N).astype(np.float32)

    def value(z):
        aux = softmax_cross_entropy(z, LABELS, label_smoothing=0.2, return_aux=True, implementation=implementation)[1]
        return jnp.sum(cotangent * getattr(aux, field))

    wanted = cotangent[:, None] * by_field[field]
    np.testing.assert_allclose(jax.grad(value)(logits), wanted, atol=RTOL * np.abs(cotangent).max() * 4)


def test_the_gradient_of_the_tail(logits):
    """Of the log of the mass outside the ids: the others' softmax among themselves, less that among all."""
    ids = np.argsort(-logits, -1)[:, :3]  # most of the mass
    grad = jax.grad(lambda z: jnp.sum(jaxce.log_probs(z, ids, return_aux=True)[1].tail))(logits)
    p = np.exp(log_softmax(logits))
    others = np.where((ids[..., None] == np.arange(V)).any(-2), 0, p)
    np.testing.assert_allclose(grad, others / others.sum(-1, keepdims=True) - p, atol=RTOL)


def test_class_weights_of_each_of_many(logits, rng):
    many, weights = np.stack([logits, 2 * logits, -logits]), rng.uniform(0.2, 3, (3, V)).astype(np.float32)

    def loss(z, w):
        return softmax_cross_entropy(z, LABELS, class_weights=w, label_smoothing=0.3)

    for got, z, w in zip(jax.vmap(loss)(many, weights), many, weights, strict=True):
        np.testing.assert_allclose(got, per_row(z, one_hot(LABELS), w.astype(np.float64), 0.3), rtol=RTOL)


def test_the_prediction_is_the_first_of_equals():
    logits = np.array([[1, 2, 2, 0], [5, 5, 5, 5], [-np.inf, -np.inf, -1, -1], [0, 3, 9, 9]], np.float32)
    where = np.array([[True, True, False, True]])
    options = {"targets": np.zeros(4, int), "return_aux": True}
    np.testing.assert_array_equal(softmax_cross_entropy(logits, **options)[1].prediction, [1, 0, 2, 2])
    np.testing.assert_array_equal(softmax_cross_entropy(logits, where=where, **options)[1].prediction, [1, 0, 3, 3])


def test_aux_of_ignored_examples(logits):
    labels = LABELS.copy()
    labels[[0, 1]] = -1
    logits[0] = np.nan
    aux = softmax_cross_entropy(logits, labels, ignore_index=-1, return_aux=True)[1]
    np.testing.assert_array_equal(aux.nll[:2], [0, 0])
    np.testing.assert_array_equal(aux.weight, [0, 0, 1, 1, 1, 1])
    assert np.isfinite(aux.entropy).all()
    assert np.isfinite(aux.log_normalizer).all()


def test_aux_is_a_pytree(logits):
    aux = jax.jit(lambda z: softmax_cross_entropy(z, LABELS, return_aux=True)[1])(logits)
    doubled = jax.tree.map(lambda x: x + x, aux)
    np.testing.assert_array_equal(doubled.nll, 2 * aux.nll)
    assert len(jax.tree.leaves(aux)) == 5
