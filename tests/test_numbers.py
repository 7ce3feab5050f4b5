"""Every number that the losses promise, against the oracle on the very inputs given."""

import functools

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental import checkify
from oracle import Cotangents, Problem, assert_within, half_ulp, lower

import jaxce
from jaxce import lookup, stats, sums
from jaxce.arguments import Options
from tests.pairwise import pairwise

IMPLEMENTATIONS = [None, "autodiff"]
F32 = np.finfo(np.float32)
by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def enable(request):
    """Call it with a dtype: 64-bit types are enabled for the rest of the test if the dtype needs them."""
    return lambda dtype: request.getfixturevalue("x64") if dtype == jnp.float64 else None


FAR = pytest.mark.xfail(
    strict=True, reason="z − max is rounded: its exponential is off by half an ulp of a difference beyond 32"
)


def named(x) -> str:
    return x.__name__ if isinstance(x, type) else str(x)


def working(dtype) -> np.finfo:
    return np.finfo(np.float64 if dtype == jnp.float64 else np.float32)


# --- integer labels -------------------------------------------------------------------------------------------------


def index_cases(rng: np.random.Generator, num_classes: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Rows of logits of every kind, in `dtype`, each with the likeliest class, the least likely one and a random one as
    the label: [N, V] and [N]."""
    v = num_classes
    normal = rng.standard_normal
    one = np.arange(v) == rng.integers(v)
    two = one | (np.arange(v) == rng.integers(v))
    kinds = [normal(v) * scale for scale in (0.1, 1, 10, 100)]
    kinds += [
        normal(v) * 1e-6,
        normal(v) * 1e-30,  # all equal but for numbers that vanish beside 1 (in f16: all zero)
        np.full(v, 3.7),  # tied
        np.where(two, 5.0, normal(v)),  # two tied at the top
        np.where(rng.random(v) < 0.5, 1e4, -1e4),
        -20 + 0.01 * normal(v),
        np.where(one, 20.0, 0.0),  # one dominant
        np.where(one, 17.0, 3.0) + normal(v) * 0.1,
        np.where((rng.random(v) < 0.5) & ~one, -np.inf, normal(v)),
        np.where(one, 2.0, -np.inf),
        np.where(one, 256.0, 255.0),
        # A common offset, with differences that the dtype still resolves there.
        1024 + rng.integers(0, 8, v) * 8.0,
    ]
    if dtype in (jnp.float32, jnp.float64):
        for offset in (1e6, -3e8, 1e30):
            kinds.append(offset + rng.integers(0, 8, v) * np.spacing(np.abs(np.asarray(offset, dtype))).astype(float))
        kinds.append(1e30 * np.where(one, 1 + 1e-6, 1.0))
        kinds.append(np.where(two, 1e30, -1e30))
    logits = np.stack(kinds).astype(dtype)
    likeliest = np.argmax(logits, -1)
    least = np.argmin(np.where(np.isfinite(logits), logits.astype(np.float64), np.inf), -1)
    random = np.array([rng.choice(np.flatnonzero(np.isfinite(row))) for row in logits.astype(np.float64)])
    return np.concatenate([logits] * 3), np.concatenate([likeliest, least, random]).astype(np.int32)


@functools.partial(jax.jit, static_argnames="implementation")
def loss_and_gradient(logits, labels, implementation=None):
    loss, pull = jax.vjp(lambda z: jaxce.softmax_cross_entropy(z, labels, implementation=implementation), logits)
    return loss, pull(jnp.ones_like(loss))[0]


def check_index(logits, labels, loss, gradient, *, looser=False, what=""):
    """The bounds of the table. `looser` is what the autodiff implementation promises: the distance between the target
    and the runner-up adds to the relative error of the loss."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    info = working(logits.dtype)
    chex.assert_type(loss, info.dtype)
    chex.assert_type(gradient, logits.dtype)
    problem = Problem(logits, oracle.one_hot(labels, logits.shape[-1]), precise=logits.dtype == np.float64)
    exact = problem.losses().loss.value
    exact_gradient = problem.gradients(Cotangents(loss=np.ones(len(labels)))).logits.value
    below = lower(problem.softmax.below)
    finite_below = np.where(np.isfinite(below), below, 0)

    # exp underflows, to zero or gradually: each class can lose the smallest normal number.
    floor = float(info.smallest_normal)
    runner_up = np.min(np.where(np.arange(logits.shape[-1]) == labels[:, None], np.inf, below), -1, initial=np.inf)
    slack = 16 + (np.where(np.isfinite(runner_up), runner_up, 0) if looser else 0)
    assert_within(loss, exact, slack * info.eps * lower(exact) + floor * logits.shape[-1], f"{what} loss")

    entry = (16 + finite_below + (slack[:, None] - 16 if looser else 0)) * info.eps * abs(lower(exact_gradient)) + floor
    # The label's entry is a sum over all the others, each of which may have underflowed.
    entry[np.arange(len(labels)), labels] += floor * logits.shape[-1]
    # The result is rounded to the dtype of the logits, which for f16 and bf16 is most of the error.
    rounding = 0 if logits.dtype == info.dtype else half_ulp(exact_gradient, logits.dtype)
    assert_within(gradient, exact_gradient, entry + rounding, f"{what} gradient")

    g = np.asarray(gradient).astype(np.float64)
    row_sum = 4 * info.eps * np.max(abs(g), -1) + np.sum(rounding * np.ones_like(g), -1) * (logits.dtype != info.dtype)
    assert_within(np.sum(g, -1), np.zeros(len(g)), row_sum + floor * logits.shape[-1], f"{what} row sum")
    assert not np.any(g[(lower(exact_gradient) == 0)]), "an entry that is 0 exactly"


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("implementation", "dtype", "num_classes"),
    [(None, jnp.float32, v) for v in (1, 2, 3, 10, 33, 257, 1000, 2500)]
    + [(None, dtype, v) for dtype in (jnp.float16, jnp.bfloat16) for v in (2, 33, 2500)]
    + [(None, jnp.float64, v) for v in (1, 2, 33, 257)]
    + [("autodiff", jnp.float32, v) for v in (1, 2, 33, 2500)]
    + [("autodiff", dtype, 33) for dtype in (jnp.float16, jnp.bfloat16, jnp.float64)],
    ids=named,
)
def test_index_labels(rng, enable, dtype, num_classes, implementation):
    enable(dtype)
    logits, labels = index_cases(rng, num_classes, dtype)
    if dtype == jnp.float64 and num_classes > 100:  # mpmath takes its time
        logits, labels = logits[::4], labels[::4]
    loss, gradient = loss_and_gradient(logits, labels, implementation=implementation)
    check_index(logits, labels, loss, gradient, looser=implementation == "autodiff")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=named)
