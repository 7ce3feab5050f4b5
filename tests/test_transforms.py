"""The loss is a pure function: every transform of JAX, of every argument, gives what a loop or a formula gives."""

from __future__ import annotations

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental.jet import jet
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxce
from jaxce import SparseTargets, softmax_cross_entropy

EPS = float(np.finfo(np.float32).eps)
# Two computations, each within 16 ε of the truth (of p·Σt + t for a gradient entry, which is at most 2).
RTOL = 32 * EPS
M, N, V = 3, 4, 6
IMPLEMENTATIONS = ["xla", "autodiff"]
KINDS = ["index", "probs", "sparse"]


@pytest.fixture
def logits(rng):
    return (2 * rng.normal(size=(N, V))).astype(np.float32)


def make_targets(kind, rng, batch=(N,)):
    if kind == "index":
        return rng.integers(0, V, batch).astype(np.int32)
    if kind == "probs":
        return rng.dirichlet(np.ones(V), batch).astype(np.float32)
    indices = rng.integers(0, V, (*batch, 2)).astype(np.int32)
    return SparseTargets(indices, rng.dirichlet(np.ones(2), batch).astype(np.float32))


# --- vmap -----------------------------------------------------------------------------------------------------------


def arguments(rng, kind):
    """Each array argument, and a batch of M of it."""
    where = rng.random((M, N, V)) < 0.7
    where[..., 0] = True
    base = {
        "logits": (2 * rng.normal(size=(M, N, V))).astype(np.float32),
        "targets": make_targets(kind, rng, (M, N)),
        "class_weights": rng.uniform(0.5, 2, (M, V)).astype(np.float32),
        "label_smoothing": rng.uniform(0, 1, M).astype(np.float32),
        "z_loss": rng.uniform(0, 1, M).astype(np.float32),
        "weights": rng.uniform(0.5, 2, (M, N)).astype(np.float32),
        "where": where,
    }
    return base, {name: jax.tree.map(lambda x: x[0], value) for name, value in base.items()}


