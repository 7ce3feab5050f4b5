"""Loss and gradients on a GPU: jaxce beside materialised logits, its plans as timed and as the model has them.

Needs jax and numpy alone. "materialised" is optax's formula on `hidden @ kernel`; "checkpointed" computes those logits
again in the backward pass. The results file is written after every row, so a run that is cut off counts as far as it
came; rows that there was no time for are named in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jaxce
from benchmarks import gpu_check, hlo, measure, tpu
from jaxce.linear import chips, costs
from jaxce.linear import plan as plans
from jaxce.types import Mode

Args = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A problem; `d` is None for the loss of logits. `plans`: time other plans too."""

    n: int
    d: int | None
    v: int
    dtype: str
    plans: bool = False

    def __str__(self) -> str:
        d = "" if self.d is None else f" D={self.d}"
        return f"{'dense' if self.d is None else 'linear'} N={self.n}{d} V={self.v} {self.dtype}"


N = 8192
CELLS = [  # what is wanted most comes first
    Cell(N, 2048, 131072, "bfloat16", plans=True),
    Cell(N, None, 32768, "float32"),
    Cell(N, None, 131072, "bfloat16"),
    Cell(N, 2048, 32768, "float32", plans=True),
    *(Cell(N, 4096, v, "bfloat16") for v in (131072, 32768)),
    Cell(N, 2048, 32768, "bfloat16"),
    *(Cell(N, d, 131072, "float32") for d in (2048, 4096)),
    Cell(N, 4096, 32768, "float32"),
    *(Cell(N, None, *rest) for rest in ((32768, "bfloat16"), (131072, "float32"))),
]
REHEARSAL = [Cell(64, 32, 1000, "bfloat16", plans=True), Cell(64, 32, 1000, "float32"), Cell(64, None, 1000, "float32")]
NO_CARD = "No GPU here that JAX can use: this benchmark needs one (--cpu-rehearsal runs it small on the CPU)."


