"""Logits split over devices: the loss of one device, without a logits-sized array ever moving between them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from benchmarks import hlo
from jaxce import CrossEntropyAux, SparseTargets, softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
from tests.pairwise import pairwise

EPS = float(np.finfo(np.float32).eps)
RTOL = 32 * EPS  # two computations, each within 16 ε of the truth
N, V = 16, 240
LAYOUTS = {"batch": P("b", None), "classes": P(None, "v"), "both": P("b", "v")}
KINDS = ["index", "sparse 2", "sparse 12", "probs"]


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("b", "v"), axis_types=(kind, kind))


@pytest.fixture
def logits(rng):
    return (3 * rng.normal(size=(N, V))).astype(np.float32)


@pytest.fixture
def mask(rng):
    mask = rng.random((N, V)) < 0.7
    mask[:, :12] = True  # where the labels are
    return mask


def make_targets(kind, rng):
    """Labels below 12, which `mask` lets take part."""
    if kind == "index":
        return rng.integers(0, 12, N).astype(np.int32)
    if kind == "probs":
        t = np.zeros((N, V), np.float32)
        t[:, :12] = rng.dirichlet(np.ones(12), N)
        return t
    k = int(kind.split()[1])
    indices = rng.integers(0, 12, (N, k)).astype(np.int32)
    return SparseTargets(indices, rng.dirichlet(np.ones(k), N).astype(np.float32))


def make_options(rng, mask):
    class_weights = rng.uniform(0.5, 2, V).astype(np.float32)
    weights = rng.uniform(0.5, 2, N).astype(np.float32)
    weights[3] = 0
    return {
        "plain": {},
        "smoothing": {"label_smoothing": 0.1},
        "class weights": {"class_weights": class_weights, "reduction": "mean"},
        "class weights and smoothing": {"class_weights": class_weights, "label_smoothing": 0.1},
        "where": {"where": mask, "label_smoothing": 0.1},
        "weights": {"weights": weights, "reduction": "mean_count"},
        "z loss and softcap": {"z_loss": 0.1, "logit_softcap": 4.0, "reduction": "sum"},
        "ignored": {"ignore_index": 3, "reduction": "mean"},
        "aux": {"return_aux": True, "label_smoothing": 0.1, "class_weights": class_weights, "reduction": "mean"},
    }


OPTIONS = list(make_options(np.random.default_rng(0), np.ones((N, V), bool)))


def place(mesh, spec, logits, targets, options):
    """Everything on the mesh: what has the batch axis is split as the logits' batch is, and so are the classes."""
    batch, classes = P(spec[0]), P(spec[1])
    specs = {"where": spec, "weights": batch, "class_weights": classes}

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    dense = isinstance(targets, np.ndarray) and targets.ndim == 2
    return (
        put(logits, spec),
        jax.tree.map(lambda x: put(x, spec if dense else P(spec[0], *[None] * (x.ndim - 1))), targets),
        {name: put(x, specs[name]) if name in specs else x for name, x in options.items()},
    )


def loss_and_gradient(logits, targets, options):
    """The outputs, and the gradient of the sum of all that are floats."""

    def total(z):
        outputs = softmax_cross_entropy(z, targets, **options)
        floats = [x for x in jax.tree.leaves(outputs) if x.dtype == jnp.float32]
        return sum(jnp.sum(x) for x in floats), outputs

    grad, outputs = jax.grad(total, has_aux=True)(logits)
    return outputs, grad


def compiled_with_arrays(logits, targets, options):
    """`loss_and_gradient` compiled, with the arrays among the options as arguments."""
    arrays = {name: x for name, x in options.items() if isinstance(x, (np.ndarray, jax.Array))}
    constants = {name: x for name, x in options.items() if name not in arrays}
    function = jax.jit(lambda z, t, arrays: loss_and_gradient(z, t, arrays | constants))
    return function.lower(logits, targets, arrays).compile(), (logits, targets, arrays)


def collective_sizes(text: str) -> list[int]:
    """How many elements the largest array of each collective has."""
    return [max(map(hlo.elements, collective["shapes"])) for collective in hlo.collectives(text)]


def check(got, wanted):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        # Devices sum in another order: of a gradient or a sum, the terms are up to the largest entry.
        np.testing.assert_allclose(x, y, rtol=RTOL, atol=RTOL * max(1.0, np.abs(y).max(initial=0)))


