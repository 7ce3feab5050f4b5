"""Which mode and which block sizes: chosen from shapes, dtypes, the platform and the memory allowed. And why.

A program is traced once for all platforms, so there is a plan for each; the one of the platform that is compiled for is
taken when the program is lowered. Which generation of chip that is, can be known only where the program is traced.

**Mode.** "store" saves one matmul of four, but keeps a block of the logits with the whole vocabulary and sums dkernel
in float32 from block to block. On CPU, where matmuls take most of the time, it is the faster one wherever it applies
(`benchmarks/results/linear-cpu.json`). Compiled for TPU, "recompute" keeps everything it needs in on-chip memory, so it
is the default there, and on GPU, where nothing was measured.

**Blocks.** A block of logits of 2²³ numbers, 32 MiB, fits the on-chip memory of every TPU beside the other operands:
1024 classes for 8192 tokens. Smaller blocks make the compiled programs slower (512: 67 M cycles for 54 M on v6e),
larger ones spill (2048: 68 MB). On CPU products run at full speed while their result stays in the cache: up to 2²²
numbers, and "store" is fastest in parts of 2²¹. Up to 2²⁴ logits it works on all of them at once. If that is all there
are, it is the same as "recompute" in one block, whose second logits a compiler finds to be the first: so it computes
them again in a separate backward pass, and keeps no gradient for it.

**Retiling.** Compiled for TPU7x, operands of matmuls are wanted in tiles of 16 x 128, while arguments and results come
in tiles of 8 x 128. A kernel that a loop slices is copied whole before the loop, once for each pass: 1.2 GB for
131,072 classes. Rows that a gather picks are retiled as they come; columns, once they were widened to 32 bits and
narrowed again. Gradients are rounded after they were retiled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp

from jaxce import checks
from jaxce.compose import Options
from jaxce.linear.blocks import Schedule, Schedules
from jaxce.stats import matmul_dtype, working_dtype

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


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a plan depends on."""

    N: int
    D: int
    V: int
    hidden: jnp.dtype
    kernel: jnp.dtype
    entries: int | None  # K of index targets, None for probabilities [N, V]
    options: Options
    weights: bool
    class_weights: bool
    mask_per_token: bool

    @property
    def matmul(self) -> jnp.dtype:
        return matmul_dtype(self.hidden, self.kernel)

    @property
    def working(self) -> jnp.dtype:
        return working_dtype(self.matmul)

    @property
    def plain(self) -> bool:
        """Without the options that need more arrays as large as a block of logits."""
        o = self.options
        more = o.logit_softcap is not None or o.label_smoothing or o.return_aux or self.class_weights
        return not (more or self.mask_per_token)

    @property
    def arrays(self) -> int:
        """How many arrays as large as a block of logits are alive at once: logits, gradient, and what options need."""
        dense = self.entries is None
        without_aux = dataclasses.replace(self, options=dataclasses.replace(self.options, return_aux=False))
        if self.entries == 1 and without_aux.plain:
            return 2
        return 3 if self.plain else 3 + 2 * dense + (dense and self.class_weights)


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
            return ""
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
    here, kind = chip()
    cpu, tpu, gpu = (
        _schedule(
            problem,
            plan or make_plan(problem, platform, mode, memory_budget),
            Schedule(vocab_axis, precision, widens=platform == "cpu", transposes=platform == "cpu"),
            kind if platform == here else "",
        )
        for platform in PLATFORMS
    )
    return cpu, tpu, gpu


