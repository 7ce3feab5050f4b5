"""Cycles of a program compiled for TPU, counted in the instructions that the compiler writes out.

The compiler's own estimate knows nothing of what is inside a Pallas kernel. Its low-level output does: bundles of
instructions, one a cycle, unless one has to wait. What bounds these kernels is the matrix units (MXU): a bundle that
gives one of them another product waits while four are under way. Copies from HBM are not counted, only the work beside
which they go on.

XLA's estimates of its own products are above such a count: a count is multiplied by what they are, for each chip, over
the count of the same products. Only then are both measured by one stick.
"""

from __future__ import annotations

import glob
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Chip(NamedTuple):
    """Cycles of a matrix unit for sixteen rows of bfloat16; and of a device, operations and bytes from HBM in one."""

    cycles: int
    flops: int
    hbm: float


# The rates a second that JAX has of them, at clocks of 1.5, 1.755, 1.75 and 2.2 GHz.
CHIPS = {
    "v5e": Chip(16, 2**17, 547),
    "v6e": Chip(8, 2**19, 934),
    "v5p": Chip(16, 2**18, 1406),
    "tpu7x": Chip(8, 2**19, 1682),
}
_UNDER_WAY = 4
_SHORT = 200  # bundles of a part that is run in every round; longer parts without a product are run at its ends


class Part(NamedTuple):
    """Bundles in sequence, at a depth of loops."""

    depth: int
    bundles: list[str]

    @property
    def products(self) -> int:
        return sum(len(re.findall("vmatmul", bundle)) for bundle in self.bundles)

    def cycles(self, chip: Chip) -> int:
        """Counted, with the waiting for matrix units."""
        now = 0
        free: dict[str, int] = {}
        for bundle in self.bundles:
            now += 1
            for found in re.finditer(r"vmatmul[.\w\[\]]*?\.mxu(\d)", bundle):
                taken = chip.cycles // 2 if ".lmr" in found[0] else chip.cycles
                start = max(now, free.get(found[1], 0))
                now = max(now, start - _UNDER_WAY * chip.cycles)
                free[found[1]] = start + taken
        return max([now, *free.values()])


def parts(text: str) -> list[Part]:
    """The parts of a kernel: what is between labels, branches and changes of depth."""
    found: list[Part] = []
    current: list[str] = []
    depth = 0
    for line in text.splitlines():
        bundle = re.match(r"^\s*(?:0x[0-9a-f]+|0)\s*(LB|LH|LE|PB|PF|CT)?\s*: ((?:> ?)*)(.*)$", line)
        if not bundle:
            continue
        if bundle[1] or bundle[2].count(">") != depth:
            found.append(Part(depth, current))
            current, depth = [], bundle[2].count(">")
        current.append(bundle[3])
        if "sbr.rel" in bundle[3]:
            found.append(Part(depth, current))
            current = []
    return [part for part in [*found, Part(depth, current)] if part.bundles]


def kernel_cycles(text: str, chip: Chip, rounds: int, ends: int) -> float:
    """Of a kernel that goes through a grid in so many rounds, and begins or ends a block of its results so often."""
    looped = [part for part in parts(text) if part.depth]
    once = sum(p.cycles(chip) for p in looped if not p.products and len(p.bundles) >= _SHORT)
    return rounds * sum(p.cycles(chip) for p in looped if p.products or len(p.bundles) < _SHORT) + ends * once


def loop_cycles(text: str, chip: Chip) -> float:
    """Of one of XLA's products, which is a pipeline of two more rounds than it has blocks."""
    rounds = max(map(int, re.findall(r"scmp\.ge\.s32\.totalorder [^,]*, (\d+)", text))) - 2
    return rounds * sum(part.cycles(chip) for part in parts(text) if part.depth and part.products)


def counted(chip: str, *arguments: Any) -> Any:
    """What this module finds in a process of its own: the compiler is told only once where to write."""
    with tempfile.TemporaryDirectory() as folder:
        told = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "benchmarks.llo", folder, chip, *map(str, arguments)]
        done = subprocess.run(command, env=os.environ | told, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def _dumped(folder: str, name: str) -> str:
    """The one file with the final bundles of what has this name, and is no program of its own."""
    paths = [path for path in glob.glob(f"{folder}/*{name}*final_bundles.txt") if "schedule-analysis" not in path]
    return pathlib.Path(max(paths, key=os.path.getsize)).read_text()


def _calibration(folder: str, chip: str) -> float:
    """XLA's estimate of the products of logits and of both gradients over their count: the geometric mean."""
    import jax
    import jax.numpy as jnp

    from benchmarks import tpu

    n, d, v = 8192, 2048, 16384
    ratios = []
    for axes, *shapes in [((1, 0), (n, d), (d, v)), ((1, 1), (n, v), (d, v)), ((0, 0), (n, d), (n, v))]:

        def product(a, b, axes=axes):
            dims = ((axes[:1], axes[1:]), ((), ()))
            return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32).astype(jnp.bfloat16)

        program = tpu.compile_for(chip, product, *(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes))
        ratios.append(program["cycles"] / loop_cycles(_dumped(folder, "convolution"), CHIPS[chip]))
        for path in glob.glob(f"{folder}/*"):
            os.remove(path)
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _kernels(folder: str, chip: str, n: int, d: int, v: int, vocab_axis: int) -> dict[str, Any]:
    """What is counted of the kernels of the linear loss and its gradients, and what is estimated of the rest."""
    import jax

    import jaxce
    from benchmarks import linear, tpu
    from jaxce.linear import chips, pallas_tpu

    shapes = linear.tpu_inputs(vocab_axis, (n, d, v))
    options: dict[str, Any] = {"vocab_axis": vocab_axis, "reduction": "mean", "implementation": "pallas_tpu"}
    with tpu.traced_for(chip):
        problem = jaxce.linear.problem_of(**dict(zip(("hidden", "kernel", "targets"), shapes, strict=True)), **options)
        blocks = pallas_tpu.kernels(problem, chips.kind_of("tpu"))
    assert blocks is not None

    def loss(*arrays: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(*arrays, **options)

    program = tpu.compile_for(chip, jax.value_and_grad(loss, (0, 1)), *shapes)
    cycles = {}
    for name, (block_n, block_v) in (("forward", blocks.forward), ("backward", blocks.backward)):
        by_n, by_v = -(-n // block_n), v // block_v
        ends = by_n if name == "forward" else max(by_n, by_v)
        text = _dumped(folder, f"cross_entropy_{name}")
        cycles[name] = kernel_cycles(text, CHIPS[chip], by_n * by_v // blocks.chip.cores, ends // blocks.chip.cores)
    return {
        "blocks": {"forward": blocks.forward, "backward": blocks.backward, "resident": blocks.resident},
        "vmem_bytes": {
            "forward": pallas_tpu.forward_bytes(problem, *blocks.forward),
            "backward": pallas_tpu.backward_bytes(problem, *blocks.backward, blocks.resident, blocks.chip.cores),
        },
        "counted": cycles,
        "around": program["cycles"],
        "temp_bytes": program["temp_bytes"],
    }


if __name__ == "__main__":
    folder, chip, *rest = sys.argv[1:]
    print(json.dumps(_kernels(folder, chip, *map(int, rest)) if rest else _calibration(folder, chip)))