def check_collectives(text, spec):
    """Only numbers of rows (up to K of each) and of classes may move, nothing as large as one device's logits."""
    sizes = collective_sizes(text)
    assert all(size < N * V // 8 for size in sizes), f"a collective of {max(sizes)} elements"
    if spec[1] is not None:
        assert sizes, "the classes are split, so something must be exchanged: is the pattern out of date?"


@pytest.mark.parametrize(("option", "layout", "kind"), pairwise(["plain", "aux"], LAYOUTS, KINDS))
def test_auto_sharding(kind, layout, option, logits, mask, rng):
    """The compiler decides what moves: nothing of the logits' size may."""
    targets, options = make_targets(kind, rng), make_options(rng, mask)[option]
    mesh, spec = mesh_of(AxisType.Auto), LAYOUTS[layout]
    compiled, arguments = compiled_with_arrays(*place(mesh, spec, logits, targets, options))
    outputs, grad = compiled(*arguments)
    check((outputs, grad), loss_and_gradient(logits, targets, options))
    check_collectives(compiled.as_text(), spec)
    assert grad.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def has_labels_to_ignore(option: str, kind: str, *_: str) -> bool:
    return (option, kind) != ("ignored", "probs")


# The two numbers of sparse targets are looked up differently, and nothing else.
COMBINATIONS = pairwise(OPTIONS, ["index", "sparse 2", "probs"], LAYOUTS, allowed=has_labels_to_ignore)
COMBINATIONS += [("plain", "sparse 12", "classes"), ("aux", "sparse 12", "both")]


@pytest.mark.parametrize(("option", "kind", "layout"), COMBINATIONS)
def test_explicit_sharding(kind, option, layout, logits, mask, rng):
    """Shardings are part of the types: the loss is sharded as the batch, the gradient as the logits."""
    targets, options = make_targets(kind, rng), make_options(rng, mask)[option]
    mesh, spec = mesh_of(AxisType.Explicit), LAYOUTS[layout]
    wanted = loss_and_gradient(logits, targets, options)
    with jax.set_mesh(mesh):
        compiled, arguments = compiled_with_arrays(*place(mesh, spec, logits, targets, options))
        outputs, grad = compiled(*arguments)
        check((outputs, grad), wanted)
        loss = outputs[0] if option == "aux" else outputs
        assert jax.typeof(grad).sharding.spec == spec
        assert jax.typeof(loss).sharding.spec == (P() if "reduction" in options else P(spec[0]))
        if option == "aux":
            assert isinstance(outputs[1], CrossEntropyAux)
            assert {jax.typeof(x).sharding.spec for x in jax.tree.leaves(outputs[1])} == {P(spec[0])}
        check_collectives(compiled.as_text(), spec)


@pytest.mark.parametrize("kind", ["index", "sparse 2", "probs"])
def test_explicit_gradients_of_the_other_arguments(kind, logits, rng):
    """Weights, class weights and target probabilities, each sharded as its argument is."""
    targets = make_targets(kind, rng)
    options = {
        "weights": rng.uniform(0.5, 2, N).astype(np.float32),
        "class_weights": np.linspace(0.5, 2, V, dtype=np.float32),
    }

    def loss(floats):
        t = targets
        if kind == "probs":
            t = floats["probs"]
        elif kind != "index":
            t = SparseTargets(floats["indices"], floats["probs"])
        rest = {name: floats[name] for name in options}
        return softmax_cross_entropy(
            floats["logits"], t if kind != "index" else floats["indices"], label_smoothing=0.1, reduction="mean", **rest
        )

    floats = {"logits": logits} | options
    if kind == "index":
        floats["indices"] = targets
    elif kind == "probs":
        floats["probs"] = targets
    else:
        floats |= {"indices": targets.indices, "probs": targets.probs}
    wanted = jax.grad(loss, allow_int=True)(floats)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        batch = {name: P("b", *[None] * (x.ndim - 1)) for name, x in floats.items()} | {"class_weights": P(None)}
        placed = {name: jax.device_put(x, NamedSharding(mesh, batch[name])) for name, x in floats.items()}
        grads = jax.jit(jax.grad(loss, allow_int=True))(placed)
        for name in set(floats) - {"indices"}:
            check(grads[name], wanted[name])
            assert jax.typeof(grads[name]).sharding.spec == batch[name]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_explicit_sharding_of_the_other_implementation(layout, logits, rng):
    labels = make_targets("index", rng)
    options = {"label_smoothing": 0.1, "implementation": "autodiff"}
    mesh, spec = mesh_of(AxisType.Explicit), LAYOUTS[layout]
    wanted = loss_and_gradient(logits, labels, options)
    with jax.set_mesh(mesh):
        check(loss_and_gradient(*place(mesh, spec, logits, labels, options)), wanted)


@pytest.mark.parametrize("axis", [0, (1, 2)])
def test_explicit_sharding_with_class_axes_elsewhere(axis, rng):
    """The axes move to the end with their shardings; several become one, so that none but the first may be split."""
    logits = rng.normal(size=(8, 4, 6)).astype(np.float32)
    batch = (4, 6) if axis == 0 else (8,)
    labels = rng.integers(0, 8, batch).astype(np.int32)
    mesh = mesh_of(AxisType.Explicit)
    wanted = softmax_cross_entropy(logits, labels, axis)
    spec, batch_spec = (P(None, "b", "v"), P("b", "v")) if axis == 0 else (P("b", None, None), P("b"))
    with jax.set_mesh(mesh):
        z = jax.device_put(logits, NamedSharding(mesh, spec))
        y = jax.device_put(labels, NamedSharding(mesh, batch_spec))
        got = softmax_cross_entropy(z, y, axis)
        check(got, wanted)
        assert jax.typeof(got).sharding.spec == batch_spec


def test_optax_cannot_do_this(logits, rng):
    """Its look-up is a gather, which has to be told how its result is sharded. Why `pick` compares instead."""
    labels = make_targets("index", rng)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        z, y, _ = place(mesh, LAYOUTS["both"], logits, labels, {})
        with pytest.raises(Exception, match=r"(?i)shard"):
            optax.softmax_cross_entropy_with_integer_labels(z, y)
        assert softmax_cross_entropy_with_integer_labels(z, y).shape == (N,)


@pytest.mark.parametrize("kind", KINDS)
def test_shard_map_over_the_batch(kind, logits, mask, rng):
    """Each device has its rows. check_vma makes JAX prove which outputs are the same everywhere."""
    targets, options = make_targets(kind, rng), make_options(rng, mask)["class weights and smoothing"]
    class_weights = options["class_weights"]
    mesh = mesh_of(AxisType.Auto)

    def step(z, t, w):
        def total(z, w):
            return jax.lax.psum(
                softmax_cross_entropy(z, t, class_weights=w, label_smoothing=0.1, reduction="sum"), ("b", "v")
            )

        value, grads = jax.value_and_grad(total, argnums=(0, 1))(z, w)
        return value, grads

    rows = P(("b", "v"))
    sharded = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(rows, rows, P()), out_specs=(P(), (rows, P())), check_vma=True)
    )
    value, grads = sharded(logits, targets, class_weights)
    wanted = jax.value_and_grad(
        lambda z, w: softmax_cross_entropy(z, targets, class_weights=w, label_smoothing=0.1, reduction="sum"),
        argnums=(0, 1),
    )(logits, class_weights)
    check((value, grads), wanted)


