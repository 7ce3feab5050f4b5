"""Log-probabilities with entropy, and distillation, from hidden states: beside the same on materialised logits.

The others are what people write: `jax.nn.log_softmax` of the logits, and optax's divergence of the results; once
plainly and once under `jax.checkpoint`, which computes the logits again rather than keep them.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
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
from benchmarks import gpu, measure, tpu

SHAPE, SMOKE_SHAPE = (2048, 512, 50304), (64, 32, 1000)
TPU_SHAPE, SMOKE_TPU_SHAPE = (8192, 2048, 131072), (256, 128, 4096)
TPU_CHIPS = ("v5e", "v6e")
DTYPES = ("float32", "bfloat16")
ENTROPY = 0.01  # its coefficient
MEMORY_BAR = 0.15
TIME_BARS = {"log-probs and entropy": 1.0, "forward KL": 1.1, "Jensen-Shannon": 1.1}


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


def our_log_probs(student, teacher, ids):
    hidden, kernel = student
    chosen, aux = jaxce.linear_log_probs(hidden, kernel, ids, return_aux=True)
    return jnp.mean(chosen + ENTROPY * aux.entropy)


def their_log_probs(student, teacher, ids):
    log_p = jax.nn.log_softmax(_logits(*student))
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    return jnp.mean(jnp.take_along_axis(log_p, ids[:, None], -1)[:, 0] + ENTROPY * entropy)


def our_divergence(divergence, student, teacher, ids):
    return jaxce.linear_distillation_loss(*student, *teacher, divergence=divergence, reduction="mean")


def their_forward_kl(student, teacher, ids):
    log_q, log_p = (jax.nn.log_softmax(_logits(*model)) for model in (student, jax.lax.stop_gradient(teacher)))
    return jnp.mean(optax.losses.kl_divergence_with_log_targets(log_q, log_p))


def their_jsd(student, teacher, ids):
    log_q, log_p = (jax.nn.log_softmax(_logits(*model)) for model in (student, jax.lax.stop_gradient(teacher)))
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return jnp.mean(sum(optax.losses.kl_divergence_with_log_targets(log_m, x) for x in (log_p, log_q))) / 2


LOSSES: dict[str, tuple[Callable, Callable]] = {
    "log-probs and entropy": (our_log_probs, their_log_probs),
    "forward KL": (functools.partial(our_divergence, "forward_kl"), their_forward_kl),
    "Jensen-Shannon": (functools.partial(our_divergence, "jsd"), their_jsd),
}


def programs(name: str) -> dict[str, Callable]:
    """Loss and gradients in the student's hidden states and kernel."""
    ours, theirs = LOSSES[name]
    forms = {"jaxce": ours, "materialised": theirs, "rematerialised": jax.checkpoint(theirs)}
    return {form: jax.value_and_grad(loss) for form, loss in forms.items()}


def shapes(shape: tuple[int, int, int], dtype: str) -> tuple[Any, Any, Any]:
    n, d, v = shape
    model = jax.ShapeDtypeStruct((n, d), dtype), jax.ShapeDtypeStruct((d, v), dtype)
    return model, model, jax.ShapeDtypeStruct((n,), jnp.int32)


def inputs(shape: tuple[int, int, int], dtype: str) -> tuple[Any, Any, Any]:
    """Logits of standard deviation 3, and a teacher that is near its student."""
    rng = np.random.default_rng(0)
    n, d, v = shape
    hidden = rng.standard_normal((n, d), np.float32)
    kernel = rng.standard_normal((d, v), np.float32) * np.float32(3 / np.sqrt(d))
    near = hidden + np.float32(0.1) * rng.standard_normal((n, d), np.float32)
    student, teacher = ([jnp.asarray(x, dtype) for x in (h, kernel)] for h in (hidden, near))
    return tuple(student), tuple(teacher), jnp.asarray(rng.integers(0, v, n), jnp.int32)


def _blocking(program: Callable, args: tuple[Any, ...]) -> Any:
    return jax.block_until_ready(program(*args))


