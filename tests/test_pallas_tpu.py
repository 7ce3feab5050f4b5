"""The kernels for TPU: their numbers interpreted on CPU, and what they need on chip as the TPU compiler sees it."""

from __future__ import annotations

import functools
import math
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import jaxce
from jaxce.linear import chips, pallas_tpu
from tests.interpreting import STORED, interpreted, races, simulated
from tests.pairwise import pairwise
from tests.test_linear import (
    EPS,
    arguments,
    assert_near_the_oracle,
    dense,
    equations,
    fused,
    outputs_and_gradients,
    random_cotangents,
)

N, V = 300, 700  # which no block divides: two blocks of tokens and five of classes, and what is left
# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "vocab_axis", "stored", "aux"), pairwise(["index", "sparse"], (0, 1), STORED, [False, True])
)
def test_every_gradient_against_the_oracle(rng, kind, vocab_axis, stored, aux):
    """With weights, class weights, smoothing and z-loss, and random cotangents."""
    args = arguments(rng, kind, (N,), v=V)
    cotangents = random_cotangents(rng, "none", (N,))[: 4 if aux else 1]
    options = {"vocab_axis": vocab_axis, "return_aux": aux, "implementation": "pallas_tpu"}
    with interpreted(stored):
        outs, found, grads = outputs_and_gradients(fused, args, cotangents, **options)
    wanted, relative = assert_near_the_oracle(args, cotangents, outs, grads)
    for name in ("weights", "class_weights", "label_smoothing", "z_loss"):
        value, size = getattr(wanted, name)
        bound = relative * (size + np.abs(cotangents[0]).sum() * 8)
        np.testing.assert_array_less(np.abs(np.asarray(grads[name], np.float64) - value), bound)
    if aux:
        logits = args["hidden"] @ args["kernel"] + args["bias"][None]
        np.testing.assert_array_equal(found.prediction, jnp.argmax(logits, -1))


@pytest.mark.every_case
@pytest.mark.parametrize(("kind", "vocab_axis", "stored"), [("index", 1, "in HBM"), ("sparse", 0, "on chip")])
def test_every_option_at_once(rng, kind, vocab_axis, stored):
    """As the dense loss: a soft cap, a mask of classes, ignored tokens, two batch axes and a mean."""
    batch = (2, 75)
    args = arguments(rng, kind, batch, v=V)
    classes = args["targets"] if kind == "index" else args["targets"].indices
    where = rng.random(V) < 0.7
    where[128:256] = False  # a whole block
    where[np.ravel(classes)] = True
    ignored = int(np.ravel(classes)[0])
    options = {"logit_softcap": 4.0, "where": where, "ignore_index": ignored, "reduction": "mean", "return_aux": True}
    cotangents = random_cotangents(rng, "mean", batch)
    with interpreted(stored):
        given = options | {"vocab_axis": vocab_axis, "implementation": "pallas_tpu"}
        actual = outputs_and_gradients(fused, args, cotangents, **given)
    wanted = outputs_and_gradients(dense, args, cotangents, **options)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS * max(1, np.abs(b).max()))
    np.testing.assert_array_equal(actual[1].prediction, wanted[1].prediction)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_confident_row_keeps_its_digits(smoothing):
    """Wherever the label is: in each lane, in the first block, the last and the one that is left at the end."""
    labels = np.r_[:128, 5, 127, 128, 300, 639, 640, 699]
    margins = np.linspace(2, 60, len(labels)).astype(np.float32)
    # hidden @ kernel is the kernel, which has the margin at the label, and −1, 0 or 1 elsewhere.
    others = np.arange(V) % 3 - 1
    logits = np.tile(others, (len(labels), 1)).astype(np.float64)
    logits[np.arange(len(labels)), labels] = margins
    hidden = jnp.asarray(np.eye(len(labels)), jnp.float32)

    def loss(implementation, hidden, kernel):
        return jaxce.linear_cross_entropy(
            hidden, kernel, jnp.asarray(labels), label_smoothing=smoothing, implementation=implementation
        )

    with interpreted():
        value, vjp = jax.vjp(functools.partial(loss, "pallas_tpu"), hidden, jnp.asarray(logits, jnp.float32))
        _, dkernel = vjp(jnp.ones(len(labels)))
    below = logits - logits[np.arange(len(labels)), labels][:, None]
    mass = np.exp(below)
    mass[np.arange(len(labels)), labels] = 0
    nll = np.log1p(mass.sum(-1))
    wanted = (1 - smoothing) * nll + smoothing * (nll - below.mean(-1))
    np.testing.assert_allclose(value, wanted, rtol=16 * EPS)
    if not smoothing:
        others_share = mass.sum(-1) / (1 + mass.sum(-1))
        np.testing.assert_allclose(-dkernel[np.arange(len(labels)), labels], others_share, rtol=32 * EPS)