@pytest.mark.parametrize("implementation", ["xla", "autodiff"])
def test_shard_map_with_every_output(implementation, logits, mask, rng):
    labels = make_targets("index", rng)
    mesh = mesh_of(AxisType.Auto)
    options = {"return_aux": True, "ignore_index": 3, "z_loss": 0.1, "implementation": implementation}

    def rows(z, y, where):
        return softmax_cross_entropy(z, y, where=where, **options)

    spec = P(("b", "v"))
    got = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True))(logits, labels, mask)
    check(got, rows(logits, labels, mask))


def test_the_collective_pattern_finds_what_it_should():
    """A loss that does gather its logits, so that the tests above are known to look in the right place."""
    mesh = mesh_of(AxisType.Auto)
    split, whole = NamedSharding(mesh, P(None, "v")), NamedSharding(mesh, P())
    z = jax.device_put(np.ones((N, V), np.float32), split)
    text = jax.jit(lambda z: jax.lax.with_sharding_constraint(z, whole) * 2).lower(z).compile().as_text()
    assert max(collective_sizes(text)) == N * V


# --- every placement ------------------------------------------------------------------------------------------------

PLACED = {"hidden": P("b"), "both": P("b", "v"), "replicated": P(), "not": None}
TARGET_PLACES = {"unplaced": None, "replicated": P(), "first axis": P("b"), "other axis": P("v")}