def measured(name: str, shape: tuple[int, int, int], dtype: str, seconds: float) -> dict[str, Any]:
    args = inputs(shape, dtype)
    runs: dict[str, Callable[[], Any]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for form, program in programs(name).items():
        compiled, figures[form] = measure.compiled(program, *args)
        runs[form] = functools.partial(_blocking, compiled, args)
        figures[form]["loss"] = float(runs[form]()[0])
    times = measure.interleaved(runs, seconds, least=3, warm_up=0)
    for form, values in times.items():
        figures[form]["median_ms"] = float(np.median(values)) * 1e3
        figures[form]["rounds"] = len(values)
        figures[form]["time"] = measure.median_ratio(times["jaxce"], values)
        figures[form]["memory"] = figures["jaxce"]["temp_bytes"] / max(figures[form]["temp_bytes"], 1)
    return {"loss": name, "dtype": dtype, "shape": shape, "figures": figures}


def tpu_rows(shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    if not importlib.util.find_spec("libtpu"):
        Console(stderr=True).print("not compiled for TPU: libtpu is not installed")
        return []
    rows = []
    for chip in TPU_CHIPS:
        for name in LOSSES:
            figures: dict[str, Any] = {}
            for form, program in programs(name).items():
                try:
                    figures[form] = tpu.compile_for(chip, program, *shapes(shape, "bfloat16"))
                except jax.errors.JaxRuntimeError as error:  # it does not fit the chip
                    if form == "jaxce":
                        raise
                    figures[form] = {"missing": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            rows.append({"chip": chip, "loss": name, "shape": shape, "figures": figures})
    return rows


def h100_rows(shape: tuple[int, int, int], device: Any) -> list[dict[str, Any]]:
    return [
        {
            "chip": device.device_kind,
            "loss": name,
            "shape": shape,
            "figures": {
                form: gpu.compiled_for(device, program, *shapes(shape, "bfloat16"))
                for form, program in programs(name).items()
            },
        }
        for name in LOSSES
    ]


def add_options(command: argparse.ArgumentParser) -> None:
    measure.add_options(command, seconds=10.0, smoke="tiny shapes, quickly, to see that it runs")
    command.add_argument(
        "--h100-target-config", type=pathlib.Path, help="only compile, for the GPU that the file describes"
    )


def run(args: argparse.Namespace) -> None:
    console = Console(width=120)
    if args.h100_target_config:
        results = {
            "command": "python -m benchmarks posttraining --h100-target-config FILE",
            "environment": measure.environment("jaxce", "jax", "jaxlib", "optax"),
            "rows": h100_rows(SMOKE_TPU_SHAPE if args.smoke else TPU_SHAPE, gpu.described(args.h100_target_config)),
        }
        (args.output_dir / "posttraining-h100.json").write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"wrote posttraining-h100.json to {args.output_dir}")
        return
    shape, seconds = (SMOKE_SHAPE, 0.1) if args.smoke else (SHAPE, args.seconds)
    cells = [(name, dtype) for dtype in DTYPES for name in LOSSES]
    rows = [
        measured(name, shape, dtype, seconds)
        for name, dtype in track(cells, "post-training", console=console, transient=True)
    ]
    results = {
        "command": "python -m benchmarks posttraining",
        "environment": measure.environment("jaxce", "jax", "jaxlib", "optax", "numpy", "libtpu"),
        "rows": rows,
        "tpu": tpu_rows(SMOKE_TPU_SHAPE if args.smoke else TPU_SHAPE),
    }
    (args.output_dir / "posttraining.json").write_text(json.dumps(results, indent=1) + "\n")
    show(console, results)
    console.print(f"wrote posttraining.json to {args.output_dir}")


def show(console: Console, results: dict[str, Any]) -> None:
    table = Table("loss", "dtype", "", "ms", "jaxce's time", "at most", "MB", "jaxce's memory", title="on CPU")
    for row in results["rows"]:
        for form, f in row["figures"].items():
            bar = f"{TIME_BARS[row['loss']]:g}" if form == "materialised" else ""
            own = ["", bar, f"{f['temp_bytes'] / 1e6:.1f}", ""]
            if form != "jaxce":
                own = [f"{f['time']:.2f}", bar, own[2], f"{f['memory']:.3f}"]
            table.add_row(row["loss"], row["dtype"], form, f"{f['median_ms']:.1f}", *own)
    console.print(table)
    if results["tpu"]:
        table = Table("chip", "loss", "", "cycles M", "temp MB", title="compiled for TPU, bfloat16")
        for row in results["tpu"]:
            for form, f in row["figures"].items():
                cells = ["", ""] if "missing" in f else [f"{f['cycles'] / 1e6:.1f}", f"{f['temp_bytes'] / 1e6:.1f}"]
                table.add_row(row["chip"], row["loss"], form, *cells)
        console.print(table)
