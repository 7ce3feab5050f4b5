"""What is known of chips and their compilers: each fact with where it was seen.

**TPU7x.** Operands of matmuls are wanted in tiles of 16 x 128, while arguments and results come in tiles of 8 x 128. A
kernel that a loop slices is copied whole before the loop, once for each pass: 1.2 GB for 131,072 classes. Rows that a
gather picks are retiled as they come; columns, once they were widened to 32 bits and narrowed again. Gradients are
rounded after they were retiled. Without all of this 8192 x 2048 x 131072 takes 1,712 MB for 105 (JAX 0.12).

What else is known of TPUs is about the loop alone; the kernels of `jaxce.linear.pallas_tpu` need none of it.

**On-chip memory** (VMEM) and cores of the generations, for `jaxce.linear.pallas_tpu`, as libtpu has them.

**GPUs** are described by their data sheets, for `jaxce.linear.costs`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxce.versions import platform_of


def chip() -> tuple[str, str]:
    """Platform and kind of the device that this process runs programs on, or says it traces them for.

    Platforms that are not known compile what GPUs do, which is the default of `lax.platform_dependent` here.
    """
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    device = jax.sharding.get_abstract_mesh().abstract_device or default or jax.devices()[0]
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    platform = platform_of(device)
    return platform if platform in ("cpu", "tpu") else "gpu", device.device_kind


def kind_of(platform: str) -> str:
    """The kind of that device if it is of this platform; else nothing is known of the chip."""
    here, kind = chip()
    return kind if here == platform else ""


# --- TPU --------------------------------------------------------------------------------------------------------------


def retiles(kind: str) -> bool:
    """See "TPU7x" above."""
    return kind == "TPU7x"


def row_major(kind: str, vocab_axis: int) -> bool:
    """Whether the gradient of the logits has to be laid out row by row.

    For TPU7x, the compiler of JAX 0.12 transposes every block of [D, V] unless it is, which is 8 % of the estimated
    cycles; that of JAX 0.10 if it is.
    """
    return retiles(kind) and vocab_axis == 1 and jax.__version_info__ >= (0, 12)


def block_eighths(kind: str, vocab_axis: int) -> tuple[int, int]:
    """The blocks of the forward and of the backward pass, in eighths of the plan's.

    The backward pass keeps its blocks in the input dtype, so more of them fit on chip: on v6e that is worth 3 % of the
    estimated cycles of 8192 tokens, and 11 % of those of 65536. On TPU7x, blocks of [D, V] that are not a power of two
    escape a transposition, and a smaller first block of [V, D] leaves room for the second: 15 % and 3 %, and 33 MB of
    the latter (JAX 0.12, 2048 x 131072).
    """
    if kind == "TPU v6 lite":
        return 8, 10
    if kind == "TPU7x":
        return 7, 9 if vocab_axis == 1 else 8
    return 8, 8


class Tpu(NamedTuple):
    """Bytes of on-chip memory, and cores, of a device."""

    kind: str
    vmem: int
    cores: int = 1


_TPUS = (
    Tpu("TPU v4", 16 << 20, 2),
    Tpu("TPU v5", 64 << 20, 2),
    Tpu("TPU v5 lite", 128 << 20),
    Tpu("TPU v6 lite", 128 << 20),
    Tpu("TPU7x", 64 << 20),
)
_ANY_TPU = Tpu("", 64 << 20)  # what has room, and runs, on all but v4


def tpu(kind: str) -> Tpu:
    return next((chip for chip in _TPUS if chip.kind == kind), _ANY_TPU)


# --- GPU --------------------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """Bytes and floating-point operations a second, without sparsity, and bytes of the second-level cache."""

    name: str
    memory: float
    cache: float
    narrow: float  # matmuls of bfloat16 or float16
    single: float  # of float32 in the default precision: TF32
    double: float


_GPUS = (
    Gpu("H200", 4.8e12, 50e6, 989e12, 494e12, 67e12),
    Gpu("H100", 3.35e12, 50e6, 989e12, 494e12, 67e12),
    Gpu("A100", 2.04e12, 40e6, 312e12, 156e12, 19.5e12),
    Gpu("4090", 1.01e12, 72e6, 165e12, 83e12, 1.3e12),
    Gpu("L4", 0.3e12, 48e6, 121e12, 60e12, 0.5e12),
)
_OTHERS = "A100"


def gpu(kind: str) -> Gpu:
    """The card of that kind, "NVIDIA H100 80GB HBM3" for instance; an A100 in place of one that is not known."""
    words = [*kind.replace("-", " ").split(), _OTHERS]
    return next(card for word in words for card in _GPUS if card.name == word)