def losses(rng):
    """Public losses of arrays: the first is placed in one way, and the rest in another."""
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 8, 6), (6, 16)))
    y, w = jnp.asarray(rng.integers(0, 16, (4, 8))), jnp.asarray(rng.uniform(1, 2, (4, 8)), jnp.float32)
    soft = jax.nn.softmax(jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.float32))
    z, options = h @ k, {"reduction": "mean", "label_smoothing": 0.1}
    yield "index", lambda z, y, w: jaxce.softmax_cross_entropy(z, y, weights=w, **options), (z, y, w)
    yield "probs", lambda z, t, w: jaxce.softmax_cross_entropy(z, t, weights=w, **options), (z, soft, w)
    yield "from probs", lambda p, y, w: jaxce.cross_entropy_from_probs(p, y, weights=w, **options), (soft, y, w)
    for mode in "recompute", "store":
        linear = functools.partial(jaxce.linear_cross_entropy, mode=mode, **options)
        yield mode, lambda h, k, y, w, f=linear: f(h, k, y, weights=w), (h, k, y, w)


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("place", PLACED)
def test_every_placement_of_every_argument(rng, axis_type, place):
    """Placed alike or not, or not at all: the same loss and gradients, each sharded as its argument."""
    mesh = jax.make_mesh((4, 2), ("b", "v"), axis_types=(axis_type,) * 2)
    others = list(TARGET_PLACES.values()) if axis_type == AxisType.Explicit else [None, P("b")]
    for number, (name, f, arrays) in enumerate(losses(rng)):
        grad = jax.value_and_grad(f, (0, 1) if arrays[1].shape == (6, 16) else 0)
        wanted = grad(*arrays)
        for i, spec in list(enumerate(others))[number % 2 :: 2]:
            specs = [PLACED[place], *[spec] * (len(arrays) - 1)]
            if arrays[1].shape == (6, 16):
                specs[1] = [None, P(), P(None, "v"), None][i] if place != "both" else P()
            with jax.set_mesh(mesh):
                placed = [
                    np.asarray(x) if s is None else jax.device_put(x, NamedSharding(mesh, s))
                    for x, s in zip(arrays, specs, strict=True)
                ]
                found = (grad if i > 1 else jax.jit(grad))(*placed)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=f"{name} {specs}")


def test_what_an_explicit_mesh_cannot_have(rng):
    mesh = jax.make_mesh((4, 2), ("b", "v"), axis_types=(AxisType.Explicit,) * 2)
    h, k, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 6), (6, 16), 8))
    y = jnp.zeros(8, jnp.int32)
    with jax.set_mesh(mesh):
        split = jax.device_put(k, NamedSharding(mesh, P("v")))
        with pytest.raises(ValueError, match=r"^kernel: expected features that are not split .*'v'"):
            jaxce.linear_cross_entropy(h, split, y)
        with pytest.raises(ValueError, match=r"^axis_name: expected None on a mesh with Explicit axes; got 'v'"):
            jaxce.linear_cross_entropy(h, k, y, axis_name="v")


def test_arrays_of_an_explicit_mesh_that_is_not_set(rng):
    """Those that are on it say which devices others are brought to, also where nothing is compiled."""
    mesh = jax.make_mesh((8,), ("b",), axis_types=(AxisType.Explicit,))
    y, w = rng.integers(0, 5, 16), rng.uniform(0.5, 2, 16)
    h, k, z, t = (rng.normal(size=s).astype(np.float32) for s in ((16, 3), (3, 5), (16, 5), (16, 5)))
    teacher = SparseTargets(np.tile([0, 2], (16, 1)), np.tile(np.float32([0.5, 0.3]), (16, 1)))
    losses = {
        "linear": lambda h, z: jaxce.linear_cross_entropy(h, k, y, weights=w, reduction="mean"),
        "log_probs": lambda h, z: jaxce.linear_log_probs(h, k, y),
        "linear distillation": lambda h, z: jaxce.linear_distillation_loss(h, k, np.cos(t[:, :3]), np.cos(k)),
        "dense": lambda h, z: jaxce.softmax_cross_entropy(z, y, weights=w),
        "distillation": lambda h, z: jaxce.distillation_loss(z, t),
        "top-K": lambda h, z: jaxce.distillation_loss(z, teacher, weights=w),
        "linear top-K": lambda h, z: jaxce.linear_distillation_loss(h, k, teacher),
        "infinite weight": lambda h, z: jaxce.softmax_cross_entropy(
            z, y % 4, class_weights=np.float32([1, 1, 1, 1, np.inf])
        ),
        "report": lambda h, z: jaxce.diagnostics.report(z, y, weights=w).loss,
    }
    placed = jax.device_put((h, z), NamedSharding(mesh, P("b")))
    for name, loss in losses.items():
        np.testing.assert_allclose(loss(*placed), loss(h, z), rtol=1e-5, err_msg=name)
        if name != "report":
            total = jax.jit(jax.grad(lambda *x, loss=loss: jnp.sum(loss(*x)), (0, 1)))
            for a, b in zip(total(*placed), total(h, z), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=name)


