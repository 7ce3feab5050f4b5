"""Programs for elsewhere: exported, serialised, with a batch of any size, for a platform that is not here."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxce
from jaxce.linear import plan as plans
from jaxce.versions import BFLOAT16_ON_CPU

N, D, V = 6, 3, 7
RNG = np.random.default_rng(0)
HIDDEN, KERNEL, LABELS = RNG.normal(size=(N, D)), RNG.normal(size=(D, V)), RNG.integers(0, V, N)
HIDDEN, KERNEL = HIDDEN.astype(np.float32), KERNEL.astype(np.float32)
SPARSE = jaxce.SparseTargets(np.stack([LABELS, (LABELS + 1) % V], 1), np.full((N, 2), 0.5, np.float32))
SOFT = np.asarray(jax.nn.softmax(RNG.normal(size=(N, V)).astype(np.float32)))
WEIGHTS = np.linspace(0, 1, N, dtype=np.float32)


def dense(h, k, t, w):
    return jaxce.softmax_cross_entropy(h @ k, t, weights=w, label_smoothing=0.1, z_loss=1e-3, reduction="mean")


def linear(**options):
    def loss(h, k, t, w):
        k = k.T if options.get("vocab_axis") == 0 else k
        return jaxce.linear_cross_entropy(h, k, t, weights=w, label_smoothing=0.1, reduction="mean", **options)

    return loss


LOSSES = {
    "dense": dense,
    "integer labels": lambda h, k, t, w: jnp.sum(w * jaxce.softmax_cross_entropy_with_integer_labels(h @ k, t)),
    "autodiff": linear(implementation="autodiff"),
    "linear": linear(),
    "recompute": linear(mode="recompute"),
    "[V, D]": linear(vocab_axis=0),
    "from probs": lambda h, k, t, w: jaxce.cross_entropy_from_probs(
        jax.nn.softmax(h @ k), t, weights=w, reduction="sum"
    ),
    "mask": linear(where=np.arange(V) != V - 1),
}
TARGETS = {"index": np.minimum(LABELS, V - 2), "sparse": SPARSE, "probs": SOFT}
KINDS = [
    (loss, kind)
    for loss in LOSSES
    for kind in TARGETS
    if kind == "index" or loss not in ("integer labels", "mask", "[V, D]", "recompute")
]


def shapes(tree, length):
    """The same with the batch axis of that length."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((length, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)), tree
    )


@pytest.mark.parametrize(
    ("loss", "kind", "symbolic"),
    [(*case, True) for case in KINDS] + [("dense", "sparse", False), ("linear", "probs", False)],
)
def test_value_and_gradients_after_a_round_trip(loss, kind, symbolic):
    step = jax.jit(jax.value_and_grad(LOSSES[loss], (0, 1, 3)))
    arguments = HIDDEN, KERNEL, TARGETS[kind], WEIGHTS
    h, t, w = shapes((HIDDEN, TARGETS[kind], WEIGHTS), export.symbolic_shape("b")[0] if symbolic else N)
    exported = export.export(step)(h, jax.ShapeDtypeStruct(KERNEL.shape, KERNEL.dtype), t, w)
    again = export.deserialize(exported.serialize())
    arguments = jax.tree.map(lambda x, a: np.asarray(x, a.dtype), arguments, (h, KERNEL, t, w))
    for found, wanted in zip(jax.tree.leaves(again.call(*arguments)), jax.tree.leaves(step(*arguments)), strict=True):
        # Blocks may be others where the length is not known, so sums are added up in another order.
        np.testing.assert_allclose(found, wanted, rtol=64 * np.finfo(np.float32).eps, atol=1e-6)


def nine(y):
    return y[:, None] + jnp.arange(9)[None]


MANY = {
    "labels": lambda z, k, y: jaxce.softmax_cross_entropy(z, y, reduction="mean"),
    "smoothed": lambda z, k, y: jaxce.softmax_cross_entropy(z, y, label_smoothing=0.1, reduction="mean"),
    "nine entries": lambda z, k, y: jaxce.softmax_cross_entropy(
        z,
        jaxce.SparseTargets(nine(y), jax.nn.softmax(z[:, :9])),
        reduction="mean",
    ),
    "tail": lambda z, k, y: jnp.mean(jaxce.log_probs(z, nine(y), return_aux=True)[1].tail),
    "linear": lambda h, k, y: jaxce.linear_cross_entropy(h[:, :4], k, y, reduction="mean"),
}


