"""The divergence of a student from its teacher: its digits, its gradients, what is not finite, and its options."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxce import SparseTargets, distillation_loss, divergence, linear_distillation_loss
from jaxce.arguments import Options
from jaxce.divergence import Models
from jaxce.sums import Rows, row_stats
from tests import oracle

EPS = float(np.finfo(np.float32).eps)
KINDS = {
    "forward": {"divergence": "forward_kl"},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "jsd .1": {"divergence": "jsd", "beta": 0.1},
}
IMPLEMENTATIONS = ["xla", "autodiff"]
INF, NAN = np.inf, np.nan

# --- what it should be ----------------------------------------------------------------------------------------------

_exp, _log, _expm1, _tanh = (np.frompyfunc(f, 1, 1) for f in (mpmath.exp, mpmath.log, mpmath.expm1, mpmath.tanh))


class Exact(NamedTuple):
    """Of each row, with 50 digits; and what ε is multiplied by in the error that rounding allows."""

    value: oracle.Valued
    logits: oracle.Valued
    temperature: oracle.Valued


def exact(
    student: Any, teacher: Any, divergence: str = "forward_kl", beta: float = 0.5, temperature: Any = 1.0
) -> Exact:
    """From the definitions, for finite logits `[N, V]`.

    A probability is off by 16 + |z − max|/T ε of itself, as its exponent is rounded. Of the terms that are added up,
    those of nearly equal probabilities are as exact, and the others, p·(exp(y) − 1 − y), are sums of numbers.
    """
    T = np.broadcast_to(oracle.lift(temperature, precise=True), np.shape(student)[:-1])[..., None]
    (a, q), (b, p) = (_softmax(oracle.lift(z, precise=True), T) for z in (student, teacher))
    of_q, of_p, delta = 16 + abs(a), 16 + abs(b), (a - b) - (_log_sum(a) - _log_sum(b))
    beta = mpmath.mpf(beta)
    m = {"forward_kl": q, "reverse_kl": p, "jsd": beta * p + (1 - beta) * q}[divergence]
    on_p, on_q = {"forward_kl": (1, 0), "reverse_kl": (0, 1), "jsd": (beta, 1 - beta)}[divergence]
    worse = 1 / min(beta, 1 - beta) if divergence == "jsd" else 1  # log1p of nearly −β
    term, size = 0, 0
    for share, x, of_x in ((on_p, p, of_p), (on_q, q, of_q)):
        y = _log(m / x)
        one = x * (_expm1(y) - y)
        near = np.array(abs(y) < 1, bool)
        term += share * one
        size += share * np.where(near, one * of_x, m * np.maximum(of_p, of_q) + x * of_x * (1 + worse * abs(y)))
    value, value_size = (np.sum(x, -1, keepdims=True) for x in (term, size))

    if divergence == "forward_kl":
        student = q - p
        near = np.array(abs(delta) < 1, bool)
        student_size = np.where(near, abs(q - p) * of_p, q * of_q + p * of_p)
        student_size += 16 * p * np.sum(abs(q - p), -1, keepdims=True)  # of the gap
        of_teacher = p * value
    else:
        u = _log(q / m)
        mean = np.sum(q * u, -1, keepdims=True)
        student = on_q * q * (u - mean)
        leading = np.array(q > 0.75, bool)  # of this one log(q/m) is no error, being nearly the mean
        at = np.sum(np.where(leading, u, 0), -1, keepdims=True)
        off = np.where(leading, 0, (abs(u) + abs(at)) * (of_q + 16 * worse))
        student_size = on_q * q * (off + np.sum(q * off, -1, keepdims=True))
        of_teacher = (q if divergence == "reverse_kl" else on_q * q) * mean
        if divergence == "jsd":
            of_teacher = of_teacher + on_p * p * np.sum(p * _log(p / m), -1, keepdims=True)
    together = term - of_teacher
    together_size = size + of_teacher * (of_p + of_q) + (p + q) * value_size
    slope = -np.sum(together * b + student * (a - b), -1) / T[..., 0]
    slope_size = np.sum(together_size * abs(b) + student_size * abs(a - b), -1) / T[..., 0]
    return Exact(
        oracle.Valued(value[..., 0], value_size[..., 0]),
        oracle.Valued(student / T, student_size / T),
        oracle.Valued(slope, slope_size),
    )


def _softmax(z: np.ndarray, temperature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(z − max)/T, and the probabilities."""
    below = (z - z.max(-1, keepdims=True)) / temperature
    return below, _exp(below - _log_sum(below))


