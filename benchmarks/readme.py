"""Writes the tables of the README and of the documentation from the results files.

A page has a comment where each of its tables begins, and one where it ends.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import sys
from typing import Any

from benchmarks.measure import geometric_mean

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def pages() -> list[pathlib.Path]:
    """The README and the pages of the documentation that are written by hand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(page: str, name: str, table: str) -> str:
    """`page` with `table` between its `name:begin` and `name:end` comments."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, rest = page.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n{table}\n{end}{tail}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def machine_of(results: dict[str, Any]) -> str:
    environment = results["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items() if v and name != "jaxce")
    return f"{environment['cpu']}, {environment['cores']} cores, Python {environment['python']}, {versions}"


FRONT = {
    "integer": "class indices",
    "smoothed": "label smoothing",
    "class weights": "class weights, one-hot in optax",
    "gathered weights": "class weights, gathered in optax",
    "soft": "probabilities",
    "mixup": "mixup",
}


def front_table(dense: dict[str, Any], linear: dict[str, Any]) -> str:
    """What the README shows: the speed of loss and gradient beside optax, the slowest case, and the linear loss."""
    rows = [row for row in dense["rows"] if row["gradient"]]
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    table = []
    for case, what in FRONT.items():
        of_case = [row for row in rows if row["case"] == case]
        means = [geometric_mean([r["optax"]["ratio"] for r in of_case if r["regime"] == name]) for name in regimes]
        slowest = min(of_case, key=lambda row: row["optax"]["ratio"])
        where = f"{slowest['n']} x {slowest['v']}, {slowest['dtype']}, {slowest['regime']}"
        table.append([what, *(f"{mean:.2f}" for mean in means), f"{slowest['optax']['ratio']:.2f}: {where}"])
    shapes = {(row["n"], row["v"]) for row in rows}
    dtypes = " and ".join(dict.fromkeys(row["dtype"] for row in rows))
    first = {row["gradient"]: row for row in dense["first_call"]}[True]
    problem = linear["rows"][0]
    ours, theirs = problem["figures"]["jaxce"], problem["figures"]["optax"]
    memory = [figures["temp_bytes"] / 1e6 for figures in (ours, theirs)]
    where = linear["environment"]
    return "\n".join(
        [
            f"optax's time divided by jaxce's on CPU ({machine_of(dense)}), loss and gradient: the geometric mean over "
            f"{len(shapes)} shapes in {dtypes}, and the slowest case. Below 1 optax is faster.",
            "",
            markdown(["targets", *regimes, "slowest"], table),
            "",
            f"A first call, which compiles, takes {first['mean']:.1f} times as long as optax's.",
            "",
            f"The linear loss of {problem['n']} tokens, {problem['d']} features and {problem['v']} classes takes "
            f"{ours['to_optax']:.2f} of the time of optax on materialised logits, and {memory[0]:,.0f} MB of temporary "
            f"memory for {memory[1]:,.0f} MB (CPU: {where['cpu']}, jax {where['versions']['jax']}). "
            f"{_cost_in_cycles(linear['tpu']).removesuffix('.')}, compiled for TPU and by the compiler's cost model.",
        ]
    )


def dense_table(results: dict[str, Any]) -> str:
    """optax time / jaxce time on CPU."""
    by_targets: dict[str, dict[tuple[str, bool], dict[str, Any]]] = {}
    for row in results["summary"]:
        by_targets.setdefault(row["targets"], {})[row["regime"], row["gradient"]] = row
    columns = list(next(iter(by_targets.values())))
    columns.sort(key=lambda column: not column[1])
    rows = [
        [name, *(f"{by[column]['mean']:.2f} ({by[column]['worst']:.2f})" for column in columns)]
        for name, by in by_targets.items()
    ]
    heads = [f"{'loss + gradient' if gradient else 'loss'}, {regime}" for regime, gradient in columns]
    first = {row["gradient"]: row for row in results["first_call"]}
    eager = results["eager"]
    return "\n".join(
        [
            f"On CPU ({machine_of(results)}), optax time / jaxce time, "
            "geometric mean over shapes and dtypes (and the worst cell):",
            "",
            markdown(["targets", *heads], rows),
            "",
            "A first call, tracing and compiling, takes "
            f"{first[True]['mean']:.1f} times as long as optax's with the gradient (at worst "
            f"{first[True]['worst']:.1f} times) and {first[False]['mean']:.1f} times without; an eager call of the "
            f"integer loss, once compiled, {eager['ratio']:.2f} of optax's time.",
        ]
    )


def dense_tpu_table(results: dict[str, Any]) -> str:
    """What the TPU compiler says."""
    versions = results["environment"]["versions"]
    rows = [
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
            f"Compiled for TPU (jax {versions['jax']}, libtpu {versions['libtpu']}), bfloat16 8192 x 32768, loss + "
            "gradient, jaxce / optax by the compiler's own cost model:",
            "",
            markdown(["chip", "targets", "bytes accessed", "estimated cycles", "temporary HBM of jaxce"], rows),
        ]
    )


LINEAR = ("jaxce", "jaxce store", "jaxce recompute", "optax", "tokamax chunked_xla", "tokamax xla", "torch")


def linear_table(results: dict[str, Any]) -> str:
    """Time beside optax and memory on CPU, and what the TPU compiler says."""
    rows = results["rows"]
    modes = {row["figures"]["jaxce"]["mode"] for row in rows}
    shown = [
        name
        for name in LINEAR
        if any("median_ms" in row["figures"][name] for row in rows) and name.removeprefix("jaxce ") not in modes
    ]
    cpu = [
        [f"{row['n']} x {row['d']} x {row['v']}", *(_time_and_memory(row["figures"][name]) for name in shown)]
        for row in rows
    ]
    found = _summary(results)
    half, swapped = (
        found["time with half of the tokens ignored / all"],
        found["time with the kernel [V, D] / [D, V]"],
    )
    heads = [f"{name} ({'/'.join(sorted(modes))})" if name == "jaxce" else name for name in shown]
    lines = [
        f"Loss and both gradients on CPU ({machine_of(results)}), float32, integer labels: time relative to optax, and",
        "temporary memory (torch does not tell):",
        "",
        markdown(["N x D x V", *heads], cpu),
        "",
        f"With half of the tokens ignored the first problem takes {half:.2f} of the time; with a kernel `[V, D]`, "
        f"{swapped:.2f}. The three matmuls that it takes at least are "
        f"{found['time of the three matmuls alone / optax']:.2f} of optax's time.",
        *_wrong_losses(rows),
    ]
    if results["tpu"]:
        lines += [
            "",
            "Compiled for TPU in bfloat16, D = 2048: temporary HBM, and estimated cycles relative to optax's program,",
            "by the compiler's own cost model, loops counted as often as they run:",
            "",
            _linear_tpu_table(results["tpu"]),
            "",
            _cost_in_cycles(results["tpu"]),
        ]
    return "\n".join(lines)


def machines_table(*several: dict[str, Any]) -> str:
    """The first problem of the linear loss on each machine."""
    shown = {
        "jaxce": "time of the default mode / optax",
        "jaxce recompute": "time of recompute / optax",
        "three matmuls alone": "time of the three matmuls alone / optax",
        "jaxce, worst of the small problems": "time / optax, worst small problem",
    }
    table = []
    for results in several:
        found, environment = _summary(results), results["environment"]
        figures = [f"{found[what]:.2f}" for what in shown.values()]
        table.append([environment["cpu"], environment["versions"]["jax"], *figures])
    return markdown(["CPU", "JAX", *shown], table)


def _summary(results: dict[str, Any]) -> dict[str, float]:
    return {row["what"]: row["value"] for row in results["summary"]}


def _time_and_memory(figures: dict[str, Any]) -> str:
    if "missing" in figures:
        return "–"
    if "temp_bytes" not in figures:
        return f"{figures['to_optax']:.2f}"
    megabytes = figures["temp_bytes"] / 1e6
    return f"{figures['to_optax']:.2f}, {megabytes:,.{int(megabytes < 10)}f} MB"


def _wrong_losses(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each library whose loss is not that of the others."""
    worst = {}
    for name in LINEAR:
        pairs = [(row["figures"][name], row["figures"]["optax"]) for row in rows if "loss" in row["figures"][name]]
        worst[name] = max((abs(f["loss"] / optax["loss"] - 1) for f, optax in pairs), default=0.0)
    return [
        f"The loss of {name} is off by up to {off:.2%} in these problems." for name, off in worst.items() if off > 1e-4
    ]


