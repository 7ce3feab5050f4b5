"""The program of the language-model example: load, train, save, in one process."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

import jaxce
from jaxce.examples.common import exit_code, make_folder, progress_bar
from jaxce.examples.language_model import data as texts
from jaxce.examples.language_model import processes
from jaxce.examples.language_model import report as reports
from jaxce.examples.language_model.data import UnusableTextError
from jaxce.examples.language_model.distillation import Students
from jaxce.examples.language_model.preferences import Preferences
from jaxce.examples.language_model.report import Measures, Row, T, Yardsticks
from jaxce.examples.language_model.training import (
    SAMPLE_TOKENS,
    Settings,
    Trainer,
    loss_arguments,
    make_loss,
    temporary_bytes,
)

ROWS = 10  # in the table

T_co = TypeVar("T_co", covariant=True)


class Learner(Protocol[T_co]):
    """What trains step by step and is tested now and then."""

    settings: Settings

    def train_step(self, step: int) -> float: ...

    def test(self) -> T_co: ...


class Stage(Learner[T], Protocol[T]):
    """What an objective does with the network that was trained on text."""

    name: str  # of its rows, in the history
    header: str

    def start_message(self, start: T) -> str: ...

    def closing(self, rows: Sequence[Row[T]]) -> str: ...

    def plot(self, path: Path, title: str, text: Sequence[Row[Measures]], start: T, rows: Sequence[Row[T]]) -> None: ...


STAGES: dict[str, Callable[[Trainer], Stage[Any]]] = {"distill": Students, "dpo": Preferences}


def run(settings: Settings, *, data: Path | None, output_dir: Path, console: Console) -> list[Row[Measures]]:
    """Load, train, save; returns the rows of the text."""
    mesh = processes.make_mesh()
    corpus = texts.load(data)
    console.print(str(corpus))
    dataset = texts.tokenize(corpus, settings.vocab_size)
    trainer = Trainer(dataset, settings, mesh)
    make_folder(output_dir)  # before the time is spent on training
    console.print(f"{dataset}\nnetwork: {trainer.parameters:,} parameters; loss: {settings.loss}")

    memory = report_memory(settings, dataset.tokenizer.vocab_size, console, mesh)
    share = loss_arguments(settings, dataset.tokenizer.vocab_size // (mesh.size if mesh else 1))
    plan = jaxce.plan_linear_cross_entropy(*share, vocab_axis=0, mode=settings.mode, reduction="mean")
    console.print(f"how the fused loss goes about it:\n{plan}", markup=False)
    yardsticks = Yardsticks(dataset.tokenizer.vocab_size, dataset.unigram_entropy)
    start = trainer.test()
    console.print(yardsticks.start_message(start.loss))

    rows = train(trainer, console, reports.HEADER)

    about = {
        "arguments": dataclasses.asdict(settings),
        "data": str(corpus),
        "tokens": str(dataset),
        "temporary_bytes": memory,
        "plan": str(plan),
    }
    if settings.objective in STAGES:
        stage = STAGES[settings.objective](trainer)
        before = stage.test()
        console.print(stage.start_message(before))
        after = train(stage, console, stage.header)
        about[stage.name] = {"start": before.as_dict(), "rows": [row.as_dict() for row in after]}
        stage.plot(output_dir / "curves.png", f"{corpus.name}, {settings.objective}", rows, before, after)
        reports.write_history(output_dir / "history.json", about, yardsticks, start, rows)
        console.print(f"wrote curves.png and history.json to {output_dir}\n\n{stage.closing(after)}")
        return rows

    about["sample"] = sample = trainer.sample()
    if jax.process_index() > 0:
        return rows
    title = f"{corpus.name}, {settings.loss} loss: {rows[-1].validation.bits_per_byte:.2f} bits per byte"
    reports.plot_history(output_dir / "curves.png", title, yardsticks, start, rows)
    reports.write_history(output_dir / "history.json", about, yardsticks, start, rows)
    console.print(f"wrote curves.png and history.json to {output_dir}\n\n{SAMPLE_TOKENS} tokens that it makes up:\n")
    console.print(sample, markup=False)
    return rows


def report_memory(settings: Settings, vocab_size: int, console: Console, mesh: Mesh | None = None) -> dict[str, int]:
    """Print, and return in bytes, what both losses need on each device beside arguments and results."""
    losses = {"fused": make_loss("fused", settings.mode, mesh), "dense": make_loss("dense")}
    memory = {name: temporary_bytes(loss, settings, vocab_size, mesh) for name, loss in losses.items()}
    rows = settings.batch_size * settings.context
    needs = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in memory.items())
    console.print(
        f"temporary memory of loss and gradients for {rows:,} x {vocab_size:,} logits "
        f"({4 * rows * vocab_size / 1e6:.2f} MB): {needs}"
    )
    return memory


def train(learner: Learner[T], console: Console, header: str) -> list[Row[T]]:
    """Train under a progress bar, with a row printed every now and then."""
    steps = learner.settings.steps
    row_steps = {math.ceil(steps * i / ROWS) for i in range(1, ROWS + 1)}
    rows: list[Row[T]] = []
    losses: list[float] = []
    console.print(header)
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=steps, loss="")
        started = time.perf_counter()
        for step in range(1, steps + 1):
            losses.append(learner.train_step(step))
            progress.update(task, advance=1, loss=f"loss {losses[-1]:.3f}")
            if step in row_steps:
                validation = learner.test()
                rows.append(Row(step, float(np.mean(losses)), validation, time.perf_counter() - started))
                console.print(str(rows[-1]))
                losses, started = [], time.perf_counter()
    return rows


def work(settings: Settings, data: Path | None, output_dir: Path) -> int:
    """The program in one process; its exit code. The first of several speaks for all."""
    console = Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0)

    def program() -> None:
        run(settings, data=data, output_dir=output_dir, console=console)

    return exit_code(program, UnusableTextError, "Interrupted.")
