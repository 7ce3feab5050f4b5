"""Loss and gradient compiled by the real TPU compiler, beside optax's program for the same loss."""

import jax
import pytest

from benchmarks import dense, tpu

pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu")
pytestmark = [pytest.mark.aot, pytest.mark.optimized]
CHIP = "v6e" if jax.__version_info__ >= (0, 12) else "v5e"  # one for each JAX that is tested


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "integer" else pytest.mark.slow) for case in dense.CASES]
)
def test_a_program_beside_that_of_optax(case):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for optax
        programs = {name: tpu.compile_for(CHIP, f, *dense.tpu_inputs()) for name, f in dense.tpu_programs(case)}
    ours, theirs = programs["jaxce"], programs["optax"]
    assert ours["bytes"] <= 1.02 * theirs["bytes"]
    assert ours["cycles"] <= 1.02 * theirs["cycles"]
    # The logits are read for max, for the sums, and for the gradient, which is written: bf16, so 8 bytes an entry.
    n, v = dense.TPU_SHAPE
    assert ours["bytes"] >= 8 * n * v
    if case in ("integer", "smoothed", "class weights", "mixup"):  # no logits
        assert ours["temp_bytes"] < 1e6
    # Neither are the logits gathered or scattered: only class weights are looked up, one per example.
    ops = ours["gathers_and_scatters"]
    assert len(ops) <= ("weights" in case)
    assert all(op.startswith(f"f32[{n}") for op in ops)
    if case == "integer":  # the pattern finds what there is to find
        assert theirs["gathers_and_scatters"]