def _linear_tpu_table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in LINEAR if any("cycles" in row["figures"].get(name, {}) for row in rows)]
    table = []
    for row in rows:
        cells = [row["chip"], "[D, V]" if row["vocab_axis"] else "[V, D]", f"{row['n']} x {row['v']}"]
        optax = row["figures"].get("optax")
        for name in names:
            figures = row["figures"].get(name, {"missing": ""})
            if "missing" in figures:
                cells.append("–")
                continue
            ratio = (
                f", {figures['cycles'] / optax['cycles']:.2f}" if optax else f", {figures['cycles'] / 1e6:.0f} M cycles"
            )
            cells.append(f"{figures['temp_bytes'] / 1e6:,.1f} MB{ratio}")
        table.append(cells)
    return markdown(["chip", "kernel", "N x V", *names], table)


def _cost_in_cycles(rows: list[dict[str, Any]]) -> str:
    """What it costs on TPU not to hold the logits."""
    more = [
        row["figures"]["jaxce"]["cycles"] / row["figures"]["optax"]["cycles"] - 1
        for row in rows
        if "optax" in row["figures"]
    ]
    return f"Not holding the logits costs {min(more):.0%} to {max(more):.0%} more cycles than optax's program."


def pallas_table(results: dict[str, Any]) -> str:
    """The kernels for TPU beside jaxce's loop and optax."""
    versions = results["environment"]["versions"]
    table = []
    for row in results["rows"]:
        kernels, loop, optax = (row["figures"][name] for name in ("pallas_tpu", "jaxce", "optax"))
        corrected = kernels["cycles"] / optax["corrected_cycles"], kernels["cycles"] / loop["corrected_cycles"]
        table.append(
            [
                row["chip"],
                str(row["d"]),
                "[D, V]" if row["vocab_axis"] else "[V, D]",
                *(f"{f['cycles'] / 1e6:.1f}" for f in (kernels, loop, optax)),
                " and ".join(f"{cycles / 1e6:.1f}" for cycles in row["floors"].values()),
                *(f"{kernels['cycles'] / other['cycles']:.2f}" for other in (optax, loop)),
                *(f"{ratio:.2f}" for ratio in corrected),
                " / ".join(f"{f['temp_bytes'] / 1e6:,.1f}" for f in (kernels, loop, optax)) + " MB",
            ]
        )
    first = results["rows"][0]
    return "\n".join(
        [
            f"Compiled for TPU (jax {versions['jax']}, libtpu {versions['libtpu']}) in bfloat16, loss and both "
            f"gradients, {first['n']} tokens, V = {first['v']}: millions of cycles, and temporary HBM of kernels / "
            "loop / optax:",
            "",
            markdown(
                [
                    "chip",
                    "D",
                    "kernel",
                    "kernels",
                    "loop",
                    "optax",
                    "3 and 4 products alone",
                    "kernels / optax",
                    "kernels / loop",
                    "kernels / optax, corrected",
                    "kernels / loop, corrected",
                    "temporary HBM",
                ],
                table,
            ),
        ]
    )


