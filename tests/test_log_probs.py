"""Log-probabilities of ids, with entropy and tail: against exact arithmetic, and the linear form against the dense."""

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
from tests.test_axis_name import mesh_of
from tests.test_linear import equations

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)
V, K = 11, 3
IMPLEMENTATIONS = ["xla", "autodiff"]
exp, log = np.frompyfunc(mpmath.exp, 1, 1), np.frompyfunc(lambda x: mpmath.log(x) if x > 0 else mpmath.ninf, 1, 1)
exact = np.frompyfunc(mpmath.mpf, 1, 1)


def expected(logits, ids, temperature, ignore_index, cotangents):
    """All results and the gradient in the logits, with the size of its terms, for logits and ids of one row each."""
    z = exact(logits.astype(np.float64)) / exact(temperature.astype(np.float64))[:, None]
    e = exp(z - z.max(-1, keepdims=True))
    total = e.sum(-1, keepdims=True)
    p, log_p = e / total, z - z.max(-1, keepdims=True) - log(total)
    plogp = np.where(p == 0, 0, p * np.where(p == 0, 0, log_p))
    entropy = -plogp.sum(-1)
    classes = np.arange(V)
    hit = ((ids[..., None] == classes) & (ids != ignore_index)[..., None]).astype(int)  # [N, K, V]
    others = 1 - hit.max(1)
    outside = (e * others).sum(-1, keepdims=True)
    tail = log(outside / total)[:, 0]
    chosen = np.where(ids == ignore_index, 0, np.take_along_axis(log_p, np.clip(ids, 0, V - 1), -1))
    of_ids, of_entropy, of_normalizer, of_tail = (exact(c.astype(np.float64)) for c in cotangents)
    q = np.where(outside > 0, e * others / np.where(outside > 0, outside, 1), 0)
    used = (of_ids * (ids != ignore_index))[..., None]
    terms = [
        *np.moveaxis(used * (hit * (1 - p[:, None]) - (1 - hit) * p[:, None]), 1, 0),
        -of_entropy[:, None] * (plogp + p * entropy[:, None]),
        of_normalizer[:, None] * p,
        of_tail[:, None] * np.where(outside > 0, others * q * (1 - outside / total) - (1 - others) * p, 0),
    ]
    scale = exact(temperature.astype(np.float64))[:, None]
    results = chosen, entropy, z.max(-1) + log(total)[:, 0], tail, sum(terms) / scale, sum(map(abs, terms)) / scale
    return [x.astype(np.float64) for x in results]


def rows(rng):
    """Rows of logits of every kind, with ids, temperatures and cotangents."""
    kinds = [
        rng.normal(size=(8, V)),
        rng.normal(size=(8, V)) * 30,
        rng.normal(size=(4, V)) - 20,
        np.round(rng.normal(size=(4, V)) * 4) + 1e4,
        np.zeros((2, V)),
        np.where(np.arange(V) == 4, 80, rng.normal(size=(4, V))),
        np.where(np.arange(V) < 3, 0, -150 + rng.normal(size=(4, V))),
        np.where(np.arange(V) < 3, -90, rng.normal(size=(4, V))),
        np.where(rng.random((4, V)) < 0.3, -np.inf, rng.normal(size=(4, V))),
    ]
    z = np.concatenate(kinds).astype(np.float32)
    n = len(z)
    ids = rng.integers(0, V, (n, K)).astype(np.int32)
    ids[34:42] = np.arange(K)  # all the mass, then next to none
    ids[::5, 2] = ids[::5, 0]  # the same class twice
    ids[1::5, 1] = 7  # ignored below, although it is a class
    temperature = np.ones(n, np.float32)
    temperature[:16] = 10 ** rng.uniform(-2, 2, 16)
    cotangents = [rng.normal(size=s).astype(np.float32) for s in ((n, K), n, n, n)]
    return z, ids, temperature, cotangents


