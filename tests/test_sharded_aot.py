"""The linear loss with its vocabulary split over a TPU slice, compiled by the real TPU compiler."""

import jax
import pytest

pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
from benchmarks import hlo, sharded

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
