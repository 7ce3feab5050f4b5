"""Loss and gradient on logits: jaxce beside optax, and torch where it is installed.

optax has no argument for smoothing or class weights, so its column is what its documentation leads to: a dense target
made with `jax.nn.one_hot` and `optax.smooth_labels`. Class weights without smoothing have a better way in optax, the
integer loss times the weight of each label; that is a case of its own, `gathered weights`.

Each program runs on the logits of a network before training, of a trained one, and of one that is sure of everything:
what a loss does may depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import random
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

SHAPES = [(128, 10), (4096, 10), (65536, 10), (8192, 100), (1024, 1000), (256, 32768), (512, 50257)]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
REGIMES = {
    "fresh": "N(0, 1), random labels",
    "trained": "N(0, 9), half of the labels on the largest logit",
    "confident": "every label 12 above the others",
}
SMOOTHING = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss in each library, as functions of (logits, labels, class_weights, soft_targets)."""

    jaxce: Callable
    optax: Callable
    torch: Callable | None = None


def _one_hot(logits, labels):
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def _torch_loss(x, y, **options):
    import torch.nn.functional as F  # noqa: N812 - torch is optional

    return F.cross_entropy(x, y, reduction="none", **options)


CASES = {
    "integer": Case(
        lambda x, y, w, t: jaxce.softmax_cross_entropy(x, y),
        lambda x, y, w, t: optax.softmax_cross_entropy_with_integer_labels(x, y),
        lambda x, y, w, t: _torch_loss(x, y),
    ),
    "smoothed": Case(
        lambda x, y, w, t: jaxce.softmax_cross_entropy(x, y, label_smoothing=SMOOTHING),
        lambda x, y, w, t: optax.softmax_cross_entropy(x, optax.smooth_labels(_one_hot(x, y), SMOOTHING)),
        lambda x, y, w, t: _torch_loss(x, y, label_smoothing=SMOOTHING),
    ),
    "class weights": Case(
        lambda x, y, w, t: jaxce.softmax_cross_entropy(x, y, class_weights=w),
        lambda x, y, w, t: optax.softmax_cross_entropy(x, _one_hot(x, y) * w.astype(x.dtype)),
        lambda x, y, w, t: _torch_loss(x, y, weight=w),
    ),
    "gathered weights": Case(
        lambda x, y, w, t: jaxce.softmax_cross_entropy(x, y, class_weights=w),
        lambda x, y, w, t: w[y] * optax.softmax_cross_entropy_with_integer_labels(x, y),
    ),
    "soft": Case(
        lambda x, y, w, t: jaxce.softmax_cross_entropy(x, t),
        lambda x, y, w, t: optax.softmax_cross_entropy(x, t),
        lambda x, y, w, t: _torch_loss(x, t),
    ),
    "mixup": Case(
        lambda x, y, w, t: jaxce.softmax_cross_entropy(
            x, jaxce.SparseTargets(jnp.stack([y, y[::-1]], -1), jnp.broadcast_to(jnp.array([0.7, 0.3]), (*y.shape, 2)))
        ),
        lambda x, y, w, t: optax.softmax_cross_entropy(x, 0.7 * _one_hot(x, y) + 0.3 * _one_hot(x, y[::-1])),
    ),
}
BARRED = ("smoothed", "class weights")
CELL = ("case", "n", "v", "dtype", "gradient")


def inputs(shape: tuple[int, int], dtype: Any, regime: str) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    n, v = shape
    rows = np.arange(n)
    logits = rng.standard_normal(shape, np.float32) * (1 if regime == "fresh" else 3)
    labels = rng.integers(0, v, n)
    if regime == "trained":
        labels = np.where(rows % 2 == 0, np.argmax(logits, -1), labels)
    if regime == "confident":
        logits[rows, labels] = np.max(logits, -1) + 12
    soft = rng.dirichlet(np.ones(min(v, 64)), n).astype(np.float32)
    soft = np.pad(soft, ((0, 0), (0, v - soft.shape[1])))
    weights = rng.uniform(0.5, 2, v).astype(np.float32)
    return jnp.asarray(logits, dtype), jnp.asarray(labels, jnp.int32), jnp.asarray(weights), jnp.asarray(soft, dtype)