def test_what_is_not_finite(rng):
    """A row of NaN is NaN and leaves no trace elsewhere if it is ignored; a row without a class that counts is 0."""
    args = arguments(rng, "index", (N,), v=V)
    hidden = args["hidden"].at[3].set(jnp.nan).at[200].set(jnp.nan)
    labels = jnp.asarray(args["targets"]).at[3].set(-1)

    def loss(hidden, kernel, implementation):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, ignore_index=-1, implementation=implementation)

    def total(implementation, hidden, kernel):
        losses = loss(hidden, kernel, implementation)
        return jnp.sum(losses.at[200].set(0)), losses

    program = jax.value_and_grad(functools.partial(total, "pallas_tpu"), (0, 1), has_aux=True)
    with interpreted(interpret=simulated()):
        (_, losses), _ = program(hidden, args["kernel"])
        (_, others), grads = program(hidden.at[200].set(1), args["kernel"])
    assert np.isnan(losses[200])
    assert losses[3] == 0
    assert np.isfinite(np.delete(losses, 200)).all()
    np.testing.assert_array_equal(np.delete(others, 200), np.delete(losses, 200))
    chex.assert_tree_all_finite(grads)
    assert not np.any(grads[0][3])


def test_overflow_is_passed_over_where_nothing_depends_on_it(rng):
    args = arguments(rng, "index", (N,), v=V)
    hidden = args["hidden"].at[7].set(3e38)

    def loss(implementation, hidden, kernel):
        losses = jaxce.linear_cross_entropy(hidden, kernel, args["targets"], implementation=implementation)
        return jnp.sum(jnp.where(jnp.isfinite(losses), losses, 0))

    with interpreted():
        found = jax.grad(functools.partial(loss, "pallas_tpu"), (0, 1))(hidden, args["kernel"])
    wanted = jax.grad(functools.partial(loss, None), (0, 1))(hidden, args["kernel"])
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert not np.any(found[0][7])


def test_class_weights_without_a_bias(rng):
    """Of the sums by class there are as many as arguments that have a gradient by class."""
    args = arguments(rng, "index", (N,), v=V)
    given = args["hidden"], args["kernel"], jnp.asarray(args["class_weights"])

    def loss(implementation, hidden, kernel, class_weights):
        return jaxce.linear_cross_entropy(
            *(hidden, kernel, args["targets"]), class_weights=class_weights, label_smoothing=0.1, reduction="sum",
            implementation=implementation
        )  # fmt: skip

    with interpreted():
        found = jax.grad(functools.partial(loss, "pallas_tpu"), (0, 1, 2))(*given)
    wanted = jax.grad(functools.partial(loss, None), (0, 1, 2))(*given)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2000 * EPS, atol=2000 * EPS * np.abs(b).max())


