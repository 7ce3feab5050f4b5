"""The logits divided by a temperature: exact where they are given, and differentiable in it, in every loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import jaxce

EPS = float(np.finfo(np.float32).eps)
N, V, D = 12, 7, 5
LABELS = np.arange(N) % V
IMPLEMENTATIONS = ["xla", "autodiff"]


def below(logits: np.ndarray, temperature: np.ndarray) -> np.ndarray:
    """(z − max)/T, in float64: the difference of float32 numbers is exact there."""
    z = logits.astype(np.float64)
    return (z - z.max(-1, keepdims=True)) / temperature.astype(np.float64)[:, None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [0.0, 1024.0, -3e4])
def test_every_digit_from_a_hundredth_to_a_hundred(offset, implementation, rng):
    """Whatever the logits have in common, although quotients as large as that would have lost the digits."""
    temperature = np.float32(10) ** np.linspace(-2, 2, N, dtype=np.float32)
    steps = rng.integers(0, 64, (N, V)) / 64 * np.maximum(temperature, 2**-6)[:, None]  # of a few temperatures
    logits = (np.round(steps * 512) / 512 + offset).astype(np.float32)
    cotangent = rng.normal(size=N).astype(np.float32)
    loss, vjp = jax.vjp(
        lambda z, t: jaxce.softmax_cross_entropy(z, LABELS, temperature=t, implementation=implementation),
        logits,
        temperature,
    )
    dlogits, dtemperature = vjp(cotangent)
    z = below(logits, temperature)
    problem = oracle.Problem(z, oracle.one_hot(LABELS, V))
    np.testing.assert_allclose(loss, problem.losses().loss.value, rtol=16 * EPS)
    dz = problem.gradients(oracle.Cotangents(loss=cotangent.astype(np.float64))).logits.value
    np.testing.assert_allclose(dlogits, dz / temperature[:, None], rtol=32 * EPS)
    terms = dz * z / temperature[:, None]
    assert np.all(abs(dtemperature + terms.sum(-1)) <= 40 * EPS * abs(terms).sum(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_output_is_that_of_the_quotient(implementation, rng):
    """After the soft cap, before the mask; the aux record too, and each output has its gradient."""
    logits = rng.normal(size=(N, V)).astype(np.float32) * 6
    temperature = rng.uniform(0.3, 3, N).astype(np.float32)
    labels, where = LABELS % 5, np.arange(V) != 5
    cotangents = [jnp.asarray(rng.normal(size=N), jnp.float32) for _ in range(4)]
    options = {"where": where, "label_smoothing": 0.1, "z_loss": 0.01, "return_aux": True}

    def outputs(result):
        loss, aux = result
        return loss, aux.nll, aux.log_normalizer, aux.entropy

    def tempered(z, t):
        capped = {"logit_softcap": 4.0, "temperature": t, "implementation": implementation}
        return outputs(jaxce.softmax_cross_entropy(z, labels, **capped, **options))

    def by_hand(z, t):
        return outputs(jaxce.softmax_cross_entropy(4 * jnp.tanh(z / 4) / t[:, None], labels, **options))

    (got, got_vjp), (wanted, wanted_vjp) = (jax.vjp(f, logits, temperature) for f in (tempered, by_hand))
    # A quotient of up to 4/0.3 is rounded in one and in the other.
    chex.assert_trees_all_close(got, wanted, rtol=32 * EPS, atol=16 * 14 * EPS)
    chex.assert_trees_all_close(
        got_vjp(tuple(cotangents)), wanted_vjp(tuple(cotangents)), rtol=64 * EPS, atol=4 * 14 * 14 * 16 * EPS
    )


@pytest.mark.parametrize("targets", ["index", "probs", "sparse"])
def test_the_linear_loss_is_that_of_its_logits(targets, rng):
    """Each mode, in one block and in several of classes or tokens, with its gradients in everything that is divided."""
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((N, D), (V, D)))
    temperature = jnp.asarray(rng.uniform(0.3, 3, N), jnp.float32)
    probs = jnp.asarray(rng.dirichlet(np.ones(V), N), jnp.float32)
    entries = np.stack([LABELS, (LABELS + 2) % V], -1)
    target = {"index": LABELS, "probs": probs, "sparse": jaxce.SparseTargets(entries, probs[:, :2])}[targets]
    weights = jnp.asarray(rng.uniform(size=N), jnp.float32)
    options = {"weights": weights, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "mean"}

    def dense(h, k, t):
        return jaxce.softmax_cross_entropy(h @ k.T / t[:, None], target, **options)

    def linear(mode, block_n, block_v):
        plan = jaxce.LinearPlan((N, D, V), mode, block_n, block_v, 0, 0, 0, 0, "cpu")

        def loss(h, k, t):
            return jaxce.linear_cross_entropy(h, k, target, plan=plan, temperature=t, vocab_axis=0, **options)

        return loss

    wanted = jax.value_and_grad(dense, (0, 1, 2))(hidden, kernel, temperature)
    for plan in ("recompute", N, V), ("recompute", N, 3), ("store", N, V), ("store", 5, V), ("store", 5, 3):
        got = jax.jit(jax.value_and_grad(linear(*plan), (0, 1, 2)))(hidden, kernel, temperature)
        # Logits of some 10 units, off by (D + 2) ε, over 0.3.
        chex.assert_trees_all_close(got, wanted, rtol=64 * EPS, atol=(D + 2) * 10 / 0.3 * EPS)


def test_against_optax(rng):
    logits = jnp.asarray(rng.normal(size=(N, V)), jnp.float32)

    def ours(z, t):
        return jaxce.softmax_cross_entropy(z, LABELS, temperature=t, reduction="sum")

    def theirs(z, t):
        return optax.losses.softmax_cross_entropy_with_integer_labels(z / t, LABELS).sum()

    got, wanted = (jax.value_and_grad(f, (0, 1))(logits, 0.7) for f in (ours, theirs))
    chex.assert_trees_all_close(got, wanted, rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (3, 4)])
def test_a_number_or_what_broadcasts_to_the_batch(shape, rng):
    """Its gradient is the sum over the examples that share it, in its own shape and dtype."""
    logits = jnp.asarray(rng.normal(size=(3, 4, V)), jnp.float32)
    labels = LABELS.reshape(3, 4)
    temperature = jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)

    def loss(t):
        return jaxce.softmax_cross_entropy(logits, labels, temperature=t, reduction="sum")

    each = jax.grad(loss)(jnp.broadcast_to(temperature, (3, 4)))
    got = jax.grad(loss)(temperature)
    _, vjp = jax.vjp(lambda t: jnp.broadcast_to(t, (3, 4)), temperature)
    chex.assert_trees_all_close(got, vjp(each)[0], rtol=32 * EPS, atol=12 * EPS * float(abs(each).max()))
    np.testing.assert_allclose(loss(temperature), loss(jnp.broadcast_to(temperature, (3, 4))), rtol=16 * EPS)


def test_a_temperature_of_one_is_none():
    """No array is divided."""

    def program(**options):
        return str(jax.make_jaxpr(lambda z: jaxce.softmax_cross_entropy(z, LABELS, **options))(jnp.zeros((N, V))))

    assert program(temperature=1) == program(temperature=1.0) == program()
    assert program(temperature=2.0) != program()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_or_does_not_count(implementation, rng):
    """A class of logit −inf changes no gradient in the temperature; an ignored row of NaN gives 0."""
    logits = rng.normal(size=(4, V)).astype(np.float32)
    logits[0, 6] = -np.inf
    logits[1] = np.nan
    logits[2, 3] = np.nan
    labels = np.array([2, -1, 1, 3])
    options = {"ignore_index": -1, "implementation": implementation, "reduction": "none", "z_loss": 0.1}

    @jax.jit
    def gradient(z, t):
        return jax.grad(lambda t: jnp.sum(jaxce.softmax_cross_entropy(z, labels, temperature=t, **options)))(t)

    got = gradient(logits, jnp.full(4, 0.5))
    without = jax.grad(lambda t: jaxce.softmax_cross_entropy(logits[0, :6], np.array(2), temperature=t, z_loss=0.1))(
        0.5
    )
    np.testing.assert_allclose(got[0], without, rtol=32 * EPS)
    np.testing.assert_array_equal(got[1], 0)
    assert np.isnan(got[2])
    assert np.isfinite(got[3])


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan])
def test_a_traced_one_that_is_not_positive_gives_nan(wrong):
    hidden, kernel = jnp.ones((N, D)), jnp.ones((D, V))
    for loss in (
        lambda t: jaxce.softmax_cross_entropy(hidden @ kernel, LABELS, temperature=t),
        lambda t: jaxce.linear_cross_entropy(hidden, kernel, LABELS, temperature=t),
    ):
        assert np.isnan(jax.jit(loss)(wrong)).all()


@pytest.mark.slow
def test_second_derivatives(rng):
    """Of the hand-written rule, against forward mode through plain JAX."""
    logits = jnp.asarray(rng.normal(size=(3, V)), jnp.float32)
    temperature = jnp.asarray([0.4, 1.3, 2.0], jnp.float32)

    def loss(implementation):
        def of(z, t):
            options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum", "implementation": implementation}
            return jaxce.softmax_cross_entropy(z, LABELS[:3], temperature=t, **options)

        return of

    got = jax.jacrev(jax.grad(loss(None), (0, 1)), (0, 1))(logits, temperature)
    wanted = jax.jacfwd(jax.jacfwd(loss("autodiff"), (0, 1)), (0, 1))(logits, temperature)
    # Second derivatives in the temperature are up to 3·(z/T)²/T², a few hundred here.
    chex.assert_trees_all_close(got, wanted, rtol=64 * EPS, atol=300 * 16 * EPS)
