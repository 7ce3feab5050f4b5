"""Loss and gradient on logits: jaxce beside optax, and torch where it is installed.

optax has no argument for smoothing or class weights, so its column is what its documentation leads to: a dense target
made with `jax.nn.one_hot` and `optax.smooth_labels`. Class weights without smoothing have a better way in optax, the
integer loss times the weight of each label; that is a case of its own, `gathered weights`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
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

SHAPES = [(128, 10), (1024, 10), (128, 1000), (1024, 1000), (256, 32768), (1024, 50257)]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
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


def inputs(shape: tuple[int, int], dtype: Any, confident: bool) -> tuple[jax.Array, ...]:
    """Standard normal logits; in a confident batch every label holds nearly all of its row's mass."""
    rng = np.random.default_rng(0)
    n, v = shape
    logits = rng.standard_normal(shape, np.float32)
    labels = rng.integers(0, v, n)
    if confident:
        logits[np.arange(n), labels] = np.log(v) + 8
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


def compare(case: Case, args: tuple[jax.Array, ...], gradient: bool, seconds: float) -> dict[str, Any]:
    """Median time, compile time and temporary memory of each library, and the ratios to jaxce."""
    wrap = with_gradient if gradient else (lambda f: f)
    runs: dict[str, Callable[[], Any]] = {}
    row: dict[str, Any] = {}
    for name, loss in (("jaxce", case.jaxce), ("optax", case.optax)):
        row[name] = measure.compiling(wrap(loss), *args)
        runs[name] = functools.partial(_blocking, jax.jit(wrap(loss)), args)
    if case.torch and (run := torch_run(case.torch, args, gradient)):
        runs["torch"], row["torch"] = run, {}
    times = measure.interleaved(runs, seconds)
    for name, values in times.items():
        row[name]["median_ms"] = float(np.median(values)) * 1e3
        if name != "jaxce":
            row[name]["ratio"] = measure.median_ratio(values, times["jaxce"])
    return row


def run(args: argparse.Namespace) -> None:
    console = Console(width=118)
    shapes, seconds = (SHAPES[:3:2], 0.05) if args.smoke else (SHAPES, args.seconds)
    cells: list[dict[str, Any]] = [
        {"case": case, "n": n, "v": v, "dtype": dtype, "confident": confident, "gradient": gradient}
        for case in CASES
        for n, v in shapes
        for dtype in DTYPES
        for confident in ((False, True) if case == "integer" else (False,))
        for gradient in (False, True)
    ]
    rows = []
    for cell in track(cells, "dense", console=console, transient=True):
        data = inputs((cell["n"], cell["v"]), DTYPES[cell["dtype"]], cell["confident"])
        rows.append({**cell, **compare(CASES[cell["case"]], data, cell["gradient"], seconds)})
    summary = summarize(rows)
    results = {
        "command": "python -m benchmarks dense",
        "environment": measure.environment("jaxce", "jax", "jaxlib", "optax", "torch", "numpy", "libtpu"),
        "summary": summary,
        "rows": rows,
        "tpu": tpu_rows(("integer",) if args.smoke else tuple(CASES), ("v5e",) if args.smoke else ("v5e", "v6e")),
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "dense-cpu.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    show(console, results)
    plot(results, args.output_dir / "dense-cpu.png")
    console.print(f"wrote {path.name} and dense-cpu.png to {args.output_dir}")


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means and minima of optax time / jaxce time."""

    def over(name: str, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        found = []
        for gradient in (False, True):
            ratios = [r["optax"]["ratio"] for r in rows if keep(r) and r["gradient"] is gradient]
            if ratios:
                mean = measure.geometric_mean(ratios)
                found.append({"cells": name, "gradient": gradient, "mean": mean, "worst": min(ratios)})
        return found

    groups = [
        *over("integer", lambda r: r["case"] == "integer" and not r["confident"]),
        *over("integer, every row confident", lambda r: r["case"] == "integer" and r["confident"]),
        *over("smoothed or class weights", lambda r: r["case"] in BARRED),
        *over("smoothed or class weights, V >= 1000", lambda r: r["case"] in BARRED and r["v"] >= 1000),
    ]
    for case in CASES:
        if case not in ("integer", *BARRED):
            groups += over(case, functools.partial(_is_case, case))
    return groups


def _is_case(case: str, row: dict[str, Any]) -> bool:
    return row["case"] == case


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
    table = Table("cells", "", "geometric mean", "worst", title="optax time / jaxce time on CPU")
    for row in results["summary"]:
        what = "loss + gradient" if row["gradient"] else "loss"
        table.add_row(row["cells"], what, f"{row['mean']:.2f}", f"{row['worst']:.2f}")
    console.print(table)

    table = Table("case", "N", "V", "dtype", "", "jaxce ms", "optax ms", "x", "torch ms", "x", "temp KB", "optax KB")
    for row in results["rows"]:
        name = row["case"] + (" (confident)" if row["confident"] else "")
        what = "grad" if row["gradient"] else "loss"
        other = row.get("torch", {})
        table.add_row(
            name,
            str(row["n"]),
            str(row["v"]),
            row["dtype"],
            what,
            f"{row['jaxce']['median_ms']:.3f}",
            f"{row['optax']['median_ms']:.3f}",
            f"{row['optax']['ratio']:.2f}",
            f"{other['median_ms']:.3f}" if other else "",
            f"{other['ratio']:.2f}" if other else "",
            f"{row['jaxce']['temp_bytes'] / 1e3:.1f}",
            f"{row['optax']['temp_bytes'] / 1e3:.1f}",
        )
    console.print(table)

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


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Loss + gradient: how many times as fast as optax, per case and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in results["rows"] if r["gradient"]]
    cases = [c for c in CASES if any(r["case"] == c for r in rows)]
    shapes = list(dict.fromkeys((r["n"], r["v"]) for r in rows))
    figure, axes = plt.subplots(1, len(DTYPES), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, DTYPES, strict=True):
        for i, case in enumerate(cases):
            chosen = [r for r in rows if r["case"] == case and r["dtype"] == dtype and not r["confident"]]
            ratios = [next(r["optax"]["ratio"] for r in chosen if (r["n"], r["v"]) == s) for s in shapes]
            axis.bar(np.arange(len(shapes)) + (i - (len(cases) - 1) / 2) * 0.13, ratios, 0.13, label=case)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xticks(range(len(shapes)), [f"{n}\nx {v}" for n, v in shapes])
        axis.set_title(dtype)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("speed relative to optax")
    axes[0].legend(fontsize=8, loc="upper left")
    figure.suptitle("Loss and gradient on CPU (above the line: jaxce is faster)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