@pytest.mark.parametrize("dtypes", [(jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_narrow_numbers(rng, dtypes):
    """Products are of the wider dtype; dz and the results are rounded once."""
    args = arguments(rng, "index", (N,), v=V)
    hidden, kernel = args["hidden"].astype(dtypes[0]), args["kernel"].astype(dtypes[1])
    weights = jnp.asarray(rng.uniform(0.2, 2, N), jnp.float32)

    def loss(implementation, hidden, kernel):
        return jaxce.linear_cross_entropy(
            hidden, kernel, args["targets"], weights=weights, reduction="sum", implementation=implementation
        )

    with interpreted(), jax.numpy_dtype_promotion("standard"):
        value, found = jax.value_and_grad(functools.partial(loss, "pallas_tpu"), (0, 1))(hidden, kernel)
    wide = hidden.astype(jnp.float32), kernel.astype(jnp.float32)
    wanted_value, wanted = jax.value_and_grad(functools.partial(loss, None), (0, 1))(*wide)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    h, k = (np.abs(np.asarray(x, np.float64)) for x in wide)
    p = np.asarray(jax.nn.softmax(wide[0] @ wide[1]), np.float64)
    p[np.arange(N), args["targets"]] += 1
    size = p * np.asarray(weights)[:, None]  # no less than dz
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    for x, like, wide_x, moved in zip(found, (hidden, kernel), wanted, (size @ k.T, h.T @ size), strict=True):
        assert x.dtype == like.dtype
        off = (eps if jnp.bfloat16 in (dtypes[1],) else 1e-5) * moved + eps * np.abs(np.asarray(wide_x))
        np.testing.assert_array_less(np.abs(np.asarray(x, np.float64) - np.asarray(wide_x, np.float64)), off + 1e-6)


# --- transforms and devices -------------------------------------------------------------------------------------------


def plain(implementation, args, hidden, kernel, **options):
    return jaxce.linear_cross_entropy(
        hidden, kernel, args["targets"], bias=args["bias"], implementation=implementation, **options
    )


def test_every_product_in_the_kernels_is_of_narrow_factors(rng):
    args = arguments(rng, "index", (N,), v=5 * 128)  # nothing is left for the other way
    arrays = [args[name].astype(jnp.bfloat16) for name in ("hidden", "kernel")]
    with interpreted():
        gradient = jax.grad(functools.partial(plain, "pallas_tpu", args, reduction="sum"), (0, 1))
        found = [e for e in equations(jax.make_jaxpr(gradient)(*arrays).jaxpr) if e.primitive.name == "dot_general"]
    assert len(found) == 4
    assert {x.aval.dtype for e in found for x in e.invars} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("transform", ["vmap", "second derivatives", "scan"])
def test_transforms(rng, transform):
    args = arguments(rng, "index", (N,), v=V)
    h, k = args["hidden"], args["kernel"]

    def result(implementation):
        def loss(h, k):
            return jnp.sum(jnp.sin(plain(implementation, args, h, k)))

        gradient = jax.grad(loss, (0, 1))
        if transform == "vmap":
            return jax.jit(jax.vmap(gradient))(jnp.stack([h, 2 * h]), jnp.stack([k, k]))
        if transform == "scan":
            return jax.lax.scan(lambda total, h: (total + loss(h, k), gradient(h, k)), 0.0, jnp.stack([h, 2 * h]))
        return jax.jit(lambda h, k: jax.jvp(gradient, (h, k), (jnp.cos(h), jnp.sin(k))))(h, k)

    with interpreted():
        found = result("pallas_tpu")
    chex.assert_trees_all_close(found, result(None), rtol=1e-4, atol=2e-4)


def test_the_vocabulary_over_devices(rng):
    """Each device runs the kernels on its classes."""
    args = arguments(rng, "index", (N,), v=2 * 300)
    h, k = args["hidden"], args["kernel"]
    P = jax.P
    mesh = jax.make_mesh((2,), ("v",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def loss(implementation, h, k, bias, axis_name=None):
        given = args | {"bias": bias}
        result, aux = plain(implementation, given, h, k, reduction="mean", axis_name=axis_name, return_aux=True)
        return result, aux

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(None, "v"), P("v")),
        out_specs=((P(), P()), (P(), P(None, "v"), P("v"))),
    )
    def sharded(*arrays):
        of_shard = functools.partial(loss, "pallas_tpu", axis_name="v")
        return jax.value_and_grad(of_shard, (0, 1, 2), has_aux=True)(*arrays)

    arrays = h, k, args["bias"]
    with interpreted(interpret=pltpu.InterpretParams(uninitialized_memory="nan")):
        found = sharded(*arrays)
    wanted = jax.value_and_grad(functools.partial(loss, None), (0, 1, 2), has_aux=True)(*arrays)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.every_case
@pytest.mark.parametrize("stored", STORED)
def test_no_race_and_nothing_unwritten_is_read(rng, stored):
    """On a simulated chip. Fewer tokens than four blocks are filled up to them where sums are in HBM."""
    args = arguments(rng, "index", (N,), v=V)
    arrays = args["hidden"], args["kernel"]

    def program(implementation):
        return jax.jit(jax.value_and_grad(functools.partial(plain, implementation, args, reduction="sum"), (0, 1)))

    with interpreted(stored, interpret=simulated(STORED[stored][1])):
        found = jax.block_until_ready(program("pallas_tpu")(*arrays))
        assert not races()
    chex.assert_trees_all_close(found, program(None)(*arrays), rtol=1e-5, atol=1e-4)


def test_log_probabilities(rng):
    args = arguments(rng, "index", (N,), v=V)
    ids = jnp.asarray(rng.integers(0, V, (N, 3)))

    def total(implementation, h, k):
        chosen = jaxce.linear_log_probs(h, k, ids, implementation=implementation)
        return jnp.sum(jnp.sin(chosen)), chosen

    def program(implementation):
        return jax.value_and_grad(functools.partial(total, implementation), (0, 1), has_aux=True)

    with interpreted():
        found = program("pallas_tpu")(args["hidden"], args["kernel"])
    wanted = program(None)(args["hidden"], args["kernel"])
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.every_case
@pytest.mark.parametrize("x64", [False, True])
def test_export_for_tpu(rng, x64):
    """Kernels are in it, made on a machine without a TPU, and it can be written and read back."""
    with jax.enable_x64(x64):  # there are no 64-bit integers in a kernel
        args = arguments(rng, "sparse", (N,), v=V)
        args["targets"] = jaxce.SparseTargets(args["targets"].indices.astype(np.int64), args["targets"].probs)
        program = jax.jit(jax.value_and_grad(functools.partial(plain, "pallas_tpu", args, reduction="sum"), (0, 1)))
        exported = jax.export.export(program, platforms=["tpu"])(args["hidden"], args["kernel"])
        again = jax.export.deserialize(exported.serialize())
    assert again.mlir_module().count("@tpu_custom_call") == 2


def test_an_explicit_mesh(rng):
    """Classes and tokens split over it, without axis names."""
    args = arguments(rng, "index", (64,), v=600)
    mesh = jax.make_mesh(
        (2, 2), ("b", "v"), axis_types=2 * (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4]
    )

    def program(implementation):
        loss = functools.partial(plain, implementation, args, reduction="mean")
        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    wanted = program(None)(args["hidden"], args["kernel"])
    placed = [
        jax.device_put(args[name], jax.sharding.NamedSharding(mesh, jax.P(*spec)))
        for name, spec in (("hidden", ("b", None)), ("kernel", (None, "v")))
    ]
    with interpreted(interpret=pltpu.InterpretParams(uninitialized_memory="nan")), jax.set_mesh(mesh):
        found = program("pallas_tpu")(*placed)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(wanted), rtol=1e-5, atol=1e-5)


# --- compiled for TPU -------------------------------------------------------------------------------------------------

NEWER = jax.__version_info__ >= (0, 12)
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_softcap": 30.0}
COMPILED = {  # vocab_axis, tokens, features, classes, dtype, options
    "all options": (0, 1000, 512, 5000, jnp.bfloat16, ALL | {"bias": True, "where": True, "class_weights": True}),
    "sparse targets and aux": (1, 1000, 512, 5000, jnp.bfloat16, {"return_aux": True}),
    "float32": (1, 4096, 1024, 8192, jnp.float32, {}),
    "large": (0, 8192, 4096, 8192, jnp.bfloat16, {}),
}
CHIPS = ("v5e", "v6e", "v5p", "tpu7x", "v4")


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("what", COMPILED)
@pytest.mark.parametrize("chip", CHIPS)
def test_they_compile(chip, what):
    """Each JAX that is tested compiles a half of them."""
    pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
    if (CHIPS.index(chip) + [*COMPILED].index(what)) % 2 != NEWER:
        pytest.skip("compiled by the other JAX that is tested")
    if (chip, what) == ("v4", "large"):
        pytest.skip("no block of it has room")
    from benchmarks import tpu

    vocab_axis, n, d, v, dtype, options = COMPILED[what]
    given = {name: x for name, x in options.items() if x is not True or name == "return_aux"}
    by_class = {name: jnp.bool_ if name == "where" else jnp.float32 for name in options.keys() - given.keys()}

    def loss(hidden, kernel, labels, by_class):
        result = jaxce.linear_cross_entropy(
            hidden,
            kernel,
            labels,
            vocab_axis=vocab_axis,
            reduction="mean",
            implementation="pallas_tpu",
            **given,
            **by_class,
        )
        return result[0] + result[1].entropy.mean() if isinstance(result, tuple) else result

    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    if what.startswith("sparse"):
        labels = jaxce.SparseTargets(*(jax.ShapeDtypeStruct((n, 3), dtype) for dtype in (jnp.int32, jnp.float32)))
    shapes = (
        jax.ShapeDtypeStruct((n, d), dtype),
        jax.ShapeDtypeStruct((d, v) if vocab_axis else (v, d), dtype),
        labels,
        {name: jax.ShapeDtypeStruct((v,), dtype) for name, dtype in by_class.items()},
    )
    program = tpu.compile_for(chip, jax.value_and_grad(loss, (0, 1)), *shapes)
    sums = 4 * n * d * (2 if chip in ("v5p", "v4") else 1)
    left = v % 2048 * n * 4 * 6  # of classes that fill no block, the logits and what is made of them
    assert program["temp_bytes"] < sums + left + 4 * (d + 128) * (v % 2048 + n) + 2**21


@pytest.mark.aot
def test_the_kernels_are_in_the_program():
    """One for the loss and one for its gradients, and of the rest of the program no product and no logits."""
    pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
    from benchmarks import linear, tpu

    loss = functools.partial(jaxce.linear_cross_entropy, reduction="mean", implementation="pallas_tpu")
    shapes = linear.tpu_inputs(1, (256, 128, 1024))
    device = tpu._device("v6e")
    arrays = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=jax.sharding.SingleDeviceSharding(device)) for s in shapes
    ]
    with tpu.traced_for("v6e"), tpu.uncached():
        text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert "convolution(" not in text


