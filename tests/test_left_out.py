"""An example that is ignored, masked or of weight 0 leaves no trace, whatever its weight, temperature and target hold.

As padding does: a temperature of 0, a target normalised by 0. `tests/test_numbers.py` has the same of logits.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import SparseTargets

N, D, V = 5, 3, 6
OUT = np.arange(N) % 3 == 0
IMPLEMENTATIONS = ["xla", "autodiff"]
BAD = [0.0, -1.0, np.nan, np.inf, -np.inf]


def arrays_of(rng, kind):
    return {
        "hidden": rng.normal(size=(N, D)).astype(np.float32),
        "kernel": rng.normal(size=(D, V)).astype(np.float32),
        "temperature": rng.uniform(0.5, 2, N).astype(np.float32),
        "weights": rng.uniform(0.5, 2, N).astype(np.float32),
        "class_weights": rng.uniform(0.5, 2, V).astype(np.float32),
        "probs": rng.dirichlet(np.ones(V if kind == "probs" else 2), N).astype(np.float32),
    }


INDICES = np.stack([np.arange(N) % V, (np.arange(N) + 2) % V], 1)


def targets_of(kind, arrays, out):
    indices = np.where(OUT[:, None] & (out == "ignore_index"), -7, INDICES)
    if kind == "index":
        return indices[:, 0]
    return arrays["probs"] if kind == "probs" else SparseTargets(indices, arrays["probs"])


def left_out_by(out):
    return {"ignore_index": -7} if out == "ignore_index" else {"where": ~OUT} if out == "where" else {}


def cross_entropy(kind, out, arrays, form="xla", **options):
    h, k, targets = arrays["hidden"], arrays["kernel"], targets_of(kind, arrays, out)
    names = ["weights", "class_weights", *([] if form == "probs" else ["temperature"])]
    options |= {name: arrays[name] for name in names} | left_out_by(out) | {"reduction": "mean"}
    if form == "probs":
        options.pop("where", None)
        return jaxce.cross_entropy_from_probs(jax.nn.softmax(h @ k), targets, label_smoothing=0.1, **options)
    options |= {"label_smoothing": 0.1, "z_loss": 0.01}
    if form in IMPLEMENTATIONS:
        return jaxce.softmax_cross_entropy(h @ k, targets, implementation=form, **options)
    if out == "where":
        options["where"] = ~OUT[:, None]
    return jaxce.linear_cross_entropy(h, k, targets, mode=form, **options)


def log_probs(kind, out, arrays, form="xla"):
    given = {"temperature": arrays["temperature"], "ignore_index": -7}
    ids = targets_of("index", arrays, "ignore_index")
    if form == "linear":
        return jnp.sum(jaxce.linear_log_probs(arrays["hidden"], arrays["kernel"], ids, **given))
    return jnp.sum(jaxce.log_probs(arrays["hidden"] @ arrays["kernel"], ids, implementation=form, **given))


def distillation(kind, out, arrays, form="xla", divergence="forward_kl"):
    h, k = arrays["hidden"], arrays["kernel"]
    given = {name: arrays[name] for name in ("temperature", "weights")} | {"reduction": "mean"}
    given |= {"where": ~OUT} if out == "where" else {}
    given["divergence"] = divergence
    teacher = targets_of("sparse", arrays, "") if kind == "sparse" else np.cos(np.arange(N * V, dtype=np.float32))
    if form in IMPLEMENTATIONS:
        teacher = teacher if kind == "sparse" else teacher.reshape(N, V)
        return jaxce.distillation_loss(h @ k, teacher, implementation=form, **given)
    if out == "where":
        given["where"] = ~OUT[:, None]
    other = () if kind == "sparse" else (np.float32(np.eye(D, V)),)
    teacher = teacher if kind == "sparse" else jnp.sin(h)
    return jaxce.linear_distillation_loss(h, k, teacher, *other, mode=form, **given)


CASES = {
    f"{f.__name__} {form} {kind} {out}": (f, kind, out, form)
    for f, forms, kinds in (
        (cross_entropy, ["xla", "autodiff", "store", "recompute", "probs"], ["index", "probs", "sparse"]),
        (distillation, ["xla", "autodiff", "store", "recompute"], ["logits", "sparse"]),
        (log_probs, ["xla", "autodiff", "linear"], ["index"]),
    )
    for form in forms
    for kind in kinds
    for out in ("weights", "ignore_index", "where")
    if not (out == "ignore_index" and (kind == "probs" or f is distillation))
    and not (out == "where" and form == "probs")
    and (f is not log_probs or out == "ignore_index")
    and not (f is distillation and kind == "sparse" and form == "store")
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_count_leaves_no_trace(case, rng):
    loss, kind, out, form = CASES[case]
    arrays = arrays_of(rng, kind)
    if out == "weights":
        arrays["weights"][OUT] = 0
    step = jax.jit(jax.value_and_grad(functools.partial(loss, kind, out, form=form)))
    wanted, wanted_gradients = step(arrays)
    holders = ["temperature", *([] if kind in ("index", "logits") else ["probs"])]
    for name in [*holders, *([] if out == "weights" or loss is log_probs else ["weights"])]:
        for bad in BAD if name == "temperature" else BAD[2:]:
            broken = arrays | {name: arrays[name].copy()}
            broken[name][OUT] = bad
            value, gradients = step(broken)
            np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=f"{name} {bad}")
            for of, x in gradients.items():
                expected = np.asarray(wanted_gradients[of])
                if of == name or (of == "weights" and out == "weights"):  # what a unit of its weight would cost
                    x, expected = x[~OUT], expected[~OUT]
                np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6, err_msg=f"{of} beside {name} {bad}")
            if name != "weights":
                np.testing.assert_array_equal(np.asarray(gradients[name])[OUT], 0, err_msg=f"{name} {bad}")


@pytest.mark.parametrize("how", ["ignored", "weight 0", "probability 0"])
@pytest.mark.parametrize("form", ["xla", "autodiff", "store", "recompute", "probs"])
def test_the_class_weight_of_a_class_that_no_example_has(form, how, rng):
    """Inverse frequencies are infinite there, as those of padding that is itself a class are."""
    arrays = arrays_of(rng, "sparse")
    labels = np.where(OUT, 0, 1 + np.arange(N) % (V - 1))
    targets = SparseTargets(np.stack([labels, 1 + labels % (V - 1)], 1), np.stack([~OUT, 0.25 + OUT], 1) * 1.0)
    options = {"reduction": "mean"} | ({"ignore_index": 0} if how == "ignored" else {})
    if how == "weight 0":
        options["weights"] = np.where(OUT, 0, arrays["weights"])

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def step(h, k, class_weights):
        given = targets if how == "probability 0" else labels
        if form == "probs":
            return jaxce.cross_entropy_from_probs(jax.nn.softmax(h @ k), given, class_weights=class_weights, **options)
        if form in IMPLEMENTATIONS:
            of_form = {"implementation": form, "class_weights": class_weights}
            return jaxce.softmax_cross_entropy(h @ k, given, **of_form, **options)
        return jaxce.linear_cross_entropy(h, k, given, mode=form, class_weights=class_weights, **options)

    wanted = step(arrays["hidden"], arrays["kernel"], arrays["class_weights"])
    for bad in np.inf, np.nan:
        class_weights = np.where(np.arange(V) == 0, np.float32(bad), arrays["class_weights"])
        chex.assert_trees_all_close(step(arrays["hidden"], arrays["kernel"], class_weights), wanted, rtol=1e-6)


def test_a_bad_temperature_of_a_row_that_the_caller_leaves_out(rng):
    """By a select, of which the losses know nothing: its gradients are exactly 0, and so all of them are finite."""
    arrays = arrays_of(rng, "index")
    arrays["temperature"][OUT] = [0, np.nan]
    h, k, T = (jnp.asarray(arrays[name]) for name in ("hidden", "kernel", "temperature"))
    labels, teacher = INDICES[:, 0], np.cos(np.arange(N * V, dtype=np.float32)).reshape(N, V)
    other = np.float32(np.eye(D, V))
    losses = {
        "dense": lambda h, k, T: jaxce.softmax_cross_entropy(h @ k, labels, temperature=T, z_loss=0.1),
        "ids": lambda h, k, T: jaxce.log_probs(h @ k, labels, temperature=T),
        "divergence": lambda h, k, T: jaxce.distillation_loss(h @ k, teacher, temperature=T),
        "linear": lambda h, k, T: jaxce.linear_cross_entropy(h, k, labels, temperature=T, z_loss=0.1),
        "linear ids": lambda h, k, T: jaxce.linear_log_probs(h, k, labels, temperature=T),
        "linear divergence": lambda h, k, T: jaxce.linear_distillation_loss(h, k, h, other, temperature=T),
    }
    for name, loss in losses.items():
        of_kept = jax.grad(lambda h, k, T, loss=loss: jnp.sum(jnp.where(OUT, 0, loss(h, k, T))), (0, 1, 2))
        found = jax.jit(of_kept)(h, k, T)
        wanted = of_kept(h, k, jnp.where(OUT, 1, T))
        for x, expected in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(found[2][OUT], 0, err_msg=name)


def test_smoothing_over_a_class_of_probability_0_in_a_row_left_out():
    z, labels = jnp.array([[1.0, 2, 0], [1, -np.inf, 0]]), jnp.array([0, -1])

    def loss(weights, form):
        options = {"ignore_index": -1, "label_smoothing": 0.1, "reduction": "mean", "implementation": form}
        return jaxce.softmax_cross_entropy(z, labels, class_weights=weights, **options)

    found = [jax.grad(loss)(jnp.ones(3), form) for form in IMPLEMENTATIONS]
    assert np.isfinite(found[0]).all()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_row_of_weight_0_keeps_its_numbers(form, smoothing):
    """A class of logit −inf is no reason to leave it out: its loss is the gradient of its weight, its record stays."""
    z = np.float32([[1, -np.inf, 2]])

    def loss(weights):
        options = {"implementation": form, "weights": weights, "label_smoothing": smoothing, "return_aux": True}
        losses, aux = jaxce.softmax_cross_entropy(z, np.array([0]), **options)
        return jnp.sum(losses), aux

    gradient, aux = jax.grad(loss, has_aux=True)(jnp.zeros(1))
    lse = np.log(np.exp(1.0) + np.exp(2.0))
    p = np.exp([1 - lse, 2 - lse])
    if not smoothing:  # which costs infinity
        np.testing.assert_allclose(gradient, [lse - 1], rtol=1e-6)
    np.testing.assert_allclose(aux.nll, [lse - 1], rtol=1e-6)
    np.testing.assert_allclose(aux.log_normalizer, [lse], rtol=1e-6)
    np.testing.assert_allclose(aux.entropy, [-np.sum(p * np.log(p))], rtol=1e-6)
    assert aux.prediction == 2


@pytest.mark.parametrize("kind", ["index", "probs"])
def test_a_row_of_probability_0_that_is_left_out(kind):
    """As padding of zeros is: it leaves what rows share its gradient, and has none of its own."""
    p, t = np.float32([[0, 0], [0.5, 0.5]]), np.float32([[1, 0], [0.5, 0.5]])

    def loss(p, t, class_weights, smoothing):
        options = {"class_weights": class_weights, "label_smoothing": smoothing, "reduction": "sum"}
        if kind == "index":
            return jaxce.cross_entropy_from_probs(p, np.array([-1, 1]), ignore_index=-1, **options)
        return jaxce.cross_entropy_from_probs(p, t, weights=np.float32([0, 1]), **options)

    value, gradients = jax.value_and_grad(loss, (0, 1, 2, 3))(p, t, np.ones(2, np.float32), np.float32(0.1))
    alone = jax.value_and_grad(lambda *x: loss(jnp.stack([jnp.asarray(p[1]), x[0][1]]), *x[1:]), (0, 1, 2, 3))
    wanted_value, wanted = alone(p, t, np.ones(2, np.float32), np.float32(0.1))
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a[1:] if a.ndim == 2 else a, b[1:] if b.ndim == 2 else b, rtol=1e-6)
    for own in gradients[:2]:
        np.testing.assert_array_equal(own[0], 0)


def test_the_gradient_of_a_gradient_passes_over_a_masked_class_under_a_soft_cap():
    z, where = np.float32([[1, 2, np.nan]]), np.array([True, True, False])

    def twice(loss):
        gradient = jax.grad(lambda z: loss(z, where=where, logit_softcap=30.0, reduction="sum"))
        return lambda z: jax.grad(lambda z: jnp.sum(gradient(z) ** 2))(z)

    for loss in (
        functools.partial(jaxce.softmax_cross_entropy, targets=np.array([0])),
        functools.partial(
            jaxce.distillation_loss, teacher_logits=np.float32([[0, 1, np.nan]]), teacher_logit_softcap=9.0
        ),
    ):
        wanted = twice(loss)(np.where(where, z, 0))
        np.testing.assert_allclose(twice(loss)(z), wanted, rtol=1e-5)


@pytest.mark.parametrize("form", [*IMPLEMENTATIONS, "linear", "where"])
def test_a_class_that_targets_and_logits_leave_out(form):
    """By −inf, as a student and a teacher with one vocabulary mask do: no gradient in the teacher's logits is NaN."""
    z, s = jnp.array([[0.0, 1, -jnp.inf]]), jnp.array([[0.5, -0.5, -jnp.inf]])

    def loss(s):
        targets = jax.nn.softmax(s)
        if form == "linear":
            given = jnp.ones((1, 1)), jnp.zeros((1, 3)), targets
            return jaxce.linear_cross_entropy(*given, bias=z[0], reduction="sum")
        if form == "where":
            return jaxce.softmax_cross_entropy(z, targets, where=jnp.isfinite(z), reduction="sum")
        return jaxce.softmax_cross_entropy(z, targets, reduction="sum", implementation=form)

    t, surprise = np.exp([0.5, -0.5]), np.log1p(np.exp(1)) - np.array([0, 1])
    t /= t.sum()
    np.testing.assert_allclose(jax.grad(loss)(s), [[*t * (surprise - t @ surprise), 0]], rtol=1e-5)


