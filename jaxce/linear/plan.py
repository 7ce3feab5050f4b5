"""Which mode and which block sizes: chosen from shapes, dtypes, the platform and the memory allowed. And why.

A program is traced once for all platforms, so there is a plan for each; the one of the platform that is compiled for is
taken when the program is lowered. Which generation of chip that is, can be known only where the program is traced.

Each method (`jaxce.linear.recompute`, `jaxce.linear.store`) says where it applies, which blocks it is fast in, and
what it costs. **On CPU and TPU** the fastest that stays within the budget is taken, as measured on CPU and as compiled
for TPU. **On GPU**, where nothing was measured, it is the one that a model finds fastest (`jaxce.linear.costs`); the
budget there is by default half of what logits and their gradient would take.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any, Protocol, get_args

from jaxce import checks
from jaxce.linear import chips, costs, pallas_tpu, recompute, store
from jaxce.linear.blocks import Schedule, Schedules
from jaxce.linear.costs import Problem
from jaxce.types import Mode, Platform


class Method(Protocol):
    """What the plan asks a module with a way to compute the loss."""

    MATMULS: int  # of loss and gradients

    def applies(self, p: Problem, platform: str) -> bool: ...

    def rank(self, p: Problem, platform: str, block_n: int, roomy: bool) -> int:
        """Where it stands among blocks of all methods: the lowest is the fastest.

        roomy: whether memory was allowed for it, rather than as little as is fast.
        """

    def blocks(self, p: Problem, platform: str, scale: int) -> list[tuple[int, int]]:
        """Tokens and classes in a block, from `scale` times the fastest size down."""

    def temp_bytes(self, p: Problem, platform: str, block_n: int, block_v: int) -> int: ...

    def kept_bytes(self, p: Problem, block_n: int, block_v: int) -> int: ...


class OnGpu(Method, Protocol):
    """And where a model chooses."""

    def gpu_blocks(self, p: Problem) -> list[tuple[int, int]]:
        """All that it may choose from."""

    def gpu_cost(self, p: Problem, block_n: int, block_v: int, card: chips.Gpu) -> costs.Cost: ...


ON_GPU: dict[str, OnGpu] = {"recompute": recompute, "store": store}
METHODS: dict[str, Method] = {**ON_GPU, "pallas_tpu": pallas_tpu}
MODES = get_args(Mode)
PLATFORMS = get_args(Platform)
_LARGER, _TRIED = 4, 6  # where measuring begins, and how many sizes of blocks it tries, each about half of another
_GPU_BUDGET = 2**28  # bytes that are not worth saving on a GPU


@dataclasses.dataclass(frozen=True)
class Timing:
    """What `jaxce.tune_linear_cross_entropy` saw of one plan.

    Attributes:
      mode, block_n, block_v: as in `LinearPlan`.
      seconds: of a loss and its gradients, the median; None if it was not timed to the end.
      runs: how many there were.
      note: why there are no more of them, if it was not among the fastest.
    """

    mode: str
    block_n: int
    block_v: int
    seconds: float | None
    runs: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """How `jaxce.linear_cross_entropy` will compute a loss and its gradients.

    Attributes:
      shape: tokens, features and classes (N, D, V) that it was made for.
      mode: `"recompute"`, `"store"`, or `"pallas_tpu"` where that implementation was asked for.
      block_n: tokens in a block ("store" and "pallas_tpu"; all of them otherwise).
      block_v: classes in a block ("recompute" and "pallas_tpu"; and "store", where gradients are wanted). For TPU v6e
        and TPU7x, one of the passes takes an eighth or a quarter more.
      temp_bytes: bytes of loss and gradient beyond arguments and results: an upper bound on CPU, and elsewhere what
        would be needed if nothing stayed in on-chip memory.
      kept_bytes: bytes that the loss leaves for the backward pass, beside its arguments: in mode "recompute" numbers
        per token, and a copy of the hidden states if tokens may be left out; in mode "store" the gradients, or those of
        them that are asked for. A `lax.scan` over batches whose gradient is taken from outside keeps them for every
        step.
      logits_bytes: what the logits alone would take in the working dtype.
      flops: floating-point operations of the matmuls of loss and gradients, both that of hidden states and that of the
        kernel.
      platform: the platform it was made for.
      device: the GPU whose data sheet a model chose it by; empty on other platforms, where measurements chose.
      predicted_seconds: of loss and gradients, by that model; None on other platforms.
      timings: what was measured of it and of other plans, the fastest first; empty if it was not chosen by measuring.

    Example:
      >>> import jax, jax.numpy as jnp, jaxce
      >>> hidden, kernel = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 1000), jnp.float32)
      >>> plan = jaxce.plan_linear_cross_entropy(hidden, kernel, jax.ShapeDtypeStruct((64,), jnp.int32))
      >>> jaxce.LinearPlan.from_json(plan.to_json()) == plan
      True
    """

    shape: tuple[int, int, int]
    mode: str
    block_n: int
    block_v: int
    temp_bytes: int
    kept_bytes: int
    logits_bytes: int
    flops: int
    platform: str
    device: str = ""
    predicted_seconds: float | None = None
    timings: tuple[Timing, ...] = ()

    def to_json(self) -> str:
        """The plan as text, to keep beside a training run."""
        if not all(isinstance(n, int) for n in self.shape):
            hint = "Make one for arrays of a known size."
            checks.fail(ValueError, "shape", "a plan for a number of tokens", str(self.shape), hint)
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LinearPlan:
        """The plan that `to_json` wrote."""
        try:
            fields = json.loads(text)
            timings = tuple(Timing(**timing) for timing in fields.pop("timings"))
            plan = cls(**fields | {"shape": tuple(fields["shape"]), "timings": timings})
            whole = all(isinstance(n, int) and n >= 0 for n in (*plan.shape, plan.block_n, plan.block_v))
            if plan.mode not in METHODS or not whole or plan.block_v == 0:
                raise ValueError(f"mode {plan.mode!r}, blocks of {plan.block_n} tokens and {plan.block_v} classes")
            return plan
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            hint = f"Make a new one with this version of jaxce ({error!r})."
            checks.fail(ValueError, "text", "what LinearPlan.to_json returned", repr(text)[:40], hint)

    def __str__(self) -> str:
        blocks = f"{self.block_v:,} classes"
        if self.mode != "recompute":
            tokens = f"{self.block_n:,} tokens"
            blocks = tokens if self.mode == "store" else f"{tokens} x {blocks}"
        return (
            f"mode          {self.mode}, on {self.platform}\n"
            f"blocks        {blocks}\n"
            f"extra memory  {_megabytes(self.temp_bytes)} for loss and gradient; the logits would be "
            f"{_megabytes(self.logits_bytes)}\n"
            f"kept          {_megabytes(self.kept_bytes)} from the loss for its gradient\n"
            f"matmuls       {_in_units(self.flops, 1e9, 'GFLOP', 'FLOP')}" + self._measured()
        )

    def _measured(self) -> str:
        if not self.timings:
            chosen = f"\nchosen        by a model of {self.device}, not timed"
            if self.predicted_seconds is not None:
                chosen += f": {self.predicted_seconds * 1e3:,.2f} ms for loss and gradient"
            return chosen if self.device else ""
        lines = ["chosen        by timing loss and gradients", f"  {'mode':<10}    tokens   classes          ms  runs"]
        for t in self.timings:
            milliseconds = "-" if t.seconds is None else f"{t.seconds * 1e3:,.2f}"
            lines.append(
                f"  {t.mode:<10}  {t.block_n:8,}  {t.block_v:8,}  {milliseconds:>10}  {t.runs:4}  {t.note}".rstrip()
            )
        return "".join(f"\n{line}" for line in lines)


def make_schedules(
    problem: Problem,
    vocab_axis: int,
    precision: Any,
    mode: str | None,
    memory_budget: int | None,
    plan: LinearPlan | None,
    asked: str | None = None,
) -> Schedules:
    """What is done on each platform: its plan, or the given one, and what is known of its compiler.

    A budget must do on the one that is asked for, or at hand: others the program may never be compiled for.
    """
    asked = asked or chips.chip()[0]
    cpu, tpu, gpu = (
        _schedule(
            problem,
            plan or make_plan(problem, platform, mode, memory_budget, must_fit=platform == asked),
            Schedule(vocab_axis, precision, widens=platform == "cpu", transposes=platform == "cpu"),
            platform,
        )
        for platform in PLATFORMS
    )
    return cpu, tpu, gpu


def _schedule(problem: Problem, plan: LinearPlan, schedule: Schedule, platform: str) -> Schedule:
    kind = chips.kind_of(platform)
    if plan.mode == "store" and not costs.in_one(problem, plan.block_n, plan.block_v):
        alone = _schedule(problem, _without_gradients(problem, plan, platform, kind), schedule, platform)
        return schedule._replace(
            block_n=plan.block_n, forward_v=plan.block_v, backward_v=plan.block_v, without_gradients=alone
        )
    if plan.mode == "pallas_tpu" and pallas_tpu.applies(problem, platform):
        schedule = schedule._replace(kernels=pallas_tpu.kernels(problem, kind))
    forward, backward = chips.block_eighths(kind, schedule.vocab_axis)
    return schedule._replace(
        forward_v=_scaled(plan.block_v, forward),
        backward_v=_scaled(plan.block_v, backward),
        retiles=chips.retiles(kind),
        row_major=chips.row_major(kind, schedule.vocab_axis),
    )


def _without_gradients(problem: Problem, plan: LinearPlan, platform: str, kind: str) -> LinearPlan:
    """How a loss that would keep its gradients is computed where none are asked for, in no more memory."""
    allowed = METHODS[plan.mode].temp_bytes(problem, platform, plan.block_n, plan.block_v)
    found = sorted(_plans(problem, "recompute", platform, kind), key=_predicted)
    smallest = min(found, key=lambda plan: plan.temp_bytes)
    return next((plan for plan in found if plan.temp_bytes <= allowed), smallest)


def make_plan(
    problem: Problem, platform: str, mode: str | None, memory_budget: int | None, *, must_fit: bool = True
) -> LinearPlan:
    """The fastest plan that stays within the budget; where it need not, the smallest if none does."""
    modes = [mode] if mode else [name for name, method in METHODS.items() if method.applies(problem, platform)]
    candidates = [plan for mode in modes for plan in _plans(problem, mode, platform, chips.kind_of(platform))]
    if not isinstance(problem.N, int) and memory_budget is None:
        return candidates[0]
    smallest = min(candidates, key=lambda plan: plan.temp_bytes)
    if platform == "gpu":
        candidates.sort(key=_predicted)
    else:
        roomy = memory_budget is not None
        candidates.sort(key=lambda plan: METHODS[plan.mode].rank(problem, platform, plan.block_n, roomy))
    budget: float
    if memory_budget is not None:
        budget = memory_budget
    elif platform == "gpu":
        budget = max(problem.N * problem.V * problem.matmul.itemsize, _GPU_BUDGET)
    else:
        return candidates[0]
    if must_fit and memory_budget is not None and budget < smallest.temp_bytes:
        checks.fail(
            ValueError,
            "memory_budget",
            f"at least {smallest.temp_bytes:,} bytes for these shapes (mode {smallest.mode!r}, on {platform})",
            f"{memory_budget:,}",
            "Fewer tokens at a time need less.",
        )
    return next((plan for plan in candidates if plan.temp_bytes <= budget), smallest)


def alternatives(problem: Problem, platform: str, mode: str | None, memory_budget: int | None) -> list[LinearPlan]:
    """Plans worth timing, the likeliest first: the default; then of each mode in turn, from its preferred size on.

    On GPU, those of each mode that the model finds fastest.
    """
    of_modes = []
    for each, method in METHODS.items():
        if each == (mode or each) and method.applies(problem, platform):
            of_mode = list(_plans(problem, each, platform, chips.kind_of(platform), _LARGER))
            if platform == "gpu":
                of_mode.sort(key=_predicted)
            of_mode = [plan for plan in of_mode if memory_budget is None or plan.temp_bytes <= memory_budget][:_TRIED]
            if platform != "gpu":  # from the largest down, so the preferred size is among the first
                preferred = make_plan(problem, platform, each, None)
                at = of_mode.index(preferred) if preferred in of_mode else 0
                of_mode = [plan for _, plan in sorted(enumerate(of_mode), key=lambda x: abs(x[0] - at))]
            of_modes.append(of_mode)
    in_turn = [plan for plans in itertools.zip_longest(*of_modes) for plan in plans if plan is not None]
    return list(dict.fromkeys([make_plan(problem, platform, mode, memory_budget), *in_turn]))


def _predicted(plan: LinearPlan) -> float:
    return plan.predicted_seconds or 0.0


@functools.lru_cache(maxsize=256)  # for calls that are not compiled into anything
def _plans(problem: Problem, mode: str, platform: str, kind: str, scale: int = 1) -> list[LinearPlan]:
    """Plans of one mode from `scale` times the preferred block size down; on GPU, where a model chooses, of all."""
    N, D, V = problem.N, problem.D, problem.V
    method, modelled = METHODS[mode], ON_GPU[mode] if platform == "gpu" and isinstance(N, int) else None
    card = chips.gpu(kind)
    return [
        LinearPlan(
            shape=(N, D, V),
            mode=mode,
            block_n=block_n,
            block_v=block_v,
            temp_bytes=method.temp_bytes(problem, platform, block_n, block_v),
            kept_bytes=method.kept_bytes(problem, block_n, block_v),
            logits_bytes=N * V * problem.working.itemsize,
            flops=method.MATMULS * 2 * N * D * V,
            platform=platform,
            device=card.name if modelled else "",
            predicted_seconds=modelled.gpu_cost(problem, block_n, block_v, card).seconds if modelled else None,
        )
        for block_n, block_v in (modelled.gpu_blocks(problem) if modelled else method.blocks(problem, platform, scale))
    ]


def _scaled(block_v: int, eighths: int) -> int:
    """So many eighths of a block, still whole tiles if it was."""
    return (
        block_v if eighths == 8 else max(block_v * eighths // 8 // costs.LANES * costs.LANES, min(block_v, costs.LANES))
    )


def _megabytes(count: int) -> str:
    return _in_units(count, 1e6, "MB", "bytes")


def _in_units(x: int, unit: float, name: str, single: str) -> str:
    """With one decimal; as it is if it holds a symbol, the size of an axis that is not known yet."""
    return f"{x / unit:,.1f} {name}" if isinstance(x, int) else f"{x} {single}"
