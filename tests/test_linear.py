"""The linear loss is the loss of hidden @ kernel + bias: its value, every gradient, and what it never holds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
from typing import Any
from unittest import mock

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxce
from jaxce import SparseTargets, linear_cross_entropy, softmax_cross_entropy
from jaxce.linear import chips, distillation
from jaxce.linear import plan as plans
from jaxce.linear.blocks import Schedule, gradients, retiled_classes
from jaxce.linear.blocks import logits as logits_of
from tests import oracle
from tests.pairwise import pairwise

EPS = float(np.finfo(np.float32).eps)
MODES = ["recompute", "store"]
KINDS = ["index", "probs", "sparse"]
N, D, V = 13, 5, 29  # primes, which no block divides


@contextlib.contextmanager
def blocks(mode: str, block_n: int = 4, block_v: int | None = None):
    """Every loss is computed in this mode and in these blocks, by default of tokens or of classes.

    Mode "either" is the one of a program that recomputes on CPU, and would store on another platform.

    What is left over is a block of its own in the program, so a loss with both kinds, each with a rest, has four.
    """

    def plan(_problem, platform, *_, **__):
        own = mode if mode in MODES else "recompute" if platform == "cpu" else "store"
        size = block_v or (1000 if own == "store" else 6)
        return plans.LinearPlan((N, D, V), own, block_n, size, 0, 0, 0, 0, platform)

    def without_gradients(_problem, stored, *_):
        return dataclasses.replace(stored, mode="recompute")

    with (
        mock.patch.object(plans, "make_plan", plan),
        mock.patch.object(plans, "_without_gradients", without_gradients),
    ):
        yield


def arguments(
    rng: np.random.Generator, kind: str = "index", batch=(N,), dtype=np.float32, v: int = V
) -> dict[str, Any]:
    """Hidden states, kernel [D, V], bias and targets, with the options that are arrays."""
    n = int(np.prod(batch))
    indices = rng.integers(0, v, (n, 3)).astype(np.int32)
    shares = rng.dirichlet(np.ones(3), n).astype(np.float32)
    targets = {
        "index": indices[:, 0].reshape(batch),
        "probs": rng.dirichlet(np.ones(v), batch).astype(dtype),
        "sparse": SparseTargets(indices.reshape(*batch, 3), shares.reshape(*batch, 3)),
    }[kind]
    return {
        "hidden": jnp.asarray(rng.normal(size=(*batch, D)), dtype),
        "kernel": jnp.asarray(2 * rng.normal(size=(D, v)), dtype),
        "bias": jnp.asarray(rng.normal(size=v), dtype),
        "targets": targets,
        "weights": rng.uniform(0.2, 2, batch).astype(np.float32),
        "class_weights": rng.uniform(0.2, 2, v).astype(np.float32),
        "label_smoothing": np.float32(0.2),
        "z_loss": np.float32(0.03),
    }


def fused(arguments: dict[str, Any], vocab_axis: int = 1, **options: Any):
    kernel = arguments["kernel"] if vocab_axis == 1 else arguments["kernel"].T
    return linear_cross_entropy(**arguments | {"kernel": kernel}, vocab_axis=vocab_axis, **options)


def dense(arguments: dict[str, Any], **options: Any):
    rest = {name: x for name, x in arguments.items() if name not in ("hidden", "kernel", "bias")}
    wide = jnp.promote_types(arguments["hidden"].dtype, jnp.float32)
    logits = jnp.matmul(arguments["hidden"], arguments["kernel"], preferred_element_type=wide)
    if "bias" in arguments:
        logits = logits + jnp.broadcast_to(arguments["bias"].astype(wide), logits.shape)
    return softmax_cross_entropy(logits, rest.pop("targets"), **rest, **options)


def from_probs(arguments: dict[str, Any], **options: Any):
    """The loss of the probabilities, without a z-loss."""
    rest = {name: x for name, x in arguments.items() if name not in ("hidden", "kernel", "bias", "z_loss")}
    logits = arguments["hidden"] @ arguments["kernel"]
    return jaxce.cross_entropy_from_probs(jax.nn.softmax(logits), rest.pop("targets"), **rest, **options)


def floats(arguments: dict[str, Any]) -> dict[str, Any]:
    """The differentiable part."""
    parts = {name: x for name, x in arguments.items() if name != "targets"}
    targets = arguments["targets"]
    if isinstance(targets, SparseTargets):
        parts["targets.probs"] = targets.probs
    elif np.issubdtype(targets.dtype, np.floating) or targets.dtype == jnp.bfloat16:
        parts["targets"] = targets
    return parts


def joined(parts: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    parts = dict(parts)
    if "targets.probs" in parts:
        return arguments | {"targets": SparseTargets(arguments["targets"].indices, parts.pop("targets.probs"))} | parts
    return arguments | parts


def program(f, **options):
    """Of arguments and cotangents: the outputs, and the gradients of Σ cotangent · output."""

    @jax.jit
    def run(arguments, cotangents):
        def total(parts):
            out = f(joined(parts, arguments), **options)
            loss, aux = out if isinstance(out, tuple) else (out, None)
            outs = [loss] + ([] if aux is None else [aux.nll, aux.log_normalizer, aux.entropy])
            return sum(jnp.sum(c * o) for c, o in zip(cotangents, outs, strict=False)), (outs, aux)

        (_, (outs, aux)), grads = jax.value_and_grad(total, has_aux=True)(floats(arguments))
        return outs, aux, grads

    return run


def outputs_and_gradients(f, arguments, cotangents, **options):
    return program(f, **options)(arguments, cotangents)


def random_cotangents(rng, reduction, batch=(N,)):
    shape = batch if reduction == "none" else ()
    return [rng.normal(size=shape).astype(np.float32), *(rng.normal(size=batch).astype(np.float32) for _ in range(3))]


# --- exactness ------------------------------------------------------------------------------------------------------


def assert_near_the_oracle(args, cotangents, outs, grads):
    """Against float64; returns the oracle's gradients and the relative error that the rounding of logits allows.

    A logit is a sum of d products and a bias: off by at most (d + 2) ε Σ|h||k|. A −log p is then off by at most twice
    that, absolutely, and so is log p_j: an entry of the gradient is off by that part of its size, once more for a sum
    over classes in it.
    """
    h, k, b = (np.asarray(args[name]).astype(np.float64) for name in ("hidden", "kernel", "bias"))
    n, (d, v) = len(h), k.shape
    targets = args["targets"]
    if isinstance(targets, SparseTargets):
        t = oracle.dense(targets.indices, targets.probs, k.shape[1])
    else:
        t = oracle.one_hot(targets, k.shape[1]) if targets.ndim == 1 else np.asarray(targets, np.float64)
    options = {name: args[name] for name in ("weights", "class_weights", "label_smoothing", "z_loss")}
    problem = oracle.Problem(h @ k + b[None], t, **options)
    off = 2 * (d + 2) * EPS * np.max(np.abs(h) @ np.abs(k) + np.abs(b)[None])

    losses = problem.losses()
    lse = np.abs(losses.log_normalizer.value)
    weight = args["weights"] * (2 * args["class_weights"].max() + 2 * args["z_loss"] * lse)
    moves = [weight, np.ones(n), np.ones(n), 1 + problem.softmax.below.max(-1)]  # of each output, for a −log p's 1
    for out, expected, move in zip(outs, losses, moves, strict=False):
        bound = 16 * EPS * expected.size + 2 * off * move
        if np.shape(out):
            oracle.assert_within(out, expected.value, bound, "per token")
        else:
            oracle.assert_within(out, expected.value.sum(), bound.sum() + n * EPS * expected.size.sum(), "sum")

    wanted = problem.gradients(oracle.Cotangents(*cotangents))
    dz, size = wanted.logits
    error = size * (16 * EPS + 3 * off)
    # The products that make the gradients round as well: one ε for each number added, of the sum of magnitudes.
    rounding = EPS * (v + n + 4) * size
    oracle.assert_within(grads["hidden"], dz @ k.T, (error + rounding) @ np.abs(k.T), "hidden")
    oracle.assert_within(grads["kernel"], h.T @ dz, np.abs(h.T) @ (error + rounding), "kernel")
    oracle.assert_within(grads["bias"], dz.sum(0), (error + rounding).sum(0), "bias")
    return wanted, 16 * EPS + 3 * off


@pytest.mark.slow
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**20),
    mode=st.sampled_from(MODES),
    vocab_axis=st.sampled_from([0, 1]),
    kind=st.sampled_from(KINDS),
    sizes=st.sampled_from([(4, 6), (13, 29), (5, 29), (13, 7), (1, 1), (64, 128)]),
    aux=st.booleans(),
)
def test_every_gradient_against_the_oracle(seed, mode, vocab_axis, kind, sizes, aux):
    rng = np.random.default_rng(seed)
    args = arguments(rng, kind)
    reduction = "none" if mode == "recompute" else "sum"
    cotangents = random_cotangents(rng, reduction)
    if not aux:
        cotangents = cotangents[:1]
    with blocks(mode, *sizes):
        outs, _, grads = outputs_and_gradients(
            fused, args, cotangents, vocab_axis=vocab_axis, reduction=reduction, return_aux=aux
        )
    per_row = [np.broadcast_to(c, (N,)) for c in cotangents]
    wanted, relative = assert_near_the_oracle(args, per_row, outs, grads)
    # The others are sums of −log p: absolutely off by `relative` for each 1 of what these are multiplied with.
    for name in ("weights", "class_weights", "label_smoothing", "z_loss"):
        value, size = getattr(wanted, name)
        oracle.assert_within(grads[name], value, relative * (size + np.abs(per_row[0]).sum() * 8), name)
    if kind == "probs":
        value, size = wanted.targets
        oracle.assert_within(grads["targets"], value, relative * (size + 8), "targets")


def store_needs_one_number(mode: str, reduction: str, *_: Any) -> bool:
    return (mode, reduction) != ("store", "none")


@pytest.mark.parametrize(
    ("mode", "reduction", "kind", "aux"),
    pairwise(MODES, ["none", "sum", "mean", "mean_count"], KINDS, [False, True], allowed=store_needs_one_number),
)
def test_equals_the_dense_loss(rng, mode, reduction, kind, aux):
    """With every option at once, masks and ignored examples included, for batches of two axes."""
    batch = (3, 7)
    args = arguments(rng, kind, batch)
    classes = {"index": lambda t: t, "sparse": lambda t: t.indices, "probs": lambda t: [0]}[kind](args["targets"])
    where = rng.random(V) < 0.8
    where[np.ravel(classes)] = True
    options: dict[str, Any] = {"logit_softcap": 4.0, "where": where, "reduction": reduction, "return_aux": aux}
    if kind == "probs":
        args["targets"] = args["targets"] * where
    else:
        options["ignore_index"] = int(np.ravel(classes)[0])
    cotangents = random_cotangents(rng, reduction, batch)[: 4 if aux else 1]
    with blocks(mode):
        actual = outputs_and_gradients(fused, args, cotangents, vocab_axis=0, **options)
    wanted = outputs_and_gradients(dense, args, cotangents, **options)
    # Both are within the bounds of the test above, 2 (16 + 4 (D + 2) · Σ|h||k|) ε, which is below 2000 ε here.
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS * max(1, np.abs(b).max()))
    if aux:
        np.testing.assert_array_equal(actual[1].prediction, wanted[1].prediction)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "mask"), [("recompute", "class"), ("store", "token"), ("recompute", "both"), ("store", "both")]
)
def test_masks(rng, mode, mask):
    args = arguments(rng)
    full = rng.random((N, V)) < 0.8
    full[np.arange(N), args["targets"]] = True
    full[2] = False
    where = {"class": np.ones((1, V), bool), "token": full.any(-1, keepdims=True), "both": full}[mask]
    options = {"where": where, "reduction": "mean_count", "return_aux": True}
    cotangents = random_cotangents(rng, "mean_count")[:1]
    with blocks(mode):
        actual = outputs_and_gradients(fused, args, cotangents, **options)
    wanted = outputs_and_gradients(dense, args, cotangents, **options)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS * max(1, np.abs(b).max()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_err_no_more_than_the_materialised_loss(rng, mode, dtype):
    """Beside float64 on the same inputs, and beside logits in float32 whose gradient is cast for the matmuls."""
    n, d, v = 64, 32, 1000
    h, k = (jnp.asarray(rng.normal(size=s) / np.sqrt(d), dtype) for s in ((n, d), (d, v)))
    y = jnp.asarray(rng.integers(0, v, n), jnp.int32)

    def materialised(h, k):
        @jax.custom_vjp
        def matmul(h, k):
            return jnp.matmul(h, k, preferred_element_type=jnp.float32)

        def backward(residuals, dz):
            h, k = residuals
            dz = dz.astype(dtype)
            dh = jnp.matmul(dz, k.T, preferred_element_type=jnp.float32)
            dk = jnp.matmul(h.T, dz, preferred_element_type=jnp.float32)
            return dh.astype(dtype), dk.astype(dtype)

        matmul.defvjp(lambda h, k: (matmul(h, k), (h, k)), backward)
        return softmax_cross_entropy(matmul(h, k), y, reduction="mean")

    with blocks(mode, 24, 384):
        run = jax.jit(jax.value_and_grad(lambda h, k: linear_cross_entropy(h, k, y, reduction="mean"), (0, 1)))
        loss, grads = run(h, k)
    other_loss, other = jax.jit(jax.value_and_grad(materialised, (0, 1)))(h, k)
    assert loss.dtype == jnp.float32
    h64, k64 = np.asarray(h).astype(np.float64), np.asarray(k).astype(np.float64)
    problem = oracle.Problem(h64 @ k64, oracle.one_hot(y, v))
    dz = problem.gradients(oracle.Cotangents(np.full(n, 1 / n))).logits.value
    truth = {"loss": problem.losses().loss.value.mean(), "hidden": dz @ k64.T, "kernel": h64.T @ dz}
    for name, ours, theirs in zip(truth, (loss, *grads), (other_loss, *other), strict=True):
        if name != "loss":
            assert ours.dtype == dtype
        error, allowed = (
            np.sqrt(np.mean((np.asarray(x).astype(np.float64) - truth[name]) ** 2)) for x in (ours, theirs)
        )
        assert error <= 1.02 * allowed + 8 * EPS * np.abs(truth[name]).max(), name


def test_float16_gradients_of_unlikely_classes_do_not_vanish(rng):
    """Their part in a mean over many tokens is below the smallest float16."""
    n, v = 4096, 50
    h = jnp.ones((n, 1), jnp.float16)
    k = jnp.asarray(np.r_[12.0, np.zeros(v - 1)][None], jnp.float16)
    y = jnp.zeros(n, jnp.int32)
    p = 1 / (np.exp(12.0) + v - 1)
    for mode in MODES:
        with blocks(mode, 512, 16):
            grad = jax.grad(lambda k: linear_cross_entropy(h, k, y, reduction="sum"))(k)
        np.testing.assert_allclose(np.asarray(grad, np.float64)[0, 1:], n * p, rtol=2.0**-10)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_beside_float64(x64, rng, mode):
    """Probabilities and a bias, in blocks: where slices of them are multiplied, XLA has ended the process."""
    args = {name: jnp.asarray(x, np.float64) for name, x in arguments(rng, "probs").items()}
    args |= {name: args[name].astype(jnp.bfloat16) for name in ("targets", "bias")}
    with blocks(mode, 4, 6):
        found = jax.value_and_grad(lambda h: fused(args | {"hidden": h}, reduction="mean"))(args["hidden"])
    targets, bias = (args.pop(name).astype(np.float64) for name in ("targets", "bias"))
    hidden, kernel = args.pop("hidden"), args.pop("kernel")
    of_logits = functools.partial(softmax_cross_entropy, targets=targets, **args, reduction="mean")
    wanted = jax.value_and_grad(lambda h: of_logits(h @ kernel + bias[None]))(hidden)
    chex.assert_trees_all_close(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_float64(x64, rng, mode):
    args = {
        name: jnp.asarray(np.asarray(x, np.float64)) if name != "targets" else x for name, x in arguments(rng).items()
    }
    with blocks(mode):
        outs, _, grads = outputs_and_gradients(fused, args, [np.float64(1)], reduction="mean")
    assert outs[0].dtype == jnp.float64
    assert {name: g.dtype for name, g in grads.items()} == dict.fromkeys(grads, jnp.float64)
    h, k, b = args["hidden"], args["kernel"], args["bias"]
    rest = {name: args[name] for name in ("weights", "class_weights", "label_smoothing", "z_loss")}
    wanted = softmax_cross_entropy(h @ k + b[None], args["targets"], reduction="mean", **rest)
    np.testing.assert_allclose(outs[0], wanted, rtol=1e-14)


@pytest.mark.parametrize(
    ("mode", "dtypes"),
    [
        ("recompute", ("bfloat16", "float32")),
        ("recompute", ("float16", "bfloat16")),
        ("store", ("float32", "bfloat16")),
    ],
)
def test_mixed_dtypes(rng, mode, dtypes):
    """As `hidden @ kernel` would promote them; each gradient in the dtype of its argument."""
    args = arguments(rng)
    args |= {"hidden": args["hidden"].astype(dtypes[0]), "kernel": args["kernel"].astype(dtypes[1])}
    with blocks(mode), jax.numpy_dtype_promotion("standard"):
        outs, _, grads = outputs_and_gradients(fused, args, [np.float32(1)], reduction="mean")
    assert (grads["hidden"].dtype, grads["kernel"].dtype) == tuple(map(jnp.dtype, dtypes))
    wide = args | {name: args[name].astype(jnp.float32) for name in ("hidden", "kernel")}
    wanted, _, wanted_grads = outputs_and_gradients(dense, wide, [np.float32(1)], reduction="mean")
    np.testing.assert_allclose(outs[0], wanted[0], rtol=2000 * EPS)
    for name in ("hidden", "kernel"):
        ulp = float(jnp.finfo(grads[name].dtype).eps)
        scale = np.abs(wanted_grads[name]).max()
        np.testing.assert_allclose(
            grads[name].astype(jnp.float32), wanted_grads[name], atol=(2 * ulp + 2000 * EPS) * scale
        )


# --- blocks that divide nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("v", [1, 7, 2500])
def test_what_is_left_of_the_vocabulary_adds_nothing(rng, mode, v):
    """A padded block must not count: with zeros for padding, logits near −20 give 27.5 for 8.60."""
    n = 5
    labels = rng.integers(0, v, n).astype(np.int32)

    @jax.jit
    @jax.value_and_grad
    def run(kernel):
        return linear_cross_entropy(jnp.eye(n, dtype=jnp.float32), kernel, labels, reduction="mean")

    for level in (-20.0, 0.0, 1e4):
        logits = np.float32(level + 0.1 * rng.normal(size=(n, v)))
        with blocks(mode, 2, 1024):
            loss, grad = run(logits)
        problem = oracle.Problem(logits, oracle.one_hot(labels, v))
        np.testing.assert_allclose(loss, problem.losses().loss.value.mean(), rtol=16 * EPS, atol=0)
        expected = problem.gradients(oracle.Cotangents(np.full(n, 1 / n))).logits
        oracle.assert_within(grad, expected.value, 32 * EPS * expected.size, "gradient")


@pytest.mark.parametrize("mode", MODES)
def test_small_losses_keep_their_digits(mode):
    kernel = jnp.array([[0.0, -20.0, -25.0]])
    with blocks(mode, 1, 2):
        loss = linear_cross_entropy(jnp.ones((1, 1)), kernel, jnp.array([0]), reduction="sum")
        grad = jax.grad(lambda k: linear_cross_entropy(jnp.ones((1, 1)), k, jnp.array([0]), reduction="sum"))(kernel)
    p = np.exp([-20.0, -25.0])
    np.testing.assert_allclose(loss, np.log1p(p.sum()), rtol=16 * EPS)
    np.testing.assert_allclose(grad[0], np.array([-p.sum(), *p]) / (1 + p.sum()), rtol=64 * EPS)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("batch", [(0,), (3, 0), (1,), ()])
def test_few_tokens(rng, mode, batch):
    args = arguments(rng, batch=batch)
    outs, _, grads = outputs_and_gradients(fused, args, [np.float32(1)], reduction="mean", mode=mode)
    wanted, _, wanted_grads = outputs_and_gradients(dense, args, [np.float32(1)], reduction="mean")
    for a, b in zip(jax.tree.leaves((outs, grads)), jax.tree.leaves((wanted, wanted_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS)


# --- what must not spread -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("out", ["ignored", "weight 0", "class of weight 0", "where"])
def test_a_token_left_out_leaves_no_trace(rng, mode, out):
    """0·NaN in a matmul would put it into every entry of dkernel."""
    args = {name: x for name, x in arguments(rng).items() if name in ("hidden", "kernel", "bias", "targets")}
    options: dict[str, Any] = {"reduction": "mean"}
    if out == "ignored":
        args["targets"][3] = -100
        options["ignore_index"] = -100
    elif out == "weight 0":
        options["weights"] = (np.arange(N) != 3).astype(np.float32)
    elif out == "class of weight 0":
        options["class_weights"] = (np.arange(V) != args["targets"][3]).astype(np.float32)
    else:
        options["where"] = (np.arange(N) != 3)[:, None]
    run = program(fused, **options)
    with blocks(mode):
        wanted = run(args, [np.float32(1)])
    np.testing.assert_array_equal(wanted[2]["hidden"][3], 0)
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        chex.assert_trees_all_equal(run(args | {"hidden": args["hidden"].at[3].set(bad)}, [np.float32(1)]), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_bad_token_that_counts_is_nan(rng, mode):
    args = arguments(rng)
    args["hidden"] = args["hidden"].at[3, 0].set(np.nan)
    with blocks(mode):
        outs, _, grads = outputs_and_gradients(fused, args, [np.float32(1)], reduction="mean")
    assert np.isnan(outs[0])
    assert np.isnan(grads["hidden"][3]).all()
    assert np.isnan(grads["kernel"]).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_label_that_is_no_class(rng, mode):
    args = arguments(rng)
    run = program(fused, reduction="mean")
    checked = jax.jit(checkify.checkify(lambda a: fused(a, reduction="mean"), errors=checkify.user_checks))
    for label in (-1, V, V + 1, 2**31 - 1, -(2**31)):
        args["targets"][3] = label
        with blocks(mode):
            outs, _, grads = run(args, [np.float32(1)])
            error, _ = checked(args)
        assert np.isnan(outs[0])
        assert np.isnan(grads["hidden"][3]).all()
        assert f"label {label} is not one of the {V} classes" in error.get()


@pytest.mark.parametrize("mode", MODES)
def test_classes_at_minus_infinity(rng, mode):
    """A bias of −inf takes a class out of the softmax."""
    args = arguments(rng)
    out = np.setdiff1d(np.arange(V), args["targets"])[:4]
    del args["label_smoothing"]  # which would put a positive target there
    args["bias"] = args["bias"].at[out].set(-np.inf)
    with blocks(mode):
        outs, _, grads = outputs_and_gradients(fused, args, [np.float32(1)], reduction="mean")
    wanted, _, _ = outputs_and_gradients(dense, args, [np.float32(1)], reduction="mean")
    np.testing.assert_allclose(outs[0], wanted[0], rtol=2000 * EPS)
    np.testing.assert_array_equal(np.asarray(grads["kernel"])[:, out], 0)
    np.testing.assert_array_equal(np.asarray(grads["bias"])[out], 0)
    assert np.isfinite(grads["hidden"]).all()


@pytest.mark.parametrize("mode", MODES)
def test_everything_ignored_is_zero(rng, mode):
    args = arguments(rng)
    args["targets"] = np.full(N, 7, np.int32)
    with blocks(mode):
        outs, _, grads = outputs_and_gradients(fused, args, [np.float32(1)], reduction="mean", ignore_index=7)
    assert float(outs[0]) == 0
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


# --- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "over", [("hidden", "targets"), ("kernel",), ("hidden", "kernel", "targets"), ("label_smoothing",)]
)
def test_vmap(rng, mode, over):
    many = [arguments(rng) for _ in range(3)]
    axes = {name: 0 if name in over else None for name in many[0]}
    stacked = {name: np.stack([m[name] for m in many]) if name in over else many[0][name] for name in many[0]}
    with blocks(mode):

        def f(a):
            return jax.value_and_grad(lambda parts: fused(joined(parts, a), reduction="mean"))(floats(a))

        actual = jax.jit(jax.vmap(f, in_axes=(axes,)))(stacked)
    single = program(dense, reduction="mean")
    for i, m in enumerate(many):
        (loss,), _, grads = single({name: (m if name in over else many[0])[name] for name in m}, [np.float32(1)])
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves((loss, grads)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2000 * EPS, atol=2000 * EPS * max(1, np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_inside_scan_and_checkpoint(rng, mode):
    args = arguments(rng)

    def total(kernel):
        @jax.checkpoint
        def body(sum, h):
            loss, aux = fused(args | {"hidden": h, "kernel": kernel}, reduction="mean", return_aux=True)
            return sum + loss, aux.prediction

        return jax.lax.scan(body, jnp.float32(0), jnp.stack([args["hidden"], -args["hidden"]]))[0]

    def one_by_one(kernel):
        return sum(
            dense(args | {"hidden": h, "kernel": kernel}, reduction="mean") for h in (args["hidden"], -args["hidden"])
        )

    with blocks(mode):
        actual = jax.jit(jax.value_and_grad(total))(args["kernel"])
    wanted = jax.jit(jax.value_and_grad(one_by_one))(args["kernel"])
    for a, b in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, "either"])
def test_second_derivatives(rng, mode):
    """A Hessian-vector product both ways, over hidden, kernel and bias."""
    args = arguments(rng)
    names = ("hidden", "kernel", "bias")
    point = {name: args[name] for name in names}
    direction = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in point.items()}

    def products(f):
        def loss(x):
            return f(args | x, reduction="mean")

        def along(x):
            return sum(
                jnp.vdot(a, b)
                for a, b in zip(jax.tree.leaves(jax.grad(loss)(x)), jax.tree.leaves(direction), strict=True)
            )

        return jax.jit(lambda x: (jax.grad(along)(x), jax.jvp(jax.grad(loss), (x,), (direction,))[1]))(point)

    with blocks(mode):
        actual = products(fused)
    wanted = products(dense)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_mixed_second_derivatives(rng, mode):
    """Of the gradient in one argument alone, in all the others: as a program does that learns its weights.

    Blocks whose tokens all have weight 0 add nothing to a gradient, but their share in it grows with the weight.
    """
    args = arguments(rng)
    args["weights"][rng.permutation(N)[: N - 3]] = 0
    point = {name: jnp.asarray(x) for name, x in floats(args).items()}
    direction = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in point.items()}

    def slopes(f):
        def in_the_others(name, x):
            def along(others):
                own = jax.grad(lambda own: f(joined(others | {name: own}, args), reduction="sum"))(x[name])
                return jnp.vdot(own, direction[name])

            return jax.grad(along)({other: x[other] for other in x if other != name})

        return jax.jit(lambda x: {name: in_the_others(name, x) for name in x})(point)

    with blocks(mode):
        actual = slopes(fused)
    wanted = slopes(dense)
    for name, other in itertools.permutations(point, 2):
        slope = wanted[name][other]
        np.testing.assert_allclose(
            actual[name][other], slope, rtol=1e-4, atol=1e-4 * np.abs(slope).max(), err_msg=f"{name}, {other}"
        )


@pytest.mark.parametrize("mode", ["dense", *MODES])
def test_second_derivatives_where_the_largest_logits_are_equal(rng, mode):
    """In one block or in several: as those of a kernel that starts as zeros are, all of them."""
    some = rng.integers(-3, 3, V).astype(np.float32)
    some[[2, 13, 14]] = 3
    rows = jnp.stack([jnp.zeros(V), some])

    def loss(kernel):
        options = {"label_smoothing": 0.1, "z_loss": 0.02, "return_aux": True}
        if mode == "dense":
            value, aux = softmax_cross_entropy(kernel[0], 13, **options)
        else:
            value, aux = linear_cross_entropy(jnp.ones((1, 1)), kernel, jnp.array([13]), **options, reduction="sum")
        return value + 0.3 * jnp.sum(aux.entropy)

    def plain(kernel):
        log_p = jax.nn.log_softmax(kernel[0])
        loss = -0.9 * log_p[13] - 0.1 * log_p.mean() + 0.02 * jax.nn.logsumexp(kernel) ** 2
        return loss - 0.3 * jnp.sum(jnp.exp(log_p) * log_p)

    with blocks(mode, 4, 6):
        found = jax.jit(jax.vmap(jax.hessian(loss)))(rows[:, None])
    wanted = jax.jit(jax.vmap(jax.hessian(plain)))(rows[:, None])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.every_case
@pytest.mark.parametrize("loss", [*MODES, "log_probs", "distillation"])
def test_hessians_in_every_argument(loss):
    """JAX takes them apart into the gradient, of which there is one, and what depends on the direction."""
    point = {
        "hidden": jnp.ones((N, D)),
        "kernel": jnp.ones((D, V)),
        "bias": jnp.ones(V),
        "temperature": jnp.ones(N),
    }
    probs, class_weights = jnp.full((N, V), 1 / V), jnp.ones(V)
    if loss in MODES:
        point |= {"targets": probs, "class_weights": class_weights, "label_smoothing": jnp.float32(0.1)}

    def f(x):
        if loss == "log_probs":
            return jnp.sum(jaxce.linear_log_probs(ids=jnp.zeros(N, int), **x))
        if loss == "distillation":
            return jaxce.linear_distillation_loss(
                teacher_hidden=x["hidden"], teacher_kernel=x["kernel"], **x, reduction="sum"
            )
        return linear_cross_entropy(**x, reduction="sum")

    with blocks(loss):
        hessian = jax.eval_shape(jax.hessian(f), point)
    for name, other in itertools.product(point, point):
        assert hessian[name][other].shape == point[name].shape + point[other].shape, (name, other)


@pytest.mark.parametrize("mode", MODES)
def test_classes_masked_by_the_smallest_float(rng, mode):
    """Whole blocks of them, as padding of the vocabulary is: what is asked for of the others is as without them."""
    args = arguments(rng)
    kept = 17
    bias = args["bias"].at[kept:].set(jnp.finfo(jnp.float32).min)
    labels = args["targets"] % kept

    def loss(hidden, kernel):
        options = {"reduction": "mean", "return_aux": True}
        value, aux = linear_cross_entropy(hidden, kernel, labels, bias=bias, **options)
        return value + 0.3 * jnp.mean(aux.entropy), (value, aux.entropy)

    def plain(hidden, kernel):
        log_p = jax.nn.log_softmax(hidden @ kernel[:, :kept] + bias[None, :kept])
        value, entropy = -jnp.mean(log_p[jnp.arange(N), labels]), -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return value + 0.3 * jnp.mean(entropy), (value, entropy)

    both = []
    for f in loss, plain:
        with blocks(mode, 4, 6):
            both.append(jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(args["hidden"], args["kernel"]))
    (found, gradients), (wanted, plain_gradients) = both
    chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    chex.assert_trees_all_close(gradients, plain_gradients, rtol=1e-4, atol=1e-6)


def test_forward_mode(rng):
    args = arguments(rng)
    point = args["hidden"]

    def loss(f, **options):
        return lambda h: f(args | {"hidden": h}, reduction="mean", **options)

    tangent = rng.normal(size=point.shape).astype(np.float32)
    value, slope = jax.jvp(loss(fused, implementation="autodiff"), (point,), (tangent,))
    wanted, gradient = jax.value_and_grad(loss(dense))(point)
    np.testing.assert_allclose(value, wanted, rtol=2000 * EPS)
    np.testing.assert_allclose(slope, np.vdot(gradient, tangent), rtol=2000 * EPS)


def test_it_is_traced_once():
    jax.clear_caches()
    with mock.patch.object(jaxce.linear.recompute, "loss", chex.assert_max_traces(jaxce.linear.recompute.loss, 1)):
        for seed in range(3):
            a = arguments(np.random.default_rng(seed))
            linear_cross_entropy(a["hidden"], a["kernel"], a["targets"], label_smoothing=0.1 * seed + 0.1)


# --- structure ------------------------------------------------------------------------------------------------------


def equations(jaxpr):
    """Those of the program for CPU: elsewhere it may take another branch of the same."""
    for eqn in jaxpr.eqns:
        params = eqn.params
        if platforms := params.get("branches_platforms"):
            cpu = next(
                (b for b, names in zip(params["branches"], platforms, strict=True) if "cpu" in (names or ())), None
            )
            params = {"branches": [cpu or params["branches"][-1]]}
        else:
            yield eqn
        for param in params.values():
            for inner in jax.tree.leaves(param, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from equations(inner)


def traced(f, args, **options):
    def value_and_grads(parts):
        return jax.value_and_grad(
            lambda parts: f(joined(parts, args), **options), has_aux=options.get("return_aux", False)
        )(parts)

    return jax.make_jaxpr(value_and_grads)(floats(args)).jaxpr


@pytest.mark.parametrize(("mode", "kind", "vocab_axis"), pairwise(MODES, ["index", "sparse"], (0, 1)))
def test_no_array_of_all_logits(rng, mode, kind, vocab_axis):
    """Every value in the program, inner functions included, is smaller than [N, V]."""
    n, v = 61, 127
    args = arguments(rng, kind, (n,), v=v)
    where = np.ones(v, bool)
    options = {"logit_softcap": 3.0, "return_aux": True, "where": where, "reduction": "mean"}
    with blocks(mode, 8, 16):
        found = list(equations(traced(fused, args, vocab_axis=vocab_axis, **options)))
    largest = max(var.aval.size for eqn in found for var in eqn.outvars if hasattr(var.aval, "size"))
    assert largest <= max(n * 16, 8 * v, D * v, n * 3 * 3)
    assert largest < n * v / 5
    everything = list(equations(traced(dense, args, **options)))  # the search finds what there is to find
    assert max(var.aval.size for eqn in everything for var in eqn.outvars if hasattr(var.aval, "size")) >= n * v


@pytest.mark.parametrize(("mode", "matmuls"), [("recompute", 4), ("store", 3)])
def test_number_of_matmuls(rng, mode, matmuls):
    """In each of the two blocks of classes."""
    args = arguments(rng)
    with blocks(mode, N, V // 2 + 1):
        found = [eqn.primitive.name for eqn in equations(traced(fused, args, reduction="mean", return_aux=True))]
    assert found.count("dot_general") == 2 * matmuls


def products(f, *args) -> list[tuple[int, int]]:
    """The shapes of the matmuls of the compiled program, those in a loop once."""
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", jax.jit(f).lower(*args).compile().as_text())
    return sorted((int(rows), int(columns)) for rows, columns in found if columns != "1")  # one adds up short rows


@pytest.mark.parametrize("mode", MODES)
def test_logits_in_one_block_are_computed_once(rng, mode):
    """Then there is no gradient to keep, and the compiler finds that those of the backward pass are the same."""
    args = {name: x for name, x in arguments(rng).items() if name in ("hidden", "kernel", "targets")}
    names = ("hidden", "kernel")

    def loss(floats):
        return linear_cross_entropy(**args | floats, reduction="mean")

    with blocks(mode, N, V):
        found = products(jax.value_and_grad(loss), {name: args[name] for name in names})
        kept = jax.tree.leaves(jax.vjp(loss, {name: args[name] for name in names})[1])
    assert found == sorted([(N, V), (N, D), (D, V)])
    assert all(x.size <= max(N * D, D * V) for x in kept)
    assert sum(x.shape == (D, V) for x in kept) == 1  # the kernel itself


@pytest.mark.optimized
@pytest.mark.every_case
@pytest.mark.parametrize("mode", [pytest.param("recompute", marks=pytest.mark.slow), "store"])
@pytest.mark.parametrize("asked", ["hidden", "kernel", pytest.param("bias", marks=pytest.mark.slow)])
def test_what_is_frozen_costs_nothing(rng, mode, asked):
    """A gradient that is not asked for takes no product, and no memory from the loss to the backward pass."""
    n, v, block_n, block_v = 12, 30, 4, 10
    args = arguments(rng, batch=(n,), v=v)
    h, k, b, y = (args[name] for name in ("hidden", "kernel", "bias", "targets"))
    rows = block_n if mode == "store" else n
    logits, wanted = [(rows, block_v)], {"hidden": [(rows, D)], "kernel": [(D, block_v)], "bias": []}[asked]

    def loss(x):
        floats = {"hidden": h, "kernel": k, "bias": b, asked: x}
        return linear_cross_entropy(**floats, targets=y, reduction="mean")

    def forward(x):
        """What JAX compiles by itself outside of jit: the loss, with all that it leaves for the backward pass."""
        return jax.tree.leaves(jax.vjp(loss, x)[1])

    with blocks(mode, block_n, block_v):
        assert products(jax.grad(loss), args[asked]) == sorted((1 if mode == "store" else 2) * logits + wanted)
        assert products(forward, args[asked]) == sorted(logits + wanted * (mode == "store"))
        kept = [x.shape for x in forward(args[asked])]
    for name, x in {"hidden": h, "kernel": k}.items():
        assert kept.count(x.shape) == 1 + (mode == "store" and name == asked)


def mean_of_log_probs(h, k, y):
    return jnp.mean(jaxce.linear_log_probs(h, k, y))


def divergence_of_models(mode):
    def loss(h, k, y):
        return jaxce.linear_distillation_loss(h, k, h[:, ::-1], k, mode=mode, reduction="mean")

    return loss


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("loss", "summed"),
    [
        (functools.partial(linear_cross_entropy, mode="recompute", reduction="mean"), False),
        (functools.partial(linear_cross_entropy, mode="store", reduction="mean"), True),
        (mean_of_log_probs, False),
        (divergence_of_models("recompute"), False),
        (divergence_of_models("store"), True),
    ],
)
def test_a_narrow_kernel_is_not_held_in_float32(loss, summed):
    """Nor is its gradient but where it is a sum over blocks of tokens."""
    n, d, v = 1024, 512, 40_000

    def temporary(dtype):
        arrays = [jax.ShapeDtypeStruct(s, dtype) for s in ((n, d), (d, v))]
        labels = jax.ShapeDtypeStruct((n,), jnp.int32)
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    with mock.patch.dict(distillation._KEPT, cpu=distillation._KEPT["cpu"] // 2):  # blocks as large as the narrow ones
        wide = temporary(jnp.float32)
    a_block = wide / 10  # of narrow numbers beside the wide ones
    assert temporary(jnp.bfloat16) <= wide + a_block + summed * 4 * d * v


def test_what_is_asked_for_may_change(rng):
    """JAX keeps what it traced for each, and mixes them up if what they leave for the backward pass is another tree."""
    args = arguments(rng, batch=(11,))  # as no other test has them: traced here first

    def loss(h, k):
        return linear_cross_entropy(h, k, args["targets"], reduction="mean")

    with blocks("store"):
        for f in loss, jax.checkpoint(loss):
            for argnums in 0, 1:
                jax.make_jaxpr(jax.grad(f, argnums))(args["hidden"], args["kernel"])


def test_no_gradient_is_computed_where_none_is_wanted(rng):
    args = arguments(rng)
    with blocks("store", N, V // 2 + 1):
        jaxpr = jax.make_jaxpr(lambda: fused(args, reduction="mean"))().jaxpr
    assert [eqn.primitive.name for eqn in equations(jaxpr)].count("dot_general") == 2  # one in each block of classes


@pytest.mark.slow
def test_blocks_without_used_tokens_are_left_out(rng):
    """Whatever the order of the tokens: the used ones come first."""
    args = arguments(rng)
    targets = args["targets"].copy()
    targets[rng.permutation(N)[: N - 3]] = -1
    args["targets"] = targets
    options = {"reduction": "mean", "ignore_index": -1}
    cotangent = [np.float32(1)]
    with blocks("store", 4, V):
        actual = outputs_and_gradients(fused, args, cotangent, **options)
        jaxpr = traced(fused, args, **options)
    wanted = outputs_and_gradients(dense, args, cotangent, **options)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS)
    inside = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "cond" and "dot_general" in str(eqn)]
    assert len(inside) == 2  # whole blocks, and the one that is left


def test_tokens_are_moved_only_where_blocks_may_be_left_out(rng):
    """Not where all are used, and not where a mask or probabilities [N, V] would be moved with them.

    A token of weight 0 is used where the gradient in its weight is asked for, as it is here.
    """
    mask = np.ones((N, V), bool)
    cases = [("index", {}, 0), ("index", {"ignore_index": -1}, 1), ("index", {"ignore_index": -1, "where": mask}, 0)]
    for kind, options, sorts in [*cases, ("probs", {}, 0)]:
        with blocks("store", 4, V):
            found = equations(traced(fused, arguments(rng, kind), reduction="mean", **options))
        assert [eqn.primitive.name for eqn in found].count("sort") == sorts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["argument", "where the loss is called"])
@pytest.mark.parametrize("loss", ["cross-entropy", "log-probabilities", "divergence", "divergence from some classes"])
def test_precision_reaches_every_matmul(rng, loss, how, mode):
    """Those of the gradient too, which is traced when the context around the loss has been left."""
    args = arguments(rng)
    hidden, kernel, labels = args["hidden"], args["kernel"], args["targets"]
    given = {"precision": "highest"} if how == "argument" else {}
    teacher = SparseTargets(labels[:, None], np.ones((N, 1), np.float32))

    def of_labels(h, k):
        log_p, aux = jaxce.linear_log_probs(h, k, labels, return_aux=True, **given)
        return jnp.sum(log_p * aux.entropy)

    calls = {
        "cross-entropy": lambda h, k: fused({**args, "hidden": h, "kernel": k}, reduction="mean", **given),
        "log-probabilities": of_labels,
        "divergence": lambda h, k: jaxce.linear_distillation_loss(
            h, k, hidden, kernel, reduction="mean", mode=mode, **given
        ),
        "divergence from some classes": lambda h, k: jaxce.linear_distillation_loss(
            h, k, teacher, reduction="mean", **given
        ),
    }

    def called(h, k):
        with jax.default_matmul_precision("highest") if how != "argument" else contextlib.nullcontext():
            return calls[loss](h, k)

    with blocks(mode):
        jaxpr = jax.make_jaxpr(jax.grad(called, (0, 1)))(hidden, kernel).jaxpr
    found = [eqn.params["precision"] for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(found) > 2
    assert all(p == (jax.lax.Precision.HIGHEST,) * 2 for p in found)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_retiled_block_is_the_block_and_has_its_derivatives(dtype, vocab_axis):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((5, 7)), dtype)

    def retiled(k):
        return retiled_classes(k, 2, 3, vocab_axis)

    def sliced(k):
        return k[2:5] if vocab_axis == 0 else k[:, 2:5]

    np.testing.assert_array_equal(retiled(kernel), sliced(kernel))
    for derivative in (jax.jacfwd, jax.jacrev):
        np.testing.assert_array_equal(derivative(retiled)(kernel), derivative(sliced)(kernel))


@pytest.mark.slow
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_a_chip_that_retiles_gets_the_same_gradients_of_gradients(vocab_axis):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((N, D)), jnp.float16)
    kernel = jnp.asarray(rng.standard_normal((D, V) if vocab_axis else (V, D)), jnp.float16)
    labels = jnp.asarray(rng.integers(0, V, N))

    def second(k):  # a new function, and so a new program, each time
        def loss(k):
            return linear_cross_entropy(hidden, k, labels, vocab_axis=vocab_axis, reduction="mean")

        return jax.jit(jax.grad(lambda k: jnp.sum(jax.grad(loss)(k).astype(jnp.float32) ** 2)))(k)

    with blocks("recompute"):
        expected = second(kernel)
        jax.clear_caches()
        with mock.patch.object(chips, "retiles", return_value=True):
            found = second(kernel)
    assert np.abs(expected.astype(np.float32)).max() > 0
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("transposes", [False, True])
@pytest.mark.parametrize("for_tpu", [False, True])
def test_the_products_of_every_arrangement(rng, vocab_axis, transposes, for_tpu):
    hidden, dz = rng.normal(size=(2, 3, D)), rng.normal(size=(2, 3, V))
    kernel = rng.normal(size=(D, V) if vocab_axis else (V, D))
    schedule = Schedule(vocab_axis, "highest", retiles=for_tpu, row_major=for_tpu)

    @jax.jit
    def both(dz, hidden, kernel):
        return gradients(dz, hidden, kernel, schedule, jnp.moveaxis(hidden, -1, 0) if transposes else None)

    dhidden, dkernel = both(*(x.astype(np.float32) for x in (dz, hidden, kernel)))
    expected = np.einsum("abv,dv->abd" if vocab_axis else "abv,vd->abd", dz, kernel)
    np.testing.assert_allclose(dhidden, expected, atol=1e-5)
    expected = np.einsum("abd,abv->dv" if vocab_axis else "abd,abv->vd", hidden, dz)
    np.testing.assert_allclose(dkernel, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("block_v", "eighths", "expected"),
    [(1024, 8, 1024), (1000, 8, 1000), (1024, 7, 896), (1024, 9, 1152), (1024, 10, 1280), (384, 7, 256)]
    + [(256, 9, 256), (128, 7, 128), (128, 10, 128), (100, 7, 100), (100, 10, 100)],
)
def test_eighths_of_a_block_are_whole_tiles(block_v, eighths, expected):
    assert plans._scaled(block_v, eighths) == expected


# --- what the modes have in common ----------------------------------------------------------------------------------

PAIRS = [
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "bfloat16"),
    ("bfloat16", "float16"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("bfloat16", "float8_e5m2"),
]


@pytest.mark.optimized
@pytest.mark.parametrize("dtypes", PAIRS)
def test_products_of_every_dtype_run_and_are_rounded_once(rng, dtypes):
    """Both layouts, modes, ranks of the batch, with and without options, scaled by a number that is no power of two."""
    n, v, scale = 10, 32, np.float32(0.3)
    hidden, kernel, bias = (
        jnp.asarray(rng.normal(size=s), d) for s, d in zip([(n, D), (D, v), v], [*dtypes, dtypes[0]], strict=True)
    )
    labels = rng.integers(0, v, n)
    options = {"plain": {}, "smoothed": {"label_smoothing": 0.25}, "capped": {"logit_softcap": 30.0}}
    variants = pairwise(MODES, (0, 1), (1, 2), options)

    @jax.jit
    def gradients(hidden, kernel, bias):
        def one(mode, vocab_axis, rank, option):
            def loss(h, k, b):
                h, y = (h, labels) if rank == 1 else (h.reshape(2, 5, D), labels.reshape(2, 5))
                with blocks(mode, 5, 16):
                    return scale * linear_cross_entropy(
                        h, k, y, bias=b, vocab_axis=vocab_axis, reduction="mean", **options[option]
                    )

            return jax.grad(loss, (0, 1, 2))(hidden, kernel if vocab_axis else kernel.T, bias)

        return {variant: one(*variant) for variant in variants}

    wide = [np.asarray(x).astype(np.float64) for x in (hidden, kernel, bias)]
    z = wide[0] @ wide[1] + wide[2]
    off = (D + 2) * EPS * np.max(np.abs(wide[0]) @ np.abs(wide[1]) + np.abs(wide[2]))
    with jax.numpy_dtype_promotion("standard"):
        actual = gradients(hidden, kernel, bias)
    for (mode, vocab_axis, _rank, option), found in actual.items():
        cap = options[option].get("logit_softcap")
        capped = cap * np.tanh(z / cap) if cap else z
        smoothing = options[option].get("label_smoothing", 0)
        problem = oracle.Problem(capped, oracle.one_hot(labels, v), label_smoothing=smoothing)
        dz, size = problem.gradients(oracle.Cotangents(np.full(n, float(scale) / n))).logits
        dz, size = (x * (1 - (capped / cap) ** 2 if cap else 1) for x in (dz, size))
        error = size * ((16 + n + v) * EPS + 8 * off)
        wanted = [(dz @ wide[1].T, error @ np.abs(wide[1].T)), (wide[0].T @ dz, np.abs(wide[0].T) @ error)]
        wanted.append((dz.sum(0), error.sum(0)))
        for name, g, (value, bound) in zip(("hidden", "kernel", "bias"), found, wanted, strict=True):
            g, dtype = np.asarray(g), g.dtype
            g = g.T if name == "kernel" and not vocab_axis else g
            rounded = oracle.half_ulp(value, dtype) if dtype != jnp.float32 else 0
            oracle.assert_within(g, value, bound + 1.01 * rounded, f"{mode} {vocab_axis} {option} {name}")


@pytest.mark.optimized
@pytest.mark.parametrize("shape", [(16, 8, 10), (1, 8, 16), (7, 5, 3)])
def test_products_run_however_their_results_are_transposed(rng, shape):
    """XLA may fold a transposition of the result into the product, and has not every product that makes."""
    n, d, v = shape
    variants = [
        (batch, vocab_axis, order)
        for batch in [(n,), (2, n), (2, 3, n)]
        for vocab_axis in (0, 1)
        for order in itertools.permutations(range(len(batch) + 1))
    ]

    @jax.jit
    def transposed(arrays):
        return [
            jnp.transpose(logits_of(hidden, kernel, None, Schedule(vocab_axis, widens=True)), order)
            for (hidden, kernel), (_, vocab_axis, order) in zip(arrays, variants, strict=True)
        ]

    sizes = [((*batch, d), (d, v) if vocab_axis else (v, d)) for batch, vocab_axis, _ in variants]
    arrays = [[jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in pair] for pair in sizes]
    for z, pair, (_, vocab_axis, order) in zip(transposed(arrays), arrays, variants, strict=True):
        hidden, kernel = (np.asarray(x).astype(np.float64) for x in pair)
        kernel = kernel if vocab_axis else kernel.T
        bound = (d + 2) * EPS * np.abs(hidden) @ np.abs(kernel)
        oracle.assert_within(z, np.transpose(hidden @ kernel, order), np.transpose(bound, order))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "kind", "dtypes"),
    pairwise(
        [*MODES, "dense", "from probs"],
        ["probs", "probs alone", "sparse"],
        [("bfloat16", "float32"), ("float32", "float64")],
    ),
)
def test_narrow_gradients_of_targets_weights_and_amounts_are_rounded_once(rng, loss, kind, dtypes):
    """Against those of the same numbers in the working dtype, scaled by a number that is no power of two."""
    narrow, wide = dtypes
    with jax.enable_x64(wide == "float64"), jax.numpy_dtype_promotion("standard"), blocks(loss, 4, 10):
        args = arguments(rng, kind.split()[0], batch=(12,), v=30)
        if "alone" in kind:
            del args["class_weights"]
        factors = {name: np.asarray(args[name]).astype(wide) for name in ("hidden", "kernel", "bias")}
        parts = {name: np.asarray(x).astype(jnp.dtype(narrow)) for name, x in floats(args).items()} | factors
        f, cotangents = {"dense": dense, "from probs": from_probs}.get(loss, fused), [np.dtype(wide).type(0.3)]
        (_, _, got), (_, _, wanted) = (
            outputs_and_gradients(f, joined(p, args), cotangents, reduction="mean")
            for p in (parts, jax.tree.map(lambda x: x.astype(wide), parts))
        )
    for name in set(got) - set(factors):
        value = np.asarray(wanted[name], np.float64)
        assert (got[name].dtype, wanted[name].dtype) == (narrow, wide)
        rounding = 64 * float(jnp.finfo(wide).eps) * np.abs(value)
        oracle.assert_within(got[name], value, oracle.half_ulp(value, narrow) + rounding, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "reduction"), [("recompute", "mean"), ("store", "sum"), ("store", "mean"), ("store", "mean_count")]
)
def test_each_output_alone_has_its_gradient(rng, mode, reduction):
    """The loss, each entry of the aux record, and an entry beside a loss that is not differentiated."""
    args = arguments(rng, "probs")
    cotangents = dict(
        zip(("nll", "log_normalizer", "entropy"), rng.normal(size=(3, N)).astype(np.float32), strict=True)
    )

    def gradients(f):
        def outputs(parts):
            loss, aux = f(joined(parts, args), reduction=reduction, return_aux=True)
            named = {name: jnp.sum(c * getattr(aux, name)) for name, c in cotangents.items()}
            return {"loss": loss, "stopped": jax.lax.stop_gradient(loss) + named["entropy"], **named}

        names = ("loss", "stopped", *cotangents)
        return jax.jit(lambda p: {n: jax.grad(lambda p: outputs(p)[n])(p) for n in names})(floats(args))  # noqa: B023

    with blocks(mode):
        actual = gradients(fused)
    wanted = gradients(dense)
    for name, found in actual.items():
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS * max(1, np.abs(b).max()), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reduction"), [("index", "sum"), ("index", "mean"), ("probs", "mean"), ("sparse", "sum")]
)
def test_blocks_that_are_left_out_lose_no_gradient(rng, kind, reduction):
    """Above all that of a weight which is 0: the token's loss."""
    args = arguments(rng, kind)
    args["weights"] = args["weights"] * (rng.random(N) < 0.3)
    options = {"reduction": reduction}
    if kind == "index":
        args["targets"] = np.where(rng.random(N) < 0.4, -1, args["targets"])
        options["ignore_index"] = -1
    with blocks("store"):
        actual = outputs_and_gradients(fused, args, [np.float32(0.7)], **options)
    wanted = outputs_and_gradients(dense, args, [np.float32(0.7)], **options)
    weights = wanted[2]["weights"][args["weights"] == 0]
    assert np.count_nonzero(weights) > 3
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS * max(1, np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "how", "asked", "kind"),
    pairwise(
        MODES,
        ["eager", "jit", "vmap", "checkpoint", "scan"],
        ["hidden", "kernel", "bias", "weights", "class_weights", "label_smoothing", "targets"],
        ["index", "probs"],
    ),
)
@pytest.mark.parametrize("aux", [False, True])
def test_a_gradient_alone_is_what_it_is_among_all(rng, mode, how, asked, kind, aux):
    args = arguments(rng, kind)
    if asked == "targets" and kind == "index":
        asked = "z_loss"

    def loss(parts):
        out = fused(joined(parts, args), reduction="mean", return_aux=aux)
        return out[0] + jnp.sum(out[1].entropy) if aux else out

    def in_scan(parts):
        return jax.lax.scan(lambda total, scale: (total + scale * loss(parts), None), jnp.float32(0), jnp.ones(1))[0]

    grad = {
        "eager": jax.grad(loss),
        "jit": jax.jit(jax.grad(loss)),
        "vmap": jax.grad(lambda parts: jax.vmap(loss)(jax.tree.map(lambda x: jnp.asarray(x)[None], parts))[0]),
        "checkpoint": jax.grad(jax.checkpoint(loss)),
        "scan": jax.jit(jax.grad(in_scan)),
    }[how]
    with blocks(mode):
        (alone,) = grad({asked: args[asked]}).values()
        among_all = grad(floats(args))[asked]
        (again,) = grad({asked: args[asked]}).values()
    np.testing.assert_array_equal(again, alone)
    assert np.abs(among_all).max() > 0
    np.testing.assert_allclose(alone, among_all, rtol=100 * EPS, atol=100 * EPS * np.abs(among_all).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"logit_softcap": 5.0}, {"label_smoothing": 0.1}])
def test_a_loss_that_is_thrown_away_leaves_no_gradient(rng, mode, options):
    """As a training step does that skips what is not finite."""
    args = {name: x for name, x in arguments(rng).items() if name in ("hidden", "kernel", "targets", "bias")}
    args["bias"] = args["bias"].at[2].set(np.nan)

    def skipped(h, k, b):
        loss = linear_cross_entropy(h, k, args["targets"], bias=b, reduction="mean", **options)
        return jnp.where(jnp.isfinite(loss), loss, 0)

    with blocks(mode):
        grads = jax.jit(jax.grad(skipped, (0, 1, 2)))(args["hidden"], args["kernel"], args["bias"])
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)
