"""No false alarm under `jax_debug_nans` and `jax_debug_infs`: they stop at what a program returns, compiled or not."""

from __future__ import annotations

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce
from jaxce import diagnostics

NAN, INF = np.nan, np.inf
LABELS = np.array([0, -1, 1])
WEIGHTS = np.array([1.0, 0.0, 2.0], np.float32)
KERNEL = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)


@contextlib.contextmanager
def flags(*names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(getattr(jax, name)(True))
        yield


def rows(bad):
    return np.array([[1.0, 2.0], [bad, 0.0], [0.5, 3.0]], np.float32)


OPTIONS = {
    "plain": {},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_softcap": 5.0, "return_aux": True},
}
UNUSED = {
    "ignored": (LABELS, {"ignore_index": -1}),
    "weight 0": (np.array([0, 1, 1]), {"weights": WEIGHTS}),
    "sparse": (jaxce.SparseTargets(LABELS[:, None], np.ones((3, 1), np.float32)), {"ignore_index": -1}),
    "probs": (np.full((3, 2), 0.5, np.float32), {"weights": WEIGHTS}),
}


def first(out):
    return jnp.sum(out[0]) if isinstance(out, tuple) else jnp.sum(out)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("unused", UNUSED)
def test_an_unused_row_may_hold_anything(unused, options, bad):
    targets, given = UNUSED[unused]
    given = given | OPTIONS[options]

    def dense(z):
        return first(jaxce.softmax_cross_entropy(z, targets, reduction="mean", **given))

    soft = isinstance(targets, np.ndarray) and targets.ndim == 2
    by_class = np.full((3, 5), 0.2, np.float32) if soft else targets

    def linear(h, mode):
        return first(jaxce.linear_cross_entropy(h, KERNEL, by_class, reduction="mean", mode=mode, **given))

    clean = rows(0.0)
    with flags("debug_nans", "debug_infs"):
        for loss in dense, lambda h: linear(h, "store"), lambda h: linear(h, "recompute"):
            for z in rows(bad), jnp.asarray(rows(0.0)).at[1, 0].set(7.0):
                found = jax.value_and_grad(loss)(z)
                np.testing.assert_array_equal(found[1][1], 0)
            wanted = jax.value_and_grad(loss)(clean)
            np.testing.assert_array_equal(found[1][::2], wanted[1][::2])


@pytest.mark.slow
def test_classes_of_probability_zero():
    z = np.array([[1.0, -INF, 2.0], [0.0, 1.0, 2.0]], np.float32)
    with flags("debug_nans", "debug_infs"):
        for options in {}, {"return_aux": True}, {"where": np.array([True, False, True])}:
            for targets in np.array([0, 2]), np.array([[0.5, 0, 0.5], [0, 0, 1.0]], np.float32):
                jax.grad(lambda z, t, o: first(jaxce.softmax_cross_entropy(z, t, **o)))(z, targets, options)
        h = np.ones((2, 2), np.float32)
        for mode in "recompute", "store":
            options = {"where": np.array([True, False, True]), "reduction": "mean", "mode": mode}
            jax.grad(lambda h, o: jaxce.linear_cross_entropy(h, KERNEL[:, :3], np.array([0, 2]), **o))(h, options)


TEACHER = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
HEAD = np.random.default_rng(2).normal(size=(1, 5)).astype(np.float32)
WITHOUT_CLASS = np.where(np.arange(5) == 2, -INF, np.zeros((1, 5), np.float32))
LEFT_OUT = {  # one token of three, or one class of five
    "weight 0": {"weights": WEIGHTS},
    "token": {"where": np.array([True, False, True])},
    "class": {"where": np.arange(5) != 2},
    "-inf": {"bias": WITHOUT_CLASS, "teacher_bias": WITHOUT_CLASS},
}


@pytest.mark.parametrize("bad", [0.0, NAN])
@pytest.mark.parametrize("left_out", LEFT_OUT)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_distillation(divergence, left_out, bad):
    """Whose rows that do not count may hold NaN, in both models, and whose classes may have no probability in both."""
    options = LEFT_OUT[left_out]
    bad = bad if left_out in ("weight 0", "token") else 0.0

    def linear(h, mode, options):
        g = np.array([[1.0], [bad], [-1.0]], np.float32)
        own = {"divergence": divergence, "reduction": "mean", "mode": mode}
        given = {name: x[0] if "bias" in name else x for name, x in options.items()}
        return jaxce.linear_distillation_loss(h, KERNEL, g, HEAD, **own, **given)

    def dense(h, options):
        z, teacher = h @ KERNEL, TEACHER + np.where(np.arange(3)[:, None] == 1, np.float32(bad), 0)
        options = dict(options)
        z, teacher = (x + options.pop(name, 0) for x, name in ((z, "bias"), (teacher, "teacher_bias")))
        return jaxce.distillation_loss(z, teacher, divergence=divergence, reduction="mean", **options)

    with flags("debug_nans"):  # of one class without probability a program of its own returns an infinity
        for loss in dense, lambda h, o: linear(h, "store", o), lambda h, o: linear(h, "recompute", o):
            value, dh = jax.value_and_grad(loss)(rows(0.0), options)
            chex.assert_tree_all_finite((value, dh))


@pytest.mark.parametrize("left_out", ["token", "class", "-inf"])
def test_log_probabilities(left_out):
    options = {name: x for name, x in LEFT_OUT[left_out].items() if name != "teacher_bias"}

    def linear(h, options):
        ids = np.array([[0, 1], [3, 4], [1, 0]])
        given = {name: x[0] if name == "bias" else x for name, x in options.items()}
        log_p, aux = jaxce.linear_log_probs(h, KERNEL, ids, return_aux=True, **given)
        return jnp.sum(log_p) + jnp.sum(aux.entropy[::2] + aux.tail[::2])

    def dense(h, options):
        options = dict(options)
        z = h @ KERNEL + options.pop("bias", 0)
        log_p, aux = jaxce.log_probs(z, np.array([0, 3, 1]), return_aux=True, **options)
        return jnp.sum(log_p) + jnp.sum(aux.entropy[::2] + aux.tail[::2])

    with flags("debug_nans"):
        for loss in linear, dense:
            value, dh = jax.value_and_grad(loss)(rows(0.0), options)
            chex.assert_tree_all_finite((value, dh))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0.0, NAN])
def test_diagnostics(bad):
    z, labels = rows(bad), LABELS
    with flags("debug_nans", "debug_infs"):
        found = diagnostics.report(z, labels, ignore_index=-1, num_costliest=5)
        assert len(found.costliest) == 2
        halves = [diagnostics.summarize(z[i], labels[i], ignore_index=-1) for i in (slice(0, 2), slice(2, 3))]
        assert diagnostics.finish(diagnostics.merge(*halves)).loss == pytest.approx(found.loss)
        for f in diagnostics.brier, diagnostics.fit_temperature, diagnostics.calibration:
            jax.block_until_ready(f(z, labels, ignore_index=-1))
        found = diagnostics.calibration(z, labels, ignore_index=-1)  # some of whose bins are empty
        jax.block_until_ready((found.expected_error, found.maximum_error, found.edges))