BUNDLES = """
     0   :  { %s1 = smov 0 }
   0x1 LB: > { %v1 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v0 }
   0x2   : > { %v2 = vmatmul.mubr.bf16.gmra.mrb[0].mxu0 %v0  ;;  %v3 = vmatmul.mubr.bf16.gmra.mrb[0].mxu1 %v0 }
   0x3   : > { %p0 = scmp.ge.s32.totalorder %s1, 6  ;;  %4 = sbr.rel (!%p0) target = $region1 }
   0x4   : > { %v4 = vadd.f32 %v1, %v2 }
   0x5   :  { %5 = vsyncpa }
"""


def test_cycles_are_counted():
    """Two products on a unit take 2 x 8 cycles from the first bundle on; the short part is run in every round."""
    from benchmarks import llo

    chip = llo.CHIPS["v6e"]
    found = llo.parts(BUNDLES)
    assert [(part.depth, len(part.bundles), part.products) for part in found] == [
        (0, 1, 0),
        (1, 3, 3),
        (1, 1, 0),
        (0, 1, 0),
    ]
    assert found[1].cycles(chip) == 1 + 2 * 8
    assert llo.loop_cycles(BUNDLES, chip) == 4 * 17
    assert llo.kernel_cycles(BUNDLES, chip, rounds=10, ends=3) == 10 * (17 + 1)
    waiting = llo.Part(1, ["vmatmul.mxu0"] * 10)  # the last five begin once four are under way
    assert waiting.cycles(chip) == 1 + 10 * 8
    assert waiting.cycles(llo.CHIPS["v5e"]) == 1 + 10 * 16


