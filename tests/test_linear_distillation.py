"""Distillation from hidden states: the loss of the logits, without them; and a teacher of whom K classes are known."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxce
from tests.pairwise import pairwise
from tests.test_axis_name import mesh_of
from tests.test_linear import equations

EPS = float(np.finfo(np.float32).eps)
N, D, E, V, K = 37, 6, 9, 1500, 4
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


def models(rng, tokens=(N,), classes=V):
    shapes = {"hidden": (*tokens, D), "kernel": (D, classes), "bias": (classes,)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}, {
        "teacher_hidden": jnp.asarray(rng.normal(size=(*tokens, E)), jnp.float32),
        "teacher_kernel": jnp.asarray(rng.normal(size=(classes, E)), jnp.float32),
        "teacher_bias": jnp.asarray(rng.normal(size=classes), jnp.float32),
    }


def per_token(rng, tokens=(N,)):
    weights = rng.uniform(0.5, 2, tokens) * (rng.random(tokens) < 0.8)
    return {
        "temperature": jnp.asarray(rng.uniform(0.5, 2, tokens), jnp.float32),
        "weights": jnp.asarray(weights, jnp.float32),
    }


def linear(parts, teacher, numbers, **options):
    if options.pop("transposed", False):
        teacher = teacher | {"teacher_kernel": teacher["teacher_kernel"].T}
        parts = parts | {"kernel": parts["kernel"].T}
        axes = {"vocab_axis": 0, "teacher_vocab_axis": 1}
    else:
        axes = {"teacher_vocab_axis": 0}
    return jaxce.linear_distillation_loss(**parts, **teacher, **numbers, **axes, **options)


def logits_of(hidden, kernel, bias):
    z = jnp.matmul(hidden, kernel, precision="highest")
    return z + jnp.broadcast_to(bias, z.shape)


def dense(parts, teacher, numbers, **options):
    for name in "mode", "transposed":
        options.pop(name, None)
    student = logits_of(parts["hidden"], parts["kernel"], parts["bias"])
    of_teacher = logits_of(teacher["teacher_hidden"], teacher["teacher_kernel"].T, teacher["teacher_bias"])
    return jaxce.distillation_loss(student, of_teacher, **numbers, **options)


def assert_alike(parts, teacher, numbers, rng, tolerance=1, **options):
    """Values and gradients, with a random cotangent."""
    results = []
    for form in linear, dense:
        f = jax.jit(lambda parts, numbers, form=form: form(parts, teacher, numbers, **options))
        results.append(jax.vjp(f, parts, numbers))
    (got, pull), (wanted, wanted_pull) = results
    np.testing.assert_allclose(got, wanted, rtol=64 * EPS)
    ct = jnp.asarray(rng.normal(size=wanted.shape), jnp.float32)
    for found, expected in zip(*(jax.tree.leaves(p(ct)) for p in (pull, wanted_pull)), strict=True):
        # The logits of two ways to multiply differ by roundings of up to 10, and what is made of them in proportion.
        np.testing.assert_allclose(found, expected, rtol=0, atol=512 * EPS * tolerance * float(abs(expected).max()))


CASES = [
    {"mode": "recompute", "reduction": "none"},
    {"mode": "recompute", "reduction": "mean", "transposed": True},
    {"mode": "store", "reduction": "mean"},
    {"mode": "store", "reduction": "mean_count", "transposed": True},
    {"reduction": "sum"},
    {"reduction": "none", "implementation": "autodiff"},
]


@pytest.mark.parametrize(("case", "divergence", "options"), pairwise(range(len(CASES)), DIVERGENCES, [True, False]))
def test_it_is_the_loss_of_the_logits(case, divergence, options, rng, monkeypatch):
    """In several blocks of tokens and of classes, of which the last are smaller."""
    from jaxce.linear import distillation

    monkeypatch.setattr(distillation, "_KEPT", dict.fromkeys(distillation._KEPT, 16 * V))
    monkeypatch.setattr(distillation, "_LEAST", 1)
    monkeypatch.setattr(distillation, "_PART", dict.fromkeys(distillation._PART, 2**10))
    parts, teacher = models(rng, tokens=(3, 13))
    numbers, more = {}, {"beta": 0.3} if divergence == "jsd" else {}
    if options:
        numbers = per_token(rng, (3, 13))
        more |= {"logit_softcap": 5.0, "teacher_logit_softcap": 7.0, "where": np.arange(V) % 7 != 3}
    assert_alike(parts, teacher, numbers, rng, divergence=divergence, **CASES[case], **more)


def test_bad_tokens(rng):
    """NaN in either model makes the loss NaN where the token counts, and changes nothing where it does not."""
    parts, teacher = models(rng, classes=40)
    weights = jnp.ones(N).at[4].set(0)
    for name, place in ("hidden", parts), ("teacher_hidden", teacher):
        for token, counts in (4, False), (5, True):
            broken = {**place, name: place[name].at[token, 2].set(jnp.nan)}
            given = (broken, teacher) if name == "hidden" else (parts, broken)
            for mode, reduction in ("store", "sum"), ("recompute", "none"):
                options = {"mode": mode, "reduction": reduction}
                loss, grads = jax.value_and_grad(
                    lambda p, t=given[1], o=options: jnp.sum(linear(p, t, {"weights": weights}, **o))
                )(given[0])
                assert np.isnan(loss) == counts
                wanted, expected = jax.value_and_grad(
                    lambda p, o=options: jnp.sum(linear(p, teacher, {"weights": weights}, **o))
                )(parts)
                if counts:
                    assert np.all(np.isnan(grads["hidden"][token]))
                    np.testing.assert_allclose(
                        np.delete(grads["hidden"], token, 0),
                        np.delete(expected["hidden"], token, 0),
                        rtol=1e-5,
                        atol=1e-6,
                    )
                else:
                    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
                    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_models_without_bias(rng):
    parts, teacher = models(rng, tokens=(5,), classes=11)
    del parts["bias"], teacher["teacher_bias"]
    loss, grads = jax.value_and_grad(lambda parts: linear(parts, teacher, {}, reduction="sum"))(parts)
    h, k, g, w = (np.asarray(x, np.float64) for x in (*parts.values(), *teacher.values()))
    log_q, log_p = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (h @ k, g @ w.T))
    dz = np.exp(log_q) - np.exp(log_p)
    np.testing.assert_allclose(loss, np.sum(np.exp(log_p) * (log_p - log_q)), rtol=512 * EPS)
    for name, wanted in {"hidden": dz @ k.T, "kernel": h.T @ dz}.items():
        np.testing.assert_allclose(grads[name], wanted, rtol=0, atol=512 * EPS * abs(wanted).max())


@pytest.mark.every_case
@pytest.mark.parametrize("of", ["bias", "teacher_bias"])
def test_a_model_without_any_class_is_nan(of):
    """Logits of nothing but −inf, which no NaN has made known; the other model is exactly (½, ½)."""
    given = {"hidden": jnp.ones((3, D)), "kernel": jnp.zeros((D, 2)), "bias": jnp.zeros(2)}
    given |= {"teacher_hidden": jnp.ones((3, E)), "teacher_kernel": jnp.zeros((2, E)), "teacher_bias": jnp.zeros(2)}
    given[of] = jnp.full(2, -jnp.inf)
    loss = jaxce.linear_distillation_loss(**given, teacher_vocab_axis=0, divergence="reverse_kl")
    np.testing.assert_array_equal(np.isnan(loss), [True] * 3)


@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_no_array_of_all_logits(mode, rng, monkeypatch):
    from jaxce.linear import distillation

    monkeypatch.setattr(distillation, "_KEPT", dict.fromkeys(distillation._KEPT, 16 * V))
    monkeypatch.setattr(distillation, "_LEAST", 1)
    monkeypatch.setattr(distillation, "_PART", dict.fromkeys(distillation._PART, 2**10))
    parts, teacher = models(rng)
    loss = functools.partial(linear, teacher=teacher, numbers={}, mode=mode, reduction="mean")
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(parts).jaxpr
    sizes = {v.aval.size for eqn in equations(jaxpr) for v in eqn.outvars}
    assert max(sizes) < N * V / 2


def test_the_products_of_each_mode(rng):
    """Four in each block where logits are kept; otherwise two in each of three passes, and two more."""
    parts, teacher = models(rng)
    for mode, products in ("store", 4), ("recompute", 8):
        loss = functools.partial(linear, teacher=teacher, numbers={}, mode=mode, reduction="mean")
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(parts).jaxpr
        names = [eqn.primitive.name for eqn in equations(jaxpr)]
        assert names.count("dot_general") == products


def test_tpu_computes_logits_again(rng):
    parts, teacher = models(rng)
    loss = functools.partial(linear, teacher=teacher, numbers={}, reduction="mean")
    traced = jax.jit(jax.value_and_grad(loss)).trace(parts)
    for platform, products in ("tpu", 8), ("cpu", 4):
        assert traced.lower(lowering_platforms=(platform,)).as_text().count("dot_general ") == products


@pytest.mark.every_case
@pytest.mark.parametrize(("narrow", "on_cpu"), [(False, 1024), (True, 512)])
def test_tokens_in_a_block_that_keeps_its_logits(narrow, on_cpu):
    """128 MB of float32 logits of each model on CPU, half of it for narrow kernels; none on TPU; 512 MB on GPU."""
    from jaxce.linear import distillation

    found = distillation._plans(4096, 2**15, narrow, (1, 1), None, None, "mean")
    assert [plan.student.block_n for plan in found] == [on_cpu, 0, 4096]


@pytest.mark.parametrize("frozen", ["hidden", "kernel"])
def test_what_is_frozen_takes_no_product(frozen, rng):
    """In the program of the forward pass, which keeps the gradients, as when they are taken outside of jit."""
    parts, teacher = models(rng)
    fixed = {frozen: parts.pop(frozen)}

    def loss(parts):
        return linear(parts | fixed, teacher, {}, reduction="mean")

    @jax.jit
    def forward(parts):
        return jax.vjp(loss, parts)

    shapes = re.findall(r" f32\[([\d,]*)\]\S* (?:dot|custom-call)\(", forward.lower(parts).compile().as_text())
    assert len([shape for shape in shapes if shape not in ("", f"{N}")]) == 3
    wanted = jax.grad(lambda parts: dense(parts | fixed, teacher, {}, reduction="mean"))(parts)
    chex.assert_trees_all_close(jax.grad(loss)(parts), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["shard_map", "explicit"])
def test_over_devices(kind, reduction, rng):
    parts, teacher = models(rng, (8,), 24)
    numbers = per_token(rng, (8,))
    ct = jnp.asarray(rng.normal(size=(8,) if reduction == "none" else ()), jnp.float32)

    def run(parts, teacher, numbers, ct, **options):
        loss, pull = jax.vjp(
            lambda parts, numbers: linear(parts, teacher, numbers, reduction=reduction, divergence="jsd", **options),
            parts,
            numbers,
        )
        return loss, pull(ct)

    wanted = jax.jit(run)(parts, teacher, numbers, ct)
    mesh = mesh_of(2, 4, names=("b", "v"), kind=AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    split = {"hidden": P("b"), "kernel": P(None, "v"), "bias": P("v")}
    of_teacher = {"teacher_hidden": P("b"), "teacher_kernel": P("v"), "teacher_bias": P("v")}
    of_numbers, of_loss = dict.fromkeys(numbers, P("b")), P("b") if reduction == "none" else P()
    given = (parts, split), (teacher, of_teacher), (numbers, of_numbers)
    if kind == "explicit":
        place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))  # noqa: E731
        with jax.set_mesh(mesh):
            got = jax.jit(run)(*(jax.tree.map(place, *pair) for pair in given), place(ct, of_loss))
    else:
        names = {"axis_name": "v"} | ({} if reduction == "none" else {"batch_axis_name": "b"})
        mapped = jax.shard_map(
            functools.partial(run, **names),
            mesh=mesh,
            in_specs=(split, of_teacher, of_numbers, of_loss),
            out_specs=(of_loss, (split, of_numbers)),
        )
        got = jax.jit(mapped)(parts, teacher, numbers, ct)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(wanted), rtol=1e-4, atol=1e-5)


# --- a teacher of K classes -----------------------------------------------------------------------------------------


def top_k(rng, classes=V, tokens=(N,)):
    """Some of them given twice, some with probability 0 and an index that is no class."""
    indices = np.stack([rng.permutation(classes)[:K] for _ in range(np.prod(tokens))]).reshape(*tokens, K)
    probs = rng.dirichlet(np.ones(K + 1), tokens)[..., :K]
    indices[::3, 1] = indices[::3, 0]
    probs[1::3, 2], indices[1::3, 2] = 0, -1
    return jaxce.SparseTargets(jnp.asarray(indices, jnp.int32), jnp.asarray(probs, jnp.float32))


def test_hidden_states_that_a_program_closes_over(rng):
    """On an Explicit mesh: they are no arguments of the compiled function, and sharded all the same."""
    (parts, _), teacher, weights = models(rng, (8,), 24), top_k(rng, 24, (8,)), per_token(rng, (8,))["weights"]

    def of_weights(hidden):
        loss = functools.partial(jaxce.linear_distillation_loss, hidden, parts["kernel"], teacher, reduction="sum")
        return jax.jit(jax.value_and_grad(lambda w: loss(weights=w)))(weights)

    with jax.set_mesh(mesh_of(2, 4, names=("b", "v"), kind=AxisType.Explicit)):
        found = of_weights(jax.device_put(parts["hidden"], P("b")))
    wanted = of_weights(parts["hidden"])
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(wanted), rtol=1e-5)


def exact_top_k(divergence, beta, logits, teacher, tail):
    z = [mpmath.mpf(float(x)) for x in logits]
    e = [mpmath.exp(x - max(z)) for x in z]
    q = [x / sum(e) for x in e]
    p: dict[int, mpmath.mpf] = {}
    for i, t in zip(teacher.indices, teacher.probs, strict=True):
        if t:
            p[int(i)] = p.get(int(i), mpmath.mpf(0)) + mpmath.mpf(float(t))
    pairs = [(t, q[i]) for i, t in p.items()]
    pairs.append((1 - sum(p.values()) if tail else mpmath.mpf(0), sum(x for i, x in enumerate(q) if i not in p)))

    def kl(pairs):
        return sum(a * mpmath.log(a / b) if b else mpmath.inf for a, b in pairs if a)

    if divergence == "forward_kl":
        return kl(pairs)
    if divergence == "reverse_kl":
        return kl([(b, a) for a, b in pairs])
    mixed = [(a, b, beta * a + (1 - beta) * b) for a, b in pairs]
    return beta * kl([(a, m) for a, _, m in mixed]) + (1 - beta) * kl([(b, m) for _, b, m in mixed])


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_of_some_classes(divergence, tail, rng):
    classes = 23
    logits = jnp.asarray(2 * rng.normal(size=(N, classes)), jnp.float32)
    teacher = top_k(rng, classes)
    got = jaxce.distillation_loss(logits, teacher, divergence=divergence, tail=tail)
    of_rows = [jaxce.SparseTargets(*x) for x in zip(*map(np.asarray, teacher), strict=True)]
    wanted = [exact_top_k(divergence, 0.5, z, t, tail) for z, t in zip(np.asarray(logits), of_rows, strict=True)]
    np.testing.assert_allclose(got, np.array(wanted, float), rtol=64 * EPS, atol=2 * EPS)

    plain = jaxce.distillation_loss(logits, teacher, divergence=divergence, tail=tail, implementation="autodiff")
    np.testing.assert_allclose(got, plain, rtol=64 * EPS, atol=2 * EPS)
    if divergence == "reverse_kl" and not tail:
        assert np.all(np.isinf(got))
        return
    direction = rng.normal(size=logits.shape)
    slope = jnp.sum(
        jax.grad(lambda z: jnp.sum(jaxce.distillation_loss(z, teacher, divergence=divergence, tail=tail)))(logits)
        * direction
    )
    step = mpmath.mpf(2) ** -20
    moved = [
        [
            sum(
                exact_top_k(divergence, mpmath.mpf(0.5), z + sign * float(step) * d, t, tail)
                for z, d, t in zip(np.asarray(logits, np.float64), direction, of_rows, strict=True)
            )
            for sign in (1, -1)
        ]
    ][0]
    np.testing.assert_allclose(slope, float((moved[0] - moved[1]) / (2 * step)), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_of_all_classes(dtype, rng):
    """Their probabilities do not add up to 1 by a rounding error, which is no mass of a class that is not there."""
    z, t = (jnp.asarray(rng.normal(size=(64, 8)), jnp.float32) for _ in range(2))
    p, ids = jax.lax.top_k(jax.nn.softmax(t), 8)
    p = p.astype(dtype)
    loss = jaxce.distillation_loss(z, jaxce.SparseTargets(ids, p))
    log_p, log_q = np.log(np.asarray(p, np.float64)), np.asarray(jax.nn.log_softmax(z), np.float64)
    log_q = np.take_along_axis(log_q, np.asarray(ids), -1)
    wanted = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=8 * float(jnp.finfo(dtype).eps))
    short = jaxce.distillation_loss(z, jaxce.SparseTargets(ids, 0.97 * p.astype(jnp.float32)))
    np.testing.assert_array_equal(short, np.inf)  # of a class that the student does not have


def test_examples_that_are_not_split_over_the_axis_are_refused(rng):
    parts, _ = models(rng, (4,), 8)
    teacher = jaxce.SparseTargets(jnp.zeros((4, 1), int), jnp.full((4, 1), 0.5))

    def dense(h, k):
        return jaxce.distillation_loss(h @ k, teacher, batch_axis_name="d", reduction="sum")

    def linear(h, k):
        return jaxce.linear_distillation_loss(h, k, teacher, batch_axis_name="d", reduction="sum")

    for loss, name in (dense, "logits"), (linear, "hidden"):
        mapped = jax.shard_map(loss, mesh=mesh_of(2, names=("d",)), in_specs=(P(), P()), out_specs=P())
        with pytest.raises(ValueError, match=rf"^{name}: expected this device's share"):
            mapped(parts["hidden"], parts["kernel"])


def test_a_near_teacher_of_some_classes(rng):
    """The digits of a small divergence are there, as of whole distributions."""
    logits = jnp.asarray(2 * rng.normal(size=(N, 9)), jnp.float32)
    p = np.asarray(jax.nn.softmax(logits), np.float64) * np.exp(1e-3 * rng.normal(size=(N, 9)))
    p /= p.sum(-1, keepdims=True)
    indices = np.argsort(-p)[:, :K]
    teacher = jaxce.SparseTargets(indices, np.take_along_axis(p, indices, -1).astype(np.float32))
    of_rows = [jaxce.SparseTargets(*x) for x in zip(*teacher, strict=True)]
    wanted = [exact_top_k("forward_kl", 0.5, z, t, True) for z, t in zip(np.asarray(logits), of_rows, strict=True)]
    got = jaxce.distillation_loss(logits, teacher)
    # A probability is known to its last digit and so is its logarithm's: of a difference of 1e-3, to 1e-4.
    np.testing.assert_allclose(got, np.array(wanted, float), rtol=1e-3)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_hidden_states_and_a_teacher_of_some_classes(reduction, rng):
    parts, _ = models(rng)
    teacher, numbers = top_k(rng), per_token(rng)
    options = {"reduction": reduction, "logit_softcap": 5.0}

    def of_hidden(parts, numbers):
        return jaxce.linear_distillation_loss(**parts, teacher_hidden=teacher, **numbers, **options)

    def of_logits(parts, numbers):
        return jaxce.distillation_loss(logits_of(**parts), teacher, **numbers, **options)

    (got, pull), (wanted, wanted_pull) = (jax.vjp(f, parts, numbers) for f in (of_hidden, of_logits))
    np.testing.assert_allclose(got, wanted, rtol=64 * EPS)
    ct = jnp.asarray(rng.normal(size=wanted.shape), jnp.float32)
    chex.assert_trees_all_close(pull(ct), wanted_pull(ct), rtol=1e-3, atol=1e-5)


def test_bad_rows_of_a_teacher_of_some_classes(rng):
    """A sum of more than 1, an index that is no class, a NaN: NaN; and nothing of it in a row of weight 0."""
    logits = jnp.asarray(rng.normal(size=(7, 8)), jnp.float32).at[3, 2].set(jnp.nan)
    indices = jnp.array([[0, 1], [0, 8], [-2, 1], [0, 1], [0, 1], [0, 1], [0, 1]])
    probs = jnp.array([[0.7, 0.5], *[[0.5, 0.2]] * 3, [jnp.nan, 0.2], [0.5, -0.2], [0.5, 0.2]])
    teacher = jaxce.SparseTargets(indices, probs)
    for weights in None, jnp.zeros(7):
        loss, pull = jax.vjp(lambda z, w=weights: jaxce.distillation_loss(z, teacher, weights=w), logits)
        (gradient,) = pull(jnp.ones(7))
        bad = np.array([True] * 6 + [False]) & (weights is None)
        np.testing.assert_array_equal(np.isnan(loss), bad)
        np.testing.assert_array_equal(np.isnan(gradient).any(-1), bad)
        if weights is not None:
            assert not np.any(loss)
            assert not np.any(gradient)
        (discarded,) = pull(jnp.float32([1, 1, 1, 0, 1, 1, 1]))  # where(isfinite(loss), loss, 0)
        assert np.all(np.isfinite(discarded[3:4]))


@pytest.mark.parametrize("mode", [None, "recompute"])
def test_no_tokens(mode):
    given = jnp.ones((0, 3)), jnp.ones((3, 5)), jnp.ones((0, 2)), jnp.ones((2, 5))

    def loss(h, k):
        return jaxce.linear_distillation_loss(h, k, *given[2:], reduction="mean", mode=mode)

    value, grads = jax.value_and_grad(loss, (0, 1))(*given[:2])
    assert value == 0
    chex.assert_trees_all_equal(grads, tuple(map(jnp.zeros_like, given[:2])))


def test_a_token_of_weight_0_spoils_no_kernel_of_a_teacher_of_some_classes(rng):
    """Padding may hold anything: NaN times a gradient of 0 would reach every class."""
    parts, _ = models(rng)
    del parts["hidden"]
    teacher, weights = top_k(rng), jnp.ones(N).at[3].set(0)
    hidden = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)

    def dkernel(hidden):
        def loss(kernel):
            given = parts | {"kernel": kernel, "weights": weights}
            return jaxce.linear_distillation_loss(hidden, teacher_hidden=teacher, reduction="sum", **given)

        return jax.grad(loss)(parts["kernel"])

    np.testing.assert_array_equal(dkernel(hidden.at[3].set(jnp.nan)), dkernel(hidden.at[3].set(0)))


@pytest.mark.parametrize("tail", [True, False])
def test_a_weight_of_0_has_the_gradient_of_any_other(tail, rng):
    """The loss of its token, even where nothing else of that token is needed."""
    parts, _ = models(rng)
    teacher, weights = top_k(rng), jnp.zeros(N).at[::2].set(2.0)
    wanted = jaxce.distillation_loss(logits_of(**parts), teacher, tail=tail)

    def of_hidden(weights):
        return jaxce.linear_distillation_loss(**parts, teacher_hidden=teacher, weights=weights, tail=tail)

    def of_logits(weights):
        return jaxce.distillation_loss(logits_of(**parts), teacher, weights=weights, tail=tail)

    for of_weights in of_hidden, of_logits:
        (gradient,) = jax.vjp(of_weights, weights)[1](jnp.ones(N))
        np.testing.assert_allclose(gradient, wanted, rtol=64 * EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_hidden": jnp.ones((N - 1, E))}, r"teacher_hidden: expected shape \(37, 'E'\)"),
        (
            {"teacher_kernel": jnp.ones((V - 1, E)), "teacher_bias": None},
            "teacher_kernel: expected 1500 classes, as kernel has; got 1499",
        ),
        ({"teacher_kernel": jnp.ones((E, V))}, "teacher_kernel: .*pass teacher_vocab_axis=1"),
        ({"teacher_kernel": None}, r"teacher_kernel: expected floats \[E, V\]; got None"),
        ({"teacher_bias": jnp.ones(3)}, r"teacher_bias: expected shape \(1500,\)"),
        ({"mode": "store"}, "mode: expected 'recompute' for reduction='none'"),
        ({"divergence": "kl"}, "divergence: expected one of 'forward_kl'"),
        (
            {"teacher_hidden": jaxce.SparseTargets(jnp.zeros((N, 1), int), jnp.ones((N, 1)))},
            "teacher_kernel: expected None",
        ),
    ],
)
def test_wrong_arguments(changes, message, rng):
    parts, teacher = models(rng)
    with pytest.raises((TypeError, ValueError), match=message):
        jaxce.linear_distillation_loss(**{**parts, **teacher, "teacher_vocab_axis": 0, **changes})


@pytest.mark.parametrize("mode", ["recompute", "store"])
@pytest.mark.parametrize("along", ["hidden", "weights"])
def test_forward_mode_takes_the_other_implementation(along, mode, rng):
    parts, teacher = models(rng)
    parts["weights"] = jnp.ones(N)
    tangent = rng.normal(size=parts[along].shape).astype(np.float32)

    def loss(x, **options):
        given = parts | teacher | {along: x} | options
        return jaxce.linear_distillation_loss(**given, teacher_vocab_axis=0, reduction="mean")

    if (along, mode) != ("weights", "recompute"):  # which are no part of what has a rule of its own
        with pytest.raises(TypeError, match="implementation='autodiff'"):
            jax.jvp(functools.partial(loss, mode=mode), (parts[along],), (tangent,))
    slope = jax.jvp(functools.partial(loss, implementation="autodiff"), (parts[along],), (tangent,))[1]
    gradient = jax.grad(functools.partial(loss, mode=mode))(parts[along])
    np.testing.assert_allclose(slope, jnp.vdot(gradient, tangent), rtol=1e-4, atol=1e-6)
