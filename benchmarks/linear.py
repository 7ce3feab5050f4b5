"""Loss and gradients of a linear layer with softmax: jaxce beside optax on materialised logits, tokamax and torch.

tokamax and torch take part where they are installed; what an installed version lacks or cannot do is in the results
with the reason. torch keeps its kernel `[V, D]` and gets it that way; its memory cannot be asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxce
from benchmarks import measure, tpu
from jaxce.linear.blocks import over_blocks, put, take

Args = tuple[jax.Array, jax.Array, jax.Array]  # hidden [N, D], kernel [D, V], labels [N]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A problem, and the least number of rounds it is measured for."""

    group: str
    n: int
    d: int
    v: int
    rounds: int = 3


CELLS = [
    Cell("bar", 4096, 512, 50304, rounds=7),
    *(Cell("sweep", n, 512, v) for n in (1024, 4096) for v in (8192, 32768, 131072)),
    Cell("sweep", 1024, 512, 262144),
    *(Cell("small", *shape, rounds=7) for shape in [(2048, 128, 4096), (512, 256, 8192), (1024, 512, 10000)]),
    Cell("small", 128, 512, 50304, rounds=7),
]
SMOKE_CELLS = [Cell("bar", 128, 32, 1000), Cell("sweep", 128, 32, 2000), Cell("small", 64, 16, 300)]
# Larger problems would take these minutes: tokamax's xla keeps three arrays of logits, torch goes in small chunks.
MOST_LOGITS = {"tokamax xla": 4096 * 50304, "torch": 1024 * 32768}
IGNORED = -1


def _jaxce(hidden, kernel, labels, **options):
    return jaxce.linear_cross_entropy(hidden, kernel, labels, reduction="mean", **options)


def _optax(hidden, kernel, labels):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels).mean()


def _tokamax(implementation, hidden, kernel, labels):
    import absl.flags
    import tokamax

    absl.flags.FLAGS.mark_as_parsed()  # it would read this program's arguments otherwise
    logging.getLogger("absl").setLevel(logging.ERROR)  # it tells that it was not tuned for this shape
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, kernel, reduction="mean", implementation=implementation
    )


OURS: dict[str, dict[str, Any]] = {
    "jaxce": {},
    "jaxce store": {"mode": "store"},
    "jaxce recompute": {"mode": "recompute"},
}
LOSSES: dict[str, Callable] = {
    **{name: functools.partial(_jaxce, **options) for name, options in OURS.items()},
    "optax": _optax,
    "tokamax chunked_xla": functools.partial(_tokamax, "chunked_xla"),
    "tokamax xla": functools.partial(_tokamax, "xla"),
}
MATMULS = "the three matmuls alone"
# Measured in the bar's cell only, beside the same loss on the same numbers.
VARIANTS = {
    "jaxce, kernel [V, D]": functools.partial(_jaxce, vocab_axis=0),
    "jaxce store, half ignored": functools.partial(_jaxce, mode="store", ignore_index=IGNORED),
}