def outputs(result):
    chosen, aux = result
    return chosen, aux.entropy, aux.log_normalizer, aux.tail


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_gradient_of_the_tail_of_narrow_logits(dtype, rng):
    """Worked out in float32, and rounded once."""
    z, ids = jnp.asarray(rng.normal(size=(4, V)), dtype), jnp.asarray(rng.integers(0, V, (4, 2)), jnp.int32)
    found = jax.grad(lambda z: jnp.sum(jaxce.log_probs(z, ids, return_aux=True)[1].tail))(z)
    z = np.asarray(z, np.float64)
    others = ~(np.arange(V) == np.asarray(ids)[..., None]).any(1)
    e = np.exp(z)
    wanted = others * e / (others * e).sum(-1, keepdims=True) - e / e.sum(-1, keepdims=True)
    assert found.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0.51 * eps, atol=32 * EPS)


@pytest.mark.optimized
@pytest.mark.every_case
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_digit_of_values_and_gradients(implementation, rng):
    """With a cotangent of each output alone, and of all of them."""
    z, ids, temperature, cotangents = rows(rng)
    alone = [[c * (j == i) for j, c in enumerate(cotangents)] for i in range(4)]
    options = {"ignore_index": 7, "return_aux": True, "implementation": implementation}

    @jax.jit
    def run(z, temperature, cotangents):
        found, pull = jax.vjp(lambda z: outputs(jaxce.log_probs(z, ids, temperature=temperature, **options)), z)
        return found, [pull(tuple(c))[0] for c in cotangents]

    found, gradients = run(z, temperature, [*alone, cotangents])
    chosen, entropy, normalizer, tail, *_ = expected(z, ids, temperature, 7, cotangents)
    below = (z.max(-1, keepdims=True) - z) / temperature[:, None]
    below = np.where(np.isfinite(below), below, 0)
    np.testing.assert_allclose(found[0], chosen, rtol=16 * EPS)
    np.testing.assert_allclose(found[1], entropy, rtol=64 * EPS, atol=TINY)
    np.testing.assert_allclose(found[2], normalizer, rtol=4 * EPS, atol=4 * EPS)
    # Next to 0 it is minus the mass of the ids, each of which is as well known as its logarithm.
    some = tail > -np.inf
    rounding = (16 + np.where(np.isfinite(chosen), -chosen, 0).max(-1)) * EPS
    assert np.all((abs(found[3] - tail) <= rounding * abs(tail) + TINY)[some])
    np.testing.assert_array_equal(found[3][~some], -np.inf)
    finite = np.isfinite(chosen).all(-1)  # that of an id at −inf is not defined
    for got, given in zip(gradients, [*alone, cotangents], strict=True):
        *_, wanted, size = expected(z, ids, temperature, 7, given)
        # Each term by its own size; what is made of exponentials as small as the smallest number may be lost.
        bound = (2 * (16 + below) * EPS + rounding[:, None]) * size + 8 * TINY * (1 + below) / temperature[:, None]
        if implementation == "autodiff":  # which does not keep the small ones of a confident row
            bound += 64 * EPS * sum(abs(c).reshape(len(z), -1).sum(-1) for c in given)[:, None] / temperature[:, None]
        assert np.all((abs(got - wanted) <= bound)[finite])


def some_rows(rng, dtype=np.float32):
    z = (4 * rng.normal(size=(5, 6, V))).astype(np.float32)
    ids = rng.integers(0, V, (5, 6, K))
    return jnp.asarray(z, dtype), ids


@pytest.mark.every_case
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shapes_axes_masks_and_caps(implementation, rng):
    """As `jax.nn.log_softmax` has them at the ids, of one id each or of K, wherever the classes are."""
    z, ids = some_rows(rng)
    where = (rng.random((5, 1, V)) < 0.8) | (np.arange(V) == 0)
    capped = jnp.where(where, 5 * jnp.tanh(z / 5) / 0.7, -jnp.inf)
    wanted = jnp.take_along_axis(jax.nn.log_softmax(capped), ids, -1)
    options = {"logit_softcap": 5.0, "temperature": 0.7, "implementation": implementation}
    for axis in -1, 0, 1:
        moved, mask = (jnp.moveaxis(x, -1, axis) for x in (z, jnp.asarray(where)))
        got = jaxce.log_probs(moved, ids, axis, mask, **options)
        np.testing.assert_allclose(got, wanted, rtol=32 * EPS, atol=32 * EPS)
        one = jaxce.log_probs(moved, ids[..., 1], axis, mask, **options)
        np.testing.assert_allclose(one, got[..., 1], rtol=16 * EPS)
    flat = jaxce.log_probs(z, rng.integers(0, 6 * V, (5, 2)), (1, 2), implementation=implementation)
    assert flat.shape == (5, 2)
    of_rows = jaxce.log_probs(z, ids, where=np.arange(30).reshape(5, 6) % 3 > 0, implementation=implementation)
    assert np.all((np.asarray(of_rows) == 0).all(-1) == (np.arange(30).reshape(5, 6) % 3 == 0))