def test_a_symbolic_batch_of_diagnostics():
    (b,) = export.symbolic_shape("b")
    arrays = jax.ShapeDtypeStruct((b, 4), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32)
    for f in jaxce.diagnostics.brier, jaxce.diagnostics.calibration:
        exported = export.deserialize(export.export(jax.jit(f))(*arrays).serialize())
        given = jnp.eye(4)[:3], jnp.array([0, 1, 3])
        chex.assert_trees_all_close(exported.call(*given), f(*given), rtol=1e-6)


@pytest.mark.parametrize("loss", MANY)
def test_a_symbolic_batch_of_many_classes(loss):
    """Rows of more than 128 classes are added up in other ways."""
    v, (b,) = 1000, export.symbolic_shape("b")
    rng = np.random.default_rng(1)
    z, k = rng.normal(size=(5, v)).astype(np.float32), rng.normal(size=(4, v)).astype(np.float32)
    y = rng.integers(0, v - 20, 5).astype(np.int32)
    for f in jax.jit(MANY[loss]), jax.jit(jax.value_and_grad(MANY[loss], (0, 1))):
        shapes = jax.ShapeDtypeStruct((b, v), z.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)
        exported = export.export(f)(*shapes, jax.ShapeDtypeStruct((b,), y.dtype))
        for found, wanted in zip(jax.tree.leaves(exported.call(z, k, y)), jax.tree.leaves(f(z, k, y)), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=64 * np.finfo(np.float32).eps, atol=1e-6)


def test_the_aux_record_after_a_round_trip():
    def loss(z, t):
        return jaxce.softmax_cross_entropy(z, t, return_aux=True)

    logits = HIDDEN @ KERNEL
    exported = export.deserialize(export.export(jax.jit(loss))(logits, SPARSE).serialize())
    found, aux = exported.call(logits, jax.tree.map(jnp.asarray, SPARSE))
    assert isinstance(aux, jaxce.CrossEntropyAux)
    np.testing.assert_array_equal(found, loss(logits, SPARSE)[0])


@pytest.mark.parametrize("options", [{"mode": "store", "reduction": "sum"}, {"memory_budget": 10**6}])
def test_what_a_symbolic_batch_cannot_have(options):
    h, t = shapes((HIDDEN, LABELS), export.symbolic_shape("b")[0])
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}: expected None .*hidden \(b, 3\)"):
        export.export(jax.jit(lambda h, t: jaxce.linear_cross_entropy(h, KERNEL, t, **options)))(h, t)


# --- for another platform -------------------------------------------------------------------------------------------


def lowered(platforms, reduction="mean", n=2048, d=8, v=16384):
    """A training step for platforms that are not here, as text."""
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((n, d), (d, v))]

    def loss(h, k, y):
        return jaxce.linear_cross_entropy(h, k, y, reduction=reduction)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    exported = export.export(step, platforms=platforms)(*arrays, jax.ShapeDtypeStruct((n,), jnp.int32))
    return exported.mlir_module()


def test_a_program_is_the_one_of_the_platform_it_is_for():
    """The plan's blocks; the products of gradients of float32 on CPU, narrow ones elsewhere."""
    plans_ = {
        platform: jaxce.plan_linear_cross_entropy(*arrays_of(2048, 8, 16384), reduction="mean", platform=platform)
        for platform in plans.PLATFORMS
    }
    programs = {platform: lowered(["cuda" if platform == "gpu" else platform]) for platform in plans.PLATFORMS}
    blocks = {platform: f"tensor<{plan.block_n}x{plan.block_v}xf32>" for platform, plan in plans_.items()}
    assert plans_["cpu"].mode == "store"
    assert len(set(blocks.values())) == 3
    for platform, text in programs.items():
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert products
        on_cpu = {True, False} if BFLOAT16_ON_CPU else {False}
        assert {"bf16" in line for line in products} == (on_cpu if platform == "cpu" else {True})
        assert {other for other, block in blocks.items() if block in text} == {platform}


def test_a_program_for_several_platforms_holds_the_right_one_for_each():
    text = lowered(["cpu", "tpu"])
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert "stablehlo.case" in text
    assert {"bf16" in line for line in products} == {True, False}


