"""The kernels of the linear loss for TPU, compiled and counted: beside jaxce's loop and optax on materialised logits.

Nothing runs: cycles of the loop and of optax are the compiler's estimates, those of the kernels are counted in its
low-level output (`benchmarks.llo`). The estimates of passes over logits are far above what such a pass can take; so
there is a second reading, in which what is no product takes no longer than its operands and results from HBM.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import linear, llo, measure, tpu

SHAPES = [((8192, 2048, 131072), 1), ((8192, 2048, 131072), 0), ((8192, 4096, 131072), 1)]
SMOKE_SHAPES = [((256, 128, 2048), 1)]
BARS = {"v5e": 1.18, "v6e": 0.85, "v5p": 1.12, "tpu7x": 0.95}  # kernels / optax, of the first shape


def row(chip: str, shape: tuple[int, int, int], vocab_axis: int, calibration: float) -> dict[str, Any]:
    n, d, v = shape
    figures: dict[str, Any] = {"pallas_tpu": llo.counted(chip, n, d, v, vocab_axis)}
    counted = figures["pallas_tpu"]
    counted["cycles"] = calibration * sum(counted["counted"].values()) + counted["around"]
    for name in ("jaxce", "optax"):
        program = linear.tpu_program(name, vocab_axis)
        found = tpu.compile_for(chip, program, *linear.tpu_inputs(vocab_axis, shape), hbm=llo.CHIPS[chip].hbm)
        figures[name] = {key: found[key] for key in ("cycles", "corrected_cycles", "temp_bytes")}
    product = 2 * n * d * v / llo.CHIPS[chip].flops
    shown = {"chip": chip, "vocab_axis": vocab_axis, "n": n, "d": d, "v": v, "calibration": calibration}
    return shown | {"floors": {"3": 3 * product, "4": 4 * product}, "figures": figures}


def add_options(command: argparse.ArgumentParser) -> None:
    measure.add_output_options(command, smoke="tiny shapes and one chip, to see that it runs")


def run(args: argparse.Namespace) -> None:
    console = Console(width=130)
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu, the compiler for TPU, is not installed; it exists for Linux on x86-64.")
    chips = ["v6e"] if args.smoke else [*llo.CHIPS]
    calibrations = {chip: llo.counted(chip) for chip in chips}
    cells = [(chip, *cell) for cell in (SMOKE_SHAPES if args.smoke else SHAPES) for chip in chips]
    rows = [row(*cell, calibrations[cell[0]]) for cell in track(cells, "pallas", console=console, transient=True)]
    results = {
        "command": "python -m benchmarks pallas",
        "environment": measure.environment("jaxce", "jax", "jaxlib", "optax", "libtpu"),
        "rows": rows,
    }
    (args.output_dir / "pallas-tpu.json").write_text(json.dumps(results, indent=1) + "\n")
    show(console, rows)
    console.print(f"wrote pallas-tpu.json to {args.output_dir}")


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(
        "chip", "D", "kernel", "", "cycles M", "/ optax", "at most", "corrected", "temp MB", title="compiled for TPU"
    )
    for row in rows:
        theirs = row["figures"]["optax"]
        layout = "[D, V]" if row["vocab_axis"] else "[V, D]"
        bar = BARS[row["chip"]] if (row["d"], row["vocab_axis"]) == (2048, 1) else None
        for name, f in row["figures"].items():
            corrected = f.get("corrected_cycles", f["cycles"])
            table.add_row(
                row["chip"],
                str(row["d"]),
                layout,
                name,
                f"{f['cycles'] / 1e6:.1f}",
                f"{f['cycles'] / theirs['cycles']:.3f}",
                f"{bar:g}" if bar and name == "pallas_tpu" else "",
                f"{corrected / theirs['corrected_cycles']:.2f}",
                f"{f['temp_bytes'] / 1e6:.1f}",
            )
        floors = " and ".join(f"{cycles / 1e6:.1f}" for cycles in row["floors"].values())
        table.add_row(row["chip"], str(row["d"]), layout, "3 and 4 products alone", floors)
        table.add_section()
    console.print(table)