def test_index_labels_eagerly_and_one_by_one(rng, enable, dtype):
    enable(dtype)
    logits, labels = index_cases(rng, 10, dtype)
    loss = jaxce.softmax_cross_entropy(logits, labels)
    gradient = jax.grad(lambda z: jnp.sum(jaxce.softmax_cross_entropy(z, labels)))(jnp.asarray(logits))
    check_index(logits, labels, loss, gradient, what="eager")
    # Logits of one axis: an example without a batch.
    check_index(logits, labels, *jax.vmap(jax.value_and_grad(jaxce.softmax_cross_entropy))(logits, labels), what="vmap")
    loss, gradient = jax.value_and_grad(jaxce.softmax_cross_entropy)(jnp.asarray(logits[2]), labels[2])
    check_index(logits[2:3], labels[2:3], loss[None], gradient[None], what="one example")


WRONG = {  # the second row and its label; what is given for it, and a weight of 0 that it has in the loss
    "label, class weight": ([0.1, 0.2, 0.7], 3, {"class_weights": np.array([0, 1, 0], np.float32)}),
    "negative label, class weight": ([0.1, 0.2, 0.7], -1, {"class_weights": np.array([0, 1, 0], np.float32)}),
    "label, smoothing": ([0.1, 0.2, 0.7], 100, {"label_smoothing": 1.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "kind", "implementation"), pairwise(WRONG, ["index", "sparse"], IMPLEMENTATIONS))
def test_no_factor_of_0_hides_what_is_wrong_with_a_row(implementation, kind, wrong):
    """Loss and gradient are NaN there for each of the losses, and in that row alone."""
    second, label, options = WRONG[wrong]
    labels = np.array([1, label])
    targets = labels if kind == "index" else jaxce.SparseTargets(labels[:, None], np.ones((2, 1), np.float32))
    linear = functools.partial(jaxce.linear_cross_entropy, kernel=jnp.eye(3), targets=targets, **options)
    losses = [
        lambda z: jaxce.softmax_cross_entropy(z, targets, implementation=implementation, **options),
        lambda z: jaxce.cross_entropy_from_probs(z, targets, **options),
        lambda z: linear(z, implementation=implementation),
        lambda z: linear(z, implementation=implementation, return_aux=True)[1].nll,
    ]
    for loss in losses:
        values, back = jax.vjp(loss, jnp.array([[0.1, 0.2, 0.7], second]))
        np.testing.assert_array_equal(np.isnan(values), [False, True])
        np.testing.assert_array_equal(np.isnan(back(jnp.ones(2))[0]), [[False] * 3, [True] * 3])


@by_implementation
@pytest.mark.parametrize("kind", ["index", "probs", "sparse"])
@pytest.mark.parametrize("cap", [None, 4.0])
def test_a_masked_class_may_hold_anything(implementation, kind, cap, rng):
    """Value and gradient are as if it held 0; its own gradient is 0."""
    where = np.array([True, False, True, True])
    z = rng.normal(size=(5, 4)).astype(np.float32)
    p = np.where(where, rng.dirichlet(np.ones(4), 5), 0).astype(np.float32)
    labels = np.array([0, 2, 3, 0, 2])
    targets = {"index": labels, "probs": p, "sparse": jaxce.SparseTargets(labels[:, None], p[:, :1])}[kind]
    options = {"where": where, "logit_softcap": cap, "label_smoothing": 0.1, "z_loss": 0.01}

    @jax.jit
    def loss_and_gradient(z):
        return jax.value_and_grad(
            lambda z: jaxce.softmax_cross_entropy(z, targets, reduction="sum", implementation=implementation, **options)
        )(z)

    wanted = loss_and_gradient(np.where(where, z, 0).astype(np.float32))
    for held in np.nan, np.inf, -np.inf, 1e30:
        loss, gradient = loss_and_gradient(np.where(where, z, np.float32(held)))
        np.testing.assert_array_equal(loss, wanted[0], err_msg=str(held))
        np.testing.assert_array_equal(gradient, wanted[1], err_msg=str(held))
    np.testing.assert_array_equal(wanted[1][:, 1], 0)


@pytest.mark.slow
@pytest.mark.optimized
@by_implementation
@pytest.mark.parametrize(
    ("dtype", "num_classes"),
    [
        (jnp.float32, 50257),
        (jnp.float32, 262_144),
        (jnp.bfloat16, 50257),
        (jnp.float16, 131_072),  # the sum is twice the largest f16
        (jnp.float64, 2500),
    ],
    ids=named,
)
def test_large_vocabularies(rng, enable, dtype, num_classes, implementation):
    enable(dtype)
    normal = rng.standard_normal
    one = np.arange(num_classes) == num_classes - 2
    kinds = [np.where(one, 30.0, normal(num_classes))]
    if dtype != jnp.float64:
        kinds += [
            normal(num_classes),
            10 * normal(num_classes),
            np.zeros(num_classes),
            -20 + 0.01 * normal(num_classes),
        ]
    logits = np.stack(kinds * 2).astype(dtype)
    labels = np.concatenate([np.argmax(logits[: len(kinds)], -1), rng.integers(0, num_classes, len(kinds))])
    labels = labels.astype(np.int32)
    loss, gradient = loss_and_gradient(logits, labels, implementation=implementation)
    check_index(logits, labels, loss, gradient, looser=implementation == "autodiff")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=named)
@pytest.mark.parametrize("gap", [32, pytest.param(80, marks=FAR)])
def test_a_target_far_above_all_others(rng, enable, dtype, gap):
    enable(dtype)
    top = rng.uniform(-gap, gap, 300).astype(dtype)
    logits = np.stack([top, top - (gap * rng.uniform(0.8, 1, 300)).astype(dtype)], -1)
    labels = np.zeros(300, np.int32)
    check_index(logits, labels, *loss_and_gradient(logits, labels))


@by_implementation
def test_empty_batch(implementation):
    loss, gradient = loss_and_gradient(jnp.zeros((0, 7)), jnp.zeros(0, jnp.int32), implementation=implementation)
    chex.assert_shape((loss, gradient), [(0,), (0, 7)])
    for reduction in ("sum", "mean", "mean_count"):
        assert jaxce.softmax_cross_entropy(jnp.zeros((0, 7)), jnp.zeros(0, jnp.int32), reduction=reduction) == 0