@pytest.mark.parametrize("form", [*IMPLEMENTATIONS, "linear", "probs"])
def test_the_divisor_of_a_mean_grows_with_a_weight_that_is_0(form):
    """By the class weight of its example: ∂(Σ wℓ/Σ wc)/∂w is (ℓ − mean·c)/Σ wc, at 0 as elsewhere."""
    z, t, c, w = (
        np.array([[0.0, 1], [1, 0.3], [2, 0.5]]),
        np.eye(2)[[0, 1, 1]],
        np.array([2.0, 3]),
        np.array([1.0, 0, 0.5]),
    )
    z, t, c, w = (x.astype(np.float32) for x in (z, t, c, w))

    def loss(w):
        options = {"weights": w, "class_weights": c, "reduction": "mean"}
        if form == "linear":
            return jaxce.linear_cross_entropy(z, np.eye(2, dtype=np.float32), t, **options)
        if form == "probs":
            return jaxce.cross_entropy_from_probs(jax.nn.softmax(z), t, **options)
        return jaxce.softmax_cross_entropy(z, t, implementation=form, **options)

    of_class = t @ c
    losses = of_class * (np.log(np.exp(z).sum(-1)) - (t * z).sum(-1))
    mean, divisor = w @ losses / (w @ of_class), w @ of_class
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(w)), (losses - mean * of_class) / divisor, rtol=1e-5)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_class_of_weight_0_leaves_a_row_of_weight_0_its_numbers(form):
    z, probs = np.float32([[1, -np.inf, 2]]), np.float32([[0.5, 0.5, 0]])

    def loss(weights):
        options = {"implementation": form, "class_weights": np.float32([1, 0, 1]), "reduction": "sum"}
        return jaxce.softmax_cross_entropy(z, probs, weights=weights, **options)

    lse = np.log(np.exp(1.0) + np.exp(2.0))
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(1)), [0.5 * (lse - 1)], rtol=1e-6)


def test_the_gradient_of_a_gradient_passes_over_a_label_that_is_ignored():
    """Its logit counts as 0, far above all others of the row."""

    def f(z):
        return jaxce.softmax_cross_entropy(z, jnp.array([-1, 1]), ignore_index=-1, reduction="sum")

    z = jnp.full((2, 4), -100.0)
    hessian = jax.grad(lambda z: jnp.sum(jax.grad(f)(z) ** 2))(z)
    np.testing.assert_array_equal(hessian[0], 0)
    p, t = np.full(4, 0.25), np.eye(4)[1]
    np.testing.assert_allclose(hessian[1], 2 * (p * (p - t) - p * np.sum(p * (p - t))), rtol=1e-5)