# --- when they apply --------------------------------------------------------------------------------------------------


def test_other_platforms_compute_it_as_without(rng):
    args = arguments(rng, "index", (N,), v=V)
    arrays = args["hidden"], args["kernel"]
    programs = [
        jax.jit(jax.value_and_grad(functools.partial(plain, implementation, args, reduction="sum"), (0, 1)))
        for implementation in ("pallas_tpu", None)
    ]
    assert "tpu_custom_call" not in programs[0].lower(*arrays).as_text()
    chex.assert_trees_all_equal(*(program(*arrays) for program in programs))


def test_a_mask_that_is_the_same_for_all_classes(rng):
    args = arguments(rng, "index", (N,), v=V)
    given = {name: args[name] for name in ("hidden", "kernel", "targets")}
    for bias in {}, {"bias": args["bias"]}:
        loss = functools.partial(jaxce.linear_cross_entropy, **given, **bias)
        with interpreted():
            found = jax.jit(lambda loss=loss: loss(where=True, implementation="pallas_tpu"))()
        np.testing.assert_allclose(found, jax.jit(loss)(), rtol=1e-5)


def test_a_plan_of_them(rng):
    """Made for a TPU it is taken by programs for other platforms too, and by no loss that does not ask for them."""
    args = arguments(rng, "index", (N,), v=V)
    arrays = args["hidden"], args["kernel"]
    given = *arrays, args["targets"]
    plan = jaxce.plan_linear_cross_entropy(*given, implementation="pallas_tpu", platform="tpu", reduction="mean")
    assert plan.mode == "pallas_tpu"
    again = jaxce.plan_linear_cross_entropy(*given, implementation="pallas_tpu", plan=plan)
    assert again == plan
    loss = functools.partial(plain, "pallas_tpu", args, reduction="mean")
    np.testing.assert_allclose(loss(*arrays, plan=plan), loss(*arrays), rtol=1e-6)
    with pytest.raises(ValueError, match="plan: expected mode 'recompute' or 'store'"):
        jaxce.linear_cross_entropy(*given, plan=plan)


