"""The linear loss with its vocabulary split over a TPU slice, compiled by the real TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce

pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
from benchmarks import hlo, sharded, tpu
from tests.pairwise import pairwise
from tests.test_linear import MODES

pytestmark = [pytest.mark.aot, pytest.mark.optimized, pytest.mark.slow]


@pytest.fixture(scope="module")
def figures():
    found = {}

    def get(loss, *cell):
        if (loss, cell) not in found:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for optax
                found[loss, cell] = sharded.tpu_row(*cell, losses=(loss,))["figures"][loss]
        return found[loss, cell]

    return get


def exchanged(figures):
    return sorted((c["kind"], *c["shapes"]) for c in figures["collectives"])


@pytest.mark.parametrize(("slice_", "shape"), sharded.SLICES[::2])
def test_what_goes_between_chips_does_not_grow_with_the_vocabulary(figures, slice_, shape):
    """Numbers of tokens, and the gradient of the hidden states once."""
    small, large = (figures("jaxce", slice_, shape, v) for v in sharded.CLASSES)
    assert exchanged(small) == exchanged(large)
    assert {c["kind"] for c in small["collectives"]} == {"all-reduce"}
    sizes = sorted(hlo.elements(shape) for c in small["collectives"] for shape in c["shapes"])
    assert sizes[-1] == sharded.N * sharded.D
    assert all(size <= sharded.N for size in sizes[:-1])
    assert small["collective_bytes"] <= 4 * sharded.N * (sharded.D + len(sizes))


def test_memory_beside_optax(figures):
    """Its program holds each chip's share of the logits."""
    for v in sharded.CLASSES:
        assert figures("jaxce", *sharded.SLICES[0], v)["temp_bytes"] <= 1e6
    v = sharded.CLASSES[0]
    assert figures("optax", *sharded.SLICES[0], v)["temp_bytes"] >= 2 * sharded.N * v / 16


def test_a_batch_axis_adds_the_gradient_of_the_kernel(figures):
    """As any data parallelism does: its share on this chip, summed over the parts of the batch."""
    slice_, shape = sharded.SLICES[1]
    found = figures("jaxce", slice_, shape, sharded.CLASSES[0])
    sizes = sorted(hlo.elements(shape) for c in found["collectives"] for shape in c["shapes"])
    assert sizes[-2:] == sorted([sharded.N * sharded.D, sharded.D * sharded.CLASSES[0] // shape[1]])
    assert all(size <= sharded.N for size in sizes[:-2])


# --- a kernel that is split as the batch is (FSDP) -------------------------------------------------------------------

FSDP = {"features": P("data"), "classes": P(None, "data")}
FSDP_N, FSDP_D, FSDP_V = 16 * 2048, 256, 16384  # several blocks on each chip


def gathered_for_a_shard_map(hidden, kernel, labels, **options):
    """As in docs/how-to/sharded-training.md."""
    fused = functools.partial(jaxce.linear_cross_entropy, batch_axis_name="data", **options)
    in_specs = P("data"), P(), P("data")
    return jax.shard_map(fused, in_specs=in_specs, out_specs=P())(hidden, kernel, labels)


def gathered_by_type(hidden, kernel, labels, **options):
    return jaxce.linear_cross_entropy(hidden, jax.sharding.reshard(kernel, P()), labels, **options)


def fsdp_program(loss, axis_type, split, mode):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(axis_type,))

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    hidden = struct((FSDP_N, FSDP_D), jnp.bfloat16, P("data"))
    kernel = struct((FSDP_D, FSDP_V), jnp.bfloat16, FSDP[split])
    labels = struct((FSDP_N,), jnp.int32, P("data"))
    loss = functools.partial(loss, reduction="mean", mode=mode)
    out = NamedSharding(mesh, P()), (hidden.sharding, kernel.sharding)
    with jax.set_mesh(mesh), tpu.uncached():
        program = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=out).lower(hidden, kernel, labels).compile()
    return program.as_text()


@pytest.mark.parametrize(
    ("way", "split", "mode"),
    pairwise([(gathered_for_a_shard_map, AxisType.Auto), (gathered_by_type, AxisType.Explicit)], FSDP, MODES),
)
def test_a_kernel_split_as_the_batch_is_gathered_once(way, split, mode):
    """And its gradient is summed once, both outside of the loop over blocks."""
    text = fsdp_program(*way, split, mode)
    assert " while(" in text
    found = [(c["kind"], hlo.elements(shape)) for c in hlo.collectives(text) for shape in c["shapes"]]
    large = sorted((kind, size) for kind, size in found if size > 1)
    assert large == [("all-gather", FSDP_D * FSDP_V), ("all-reduce", FSDP_D * FSDP_V)]
    assert not hlo.collectives(hlo.in_loops(text))


@pytest.mark.parametrize(("split", "mode"), [("features", "recompute"), ("classes", "store")])
def test_the_compiler_by_itself_gathers_in_every_block(split, mode):
    """Why the how-to page says to gather it."""
    text = fsdp_program(jaxce.linear_cross_entropy, AxisType.Auto, split, mode)
    assert "all-gather" in {c["kind"] for c in hlo.collectives(hlo.in_loops(text))}