def gpu_table(results: dict[str, Any]) -> str:
    """Programs compiled for an H100, beside the model."""
    rows = []
    for row in results["rows"]:
        cells = [f"{row['temp_bytes'] / 1e6:,.0f} MB", f"{row['bytes'] / 1e9:.1f} GB", str(row["launches"])]
        if "mode" not in row:
            rows.append(["materialised logits", *cells, "", "", ""])
            continue
        blocks = f"{row['block_n']:,} tokens" if row["mode"] == "store" else f"{row['block_v']:,} classes"
        name = f"{row['mode']}, {blocks}{' (default)' if row['default'] else ''}"
        model = [f"{row['model_bytes'] / 1e9:.1f} GB", str(row["model_launches"]), f"{row['model_ms']:.1f} ms"]
        rows.append([name, *cells, *model])
    header = ["", "temporary memory", "bytes moved", "kernels", "bytes, model", "kernels, model", "time, model"]
    shape = f"N = {results['n']}, D = {results['d']}, V = {results['v']}, {results['dtype']}"
    return f"{shape}, jax {results['environment']['versions']['jax']}:\n\n{markdown(header, rows)}"


def sharded_table(results: dict[str, Any]) -> str:
    """What chips of a TPU slice exchange and need, and the time on CPU devices."""

    def cells(figures: dict[str, Any]) -> list[str]:
        return [f"{figures['temp_bytes'] / 1e6:,.1f} MB", f"{figures['collective_bytes'] / 1e6:,.1f} MB"]

    header = ["slice", "batch x vocabulary", "V"]
    header += [f"{name}: {what}" for name in ("jaxce", "optax") for what in ("temporary HBM", "exchanged")]
    tpu = [
        [row["slice"], f"{row['data']} x {row['model']}", str(row["v"])]
        + [cell for name in ("jaxce", "optax") for cell in cells(row["figures"][name])]
        + [f"{row['figures']['jaxce']['cycles'] / row['figures']['optax']['cycles']:.2f}"]
        for row in results["tpu"]
    ]
    first = results["tpu"][0]
    exchanged = ", ".join(f"{c['kind']} of `{' '.join(c['shapes'])}`" for c in first["figures"]["jaxce"]["collectives"])
    cpu = [
        [
            f"{row['devices']} x {row['v'] // row['devices']}",
            *(f"{row['figures'][name]['median_ms']:.0f} ms" for name in ("jaxce", "optax")),
            f"{row['figures']['jaxce']['median_ms'] / results['cpu'][0]['figures']['jaxce']['median_ms']:.1f}",
        ]
        for row in results["cpu"]
    ]
    return "\n".join(
        [
            f"Compiled for TPU ({machine_of(results)}): loss and both gradients, bfloat16, "
            f"{first['n']} tokens for each part of the batch, D = {first['d']}, per chip:",
            "",
            markdown([*header, "estimated cycles, jaxce / optax"], tpu),
            "",
            f"What jaxce exchanges in the first row: {exchanged}.",
            "",
            "Run on CPU devices that share two cores, so that the time grows with the work: "
            f"{results['cpu'][0]['n']} tokens, D = {results['cpu'][0]['d']}, float32.",
            "",
            markdown(["devices x classes on each", "jaxce", "optax", "jaxce's time / that of one device"], cpu),
        ]
    )


