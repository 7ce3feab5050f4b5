"""What blocks of the linear loss cost, whatever the method: bytes of memory, and on a GPU the time, by a model.

What a method adds to that is in its file.

**Memory** is an upper bound on CPU, checked against compiled programs (`tests/test_linear_plan.py`), and elsewhere what
would be needed if nothing stayed on chip.

**Time on a GPU.** XLA makes a handful of kernels of each block, the same ones for every size. Each of them takes as
long as the slowest of what it does: to be launched, to multiply, to read its operands and write its results. What is as
large as a block of logits is read and written in the second-level cache if that has room for it, which takes no time
here. The kernels were counted in programs compiled for an H100 (`benchmarks/results/h100-compiled.json`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxce.arguments import Options
from jaxce.linear.chips import Gpu
from jaxce.stats import matmul_dtype, working_dtype


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
    mask: bool = False  # any mask
    mask_broadcast: bool = False  # a mask per token that has an axis of length 1 for several of them
    narrow_probs: bool = False  # probabilities [N, V] of another than the working dtype, which their gradient has

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
        more = o.logit_softcap is not None or o.temperature or o.label_smoothing or o.return_aux or self.class_weights
        return not (more or self.mask_per_token)

    @property
    def arrays(self) -> int:
        """How many arrays as large as a block of logits are alive at once: logits, gradient, and what options need."""
        dense = self.entries is None
        without_aux = dataclasses.replace(self, options=dataclasses.replace(self.options, return_aux=False))
        tail = 2 * self.options.tail
        if self.entries == 1 and without_aux.plain:
            return 2 + tail
        return tail + (3 if self.plain else 3 + 2 * dense + (dense and self.class_weights))


def in_one(p: Problem, block_n: int, block_v: int) -> bool:
    """Whether a single block holds all the logits."""
    return block_n >= p.N and block_v >= p.V


def block_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    """A block of logits and what is made of it: arrays of its size, and the factors of the matmuls."""
    classes = min(block_v + p.V % block_v, p.V)
    narrow = not p.hidden == p.kernel == p.working
    if platform == "gpu":
        rounded = p.matmul if p.matmul != jnp.float16 else p.working  # see `jaxce.linear.blocks.gradients`
        logits = (p.arrays - 1) * p.working.itemsize + rounded.itemsize
        factors = block_n + 2 * classes * (block_v < p.V or p.kernel != rounded)
        return block_n * classes * logits + p.D * factors * p.working.itemsize
    factors = p.D * (block_n + (2 * classes if narrow or block_v < p.V else 0))
    size = p.arrays * block_n * classes + factors
    if narrow:  # and on CPU widened again for the matmuls
        size += block_n * classes + factors
    return size * p.working.itemsize


def row_bytes(p: Problem, platform: str) -> int:
    """Numbers per token and class, hidden states without or in the order of the unused ones, and wide probabilities."""
    numbers = p.N * (32 + 12 * (p.entries or 0) + 2 * p.D) + 4 * p.V
    if p.narrow_probs and p.class_weights:  # these are wide from the start, and so is their gradient
        numbers += 2 * p.N * p.V
    return numbers * p.working.itemsize + 2**16


def record_bytes(p: Problem) -> int:
    """The records of all rows."""
    terms = 2 + 2 * p.options.label_smoothing + 2 * p.options.return_aux
    return p.N * (terms + (p.entries or 2)) * p.working.itemsize


def cleaned_bytes(p: Problem, of_each: int) -> int:
    """Of each number of the hidden states, where tokens may be unused: of what is not finite there they are cleaned.

    For the gradient it is kept where that was, a byte, and for a second pass what was made of them.
    """
    some = p.weights or p.class_weights or p.mask or p.options.ignore_index is not None
    return some * p.N * p.D * of_each


# --- time on a GPU ----------------------------------------------------------------------------------------------------

_MULTIPLIED, _MOVED = 0.7, 0.85  # how much of a card's rates kernels reach
_CACHED = 0.7  # how much of the cache a block of logits may take to stay in it
_LAUNCH = 3e-6  # seconds that a kernel takes at least


class Cost(NamedTuple):
    """Of loss and gradients: bytes that kernels read and write, operations, launches, and seconds."""

    bytes: float
    flops: float
    launches: int
    seconds: float


class Kernel(NamedTuple):
    """What a kernel does: bytes, those of arrays as large as a block of logits, and operations."""

    bytes: float
    logits: float = 0
    flops: float = 0


def of_block(p: Problem, rows: int, classes: int) -> list[Kernel]:
    """The kernels of a block of logits: the product, its sums in two passes, and the gradient, rounded."""
    s, w = p.matmul.itemsize, p.working.itemsize
    logits = rows * classes
    probs = logits * w if p.entries is None else 0
    return [
        product(p, (rows + classes) * p.D * s, rows, classes, w),
        Kernel(0, logits * w + probs),  # the maximum, and the logits of the labels
        Kernel(0, logits * w + probs),  # the sum of exponentials
        Kernel(0, logits * (w + s) + 2 * probs),
    ]


def product(p: Problem, moved: float, rows: int, classes: int, itemsize: int) -> Kernel:
    """One that multiplies, and moves so many bytes beside logits or their gradient."""
    return Kernel(moved, rows * classes * itemsize, 2.0 * rows * p.D * classes)


def cleared_and_rounded(p: Problem, numbers: int) -> int:
    """Bytes of sums that are cleared before the loop, and rounded after it."""
    narrow = p.matmul != p.working
    return numbers * (p.working.itemsize * (1 + narrow) + p.matmul.itemsize * narrow)


def more_launches(rows: int, classes: int) -> int:
    """Of a block: XLA splits more kernels, the larger it is."""
    size = rows * classes
    return (size >= 2**23) + (size >= 2**24) + 3 * (classes >= 2**15)


def on_gpu(p: Problem, once: float, kernels: list[Kernel], launches: int, rows: int, classes: int, card: Gpu) -> Cost:
    """What loss and gradients cost on a card: bytes once, and the kernels in each block of so many rows and classes."""
    rounds = p.N / max(rows, 1) * p.V / classes  # what is left at the end is a part of a block, and kernels of its own
    every = [(1.0, Kernel(once)), *((rounds, kernel) for kernel in kernels)]
    rates = {2: card.narrow, 4: card.single, 8: card.double}
    rate, memory = _MULTIPLIED * rates[p.matmul.itemsize], _MOVED * card.memory
    cached = rows * classes * p.working.itemsize <= _CACHED * card.cache

    def seconds(kernel: Kernel) -> float:
        return max(kernel.flops / rate, (kernel.bytes + (0 if cached else kernel.logits)) / memory)

    small = max(launches - sum(rounds for rounds, _ in every), 0.0)
    return Cost(
        sum(rounds * (kernel.bytes + kernel.logits) for rounds, kernel in every),
        sum(rounds * kernel.flops for rounds, kernel in every),
        launches,
        sum(rounds * max(_LAUNCH, seconds(kernel)) for rounds, kernel in every) + small * _LAUNCH,
    )


# --- sizes of blocks --------------------------------------------------------------------------------------------------

LANES = 128  # blocks of classes are multiples of this


def sizes(length: int, target: int, multiple: int) -> list[int]:
    """Block sizes from about `target` down to one: a divisor of `length` if there is one near."""
    found = []
    while target > 1:
        size = length
        if target < length:
            size = max(target // multiple, 1) * multiple if target >= multiple else target
            near = [s for s in range(size, size * 3 // 4, -min(multiple, size)) if length % s == 0]
            size = near[0] if near else size
        found.append(size)
        target = size // 2
    return [*found, 1] if not found or found[-1] > 1 else found