def materialised(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean of optax's `softmax_cross_entropy_with_integer_labels`."""
    picked = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def _of_layer(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return materialised(hidden @ kernel, labels)


def _jaxce(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, mode: Mode | None = None) -> jax.Array:
    return jaxce.linear_cross_entropy(hidden, kernel, labels, reduction="mean", mode=mode)


def _jaxce_dense(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jaxce.softmax_cross_entropy(logits, labels, reduction="mean")


DENSE: dict[str, Callable] = {"materialised": materialised, "jaxce": _jaxce_dense}
LINEAR: dict[str, Callable] = {
    "materialised": _of_layer,
    "checkpointed": jax.checkpoint(_of_layer),
    "jaxce": _jaxce,
    "jaxce recompute": functools.partial(_jaxce, mode="recompute"),
    "jaxce store": functools.partial(_jaxce, mode="store"),
}


def inputs(cell: Cell) -> Args:
    """Standard normal hidden states, logits of standard deviation 3, and uniform labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    labels = jax.random.randint(keys[2], (cell.n,), 0, cell.v)
    if cell.d is None:
        return 3 * jax.random.normal(keys[0], (cell.n, cell.v), cell.dtype), labels
    hidden = jax.random.normal(keys[0], (cell.n, cell.d), cell.dtype)
    return hidden, 3 / cell.d**0.5 * jax.random.normal(keys[1], (cell.d, cell.v), cell.dtype), labels


def problem_of(cell: Cell) -> costs.Problem:
    n, d, v = cell.n, cell.d, cell.v
    shapes = [jax.ShapeDtypeStruct(shape, cell.dtype) for shape in ((n, d), (d, v))]
    labels = jax.ShapeDtypeStruct((n,), jnp.int32)
    return jaxce.linear.problem_of(hidden=shapes[0], kernel=shapes[1], targets=labels, reduction="mean")


def modelled(cell: Cell, mode: str, block_n: int, block_v: int, kind: str) -> dict[str, float]:
    """The model's cost of a plan on a card, where its loops are those of a GPU."""
    cost = plans.ON_GPU[mode].gpu_cost(problem_of(cell), block_n, block_v, chips.gpu(kind))
    return {"model_ms": cost.seconds * 1e3, "model_bytes": cost.bytes, "model_launches": cost.launches}


def measured(cell: Cell, seconds: float, kind: str) -> dict[str, Any]:
    """Median times, compile times, temporary memory and losses; or why there are none."""
    args = inputs(cell)
    runs: dict[str, Callable[[], Any]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, loss in (DENSE if cell.d is None else LINEAR).items():
        gradient = jax.value_and_grad(loss, 0 if cell.d is None else (0, 1))
        try:
            program, figures[name] = measure.compiled(gradient, *args)
            figures[name]["loss"] = float(program(*args)[0])
        except jax.errors.JaxRuntimeError as error:  # out of memory
            figures[name] = {"missing": str(error).splitlines()[0]}
            continue
        runs[name] = functools.partial(lambda f: jax.block_until_ready(f(*args)), program)
    for name, times in measure.interleaved(runs, seconds, least=5).items():
        figures[name] |= {"median_ms": float(np.median(times)) * 1e3, "rounds": len(times)}
    for name in runs:
        if cell.d is not None and name.startswith("jaxce"):
            mode = name.partition(" ")[2] or None
            plan = plans.make_plan(problem_of(cell), "gpu", mode, None)
            figures[name] |= {"mode": plan.mode, "block_n": plan.block_n, "block_v": plan.block_v}
            figures[name] |= modelled(cell, plan.mode, plan.block_n, plan.block_v, kind)
    return {**dataclasses.asdict(cell), "figures": figures}


def timed_plans(cell: Cell, seconds: float, kind: str) -> list[dict[str, Any]]:
    """Plans of both modes, as `jaxce.tune_linear_cross_entropy` timed them and as the model has them."""
    plan = jaxce.tune_linear_cross_entropy(*inputs(cell), reduction="mean", seconds=seconds)
    return [dataclasses.asdict(t) | modelled(cell, t.mode, t.block_n, t.block_v, kind) for t in plan.timings]


def driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    command.add_argument("--seconds", type=float, default=2.0, help="time for each comparison (default: %(default)g)")
    command.add_argument("--minutes", type=float, default=8.0, help="begin no row after that (default: %(default)g)")
    command.add_argument("--check", action="store_true", help="whether the numbers are right, in place of times")
    command.add_argument("--cpu-rehearsal", action="store_true", help="small, on the CPU, to see that it runs")
    command.add_argument("--h100-target-config", type=pathlib.Path, help="compile for the GPU that the file describes")


def run(args: argparse.Namespace) -> None:
    if args.h100_target_config:
        compile_for_h100(args)
        return
    if args.cpu_rehearsal:
        jax.config.update("jax_platforms", "cpu")
    device = next((d for d in jax.devices() if d.platform == "gpu"), None)
    if device is None and not args.cpu_rehearsal:
        sys.exit(NO_CARD)
    if args.check:
        gpu_check.run()
        return
    kind = "" if device is None else device.device_kind
    cells, seconds = (REHEARSAL, 0.05) if args.cpu_rehearsal else (CELLS, args.seconds)
    environment = measure.environment("jaxce", "jax", "jaxlib", "numpy")
    environment |= {"gpu": kind or "none", "driver": driver(), "runtime": jax.devices()[0].client.platform_version}
    results: dict[str, Any] = {"command": "python -m benchmarks gpu", "environment": environment}
    results |= {"rows": [], "not_reached": [str(cell) for cell in cells]}
    path = args.output_dir / ("gpu-rehearsal.json" if device is None else "gpu.json")
    end = time.perf_counter() + 60 * args.minutes
    for cell in cells:
        if time.perf_counter() > end:
            break
        row = measured(cell, seconds, kind)
        stats = jax.devices()[0].memory_stats() or {}
        row["peak_bytes_so_far"] = stats.get("peak_bytes_in_use")
        results["rows"].append(row)
        results["not_reached"].remove(str(cell))
        path.write_text(json.dumps(results, indent=1) + "\n")
        if cell.plans:
            row["timings"] = timed_plans(cell, seconds, kind)
            path.write_text(json.dumps(results, indent=1) + "\n")
        print(*lines_of(cell, row), sep="\n", flush=True)
    print(*(f"not reached in {args.minutes:g} minutes: {cell}" for cell in results["not_reached"]), sep="\n")
    print(f"wrote {path.name} to {args.output_dir}")


def lines_of(cell: Cell, row: dict[str, Any]) -> Iterator[str]:
    """A table of one row."""
    yield f"\n{cell}{'':8}       ms   / materialised   temp MB   compile s   model ms"
    base = row["figures"]["materialised"].get("median_ms")
    for name, f in row["figures"].items():
        if "missing" in f:
            yield f"  {name:16} {f['missing']}"
            continue
        ratio = "" if base is None else f"{f['median_ms'] / base:.2f}"
        model = f"{f['model_ms']:.1f}" if "model_ms" in f else ""
        numbers = f"{f['median_ms']:12.2f}{ratio:>17}{f['temp_bytes'] / 1e6:10.0f}{f['compile_s']:12.1f}{model:>11}"
        yield f"  {name:16}" + numbers + (f"  {f['mode']} {f['block_n']} x {f['block_v']}" if "mode" in f else "")
    for t in row.get("timings", ()):
        time_ = "-" if t["seconds"] is None else f"{t['seconds'] * 1e3:.2f}"
        blocks = f"{t['mode']} {t['block_n']} x {t['block_v']}"
        yield f"    {blocks:28}{time_:>10} ms, model {t['model_ms']:.1f} ms  {t['note']}".rstrip()


# --- compiled for an H100 ---------------------------------------------------------------------------------------------

COMPILED = Cell(N, 2048, 131072, "bfloat16")
COMPILED_PLANS = [*(("recompute", N, v) for v in (512, 1024, 4096)), *(("store", n, 131072) for n in (256, 2048))]


def compile_for_h100(args: argparse.Namespace) -> None:
    """What the compiler makes of the default plan and of others, beside the model; nothing is run."""
    device = described(args.h100_target_config)
    kind = device.device_kind
    with tpu.told(device):
        given = plans.make_plan(problem_of(COMPILED), "gpu", None, None)
    wanted = dict.fromkeys([(given.mode, given.block_n, given.block_v), *COMPILED_PLANS])
    rows = [compiled_row("materialised", _of_layer, device)]
    for mode, block_n, block_v in wanted:
        plan = dataclasses.replace(given, mode=mode, block_n=block_n, block_v=block_v)
        loss = functools.partial(jaxce.linear_cross_entropy, reduction="mean", plan=plan)
        row = compiled_row("jaxce", loss, device) | {"mode": mode, "block_n": block_n, "block_v": block_v}
        rows.append(row | modelled(COMPILED, mode, block_n, block_v, kind) | {"default": plan == given})
        print(rows[-1], flush=True)
    results = {"command": "python -m benchmarks gpu --h100-target-config FILE", "compiled for": kind}
    results |= {"environment": measure.environment("jaxce", "jax", "jaxlib"), **dataclasses.asdict(COMPILED)}
    path = args.output_dir / "h100-compiled.json"
    path.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n")
    print(f"wrote {path.name} to {args.output_dir}")


def compiled_row(name: str, loss: Callable, device: Any) -> dict[str, Any]:
    struct = jax.ShapeDtypeStruct
    n, d, v, dtype = COMPILED.n, COMPILED.d, COMPILED.v, COMPILED.dtype
    shapes = struct((n, d), dtype), struct((d, v), dtype), struct((n,), jnp.int32)
    return {"library": name, **compiled_for(device, jax.value_and_grad(loss, (0, 1)), *shapes)}


def described(target_config: pathlib.Path) -> Any:
    """The GPU that the file describes, to compile for; there need be none."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    text = target_config.read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=text, topology="1x1x1")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        sys.exit(f"JAX has no CUDA compiler here: {str(error).splitlines()[0]}")
    return topology.devices[0]


def compiled_for(device: Any, f: Callable, *shapes: Any) -> dict[str, Any]:
    """Temporary bytes, and kernels launched and the bytes that they move."""
    one = SingleDeviceSharding(device)
    with tpu.told(device), tpu.uncached():
        program = jax.jit(f, in_shardings=one, out_shardings=one).lower(*shapes).compile()
    return {"temp_bytes": measure.temp_bytes(program), **hlo.kernels(program.as_text() or "")}
