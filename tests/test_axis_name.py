"""Classes split over devices inside shard_map: the loss of one device, from a few numbers per row between them."""

from __future__ import annotations

import functools
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import SparseTargets, linear_cross_entropy, softmax_cross_entropy
from jaxce.linear import chips, distillation
from jaxce.versions import varying_axes
from tests import oracle
from tests.pairwise import pairwise
from tests.test_linear import (
    MODES,
    assert_near_the_oracle,
    blocks,
    floats,
    fused,
    joined,
    random_cotangents,
    store_needs_one_number,
)
from tests.test_linear import arguments as linear_arguments
from tests.test_linear import dense as dense_linear
from tests.test_sharding import collective_sizes

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)  # what is smaller may be flushed to 0
KINDS = ["index", "probs", "sparse"]
SHARDS = [1, 2, 4, 8]
N, V = 12, 24
OUTPUTS = ("loss", "nll", "log_normalizer", "entropy")


def mesh_of(*shape: int, names: tuple[str, ...] = ("v",), kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def specs(kind: str, rows: Any = None, classes: Any = "v", vocab_axis: int = 1) -> dict[str, Any]:
    """How each argument is split, if tokens are split over `rows` and classes over `classes`."""
    return {
        "logits": P(rows, classes),
        "targets": P(rows, classes) if kind == "probs" else P(rows),
        "targets.probs": P(rows),
        "where": P(rows, classes),
        "weights": P(rows),
        "class_weights": P(classes),
        "label_smoothing": P(),
        "z_loss": P(),
        "hidden": P(rows),
        "kernel": P(None, classes) if vocab_axis else P(classes, None),
        "bias": P(classes),
    }


def outputs(f, parts, arguments, **options) -> list[jax.Array]:
    out = f(joined(parts, arguments), **options)
    loss, aux = out if isinstance(out, tuple) else (out, None)
    return [loss] + ([] if aux is None else [aux.nll, aux.log_normalizer, aux.entropy])


def pull_back(f, mesh, split, **options):
    """A function that gives outputs and gradients of all floats, for cotangents that are the same on all devices."""

    def local(parts, arguments, cotangents):
        outs, pull = jax.vjp(lambda parts: outputs(f, parts, arguments, **options), parts)
        return outs, pull(list(cotangents))[0]

    @jax.jit
    def run(arguments, cotangents):
        parts = {name: x for name, x in floats(arguments).items() if name != "where"}
        rest = {name: x for name, x in arguments.items() if name not in parts}
        inside = {name: split[name] for name in parts}, {name: split[name] for name in rest}, P()
        mapped = jax.shard_map(local, mesh=mesh, in_specs=inside, out_specs=(P(), inside[0]), check_vma=True)
        return mapped(parts, rest, cotangents)

    return run


def dense(arguments: dict[str, Any], **options: Any):
    rest = dict(arguments)
    return softmax_cross_entropy(rest.pop("logits"), rest.pop("targets"), **rest, **options)


def make_arguments(rng, kind: str) -> dict[str, Any]:
    indices = np.stack([np.arange(N) * 2, rng.integers(0, V, N), rng.integers(0, V, N)], -1).astype(np.int32)
    return {
        "logits": rng.normal(size=(N, V)).astype(np.float32),
        "targets": {
            "index": indices[:, 0],  # two classes apart: on every shard
            "probs": rng.dirichlet(np.ones(V), N).astype(np.float32),
            "sparse": SparseTargets(indices, rng.dirichlet(np.ones(3), N).astype(np.float32)),
        }[kind],
        "weights": rng.uniform(0.5, 2, N).astype(np.float32),
        "class_weights": rng.uniform(0.5, 2, V).astype(np.float32),
        "label_smoothing": np.float32(0.1),
        "z_loss": np.float32(0.01),
    }


def problem_of(args: dict[str, Any]) -> oracle.Problem:
    t = args["targets"]
    if isinstance(t, SparseTargets):
        t = oracle.dense(t.indices, t.probs, V)
    elif t.ndim == 1:
        t = oracle.one_hot(t, V)
    rest = {name: x for name, x in args.items() if name not in ("logits", "targets")}
    return oracle.Problem(args["logits"], t, **rest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shards", "implementation"), [*((k, None) for k in SHARDS), (4, "autodiff")])
def test_as_exact_as_on_one_device(rng, shards, kind, implementation):
    """Each output and gradient within the bounds that hold on one device, for logits of every size, and for ties."""
    args = make_arguments(rng, kind)
    z = args["logits"]
    run = pull_back(dense, mesh_of(shards), specs(kind), axis_name="v", return_aux=True, implementation=implementation)
    cotangents = list(rng.normal(size=(4, N)).astype(np.float32))
    for name, logits in {"x1": z, "x1000": 1000 * z, "ties": np.round(z), "all tied": 0 * z}.items():
        case = args | {"logits": logits.astype(np.float32)}
        outs, grads = run(case, cotangents)
        problem = problem_of(case)
        below = problem.softmax.below
        # A class that stands alone at the top: the rounding of the distance of the next is magnified by exp.
        alone = np.sort(below, -1)[:, 1]
        for what, out, exact in zip(OUTPUTS, outs, problem.losses(), strict=True):
            bound = (16 + alone) * EPS * exact.size + 4 * TINY
            if implementation == "autodiff":
                bound += 16 * EPS * (problem.losses().entropy.size if what == "entropy" else 0)
            oracle.assert_within(out, exact.value, bound, f"{what}, {name}")
        exact = problem.gradients(oracle.Cotangents(*cotangents))
        value, size = exact.logits
        if implementation == "autodiff":  # which leaves terms of the entropy's gradient to cancel
            size = size + abs(cotangents[3])[:, None] * problem.softmax.p * (2 + 2 * problem.softmax.log_sum[:, None])
        scale = 4 * TINY * (1 + np.abs(below).max())
        oracle.assert_within(grads["logits"], value, (16 + below) * EPS * size + scale, f"logits, {name}")
        for what in ("weights", "class_weights", "label_smoothing", "z_loss"):
            value, size = getattr(exact, what)
            oracle.assert_within(grads[what], value, (16 + alone.max()) * EPS * size + scale, f"{what}, {name}")
        if kind == "probs":
            value, size = exact.targets
            oracle.assert_within(grads["targets"], value, 16 * EPS * size + scale, f"targets, {name}")


@pytest.mark.parametrize("shards", SHARDS)
def test_classes_without_probability(rng, shards):
    """A shard of nothing but −inf, and rows that must be NaN, +inf or 0 whatever the devices hold."""
    args = {"logits": make_arguments(rng, "index")["logits"], "targets": np.arange(N, dtype=np.int32) % (V // 8)}
    args["logits"][:, -V // 2 :] = -np.inf  # with eight shards, four of them
    problem = problem_of(args)
    run = pull_back(dense, mesh_of(shards), specs("index"), axis_name="v", return_aux=True)
    cotangents = list(rng.normal(size=(4, N)).astype(np.float32))
    outs, grads = run(args, cotangents)
    with np.errstate(invalid="ignore"):  # in the oracle's gradients of what is not asked for
        losses, exact_gradients = problem.losses(), problem.gradients(oracle.Cotangents(*cotangents))
    for out, exact in zip(outs, losses, strict=True):
        oracle.assert_within(out, exact.value, 16 * EPS * exact.size)
    value, size = exact_gradients.logits
    finite = np.isfinite(args["logits"])
    np.testing.assert_array_equal(np.asarray(grads["logits"])[~finite], 0)
    bound = np.where(finite, (16 + np.where(finite, problem.softmax.below, 0)) * EPS * size, 0)
    oracle.assert_within(grads["logits"], np.where(finite, value, 0), bound)

    args["logits"][0] = -np.inf
    args["logits"][1, V - 1] = np.nan
    args["logits"][2, 0] = np.inf
    args["targets"] = args["targets"].copy()
    args["targets"][3:6] = -1, V, V - 1
    outs, grads = run(args, [np.ones(N, np.float32), *(np.zeros((3, N), np.float32))])
    np.testing.assert_array_equal(np.isnan(outs[0][:6]), [True] * 5 + [False])
    assert outs[0][5] == np.inf
    assert np.all(np.isfinite(outs[0][6:]))
    assert np.all(np.isnan(grads["logits"][:5]))
    assert np.all(np.isfinite(np.asarray(grads["logits"][6:])))


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [("index", "sum"), ("index", "mean"), ("index", "mean_count"), ("probs", "mean"), ("sparse", "mean_count")],
)
def test_nothing_counts(rng, kind, reduction):
    """All examples ignored, or of weight 0, and full of NaN: loss 0 and gradients 0 on every device."""
    args = make_arguments(rng, kind) | {"logits": np.full((N, V), np.nan, np.float32)}
    options: dict[str, Any] = {"axis_name": "v", "reduction": reduction}
    if kind == "probs":
        args["weights"] = np.zeros(N, np.float32)
    else:
        args["targets"] = jax.tree.map(lambda x: x if x.dtype == np.float32 else np.full_like(x, -100), args["targets"])
        options["ignore_index"] = -100
    outs, grads = pull_back(dense, mesh_of(4), specs(kind), **options)(args, [np.float32(1)])
    assert outs[0] == 0
    for name in set(grads) - ({"weights"} if kind == "probs" else set()):
        np.testing.assert_array_equal(grads[name], 0, err_msg=name)


@pytest.mark.parametrize("label", [-1, V])
def test_no_class_weight_hides_a_label_that_is_no_class(rng, label):
    """In a shard_map and on an Explicit mesh: NaN, though none of the devices has that class, or a weight for it."""
    z, labels = rng.normal(size=(2, V)).astype(np.float32), np.array([3, label])
    weights = rng.uniform(1, 2, V).astype(np.float32)

    def loss(z, labels, weights, **options):
        return softmax_cross_entropy(z, labels, class_weights=weights, z_loss=0.1, **options)

    split = functools.partial(loss, axis_name="v")
    mapped = jax.shard_map(split, mesh=mesh_of(4), in_specs=(P(None, "v"), P(), P("v")), out_specs=P())
    np.testing.assert_array_equal(np.isnan(jax.jit(mapped)(z, labels, weights)), [False, True])
    mesh = mesh_of(4, kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(z, NamedSharding(mesh, P(None, "v")))
        np.testing.assert_array_equal(np.isnan(jax.jit(loss)(placed, labels, weights)), [False, True])


@pytest.mark.slow
def test_labels_of_64_bits(rng, x64):
    """Without a promotion of integers, which strict rules refuse."""
    h, k = rng.normal(size=(5, 3)), rng.normal(size=(3, V))
    labels, options = rng.integers(0, V, 5), {"class_weights": rng.uniform(1, 2, V), "reduction": "mean"}
    assert labels.dtype == np.int64
    losses = [lambda h, k, y, **o: softmax_cross_entropy(h @ k, y, **o)]
    losses += [functools.partial(linear_cross_entropy, mode=mode) for mode in MODES]
    for loss in losses:

        def split(h, k, y, w, loss=loss):
            return loss(h, k, y, class_weights=w, reduction="mean", axis_name="v")

        in_specs = (P(), P(None, "v"), P(), P("v"))
        mapped = jax.shard_map(split, mesh=mesh_of(4), in_specs=in_specs, out_specs=P())
        got = jax.jit(jax.value_and_grad(mapped, (0, 1)))(h, k, labels, options["class_weights"])
        wanted = jax.value_and_grad(functools.partial(loss, **options), (0, 1))(h, k, labels)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), got, wanted)


def test_prediction_is_the_first_of_equals(rng):
    z = np.round(2 * rng.normal(size=(40, V))).astype(np.float32)
    labels = np.zeros(40, np.int32)

    def predict(z, labels):
        return softmax_cross_entropy(z, labels, axis_name="v", return_aux=True)[1].prediction

    for shards in SHARDS:
        mapped = jax.shard_map(predict, mesh=mesh_of(shards), in_specs=(P(None, "v"), P()), out_specs=P())
        np.testing.assert_array_equal(jax.jit(mapped)(z, labels), np.argmax(z, -1))


@pytest.mark.parametrize("loss", ["dense", "autodiff", *MODES])
def test_one_class_a_device_whose_logits_are_computed_in_the_same_program(rng, loss):
    """A compiler may compute it for each of its uses, and round it in another way: then none has the maximum."""
    h, k, b = rng.normal(size=(36, 1)), rng.normal(size=(1, 2)), rng.normal(size=2)
    labels = rng.integers(0, 2, 36)

    def losses(h, k, b, labels):
        options = {"axis_name": "v", "return_aux": True, "reduction": "mean"}
        if loss == "autodiff":
            options["implementation"] = loss
        if loss in ("dense", "autodiff"):
            value, aux = softmax_cross_entropy(h * k + b[None], labels, **options)
        else:
            value, aux = linear_cross_entropy(h, k, labels, bias=b, mode=loss, **options)
        return value, aux.nll, aux.prediction

    with jax.enable_x64(True):
        mapped = jax.shard_map(
            losses, mesh=mesh_of(2), in_specs=(P(), P(None, "v"), P("v"), P()), out_specs=(P(), P(), P())
        )
        value, nll, prediction = jax.jit(mapped)(h, k, b, labels)
    problem = oracle.Problem(h * k + b, oracle.one_hot(labels, 2))
    exact = problem.losses().nll
    np.testing.assert_allclose(nll, exact.value, rtol=1e-13)
    np.testing.assert_allclose(value, exact.value.mean(), rtol=1e-13)
    np.testing.assert_array_equal(prediction, np.argmax(h * k + b, -1))


# --- the linear loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["loss", "entropy"])
def test_a_device_whose_classes_are_all_masked_by_the_smallest_float(rng, asked):
    """As padding of the vocabulary is: what is asked for of the others is as without them."""
    logits = rng.normal(size=(N, V)).astype(np.float32)
    logits[:, -V // 4 :] = np.finfo(np.float32).min
    labels = rng.integers(0, V // 2, N)

    def total(logits, **options):
        loss, aux = softmax_cross_entropy(logits, labels, reduction="mean", return_aux=True, **options)
        return loss if asked == "loss" else jnp.mean(aux.entropy)

    split = jax.shard_map(
        functools.partial(total, axis_name="v"), mesh=mesh_of(4), in_specs=P(None, "v"), out_specs=P()
    )
    value, gradient = jax.jit(jax.value_and_grad(split))(logits)
    wanted, of_kept = jax.jit(jax.value_and_grad(total))(logits[:, : -V // 4])
    np.testing.assert_allclose(value, wanted, rtol=16 * EPS)
    # A gradient is a difference of numbers that are no larger than the largest of them are here.
    wanted = np.pad(of_kept, ((0, 0), (0, V // 4)))
    np.testing.assert_allclose(gradient, wanted, rtol=16 * EPS, atol=16 * EPS * np.max(np.abs(wanted)))


@pytest.mark.parametrize(("split", "kind", "mode"), pairwise([(1, 1), (2, 0), (4, 1), (8, 0)], KINDS, MODES))
def test_linear_loss(rng, split, kind, mode):
    """29 classes, which no number of devices divides: the padding is out of the mask, and holds anything."""
    shards, vocab_axis = split
    args = linear_arguments(rng, kind)
    (n, v), padding = (len(args["hidden"]), args["kernel"].shape[1]), 32 - args["kernel"].shape[1]
    padded = dict(args)
    for name in ("kernel", "bias", "class_weights") + (("targets",) if kind == "probs" else ()):
        fill = 0 if name == "targets" else 1e3  # a target there would make the loss infinite
        width = [(0, 0)] * (np.ndim(args[name]) - 1) + [(0, padding)]
        padded[name] = np.pad(np.asarray(args[name]), width, constant_values=fill)
    padded["where"] = np.broadcast_to(np.arange(32) < v, (n, 32))
    reduction = "none" if mode == "recompute" else "sum"
    cotangents = random_cotangents(rng, reduction)
    options = {"axis_name": "v", "reduction": reduction, "return_aux": True, "vocab_axis": vocab_axis}

    def loss(arguments, **options):
        return linear_cross_entropy(**arguments, **options)

    given = padded | {"kernel": padded["kernel"].T if vocab_axis == 0 else padded["kernel"]}
    with blocks(mode, 4, 4):
        run = pull_back(loss, mesh_of(shards), specs(kind, vocab_axis=vocab_axis), **options)
        outs, grads = run(given, cotangents)
    grads = {name: np.asarray(g) for name, g in grads.items()}
    if vocab_axis == 0:
        grads["kernel"] = grads["kernel"].T
    np.testing.assert_array_equal(grads["kernel"][:, v:], 0)
    grads |= {"kernel": grads["kernel"][:, :v], "bias": grads["bias"][:v], "class_weights": grads["class_weights"][:v]}
    per_row = [np.broadcast_to(c, (n,)) for c in cotangents]
    wanted, relative = assert_near_the_oracle(args, per_row, outs, grads)
    for name in ("weights", "class_weights", "label_smoothing", "z_loss"):
        value, size = getattr(wanted, name)
        oracle.assert_within(grads[name], value, relative * (size + np.abs(per_row[0]).sum() * 8), name)


@pytest.mark.parametrize(("vocab_axis", "shape", "spec"), [(-1, (3, 32), P(None, "v")), (-2, (32, 3), P("v", None))])
def test_classes_on_an_axis_counted_from_the_end(vocab_axis, shape, spec):
    mesh = mesh_of(2, 4, names=("d", "v"), kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        h = jax.device_put(np.ones((8, 3), np.float32), jax.sharding.NamedSharding(mesh, P("d")))
        k = jax.device_put(np.ones(shape, np.float32), jax.sharding.NamedSharding(mesh, spec))
        loss = functools.partial(linear_cross_entropy, vocab_axis=vocab_axis)
        assert jax.eval_shape(loss, h, k, np.zeros(8, np.int32)).shape == (8,)


@pytest.mark.parametrize("gathered", ["all", "hidden"])
@pytest.mark.parametrize("asked", ["all devices", "one device"])
@pytest.mark.parametrize("loss", ["cross-entropy", "divergence", "divergence from some classes"])
def test_what_was_gathered_over_the_devices_of_the_classes(rng, loss, asked, gathered, monkeypatch):
    """Varies over them by its type, in blocks of tokens too; counts and losses do not, whoever asks for a gradient."""
    args = linear_arguments(rng, "index", v=32)
    k, smoothing = np.asarray(args["kernel"]), np.float32(0.1)
    rows = {"h": np.asarray(args["hidden"])[:8], "labels": np.asarray(args["targets"])[:8]}
    rows |= {"weights": rng.uniform(0.2, 2, 8).astype(np.float32), "T": rng.uniform(0.5, 2, 8).astype(np.float32)}
    ignored = int(rows["labels"][0])
    monkeypatch.setattr(distillation, "_KEPT", dict.fromkeys(distillation._KEPT, 16))
    monkeypatch.setattr(distillation, "_LEAST", 1)

    def value(floats, k, labels, axis=None):
        options = {"axis_name": axis, "reduction": "mean", "mode": "store"}
        options |= {"weights": floats["weights"], "temperature": floats["T"]}
        if loss == "divergence":
            return jaxce.linear_distillation_loss(floats["h"], k, jnp.sin(floats["h"]), jnp.cos(k), **options)
        if loss == "divergence from some classes":
            teacher = jaxce.SparseTargets(labels[:, None], 0.5 * jnp.ones_like(floats["T"])[:, None])
            return jaxce.linear_distillation_loss(floats["h"], k, teacher, **options | {"mode": None})
        own = lax.pcast(smoothing, axis, to="varying") if axis and gathered == "all" else smoothing
        return linear_cross_entropy(floats["h"], k, labels, ignore_index=ignored, label_smoothing=own, **options)

    def split(floats, k, labels):
        if gathered == "all":
            floats, labels = jax.tree.map(lambda x: lax.all_gather(x, "v", tiled=True), (floats, labels))
        else:
            floats = floats | {"h": lax.all_gather(floats["h"], "v", tiled=True)}
        found = value(floats, k, labels, "v")
        if asked == "all devices":
            return lax.pmean(found, "v")
        return lax.psum(jnp.where(lax.axis_index("v") == 0, found, 0), "v")

    floats = {name: x for name, x in rows.items() if name != "labels"}
    with blocks("store", 3, 4):
        wanted = jax.jit(jax.grad(value, (0, 1)))(floats, k, rows["labels"])
        of_rows = dict.fromkeys(floats, P("v" if gathered == "all" else None)) | {"h": P("v")}
        specs = of_rows, P(None, "v"), P("v" if gathered == "all" else None)
        mapped = jax.shard_map(jax.grad(split, (0, 1)), mesh=mesh_of(4), in_specs=specs, out_specs=specs[:2])
        found = jax.jit(mapped)(floats, k, rows["labels"])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["cross-entropy", "log_probs", "divergence", "divergence from some classes"])
def test_dense_losses_beside_what_was_gathered_over_the_devices_of_the_classes(rng, loss):
    """A device that asks for the gradient in its classes gets that of the loss, not of every device's."""
    args = linear_arguments(rng, "index", v=32)
    h, labels, k = (np.asarray(args[name])[:8] for name in ("hidden", "targets", "kernel"))
    rows = {"h": h, "labels": labels, "weights": rng.uniform(0.2, 2, 8).astype(np.float32)}
    rows["T"] = rng.uniform(0.5, 2, 8).astype(np.float32)

    def value(k, rows, axis=None):
        z, options = rows["h"] @ k, {"axis_name": axis, "temperature": rows["T"]}
        if loss == "log_probs":
            return jnp.mean(jaxce.log_probs(z, rows["labels"], **options))
        options |= {"weights": rows["weights"], "reduction": "mean"}
        if loss == "cross-entropy":
            return softmax_cross_entropy(z, rows["labels"], label_smoothing=0.1, z_loss=0.01, **options)
        teacher = jnp.sin(z)
        if loss == "divergence from some classes":
            teacher = jaxce.SparseTargets(rows["labels"][:, None], 0.5 * jnp.ones_like(rows["T"])[:, None])
        return jaxce.distillation_loss(z, teacher, **options)

    def split(k, rows):
        gathered = jax.tree.map(lambda x: lax.all_gather(x, "v", tiled=True), rows)
        return jax.value_and_grad(value)(k, gathered, "v")

    specs = P(None, "v"), P("v")
    found = jax.jit(jax.shard_map(split, mesh=mesh_of(4), in_specs=specs, out_specs=(P(), P(None, "v"))))(k, rows)
    wanted = jax.jit(jax.value_and_grad(value))(k, rows)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "loss", ["cross-entropy", "log-probabilities", "divergence", "teacher", "divergence from some classes"]
)
def test_tokens_that_nobody_gathered_are_nan(rng, loss):
    """Hidden states that only one token has alike on all devices; the labels are, and tell nothing."""
    h, k, labels = rng.normal(size=(8, 3)), rng.normal(size=(3, 8)), rng.integers(0, 8, 2)
    h[1::2] = h[1]

    def local(h, k, labels):
        if loss == "cross-entropy":
            return linear_cross_entropy(h, k, labels, axis_name="v")
        if loss == "log-probabilities":
            return jaxce.linear_log_probs(h, k, labels, axis_name="v")
        if loss == "divergence":
            return jaxce.linear_distillation_loss(h, k, jnp.ones((2, 3)), jnp.cos(k), axis_name="v")
        if loss == "teacher":
            return jaxce.linear_distillation_loss(jnp.ones((2, 3)), jnp.cos(k), h, k, axis_name="v")
        teacher = SparseTargets(labels[:, None], jnp.ones((2, 1)))
        return jaxce.linear_distillation_loss(h, k, teacher, axis_name="v")

    split = jax.shard_map(local, mesh=mesh_of(4), in_specs=(P("v"), P(None, "v"), P()), out_specs=P())
    found = jax.jit(split)(h.astype(np.float32), k.astype(np.float32), labels)
    np.testing.assert_array_equal(np.isfinite(found), [False, True])


@pytest.mark.parametrize("loss", ["dense", "linear"])
def test_labels_that_nobody_gathered_are_nan(rng, loss):
    h, k, labels = rng.normal(size=(8, 3)), rng.normal(size=(3, 8)), rng.integers(0, 8, 8)

    def local(h, k, labels):
        if loss == "dense":
            return softmax_cross_entropy(h @ k, labels, axis_name="v", reduction="mean")
        return linear_cross_entropy(h, k, labels, axis_name="v", reduction="mean")

    split = jax.shard_map(local, mesh=mesh_of(4), in_specs=(P("v"), P(None, "v"), P("v")), out_specs=P())
    assert np.isnan(jax.jit(split)(h.astype(np.float32), k.astype(np.float32), labels))


@pytest.mark.parametrize("loss", ["dense", "linear"])
def test_labels_that_are_no_class_weigh_nothing_and_are_nan(loss):
    """Their class weight is on no device, and the divisor of the mean is 0."""
    z, labels, weights = np.ones((3, 8), np.float32), np.full(3, 99), np.ones(8, np.float32)

    def mean(z, weights):
        options = {"class_weights": weights, "axis_name": "v", "reduction": "mean"}
        if loss == "dense":
            return softmax_cross_entropy(z, labels, **options)
        return linear_cross_entropy(np.ones((3, 3), np.float32), z, labels, **options)

    mapped = jax.shard_map(mean, mesh=mesh_of(4), in_specs=(P(None, "v"), P("v")), out_specs=P())
    assert np.isnan(jax.jit(mapped)(z, weights))


@pytest.mark.parametrize("split", ["labels", "weights", "labels and class weights", "labels that may be ignored"])
def test_tokens_that_were_not_gathered_over_the_devices_of_the_classes(rng, split):
    """Every device has others, of which there is no loss: NaN."""
    options = {"ignore_index": -(2**31)} if split.endswith("ignored") else {}
    if split.endswith("class weights"):
        options = {"class_weights": np.ones(8, np.float32)}
    split = split.split()[0]
    args = linear_arguments(rng, "index", v=32)
    h, k, labels = np.asarray(args["hidden"])[:2], np.asarray(args["kernel"]), np.arange(8, dtype=np.int32)
    given = {"labels": np.repeat(labels[:1], 8), "weights": np.ones(8, np.float32)}
    given[split] = labels.astype(given[split].dtype)

    def loss(k, labels, weights):
        return linear_cross_entropy(h, k, labels, weights=weights, axis_name="v", reduction="mean", **options)

    mapped = jax.shard_map(loss, mesh=mesh_of(4), in_specs=(P(None, "v"), P("v"), P("v")), out_specs=P())
    assert np.isnan(jax.jit(mapped)(k, given["labels"], given["weights"]))


def test_classes_split_over_chips_that_retile(rng):
    """Its barrier takes hidden states and what varies over the devices at once."""
    args = linear_arguments(rng, "index", v=32)
    given = [np.asarray(args[name]) for name in ("hidden", "kernel", "targets")]

    def step(**options):
        return jax.value_and_grad(functools.partial(linear_cross_entropy, reduction="mean", **options), (0, 1))

    with blocks("recompute", 4, 4):
        wanted = jax.jit(step())(*given)
        split = step(axis_name="v")
        mapped = jax.shard_map(
            split, mesh=mesh_of(4), in_specs=(P(), P(None, "v"), P()), out_specs=(P(), (P(), P(None, "v")))
        )
        with mock.patch.object(chips, "retiles", return_value=True):
            found = jax.jit(mapped)(*given)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=100 * EPS, atol=100 * EPS)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_trunk_exchanges_no_gradient_of_hidden_states(rng, mode):
    args = linear_arguments(rng, "index", v=32)
    h, k, labels = (np.asarray(args[name]) for name in ("hidden", "kernel", "targets"))

    def compiled(argnums):
        def loss(h, k, labels):
            return linear_cross_entropy(h, k, labels, axis_name="v", reduction="mean")

        gradients = P() if argnums == 0 else P(None, "v") if argnums == 1 else (P(), P(None, "v"))
        mapped = jax.shard_map(
            jax.grad(loss, argnums), mesh=mesh_of(4), in_specs=(P(), P(None, "v"), P()), out_specs=gradients
        )
        return jax.jit(mapped).lower(h, k, labels).compile()

    with blocks(mode, 4, 4):
        of_hidden, of_kernel, of_both = map(compiled, (0, 1, (0, 1)))
    for alone, among in zip((of_hidden, of_kernel), of_both(h, k, labels), strict=True):
        np.testing.assert_allclose(alone(h, k, labels), among, rtol=100 * EPS, atol=100 * EPS * np.abs(among).max())
    rows = 4 if mode == "store" else len(h)
    assert max(collective_sizes(of_hidden.as_text())) == rows * h.shape[1]
    assert max(collective_sizes(of_kernel.as_text())) == rows


def test_the_gradient_of_narrow_hidden_states_is_summed_before_it_is_rounded(rng):
    """Over eight devices, bfloat16 sums would be off by several of its ulps."""
    n, d, v = 16, 24, 512
    h, k = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((n, d), (d, v)))
    labels = rng.integers(0, v, n).astype(np.int32)

    def loss(h, k, labels, **options):
        return linear_cross_entropy(h, k, labels, reduction="sum", mode="recompute", **options)

    mapped = jax.shard_map(
        jax.grad(functools.partial(loss, axis_name="v")),
        mesh=mesh_of(8),
        in_specs=(P(), P(None, "v"), P()),
        out_specs=P(),
    )
    got = np.asarray(jax.jit(mapped)(h, k, labels), np.float64)
    exact = oracle.Problem(np.asarray(h, np.float64) @ np.asarray(k, np.float64), oracle.one_hot(labels, v)).gradients(
        oracle.Cotangents(np.ones(n))
    )
    dz, kernel = exact.logits.value, np.asarray(k, np.float64)
    # dz is rounded to bfloat16 for the matmul, within 2^-9 relatively, and so is the result.
    bound = 2.0**-8 * (np.abs(dz) @ np.abs(kernel.T)) + oracle.half_ulp(dz @ kernel.T, jnp.bfloat16)
    one_device = np.asarray(jax.jit(jax.grad(loss))(h, k, labels), np.float64)
    oracle.assert_within(got, dz @ kernel.T, bound)
    assert np.abs(got - dz @ kernel.T).mean() <= 1.2 * np.abs(one_device - dz @ kernel.T).mean()


@pytest.mark.slow
def test_hidden_states_that_were_gathered(rng):
    """What all_gather returns differs by its type, though not in value. Its derivative adds the devices' parts up."""
    args = linear_arguments(rng, "index", batch=(16,), v=32)
    h, k, labels = (np.asarray(args[name]) for name in ("hidden", "kernel", "targets"))

    def loss(h, k, labels, **options):
        if options:
            h, labels = (lax.all_gather(x, "v", axis=0, tiled=True) for x in (h, labels))
        total = linear_cross_entropy(h, k, labels, reduction="sum", **options)
        return lax.pmean(total, "v") if options and "v" in varying_axes(jax.typeof(total)) else total

    wanted = jax.grad(loss, (0, 1))(h, k, labels)
    for mode in MODES:
        with blocks(mode, 5, 3):
            mapped = jax.shard_map(
                jax.grad(functools.partial(loss, axis_name="v", mode=mode), (0, 1)),
                mesh=mesh_of(4),
                in_specs=(P("v"), P(None, "v"), P("v")),
                out_specs=(P("v"), P(None, "v")),
            )
            for got, want in zip(jax.jit(mapped)(h, k, labels), wanted, strict=True):
                np.testing.assert_allclose(got, want, rtol=2000 * EPS, atol=2000 * EPS * np.abs(want).max())


# --- meshes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [("dense", "sum"), ("dense", "mean"), ("dense", "mean_count"), ("recompute", "mean_count"), ("store", "mean")],
)
def test_batch_axis(rng, loss, reduction):
    """Tokens over one axis, classes over two: loss and gradients of the whole batch, and the same on every device."""
    args = make_arguments(rng, "index")
    args["targets"][:7] = -1  # the devices have different numbers of examples that count
    f, options = dense, {"ignore_index": -1, "reduction": reduction}
    if loss != "dense":
        args |= {"hidden": rng.normal(size=(N, 5)).astype(np.float32), "kernel": args.pop("logits")[:5]}
        f, options["mode"] = fused, loss
    mesh = mesh_of(2, 2, 2, names=("d", "a", "b"))
    split = specs("index", "d", ("a", "b"))
    with blocks(loss, 2, 3):
        run = pull_back(f, mesh, split, axis_name=("a", "b"), batch_axis_name="d", **options)
        outs, grads = run(args, [np.float32(0.7)])
        parts = floats(args)
        wanted, pull = jax.vjp(lambda parts: outputs(f, parts, args, **options), parts)
    np.testing.assert_allclose(outs[0], wanted[0], rtol=100 * EPS)
    for name, want in pull([np.float32(0.7)])[0].items():
        np.testing.assert_allclose(grads[name], want, rtol=2000 * EPS, atol=2000 * EPS * np.abs(want).max())


def test_second_derivatives(rng):
    """A Hessian-vector product through the devices."""
    args = make_arguments(rng, "index")
    z, labels, v = args["logits"], args["targets"], rng.normal(size=(N, V)).astype(np.float32)

    def product(z, labels, v, **options):
        def gradient(z):
            return jax.grad(lambda z: softmax_cross_entropy(z, labels, z_loss=0.1, reduction="sum", **options))(z)

        return jax.jvp(gradient, (z,), (v,))[1]

    split = P(None, "v")
    mapped = jax.shard_map(
        functools.partial(product, axis_name="v"), mesh=mesh_of(8), in_specs=(split, P(), split), out_specs=split
    )
    np.testing.assert_allclose(jax.jit(mapped)(z, labels, v), product(z, labels, v), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_vmap_scan_and_checkpoint(rng, mode):
    """A loop over parts of the batch, each recomputed for its gradient, of losses lifted over single tokens."""
    args = linear_arguments(rng, "index", batch=(6,), v=32)
    h, k, labels = (np.asarray(args[name]) for name in ("hidden", "kernel", "targets"))

    def total(h, k, labels, **options):
        @jax.checkpoint
        def part(h, labels):
            loss = functools.partial(linear_cross_entropy, reduction="sum", mode=mode, **options)
            return jnp.sum(jax.vmap(lambda h, label: loss(h[None], k, label[None]))(h, labels))

        parts = h.reshape(3, 2, -1), labels.reshape(3, 2)
        return lax.scan(lambda sum, x: (sum + part(*x), None), jnp.zeros(()), parts)[0]

    mapped = jax.shard_map(
        jax.grad(functools.partial(total, axis_name="v"), (0, 1)),
        mesh=mesh_of(4),
        in_specs=(P(), P(None, "v"), P()),
        out_specs=(P(), P(None, "v")),
    )
    for got, want in zip(jax.jit(mapped)(h, k, labels), jax.grad(total, (0, 1))(h, k, labels), strict=True):
        np.testing.assert_allclose(got, want, rtol=2000 * EPS, atol=2000 * EPS * np.abs(want).max())


def test_forward_mode(rng):
    args = make_arguments(rng, "probs")
    z, t, v = args["logits"], args["targets"], rng.normal(size=(N, V)).astype(np.float32)

    def slope(z, t, v, **options):
        f = functools.partial(softmax_cross_entropy, targets=t, implementation="autodiff", **options)
        return jax.jvp(f, (z,), (v,))[1]

    split = P(None, "v")
    mapped = jax.shard_map(
        functools.partial(slope, axis_name="v"), mesh=mesh_of(4), in_specs=(split,) * 3, out_specs=P()
    )
    np.testing.assert_allclose(jax.jit(mapped)(z, t, v), slope(z, t, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["dense", *MODES])
def test_what_moves_between_devices(rng, kind, loss):
    """All-reduces of a few numbers per row, and of the gradient of the hidden states: nothing that grows with V."""
    n, d, v = 24, 6, 4096
    args: dict[str, Any] = {
        "targets": {
            "index": np.zeros(n, np.int32),
            "probs": np.full((n, v), 1 / v, np.float32),
            "sparse": SparseTargets(np.zeros((n, 2), np.int32), np.full((n, 2), 0.5, np.float32)),
        }[kind]
    }
    args |= {"class_weights": np.ones(v, np.float32), "label_smoothing": np.float32(0.1)}
    if loss == "dense":
        args["logits"] = rng.normal(size=(n, v)).astype(np.float32)
    else:
        args |= {"hidden": np.ones((n, d), np.float32), "kernel": np.ones((d, v), np.float32)}
    options = {"axis_name": "v", "reduction": "mean"} | ({} if loss == "dense" else {"mode": loss})
    run = pull_back(dense if loss == "dense" else fused, mesh_of(8), specs(kind), **options)
    text = run.lower(args, [np.float32(1)]).compile().as_text()
    assert not re.search(r"(all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(", text)
    sizes = collective_sizes(text)
    assert sizes
    assert max(sizes) <= n * (2 if loss == "dense" else d)


# --- Explicit meshes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "reduction", "kind"), pairwise(MODES, ["none", "mean"], KINDS, allowed=store_needs_one_number)
)
def test_explicit_sharding_of_the_linear_loss(rng, mode, reduction, kind):
    """No shard_map to write: the types say that tokens and classes are split."""
    args = linear_arguments(rng, kind, batch=(4, 3), v=32)
    where = rng.random(32) < 0.7
    labels = args["targets"].indices if kind == "sparse" else args["targets"]
    where[labels.ravel() if kind != "probs" else 0] = True
    if kind == "probs":
        args["targets"] = args["targets"] * where
    args["weights"] = args["weights"][:, :1]
    options = {"reduction": reduction, "return_aux": True, "where": where}

    def run(args, f, **more):
        def total(parts):
            loss, aux = f(joined(parts, args), **options, **more)
            return sum(map(jnp.sum, (loss, aux.nll, aux.log_normalizer, aux.entropy))), (loss, aux.nll)

        return jax.value_and_grad(total, has_aux=True)(floats(args))

    wanted = jax.jit(functools.partial(run, f=dense_linear))(args)
    with blocks(mode, 3, 4):
        mesh = mesh_of(2, 4, names=("d", "v"), kind=AxisType.Explicit)
        with jax.set_mesh(mesh):
            placed = dict(args)
            for name, spec in {"hidden": P("d"), "kernel": P(None, "v"), "bias": P("v")}.items():
                placed[name] = jax.device_put(args[name], NamedSharding(mesh, spec))
            compiled = jax.jit(functools.partial(run, f=fused, mode=mode)).lower(placed).compile()
            got = compiled(placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS * np.abs(b).max())
    assert jax.typeof(got[1]["kernel"]).sharding.spec == P(None, "v")
    assert jax.typeof(got[1]["hidden"]).sharding.spec[0] == "d"
    (_, (loss, nll)), _ = got
    assert jax.typeof(nll).sharding.spec[0] == "d"
    assert (jax.typeof(loss).sharding.spec or (None,))[0] == ("d" if reduction == "none" else None)
    assert "all-gather" not in compiled.as_text()


def test_explicit_sharding_that_would_need_a_gather(rng):
    args = linear_arguments(rng, "index", batch=(8,), v=32)
    h, k = np.ones((8, 8), np.float32), np.ones((8, 32), np.float32)
    mesh = mesh_of(2, 4, names=("d", "v"), kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        h, k = (jax.device_put(x, NamedSharding(mesh, P("d"))) for x in (h, k))
        with pytest.raises(ValueError, match=r"kernel: expected features that are not split .*sharding.reshard"):
            linear_cross_entropy(h, k, args["targets"])
        with pytest.raises(
            ValueError, match=r"kernel: expected classes that are not split over the axes of the tokens"
        ):
            linear_cross_entropy(h, jax.sharding.reshard(k, P(None, "d")), args["targets"])


# --- messages -------------------------------------------------------------------------------------------------------


def inside(f, *arrays, check_vma: bool = True):
    """`f` inside a shard_map over "v" that splits nothing."""
    return jax.shard_map(f, mesh=mesh_of(2), in_specs=P(), out_specs=P(), check_vma=check_vma)(*arrays)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"axis_name": "w"},
            ValueError,
            r"axis_name: expected axes of the mesh of a surrounding jax.shard_map; got 'w'",
        ),
        ({"axis_name": 3}, TypeError, r"axis_name: expected None, the name of a mesh axis or a tuple of names; got 3"),
        ({"axis_name": ("v", "v")}, ValueError, r"axis_name: expected axes that differ; got \('v', 'v'\)"),
        ({"axis_name": "v"}, ValueError, r"logits: expected this device's share of the classes; got the same array"),
        (
            {"batch_axis_name": "v", "reduction": "sum"},
            ValueError,
            r"logits: expected this device's share of the examples; got the same array on all devices along 'v'",
        ),
        ({"batch_axis_name": "v"}, ValueError, r"batch_axis_name: expected None for reduction='none'; got 'v'"),
        (
            {"axis_name": "v", "batch_axis_name": "v", "reduction": "sum"},
            ValueError,
            r"batch_axis_name: expected axes that do not split the classes as well, \('v',\); got 'v'",
        ),
    ],
)
def test_messages(options, kind, message):
    z, labels = jnp.zeros((4, 6)), jnp.zeros(4, jnp.int32)
    with pytest.raises(kind, match=message):
        inside(lambda z, y: softmax_cross_entropy(z, y, **options), z, labels)


def test_types_of_the_surrounding_shard_map():
    """Without them a derivative would silently be off by the number of devices."""
    z, labels = jnp.zeros((4, 6)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"axis_name: expected a jax.shard_map with check_vma=True"):
        inside(lambda z, y: softmax_cross_entropy(z, y, axis_name="v"), z, labels, check_vma=False)
    with pytest.raises(ValueError, match=r"axis_name: expected axes of the mesh of a surrounding jax.shard_map"):
        softmax_cross_entropy(z, labels, axis_name="v")
    assert jaxce.softmax_cross_entropy(z, labels, axis_name=()).shape == (4,)