def matmuls_alone(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
    """The three products of mode "store" in its blocks, with nothing between: about what such a loss has to take."""
    plan = jaxce.plan_linear_cross_entropy(hidden, kernel, labels, reduction="mean", mode="store")
    hidden_t = jax.lax.optimization_barrier(hidden.T)

    def tokens(n, n_size, sums):
        h, ht = take(hidden, n, n_size, 0), take(hidden_t, n, n_size, 1)

        def classes(v, v_size, sums):
            dhidden, dkernel = sums
            k = jax.lax.optimization_barrier(take(kernel, v, v_size, 1))
            logits = jax.lax.optimization_barrier(h @ k)
            dhidden = put(dhidden, take(dhidden, n, n_size, 0) + logits @ k.T, n, 0)
            return dhidden, put(dkernel, take(dkernel, v, v_size, 1) + ht @ logits, v, 1)

        return over_blocks(kernel.shape[1], plan.block_v, classes, sums)

    sums = jnp.zeros_like(hidden), jnp.zeros_like(kernel)
    return jnp.zeros(()), over_blocks(len(hidden), plan.block_n, tokens, sums)


def inputs(cell: Cell) -> Args:
    """Standard normal hidden states and logits, and uniform labels."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((cell.n, cell.d), np.float32)
    kernel = rng.standard_normal((cell.d, cell.v), np.float32) / np.float32(np.sqrt(cell.d))
    labels = rng.integers(0, cell.v, cell.n)
    return jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(labels, jnp.int32)


def variant_inputs(name: str, args: Args) -> Args:
    hidden, kernel, labels = args
    if "ignored" not in name:
        return hidden, jnp.asarray(np.ascontiguousarray(kernel.T)), labels
    ignored = np.random.default_rng(1).permutation(len(labels)) < len(labels) // 2
    return hidden, kernel, jnp.where(ignored, IGNORED, labels)


def with_gradients(loss: Callable) -> Callable:
    return jax.value_and_grad(loss, (0, 1))


# --- measured on CPU ------------------------------------------------------------------------------------------------


def _blocking(f: Callable, args: Args) -> Any:
    return jax.block_until_ready(f(*args))


def torch_run(args: Args) -> Callable[[], Any]:
    """torch's chunked loss and its gradients, eagerly."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # its threads would spin while the others are measured
    import torch
    from torch.nn.functional import linear_cross_entropy

    hidden, kernel, labels = (torch.from_numpy(np.array(a)) for a in args)
    hidden.requires_grad_()
    kernel = kernel.T.contiguous().requires_grad_()
    labels = labels.long()

    def run():
        hidden.grad = kernel.grad = None
        loss = linear_cross_entropy(hidden, kernel, labels, options=torch.nn.LinearCrossEntropyOptions())
        loss.backward()
        return loss.item(), None

    return run


def prepared(name: str, loss: Callable | None, args: Args) -> tuple[Callable[[], Any], dict[str, Any]]:
    if loss is None:
        return torch_run(args), {}
    program, figures = measure.compiled(loss if loss is matmuls_alone else with_gradients(loss), *args)
    return functools.partial(_blocking, program, args), figures


def measured(cell: Cell, seconds: float) -> dict[str, Any]:
    """Time, compile time, temporary memory and loss of each library, or why there are none; and ratios of times."""
    args = inputs(cell)
    plans = {name: jaxce.plan_linear_cross_entropy(*args, reduction="mean", **o) for name, o in OURS.items()}
    candidates: dict[str, tuple[Callable | None, Args]] = {name: (loss, args) for name, loss in LOSSES.items()}
    candidates["torch"] = None, args
    if cell.group == "bar":
        candidates |= {name: (loss, variant_inputs(name, args)) for name, loss in VARIANTS.items()}
        candidates[MATMULS] = matmuls_alone, args

    runs: dict[str, Callable[[], Any]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name, (loss, given) in candidates.items():
        if name in OURS and name != "jaxce" and plans[name] == plans["jaxce"]:
            continue  # the same program
        if cell.group != "bar" and cell.n * cell.v > MOST_LOGITS.get(name, np.inf):
            figures[name] = {"missing": "left out: it would take too long"}
            continue
        try:
            runs[name], figures[name] = prepared(name, loss, given)
            figures[name]["loss"] = float(runs[name]()[0])
        except Exception as error:
            if name.startswith("jaxce"):
                raise
            figures[name] = {"missing": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            runs.pop(name, None)
    times = measure.interleaved(runs, seconds, least=cell.rounds, warm_up=int(cell.group == "small"))
    for name, values in times.items():
        figures[name]["median_ms"] = float(np.median(values)) * 1e3
        figures[name]["rounds"] = len(values)
        figures[name]["to_jaxce"] = measure.median_ratio(values, times["jaxce"])
        figures[name]["to_optax"] = measure.median_ratio(values, times["optax"])
    for name in OURS:
        figures[name] = {**figures.get(name, figures["jaxce"]), "mode": plans[name].mode}
    order = [*candidates]
    return {**dataclasses.asdict(cell), "figures": dict(sorted(figures.items(), key=lambda x: order.index(x[0])))}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of jaxce, and what was found."""
    figures = next(row["figures"] for row in rows if row["group"] == "bar")
    ours, store, recompute, optax_ = (figures[name] for name in ("jaxce", "jaxce store", "jaxce recompute", "optax"))
    small = [row["figures"]["jaxce"]["to_optax"] for row in rows if row["group"] == "small"]
    found: list[tuple[str, float | None, float | None]] = [
        ("time of the default mode / optax", ours["to_optax"], 0.75),
        ("time of the three matmuls alone / optax", figures[MATMULS]["to_optax"], None),
        ("time of store / optax", store["to_optax"], None),
        ("time of recompute / optax", recompute["to_optax"], 1.0),
        ("temporary memory of store / optax", store["temp_bytes"] / optax_["temp_bytes"], 0.15),
        ("temporary memory of recompute / optax", recompute["temp_bytes"] / optax_["temp_bytes"], 0.05),
        ("time / optax, worst small problem", max(small), 1.1),
        *((f"time / {name}, worst problem", _worst(rows, name), 1.0) for name in ("tokamax chunked_xla",)),
        *((f"time / {name}, worst problem", _worst(rows, name), None) for name in ("tokamax xla", "torch")),
        ("time with half of the tokens ignored / all", _half(figures), None),
        ("time with the kernel [V, D] / [D, V]", figures["jaxce, kernel [V, D]"]["to_jaxce"], None),
    ]
    return [{"what": what, "value": value, "bar": bar} for what, value, bar in found if value is not None]


def _worst(rows: list[dict[str, Any]], name: str) -> float | None:
    """jaxce's time over another library's, where that is largest."""
    return max((1 / f["to_jaxce"] for row in rows if "to_jaxce" in (f := row["figures"][name])), default=None)


def _half(figures: dict[str, Any]) -> float:
    return figures["jaxce store, half ignored"]["to_jaxce"] / figures["jaxce store"]["to_jaxce"]


def add_options(command: argparse.ArgumentParser) -> None:
    measure.add_options(command, seconds=3.0, smoke="tiny shapes, quickly, to see that it runs")


def run(args: argparse.Namespace) -> None:
    console = Console(width=130)
    cells, seconds = (SMOKE_CELLS, 0.1) if args.smoke else (CELLS, args.seconds)
    rows = [measured(cell, seconds) for cell in track(cells, "linear", console=console, transient=True)]
    results = {
        "command": "python -m benchmarks linear",
        "environment": measure.environment("jaxce", "jax", "jaxlib", "optax", "tokamax", "torch", "numpy", "libtpu"),
        "summary": summarize(rows),
        "rows": rows,
        "tpu": tpu_rows(SMOKE_TPU_CELLS if args.smoke else TPU_CELLS),
    }
    (args.output_dir / "linear-cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    plot_memory(rows, args.output_dir / "linear-memory.png")
    plot_time(rows, args.output_dir / "linear-time.png")
    show(console, results)
    console.print(f"wrote linear-cpu.json, linear-memory.png and linear-time.png to {args.output_dir}")


# --- compiled for TPU ---------------------------------------------------------------------------------------

TPU_SHAPE = (8192, 2048, 131072)
TPU_LIBRARIES = ("jaxce", "optax", "tokamax chunked_xla")


@dataclasses.dataclass(frozen=True)
class TpuCell:
    """A chip, a layout of the kernel, and the shape (N, D, V)."""

    chip: str
    vocab_axis: int
    shape: tuple[int, int, int] = TPU_SHAPE
    libraries: tuple[str, ...] = TPU_LIBRARIES


TPU_CELLS = [
    *(TpuCell(chip, 1) for chip in tpu.TOPOLOGIES),
    *(TpuCell(chip, 0, libraries=("jaxce", "optax")) for chip in tpu.TOPOLOGIES),
    *(
        TpuCell(chip, 1, shape, ("jaxce",))
        for shape in [(8192, 2048, 262144), (65536, 2048, 131072)]
        for chip in ("v5e", "v6e")
    ),
]
SMOKE_TPU_CELLS = [TpuCell("v5e", 0, (1024, 256, 4096), ("jaxce", "optax"))]


def tpu_inputs(vocab_axis: int, shape: tuple[int, int, int] = TPU_SHAPE) -> tuple[jax.ShapeDtypeStruct, ...]:
    n, d, v = shape
    struct = jax.ShapeDtypeStruct
    kernel = (d, v) if vocab_axis else (v, d)
    return struct((n, d), jnp.bfloat16), struct(kernel, jnp.bfloat16), struct((n,), jnp.int32)


def tpu_program(name: str, vocab_axis: int) -> Callable:
    """Loss and both gradients; a library that knows one layout of the kernel is given the transposed other one."""
    if name in OURS:
        return with_gradients(functools.partial(LOSSES[name], vocab_axis=vocab_axis))
    loss = LOSSES[name]
    return with_gradients(loss if vocab_axis else lambda hidden, kernel, labels: loss(hidden, kernel.T, labels))


def tpu_rows(cells: list[TpuCell]) -> list[dict[str, Any]]:
    """Loss and gradients compiled for TPU in bfloat16; nothing without libtpu."""
    if not importlib.util.find_spec("libtpu"):
        Console(stderr=True).print("not compiled for TPU: libtpu is not installed")
        return []
    rows = []
    for cell in cells:
        n, d, v = cell.shape
        shapes = tpu_inputs(cell.vocab_axis, cell.shape)
        figures: dict[str, Any] = {}
        for name in cell.libraries:
            try:
                figures[name] = tpu.compile_for(cell.chip, tpu_program(name, cell.vocab_axis), *shapes)
            except Exception as error:
                if name in OURS:
                    raise
                figures[name] = {"missing": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        row = {"chip": cell.chip, "vocab_axis": cell.vocab_axis, "n": n, "d": d, "v": v}
        rows.append({**row, "gradient_bytes": 2 * d * (n + v), "figures": figures})
    return rows


# --- tables and plots -----------------------------------------------------------------------------------------------


def show(console: Console, results: dict[str, Any]) -> None:
    table = Table("", "found", "at most", title="jaxce on CPU, loss + gradients, float32")
    for row in results["summary"]:
        table.add_row(row["what"], f"{row['value']:.3f}", "" if row["bar"] is None else f"{row['bar']:g}")
    console.print(table)

    table = Table("N", "D", "V", "", "ms", "rounds", "/ optax", "/ jaxce", "temp MB", "compile s", "loss off by")
    missing: dict[str, None] = {}
    for row in results["rows"]:
        for name, f in row["figures"].items():
            shape = [str(row[x]) for x in "ndv"]
            if "missing" in f:
                missing[f"{name}: {f['missing']}"] = None
                continue
            off = 0.0 if "ignored" in name or name == MATMULS else abs(f["loss"] / row["figures"]["optax"]["loss"] - 1)
            table.add_row(
                *shape,
                f"{name} ({f['mode']})" if name == "jaxce" else name,
                f"{f['median_ms']:.1f}",
                str(f["rounds"]),
                f"{f['to_optax']:.2f}",
                f"{f['to_jaxce']:.2f}",
                f"{f['temp_bytes'] / 1e6:.1f}" if "temp_bytes" in f else "",
                f"{f['compile_s']:.1f}" if "compile_s" in f else "",
                f"{off:.1e}" if off > 1e-5 else "",
            )
        table.add_section()
    console.print(table)

    if results["tpu"]:
        table = Table("chip", "N", "V", "kernel", "", "cycles M", "/ optax", "temp MB", title="compiled for TPU")
        for row in results["tpu"]:
            for name, f in row["figures"].items():
                cell = [row["chip"], str(row["n"]), str(row["v"]), "[D, V]" if row["vocab_axis"] else "[V, D]", name]
                if "missing" in f:
                    missing[f"{name}, compiled for TPU: {f['missing']}"] = None
                    continue
                theirs = row["figures"].get("optax")
                ratio = f"{f['cycles'] / theirs['cycles']:.2f}" if theirs else ""
                table.add_row(*cell, f"{f['cycles'] / 1e6:.1f}", ratio, f"{f['temp_bytes'] / 1e6:.1f}")
        console.print(table)
    for reason in missing:
        console.print(f"not measured everywhere: {reason}", markup=False)


STYLES = {
    "jaxce store": ("C0", "o-"),
    "jaxce recompute": ("C2", "o-"),
    "optax": ("black", "s-"),
    "tokamax chunked_xla": ("C1", "^--"),
    "tokamax xla": ("C3", "^--"),
    "torch": ("C4", "v--"),
}


def _panels(rows: list[dict[str, Any]], figure: str, scale: float) -> tuple[Any, Any]:
    """A panel for each N, with a line over V for each library that has the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted((r for r in rows if r["group"] in ("bar", "sweep")), key=lambda r: r["v"])
    numbers = sorted({r["n"] for r in rows})
    drawing, axes = plt.subplots(1, len(numbers), figsize=(11, 4), sharey=True, layout="constrained", squeeze=False)
    for axis, n in zip(axes[0], numbers, strict=True):
        chosen = [r for r in rows if r["n"] == n]
        for name, (color, style) in STYLES.items():
            points = [(r["v"], r["figures"][name][figure] * scale) for r in chosen if figure in r["figures"][name]]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=color, label=name)
        ticks = [r["v"] for r in chosen]
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{v // 1000}k" for v in ticks])
        axis.set_xlabel("V, classes")
        axis.set_title(f"N = {n}, D = {chosen[0]['d']}")
        axis.grid(alpha=0.3)
    return drawing, axes[0]


def _saved(drawing: Any, path: pathlib.Path) -> None:
    import matplotlib.pyplot as plt

    drawing.savefig(path, dpi=130)
    plt.close(drawing)


def plot_memory(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    drawing, axes = _panels(rows, "temp_bytes", 1e-6)
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes[0].set_ylabel("temporary memory, MB")
    axes[0].legend(fontsize=8)
    drawing.suptitle("Loss and gradients on CPU: memory beyond arguments and results")
    _saved(drawing, path)


def plot_time(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    drawing, axes = _panels(rows, "to_optax", 1)
    for axis in axes:
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes[0].set_ylabel("time / time of optax")
    axes[-1].legend(fontsize=8)
    drawing.suptitle("Loss and gradients on CPU (below 1: faster than optax on materialised logits)")
    _saved(drawing, path)