@pytest.mark.parametrize("v", [1000, 1009])
def test_an_empty_batch_of_many_classes(v):
    """Rows of more than 128 are added up in groups, of which there are none here."""
    z, labels = jnp.zeros((0, v)), jnp.zeros(0, jnp.int32)
    for targets in labels, jnp.zeros((0, v)):
        loss, gradient = jax.value_and_grad(lambda z, t=targets: jaxce.softmax_cross_entropy(z, t).sum())(z)
        assert (loss, gradient.shape) == (0, (0, v))
        assert jaxce.softmax_cross_entropy(z, targets).shape == (0,)
    assert jaxce.distillation_loss(z, z).shape == (0,)
    h, k = jnp.zeros((0, 3)), jnp.zeros((3, v))
    for reduction in "none", "mean":
        f = functools.partial(jaxce.linear_cross_entropy, targets=labels, reduction=reduction)
        loss, gradient = jax.value_and_grad(lambda k, f=f: jnp.sum(f(h, k)))(k)
        assert loss == 0
        np.testing.assert_array_equal(gradient, 0)


FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz"]


@by_implementation
@pytest.mark.parametrize("devices", [1, 2])
def test_logits_of_eight_bits(devices, implementation):
    """Most such types have no infinity, for a class that takes no part or for the others of a label."""
    z = np.float32([[1, 2, 3, -1], [0.5, -2, 1, 4]])
    where, labels = jnp.array([True, True, False, True]), jnp.array([0, 3])
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    for dtype in FLOAT8:
        narrow = jax.device_put(jnp.asarray(z, dtype), jax.sharding.NamedSharding(mesh, jax.P()))
        for mask, classes in (None, [0, 1, 2, 3]), (where, [0, 1, 3]):
            kept = z[:, classes].astype(np.float64)
            lse = np.log(np.exp(kept).sum(-1))
            options = {"where": mask, "implementation": implementation}
            loss = functools.partial(jaxce.softmax_cross_entropy, targets=labels, **options)
            found, gradient = jax.jit(jax.value_and_grad(lambda z, f=loss: jnp.sum(f(z))))(narrow)
            np.testing.assert_allclose(found, np.sum(lse - z[[0, 1], [0, 3]]), rtol=32 * F32.eps, err_msg=dtype)
            aux = jax.jit(functools.partial(loss, return_aux=True))(narrow)[1]
            np.testing.assert_array_equal(aux.prediction, np.array(classes)[kept.argmax(-1)])
            wanted = np.zeros((2, 4))
            wanted[:, classes] = np.exp(kept - lse[:, None])
            wanted[[0, 1], [0, 3]] -= 1
            np.testing.assert_allclose(gradient.astype(np.float32), wanted, rtol=0.13, atol=0.02, err_msg=dtype)


@by_implementation
def test_worked_numbers(implementation):
    """The literal numbers of the table, with ulps of them allowed."""
    entropy = functools.partial(jaxce.softmax_cross_entropy, implementation=implementation)
    label = np.int32(0)
    close = functools.partial(np.testing.assert_allclose, rtol=4 * F32.eps)
    close(entropy(np.float32([0, -20]), label), 2.0611536181902037e-09)
    close(entropy(np.float32([1e6, 1e6 - 1]), label), 0.31326168751822286)
    close(entropy(jnp.asarray([256, 255], jnp.bfloat16), label), 0.31326168751822286)
    assert entropy(np.float32([0, -20]), label).dtype == jnp.float32
    # In bf16 the neighbours of this loss are 19.625 and 19.75.
    close(entropy(jnp.asarray([20, 17.375, 0.40625], jnp.bfloat16), np.int32(2)), 19.6636862)


@by_implementation
def test_worked_gradient_in_float64(x64, implementation):
    entropy = functools.partial(jaxce.softmax_cross_entropy, implementation=implementation)
    gradient = jax.grad(entropy)(jnp.array([37.42994775023705, 0.0]), np.int32(0))
    np.testing.assert_allclose(gradient, [-5.551115123125776e-17, 5.551115123125776e-17], rtol=1e-14)


@by_implementation
def test_a_common_offset_changes_no_digit(rng, implementation):
    """Of logits that are multiples of 1/64, so that the sums with these offsets are exact."""
    logits = (rng.integers(-2000, 2000, (64, 10)) / 64).astype(np.float32)
    labels = rng.integers(0, 10, 64).astype(np.int32)
    expected = loss_and_gradient(logits, labels, implementation=implementation)
    for offset in (0.25, -1000.0, 2.0**16, -(2.0**17)):
        moved = logits + np.float32(offset)
        np.testing.assert_array_equal(moved.astype(np.float64), logits.astype(np.float64) + offset)
        chex.assert_trees_all_equal(loss_and_gradient(moved, labels, implementation=implementation), expected)


# --- rows that are not finite ---------------------------------------------------------------------------------------

INF, NAN = np.inf, np.nan


@functools.partial(jax.jit, static_argnames="implementation")
def dense_loss_and_gradients(logits, probs, cotangent, implementation=None):
    loss, pull = jax.vjp(functools.partial(jaxce.softmax_cross_entropy, implementation=implementation), logits, probs)
    return loss, *pull(cotangent)