def _schedule(problem: Problem, plan: LinearPlan, schedule: Schedule, kind: str) -> Schedule:
    if plan.mode == "store" and not _in_one(problem, plan.block_n, plan.block_v):
        return schedule._replace(block_n=plan.block_n, forward_v=plan.block_v, backward_v=plan.block_v)
    forward, backward = block_eighths(kind, schedule.vocab_axis)
    return schedule._replace(
        forward_v=_scaled(plan.block_v, forward),
        backward_v=_scaled(plan.block_v, backward),
        retiles=retiles(kind),
        row_major=row_major(kind, schedule.vocab_axis),
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
    candidates = [plan for mode in modes for plan in _plans(problem, mode, platform)]
    if memory_budget is None and not known:
        return candidates[0]
    # "store" in small blocks of tokens spends its time adding up dkernel: then the fourth matmul is cheaper.
    candidates.sort(key=lambda plan: plan.mode == "store" and plan.block_n < min(_FEWEST_TOKENS, problem.N))
    if memory_budget is None:
        return candidates[0]
    smallest = min(candidates, key=lambda plan: plan.temp_bytes)
    if memory_budget < smallest.temp_bytes and platform == chip()[0]:  # others it may never be compiled for
        checks.fail(
            ValueError,
            "memory_budget",
            f"at least {smallest.temp_bytes:,} bytes for these shapes (mode {smallest.mode!r})",
            f"{memory_budget:,}",
            "Fewer tokens at a time need less.",
        )
    return next((plan for plan in candidates if plan.temp_bytes <= memory_budget), smallest)


def alternatives(problem: Problem, platform: str, mode: str | None, memory_budget: int | None) -> list[LinearPlan]:
    """Plans worth timing: the default first; then, of each mode, blocks from four times the preferred size down."""
    found = [make_plan(problem, platform, mode, memory_budget)]
    for each in MODES if mode is None else (mode,):
        if each == "recompute" or problem.options.reduction != "none":
            of_mode = _plans(problem, each, platform, _LARGER)
            found += [plan for plan in of_mode if memory_budget is None or plan.temp_bytes <= memory_budget][:_TRIED]
    return list(dict.fromkeys(found))


@functools.lru_cache(maxsize=256)  # for calls that are not compiled into anything
def _plans(problem: Problem, mode: str, platform: str, scale: int = 1) -> list[LinearPlan]:
    """Plans of one mode from `scale` times the preferred block size down."""
    N, V = problem.N, problem.V
    if mode == "recompute":
        tokens = max(N, 1) if isinstance(N, int) else _TOKENS
        target = min((_CPU_BLOCK if platform == "cpu" else _BLOCK) // tokens, _KERNEL_BLOCK // max(problem.D, 1))
        blocks = [(N, block_v) for block_v in _sizes(V, max(target, 4 * _LANES) * scale, _LANES)]
    else:
        sizes = _sizes(N, max(min(_KEPT // V, _MOST_TOKENS), 1) * scale, 8)
        part = [
            V if problem.plain and n * V <= _KEPT_WHOLE else max(_KEPT_BLOCK // max(n, 1), 4 * _LANES) for n in sizes
        ]
        blocks = [(n, _sizes(V, target, _LANES)[0]) for n, target in zip(sizes, part, strict=True)]
    bytes_of = _recompute_bytes if mode == "recompute" else _store_bytes
    return [
        LinearPlan(
            shape=(N, problem.D, V),
            mode=mode,
            block_n=block_n,
            block_v=block_v,
            temp_bytes=bytes_of(problem, platform, block_n, block_v),
            kept_bytes=_kept_bytes(problem, mode, block_n, block_v),
            logits_bytes=N * V * problem.working.itemsize,
            flops=(4 if mode == "recompute" else 3) * 2 * N * problem.D * V,
            platform=platform,
        )
        for block_n, block_v in blocks
    ]


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


def _in_one(p: Problem, block_n: int, block_v: int) -> bool:
    """Whether a single block holds all the logits."""
    return block_n >= p.N and block_v >= p.V


def _recompute_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    return _block_bytes(p, block_n, block_v) + _row_bytes(p, platform)


def _store_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    if _in_one(p, block_n, block_v):  # which is computed as in the other mode
        return _recompute_bytes(p, platform, block_n, block_v)
    rows = block_n + p.N % max(block_n, 1)  # the block that is left at the end has memory of its own
    sums = 0 if p.kernel == p.working else p.D * p.V * p.working.itemsize
    skips = block_n < p.N and (p.weights or p.options.ignore_index is not None)
    logits = block_n * p.V  # one array for all blocks
    if block_v == p.V and not skips:  # the gradient takes its place
        logits = 0
    same_tokens = int(((p.entries is None) + p.mask_per_token / 4) * rows * p.V)  # of probabilities and masks
    return (logits + same_tokens) * p.working.itemsize + sums + _block_bytes(p, rows, block_v) + _row_bytes(p, platform)


def _block_bytes(p: Problem, block_n: int, block_v: int) -> int:
    """A block of logits and what is made of it: arrays of its size, and the factors of the matmuls."""
    classes = min(block_v + p.V % block_v, p.V)
    narrow = not p.hidden == p.kernel == p.working
    factors = p.D * (block_n + (2 * classes if narrow or block_v < p.V else 0))
    size = p.arrays * block_n * classes + factors
    if narrow:  # and on CPU widened again for the matmuls
        size += block_n * classes + factors
    return size * p.working.itemsize


def _row_bytes(p: Problem, platform: str) -> int:
    """Numbers per token and class, and hidden states without or in the order of the unused ones."""
    numbers = p.N * (32 + 12 * (p.entries or 0) + 2 * p.D) + 4 * p.V
    if p.entries is None and p.hidden != p.working and platform == "cpu":
        numbers += p.N * p.V  # the gradient of narrow probabilities is written in the working dtype first
    return numbers * p.working.itemsize + 2**16


def _kept_bytes(p: Problem, mode: str, block_n: int, block_v: int) -> int:
    if mode == "recompute" or _in_one(p, block_n, block_v):
        terms = 2 + 2 * p.options.label_smoothing + 2 * p.options.return_aux  # of the record of a row
        return p.N * (terms + (p.entries or 2)) * p.working.itemsize
    per_class = p.D + p.class_weights + (p.N if p.entries is None else 0)
    return (p.N * p.D + p.V * per_class) * p.working.itemsize


def chip() -> tuple[str, str]:
    """Platform and kind of the device that this process runs programs on, or says it traces them for."""
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    device = jax.sharding.get_abstract_mesh().abstract_device or default or jax.devices()[0]
    return (device, "") if isinstance(device, str) else (device.platform, device.device_kind)


def retiles(kind: str) -> bool:
    """See "Retiling" above."""
    return kind == "TPU7x"


def row_major(kind: str, vocab_axis: int) -> bool:
    """Whether the gradient of the logits has to be laid out row by row.

    For TPU7x, the compiler of JAX 0.12 transposes every block of [D, V] unless it is, and that of JAX 0.10 if it is.
    """
    return retiles(kind) and vocab_axis == 1 and jax.__version_info__ >= (0, 12)


def block_eighths(kind: str, vocab_axis: int) -> tuple[int, int]:
    """The blocks of the forward and of the backward pass, in eighths of the plan's.

    The backward pass keeps its blocks in the input dtype, so more of them fit on chip. On TPU7x, blocks of [D, V] that
    are not a power of two escape a transposition, and a smaller first block of [V, D] leaves room for the second.
    """
    if kind == "TPU v6 lite":
        return 8, 10
    if kind == "TPU7x":
        return 7, 9 if vocab_axis == 1 else 8
    return 8, 8


def _scaled(block_v: int, eighths: int) -> int:
    """So many eighths of a block, still whole tiles if it was."""
    return block_v if eighths == 8 else max(block_v * eighths // 8 // _LANES * _LANES, min(block_v, _LANES))


def _megabytes(count: int) -> str:
    return f"{_count(count / 1e6)} MB"


def _count(x: Any) -> str:
    """With one decimal; as it is if it holds a symbol, the size of an axis that is not known yet."""
    return f"{x:,.1f}" if isinstance(x, float) else str(x)