def test_labels_too_large_for_32_bits_on_an_explicit_mesh():
    h, k, y = np.ones((2, 6), np.float32), np.ones((6, 16), np.float32), np.array([0, 2**32])
    with jax.set_mesh(jax.make_mesh((4, 2), ("b", "v"), axis_types=(AxisType.Explicit,) * 2)):
        assert np.isnan(jaxce.linear_cross_entropy(h, k, y)).tolist() == [False, True]
        assert jaxce.linear_cross_entropy(h, k, y, ignore_index=2**32)[1] == 0


def test_some_axes_of_an_explicit_mesh_left_explicit():
    """JAX cannot compile the derivative of a shard_map inside one over the other axes."""
    mesh = jax.make_mesh((4, 2), ("b", "v"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"in_specs": (P("b"), P(), P("b")), "out_specs": P("b")}
    h, k, y = (
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(
            (jnp.ones((8, 6)), jnp.ones((6, 16)), jnp.zeros(8, jnp.int32)), specs["in_specs"], strict=True
        )
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"^hidden: expected a shard_map over all axes .*'v'"):
        jax.shard_map(jaxce.linear_cross_entropy, axis_names={"b"}, **specs)(h, k, y)


def test_what_is_placed_in_another_way_than_the_logits(rng):
    """Weights that broadcast, a teacher of some classes, an output alone, labels that are looked at, diagnostics."""
    mesh = mesh_of(AxisType.Explicit)
    z, labels = rng.normal(size=(8, 6, 16)).astype(np.float32), rng.integers(0, 16, (8, 6))
    teacher = SparseTargets(np.stack([labels, (labels + 1) % 16], -1), np.full((8, 6, 2), 0.4, np.float32))
    merged = rng.normal(size=(8, 4, 6)).astype(np.float32)
    by_class = rng.uniform(0.5, 2, 24).astype(np.float32)
    weights = rng.uniform(0.5, 2, 6).astype(np.float32)
    merging = {"axis": (1, 2), "class_weights": by_class, "label_smoothing": 0.1}
    cases = {
        "a number": lambda z: softmax_cross_entropy(z, labels, weights=np.float32(2)),
        "by position": lambda z: softmax_cross_entropy(z, labels, weights=weights),
        "of probabilities": lambda z: jaxce.cross_entropy_from_probs(jax.nn.softmax(z), labels, weights=weights),
        "of a divergence": lambda z: jaxce.distillation_loss(z, jnp.cos(z), weights=weights),
        "teacher": lambda z: jaxce.distillation_loss(z, teacher, temperature=2.0, weights=weights),
        "entropy": lambda z: softmax_cross_entropy(z, labels, return_aux=True)[1].entropy,
        "entropy of ids": lambda z: jaxce.log_probs(z, labels, return_aux=True)[1].entropy,
        "checked": lambda z: checkify.checkify(jax.jit(softmax_cross_entropy))(z, labels)[1],
        "Brier": lambda z: jaxce.diagnostics.brier(z, labels),
        "several class axes": lambda z: softmax_cross_entropy(z, labels[:, 0], **merging),
    }
    for name, f in cases.items():
        x, spec = (merged, P("b", "v")) if name == "several class axes" else (z, P("b"))
        step = jax.value_and_grad(lambda x, f=f: jnp.sum(f(x) ** 2))
        wanted = step(jnp.asarray(x))
        with jax.set_mesh(mesh):
            found = step(jax.device_put(x, NamedSharding(mesh, spec)))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


def test_each_device_of_a_shard_map_fits_its_own_temperature(rng):
    z = rng.normal(size=(64, 5)).astype(np.float32) * np.repeat(np.float32([1, 6]), 32)[:, None]
    labels = rng.integers(0, 5, 64)
    labels[::2] = z[::2].argmax(-1)
    fit = jaxce.diagnostics.fit_temperature
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    found = jax.shard_map(lambda z, y: fit(z, y)[None], mesh=mesh, in_specs=P("d"), out_specs=P("d"))(z, labels)
    np.testing.assert_allclose(found, [fit(z[i : i + 32], labels[i : i + 32]) for i in (0, 32)], rtol=1e-5)