def _log_sum(below: np.ndarray) -> np.ndarray:
    return _log(np.sum(_exp(below), -1, keepdims=True))


def logits_of_every_kind(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student, teacher and temperature."""
    V = 7
    z, t = (rng.normal(size=(24, V)).astype(np.float32) * 3 for _ in range(2))
    temperature = np.float32(10) ** rng.uniform(-1, 1, 24).astype(np.float32)
    z[:3], t[:3] = z[:3] * 8, t[:3] * 8  # confident, of different classes
    z[3:6], t[3:6] = z[3:6] * 8, z[3:6] * 8 + t[3:6]  # of the same
    t[6:9] = z[6:9] + t[6:9] * np.float32(1e-6)  # nearly equal
    z[9, :3], t[9, 1:4] = 5, 5  # ties
    z[10], t[11] = 0, -20
    z[12], t[13] = np.round(z[12] * 8) / 8 + 1e4, np.round(t[13] * 8) / 8 - 3e4  # offsets
    z[14], t[14] = np.round(z[14]) * 2.0**80, np.round(t[14]) * 2.0**80 + 2.0**100
    temperature[14] = 2.0**80
    temperature[15:17] = 0.01, 100
    z[15], t[15] = z[15] / 100, t[15] / 100
    z[16], t[16] = z[16] * 100, t[16] * 100
    return z, t, temperature


@functools.partial(jax.jit, static_argnames=("reduction", "options"))
def results(z, t, T, w, ct, reduction="none", options=()):
    loss, pull = jax.vjp(
        lambda z, T, w: distillation_loss(z, t, temperature=T, weights=w, reduction=reduction, **dict(options)), z, T, w
    )
    return loss, *pull(ct)


@pytest.mark.optimized
@pytest.mark.every_case
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS[:1], pytest.param("autodiff", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_digit(kind, implementation, rng):
    z, t, temperature = logits_of_every_kind(rng)
    weights, ct = (rng.uniform(0.5, 2, len(z)).astype(np.float32) for _ in range(2))
    ct *= rng.choice([-1, 1], len(z)).astype(np.float32)
    options = tuple((KINDS[kind] | {"implementation": implementation}).items())
    loss, dz, dT, dw = results(z, t, temperature, weights, ct, options=options)
    wanted = exact(z, t, temperature=temperature, **KINDS[kind])
    value, size = wanted.value
    tiny = float(np.finfo(np.float32).tiny)
    w, c = (oracle.lift(x, precise=True) for x in (weights, ct))
    oracle.assert_within(loss, w * value, EPS * w * size + tiny, "loss")
    oracle.assert_within(dw, c * value, EPS * abs(c) * size + tiny, "weights")
    if implementation == "autodiff":  # without the sums that its own rule has for confident students
        return
    scale = (w * c)[:, None]
    oracle.assert_within(dz, scale * wanted.logits.value, EPS * abs(scale) * wanted.logits.size + tiny, "logits")
    slope, size = wanted.temperature
    oracle.assert_within(dT, w * c * slope, EPS * w * abs(c) * size + tiny, "temperature")


@pytest.mark.optimized
@pytest.mark.every_case
@pytest.mark.parametrize(
    "kind",
    ["forward", "jsd .1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("reverse", "jsd", "jsd .001"))],
)
def test_models_that_nearly_agree(kind, rng):
    """The divergence of 1e-12 is that of the very float32 numbers, the gradient too; of equal ones both are 0."""
    kind = KINDS.get(kind, {"divergence": "jsd", "beta": 0.001})
    t = (rng.normal(size=(4, 200)) * np.array([[0.1], [1], [4], [1]])).astype(np.float32)
    z = (t + 1e-6 * rng.normal(size=t.shape)).astype(np.float32)
    z[3] = t[3]
    T = np.float32([1, 1, 3, 1])
    loss, dz, dT, _ = results(z, t, T, np.ones(4, np.float32), np.ones(4, np.float32), options=tuple(kind.items()))
    wanted = exact(z[:3], t[:3], temperature=T[:3], **kind)
    np.testing.assert_allclose(loss[:3], oracle.lower(wanted.value.value), rtol=64 * EPS)
    largest = abs(oracle.lower(wanted.logits.value)).max(-1, keepdims=True)
    oracle.assert_within(dz[:3], wanted.logits.value, 64 * EPS * largest)
    slope, size = wanted.temperature
    oracle.assert_within(dT[:3], slope, EPS * size)
    np.testing.assert_array_equal(np.concatenate([loss[3:], dz[3], dT[3:]]), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_changes_nothing(kind, rng):
    """Not a digit, as long as it does not round the logits away; up to 1e30, where it leaves them tied."""
    z, t = (np.round(rng.normal(size=(3, 6)) * 256).astype(np.float32) / 128 for _ in range(2))
    ones, options = np.ones(3, np.float32), tuple(KINDS[kind].items())

    def of(z, t):
        return results(z, t, 2 * ones, ones, ones, options=options)

    for a, b in ((3e4, 0), (-1e4, 2e4)):
        chex.assert_trees_all_equal(of(z + np.float32(a), t + np.float32(b)), of(z, t))
    chex.assert_trees_all_equal(of(0 * z + np.float32(1e30), t), of(0 * z, t))
    chex.assert_trees_all_equal(of(z, 0 * t - np.float32(1e30)), of(z, 0 * t))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_probability_0(kind, implementation):
    """For both it is as if the class were not there; for one, the divergence is infinite if the other's is not 0."""
    z = np.float32([[1, 2, 0, -INF], [1, 2, 0, -INF], [1, 2, 0, 3], [-200, 0, 0, 0], [-INF, 0, -INF, -INF]])
    t = np.float32([[2, 0, 1, -INF], [2, 0, 1, 1], [2, 0, 1, -INF], [0, -INF, 0, 0], [0, -INF, -INF, -INF]])
    ones, options = np.ones(5, np.float32), KINDS[kind] | {"implementation": implementation}
    loss, dz, dT, _ = map(np.asarray, results(z, t, ones * 2, ones, ones, options=tuple(options.items())))
    np.testing.assert_allclose(
        loss[0], distillation_loss(z[0, :3], t[0, :3], temperature=2.0, **options), rtol=16 * EPS
    )
    finite = {"forward": [0, 2, 3], "reverse": [0, 1]}.get(kind, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(loss == INF, ~np.isin(range(5), finite))
    assert np.isfinite(loss[finite]).all()
    assert np.isfinite(dz[finite]).all()
    assert np.isfinite(dT[finite]).all()
    assert dz[0, 3] == 0
    if kind.startswith("jsd"):  # both are sure, of different classes
        beta = KINDS[kind].get("beta", 0.5)
        np.testing.assert_allclose(loss[4], -(beta * np.log(beta) + (1 - beta) * np.log(1 - beta)), rtol=16 * EPS)
        assert not dz[4].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_slope_of_a_soft_cap_of_narrow_logits(dtype, rng):
    """It is of the working dtype; the gradient is rounded once."""
    z, t = (jnp.asarray(rng.normal(size=(4, 6)) * 3, dtype) for _ in range(2))
    dz = jax.grad(lambda z: distillation_loss(z, t, logit_softcap=4.0, reduction="sum"))(z)
    assert dz.dtype == z.dtype
    a, b = (np.asarray(x).astype(np.float64) for x in (z, t))
    wanted = exact(4 * np.tanh(a / 4), b).logits.value * (1 - np.tanh(a / 4) ** 2)
    # Capped logits of up to 4 have an error of ε·4 in the exponent, and 16 in each of two softmaxes.
    oracle.assert_within(dz, wanted, 64 * EPS + oracle.half_ulp(wanted, z.dtype), "logits")


def test_logits_that_are_no_floats():
    with pytest.raises(TypeError, match=r"^logits: expected an array of floats"):
        distillation_loss(jnp.zeros((2, 3), int), jnp.zeros((2, 3)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_what_is_not_a_number(kind, implementation, rng):
    """In a row that counts it is NaN, with its gradient; in any other exactly 0."""
    bad = np.float32([NAN, INF, -INF, 0])
    z, t = (rng.normal(size=(16, 5)).astype(np.float32) for _ in range(2))
    z[:3, 1], z[2], t[4:7, 2], t[6] = bad[:3], -INF, bad[:3], -INF  # of nothing but −inf, too
    z[7, 0], t[8, 0] = -INF, -INF  # infinite, one way or the other
    z[9] = NAN
    weights = np.ones(16, np.float32)
    options = KINDS[kind] | {"implementation": implementation}

    wrong = [0, 1, 2, 4, 5, 6, 9]
    used = results(z, t, np.full(16, 0.7, np.float32), weights, weights, options=tuple(options.items()))
    assert np.isnan(used[0][jnp.array(wrong)]).all()
    assert np.isnan(used[1][jnp.array(wrong)]).all()
    assert np.isfinite(used[0][10:]).all()
    assert np.isfinite(used[1][10:]).all()
    weights[:10] = 0

    @jax.jit
    def left_out(z, T):
        def loss(z, T, **out):
            return distillation_loss(z, t, temperature=T, reduction="sum", **options, **out)

        ways = {"weights": weights}, {"where": weights > 0}
        return [jax.value_and_grad(functools.partial(loss, **out), (0, 1))(z, T) for out in ways]

    for value, (dz, dT) in left_out(z, jnp.full(16, 0.7)):
        np.testing.assert_allclose(value, np.sum(used[0][10:]), rtol=16 * EPS)
        np.testing.assert_array_equal(dz[:10], 0)
        np.testing.assert_array_equal(dT[:10], 0)
        np.testing.assert_allclose(dz[10:], used[1][10:], rtol=16 * EPS, atol=EPS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_classes_are_not_there(implementation, rng):
    """Whatever they hold; in both models, and after their soft caps."""
    z, t = (rng.normal(size=(3, 6)).astype(np.float32) * 4 for _ in range(2))
    where = np.arange(6) != 2
    caps = {"logit_softcap": 3.0, "teacher_logit_softcap": 5, "implementation": implementation}

    @jax.jit
    def of(z, t, where=None):
        return jax.value_and_grad(lambda z: distillation_loss(z, t, where=where, reduction="sum", **caps))(z)

    wanted = of(z[:, where], t[:, where])
    z[:, 2], t[:, 2] = NAN, INF
    value, dz = of(z, t, where=where)
    np.testing.assert_allclose(value, wanted[0], rtol=16 * EPS)
    np.testing.assert_array_equal(dz[:, 2], 0)
    np.testing.assert_allclose(dz[:, where], wanted[1], rtol=32 * EPS, atol=EPS)
    z, t = z[:, where], t[:, where]
    by_hand = distillation_loss(3 * jnp.tanh(z / 3), 5 * jnp.tanh(t / 5), implementation=implementation)
    np.testing.assert_allclose(distillation_loss(z, t, **caps), by_hand, rtol=64 * EPS, atol=5 * EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_one_class(kind):
    loss = jax.value_and_grad(lambda z: distillation_loss(z, jnp.full((2, 1), 3.0), **KINDS[kind]).sum())
    value, grad = jax.jit(loss)(jnp.ones((2, 1)))
    assert value == 0
    assert not grad.any()


def test_the_limits_of_beta(rng):
    z, t = (rng.normal(size=(3, 6)).astype(np.float32) for _ in range(2))
    for beta, kind in ((0, "forward_kl"), (1.0, "reverse_kl")):
        got, wanted = (
            distillation_loss(z, t, **o) for o in ({"divergence": "jsd", "beta": beta}, {"divergence": kind})
        )
        np.testing.assert_array_equal(got, wanted)


DTYPES = [
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "bfloat16"),
    ("float32", "float64"),
    ("float64", "float16"),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), DTYPES)
def test_dtypes(student, teacher, kind, rng):
    """Worked with in the wider working dtype; the gradient is rounded to the dtype of the logits."""
    z, t = (jnp.asarray(rng.normal(size=(4, 9)) * 3).astype(d) for d in (student, teacher))
    ct = np.array([1.0, -2, 0.5, 3])
    loss, pull = jax.vjp(lambda z: distillation_loss(z, t, temperature=1.5, **KINDS[kind]), z)
    working = np.float64 if "float64" in (student, teacher) else np.float32
    assert loss.dtype == working
    (dz,) = pull(ct.astype(working))
    assert dz.dtype == z.dtype
    eps = float(np.finfo(working).eps)
    wanted = exact(*(np.asarray(x.astype(np.float64)) for x in (z, t)), temperature=1.5, **KINDS[kind])
    oracle.assert_within(loss, wanted.value.value, eps * wanted.value.size)
    gradient = ct[:, None] * wanted.logits.value
    oracle.assert_within(dz, gradient, eps * abs(ct[:, None]) * wanted.logits.size + oracle.half_ulp(gradient, z.dtype))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
def test_models_that_nearly_agree_in_float64(kind, rng):
    t = rng.normal(size=(2, 100))
    z = t + 1e-13 * rng.normal(size=t.shape)
    wanted = exact(z, t, **KINDS[kind])
    np.testing.assert_allclose(
        distillation_loss(z, t, **KINDS[kind]), oracle.lower(wanted.value.value), rtol=64 * np.finfo(float).eps
    )


# --- options --------------------------------------------------------------------------------------------------------


def test_reductions(rng):
    """Over the examples that take part, by the sum of their weights or their number."""
    z, t = (rng.normal(size=(5, 4)).astype(np.float32) for _ in range(2))
    weights, where = np.float32([1, 0, 2, 0.5, 3]), np.array([True, True, False, True, True])
    each = np.asarray(distillation_loss(z, t)) * weights * where
    wanted = {
        "none": each,
        "sum": each.sum(),
        "mean": each.sum() / (weights * where).sum(),
        "mean_count": each.sum() / 4,
    }

    @jax.jit
    def reduced(z, weights):
        return {r: distillation_loss(z, t, weights=weights, where=where, reduction=r) for r in wanted}

    chex.assert_trees_all_close(reduced(z, weights), wanted, rtol=16 * EPS)
    assert not np.any(jax.tree.leaves(reduced(z, 0 * weights))[:2])
    assert not jax.jit(jax.grad(lambda z: reduced(z, 0 * weights)["mean"]))(z).any()


@pytest.mark.parametrize("axis", [0, (2, 0), None])
def test_axes(axis, rng):
    z, t = (rng.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(2))
    axes = {0: (0,), (2, 0): (2, 0), None: (0, 1, 2)}[axis]
    rest = [i for i in range(3) if i not in axes]
    last = [np.transpose(x, (*rest, *axes)).reshape(*(x.shape[i] for i in rest), -1) for x in (z, t)]
    np.testing.assert_allclose(distillation_loss(z, t, axis), distillation_loss(*last), rtol=16 * EPS)


WRONG = {
    "divergence": (ValueError, {"divergence": "kl"}),
    "beta": (ValueError, {"divergence": "jsd", "beta": 1.5}),
    "beta: expected a Python number": (TypeError, {"divergence": "jsd", "beta": jnp.float32(0.1)}),
    "beta: expected none but for divergence='jsd'": (ValueError, {"beta": 0.1}),
    "teacher_logit_softcap": (ValueError, {"teacher_logit_softcap": -1}),
    "logit_softcap": (TypeError, {"logit_softcap": "30"}),
    "temperature": (ValueError, {"temperature": 0.0}),
    "reduction": (ValueError, {"reduction": "average"}),
    "teacher_logits: expected the shape of logits": (ValueError, {"teacher_logits": jnp.zeros((2, 4))}),
    "teacher_logits: expected an array of floats": (TypeError, {"teacher_logits": jnp.zeros((2, 3), int)}),
    "label_smoothing": (TypeError, {"label_smoothing": 0.1}),
}


@pytest.mark.every_case
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    kind, options = WRONG[message]
    with pytest.raises(kind, match=f"^{message}"):
        distillation_loss(jnp.zeros((2, 3)), **({"teacher_logits": jnp.zeros((2, 3))} | options))


# --- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_teacher_is_a_constant(implementation, rng):
    """Of the loss, and of its gradient."""
    z, t = (rng.normal(size=(3, 6)).astype(np.float32) for _ in range(2))

    def loss(z, t):
        return distillation_loss(z, t, temperature=2.0, reduction="sum", implementation=implementation)

    np.testing.assert_array_equal(jax.grad(loss, 1)(z, t), 0)
    np.testing.assert_array_equal(jax.grad(lambda t: jnp.vdot(jax.grad(loss)(z, t), z))(t), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind, rng):
    """Of the hand-written rule, against forward mode through plain JAX; also of models that agree."""
    t = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    z = (t + jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)).at[2].set(t[2])
    T = jnp.asarray([0.6, 1.3, 2.0], jnp.float32)

    def loss(z, T, implementation=None):
        options = KINDS[kind] | {"implementation": implementation, "logit_softcap": 4.0, "teacher_logit_softcap": 4.0}
        return distillation_loss(z, t, temperature=T, reduction="sum", **options)

    got = jax.jit(jax.jacrev(jax.grad(loss, (0, 1)), (0, 1)))(z, T)
    wanted = jax.jit(jax.jacfwd(jax.jacfwd(functools.partial(loss, implementation="autodiff"), (0, 1)), (0, 1)))(z, T)
    # Up to 3·Δ/T² of numbers of order 1, each within 16 ε.
    chex.assert_trees_all_close(got, wanted, rtol=64 * EPS, atol=256 * EPS)
    hessian = np.asarray(jnp.diagonal(got[0][0], axis1=0, axis2=2))  # of models that agree it is that of a metric
    q = np.asarray(jax.nn.softmax(4 * jnp.tanh(t[2] / 4) / T[2]))
    slope = (1 - np.tanh(np.asarray(t[2]) / 4) ** 2) / np.asarray(T[2])
    curvature = {"forward": 1, "reverse": 1, "jsd": 0.25, "jsd .1": 0.09}[kind]
    metric = curvature * (np.diag(q) - np.outer(q, q)) * np.outer(slope, slope)
    np.testing.assert_allclose(hessian[..., 2], metric, rtol=64 * EPS, atol=16 * EPS)


@pytest.mark.parametrize("implementation", ["xla", "autodiff"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_curvature_of_a_model_beside_itself(kind, implementation, rng):
    """The Fisher matrix, also where not a digit of the two differs."""
    z = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    options = KINDS[kind] | {"implementation": implementation, "reduction": "sum"}
    hessian = jax.jit(jax.vmap(jax.hessian(lambda z, t: distillation_loss(z, t, **options))))(z, z)
    q = np.asarray(jax.nn.softmax(z))
    curvature = {"forward": 1, "reverse": 1, "jsd": 0.25, "jsd .1": 0.09}[kind]
    fisher = q[:, :, None] * np.eye(5) - q[:, :, None] * q[:, None, :]
    np.testing.assert_allclose(hessian, curvature * fisher, rtol=64 * EPS, atol=16 * EPS)


@pytest.mark.parametrize("linear", [False, True])
def test_an_infinite_reverse_divergence_that_is_thrown_away(linear):
    """A teacher that rules out, by rounding or at all, what the student does not."""
    teacher = SparseTargets(np.tile([0, 1], (2, 1)), np.float32([[0.75, 0.25], [0.7, 0.2]]))

    def loss(z, kept):
        if linear:
            given = jnp.ones((2, 1)), z[:1], teacher
            losses = linear_distillation_loss(*given, divergence="reverse_kl")
        else:
            losses = distillation_loss(z, teacher, divergence="reverse_kl")
        return jnp.sum(jnp.where(jnp.isfinite(losses) | (not kept), losses, 0)), losses

    z = jnp.zeros((2, 4))
    gradient, losses = jax.grad(loss, has_aux=True)(z, True)
    assert losses[0] == INF
    assert np.isfinite(losses[1])
    assert np.all(np.isfinite(gradient))
    if not linear:
        np.testing.assert_array_equal(gradient[0], 0)
    down = jax.grad(loss, has_aux=True)(z, False)[0]
    assert np.all(np.isfinite(down))
    assert np.all(down[0, :2] < 0)  # towards the classes that the teacher has


def test_a_teacher_of_all_classes_that_a_number_does_not_mask():
    """What its probabilities lack of 1 by rounding is no mass of the others."""
    z = jnp.where(jnp.arange(16) < 4, 0, jnp.float32([[-1e9], [np.finfo(np.float32).min], [-INF]]))
    teacher = SparseTargets(np.tile(np.arange(4), (3, 1)), np.tile(np.float32([0.7, 0.1, 0.1, 0.1]), (3, 1)))
    p = np.float64([0.7, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(distillation_loss(z, teacher), np.sum(p * np.log(4 * p)), rtol=1e-5)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_beside_a_teacher_that_names_every_class(kind, tail, rng):
    """By number, or all that a mask leaves: nothing is left, and that has no derivative."""
    z = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    where = np.array([[True] * 5, [True] * 3 + [False] * 2])
    p = np.float32([[0.3, 0.3, 0.2, 0.1, 0.1], [0.5, 0.3, 0.2, 0, 0]])
    teacher = SparseTargets(np.tile(np.arange(5), (2, 1)), p)

    def hessian(teacher, **options):
        def loss(z, teacher, where):
            given = KINDS[kind] | options
            return distillation_loss(z, teacher, where=where, **given)

        of_rows = jax.vmap(jax.jacrev(jax.grad(loss)), in_axes=(0, 0, 0))
        return jax.jit(of_rows)(z, teacher, where), jax.jit(jax.vmap(jax.hessian(loss)))(z, teacher, where)

    for found in hessian(teacher, tail=tail):
        for wanted in hessian(jnp.log(p)):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_forward_mode_in_the_teacher_is_0(rng):
    z, t = (jnp.asarray(rng.normal(size=(2, 5)), jnp.float32) for _ in range(2))
    for implementation in "xla", "autodiff":
        loss = functools.partial(distillation_loss, z, implementation=implementation)
        np.testing.assert_array_equal(jax.jvp(loss, (t,), (t,))[1], 0)


def test_vmap_checkpoint_and_scan(rng):
    z, t = (jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32) for _ in range(2))
    T = jnp.float32([0.5, 1, 2])

    @jax.jit
    def grads(z, t, T):
        loss = jax.checkpoint(lambda z, T: distillation_loss(z, t, temperature=T, divergence="jsd", reduction="sum"))
        return jax.value_and_grad(loss, (0, 1))(z, T)

    one_by_one = [grads(*x) for x in zip(z, t, T, strict=True)]
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    chex.assert_trees_all_close(jax.jit(jax.vmap(grads))(z, t, T), wanted, rtol=32 * EPS, atol=4 * EPS)
    scanned = jax.lax.scan(lambda _, x: (None, grads(*x)), None, (z, t, T))[1]
    chex.assert_trees_all_close(scanned, wanted, rtol=32 * EPS, atol=4 * EPS)


def test_forward_mode_takes_the_other_implementation(rng):
    z, t = (jnp.asarray(rng.normal(size=(2, 5)), jnp.float32) for _ in range(2))
    with pytest.raises(TypeError, match="implementation='autodiff'"):
        jax.jvp(lambda z: distillation_loss(z, t), (z,), (z,))
    plain = functools.partial(distillation_loss, teacher_logits=t, implementation="autodiff", reduction="sum")
    slope = jax.jvp(plain, (z,), (z,))[1]
    np.testing.assert_allclose(slope, jnp.vdot(jax.grad(plain)(z), z), rtol=64 * EPS, atol=16 * EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_no_false_alarm_of_debug_flags(kind):
    z = np.float32([[1, 2, 0], [NAN, 1, 2], [-INF, 1, 2], [1, 1, 2]])
    t = np.float32([[1, 0, 0], [0, 1, 2], [1, 1, 2], [1, -INF, 2]])

    def loss(z, T):
        weights = np.float32([1, 0, 0, 0])
        return distillation_loss(z, t, temperature=T, weights=weights, reduction="sum", **KINDS[kind])

    with jax.debug_nans(True), jax.debug_infs(True):
        value, (dz, dT) = jax.value_and_grad(loss, (0, 1))(z, jnp.ones(4))
    assert value > 0
    assert not dz[1:].any()
    assert not dT[1:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_classes_and_examples_split_over_devices(kind, implementation, rng):
    """As on one device: losses, gradients, near-equal rows; a share of nothing but −inf."""
    z, t = (rng.normal(size=(4, 16)).astype(np.float32) * 3 for _ in range(2))
    t[1] = z[1] + np.float32(1e-6) * t[1]
    z[2, :4], t[2, 4:8] = -INF, -20
    t[2, :4] = -INF
    T, ct = rng.uniform(0.5, 2, 4).astype(np.float32), np.float32([1, -2, 1, 0.5])
    options = KINDS[kind] | {"implementation": implementation}

    def both(z, t, T, ct, **names):
        loss, pull = jax.vjp(lambda z, T: distillation_loss(z, t, temperature=T, **options, **names), z, T)
        total = distillation_loss(z, t, reduction="mean", **options, **(names and names | {"batch_axis_name": "d"}))
        return loss, pull(ct), total

    mesh = jax.make_mesh((2, 4), ("d", "v"), axis_types=(AxisType.Auto,) * 2)
    split, rows = P("d", "v"), P("d")
    mapped = jax.shard_map(
        functools.partial(both, axis_name="v"),
        mesh=mesh,
        in_specs=(split, split, rows, rows),
        out_specs=(rows, (split, rows), P()),
    )
    (loss, (dz, dT), total), wanted = jax.jit(mapped)(z, t, T, ct), jax.jit(both)(z, t, T, ct)
    np.testing.assert_allclose(loss, wanted[0], rtol=64 * EPS)
    np.testing.assert_allclose(total, wanted[2], rtol=64 * EPS)
    np.testing.assert_allclose(
        dz, wanted[1][0], rtol=128 * EPS, atol=64 * EPS * abs(np.asarray(dz)).max(-1, keepdims=True).min()
    )
    np.testing.assert_allclose(dT, wanted[1][1], rtol=256 * EPS, atol=EPS)


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_explicit_sharding(kind, rng):
    z, t = (rng.normal(size=(4, 16)).astype(np.float32) for _ in range(2))
    where = np.arange(16) != 3

    def both(z, t):
        return jax.value_and_grad(
            lambda z: distillation_loss(z, t, where=where, temperature=2.0, reduction="sum", **KINDS[kind])
        )(z)

    mesh = jax.make_mesh((2, 4), ("d", "v"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        got = jax.jit(both)(jax.device_put(z, P("d", "v")), jax.device_put(t, P("d", None)))
    chex.assert_trees_all_close(jax.device_get(got), jax.jit(both)(z, t), rtol=64 * EPS, atol=4 * EPS)


# --- jaxce.divergence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_add_up(kind, rng):
    """The sums, and the gradients, of some classes after the others are those of the row."""
    of = divergence.divergence_of(KINDS[kind]["divergence"], KINDS[kind].get("beta", 0.5))
    z = Models(*(jnp.asarray(rng.normal(size=(3, 12)) * 3, jnp.float32) for _ in range(2)))
    sides = Models(*(divergence.side_of(row_stats(Options(), Rows(x))) for x in z))

    @functools.partial(jax.jit, static_argnums=0)
    def of_blocks(size):
        parts = [jax.tree.map(lambda x, i=i: x[:, i : i + size], z) for i in range(0, 12, size)]
        blocks = [divergence.compare(part, sides) for part in parts]
        total = jax.tree.map(lambda *x: sum(x), *(divergence.sums(of, pair) for pair in blocks))
        row = divergence.finish(of, total)
        grads = [divergence.gradient(of, pair, row) for pair in blocks]
        slopes = [divergence.temperature_gradient(of, *x) for x in zip(blocks, [row] * len(blocks), grads, strict=True)]
        return row.value, jnp.concatenate(grads, -1), sum(slopes)

    chex.assert_trees_all_close(of_blocks(5), of_blocks(12), rtol=64 * EPS, atol=4 * EPS)
    np.testing.assert_allclose(of_blocks(5)[0], distillation_loss(*z, **KINDS[kind]), rtol=32 * EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_log_probs(kind, rng):
    """Of whole distributions it is the loss, however near they are; of parts, the sum as it stands."""
    of = divergence.divergence_of(KINDS[kind]["divergence"], KINDS[kind].get("beta", 0.5))
    t = rng.normal(size=(3, 8)).astype(np.float32)
    z = (t + np.float32([[1], [1e-2], [1e-6]]) * rng.normal(size=(3, 8))).astype(np.float32)
    p, beta = jax.nn.softmax(t), KINDS[kind].get("beta", 0.5)
    hole = p.at[:, 0].set(0)

    def whole(z):
        return divergence.divergence_of_log_probs(of, jax.nn.log_softmax(z), p, whole=True)

    @jax.jit
    def everything(z):
        log_q = jax.nn.log_softmax(z)
        both = [jax.vjp(f, z) for f in (whole, lambda z: distillation_loss(z, t, **KINDS[kind]))]
        some = divergence.divergence_of_log_probs(of, log_q[:, :3], p[:, :3])
        same = divergence.divergence_of_log_probs(of, jnp.log(p), p, whole=True)
        with_hole = jax.value_and_grad(lambda x: divergence.divergence_of_log_probs(of, x, hole).sum())(log_q)
        return [(value, pull(jnp.ones(3))[0]) for value, pull in both], log_q, some, same, with_hole

    ((value, grad), (wanted, wanted_grad)), log_q, part, same, with_hole = everything(z)
    # p and q are rounded: their differences by ε, of which the divergence of nearly equal ones is a square.
    np.testing.assert_allclose(np.sqrt(value), np.sqrt(wanted), rtol=16 * EPS, atol=4 * EPS)
    np.testing.assert_allclose(grad, wanted_grad, rtol=64 * EPS, atol=4 * EPS)
    np.testing.assert_array_equal(same, 0)
    some, q = np.float64(p[:, :3]), np.exp(np.float64(log_q[:, :3]))
    m = {"forward": q, "reverse": some}.get(kind, beta * some + (1 - beta) * q)
    to_teacher, to_student = np.sum(some * np.log(some / m), -1), np.sum(q * np.log(q / m), -1)
    shares = (beta, 1 - beta) if kind.startswith("jsd") else (1, 1)
    np.testing.assert_allclose(part, shares[0] * to_teacher + shares[1] * to_student, rtol=16 * EPS, atol=8 * EPS)
    assert np.isfinite(with_hole[0]) == (kind != "reverse")
    assert not np.isnan(with_hole[1]).any()
