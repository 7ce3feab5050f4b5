"""The linear loss and both its gradients, compiled by the real TPU compiler beside optax on materialised logits."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxce

pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
from benchmarks import tpu
from tests.test_linear import MODES, blocks

pytestmark = [pytest.mark.aot, pytest.mark.optimized, pytest.mark.slow]
D = 2048


def shapes(n, v, vocab_axis):
    kernel = (D, v) if vocab_axis else (v, D)
    return (
        jax.ShapeDtypeStruct((n, D), jnp.bfloat16),
        jax.ShapeDtypeStruct(kernel, jnp.bfloat16),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )


GENERATION_MATTERS = ("v6e", "tpu7x")  # for others, a program traced on this machine must be as good


def jaxce_program(chip, n, v, vocab_axis):
    def loss(hidden, kernel, labels):
        return jaxce.linear_cross_entropy(hidden, kernel, labels, vocab_axis=vocab_axis, reduction="mean")

    told = chip in GENERATION_MATTERS
    return tpu.compile_for(chip, jax.value_and_grad(loss, (0, 1)), *shapes(n, v, vocab_axis), told=told)


@pytest.fixture(scope="module")
def optax_cycles():
    found = {}

    def get(chip, n, v):
        def loss(hidden, kernel, labels):
            return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean()

        if chip not in found:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                program = tpu.compile_for(chip, jax.value_and_grad(loss, (0, 1)), *shapes(n, v, 1))
            assert program["temp_bytes"] > 2 * n * v  # the logits, at least
            found[chip] = program["cycles"]
        return found[chip]

    return get


# A program takes half a minute: each JAX that is tested compiles one of the two layouts, and all chips between them.
NEWER = jax.__version_info__ >= (0, 12)
PROGRAMS = [("v6e", 0), ("tpu7x", 1), ("v5e", 1)] if NEWER else [("v6e", 1), ("tpu7x", 0), ("v5p", 0)]


@pytest.mark.parametrize(("chip", "vocab_axis"), PROGRAMS)
def test_memory_and_cycles(chip, vocab_axis, optax_cycles):
    """Temporary memory as a part of the gradients' own; v5p and TPU7x have no room on chip for a float32 dhidden."""
    n, v = 8192, 131072
    memory = {"v5e": 0.01, "v6e": 0.01, "v5p": 0.2, "tpu7x": 0.2}[chip]
    ratio = {"v5e": 1.5, "v6e": 1.15, "v5p": 1.5, "tpu7x": 1.3}[chip]
    program = jaxce_program(chip, n, v, vocab_axis)
    assert program["temp_bytes"] <= memory * 2 * D * (n + v)
    assert program["cycles"] <= ratio * optax_cycles(chip, n, v)


@pytest.mark.parametrize(("n", "v"), [(8192, 262144), (65536, 131072)])
@pytest.mark.parametrize("chip", ["v5e"])
def test_memory_does_not_grow_with_tokens_times_classes(chip, n, v):
    """A block of logits and a float32 dhidden is all there is: nothing depends on the size of the vocabulary."""
    program = jaxce_program(chip, n, v, 0)
    block = n * (1024 if n == 8192 else 512)
    assert program["temp_bytes"] <= 4 * n * D + 6 * block + 10e6
    assert program["temp_bytes"] < 2 * n * v / 10


def test_a_vocabulary_that_divides_nothing():
    """What is left at the end is a block of its own, without a mask or a padded copy of the kernel."""
    v = 50257
    program = jaxce_program("v5e", 1024, v, 0)
    assert program["temp_bytes"] <= 0.05 * 2 * D * v


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", [0, 1])
def test_what_is_frozen_takes_no_product(mode, asked):
    """Of hidden states and kernel, only one of which has a gradient."""
    n, d, v, block_n, block_v = 64, 48, 384, 16, 128
    device = topologies.get_topology_desc(platform="tpu", topology_name=tpu.TOPOLOGIES["v5e"]).devices[0]
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
        for shape, dtype in (((n, d), jnp.bfloat16), ((d, v), jnp.bfloat16), ((n,), jnp.int32))
    ]
    loss = functools.partial(jaxce.linear_cross_entropy, reduction="mean")
    with blocks(mode, block_n, block_v), tpu.uncached():
        text = jax.jit(jax.grad(loss, asked)).lower(*arrays).compile().as_text()
    rows = block_n if mode == "store" else n
    wanted = [[(rows, d)], [(d, block_v)]][asked] + [(rows, block_v)] * (1 if mode == "store" else 2)
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* convolution\(", text)
    assert sorted((int(rows), int(columns)) for rows, columns in found) == sorted(wanted)