def posttraining_gpu_table(results: dict[str, Any]) -> str:
    """The same, compiled for a GPU."""
    rows = [
        [
            row["loss"],
            form,
            f"{figures['temp_bytes'] / 1e6:,.0f} MB",
            f"{figures['bytes'] / 1e9:.0f} GB",
            f"{figures['launches']:,}",
        ]
        for row in results["rows"]
        for form, figures in row["figures"].items()
    ]
    first, (n, d, v) = results["rows"][0], results["rows"][0]["shape"]
    table = markdown(["loss", "", "temporary memory", "bytes moved", "kernels"], rows)
    jax = results["environment"]["versions"]["jax"]
    return f"{n} x {d} x {v}, bfloat16, compiled for {first['chip']} (jax {jax}):\n\n{table}"


def posttraining_table(results: dict[str, Any]) -> str:
    """Log-probabilities and distillation beside the same on materialised logits."""

    forms = [form for form in results["rows"][0]["figures"] if form != "jaxce"]
    cpu = [
        [
            row["loss"],
            row["dtype"],
            *(f"{row['figures'][form][what]:.2f}" for form in forms for what in ("time", "memory")),
            f"{row['figures']['jaxce']['temp_bytes'] / 1e6:,.0f} MB",
        ]
        for row in results["rows"]
    ]
    n, d, v = results["rows"][0]["shape"]
    header = ["loss", "dtype", *(f"{what} / {form}" for form in forms for what in ("time", "memory"))]
    lines = [
        f"Loss and the gradients of hidden states and kernel on CPU ({machine_of(results)}): {n} tokens, D = {d}, of "
        f"both models, V = {v}. Time and temporary memory beside those of the same on materialised logits, as they are "
        "or rematerialised (`jax.checkpoint`):",
        "",
        markdown([*header, "temporary memory"], cpu),
    ]
    if results["tpu"]:
        n, d, v = results["tpu"][0]["shape"]
        lines += [
            "",
            f"Compiled for TPU in bfloat16, {n} x {d} x {v}: cycles beside those of the others, by the compiler's own "
            "cost model, and temporary HBM:",
            "",
            markdown(
                ["chip", "loss", *(f"cycles / {form}" for form in forms), *(f"HBM, {f}" for f in ("jaxce", *forms))],
                [[row["chip"], row["loss"], *_on_tpu(row["figures"], forms)] for row in results["tpu"]],
            ),
        ]
    return "\n".join(lines)


def _on_tpu(figures: dict[str, Any], forms: list[str]) -> list[str]:
    ours = figures["jaxce"]["cycles"]
    cycles = [f"{ours / f['cycles']:.2f}" if "cycles" in (f := figures[form]) else "" for form in forms]
    memory = [figures[form].get("temp_bytes") for form in ("jaxce", *forms)]
    return [*cycles, *("does not fit" if x is None else f"{x / 1e6:,.0f} MB" for x in memory)]


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


