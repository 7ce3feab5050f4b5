"""Loss and gradient compiled by the real TPU compiler, beside optax's program for the same loss."""

import jax
import pytest

from benchmarks import dense, tpu

pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def programs():
    """(chip, case) -> the figures of jaxce's and optax's program, each compiled once."""
    found = {}

    def get(chip, case):
        if (chip, case) not in found:
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for optax
                found[chip, case] = {
                    name: tpu.compile_for(chip, f, *dense.tpu_inputs()) for name, f in dense.tpu_programs(case)
                }
        return found[chip, case]

    return get


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_no_more_traffic_than_optax(programs, chip, case):
    ours, theirs = programs(chip, case)["jaxce"], programs(chip, case)["optax"]
    assert ours["bytes"] <= 1.02 * theirs["bytes"]
    assert ours["cycles"] <= 1.02 * theirs["cycles"]
    # The logits are read for max, for the sums, and for the gradient, which is written: bf16, so 8 bytes an entry.
    n, v = dense.TPU_SHAPE
    assert ours["bytes"] >= 8 * n * v


@pytest.mark.parametrize("case", ["integer", "smoothed", "class weights", "mixup"])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_temporary_memory_holds_no_logits(programs, chip, case):
    assert programs(chip, case)["jaxce"]["temp_bytes"] < 1e6


@pytest.mark.parametrize("case", dense.CASES)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_logits_are_neither_gathered_nor_scattered(programs, chip, case):
    """Only class weights are looked up, one per example."""
    ops = programs(chip, case)["jaxce"]["gathers_and_scatters"]
    expected = 1 if "weights" in case else 0
    assert len(ops) <= expected
    assert all(op.startswith(f"f32[{dense.TPU_SHAPE[0]}") for op in ops)
    if case == "integer":  # the pattern finds what there is to find
        assert programs(chip, case)["optax"]["gathers_and_scatters"]