@pytest.mark.parametrize(("n", "v"), [(0, 700), (4, 255)])
def test_problems_too_small_for_a_block(n, v):
    with mock.patch.object(pallas_tpu, "PLATFORMS", ("tpu", "cpu")):
        h, k = jnp.ones((n, 5)), jnp.ones((5, v))
        losses = jaxce.linear_cross_entropy(h, k, jnp.zeros(n, jnp.int32), implementation="pallas_tpu")
    np.testing.assert_allclose(losses, np.full(n, np.log(v)), rtol=1e-6)


REFUSED = {
    "targets": ({"targets": jnp.full((4, 300), 1 / 300)}, "class indices or sparse targets"),
    "entries": ({"targets": jaxce.SparseTargets(jnp.zeros((4, 9), jnp.int32), jnp.ones((4, 9)))}, "at most 8 classes"),
    "where": ({"where": jnp.ones((4, 300), bool)}, "where: expected a mask [V]"),
    "temperature": ({"temperature": 2.0}, "temperature: expected 1"),
    "dtype": ({"hidden": jnp.ones((4, 5), jnp.float16), "kernel": jnp.ones((5, 300), jnp.float16)}, "or float32"),
    "precision": ({"precision": "highest"}, "precision: expected None"),
    "classes": ({"kernel": jax.ShapeDtypeStruct((5, 2**24 + 1), jnp.float32)}, "at most 16,777,216 classes"),
    "mode": ({"mode": "recompute"}, "leave mode and memory_budget out"),
    "features": ({"hidden": jnp.ones((4, 2**18)), "kernel": jnp.ones((2**18, 300))}, "fit in on-chip memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_do_not_take_is_refused(name):
    changed, message = REFUSED[name]
    given = {"hidden": jnp.ones((4, 5)), "kernel": jnp.ones((5, 300)), "targets": jnp.zeros(4, jnp.int32)} | changed
    with pytest.raises(ValueError, match=message.replace("[", r"\[")) as raised:
        jaxce.plan_linear_cross_entropy(**given, implementation="pallas_tpu")
    assert "pallas_tpu" in str(raised.value)


def test_only_the_linear_losses_have_it():
    with pytest.raises(ValueError, match="implementation: expected"):
        jaxce.softmax_cross_entropy(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), implementation="pallas_tpu")
    with pytest.raises(ValueError, match="return_aux: expected False"):
        jaxce.linear_log_probs(
            jnp.ones((2, 3)), jnp.ones((3, 300)), jnp.zeros(2, jnp.int32), return_aux=True, implementation="pallas_tpu"
        )


def test_a_plan_of_few_tokens_counts_four_blocks():
    """With sums in HBM, of each of two cores, that many are filled up; beside what any plan counts of hidden states."""
    n, d, v = 300, 3400, 1024
    with mock.patch.object(chips, "chip", return_value=("tpu", "TPU v4")):
        plan = jaxce.plan_linear_cross_entropy(
            jax.ShapeDtypeStruct((n, d), jnp.bfloat16),
            jax.ShapeDtypeStruct((d, v), jnp.bfloat16),
            jax.ShapeDtypeStruct((n,), jnp.int32),
            implementation="pallas_tpu",
        )
    assert plan.block_n == 128
    assert plan.temp_bytes >= (2 * 4 + 2) * 512 * d + 2 * 4 * n * d


@pytest.mark.parametrize("stored", ["on chip", "in HBM"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "return_aux": True}])
def test_what_the_kernels_take_on_chip(options, stored, monkeypatch):
    """Each block of an operand and of a result twice, what is kept, and some arrays of a block of logits."""
    from jax.experimental import pallas as pl

    taken, call = {}, pl.pallas_call

    def counted(kernel, *, grid, in_specs, out_specs, out_shape, scratch_shapes, name, **options):
        program = call(kernel, grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape, name=name,
                       scratch_shapes=scratch_shapes, **options)  # fmt: skip

        def run(*operands):
            blocks = [*zip(in_specs, operands, strict=True)]
            blocks += zip(jax.tree.leaves(out_specs), jax.tree.leaves(out_shape), strict=True)
            taken[name] = 2 * sum(math.prod(n or 1 for n in spec.block_shape) * x.dtype.itemsize for spec, x in blocks)
            taken[name] += sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch_shapes)
            return program(*operands)

        return run

    monkeypatch.setattr(pl, "pallas_call", counted)
    n, v = 512, 1024
    h, k, y = jnp.ones((n, 1000), jnp.bfloat16), jnp.ones((1000, v), jnp.bfloat16), jnp.zeros(n, jnp.int32)
    options = options | {"implementation": "pallas_tpu", "reduction": "sum"}

    def loss(h, k):
        return jnp.sum(jax.tree.leaves(jaxce.linear_cross_entropy(h, k, y, **options))[0])

    with interpreted(stored):
        jax.eval_shape(jax.grad(loss, (0, 1)), h, k)
        problem = jaxce.linear.problem_of(hidden=h, kernel=k, targets=y, **options)
    resident, cores = STORED[stored]
    planned = {
        "cross_entropy_forward": pallas_tpu.forward_bytes(problem, 128, 128),
        "cross_entropy_backward": pallas_tpu.backward_bytes(problem, 128, 128, resident, cores),
    }
    assert planned.keys() == taken.keys()
    for name, bytes_ in planned.items():
        assert taken[name] <= bytes_ <= 1.5 * taken[name], name