@pytest.mark.every_case
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes(dtype, rng):
    with jax.enable_x64(True):
        z, ids = some_rows(rng, dtype)
        chosen, aux = jaxce.log_probs(z, ids, return_aux=True)
        working = "float64" if dtype == "float64" else "float32"
        assert {x.dtype for x in (chosen, aux.entropy, aux.log_normalizer, aux.tail)} == {np.dtype(working)}
        assert aux.prediction.dtype == np.int32
        wanted = jax.nn.log_softmax(z.astype(jnp.float64))
        eps = float(jnp.finfo(working).eps)
        np.testing.assert_allclose(chosen, jnp.take_along_axis(wanted, ids, -1), rtol=16 * eps)
        gradient = jax.grad(lambda z: jnp.sum(jaxce.log_probs(z, ids)))(z)
        assert gradient.dtype == z.dtype


@pytest.mark.every_case
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_rows(implementation, rng):
    """NaN where they count, exactly 0 where they don't, in values and gradients; and a plain number nowhere."""
    z = np.asarray(rng.normal(size=(6, V)), np.float32)
    z[0, 3] = np.nan
    z[1] = -np.inf
    z[2, 3] = np.nan
    ids = np.array([[0, 1], [0, 1], [-100, -100], [0, V], [-1, 2], [1, -100]])

    def total(z):
        chosen, aux = jaxce.log_probs(z, ids, ignore_index=-100, return_aux=True, implementation=implementation)
        return jnp.sum(chosen), (chosen, aux)

    (_, (chosen, aux)), dz = jax.value_and_grad(total, has_aux=True)(jnp.asarray(z))
    np.testing.assert_array_equal(np.isnan(chosen), [[1, 1], [1, 1], [0, 0], [0, 1], [1, 0], [0, 0]])
    np.testing.assert_array_equal(np.isnan(dz), np.broadcast_to([[1], [1], [0], [1], [1], [0]], (6, V)))
    np.testing.assert_array_equal(np.isnan(aux.tail[3:]), [True, True, False])
    assert not np.any(chosen[2])
    assert not np.any(dz[2])
    assert all(np.isfinite(x[2]) for x in aux)
    masked = jaxce.log_probs(z, ids[:, 0], where=np.arange(6) > 5, return_aux=True, implementation=implementation)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(masked))
    assert chosen[5, 1] == 0


@pytest.mark.parametrize("of_hidden", [False, True])
def test_a_row_that_nothing_depends_on_gives_no_nan(of_hidden, rng):
    """As a NaN logit times the cotangent 0 would: where(isfinite(x), x, 0) keeps it out of the gradient."""
    x = rng.normal(size=(4, V)).astype(np.float32)
    x[1, 3] = np.nan
    ids = np.stack([rng.permutation(V)[:K] for _ in range(4)])
    kernel = np.eye(V, dtype=np.float32)

    def outputs(x):
        made = (x, kernel, ids) if of_hidden else (x, ids)
        log_p, aux = (jaxce.linear_log_probs if of_hidden else jaxce.log_probs)(*made, return_aux=True)
        return {"log_p": log_p, "entropy": aux.entropy, "log_normalizer": aux.log_normalizer, "tail": aux.tail}

    shapes, pull = jax.eval_shape(outputs, x), jax.jit(lambda x, ct: jax.vjp(outputs, x)[1](ct)[0])
    for name in shapes:
        ct = {n: np.zeros(s.shape, np.float32) for n, s in shapes.items()}
        ct[name][:] = rng.normal(size=shapes[name].shape)
        assert np.isnan(pull(x, ct)[1]).all(), name
        ct[name][1] = 0
        assert np.isfinite(pull(x, ct)).all(), name