def arrays_of(n, d, v):
    return (
        jax.ShapeDtypeStruct((n, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((d, v), jnp.bfloat16),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )


def test_plans_for_other_platforms():
    arrays = arrays_of(4096, 512, 50304)
    found = {p: jaxce.plan_linear_cross_entropy(*arrays, reduction="mean", platform=p) for p in plans.PLATFORMS}
    assert {p: plan.mode for p, plan in found.items()} == {"cpu": "store", "tpu": "recompute", "gpu": "recompute"}
    assert {p: plan.platform for p, plan in found.items()} == {p: p for p in plans.PLATFORMS}
    assert jaxce.plan_linear_cross_entropy(*arrays, reduction="mean") == found["cpu"]
    with pytest.raises(ValueError, match=r"^platform: expected one of None, 'cpu', 'tpu', 'gpu'; got 'cuda'"):
        jaxce.plan_linear_cross_entropy(*arrays, platform="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("given", ["labels", "ignored labels", "mask", "narrow probabilities and class weights"])
@pytest.mark.parametrize(("n", "d", "v", "tight"), [(64, 16, 1024, 300_000), (2048, 64, 256, 4_000_000)])
def test_what_a_mode_keeps_for_the_backward_pass(given, n, d, v, tight):
    """As a scan over batches shows: that much more memory for each step, where the gradient is taken from outside."""
    options = {"reduction": "sum"} | ({"ignore_index": -1} if given == "ignored labels" else {})
    targets, size = jax.ShapeDtypeStruct((n,), jnp.int32), 4 * n
    arrays = {"where": jax.ShapeDtypeStruct((1, v), jnp.bool_)} if given == "mask" else {}
    if "probabilities" in given:
        targets, size = jax.ShapeDtypeStruct((n, v), jnp.bfloat16), 4 * n * v  # JAX 0.10 widens them
        arrays = {"class_weights": jax.ShapeDtypeStruct((v,), jnp.float32)}
    hidden, kernel = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((d, v), jnp.float32)

    def memory(steps, **mode):
        def total(k, batches, arrays):
            def step(total, x):
                return total + jaxce.linear_cross_entropy(x[0], k, x[1], **arrays, **options, **mode), None

            return jax.lax.scan(step, 0.0, batches)[0]

        batches = jax.tree.map(lambda x: jax.ShapeDtypeStruct((steps, *x.shape), x.dtype), (hidden, targets))
        step = jax.jit(jax.grad(lambda k, h, y, arrays: total(k, (h, y), arrays), (0, 1)))
        return step.lower(kernel, *batches, arrays).compile().memory_analysis().temp_size_in_bytes

    modes = ("store", tight), ("store", None), ("recompute", None)
    for mode in [{"mode": mode, "memory_budget": budget} for mode, budget in modes]:
        if mode["mode"] == "store" and "probabilities" in given:
            continue  # which keeps their gradient
        plan = jaxce.plan_linear_cross_entropy(hidden, kernel, targets, **arrays, **options, **mode)
        growth = (memory(40, **mode) - memory(8, **mode)) / 32
        arguments = 4 * n * d + size  # of each step: a scan keeps them as well
        assert 0.9 * plan.kept_bytes <= growth <= 1.2 * (plan.kept_bytes + arguments)
        if n < v and "probabilities" not in given:
            assert (plan.kept_bytes > 4 * d * v) == (plan.mode == "store" and plan.block_n < n)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_second_derivatives_are_lowered_for_every_platform(platform):
    """Of a loss that computes gradients along with it on some platforms, and on others does not."""
    hidden, kernel, labels = arrays_of(4096, 8, 32768)
    modes = {
        each: jaxce.plan_linear_cross_entropy(hidden, kernel, labels, reduction="mean", platform=each).mode
        for each in plans.PLATFORMS
    }
    assert set(modes.values()) == {"store", "recompute"}

    def product(h, k, y):
        def loss(h, k):
            return jaxce.linear_cross_entropy(h, k, y, reduction="mean")

        return jax.jvp(jax.grad(loss, (0, 1)), (h, k), (h, k))

    assert jax.jit(product).trace(hidden, kernel, labels).lower(lowering_platforms=(platform,)).as_text()