@by_implementation
def test_minus_infinity_with_probability_zero(implementation):
    logits = np.float32([[1.0, -INF, 2.0], [-INF, 3.0, -INF], [0.5, -INF, -1.0]])
    probs = np.float32([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    loss, gradient, _ = dense_loss_and_gradients(logits, probs, np.ones(3, np.float32), implementation=implementation)
    problem = Problem(logits, probs)
    assert_within(loss, *(problem.losses().loss * np.array([1, 16 * F32.eps])[:, None]))
    exact = problem.gradients(Cotangents(np.ones(3))).logits
    assert_within(gradient, exact.value, 16 * F32.eps * exact.size)
    np.testing.assert_array_equal(np.asarray(gradient)[np.isinf(logits)], 0)


@by_implementation
def test_minus_infinity_beside_an_index_label(implementation):
    logits, labels = np.float32([[1.0, -INF, 2.0], [-INF, 3.0, -INF]]), np.int32([2, 1])
    loss, gradient = loss_and_gradient(logits, labels, implementation=implementation)
    check_index(logits, labels, loss, gradient, looser=implementation == "autodiff")
    np.testing.assert_array_equal(np.asarray(gradient)[np.isinf(logits)], 0)


@by_implementation
def test_a_positive_target_on_minus_infinity_costs_infinity(implementation):
    logits = np.float32([[1.0, -INF, 2.0], [1.0, 0.0, 2.0]])
    entropy = functools.partial(jaxce.softmax_cross_entropy, implementation=implementation)
    for targets in (
        np.int32([1, 1]),
        np.float32([[0.5, 0.5, 0.0], [0, 1, 0]]),
        jaxce.SparseTargets(np.int32([[0, 1], [1, 1]]), np.float32([[0.9, 0.1], [1, 0]])),
    ):
        loss = entropy(logits, targets)
        assert loss[0] == INF
        assert np.isfinite(loss[1])
    assert entropy(logits, np.int32([2, 1]), label_smoothing=0.1)[0] == INF


EVERY_KIND = {
    "index": lambda n, v: np.arange(n, dtype=np.int32) % v,
    "probabilities": lambda n, v: np.full((n, v), 1 / v, np.float32),
    "sparse": lambda n, v: jaxce.SparseTargets(
        np.int32([[i % v, (i + 1) % v] for i in range(n)]), np.full((n, 2), 0.5, np.float32)
    ),
}
by_kind = pytest.mark.parametrize("kind", EVERY_KIND)


@by_implementation
@by_kind
def test_plus_infinity_that_counts_is_nan(kind, implementation):
    """∞ − ∞ has no value, and 0 would be a finite wrong number: on the target as on any other class."""
    logits, targets = np.float32([[2.0, INF, 1.0]] * 3), EVERY_KIND[kind](3, 3)
    assert np.all(np.isnan(jaxce.softmax_cross_entropy(logits, targets, implementation=implementation)))


@by_implementation
@by_kind
def test_a_hopeless_row_that_counts_is_nan(kind, implementation):
    """Whatever the options; and it spoils no other row."""
    logits = np.float32([[0.5, 1, -1], [-INF] * 3, [1, NAN, 2], [NAN, -INF, -INF], [NAN] * 3, [1, 2, 3]])
    hopeless = np.array([False, True, True, True, True, False])
    good = np.where(hopeless[:, None], np.float32(1), logits)
    targets = EVERY_KIND[kind](6, 3)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-3, "class_weights": np.float32([1, 2, 3])}):

        @jax.jit
        def both(z, options=options):
            loss, pull = jax.vjp(
                lambda z: jaxce.softmax_cross_entropy(z, targets, implementation=implementation, **options), z
            )
            return loss, pull(jnp.ones_like(loss))[0]

        loss, gradient = both(logits)
        assert np.all(np.isnan(loss[hopeless]))
        assert np.all(np.isnan(gradient[hopeless]))
        expected = both(good)
        chex.assert_trees_all_equal(
            (loss[~hopeless], gradient[~hopeless]), jax.tree.map(lambda x: x[~hopeless], expected)
        )


@functools.partial(jax.jit, static_argnames=("implementation", "ignore_index"))
def with_options(logits, options, *, targets, where=None, ignore_index=None, implementation=None):
    """The loss, and its gradients in the logits and in each option."""

    def loss(z, options):
        static = {"ignore_index": ignore_index, "implementation": implementation}
        return jaxce.softmax_cross_entropy(z, targets, where=where, **options, **static)

    value, pull = jax.vjp(loss, logits, options)
    return value, *pull(jnp.ones_like(value))


HELD_BY_ROWS_LEFT_OUT = {
    "NaN": [[NAN] * 4, [1, NAN, 2, 3], [NAN, -INF, 0, INF], [0, 0, 0, NAN], [NAN, 1, 1, 1], [1, 2, 3, 4]],
    "infinity": [[INF, 1, 2, 3], [-INF] * 4, [1, INF, -INF, 0], [-INF, -INF, 0, 1], [INF] * 4, [0, 1, 2, -INF]],
    # Finite logits whose differences, or the square of whose logsumexp, are not.
    "overflow": [[1e38, -1e38, 3e38, 0], [2e38] * 4, [-3e38, 3e38, 0, 1], [1e20] * 4, [0, 1, 2, 1e19], [-1e20] * 4],
}


@by_implementation
@by_kind
@pytest.mark.parametrize("out", ["weights", "ignore_index", "where"])
@pytest.mark.parametrize("holds", HELD_BY_ROWS_LEFT_OUT)
def test_a_row_left_out_is_zero_whatever_it_holds(rng, kind, out, holds, implementation):
    if out == "ignore_index" and kind == "probabilities":
        pytest.skip("probabilities have no index to ignore")
    logits = np.concatenate([np.float32(HELD_BY_ROWS_LEFT_OUT[holds]), rng.standard_normal((2, 4)).astype(np.float32)])
    left_out = np.arange(8) < 6
    targets = EVERY_KIND[kind](8, 4)
    options = {
        "label_smoothing": np.float32(0.1),
        "z_loss": np.float32(1e-2),
        "class_weights": np.float32([1, 2, 0, 3]),
        "weights": np.float32([1, 2, 3, 4, 5, 6, 7, 8]),
    }
    static = {"implementation": implementation}
    if out == "weights":
        options["weights"] = np.where(left_out, np.float32(0), options["weights"])
    elif out == "where":
        static["where"] = ~left_out
    else:
        static["ignore_index"] = -100

        def ignored(i):
            return np.where(left_out.reshape((8,) + (1,) * (i.ndim - 1)), np.int32(-100), i)

        targets = ignored(targets) if kind == "index" else jaxce.SparseTargets(ignored(targets.indices), targets.probs)

    run = functools.partial(with_options, targets=targets, **static)
    loss, gradient, by_option = run(logits, options)
    np.testing.assert_array_equal(loss[:6], 0)
    np.testing.assert_array_equal(gradient[:6], 0)
    # The rows that stay are what they are without the others, and so are the gradients of what all rows share.
    harmless = np.where(left_out[:, None], np.float32(0.5), logits)
    expected_loss, expected_gradient, expected_by_option = run(harmless, options)
    chex.assert_trees_all_equal((loss[6:], gradient[6:]), (expected_loss[6:], expected_gradient[6:]))
    assert np.all(np.asarray(loss[6:]) > 0)
    if out == "weights":  # what a unit of weight would cost is asked of the weights themselves, and only of them
        by_option["weights"], expected_by_option["weights"] = (
            by_option["weights"][6:],
            expected_by_option["weights"][6:],
        )
    chex.assert_trees_all_equal(by_option, expected_by_option)
    if out != "weights":
        np.testing.assert_array_equal(by_option["weights"][:6], 0)


