"""What a mode of the linear loss and its blocks cost: bytes of memory, and on a GPU the time, by a model.

**Memory** is an upper bound on CPU, checked against compiled programs (`tests/test_linear_plan.py`), and elsewhere what
would be needed if nothing stayed on chip.

**Time on a GPU.** XLA makes a handful of kernels of each block, the same ones for every size. Each of them takes as
long as the slowest of what it does: to be launched, to multiply, to read its operands and write its results. What is as
large as a block of logits is read and written in the second-level cache if that has room for it, which takes no time
here. The kernels were counted in programs compiled for an H100 (`benchmarks/results/h100-compiled.json`).
"""

from __future__ import annotations

import dataclasses
import math
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


def in_one(p: Problem, block_n: int, block_v: int) -> bool:
    """Whether a single block holds all the logits."""
    return block_n >= p.N and block_v >= p.V


def recompute_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    return _block_bytes(p, platform, block_n, block_v) + _row_bytes(p, platform)


def store_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    if in_one(p, block_n, block_v):  # which is computed as in the other mode
        return recompute_bytes(p, platform, block_n, block_v)
    rows = block_n + p.N % max(block_n, 1)  # the block that is left at the end has memory of its own
    sums = 0 if p.kernel == p.working else p.D * p.V * p.working.itemsize
    skips = block_n < p.N and (p.weights or p.options.ignore_index is not None)
    logits = block_n * p.V  # one array for all blocks
    if block_v == p.V and not skips:  # the gradient takes its place
        logits = 0
    same_tokens = int(((p.entries is None) + p.mask_per_token / 4) * rows * p.V)  # of probabilities and masks
    return (
        (logits + same_tokens) * p.working.itemsize
        + sums
        + _block_bytes(p, platform, rows, block_v)
        + _row_bytes(p, platform)
    )


def _block_bytes(p: Problem, platform: str, block_n: int, block_v: int) -> int:
    """A block of logits and what is made of it: arrays of its size, and the factors of the matmuls."""
    classes = min(block_v + p.V % block_v, p.V)
    narrow = not p.hidden == p.kernel == p.working
    if platform == "gpu":
        logits = (p.arrays - 1) * p.working.itemsize + p.matmul.itemsize  # their gradient is written rounded
        factors = block_n + 2 * classes * (block_v < p.V or p.kernel != p.matmul)
        return block_n * classes * logits + p.D * factors * p.working.itemsize
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


def kept_bytes(p: Problem, mode: str, block_n: int, block_v: int) -> int:
    if mode == "recompute" or in_one(p, block_n, block_v):
        terms = 2 + 2 * p.options.label_smoothing + 2 * p.options.return_aux  # of the record of a row
        return p.N * (terms + (p.entries or 2)) * p.working.itemsize
    per_class = p.D + p.class_weights + (p.N if p.entries is None else 0)
    return (p.N * p.D + p.V * per_class) * p.working.itemsize


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


class _Kernel(NamedTuple):
    """What a kernel does: bytes, those of arrays as large as a block of logits, and operations."""

    bytes: float
    logits: float = 0
    flops: float = 0


def on_gpu(p: Problem, mode: str, block_n: int, block_v: int, card: Gpu) -> Cost:
    """What loss and gradients cost on a card."""
    rows, classes = (block_n if mode == "store" else p.N), min(block_v, p.V)
    rounds = p.N / max(rows, 1) * p.V / classes  # what is left at the end is a part of a block, and kernels of its own
    once = _Kernel(_outside(p, mode))
    kernels = [(1.0, once), *((rounds, kernel) for kernel in _of_block(p, mode, rows, classes))]
    launches = _launches(p, mode, rows, classes, math.ceil(p.N / max(rows, 1)) * math.ceil(p.V / classes))
    rates = {2: card.narrow, 4: card.single, 8: card.double}
    rate, memory = _MULTIPLIED * rates[p.matmul.itemsize], _MOVED * card.memory
    cached = rows * classes * p.working.itemsize <= _CACHED * card.cache

    def seconds(kernel: _Kernel) -> float:
        return max(kernel.flops / rate, (kernel.bytes + (0 if cached else kernel.logits)) / memory)

    small = max(launches - sum(rounds for rounds, _ in kernels), 0.0)
    return Cost(
        sum(rounds * (kernel.bytes + kernel.logits) for rounds, kernel in kernels),
        sum(rounds * kernel.flops for rounds, kernel in kernels),
        launches,
        sum(rounds * max(_LAUNCH, seconds(kernel)) for rounds, kernel in kernels) + small * _LAUNCH,
    )


def _of_block(p: Problem, mode: str, rows: int, classes: int) -> list[_Kernel]:
    """The kernels of one block that move or multiply more than numbers per row."""
    s, w = p.matmul.itemsize, p.working.itemsize
    hidden, kernel, logits = rows * p.D, p.D * classes, rows * classes
    product = 2.0 * rows * p.D * classes
    probs = logits * w if p.entries is None else 0
    found = [
        _Kernel((hidden + kernel) * s, logits * w, product),  # logits
        _Kernel(0, logits * w + probs),  # the maximum, and the logits of the labels
        _Kernel(0, logits * w + probs),  # the sum of exponentials
        _Kernel(0, logits * (w + s) + 2 * probs),  # the gradient of the logits, rounded
    ]
    if mode == "store":
        dhidden = _Kernel(kernel * s + hidden * w, logits * s, product)
        dkernel = _Kernel(hidden * s + 2 * kernel * w, logits * s, product)  # added to a sum
        return [*found, dhidden, dkernel, _Kernel(hidden * (2 * s + 4 * w))]  # hidden states sliced, dhidden written
    dkernel = _Kernel((hidden + kernel) * s, logits * s, product)
    if classes == p.V:  # the second logits are found to be the first
        dhidden = _Kernel(kernel * s + hidden * w, logits * s, product)
        return [*found, dhidden, dkernel]
    dhidden = _Kernel(kernel * s + 2 * hidden * w, logits * s, product)  # added to a sum
    return [*found, found[0], dhidden, dkernel, *3 * [_Kernel(2 * kernel * s)]]  # the kernel sliced twice, dkernel put


def _outside(p: Problem, mode: str) -> int:
    """Bytes of sums that are cleared before the loop, and rounded after it."""
    sizes = [p.N * p.D, *([p.D * p.V] if mode == "store" else [])]
    narrow = p.matmul != p.working
    return sum(sizes) * (p.working.itemsize * (1 + narrow) + p.matmul.itemsize * narrow)


def _launches(p: Problem, mode: str, rows: int, classes: int, rounds: int) -> int:
    """The many small kernels included. XLA splits more kernels, the larger a block is."""
    size, narrow = rows * classes, p.matmul != p.working
    split = (size >= 2**23) + (size >= 2**24) + 3 * (classes >= 2**15)
    if mode == "store":
        return 4 + 2 * narrow + rounds * (13 + split)
    if classes == p.V:
        return 11 + split
    return 9 + narrow + rounds * (14 + split + (size >= 2**24))
