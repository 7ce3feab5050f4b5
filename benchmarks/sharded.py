"""Loss and gradients of a linear layer whose vocabulary is split over devices: jaxce beside optax under GSPMD.

Compiled for TPU slices, programs say what they exchange between chips and what memory they need. What runs is on CPU
devices that share this machine's cores: it shows what splitting costs, not what more chips gain.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxce
from benchmarks import hlo, measure, tpu

N, D = 8192, 2048  # N tokens for each part of the batch
# A slice, and its chips as (parts of the batch, parts of the vocabulary).
SLICES = [("v5e:4x4", (1, 16)), ("v5e:4x4", (4, 4)), ("v5e:16x16", (1, 256)), ("v5e:16x16", (16, 16))]
CLASSES = [131072, 262144]
CPU_N, CPU_D, CPU_V = 1024, 256, 8192  # CPU_V classes on each device
DEVICES = [1, 2, 4, 8]

HIDDEN, KERNEL, LABELS = P("data"), P(None, "model"), P("data")


def jaxce_loss(mesh: Mesh) -> Callable:
    loss = functools.partial(jaxce.linear_cross_entropy, axis_name="model", batch_axis_name="data", reduction="mean")
    return jax.shard_map(loss, mesh=mesh, in_specs=(HIDDEN, KERNEL, LABELS), out_specs=P())


def optax_loss(mesh: Mesh) -> Callable:
    """The compiler decides how to split it, from the shardings of the arguments and the gradients."""

    def loss(hidden, kernel, labels):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean()

    return loss


LOSSES = {"jaxce": jaxce_loss, "optax": optax_loss}


def program(name: str, mesh: Mesh, *args: Any) -> jax.stages.Compiled:
    """Loss and both gradients, sharded as their arguments are."""
    out = (P(), (HIDDEN, KERNEL))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out, is_leaf=lambda x: isinstance(x, P))
    return jax.jit(jax.value_and_grad(LOSSES[name](mesh), (0, 1)), out_shardings=shardings).lower(*args).compile()


def mesh_of(devices: Any, shape: tuple[int, int]) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


# --- compiled for TPU slices ----------------------------------------------------------------------------------------


def tpu_row(slice_: str, shape: tuple[int, int], v: int, losses: tuple[str, ...] = tuple(LOSSES)) -> dict[str, Any]:
    """What each program needs for bfloat16 `[N, D] @ [D, V]`, N tokens for each part of the batch."""
    mesh = mesh_of(topologies.get_topology_desc(platform="tpu", topology_name=slice_).devices, shape)

    def struct(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    n = N * shape[0]
    args = (
        struct((n, D), jnp.bfloat16, HIDDEN),
        struct((D, v), jnp.bfloat16, KERNEL),
        struct((n,), jnp.int32, LABELS),
    )
    figures: dict[str, Any] = {}
    for name in losses:
        with tpu.uncached():
            compiled = program(name, mesh, *args)
        text = compiled.as_text() or ""
        figures[name] = {
            "temp_bytes": measure.temp_bytes(compiled),
            "cycles": hlo.estimated_cycles(text),
            "collective_bytes": hlo.collective_bytes(text),
            "collectives": hlo.collectives(text),
        }
    return {"slice": slice_, "data": shape[0], "model": shape[1], "n": N, "d": D, "v": v, "figures": figures}


# --- run on CPU devices ---------------------------------------------------------------------------------------------


def cpu_row(devices: int, seconds: float) -> dict[str, Any]:
    """As many classes for each device, whatever their number."""
    mesh = mesh_of(jax.devices()[:devices], (1, devices))
    rng, v = np.random.default_rng(0), CPU_V * devices
    hidden = rng.standard_normal((CPU_N, CPU_D), np.float32)
    kernel = rng.standard_normal((CPU_D, v), np.float32) / np.float32(np.sqrt(CPU_D))
    labels = rng.integers(0, v, CPU_N).astype(np.int32)
    args = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((hidden, kernel, labels), (HIDDEN, KERNEL, LABELS), strict=True)
    ]
    programs = {name: program(name, mesh, *args) for name in LOSSES}
    runs: dict[str, Callable[[], Any]] = {
        name: functools.partial(lambda f: jax.block_until_ready(f(*args)), f) for name, f in programs.items()
    }
    times = measure.interleaved(runs, seconds)
    figures = {
        name: {
            "median_ms": float(np.median(times[name])) * 1e3,
            "to_optax": measure.median_ratio(times[name], times["optax"]),
            "temp_bytes": measure.temp_bytes(programs[name]),
        }
        for name in LOSSES
    }
    return {"devices": devices, "n": CPU_N, "d": CPU_D, "v": v, "figures": figures}


# --- all of it ------------------------------------------------------------------------------------------------------


def add_options(command: argparse.ArgumentParser) -> None:
    measure.add_options(command, seconds=3.0, smoke="one small mesh, quickly, to see that it runs")


def run(args: argparse.Namespace) -> None:
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    console = Console(width=150)
    slices, classes, devices, seconds = SLICES, CLASSES, DEVICES, args.seconds
    if args.smoke:
        slices, classes, devices, seconds = SLICES[:1], CLASSES[:1], DEVICES[1:2], 0.1
    cpu = [cpu_row(k, seconds) for k in track(devices, "on CPU devices", console=console, transient=True)]
    cells = [(*s, v) for s in slices for v in classes] if importlib.util.find_spec("libtpu") else []
    compiled = [tpu_row(*cell) for cell in track(cells, "compiled for TPU", console=console, transient=True)]
    results = {
        "command": "python -m benchmarks sharded",
        "environment": measure.environment("jaxce", "jax", "jaxlib", "optax", "numpy", "libtpu"),
        "cpu": cpu,
        "tpu": compiled,
    }
    (args.output_dir / "sharded.json").write_text(json.dumps(results, indent=1) + "\n")
    show(console, results)
    console.print(f"wrote sharded.json to {args.output_dir}")


def show(console: Console, results: dict[str, Any]) -> None:
    table = Table("devices", "V", "", "ms", "/ optax", "temp MB", title="CPU devices that share the cores")
    for row in results["cpu"]:
        for name, f in row["figures"].items():
            figures = f"{f['median_ms']:.1f}", f"{f['to_optax']:.2f}", f"{f['temp_bytes'] / 1e6:.1f}"
            table.add_row(str(row["devices"]), str(row["v"]), name, *figures)
    console.print(table)
    if not results["tpu"]:
        console.print("not compiled for TPU: libtpu is not installed")
        return
    table = Table("slice", "batch x vocabulary", "V", "", "temp MB", "cycles M", "exchanged MB", "collectives")
    for row in results["tpu"]:
        for name, f in row["figures"].items():
            cell = [row["slice"], f"{row['data']} x {row['model']}", str(row["v"]), name]
            cell += [f"{f[what] / 1e6:.1f}" for what in ("temp_bytes", "cycles", "collective_bytes")]
            table.add_row(*cell, described(f["collectives"]))
    console.print(table)


def described(collectives: list[dict[str, Any]]) -> str:
    return "; ".join(f"{c['kind']} {' '.join(c['shapes'])}" for c in collectives)
