"""Writes the tables of the README from the results files, between the comments that mark their places."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rendered(readme: str, name: str, table: str) -> str:
    """`readme` with `table` between its `name:begin` and `name:end` comments."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = readme.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n{table}\n{end}{tail}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def dense_table(results: dict[str, Any]) -> str:
    """optax time / jaxce time on CPU, and what the TPU compiler says."""
    environment = results["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v and name != "jaxce")
    machine = f"{environment['cpu']}, {environment['cores']} cores, Python {environment['python']}, {versions}"
    means: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in results["summary"]:
        means.setdefault(row["cells"], {})[row["gradient"]] = row
    cpu = [
        [name, *(f"{by[g]['mean']:.2f} ({by[g]['worst']:.2f})" for g in (True, False))] for name, by in means.items()
    ]
    tpu = [
        [
            row["chip"],
            row["case"],
            f"{row['jaxce']['bytes'] / row['optax']['bytes']:.2f}",
            f"{row['jaxce']['cycles'] / row['optax']['cycles']:.2f}",
            f"{row['jaxce']['temp_bytes'] / 1e6:.2f} MB",
        ]
        for row in results["tpu"]
    ]
    return "\n".join(
        [
            f"On CPU ({machine}), optax time / jaxce time, geometric mean over shapes and dtypes (and the worst cell):",
            "",
            markdown(["targets", "loss + gradient", "loss"], cpu),
            "",
            "Compiled for TPU, bfloat16 8192 x 32768, loss + gradient, jaxce / optax by the compiler's own cost model:",
            "",
            markdown(["chip", "targets", "bytes accessed", "estimated cycles", "temporary HBM of jaxce"], tpu),
        ]
    )


def cifar10_table(history: dict[str, Any]) -> str:
    """The epochs of a run of the CIFAR-10 example."""
    rows = [
        [
            str(row["epoch"]),
            f"{row['train_loss']:.3f}",
            f"{row['test_loss']:.3f}",
            f"{row['test_accuracy']:.1%}",
            f"{row['skill']:.3f}",
            f"{row['seconds']:.0f}",
        ]
        for row in history["epochs"]
    ]
    table = markdown(["epoch", "train loss", "test loss", "test accuracy", "skill = 1 − loss/ln 10", "seconds"], rows)
    start, chance = history["start_loss"], history["chance_loss"]
    return f"Before training the loss was {start:.3f}; guessing costs ln 10 = {chance:.3f}.\n\n{table}"


TABLES = {
    "dense": (dense_table, "dense-cpu.json"),
    "cifar10-demo": (cifar10_table, "cifar10-demo/history.json"),
}


def up_to_date(readme: str) -> str:
    """`readme` with the tables of the results files."""
    for name, (table, path) in TABLES.items():
        readme = rendered(readme, name, table(json.loads((RESULTS / path).read_text())))
    return readme


def run(_: argparse.Namespace) -> None:
    path = ROOT / "README.md"
    path.write_text(up_to_date(path.read_text()))