@by_implementation
@by_kind
def test_learning_to_reweight_from_weight_zero(rng, kind, implementation):
    """d/dw of the gradient of Σ w·loss is p − t, at weight 0 as anywhere: Ren et al., "Learning to Reweight Examples",
    2018, start every example there. A row of weight 0 that is not finite stays out of it."""
    logits = np.concatenate([rng.standard_normal((5, 4)), [[NAN, 1, 2, 3]]]).astype(np.float32)
    targets = EVERY_KIND[kind](6, 4)
    probe = rng.standard_normal((6, 4)).astype(np.float32)

    def logits_gradient(weights):
        def total(z):
            return jaxce.softmax_cross_entropy(
                z, targets, weights=weights, reduction="sum", implementation=implementation
            )

        return jax.grad(total)(jnp.asarray(logits))

    rows = jax.jit(jax.jacrev(logits_gradient))(jnp.zeros(6))
    finite = logits[:5]
    t = {
        "index": lambda: oracle.one_hot(targets, 4),
        "probabilities": lambda: targets,
        "sparse": lambda: oracle.dense(targets.indices, targets.probs, 4),
    }[kind]()[:5]
    exact = Problem(finite, t).gradients(Cotangents(np.ones(5))).logits
    for i in range(5):
        assert_within(rows[i, :, i], exact.value[i], 32 * F32.eps * exact.size[i])
    off_diagonal = np.asarray(rows) * (1 - np.eye(6))[:, None, :]
    np.testing.assert_array_equal(off_diagonal, 0)
    # The same by a vector-Jacobian product, as the paper does it.
    pulled = jax.jit(lambda w: jax.vjp(logits_gradient, w)[1](jnp.asarray(probe))[0])(jnp.zeros(6))
    expected = np.sum(exact.value * probe[:5], -1)
    assert_within(pulled[:5], expected, 32 * F32.eps * np.sum(exact.size * abs(probe[:5]), -1))
    assert pulled[5] == 0


@by_implementation
@pytest.mark.parametrize("kind", ["index", "sparse"])
def test_a_label_that_is_no_class(rng, kind, implementation):
    logits = rng.standard_normal((6, 5)).astype(np.float32)
    bad = np.array([False, True, True, False, True, True])
    labels, good = np.int32([0, -1, 5, 4, 2**31 - 1, -(2**31)]), np.int32([0, 0, 0, 4, 0, 0])

    def run(labels):
        if kind == "sparse":  # spoilt by its second entry
            labels = jaxce.SparseTargets(
                np.stack([np.zeros(6, np.int32), labels], -1), np.full((6, 2), 0.5, np.float32)
            )
        return loss_and_gradient(logits, labels, implementation=implementation)

    loss, gradient = run(labels)
    assert np.all(np.isnan(loss[bad]))
    assert np.all(np.isnan(gradient[bad]))
    expected = run(good)
    chex.assert_trees_all_equal((loss[~bad], gradient[~bad]), jax.tree.map(lambda x: x[~bad], expected))


def test_checkify_names_a_label_that_is_no_class():
    checked = checkify.checkify(lambda y: jaxce.softmax_cross_entropy(jnp.zeros((3, 5)), y))
    error, _ = checked(jnp.array([0, 7, 4]))
    with pytest.raises(ValueError, match="label 7 is not one of the 5 classes"):
        checkify.check_error(error)
    error, _ = checked(jnp.array([0, 3, 4]))
    checkify.check_error(error)


@by_implementation
@by_kind
def test_classes_that_take_no_part(rng, kind, implementation):
    """They may hold anything, get no probability and no gradient, and are not counted in ε/V."""
    mask = np.array([[True, False, True, True, False]] * 3 + [[True] * 5])
    logits = rng.standard_normal((4, 5)).astype(np.float32)
    garbage = np.where(mask, logits, np.float32([NAN, INF, 1, 2, -INF]))
    inside = np.int32([0, 2, 3, 4])
    p = rng.dirichlet(np.ones(5), 4) * mask
    targets, t = {
        "index": (inside, oracle.one_hot(inside, 5)),
        "probabilities": (np.float32(p), np.float32(p)),
        "sparse": (
            jaxce.SparseTargets(np.stack([inside, inside[::-1] * 0], -1), np.float32([[0.75, 0.25]] * 4)),
            oracle.dense(np.stack([inside, inside * 0], -1), [[0.75, 0.25]] * 4, 5),
        ),
    }[kind]
    v = np.float32([1, 2, 3, 4, 5])
    ct = rng.standard_normal(4).astype(np.float32)

    @jax.jit
    def run(z, v):
        def loss(z, v):
            return jaxce.softmax_cross_entropy(
                z, targets, where=mask, label_smoothing=0.25, class_weights=v, implementation=implementation
            )

        value, pull = jax.vjp(loss, z, v)
        return value, *pull(jnp.asarray(ct))

    problem = Problem(np.where(mask, logits, 0), t, where=mask, label_smoothing=0.25, class_weights=v)
    exact, gradients = problem.losses().loss, problem.gradients(Cotangents(ct))
    for z in (logits, garbage):
        loss, gradient, by_class = run(z, v)
        assert_within(loss, exact.value, 16 * F32.eps * exact.size)
        assert_within(gradient, gradients.logits.value, 16 * F32.eps * gradients.logits.size)
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)
        assert_within(by_class, gradients.class_weights.value, 16 * F32.eps * gradients.class_weights.size)
    outside = jaxce.softmax_cross_entropy(logits[:1], np.int32([1]), where=mask[:1], implementation=implementation)
    assert outside[0] == INF


# --- probability targets and every option ---------------------------------------------------------------------------