def with_gradient(loss: Callable) -> Callable:
    return jax.value_and_grad(lambda x, *rest: loss(x, *rest).mean())


def torch_run(loss: Callable, args: tuple[jax.Array, ...], gradient: bool) -> Callable[[], Any] | None:
    """The same in torch, eagerly (its kernels are compiled already), or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    x, y, w, t = (torch.from_numpy(np.array(a, np.int64 if a.dtype == jnp.int32 else np.float32)) for a in args)
    kind = torch.bfloat16 if args[0].dtype == jnp.bfloat16 else torch.float32
    x, w, t = x.to(kind).requires_grad_(gradient), w.to(kind), t.to(kind)

    def run():
        if not gradient:
            return loss(x, y, w, t)
        x.grad = None
        return loss(x, y, w, t).mean().backward()

    return run


def _blocking(f: Callable, args: tuple[jax.Array, ...]) -> Any:
    return jax.block_until_ready(f(*args))


def compare(
    case: Case, data: dict[str, tuple[jax.Array, ...]], gradient: bool, seconds: float, order: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the first call of each library takes, in this order; and for each regime median times and their ratios."""
    wrap = with_gradient if gradient else (lambda f: f)
    some = next(iter(data.values()))
    compiled = {name: measure.first_call(wrap(getattr(case, name)), *some) for name in order}
    rows = {}
    for regime, args in data.items():
        runs: dict[str, Callable[[], Any]] = {
            name: functools.partial(_blocking, program, args) for name, (program, _) in compiled.items()
        }
        if case.torch and (run := torch_run(case.torch, args, gradient)):
            runs["torch"] = run
        times = measure.interleaved(runs, seconds)
        rows[regime] = {name: {"median_ms": float(np.median(values)) * 1e3} for name, values in times.items()}
        for name in times.keys() - {"jaxce"}:
            rows[regime][name]["ratio"] = measure.median_ratio(times[name], times["jaxce"])
    return {name: figures for name, (_, figures) in compiled.items()}, rows


def add_options(command: argparse.ArgumentParser) -> None:
    measure.add_options(command, seconds=0.5, smoke="the smallest shape, quickly, to see that it runs")
    command.add_argument("--regime", nargs="+", choices=REGIMES, help="some kinds of logits only; writes no file")
    command.add_argument("--cases", nargs="+", choices=CASES, help="some kinds of targets only; writes no file")
    cells = ["x".join(map(str, shape)) for shape in SHAPES]
    command.add_argument("--cells", nargs="+", choices=cells, help="some shapes only; writes no file")


def run(args: argparse.Namespace) -> None:
    console = Console(width=118)
    shapes, seconds = (SHAPES[:1], 0.05) if args.smoke else (SHAPES, args.seconds)
    if args.cells:
        shapes = [shape for shape in SHAPES if "x".join(map(str, shape)) in args.cells]
    cases, regimes = args.cases or list(CASES), args.regime or list(REGIMES)
    cells: list[dict[str, Any]] = [
        {"case": case, "n": n, "v": v, "dtype": dtype, "gradient": gradient}
        for n, v in shapes
        for dtype in DTYPES
        for case in cases
        for gradient in (False, True)
    ]
    rows, programs = [], []
    at_hand = functools.lru_cache(maxsize=len(regimes))(inputs)  # the cases of a shape share them
    rng, libraries = random.Random(0), ["jaxce", "optax"]
    for case in CASES.values():  # what a process does once is no part of any first call
        compare(case, {"": inputs((3, 5), jnp.float32, "fresh")}, True, 0, libraries)
    for cell in track(cells, "dense", console=console, transient=True):
        data = {regime: at_hand((cell["n"], cell["v"]), DTYPES[cell["dtype"]], regime) for regime in regimes}
        order = rng.sample(libraries, 2)  # the second one finds some of what it needs traced
        compiled, by_regime = compare(CASES[cell["case"]], data, cell["gradient"], seconds, order)
        programs.append({**cell, **compiled})
        rows += [{**cell, "regime": regime, **row} for regime, row in by_regime.items()]
    results = {
        "command": "python -m benchmarks dense",
        "environment": measure.environment("jaxce", "jax", "jaxlib", "optax", "torch", "numpy", "libtpu"),
        "summary": summarize(rows),
        "first_call": first_calls(programs),
        "eager": eager_calls(seconds),
        "programs": programs,
        "rows": rows,
        "tpu": tpu_rows(("integer",) if args.smoke else tuple(cases), ("v5e",) if args.smoke else ("v5e", "v6e")),
    }
    show(console, results)
    if args.cases or args.regime or args.cells:
        console.print("a part of the benchmark: no file is written")
        return
    path = args.output_dir / "dense-cpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, args.output_dir / "dense-cpu.png")
    console.print(f"wrote {path.name} and dense-cpu.png to {args.output_dir}")


GROUPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "integer": lambda row: row["case"] == "integer",
    "smoothed or class weights": lambda row: row["case"] in BARRED,
    "smoothed or class weights, V >= 1000": lambda row: row["case"] in BARRED and row["v"] >= 1000,
    "gathered weights": lambda row: row["case"] == "gathered weights",
    "soft": lambda row: row["case"] == "soft",
    "mixup": lambda row: row["case"] == "mixup",
}


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means and minima of optax time / jaxce time, in each regime."""
    found = []
    for name, belongs in GROUPS.items():
        for regime in REGIMES:
            for gradient in (False, True):
                of_these = (r for r in rows if belongs(r) and (r["regime"], r["gradient"]) == (regime, gradient))
                if ratios := [row["optax"]["ratio"] for row in of_these]:
                    figures = {"mean": measure.geometric_mean(ratios), "worst": min(ratios)}
                    found.append({"targets": name, "regime": regime, "gradient": gradient, **figures})
    return found


def first_calls(programs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tracing and compiling, jaxce / optax: geometric mean and the worst, and the seconds of the smallest program."""
    found = []
    for gradient in (False, True):
        chosen = [p for p in programs if p["gradient"] is gradient]
        ratios = [p["jaxce"]["first_call_s"] / p["optax"]["first_call_s"] for p in chosen]
        seconds = {name: chosen[0][name]["first_call_s"] for name in ("jaxce", "optax")}
        figures = {"mean": measure.geometric_mean(ratios), "worst": max(ratios)}
        found.append({"gradient": gradient, **figures, "seconds": seconds})
    return found


def eager_calls(seconds: float) -> dict[str, Any]:
    """An eager call of the integer loss, 128 x 10, compiled by an earlier one."""
    args = inputs(SHAPES[0], jnp.float32, "trained")
    case = CASES["integer"]
    runs: dict[str, Callable[[], Any]] = {
        name: functools.partial(_blocking, getattr(case, name), args) for name in ("jaxce", "optax")
    }
    times = measure.interleaved(runs, seconds)
    return {
        "ratio": measure.median_ratio(times["jaxce"], times["optax"]),
        **{name: {"median_ms": float(np.median(values)) * 1e3} for name, values in times.items()},
    }


# --- compiled for TPU -----------------------------------------------------------------------------------------------

TPU_SHAPE = (8192, 32768)


def tpu_rows(cases: tuple[str, ...], chips: tuple[str, ...]) -> list[dict[str, Any]]:
    """Loss and gradient of each case compiled for TPU, bfloat16 8192 x 32768; nothing without libtpu."""
    try:
        return [
            {
                "case": case,
                "chip": chip,
                **{name: tpu.compile_for(chip, f, *tpu_inputs()) for name, f in tpu_programs(case)},
            }
            for chip in chips
            for case in cases
        ]
    except RuntimeError as error:
        Console(stderr=True).print(f"not compiled for TPU: {str(error).splitlines()[0]}")
        return []


def tpu_inputs() -> tuple[jax.ShapeDtypeStruct, ...]:
    n, v = TPU_SHAPE
    struct = jax.ShapeDtypeStruct
    return (
        struct((n, v), jnp.bfloat16),
        struct((n,), jnp.int32),
        struct((v,), jnp.float32),
        struct((n, v), jnp.bfloat16),
    )


def tpu_programs(case: str) -> list[tuple[str, Callable]]:
    return [(name, with_gradient(getattr(CASES[case], name))) for name in ("jaxce", "optax")]


# --- tables and plot ------------------------------------------------------------------------------------------------