def test_other_transforms(rng):
    z, ids = some_rows(rng)
    whole = jaxce.log_probs(z, ids, return_aux=True)
    chex.assert_trees_all_equal(jax.vmap(lambda z, i: jaxce.log_probs(z, i, return_aux=True))(z, ids), whole)
    tangent = jnp.asarray(rng.normal(size=z.shape), jnp.float32)

    def everything(z, implementation=None):
        chosen, aux = jaxce.log_probs(z, ids, return_aux=True, implementation=implementation)
        return jnp.sum(chosen**2) + jnp.sum(aux.entropy**3) + jnp.sum(aux.tail * aux.log_normalizer)

    plain = functools.partial(everything, implementation="autodiff")
    forward = jax.jvp(plain, (z,), (tangent,))[1]
    np.testing.assert_allclose(forward, jnp.sum(jax.grad(everything)(z) * tangent), rtol=1e-4)
    second = [jax.jvp(jax.grad(f), (z,), (tangent,))[1] for f in (everything, plain)]
    np.testing.assert_allclose(*second, rtol=1e-3, atol=1e-4 * float(abs(second[1]).max()))


def linear(rng, tokens=(3, 5), D=6, classes=V):
    hidden, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((*tokens, D), (D, classes)))
    bias = jnp.asarray(rng.normal(size=classes), jnp.float32)
    ids = jnp.asarray(rng.integers(0, classes, (*tokens, K)), jnp.int32)
    return {"hidden": hidden, "kernel": kernel, "bias": bias}, ids.at[0, ..., 0].set(-100)


def dense_outputs(parts, ids, **options):
    logits = parts["hidden"] @ parts["kernel"]
    return jaxce.log_probs(logits + jnp.broadcast_to(parts["bias"], logits.shape), ids, return_aux=True, **options)


def linear_outputs(parts, ids, vocab_axis=1, **options):
    kernel = parts["kernel"] if vocab_axis else parts["kernel"].T
    given = {**parts, "kernel": kernel, "vocab_axis": vocab_axis}
    return jaxce.linear_log_probs(**given, ids=ids, return_aux=True, **options)


def assert_alike(got, wanted, parts, rng):
    """Values and gradients of two functions of `parts`, with random cotangents of all that is differentiable."""
    found, pull = jax.vjp(lambda parts: outputs(got(parts)), parts)
    expects, wanted_pull = jax.vjp(lambda parts: outputs(wanted(parts)), parts)
    chex.assert_trees_all_close(found, expects, rtol=64 * EPS, atol=64 * EPS)
    cotangents = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in found)
    chex.assert_trees_all_close(pull(cotangents), wanted_pull(cotangents), rtol=256 * EPS, atol=256 * EPS)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("classes", [V, 1500])
def test_linear_is_that_of_its_logits(classes, vocab_axis, rng):
    """In one block and in several, with every option."""
    parts, ids = linear(rng, classes=classes)
    temperature = jnp.asarray(rng.uniform(0.5, 2, ids.shape[:-1]), jnp.float32)
    where = np.arange(classes) % 7 != 5
    options = {"ignore_index": -100, "logit_softcap": 3.0, "temperature": temperature, "where": where}
    ids = jnp.where(ids % 7 == 5, ids - 1, ids)
    budget = {"memory_budget": 300_000} if classes > V else {}
    assert_alike(
        jax.jit(lambda parts: linear_outputs(parts, ids, vocab_axis, **options, **budget)),
        jax.jit(lambda parts: dense_outputs(parts, ids, **options)),
        parts,
        rng,
    )


def test_linear_holds_no_logits(rng):
    """And has exponentials for a tail only where one is used."""
    parts, ids = linear(rng, tokens=(40,), classes=3000)

    def loss(parts, tail):
        chosen, aux = linear_outputs(parts, ids, ignore_index=-100, memory_budget=700_000)
        return jnp.sum(jnp.exp(chosen)) - jnp.sum(aux.tail if tail else aux.entropy)

    for tail in False, True:
        jaxpr = jax.make_jaxpr(jax.value_and_grad(functools.partial(loss, tail=tail)))(parts).jaxpr
        shapes = {v.aval.shape for eqn in equations(jaxpr) for v in eqn.outvars}
        assert not [shape for shape in shapes if np.prod(shape, dtype=int) >= 40 * 3000 and 3000 in shape]
    texts = [jax.jit(jax.grad(functools.partial(loss, tail=t))).lower(parts).compile().as_text() for t in (False, True)]
    assert texts[0].count(" exponential(") <= texts[1].count(" exponential(") - 2