@jax.jit
def mean_and_gradient(arrays):
    def loss(logits):
        rest = {name: x for name, x in arrays.items() if name not in ("logits", "targets")}
        return softmax_cross_entropy(logits, arrays["targets"], reduction="mean", **rest)

    return jax.value_and_grad(loss)(arrays["logits"])


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "mapped", ["logits", "targets", "class_weights", "label_smoothing", "z_loss", "weights", "where", "all"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_is_a_loop(kind, mapped, devices, rng):
    """Over each argument alone, the others being the same for all, and over all of them.

    On several devices sums take the form of GPUs and TPUs.
    """
    many, one = arguments(rng, kind)
    # A target on a class that takes no part makes the loss infinite: fine for a value, no use for comparing gradients.
    if kind != "index" or mapped == "targets":
        many.pop("where"), one.pop("where")
    else:
        many["where"][..., :] |= np.eye(V, dtype=bool)[many["targets"]]
        many["where"] |= np.eye(V, dtype=bool)[one["targets"]]
        one["where"] = many["where"][0]
    names = set(one) if mapped == "all" else {mapped} & set(one)
    if not names:
        pytest.skip("the mask is tried with labels")
    arrays = {name: many[name] if name in names else one[name] for name in one}

    axes = {name: 0 if name in names else None for name in arrays}
    mesh = jax.make_mesh((devices,), ("i",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    placed = jax.device_put(arrays, jax.sharding.NamedSharding(mesh, P()))
    value, grad = jax.jit(jax.vmap(mean_and_gradient, in_axes=(axes,)))(placed)
    for m in range(M):
        row = {name: jax.tree.map(operator.itemgetter(m), x) if name in names else x for name, x in arrays.items()}
        wanted, wanted_grad = mean_and_gradient(row)
        np.testing.assert_allclose(value[m], wanted, rtol=RTOL)
        np.testing.assert_allclose(grad[m], wanted_grad, atol=RTOL * (1 + np.abs(wanted_grad).max()))


@pytest.mark.parametrize("shape", [(3, 6), (1100, 1000)])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_a_loss_of_one_row(kind, shape, rng):
    """Over its logits, its temperature or its mask alone, however many there are: many are summed up in chunks."""
    many, classes = shape
    z, T = (2 * rng.normal(size=shape)).astype(np.float32), rng.uniform(0.5, 2, many).astype(np.float32)
    where = (rng.random(shape) < 0.7) | (np.arange(classes) < 6)
    one = jax.tree.map(jnp.asarray, make_targets(kind, rng, ()))
    if kind == "probs":
        one = jnp.asarray(rng.dirichlet(np.ones(classes)), jnp.float32)
    each = jax.tree.map(lambda x: jnp.broadcast_to(x, (many, *x.shape)), one)

    def loss(z, T, targets, **mask):
        return softmax_cross_entropy(z, targets, temperature=T, **mask)

    gradients = jax.grad(lambda z, T: jnp.sum(loss(z, T, each)), (0, 1))
    two, same = jnp.float32(2), jnp.asarray(np.tile(z[0], (many, 1)))
    found = jax.jit(jax.vmap(jax.value_and_grad(lambda z: loss(z, two, one))))(z)
    np.testing.assert_allclose(found[0], loss(z, two, each), rtol=RTOL)
    np.testing.assert_allclose(found[1], gradients(jnp.asarray(z), two)[0], rtol=1e-4, atol=1e-5)
    found = jax.jit(jax.vmap(jax.value_and_grad(lambda T: loss(z[0], T, one))))(T)
    np.testing.assert_allclose(found[0], loss(same, T, each), rtol=RTOL)
    np.testing.assert_allclose(found[1], gradients(same, jnp.asarray(T))[1], rtol=1e-4, atol=1e-5)
    if kind == "index":
        found = jax.jit(jax.vmap(lambda m: loss(z[0], two, one, where=m)))(where)
        np.testing.assert_allclose(found, loss(same, two, each, where=where), rtol=RTOL)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_nested_vmap(kind, implementation, rng):
    logits = rng.normal(size=(2, 3, V)).astype(np.float32)
    targets = make_targets(kind, rng, (2, 3))
    loss = functools.partial(softmax_cross_entropy, label_smoothing=0.1, implementation=implementation)
    wanted = loss(logits, targets)
    np.testing.assert_allclose(jax.vmap(jax.vmap(loss))(logits, targets), wanted, rtol=RTOL)
    swapped = jax.vmap(jax.vmap(loss), in_axes=(1, 1), out_axes=1)
    if kind == "index":
        np.testing.assert_allclose(swapped(logits, targets), wanted, rtol=RTOL)


# --- fusion ---------------------------------------------------------------------------------------------------------


PRODUCERS = {
    "scale": lambda h, s: h * s[None],
    "affine": lambda h, s: h * s[None] + s[None],
    "softcap": lambda h, s: 7 * jnp.tanh(h / 7),
    "norm": lambda h, s: h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True)) * s[None],
}


@pytest.mark.optimized
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_logits_that_are_computed_in_the_same_program(producer, implementation, rng):
    """A compiler may compute the logits anew for each pass, and round them in another way: then no logit is equal to
    the maximum, and a loss that looks for one that is is wrong by up to ln 2."""
    hidden = (3 * rng.normal(size=(64, 8))).astype(np.float32)
    scale = rng.uniform(0.5, 2, 8).astype(np.float32)
    labels = rng.integers(0, 8, 64).astype(np.int32)

    @jax.jit
    def fused(h, s, y):
        return jax.value_and_grad(
            lambda h: softmax_cross_entropy(
                PRODUCERS[producer](h, s), y, label_smoothing=0.1, reduction="sum", implementation=implementation
            )
        )(h)

    z, back = jax.vjp(lambda h: PRODUCERS[producer](h, scale), hidden)
    z64 = np.asarray(z, np.float64)
    log_p = z64 - z64.max(-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    t = 0.9 * np.eye(8)[labels] + 0.1 / 8
    value, grad = fused(hidden, scale, labels)
    # The logits may be off by an ε each, and so may what comes of them.
    slack = RTOL * (1 + np.abs(z64).max())
    np.testing.assert_allclose(value, -(t * log_p).sum(), atol=slack * 64)
    (wanted,) = back((np.exp(log_p) - t).astype(np.float32))
    np.testing.assert_allclose(grad, wanted, atol=slack * 8 * max(1, np.abs(wanted).max()))


# --- derivatives of higher order ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_derivatives_of_every_order(implementation, rng):
    """Those of s ↦ loss(s·z) at 1 are the cumulants of z under p (the first minus z_y): here up to the fourth."""
    z = rng.normal(size=V)
    p = np.exp(z) / np.exp(z).sum()
    mean = p @ z
    m2, m3, m4 = (p @ (z - mean) ** k for k in (2, 3, 4))
    f = lambda s: softmax_cross_entropy(s * z, np.int32(2), implementation=implementation)  # noqa: E731
    for wanted in (mean - z[2], m2, m3, m4 - 3 * m2**2):
        f = jax.grad(f)
        np.testing.assert_allclose(f(1.0), wanted, rtol=1e-12)  # a few hundred roundings


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_hessian(kind, implementation, logits, rng):
    """diag(p) − p pᵀ for targets that sum to 1, by forward over reverse, reverse over reverse, and as products."""
    z, targets = logits[0], jax.tree.map(lambda x: x[0], make_targets(kind, rng))
    f = lambda z: softmax_cross_entropy(z, targets, implementation=implementation)  # noqa: E731
    z64 = z.astype(np.float64)
    p = np.exp(z64 - z64.max())
    p /= p.sum()
    wanted = np.diag(p) - np.outer(p, p)
    v = rng.normal(size=V).astype(np.float32)
    product = p * (v - p @ v)
    np.testing.assert_allclose(jax.jit(jax.hessian(f))(z), wanted, atol=RTOL)
    np.testing.assert_allclose(jax.jit(jax.jacrev(jax.grad(f)))(z), wanted, atol=RTOL)
    np.testing.assert_allclose(jax.jvp(jax.grad(f), (z,), (v,))[1], product, atol=RTOL * np.abs(v).max())
    np.testing.assert_allclose(jax.vjp(jax.grad(f), z)[1](v)[0], product, atol=RTOL * np.abs(v).max())


@pytest.mark.parametrize("lead", [3.0, 20.0, 60.0])
@pytest.mark.parametrize("options", [{}, {"return_aux": True}, {"temperature": 0.5}], ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_second_derivatives_of_a_confident_row(sparse, options, lead, rng):
    """Small as they are, they have their digits: in the label's logit as well, where a sum that holds it has none left.

    For a direction v it is p_j Σ p_k (v_j − v_k).
    """
    z, v = (rng.normal(size=(N, V)).astype(np.float32) for _ in range(2))
    labels = np.arange(N) % V
    z[np.arange(N), labels] = z.max(-1) + np.float32(lead)
    targets = labels
    if sparse:
        targets = jaxce.SparseTargets(np.stack([labels, (labels + 1) % V], -1), np.float32([[1, 0]] * N))
    scale = options.get("temperature", 1.0)
    p = oracle.softmax(z.astype(np.float64) / scale).p / scale
    terms = p[:, :, None] * p[:, None, :] * (v[:, :, None].astype(np.float64) - v[:, None, :])

    def dense(z):
        loss = softmax_cross_entropy(z, targets, reduction="sum", **options)
        return loss[0] if isinstance(loss, tuple) else loss

    def linear(mode):
        def of(z):
            loss = jaxce.linear_cross_entropy(z, jnp.eye(V), targets, reduction="sum", mode=mode, **options)
            return loss[0] if isinstance(loss, tuple) else loss

        return of

    for loss in dense, linear("recompute"), linear("store"):
        got = jax.jit(lambda z, v, loss=loss: jax.jvp(jax.grad(loss), (z,), (v,))[1])(z, v)
        assert np.all(abs(got - terms.sum(-1)) <= (64 + 4 * lead) * EPS * abs(terms).sum(-1))


# --- control flow and program structure -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.nothing_saveable])
def test_checkpoint(policy, logits, rng):
    labels = make_targets("index", rng)
    f = lambda z: softmax_cross_entropy(jnp.sin(z), labels, label_smoothing=0.1, reduction="mean")  # noqa: E731
    wanted = jax.jit(jax.value_and_grad(f))(logits)
    got = jax.jit(jax.value_and_grad(jax.checkpoint(f, policy=policy)))(logits)
    chex.assert_trees_all_close(got, wanted, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("kind", KINDS)
def test_scan(kind, rng):
    """Microbatches: the sums add up, and so do the gradients of what all steps share."""
    logits = rng.normal(size=(M, N, V)).astype(np.float32)
    targets = make_targets(kind, rng, (M, N))

    def step(bias):
        def body(total, batch):
            z, t = batch
            return total + softmax_cross_entropy(z + bias, t, label_smoothing=0.1, reduction="sum"), None

        return body

    def scanned(bias):
        return jax.lax.scan(step(bias[None]), jnp.float32(0), (logits, targets))[0]

    def at_once(bias):
        return softmax_cross_entropy(logits + bias[None, None], targets, label_smoothing=0.1, reduction="sum")

    bias = rng.normal(size=V).astype(np.float32)
    value, grad = jax.jit(jax.value_and_grad(scanned))(bias)
    wanted, wanted_grad = jax.jit(jax.value_and_grad(at_once))(bias)
    np.testing.assert_allclose(value, wanted, rtol=RTOL)
    np.testing.assert_allclose(grad, wanted_grad, atol=RTOL * M * N)


def test_while_and_cond(logits, rng):
    labels = make_targets("index", rng)

    def descend(z):
        grad = jax.grad(lambda z: softmax_cross_entropy(z, labels, reduction="sum"))(z)
        return jax.lax.cond(jnp.sum(grad) > 1e6, lambda: z, lambda: z - grad)

    def confident(z):
        return softmax_cross_entropy(z, labels, reduction="mean") > 0.01

    found = jax.jit(lambda z: jax.lax.while_loop(confident, descend, z))(logits)
    assert softmax_cross_entropy(found, labels, reduction="mean") <= 0.01


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_data_parallel(how, rng):
    """Eight devices, each with its rows; the mean is over all of them."""
    logits = rng.normal(size=(8, N, V)).astype(np.float32)
    labels = rng.integers(0, V, (8, N)).astype(np.int32)

    def loss(z, y):
        return softmax_cross_entropy(z, y, label_smoothing=0.1, reduction="mean")

    def step(z, y):
        value, grad = jax.value_and_grad(loss)(z, y)
        return jax.lax.pmean(value, "data"), grad

    if how == "pmap":
        values, grads = jax.pmap(step, axis_name="data")(logits, labels)
        value = values[0]
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=(P(), P("data"))))
        value, grads = sharded(logits.reshape(8 * N, V), labels.reshape(-1))
    wanted, wanted_grad = jax.value_and_grad(loss)(logits, labels)
    np.testing.assert_allclose(value, wanted, rtol=RTOL)
    np.testing.assert_allclose(np.reshape(grads, (8, N, V)), 8 * wanted_grad, atol=RTOL)


class Variants(chex.TestCase):
    """With and without jit, on arrays and on NumPy, on one device and on several."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True, with_pmap=True)
    def test_every_variant(self):
        rng = np.random.default_rng(1)
        z = rng.normal(size=(N, V)).astype(np.float32)
        y = rng.integers(0, V, N).astype(np.int32)

        @self.variant
        def loss_and_gradient(z, y):
            return jax.value_and_grad(lambda z: softmax_cross_entropy(z, y, reduction="mean"))(z)

        value, grad = loss_and_gradient(z, y)
        log_p = z - np.log(np.exp(z.astype(np.float64)).sum(-1, keepdims=True))
        np.testing.assert_allclose(value, -log_p[np.arange(N), y].mean(), rtol=RTOL)
        np.testing.assert_allclose(grad, (np.exp(log_p) - np.eye(V)[y]) / N, atol=RTOL)


# --- forward mode, and the two implementations ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_of_autodiff(kind, logits, rng):
    """jvp, linearize and jacfwd give the product of the gradient with the tangent."""
    targets = make_targets(kind, rng)
    tangent = rng.normal(size=(N, V)).astype(np.float32)
    f = functools.partial(
        softmax_cross_entropy, targets=targets, label_smoothing=0.1, reduction="sum", implementation="autodiff"
    )
    grad = jax.grad(functools.partial(softmax_cross_entropy, targets=targets, label_smoothing=0.1, reduction="sum"))
    grad = np.asarray(grad(logits), np.float64)
    bound = RTOL * 2 * np.abs(tangent).sum()
    np.testing.assert_allclose(jax.jvp(f, (logits,), (tangent,))[1], (grad * tangent).sum(), atol=bound)
    np.testing.assert_allclose(jax.linearize(f, logits)[1](tangent), (grad * tangent).sum(), atol=bound)
    np.testing.assert_allclose(jax.jacfwd(f)(logits), grad, atol=RTOL * 2)


@pytest.mark.usefixtures("x64")
def test_taylor_mode_of_autodiff(rng):
    """jet gives the derivatives along a line: the cumulants again (see above), as Taylor coefficients."""
    z = rng.normal(size=V)
    p = np.exp(z) / np.exp(z).sum()
    mean = p @ z
    f = functools.partial(softmax_cross_entropy, targets=np.int32(2), implementation="autodiff")
    _, series = jet(lambda s: f(s * z), (1.0,), ((1.0, 0.0, 0.0),))
    np.testing.assert_allclose(series, [mean - z[2], p @ (z - mean) ** 2, p @ (z - mean) ** 3], rtol=1e-12)


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.3},
    "weights": {"weights": np.array([0.5, 0, 2, 1], np.float32)},
    "class weights": {"class_weights": np.array([0.5, 2, 1, 0, 1, 3], np.float32)},
    "where": {"where": np.array([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]]) > 0},
    "z loss": {"z_loss": 0.2},
    "softcap": {"logit_softcap": 1.5},
    "ignored": {"ignore_index": 2},
}
OPTIONS["most"] = functools.reduce(dict.__or__, (OPTIONS[k] for k in OPTIONS if k != "ignored"), {"reduction": "mean"})


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_implementations_agree(kind, option, logits, rng):
    """Values, aux, and the gradients of every float argument under random cotangents."""
    options = dict(OPTIONS[option])
    targets = make_targets(kind, rng)
    if option == "ignored" and kind == "probs":
        pytest.skip("there is no label in it to ignore")
    if "where" in options:
        where = options["where"]
        if kind == "probs":
            targets = np.where(where, targets, 0).astype(np.float32)  # elsewhere the loss is inf
        elif kind == "index":
            targets = np.array([0, 3, 5, 2], np.int32)
        else:
            targets = SparseTargets(np.array([[0, 3], [1, 1], [5, 0], [2, 1]], np.int32), targets.probs)
    floats = {
        name: options.pop(name) for name in ("weights", "class_weights", "label_smoothing", "z_loss") if name in options
    }
    floats |= {"logits": logits}
    if kind == "probs":
        floats |= {"targets": targets}
    elif kind == "sparse":
        floats |= {"probs": targets.probs}

    def outputs(implementation, floats):
        floats = dict(floats)
        t = floats.pop("targets", targets)
        if kind == "sparse":
            t = SparseTargets(targets.indices, floats.pop("probs"))
        loss, aux = softmax_cross_entropy(
            floats.pop("logits"), t, return_aux=True, implementation=implementation, **floats, **options
        )
        return loss, aux.nll, aux.log_normalizer, aux.entropy, aux.weight, aux.prediction.astype(jnp.float32)

    cotangents = [rng.normal(size=() if i == 0 and "reduction" in options else N).astype(np.float32) for i in range(6)]

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, floats):
        values, back = jax.vjp(functools.partial(outputs, implementation), floats)
        return values, back(tuple(map(jnp.asarray, cotangents)))[0]

    values, grads = run("xla", floats)
    wanted, wanted_grads = run("autodiff", floats)
    # Sums over N rows of terms that are up to as large as the largest loss, times cotangents up to 3.
    size = max(1.0, *(float(np.abs(x).max()) for x in wanted))
    chex.assert_trees_all_close(values, wanted, rtol=RTOL, atol=RTOL)
    chex.assert_trees_all_close(grads, wanted_grads, rtol=RTOL, atol=RTOL * N * size * 3)
    chex.assert_tree_all_finite((values, grads))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_float_argument(kind, implementation, rng):
    """Against finite differences: the default to the second order, the other in both modes."""
    n, v = 2, 3
    logits = rng.normal(size=(n, v))
    indices = rng.integers(0, v, (n, 2)).astype(np.int32)
    probs = rng.dirichlet(np.ones(v if kind == "probs" else 2), n)
    weights, class_weights = rng.uniform(0.5, 2, n), rng.uniform(0.5, 2, v)

    def outputs(logits, probs, weights, class_weights, label_smoothing, z_loss):
        targets = {"index": indices[:, 0], "probs": probs, "sparse": SparseTargets(indices, probs)}[kind]
        loss, aux = softmax_cross_entropy(
            logits,
            targets,
            weights=weights,
            class_weights=class_weights,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_softcap=5.0,
            reduction="mean",
            return_aux=True,
            implementation=implementation,
        )
        return loss, aux.nll, aux.log_normalizer, aux.entropy, aux.weight

    args = (logits, probs, weights, class_weights, 0.2, 0.1)
    if implementation == "xla":
        check_grads(outputs, args, order=2, modes=["rev"])
    else:
        check_grads(outputs, args, order=1, modes=["fwd", "rev"])
    grads = jax.grad(lambda *a: outputs(*a)[0], argnums=range(6))(*args)
    for i, grad in enumerate(grads):
        assert np.any(grad) != (kind == "index" and i == 1)  # and no argument is constant


# --- tracing and compiling ------------------------------------------------------------------------------------------


def test_a_jitted_caller_is_traced_once(logits, rng):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(z, y, smoothing, weights):
        return softmax_cross_entropy(z, y, label_smoothing=smoothing, weights=weights, reduction="mean")

    for smoothing in (0.0, 0.1, 0.2):
        step(logits * (1 + smoothing), make_targets("index", rng), smoothing, rng.random(N).astype(np.float32))


def test_eager_calls_compile_once_per_signature(logits, rng):
    """The numbers of an option are data: other values of them, or other batches, run the same program."""
    cache_size = jaxce.softmax._loss._cache_size

    def call(smoothing, z_loss, **options):
        labels = make_targets("index", rng)
        return softmax_cross_entropy(logits * smoothing, labels, label_smoothing=smoothing, z_loss=z_loss, **options)

    call(0.1, 1e-4)
    before = cache_size()
    call(0.2, 1e-3)
    call(0.3, 1)
    assert cache_size() == before
    call(0.1, 1e-4, reduction="sum")  # a constant of the program
    assert cache_size() == before + 1
    call(0.1, 0.0)  # no z-loss at all: a smaller program
    assert cache_size() == before + 2


# --- memory ---------------------------------------------------------------------------------------------------------


CHUNK = 4 * 2**20 + 2**16  # bytes that the sums may take on CPU, and some numbers of each row


def temporary_bytes(loss, *shapes):
    """What loss and gradient need beyond arguments and results, as the compiler says."""
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def optax_smoothed(z, y, w=None):
    t = optax.smooth_labels(jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype), 0.1)
    return optax.softmax_cross_entropy(z, t if w is None else t * w[None]).mean()


def optax_weighted(z, t, w, of_example):
    return (optax.softmax_cross_entropy(z, t * w[None]) * of_example).sum() / ((t @ w) * of_example).sum()


SAME_LOSSES = {
    "index": (
        lambda z, y, t, w: softmax_cross_entropy(z, y, reduction="mean"),
        lambda z, y, t, w: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
    ),
    "smoothed": (
        lambda z, y, t, w: softmax_cross_entropy(z, y, label_smoothing=0.1, reduction="mean"),
        lambda z, y, t, w: optax_smoothed(z, y),
    ),
    "class weights": (
        lambda z, y, t, w: softmax_cross_entropy(z, y, class_weights=w, label_smoothing=0.1, reduction="mean_count"),
        lambda z, y, t, w: optax_smoothed(z, y, w),
    ),
    "probs": (
        lambda z, y, t, w: softmax_cross_entropy(z, t, reduction="mean"),
        lambda z, y, t, w: optax.softmax_cross_entropy(z, t).mean(),
    ),
    "probs and both weights": (
        lambda z, y, t, w: softmax_cross_entropy(z, t, weights=y, class_weights=w, reduction="mean"),
        lambda z, y, t, w: optax_weighted(z, t, w, y.astype(z.dtype)),
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(1024, 1000), (256, 32768)])
@pytest.mark.parametrize("case", SAME_LOSSES)
def test_memory_is_no_more_than_that_of_optax(case, rows, classes, dtype):
    full = jax.ShapeDtypeStruct((rows, classes), dtype)
    shapes = (full, jax.ShapeDtypeStruct((rows,), jnp.int32), full, jax.ShapeDtypeStruct((classes,), dtype))
    ours, theirs = (temporary_bytes(loss, *shapes) for loss in SAME_LOSSES[case])
    assert ours <= theirs + CHUNK


@pytest.mark.every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(8192, 1000), (256, 32768)])
def test_smoothing_forms_no_target_distribution(rows, classes, dtype):
    """A smoothed integer label is two numbers of a row, never a [N, V] array of them; nor are the logits widened."""
    shapes = (jax.ShapeDtypeStruct((rows, classes), dtype), jax.ShapeDtypeStruct((rows,), jnp.int32))
    loss = lambda z, y: softmax_cross_entropy(z, y, label_smoothing=0.1, reduction="mean")  # noqa: E731
    assert temporary_bytes(loss, *shapes) < 2 * CHUNK + rows * classes * 4 / 50