@pytest.mark.parametrize("chip", [chip.kind for chip in chips._TPUS] + ["another"])
@pytest.mark.parametrize(("n", "d", "v"), [(8192, 2048, 131072), (300, 64, 700), (1, 512, 50257), (65536, 1024, 32000)])
def test_blocks_fit_the_chip(chip, n, d, v):
    shapes = {
        "hidden": jax.ShapeDtypeStruct((n, d), jnp.bfloat16),
        "kernel": jax.ShapeDtypeStruct((d, v), jnp.bfloat16),
        "targets": jax.ShapeDtypeStruct((n,), jnp.int32),
    }
    with mock.patch.object(chips, "chip", return_value=("tpu", chip)):
        plan = jaxce.plan_linear_cross_entropy(**shapes, implementation="pallas_tpu")
        problem = jaxce.linear.problem_of(**shapes, implementation="pallas_tpu")
    assert plan.mode == "pallas_tpu"
    found = pallas_tpu.kernels(problem, chip)
    vmem, cores = found.chip.vmem, found.chip.cores
    assert pallas_tpu.forward_bytes(problem, *found.forward) < vmem
    assert pallas_tpu.backward_bytes(problem, *found.backward, found.resident, cores) < vmem
    for block_n, block_v in (found.forward, found.backward):
        assert block_n % 128 == block_v % 128 == 0
        assert block_v * cores <= v
        assert -(-n // block_n) * block_n < n + 128 * -(-n // block_n)  # hardly a token is filled up
    assert f"{plan.block_n:,} tokens x {plan.block_v:,} classes" in str(plan)
    assert jaxce.LinearPlan.from_json(plan.to_json()) == plan
