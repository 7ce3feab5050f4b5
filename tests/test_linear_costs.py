"""The model of costs on a GPU: held against compiled programs, and what the plan makes of it."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import jaxce
from jaxce.linear import chips, costs, problem_of
from jaxce.linear import plan as plans

COMPILED = json.loads(
    (pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "h100-compiled.json").read_text()
)
OURS = [row for row in COMPILED["rows"] if row["library"] == "jaxce"]


def shapes(n, d, v, dtype=jnp.bfloat16):
    struct = jax.ShapeDtypeStruct
    return {"hidden": struct((n, d), dtype), "kernel": struct((d, v), dtype), "targets": struct((n,), jnp.int32)}


LARGE = shapes(COMPILED["n"], COMPILED["d"], COMPILED["v"])


@pytest.mark.parametrize("row", OURS, ids=lambda row: f"{row['mode']} {row['block_n']} x {row['block_v']}")
def test_kernels_are_those_of_a_compiled_program(row):
    problem = problem_of(**LARGE, reduction="mean")
    method, blocks = plans.ON_GPU[row["mode"]], (row["block_n"], row["block_v"])
    cost = method.gpu_cost(problem, *blocks, chips.gpu("NVIDIA H100"))
    assert cost.launches == row["launches"]
    assert cost.bytes == pytest.approx(row["bytes"], rel=0.04)
    assert row["temp_bytes"] <= method.temp_bytes(problem, "gpu", *blocks)


def test_operations_are_those_of_the_matmuls():
    N, D, V = 1000, 96, 30000
    problem = problem_of(**shapes(N, D, V), reduction="mean")
    for mode, block_n, block_v, matmuls in ("recompute", N, 7000, 4), ("store", 250, V, 3):
        cost = plans.ON_GPU[mode].gpu_cost(problem, block_n, block_v, chips.gpu("NVIDIA L4"))
        assert cost.flops == pytest.approx(matmuls * 2 * N * D * V)


def test_products_of_wider_numbers_take_longer():
    """At the rates of the card: half of bfloat16's for float32, by TF32, and its own for float64."""
    card = chips.gpu("NVIDIA H100")
    with jax.enable_x64(True):
        dtypes = jnp.bfloat16, jnp.float32, jnp.float64
        problems = [problem_of(**shapes(8192, 4096, 32768, dtype)) for dtype in dtypes]
    narrow, single, double = (plans.ON_GPU["recompute"].gpu_cost(p, 8192, 32768, card).seconds for p in problems)
    assert single / narrow == pytest.approx(card.narrow / card.single, rel=0.3)
    assert double / single == pytest.approx(card.single / card.double, rel=0.3)


@pytest.mark.parametrize(("n", "fits"), [(32, True), (100_000, False)])
def test_logits_in_the_cache_take_no_time_to_move(n, fits):
    """A block of 1 MB fits in any second-level cache, one of 3.2 GB in none."""
    card, problem = chips.gpu("NVIDIA H100"), problem_of(**shapes(n, 64, 8000), reduction="mean")
    moving, idle = (
        costs.on_gpu(problem, 0, [costs.Kernel(0, logits)], 2, n, 8000, card).seconds for logits in (1e9, 0)
    )
    if fits:
        assert moving == idle
    else:  # at the card's rate at best, if the launch of the kernel is hidden behind it
        assert moving - idle > 1e9 / 3.35e12 - 4e-6


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("NVIDIA H200", (4.8e12, 50e6, 1979e12 / 2, 989e12 / 2, 67e12)),
        ("NVIDIA H100 80GB HBM3", (3.35e12, 50e6, 1979e12 / 2, 989e12 / 2, 67e12)),
        ("NVIDIA A100-SXM4-80GB", (2.039e12, 40e6, 312e12, 156e12, 19.5e12)),
        ("NVIDIA GeForce RTX 4090", (1.008e12, 72e6, 165.2e12, 82.6e12, 1.29e12)),
        ("NVIDIA L4", (0.3e12, 48e6, 242e12 / 2, 120e12 / 2, 0.49e12)),
    ],
)
def test_cards_are_as_their_data_sheets_say(kind, figures):
    """Bytes a second, bytes of the second-level cache, and dense operations of bfloat16, TF32 and float64."""
    assert tuple(chips.gpu(kind)[1:]) == pytest.approx(figures, rel=0.03)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "A100"),
        ("", "A100"),
    ],
)
def test_a_card_is_known_by_its_name(kind, name):
    assert chips.gpu(kind).name == name


def test_a_chip_is_known_by_its_kind():
    assert len(chips._TPUS) > 4
    assert all(chips.tpu(chip.kind) is chip for chip in chips._TPUS)
    assert chips.tpu("another").vmem == 64 << 20


def test_the_default_takes_no_more_than_half_of_materialised_logits():
    """Of logits and their gradient, in bfloat16."""
    plan = jaxce.plan_linear_cross_entropy(*LARGE.values(), reduction="mean", platform="gpu")
    assert plan.temp_bytes <= COMPILED["n"] * COMPILED["v"] * 2
    assert plan.predicted_seconds == min(
        p.predicted_seconds
        for mode in plans.MODES
        for p in plans._plans(problem_of(**LARGE, reduction="mean"), mode, "gpu", "")
        if p.temp_bytes <= COMPILED["n"] * COMPILED["v"] * 2
    )
    assert "by a model of A100, not timed" in str(plan)


def test_a_budget_is_kept_and_costs_time():
    known = {}
    for budget in 300_000_000, 2**31, 2**33:
        plan = jaxce.plan_linear_cross_entropy(*LARGE.values(), reduction="mean", platform="gpu", memory_budget=budget)
        assert plan.temp_bytes <= budget
        known[budget] = plan.predicted_seconds
    assert known[300_000_000] > known[2**31] >= known[2**33]


def test_a_small_problem_is_not_cut_to_pieces():
    plan = jaxce.plan_linear_cross_entropy(*shapes(128, 512, 50304).values(), reduction="mean", platform="gpu")
    assert plan.block_v == 50304


def test_losses_of_each_token_recompute():
    plan = jaxce.plan_linear_cross_entropy(*LARGE.values(), platform="gpu")
    assert plan.mode == "recompute"