def language_model_table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    fused, dense = (results["temporary_bytes"][name] / 1e6 for name in ("fused", "dense"))
    classes = round(math.exp(results["chance_loss"]))
    header = ["step", "train loss", "validation loss", "perplexity", "bits per byte", "seconds so far"]
    lines = [
        [
            str(row["step"]),
            f"{row['train_loss']:.3f}",
            f"{row['validation_loss']:.3f}",
            f"{row['perplexity']:.0f}",
            f"{row['bits_per_byte']:.2f}",
            f"{sum(r['seconds'] for r in rows if r['step'] <= row['step']):.0f}",
        ]
        for row in sampled(rows)
    ]
    return (
        f"Loss and gradients need {fused:.0f} MB beyond arguments and results, {dense:.0f} MB with the logits in "
        f"memory. Guessing costs ln {classes} = {results['chance_loss']:.3f}, knowing how "
        f"frequent each token is {results['unigram_entropy']:.3f}.\n\n{markdown(header, lines)}"
    )


STUDENTS = {"text": "text alone", "distilled": "distilled"}


def students_table(results: dict[str, Any]) -> str:
    """A student of text alone beside one of a teacher."""
    teacher, students = results["rows"][-1], results["students"]
    measures = {"validation_loss": "validation loss", "bits_per_byte": "bits per byte"}
    header = ["step", *(f"{what}, {student}" for what in measures.values() for student in STUDENTS.values())]
    rows = [
        [str(row["step"]), *(f"{row[student][what]:.3f}" for what in measures for student in STUDENTS)]
        for row in sampled(students["rows"])
    ]
    return (
        f"The teacher ends at a validation loss of {teacher['validation_loss']:.3f} and {teacher['bits_per_byte']:.3f} "
        f"bits per byte; the students begin at {students['start']['distilled']['validation_loss']:.3f}.\n\n"
        f"{markdown(header, rows)}"
    )


def preferences_table(results: dict[str, Any]) -> str:
    """What held-out pairs of answers say of a policy."""
    return markdown(
        ["step", "train loss", "validation loss", "reward margin", "preferred"],
        [
            [
                str(row["step"]),
                f"{row['train_loss']:.3f}",
                f"{row['validation_loss']:.3f}",
                f"{row['margin']:.3f}",
                f"{row['preferred']:.1%}",
            ]
            for row in sampled(results["preferences"]["rows"])
        ],
    )


def sampled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every third row, and the last."""
    return [row for i, row in enumerate(rows) if i % 3 == 0 or row is rows[-1]]


TABLES: dict[str, tuple[Any, ...]] = {  # the function, and the files it reads
    "front": (front_table, "dense-cpu.json", "linear-cpu.json"),
    "dense": (dense_table, "dense-cpu.json"),
    "dense-newest-jax": (dense_table, "newest-jax/dense-cpu.json"),
    "dense-tpu": (dense_tpu_table, "dense-cpu.json"),
    "linear": (linear_table, "linear-cpu.json"),
    "linear-newest-jax": (linear_table, "newest-jax/linear-cpu.json"),
    "machines": (
        machines_table,
        "linear-cpu.json",
        "newest-jax/linear-cpu.json",
        "amd-epyc/linear-cpu.json",
        "amd-epyc/newest-jax/linear-cpu.json",
    ),
    "pallas-tpu": (pallas_table, "pallas-tpu.json"),
    "gpu": (gpu_table, "h100-compiled.json"),
    "sharded": (sharded_table, "sharded.json"),
    "cifar10-demo": (cifar10_table, "cifar10-demo/history.json"),
    "cifar10-full": (cifar10_table, "cifar10-full/history.json"),
    "posttraining": (posttraining_table, "posttraining.json"),
    "posttraining-newest-jax": (posttraining_table, "newest-jax/posttraining.json"),
    "posttraining-gpu": (posttraining_gpu_table, "posttraining-h100.json"),
    "language-model": (language_model_table, "language-model/history.json"),
    "language-model-distill": (students_table, "language-model-distill/history.json"),
    "language-model-dpo": (preferences_table, "language-model-dpo/history.json"),
}


def names(page: str) -> list[str]:
    """The tables that a page has a place for."""
    return re.findall(r"<!-- ([\w-]+):begin -->", page)


def up_to_date(page: str) -> str:
    """`page` with the tables of the results files."""
    for name in names(page):
        table, *paths = TABLES[name]
        page = rendered(page, name, table(*map(results_in, paths)))
    return page


def results_in(path: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / path).read_text())
    if not results.get("tpu", True):
        sys.exit(f"{path}: no figures for TPU. Write it anew where libtpu is installed (Linux on x86-64).")
    return results


def add_options(command: argparse.ArgumentParser) -> None:
    """There are none."""


def run(_: argparse.Namespace) -> None:
    for path in pages():
        path.write_text(up_to_date(path.read_text()))