def show(console: Console, results: dict[str, Any]) -> None:
    table = Table("targets", "logits", "", "geometric mean", "worst", title="optax time / jaxce time on CPU")
    for row in results["summary"]:
        table.add_row(row["targets"], row["regime"], _what(row), f"{row['mean']:.2f}", f"{row['worst']:.2f}")
    console.print(table)

    table = Table("case", "N", "V", "dtype", "", "logits", "jaxce ms", "optax ms", "x", "torch ms", "x", "KB", "optax")
    programs = {tuple(p[key] for key in CELL): p for p in results["programs"]}
    for row in results["rows"]:
        other, program = row.get("torch"), programs[tuple(row[key] for key in CELL)]
        table.add_row(
            *(str(row[key]) for key in CELL[:4]),
            "grad" if row["gradient"] else "loss",
            row["regime"],
            f"{row['jaxce']['median_ms']:.3f}",
            f"{row['optax']['median_ms']:.3f}",
            f"{row['optax']['ratio']:.2f}",
            f"{other['median_ms']:.3f}" if other else "",
            f"{other['ratio']:.2f}" if other else "",
            *(f"{program[name]['temp_bytes'] / 1e3:.0f}" for name in ("jaxce", "optax")),
        )
    console.print(table)

    table = Table("", "geometric mean", "worst", "jaxce s", "optax s", title="first call, jaxce / optax")
    for row in results["first_call"]:
        of_smallest = (f"{row['seconds'][name]:.2f}" for name in ("jaxce", "optax"))
        table.add_row(_what(row), f"{row['mean']:.2f}", f"{row['worst']:.2f}", *of_smallest)
    console.print(table)
    eager = results["eager"]
    milliseconds = ", ".join(f"{name} {eager[name]['median_ms']:.3f} ms" for name in ("jaxce", "optax"))
    console.print(f"an eager call of the integer loss, 128 x 10: {eager['ratio']:.2f} of optax's time ({milliseconds})")

    if results["tpu"]:
        n, v = TPU_SHAPE
        title = f"loss + gradient compiled for TPU, bfloat16 {n} x {v}: jaxce / optax"
        table = Table("chip", "case", "bytes", "estimated cycles", "temporary HBM", title=title)
        for row in results["tpu"]:
            ours, theirs = row["jaxce"], row["optax"]
            table.add_row(
                row["chip"],
                row["case"],
                f"{ours['bytes'] / theirs['bytes']:.2f}",
                f"{ours['cycles'] / theirs['cycles']:.2f}",
                f"{ours['temp_bytes'] / 1e6:.2f} / {theirs['temp_bytes'] / 1e6:.2f} MB",
            )
        console.print(table)


def _what(row: dict[str, Any]) -> str:
    return "loss + gradient" if row["gradient"] else "loss"


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Loss + gradient: how many times as fast as optax, per case and shape, in each regime."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results["rows"] if r["gradient"]]
    cases = [c for c in CASES if any(r["case"] == c for r in rows)]
    shapes = list(dict.fromkeys((r["n"], r["v"]) for r in rows))
    panels = len(REGIMES), len(DTYPES)
    figure, axes = plt.subplots(*panels, figsize=(11, 9), sharex=True, sharey=True, layout="constrained")
    for (i, regime), (j, dtype) in itertools.product(enumerate(REGIMES), enumerate(DTYPES)):
        axis = axes[i][j]
        for k, case in enumerate(cases):
            chosen = [r for r in rows if (r["case"], r["dtype"], r["regime"]) == (case, dtype, regime)]
            ratios = [next(r["optax"]["ratio"] for r in chosen if (r["n"], r["v"]) == s) for s in shapes]
            axis.bar(np.arange(len(shapes)) + (k - (len(cases) - 1) / 2) * 0.13, ratios, 0.13, label=case)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xticks(range(len(shapes)), [f"{n}\nx {v}" for n, v in shapes])
        axis.set_title(f"{regime} logits, {dtype}", fontsize=10)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
        if j == 0:
            axis.set_ylabel("speed relative to optax")
    axes[0][0].legend(fontsize=8, loc="upper left")
    figure.suptitle("Loss and gradient on CPU (above the line: jaxce is faster)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