@pytest.mark.optimized
@pytest.mark.parametrize(("n", "classes", "k"), [(256, 20000, 3), (512, 4000, 20), (1024, 50000, 1)])
def test_a_budget_is_kept(n, classes, k):
    """With all that may be asked for: the plan is for the least budget that is taken."""
    hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, 16), (16, classes)))
    ids = jax.ShapeDtypeStruct((n, k), jnp.int32)

    def loss(hidden, kernel, ids, budget):
        chosen, aux = jaxce.linear_log_probs(hidden, kernel, ids, return_aux=True, memory_budget=budget)
        return jnp.sum(chosen) + jnp.sum(aux.entropy * aux.tail)

    with pytest.raises(ValueError, match=r"memory_budget: expected at least [\d,]+ bytes") as error:
        jax.eval_shape(functools.partial(loss, budget=1), hidden, kernel, ids)
    least = int(re.search(r"[\d,]{2,}", str(error.value))[0].replace(",", ""))
    for budget in 2 * least, 16 * least:
        program = jax.jit(jax.grad(functools.partial(loss, budget=budget), (0, 1))).lower(hidden, kernel, ids).compile()
        assert program.memory_analysis().temp_size_in_bytes <= budget


@pytest.mark.every_case
@pytest.mark.parametrize("kind", ["shard_map", "explicit"])
def test_classes_over_devices(kind, rng):
    tokens, classes = (8,), 24
    parts, ids = linear(rng, tokens, classes=classes)
    cotangents = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, K), (8,), (8,), (8,))]

    def run(parts, ids, cotangents, dense_too=True, **options):
        def both(parts):
            forms = [linear_outputs, dense_outputs] if dense_too else [linear_outputs]
            return [outputs(form(parts, ids, ignore_index=-100, **options)) for form in forms]

        found, pull = jax.vjp(both, parts)
        return found, pull([tuple(cotangents)] * len(found))[0]

    wanted = jax.jit(run)(parts, ids, cotangents)
    if kind == "shard_map":
        mesh = mesh_of(4)
        split = {"hidden": P(), "kernel": P(None, "v"), "bias": P("v")}
        mapped = jax.shard_map(
            functools.partial(run, axis_name="v"), mesh=mesh, in_specs=(split, P(), P()), out_specs=(P(), split)
        )
        got = jax.jit(mapped)(parts, ids, cotangents)
    else:
        mesh = mesh_of(2, 4, names=("b", "v"), kind=AxisType.Explicit)
        split = {"hidden": P("b"), "kernel": P(None, "v"), "bias": P("v")}

        def placed(x, spec):
            return jax.device_put(x, jax.NamedSharding(mesh, spec))

        own = {name: placed(x, split[name]) for name, x in parts.items()}
        own_cotangents = [placed(c, P("b")) for c in cotangents]
        with jax.set_mesh(mesh):
            got = jax.jit(functools.partial(run, dense_too=False))(own, placed(ids, P("b")), own_cotangents)
        wanted = jax.jit(functools.partial(run, dense_too=False))(parts, ids, cotangents)
        got, wanted = jax.device_get((got, wanted))
    chex.assert_trees_all_close(got, wanted, rtol=256 * EPS, atol=256 * EPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ids": np.zeros((4, 6), int)},
            r"ids: expected the batch shape \(5, 6\), or that and one more axis, the K >= 1",
        ),
        ({"ids": np.zeros((5, 6, 0), int)}, r"ids: expected the batch shape \(5, 6\)"),
        ({"ids": np.zeros((5, 6, 2))}, r"ids: expected an array of integers, class indices; got float64"),
        ({"ids": np.zeros((5, 6), int), "mode": "store"}, r"mode: expected one of None, 'recompute'; got 'store'"),
        ({"ids": np.zeros((5, 6), int), "label_smoothing": 0.1}, "label_smoothing: expected an argument of"),
        ({"ids": np.zeros((5, 6), int), "temperature": 0.0}, "temperature: expected finite numbers > 0"),
    ],
)
def test_wrong_arguments(changes, message, rng):
    z, _ = some_rows(rng)
    functions = [] if "mode" in changes else [lambda: jaxce.log_probs(z, **changes)]
    for call in [*functions, lambda: jaxce.linear_log_probs(z, jnp.ones((V, V)), **changes)]:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