def dense_cases(rng: np.random.Generator, num_classes: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    """The logits of `index_cases`, with targets smooth, sparse, one-hot, of any sum, and all zero."""
    logits, labels = index_cases(rng, num_classes, dtype)
    rows = len(logits) // 3
    logits, labels = logits[:rows], labels[-rows:]
    t = rng.dirichlet(np.ones(num_classes), rows)
    sharp = rng.dirichlet(np.full(num_classes, 0.05), rows)
    t = np.concatenate([t, sharp, oracle.one_hot(labels, num_classes), t * rng.uniform(0, 3, (rows, 1)), t * 0])
    logits = np.concatenate([logits] * 5)
    t = np.where(np.isfinite(logits.astype(np.float64)), t, 0)
    return logits, t.astype(dtype)


@pytest.mark.optimized
@by_implementation
@pytest.mark.parametrize(
    ("dtype", "num_classes"),
    [(jnp.float32, v) for v in (1, 3, 33, 1000)] + [(jnp.float16, 33), (jnp.bfloat16, 33), (jnp.float64, 33)],
    ids=named,
)
@pytest.mark.parametrize("reach", [32, pytest.param(np.inf, marks=FAR)])
def test_probability_targets(rng, enable, dtype, num_classes, implementation, reach):
    """Within 16ε of the sums of magnitudes, p_j·Σt + t_j, for classes up to `reach` below the maximum."""
    enable(dtype)
    info = working(dtype)
    logits, t = dense_cases(rng, num_classes, dtype)
    if reach == np.inf and (num_classes < 33 or dtype != info.dtype):
        pytest.skip("too few far classes to meet a bad one, or the rounding of a narrow result hides it")
    loss, gradient, _ = dense_loss_and_gradients(logits, t, np.ones(len(t), info.dtype), implementation=implementation)
    chex.assert_type([loss, gradient], [info.dtype, dtype])
    problem = Problem(logits, t, precise=dtype == jnp.float64)
    exact = problem.losses().loss.value
    floor = float(info.smallest_normal) * num_classes
    if reach == 32:
        assert_within(loss, exact, 16 * info.eps * exact + floor, "loss")
    exact = problem.gradients(Cotangents(np.ones(len(t)))).logits
    rounding = half_ulp(exact.value, dtype) if dtype != info.dtype else 0
    bound = 16 * info.eps * lower(exact.size) + rounding + floor
    below = lower(problem.softmax.below)
    # Farther down the rounding of z − m shows, as in the bound of index targets.
    far = np.where(np.isfinite(below) & (below > reach), below, 0) * info.eps * lower(exact.size)
    assert_within(gradient, exact.value, bound + far, "gradient")


def option_cases(rng: np.random.Generator, kind: str, dtype, num_classes: int):
    """Arguments for `with_every_option`, and the targets as the dense distribution that they stand for.

    Some weights, class weights, target probabilities and cotangents are exactly 0, as is a class's probability.
    """
    n, v = 24, num_classes
    scale = rng.choice([0.1, 1.0, 5.0], (n, 1))
    logits = (rng.standard_normal((n, v)) * scale - 3).astype(dtype)

    def some_zero(x):
        return np.where(rng.random(x.shape) < 0.25, 0, x).astype(dtype)

    arguments = {
        "logits": logits,
        "weights": some_zero(rng.uniform(0, 2, n)),
        "class_weights": some_zero(rng.uniform(0, 2, v)),
        "label_smoothing": np.asarray(0.15, dtype),
        "z_loss": np.asarray(0.02, dtype),
    }
    if kind == "index":
        indices = rng.integers(0, v, n).astype(np.int32)
        return arguments, indices, oracle.one_hot(indices, v)
    if kind == "probabilities":
        arguments["probs"] = some_zero(rng.dirichlet(np.ones(v), n))
        return arguments, None, arguments["probs"]
    indices = rng.integers(0, v, (n, 5)).astype(np.int32)
    arguments["probs"] = some_zero(rng.dirichlet(np.ones(5), n))
    return arguments, indices, oracle.dense(indices, arguments["probs"], v)


OUTPUTS = ("loss", "nll", "log_normalizer", "entropy")


def with_every_option(arguments: dict, indices, implementation, return_aux=True):
    arguments = dict(arguments)
    logits, probs = arguments.pop("logits"), arguments.pop("probs", None)
    targets = indices if probs is None else probs if indices is None else jaxce.SparseTargets(indices, probs)
    result = jaxce.softmax_cross_entropy(
        logits, targets, **arguments, return_aux=return_aux, implementation=implementation
    )
    if not return_aux:
        return (result,)
    loss, aux = result
    return loss, aux.nll, aux.log_normalizer, aux.entropy


@functools.partial(jax.jit, static_argnames=("implementation", "only"))
def pull_back(arguments, indices, cotangents, implementation, only=None):
    """The outputs and the gradients of every argument. `only` differentiates one output, as if there were no other."""

    def outputs(arguments):
        every = with_every_option(arguments, indices, implementation, return_aux=only != "loss")
        return every if only is None else (every[OUTPUTS.index(only)],)

    values, pull = jax.vjp(outputs, arguments)
    return values, pull(tuple(cotangents) if only is None else (cotangents[OUTPUTS.index(only)],))[0]


@pytest.mark.optimized
@by_implementation
@by_kind
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64], ids=named)
def test_every_gradient_with_random_cotangents(rng, enable, dtype, kind, implementation):
    """All arguments, all outputs: together, and each alone, both by zero cotangents and by not being used."""
    enable(dtype)
    info = working(dtype)
    v = 10 if dtype == jnp.float64 else 33
    arguments, indices, t = option_cases(rng, kind, dtype, v)
    n = len(t)
    options = {k: x for k, x in arguments.items() if k not in ("logits", "probs")}
    problem = Problem(arguments["logits"], t, **options, precise=dtype == jnp.float64)
    every = np.where(rng.random((4, n)) < 0.25, 0, rng.standard_normal((4, n))).astype(info.dtype)
    runs = [(None, every)] + [(None, every * (np.arange(4) == k)[:, None].astype(info.dtype)) for k in range(4)]
    if dtype == jnp.float32 and implementation is None and kind != "sparse":
        runs += [(only, every * (np.arange(4) == k)[:, None].astype(info.dtype)) for k, only in enumerate(OUTPUTS)]
    exact_values = problem.losses()
    for only, cotangents in runs:
        values, gradients = pull_back(arguments, indices, cotangents, implementation, only)
        for name, value in zip(OUTPUTS if only is None else [only], values, strict=True):
            exact = getattr(exact_values, name)
            chex.assert_type(value, info.dtype)
            assert_within(value, exact.value, 16 * info.eps * exact.size, name)
        expected = problem.gradients(Cotangents(*cotangents))._asdict()
        by_target = expected.pop("targets")
        if kind == "probabilities":
            expected["probs"] = by_target
        elif kind == "sparse":
            expected["probs"] = oracle.Valued(*(np.take_along_axis(x, indices, -1) for x in by_target))
        for name, exact in expected.items():
            chex.assert_type(gradients[name], dtype)
            size, slack = lower(exact.size), 16
            if name == "logits":
                slack = 16 + lower(problem.softmax.below)
                if implementation == "autodiff":
                    # It differentiates −Σ p·log p as it stands: of each entry, p·(surprise − 1) and p·(entropy − 1) are
                    # left to cancel, where the default has only distances below the maximum.
                    size = size + abs(cotangents[3])[:, None] * lower(
                        problem.softmax.p * (2 + 2 * problem.softmax.log_sum[:, None])
                    )
            rounding = half_ulp(exact.value, dtype) if dtype != info.dtype else 0
            what = f"{name}, {only or 'all'}, outputs used: {np.flatnonzero(cotangents.any(-1))}"
            assert_within(gradients[name], exact.value, slack * info.eps * size + rounding, what)
    assert set(expected) == set(arguments)


