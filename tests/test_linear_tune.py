"""Plans chosen by timing: which one wins, what is left out and why, and what a plan in hand does."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce import LinearPlan, SparseTargets, linear_cross_entropy, plan_linear_cross_entropy, tune_linear_cross_entropy
from jaxce.linear import tune
from tests.test_linear import equations

N, D, V = 600, 16, 5000
SHAPES = (
    jax.ShapeDtypeStruct((N, D), jnp.float32),
    jax.ShapeDtypeStruct((D, V), jnp.float32),
    jax.ShapeDtypeStruct((N,), jnp.int32),
)


class Program:
    """Takes as long as it says, by a clock of its own."""

    now = 0.0

    def __init__(self, seconds: float, fails: str = ""):
        self.seconds, self.fails = seconds, fails

    def __call__(self, *_):
        Program.now += self.seconds
        if self.fails:
            raise jax.errors.JaxRuntimeError(self.fails)

    def memory_analysis(self):
        return self

    temp_size_in_bytes = 1000


@pytest.fixture
def timed_as(monkeypatch):
    """Tunes with programs that take the time which a function of the plan and its number gives; counts the runs."""

    def tuned(seconds_of, **options):
        found = {}

        def compiled(plan, *_):
            found[plan] = seconds_of(len(found), plan)
            return Program(found[plan]) if isinstance(found[plan], float) else found[plan]

        monkeypatch.setattr(tune, "_compiled", compiled)
        monkeypatch.setattr(tune.time, "perf_counter", lambda: Program.now)
        return tune_linear_cross_entropy(*SHAPES, reduction="mean", **options), list(found)

    return tuned


def blocks_of(plan) -> tuple[str, int, int]:
    return plan.mode, plan.block_n, plan.block_v


def test_the_fastest_is_chosen(timed_as):
    plan, found = timed_as(lambda i, _: 0.1 if i == 3 else 0.135 + 0.01 * i)
    assert blocks_of(plan) == blocks_of(found[3]) == blocks_of(plan.timings[0])
    assert plan == dataclasses.replace(found[3], timings=plan.timings)
    assert {blocks_of(t) for t in plan.timings} == set(map(blocks_of, found))
    assert {p.mode for p in found} == {"recompute", "store"}
    assert plan.timings[0].seconds == pytest.approx(0.1)
    assert {t.note for t in plan.timings[1:]} == {"slower"}
    for t in plan.timings[1:]:  # no more of what is slower by so much
        assert t.runs == (1 if t.seconds > 0.15 else 2)
    assert {t.runs for t in plan.timings[1:]} == {1, 2}
    assert plan.timings[0].runs > 40  # until the time is up


def test_the_default_unless_another_is_faster(timed_as):
    default = plan_linear_cross_entropy(*SHAPES, reduction="mean")
    plan, found = timed_as(lambda i, _: 0.102 if i == 0 else 0.1)
    assert blocks_of(plan) == blocks_of(default) == blocks_of(found[0])
    plan, found = timed_as(lambda i, _: 0.11 if i == 0 else 0.1)
    assert blocks_of(plan) == blocks_of(found[1])


def test_what_runs_out_of_memory_is_left_out(timed_as):
    plan, found = timed_as(
        lambda i, _: [Program(0.01, "RESOURCE_EXHAUSTED: 1 TB"), "out of memory", 0.2, 0.3][min(i, 3)]
    )
    assert blocks_of(plan) == blocks_of(found[2])
    notes = {blocks_of(t): (t.note, t.seconds) for t in plan.timings}
    assert notes[blocks_of(found[0])] == notes[blocks_of(found[1])] == ("out of memory", None)
    assert plan.timings[-1].seconds is None
    with pytest.raises(ValueError, match=r"hidden: expected arguments of which one plan can run here; got out of mem"):
        timed_as(lambda i, _: "out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        timed_as(lambda i, _: Program(0.01, "INTERNAL: a fault"))


def test_memory_that_runs_out_for_those_that_led(timed_as):
    """What was slower is left."""

    class Once(Program):
        def __call__(self, *_):
            super().__call__()
            self.fails = "RESOURCE_EXHAUSTED: later"

    plan, found = timed_as(lambda i, _: Once(0.1) if i else 0.2)
    assert blocks_of(plan) == blocks_of(found[0])


def test_a_budget(timed_as):
    """Plans that promise to stay below it, and of these, programs that do."""
    budget = 5_000_000
    plan, found = timed_as(lambda i, _: 0.1, memory_budget=budget)
    assert all(p.temp_bytes <= budget for p in found)
    assert len(found) > 1

    def larger(i, plan):
        program = Program(0.1 + i)
        program.temp_size_in_bytes = budget + (i == 0)
        return program

    plan, found = timed_as(larger, memory_budget=budget)
    assert blocks_of(plan) == blocks_of(found[1])
    assert next(t.note for t in plan.timings if blocks_of(t) == blocks_of(found[0])) == "needs more than the budget"


def test_where_a_run_takes_long_only_the_likeliest_are_tried(timed_as):
    """Compiling and first runs end after three times the time for timing; the first two are of both modes."""
    plan, found = timed_as(lambda i, _: 16.0 - i, seconds=10)
    assert [blocks_of(t) for t in plan.timings if t.note != "not tried"] == [*map(blocks_of, reversed(found))]
    assert len(found) == 2
    assert {p.mode for p in found} == {"recompute", "store"}
    assert all((t.seconds, t.runs) == (None, 0) for t in plan.timings[2:])
    plan, found = timed_as(lambda i, _: 100.0, seconds=10)
    assert blocks_of(plan) == blocks_of(plan_linear_cross_entropy(*SHAPES, reduction="mean")) == blocks_of(found[0])
    assert len(found) == 1


@pytest.mark.parametrize(("reduction", "mode"), [("none", None), ("mean", "store")])
def test_it_times_programs(reduction, mode, rng):
    """Real ones, with every kind of argument, given or described."""
    options = {
        "targets": SparseTargets(rng.integers(0, 700, (40, 3)), jax.ShapeDtypeStruct((40, 3), jnp.float32)),
        "where": jax.ShapeDtypeStruct((700,), jnp.bool_),
        "class_weights": np.linspace(1, 2, 700, dtype=np.float32),
        "bias": None,
        "return_aux": True,
        "vocab_axis": 0,
        "label_smoothing": 0.1,
    }
    kernel = jax.ShapeDtypeStruct((700, 8), jnp.bfloat16)
    hidden = jnp.asarray(rng.normal(size=(40, 8)), jnp.bfloat16)
    plan = tune_linear_cross_entropy(hidden, kernel, reduction=reduction, mode=mode, seconds=1, **options)
    assert plan.shape == (40, 8, 700)
    tried = [t for t in plan.timings if t.note != "not tried"]
    assert all(t.runs >= 2 or t.note == "slower" for t in tried)
    assert all(t.seconds > 0 for t in tried)
    assert {t.mode for t in plan.timings} == {mode or "recompute"}
    in_race = [t for t in plan.timings if not t.note]
    chosen = next(t for t in in_race if blocks_of(t) == blocks_of(plan))
    assert chosen.seconds <= 1.03 * min(t.seconds for t in in_race)
    with pytest.raises(TypeError, match="no_such_option"):
        tune_linear_cross_entropy(hidden, kernel, no_such_option=1, **options)


@pytest.mark.slow
def test_a_plan_says_what_is_done(rng):
    """Mode and blocks on every platform, and the loss and gradients of any other plan."""
    arrays = [jnp.asarray(rng.normal(size=s.shape), s.dtype) for s in SHAPES[:2]]
    arrays.append(jnp.asarray(rng.integers(0, V, N), jnp.int32))
    wanted = jax.value_and_grad(
        lambda h, k: linear_cross_entropy(h, k, arrays[2], reduction="mean", implementation="autodiff"), (0, 1)
    )(*arrays[:2])
    one = plan_linear_cross_entropy(*SHAPES, reduction="mean")
    for mode, block_n, block_v in ("recompute", N, 384), ("store", 104, 640):
        plan = dataclasses.replace(one, mode=mode, block_n=block_n, block_v=block_v)
        assert plan_linear_cross_entropy(*SHAPES, reduction="mean", plan=plan) == plan

        def loss(h, k, plan=plan):
            return linear_cross_entropy(h, k, arrays[2], reduction="mean", plan=plan)

        program = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*arrays[:2])
        shapes = {x.aval.shape for eqn in equations(program.jaxpr) if "dot" in eqn.primitive.name for x in eqn.outvars}
        assert (N, 384) in shapes if mode == "recompute" else (104, 640) in shapes
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arrays[:2])
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_a_plan_of_one_device_on_an_explicit_mesh(rng):
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 4), (4, 24)))
    y = jnp.asarray(rng.integers(0, 24, 16), jnp.int32)
    wanted = linear_cross_entropy(h, k, y)
    share = plan_linear_cross_entropy(h[:8], k[:, :6], y[:8])
    mesh = jax.make_mesh((2, 4), ("d", "v"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((h, k, y), (P("d"), P(None, "v"), P("d")), strict=True)
        ]
        np.testing.assert_allclose(linear_cross_entropy(*placed, plan=share), wanted, rtol=1e-5)
        with pytest.raises(ValueError, match=r"plan: expected one for N, D, V = \(8, 4, 6\); got one for \(16, 4, 24"):
            linear_cross_entropy(*placed, plan=plan_linear_cross_entropy(h, k, y, platform="cpu"))
        with pytest.raises(ValueError, match=r"^hidden: expected an array of one device; got one split over a mesh"):
            tune_linear_cross_entropy(*placed)


def test_as_text(timed_as):
    plan, _ = timed_as(lambda i, _: 0.1 + i / 100)
    assert LinearPlan.from_json(plan.to_json()) == plan
    lines = str(plan).splitlines()
    assert lines[5] == "chosen        by timing loss and gradients"
    assert lines[6].split() == ["mode", "tokens", "classes", "ms", "runs"]
    assert lines[7].split()[:4] == [plan.mode, f"{plan.block_n:,}", f"{plan.block_v:,}", "100.00"]
    assert lines[-1].split()[-1] == "slower"
    for text in (None, {"mode": "store"}, b"", "", "[]", "{}", plan.to_json().replace("mode", "made", 1)):
        with pytest.raises(ValueError, match=r"^text: expected what LinearPlan.to_json returned; got"):
            LinearPlan.from_json(text)


def test_it_is_refused_inside_of_jit():
    """Where random numbers are tracers."""
    with pytest.raises(TypeError, match="Tune outside of jit"):
        jax.make_jaxpr(lambda: jnp.int32(tune_linear_cross_entropy(*SHAPES, reduction="mean").block_v))()


@pytest.mark.parametrize(
    "change",
    [{"mode": "later"}, {"block_v": 0}, {"block_n": -1}, {"block_v": "8"}, {"block_v": 4.5}, {"shape": [1, 2, 3.5]}],
)
def test_plans_of_another_version_are_refused(change):
    fields = json.loads(plan_linear_cross_entropy(*SHAPES).to_json()) | change
    with pytest.raises(ValueError, match="Make a new one"):
        LinearPlan.from_json(json.dumps(fields))


def test_messages():
    arrays = jnp.ones((4, 3)), jnp.ones((3, 5)), jnp.zeros(4, jnp.int32)
    plan = plan_linear_cross_entropy(*arrays, reduction="sum")
    stored = dataclasses.replace(plan, mode="store")
    for kind, message, options in [
        (TypeError, r"plan: expected None or a jaxce.LinearPlan; got 'store' \(str\)", {"plan": "store"}),
        (ValueError, r"plan: expected None with a mode or a memory budget; got mode='store'", {"mode": "store"}),
        (ValueError, r"plan: expected None with a mode or a memory budget; got mode=None", {"memory_budget": 10**9}),
        (ValueError, r"plan: expected one for N, D, V = \(4, 3, 5\); got one for \(9, 3, 5\)", {"plan": (9, 3, 5)}),
        (ValueError, r"plan: expected mode 'recompute' for reduction='none'; got 'store'", {"plan": stored}),
        (ValueError, r"implementation: expected 'xla' with a plan; got 'autodiff'", {"implementation": "autodiff"}),
    ]:
        given = {"plan": plan, "reduction": "none" if options.get("plan") is stored else "sum"} | options
        if isinstance(given["plan"], tuple):
            given["plan"] = dataclasses.replace(plan, shape=given["plan"])
        with pytest.raises(kind, match=message):
            linear_cross_entropy(*arrays, **given)
    for kind, message, options in [
        (ValueError, r"seconds: expected a number above 0; got 0", {"seconds": 0}),
        (ValueError, r"axis_name: expected None; got 'v'", {"axis_name": "v"}),
        (ValueError, r"plan: expected None; got LinearPlan", {"plan": plan}),
        (ValueError, r"^mode: ", {"mode": "fast"}),
        (ValueError, r"^memory_budget: expected at least", {"memory_budget": 10}),
    ]:
        with pytest.raises(kind, match=message):
            tune_linear_cross_entropy(*arrays, **options)
    with pytest.raises(TypeError, match=r"hidden: expected arrays or jax.ShapeDtypeStruct; got a tracer"):
        jax.jit(lambda *x: jaxce.tune_linear_cross_entropy(*x) and 0)(*arrays)
