"""Which mode and which block sizes: chosen from shapes, dtypes, the platform and the memory allowed. And why.

A program is traced once for all platforms, so there is a plan for each; the one of the platform that is compiled for is
taken when the program is lowered. Which generation of chip that is, can be known only where the program is traced.

**Mode.** "store" saves one matmul of four, but keeps a block of the logits with the whole vocabulary and sums dkernel
in float32 from block to block. On CPU, where matmuls take most of the time, it is the faster one wherever it applies
(`benchmarks/results/linear-cpu.json`). Compiled for TPU, "recompute" keeps everything it needs in on-chip memory, so it
is the default there.

**On GPU**, where nothing was measured, mode and blocks are those that the model of `jaxce.linear.costs` finds fastest
within the budget. By default that is half of what logits and their gradient would take.

**Blocks.** A block of logits of 2²³ numbers, 32 MiB, fits the on-chip memory of every TPU beside the other operands:
1024 classes for 8192 tokens. Smaller blocks make the compiled programs slower (512: 67 M cycles for 54 M on v6e),
larger ones spill (2048: 68 MB). On CPU products run at full speed while their result stays in the cache: up to 2²²
numbers, and "store" is fastest in parts of 2²¹. Up to 2²⁴ logits it works on all of them at once. If that is all there
are, it is the same as "recompute" in one block, whose second logits a compiler finds to be the first: so it computes
them again in a separate backward pass, and keeps no gradient for it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from jaxce import checks
from jaxce.linear import chips, costs
from jaxce.linear.blocks import Schedule, Schedules
from jaxce.linear.costs import Problem

MODES = ("recompute", "store")
PLATFORMS = ("cpu", "tpu", "gpu")

_LANES = 128  # blocks of classes are multiples of this
_BLOCK = 2**23  # logits in a block, "recompute"
_CPU_BLOCK = 2**22
_KERNEL_BLOCK = 2**22  # numbers in a block of the kernel
_TOKENS = 8192  # assumed where their number is a symbol
_KEPT = 2**26  # logits of a block of tokens, "store"; more of them are summed up faster, but take more memory
_MOST_TOKENS, _FEWEST_TOKENS = 1024, 256
_KEPT_BLOCK = 2**21  # the part of them that is worked on at once
_LARGER, _TRIED = 4, 6  # where measuring begins, and how many sizes of blocks it tries, each about half of another
_KEPT_WHOLE = 2**24  # all of them at once up to here: without slices of the kernel, and never written twice
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
      mode: `"recompute"` or `"store"`.
      block_n: tokens in a block ("store"; all of them otherwise).
      block_v: classes in a block ("recompute", and "store" where no gradient is wanted).
      temp_bytes: bytes of loss and gradient beyond arguments and results: an upper bound on CPU, and elsewhere what
        would be needed if nothing stayed in on-chip memory.
      kept_bytes: bytes that the loss leaves for the backward pass, beside its arguments: numbers per token in mode
        "recompute", the gradients in mode "store". A `lax.scan` over batches whose gradient is taken from outside
        keeps them for every step.
      logits_bytes: what the logits alone would take in the working dtype.
      flops: floating-point operations of the matmuls of loss and gradient.
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
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LinearPlan:
        """The plan that `to_json` wrote."""
        try:
            fields = json.loads(text)
            timings = tuple(Timing(**timing) for timing in fields.pop("timings"))
            return cls(**fields | {"shape": tuple(fields["shape"]), "timings": timings})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            hint = f"Make a new one with this version of jaxce ({error!r})."
            checks.fail(ValueError, "text", "what LinearPlan.to_json returned", f"{text[:40]!r}", hint)

    def __str__(self) -> str:
        blocks = f"{self.block_n:,} tokens" if self.mode == "store" else f"{self.block_v:,} classes"
        return (
            f"mode          {self.mode}, on {self.platform}\n"
            f"blocks        {blocks}\n"
            f"extra memory  {_megabytes(self.temp_bytes)} for loss and gradient; the logits would be "
            f"{_megabytes(self.logits_bytes)}\n"
            f"kept          {_megabytes(self.kept_bytes)} from the loss for its gradient\n"
            f"matmuls       {_count(self.flops / 1e9)} GFLOP" + self._measured()
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
) -> Schedules:
    """What is done on each platform: its plan, or the given one, and what is known of its compiler."""
    cpu, tpu, gpu = (
        _schedule(
            problem,
            plan or make_plan(problem, platform, mode, memory_budget),
            Schedule(vocab_axis, precision, widens=platform == "cpu", transposes=platform == "cpu"),
            chips.kind_of(platform),
        )
        for platform in PLATFORMS
    )
    return cpu, tpu, gpu


def _schedule(problem: Problem, plan: LinearPlan, schedule: Schedule, kind: str) -> Schedule:
    if plan.mode == "store" and not costs.in_one(problem, plan.block_n, plan.block_v):
        return schedule._replace(block_n=plan.block_n, forward_v=plan.block_v, backward_v=plan.block_v)
    forward, backward = chips.block_eighths(kind, schedule.vocab_axis)
    return schedule._replace(
        forward_v=_scaled(plan.block_v, forward),
        backward_v=_scaled(plan.block_v, backward),
        retiles=chips.retiles(kind),
        row_major=chips.row_major(kind, schedule.vocab_axis),
    )


def make_plan(problem: Problem, platform: str, mode: str | None, memory_budget: int | None) -> LinearPlan:
    """The fastest plan that stays within the budget."""
    known = isinstance(problem.N, int)
    if mode is not None:
        modes = [mode]
    elif problem.options.reduction == "none" or not known:
        modes = ["recompute"]
    else:
        modes = ["store", "recompute"] if platform == "cpu" else ["recompute", "store"]
    candidates = [plan for mode in modes for plan in _plans(problem, mode, platform, chips.kind_of(platform))]
    if not known and memory_budget is None:
        return candidates[0]
    smallest = min(candidates, key=lambda plan: plan.temp_bytes)
    if platform == "gpu":
        candidates.sort(key=_predicted)
    else:
        # "store" in small blocks of tokens spends its time adding up dkernel: then the fourth matmul is cheaper.
        candidates.sort(key=lambda plan: plan.mode == "store" and plan.block_n < min(_FEWEST_TOKENS, problem.N))
    budget: float
    if memory_budget is not None:
        budget = memory_budget
    elif platform == "gpu":
        budget = max(problem.N * problem.V * problem.matmul.itemsize, _GPU_BUDGET)
    else:
        return candidates[0]
    # Other platforms it may never be compiled for.
    if memory_budget is not None and budget < smallest.temp_bytes and platform == chips.chip()[0]:
        checks.fail(
            ValueError,
            "memory_budget",
            f"at least {smallest.temp_bytes:,} bytes for these shapes (mode {smallest.mode!r})",
            f"{memory_budget:,}",
            "Fewer tokens at a time need less.",
        )
    return next((plan for plan in candidates if plan.temp_bytes <= budget), smallest)


def alternatives(problem: Problem, platform: str, mode: str | None, memory_budget: int | None) -> list[LinearPlan]:
    """Plans worth timing: the default first; then, of each mode, blocks from four times the preferred size down.

    On GPU, those of each mode that the model finds fastest.
    """
    found = [make_plan(problem, platform, mode, memory_budget)]
    for each in MODES if mode is None else (mode,):
        if each == "recompute" or problem.options.reduction != "none":
            of_mode = list(_plans(problem, each, platform, chips.kind_of(platform), _LARGER))
            if platform == "gpu":
                of_mode.sort(key=_predicted)
            found += [plan for plan in of_mode if memory_budget is None or plan.temp_bytes <= memory_budget][:_TRIED]
    return list(dict.fromkeys(found))


def _predicted(plan: LinearPlan) -> float:
    return plan.predicted_seconds or 0.0


@functools.lru_cache(maxsize=256)  # for calls that are not compiled into anything
def _plans(problem: Problem, mode: str, platform: str, kind: str, scale: int = 1) -> list[LinearPlan]:
    """Plans of one mode from `scale` times the preferred block size down; on GPU, where a model chooses, of all."""
    N, D, V = problem.N, problem.D, problem.V
    modelled = platform == "gpu" and isinstance(N, int)
    card = chips.gpu(kind)
    bytes_of = costs.recompute_bytes if mode == "recompute" else costs.store_bytes
    blocks = _every_block(problem, mode) if modelled else _preferred_blocks(problem, mode, platform, scale)
    return [
        LinearPlan(
            shape=(N, D, V),
            mode=mode,
            block_n=block_n,
            block_v=block_v,
            temp_bytes=bytes_of(problem, platform, block_n, block_v),
            kept_bytes=costs.kept_bytes(problem, mode, block_n, block_v),
            logits_bytes=N * V * problem.working.itemsize,
            flops=(4 if mode == "recompute" else 3) * 2 * N * D * V,
            platform=platform,
            device=card.name if modelled else "",
            predicted_seconds=costs.on_gpu(problem, mode, block_n, block_v, card).seconds if modelled else None,
        )
        for block_n, block_v in blocks
    ]


def _preferred_blocks(problem: Problem, mode: str, platform: str, scale: int) -> list[tuple[int, int]]:
    N, V = problem.N, problem.V
    if mode == "recompute":
        tokens = max(N, 1) if isinstance(N, int) else _TOKENS
        target = min((_CPU_BLOCK if platform == "cpu" else _BLOCK) // tokens, _KERNEL_BLOCK // max(problem.D, 1))
        return [(N, block_v) for block_v in _sizes(V, max(target, 4 * _LANES) * scale, _LANES)]
    sizes = _sizes(N, max(min(_KEPT // V, _MOST_TOKENS), 1) * scale, 8)
    part = [V if problem.plain and n * V <= _KEPT_WHOLE else max(_KEPT_BLOCK // max(n, 1), 4 * _LANES) for n in sizes]
    return [(n, _sizes(V, target, _LANES)[0]) for n, target in zip(sizes, part, strict=True)]


def _every_block(problem: Problem, mode: str) -> list[tuple[int, int]]:
    """Not "store" in parts of rows, which reads and writes twice as much."""
    if mode == "store":
        return [(block_n, problem.V) for block_n in _sizes(problem.N, problem.N, 8)]
    return [(problem.N, block_v) for block_v in _sizes(problem.V, problem.V, _LANES)]


def _sizes(length: int, target: int, multiple: int) -> list[int]:
    """Block sizes from about `target` down to one: a divisor of `length` if there is one near."""
    sizes = []
    while target > 1:
        size = length
        if target < length:
            size = max(target // multiple, 1) * multiple if target >= multiple else target
            near = [s for s in range(size, size * 3 // 4, -min(multiple, size)) if length % s == 0]
            size = near[0] if near else size
        sizes.append(size)
        target = size // 2
    return [*sizes, 1] if not sizes or sizes[-1] > 1 else sizes


def _scaled(block_v: int, eighths: int) -> int:
    """So many eighths of a block, still whole tiles if it was."""
    return block_v if eighths == 8 else max(block_v * eighths // 8 // _LANES * _LANES, min(block_v, _LANES))


def _megabytes(count: int) -> str:
    return f"{_count(count / 1e6)} MB"


def _count(x: Any) -> str:
    """With one decimal; as it is if it holds a symbol, the size of an axis that is not known yet."""
    return f"{x:,.1f}" if isinstance(x, float) else str(x)