@by_implementation
def test_soft_cap(rng, implementation):
    """The loss of c·tanh(z/c). The capped logits are known to a few ε·c, and each logit error moves the loss as far."""
    cap = 7.0
    logits = (10 * rng.standard_normal((20, 9))).astype(np.float32)
    labels = rng.integers(0, 9, 20).astype(np.int32)
    capped = cap * np.tanh(logits.astype(np.float64) / cap)
    problem = Problem(capped, oracle.one_hot(labels, 9))
    loss, pull = jax.vjp(
        lambda z: jaxce.softmax_cross_entropy(z, labels, logit_softcap=cap, implementation=implementation), logits
    )
    assert_within(loss, *(problem.losses().loss * np.array([[1], [16 * F32.eps]]) + [[0], [8 * cap * F32.eps]]))
    exact = problem.gradients(Cotangents(np.ones(20))).logits
    slope = 1 - (capped / cap) ** 2
    bound = (16 + 8 * cap) * F32.eps * exact.size * (slope + 4 * F32.eps)
    # 1 − tanh² is as uncertain as tanh is near ±1: by a few ε.
    assert_within(pull(jnp.ones(20))[0], exact.value * slope, bound + 8 * F32.eps * exact.size)


# --- properties -----------------------------------------------------------------------------------------------------

# One shape for all examples of a property, so that each compiles once; the float32 values hypothesis likes best are the
# awkward ones: 0, −0, subnormal, equal, extreme.
ROWS, CLASSES = 4, 13
logit_rows = hnp.arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-30, 30, width=32))
labels_of = hnp.arrays(np.int32, ROWS, elements=st.integers(0, CLASSES - 1))
properties = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@properties
@given(logit_rows, labels_of)
def test_loss_is_not_negative_and_gradients_sum_to_zero(logits, labels):
    loss, gradient = loss_and_gradient(logits, labels)
    assert np.all(np.asarray(loss) >= 0)
    check_index(logits, labels, loss, gradient)
    others = np.arange(CLASSES) != labels[:, None]
    assert np.all((np.asarray(gradient) >= 0) == others)


@properties
@given(logit_rows, labels_of, st.integers(-(2**16), 2**16))
def test_shifting_the_logits_changes_nothing(logits, labels, offset):
    logits = np.round(logits * 64) / 64  # so that the shifted logits are exact
    expected = loss_and_gradient(logits, labels)
    chex.assert_trees_all_equal(loss_and_gradient(logits + np.float32(offset), labels), expected)


@properties
@given(logit_rows, labels_of, st.permutations(range(CLASSES)))
def test_the_order_of_classes_does_not_matter(logits, labels, order):
    order = np.array(order)
    loss, gradient = loss_and_gradient(logits, labels)
    moved_loss, moved_gradient = loss_and_gradient(logits[:, order], np.argsort(order)[labels].astype(np.int32))
    # Only the order of the V terms of a sum differs.
    np.testing.assert_allclose(moved_loss, loss, rtol=CLASSES * F32.eps)
    np.testing.assert_allclose(moved_gradient, np.asarray(gradient)[:, order], rtol=2 * CLASSES * F32.eps)


@properties
@given(logit_rows, labels_of)
def test_an_index_equals_its_one_hot_distribution(logits, labels):
    hot = oracle.one_hot(labels, CLASSES).astype(np.float32)
    loss, gradient = loss_and_gradient(logits, labels)
    dense_loss, dense_gradient, _ = dense_loss_and_gradients(logits, hot, np.ones(ROWS, np.float32))
    np.testing.assert_allclose(dense_loss, loss, rtol=4 * F32.eps)
    p = Problem(logits, hot).softmax.p
    # The index form has a tighter bound; by both together they differ by no more than the looser.
    assert_within(dense_gradient, np.float64(gradient), (2 * 16 + 60) * F32.eps * (p + hot))


@properties
@given(st.data(), logit_rows, st.sampled_from([1, 2, 8, 9, 12]))
def test_sparse_targets_equal_the_distribution_they_stand_for(data, logits, k):
    """Repeated classes are added up, and an entry of probability 0 may have any index. Up to 8 entries are looked up by
    comparison, more by a gather."""
    indices = data.draw(hnp.arrays(np.int32, (ROWS, k), elements=st.integers(0, CLASSES - 1)))
    probs = data.draw(hnp.arrays(np.float32, (ROWS, k), elements=st.sampled_from(np.float32([0, 0.125, 0.3, 1]))))
    anything = data.draw(hnp.arrays(np.int32, (ROWS, k), elements=st.sampled_from([-1, CLASSES, 2**31 - 1, -(2**31)])))
    t = oracle.dense(indices, probs, CLASSES)
    given_indices = np.where(probs == 0, anything, indices)
    loss, gradient = loss_and_gradient(logits, jaxce.SparseTargets(given_indices, probs))
    problem = Problem(logits, t)
    exact = problem.losses().loss
    assert_within(loss, exact.value, 16 * F32.eps * exact.size)
    exact = problem.gradients(Cotangents(np.ones(ROWS))).logits
    assert_within(gradient, exact.value, (16 + problem.softmax.below) * F32.eps * exact.size)


@pytest.mark.parametrize("k", [8, 9])
def test_sparse_entries_of_probability_zero_reach_no_class(rng, k):
    """Each of these indices alone, on both look-up paths: −1 is not the last class."""
    logits = rng.standard_normal((5, CLASSES)).astype(np.float32)
    indices = np.tile(np.arange(k, dtype=np.int32), (5, 1))
    probs = np.full((5, k), 1 / (k - 1), np.float32)
    probs[:, 0] = 0
    expected = loss_and_gradient(logits, jaxce.SparseTargets(indices, probs))
    indices = indices.copy()  # on CPU, JAX reads aligned NumPy arguments where they are: perhaps only now
    indices[:, 0] = [-1, -CLASSES, CLASSES, 2**31 - 1, -(2**31)]
    got = loss_and_gradient(logits, jaxce.SparseTargets(indices, probs))
    # Class 0 was a target of probability 0 and is none now, which says the same by another formula.
    chex.assert_trees_all_close(got, expected, rtol=16 * F32.eps)


BLOCKS = 4
WIDTH = 5  # every block has this many columns, −inf where there are fewer classes, so that one compilation serves all


@jax.jit
def merged_terms(blocks, block_probs, indices, starts, sizes, order):
    """The terms of rows given as blocks `[BLOCKS, N, WIDTH]`, joined in either of two orders."""
    options = Options(label_smoothing=True, return_aux=True)

    def record(block, probs, start, size):
        inside = jnp.arange(WIDTH) < size
        r = sums.row_stats(options, sums.Rows(block, probs=probs, where=jnp.broadcast_to(inside, block.shape)))
        here = (indices >= start) & (indices < start + size)
        picked = jnp.where(here, lookup.pick(block, indices - start), 0)
        return r._replace(picked=picked, argmax=start + jnp.argmax(block, -1).astype(jnp.int32))

    records = [record(blocks[i], block_probs[i], starts[i], sizes[i]) for i in range(BLOCKS)]
    one_by_one = functools.reduce(stats.merge, records)
    pairwise = stats.merge(stats.merge(*records[:2]), stats.merge(*records[2:]))
    joined = jax.tree.map(lambda a, b: jnp.where(order, a, b), one_by_one, pairwise)
    return joined, stats.finish(joined), stats.finish(joined._replace(picked=None))


@properties
@given(
    hnp.arrays(
        np.float32,
        (ROWS, BLOCKS * WIDTH),
        elements=st.floats(-30, 30, width=32, allow_subnormal=False) | st.just(-np.inf),
    ),
    hnp.arrays(np.int32, (ROWS, 2), elements=st.integers(0, 2**20)),
    hnp.arrays(np.bool_, (ROWS, BLOCKS)),
    st.lists(st.integers(1, WIDTH), min_size=BLOCKS, max_size=BLOCKS),
    st.booleans(),
)
def test_merging_blocks_gives_the_record_of_the_row(values, picks, empty, sizes, order):
    """Random widths, −inf among the logits, and blocks that are all −inf: first, last, next to each other."""
    starts = np.cumsum([0, *sizes[:-1]])
    blocks = values.reshape(ROWS, BLOCKS, WIDTH).transpose(1, 0, 2).copy()
    blocks[empty.T] = -np.inf
    for block, size in zip(blocks, sizes, strict=True):
        block[:, size:] = -np.inf
    row = np.concatenate([b[:, :size] for b, size in zip(blocks, sizes, strict=True)], -1)
    indices = picks % row.shape[-1]
    t = oracle.dense(indices, [[0.75, 0.25]] * ROWS, row.shape[-1]) * np.isfinite(row)
    probs = np.zeros((BLOCKS, ROWS, WIDTH), np.float32)
    for i in range(BLOCKS):
        probs[i, :, : sizes[i]] = t[:, starts[i] : starts[i] + sizes[i]]
    record, terms, dense_terms = jax.tree.map(
        np.asarray, merged_terms(blocks, probs, indices, starts.astype(np.int32), np.int32(sizes), order)
    )

    hopeless = np.all(np.isinf(row), -1)
    assert np.all(record.max[hopeless] == -np.inf)
    assert np.all(record.rest[hopeless] == -1)
    assert np.all(np.isnan(terms.log_normalizer[hopeless]))
    live = ~hopeless
    if not live.any():
        return
    row, t, indices = row[live], t[live], indices[live]
    np.testing.assert_array_equal(record.max[live], row.max(-1))
    np.testing.assert_array_equal(record.argmax[live], row.argmax(-1))
    np.testing.assert_array_equal(record.picked[live], np.take_along_axis(row, indices, -1))
    problem = Problem(row, t)
    exact = problem.losses()
    # Each of up to three merges scales by an exponential, and differences of maxima, up to 60, are rounded.
    slack = (16 + 3 * 60) * F32.eps
    surprise = problem.softmax.surprise
    assert_within(terms.log_normalizer[live], exact.log_normalizer.value, 16 * F32.eps * exact.log_normalizer.size)
    assert_within(
        terms.target[live], np.take_along_axis(surprise, indices, -1), slack * np.take_along_axis(surprise, indices, -1)
    )
    assert_within(dense_terms.target[live], exact.nll.value, slack * exact.nll.size)
    assert_within(terms.entropy[live], exact.entropy.value, slack * exact.entropy.size)
    assert_within(terms.smoothing[live], np.sum(surprise, -1), slack * np.sum(surprise, -1))


# --- the oracle itself ----------------------------------------------------------------------------------------------


def test_the_oracle_agrees_with_the_definitions_at_400_digits(rng):
    """The bare formulas, cancellations and all, and derivatives as difference quotients."""
    n, v = 3, 4
    z = rng.standard_normal((n, v)) * [[1], [10], [100]]
    t, w, cw = rng.dirichlet(np.ones(v), n), rng.uniform(0, 2, n), rng.uniform(0, 2, v)
    smoothing, lam = np.array(0.15), np.array(0.02)
    ct = rng.standard_normal((4, n))
    with mpmath.workdps(400):

        def outputs(z, t, w, cw, smoothing, lam):
            lse = np.array([mpmath.log(sum(map(mpmath.exp, row))) for row in z])
            surprise = lse[:, None] - z
            p = np.array([[mpmath.exp(-s) for s in row] for row in surprise])
            mixed = (1 - smoothing) * t + smoothing / v
            loss = w * (np.sum(cw * mixed * surprise, -1) + lam * lse**2)
            return loss, np.sum(t * surprise, -1), lse, np.sum(p * surprise, -1)

        def total(*arguments):
            return sum(np.sum(c * out) for c, out in zip(ct, outputs(*arguments), strict=True))

        arguments = [np.frompyfunc(mpmath.mpf, 1, 1)(x) for x in (z, t, w, cw, smoothing, lam)]
        exact = outputs(*arguments)
        step = mpmath.mpf(10) ** -150
        derivatives = []
        for k, x in enumerate(arguments):
            by_entry = np.zeros(np.shape(x), object)
            for at in np.ndindex(np.shape(x)):
                ends = []
                for sign in (1, -1):
                    moved = np.array(x, object)
                    moved[at] = moved[at] + sign * step
                    ends.append(total(*arguments[:k], moved, *arguments[k + 1 :]))
                by_entry[at] = (ends[0] - ends[1]) / (2 * step)
            derivatives.append(by_entry)

        # Of float64's 15 digits the rounding of z − m takes two, at differences of hundreds.
        for precise, digits in ((False, 13), (True, 45)):
            problem = Problem(z, t, weights=w, class_weights=cw, label_smoothing=smoothing, z_loss=lam, precise=precise)
            results = [*problem.losses(), *problem.gradients(Cotangents(*(oracle.lift(c, precise) for c in ct)))]
            for got, true in zip(results, [*exact, *derivatives], strict=True):
                error = abs(got.value - true)
                assert np.all(error <= mpmath.mpf(10) ** -digits * abs(got.size))


def test_the_oracle_gives_the_small_numbers():
    """Both arithmetics at 2e-304, where a sum of exponentials is 1 to the last digit."""
    for precise in (False, True):
        problem = Problem(np.array([[0.0, -700.0]]), np.array([[1.0, 0.0]]), precise=precise)
        small = np.exp(-700.0)
        np.testing.assert_allclose(lower(problem.losses().loss.value), small, rtol=1e-15)
        gradient = lower(problem.gradients(Cotangents(oracle.lift(np.ones(1), precise))).logits.value)
        np.testing.assert_allclose(gradient, [[-small, small]], rtol=1e-15)
