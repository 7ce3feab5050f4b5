"""The program of the CIFAR-10 example: load, train, save, report, and go on from a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxce.examples.cifar10 import checkpoint
from jaxce.examples.cifar10 import data as datasets
from jaxce.examples.cifar10 import report as reports
from jaxce.examples.cifar10.report import EpochRow
from jaxce.examples.cifar10.training import Settings, Trainer
from jaxce.examples.common import UsageError, make_folder, progress_bar

SAVE_SECONDS = 30.0  # between checkpoints, of which there is one after every epoch too


@dataclasses.dataclass
class Progress:
    """How far a run has come: what its checkpoints hold beside the network."""

    start_loss: float
    rows: list[EpochRow] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)  # of the steps of an epoch that has not ended
    seconds: float = 0.0  # that these took

    @classmethod
    def of(cls, record: dict[str, Any]) -> Progress:
        rows = [EpochRow(**row) for row in record["rows"]]
        return cls(record["start_loss"], rows, record["losses"], record["seconds"])


def run(
    settings: Settings,
    *,
    data_dir: Path,
    output_dir: Path,
    resume: bool = False,
    stop_after: int | None = None,
    console: Console,
) -> list[EpochRow]:
    """Load, train, save. Returns the rows of all epochs, those before a resumption included."""
    make_folder(output_dir)
    checkpoints = checkpoint.Checkpoints(output_dir)
    saved = checkpoints.load(console) if resume else None
    data = datasets.load(data_dir, console).first(settings.train_examples, settings.test_examples)
    trainer = Trainer(data, settings)
    console.print(f"{data}\nnetwork: {trainer.parameters:,} parameters; loss: {settings.loss}")

    about = {"arguments": dataclasses.asdict(settings), "data": str(data)}
    if saved is None:
        progress = Progress(trainer.test()[0])
        console.print(reports.start_message(progress.start_loss))
    else:
        check_settings(saved["record"], about, console)
        checkpoint.restore(trainer.modules, saved)
        progress = Progress.of(saved["record"])
    rows = progress.rows
    last = min(settings.epochs, stop_after or settings.epochs)
    if progress.losses and len(rows) >= last:
        flag = "--epochs" if settings.epochs == last else "--stop-after"
        raise UsageError(
            f"{flag}: expected at least {len(rows) + 1}, the epoch in which the checkpoint is, got {last}."
        )

    def save() -> None:
        checkpoints.save(trainer.step, trainer.modules, about | dataclasses.asdict(progress))

    console.print("\n".join([reports.HEADER, *map(str, rows)]))
    train(trainer, progress, last, save, console)

    title = f"{data.name}, {settings.recipe} recipe, {settings.loss} loss: accuracy {rows[-1].test_accuracy:.1%}"
    reports.plot_history(output_dir / "curves.png", title, progress.start_loss, rows)
    reports.write_history(output_dir / "history.json", about, progress.start_loss, rows)
    report, confusion = trainer.report()
    reports.write_report(output_dir, report)
    reports.plot_confusion(output_dir / "confusion.png", confusion, [c.name for c in report.per_class])
    console.print(
        f"\nWhat the loss on the {len(data.test_labels):,} test images means\n\n{report}\n\n"
        f"{reports.in_words(report, confusion)}\n\n"
        f"Pictures to look at in {output_dir}: curves.png, report.png and confusion.png; beside them history.json, "
        "report.json and checkpoint/"
    )
    return rows


def train(trainer: Trainer, progress: Progress, last: int, save: Callable[[], None], console: Console) -> None:
    """Train and test to the end of epoch ``last`` under a progress bar, printing a row for each."""
    with progress_bar(console) as bar:
        task = bar.add_task("", total=last * trainer.steps_per_epoch, completed=trainer.step, loss="")
        for epoch in range(len(progress.rows) + 1, last + 1):
            bar.update(task, description=f"epoch {epoch}/{last}")
            saved = time.perf_counter()
            started = saved - progress.seconds
            for loss in trainer.train_epoch(epoch, len(progress.losses)):
                progress.losses.append(loss)
                bar.update(task, advance=1, loss=f"loss {loss:.3f}")
                now = time.perf_counter()
                if now - saved >= SAVE_SECONDS and len(progress.losses) < trainer.steps_per_epoch:
                    progress.seconds = now - started
                    save()
                    saved = now
            train_loss = float(np.mean(progress.losses))
            row = EpochRow(epoch, train_loss, *trainer.test(), seconds=time.perf_counter() - started)
            console.print(str(row))
            progress.rows.append(row)
            progress.losses, progress.seconds = [], 0.0
            save()


def check_settings(record: dict[str, Any], about: dict[str, Any], console: Console) -> None:
    """They must be those of the checkpoint, but for the number of epochs."""
    before, now = (x["arguments"] | {"data": x["data"]} for x in (record, about))
    for name, value in now.items():
        if name != "epochs" and value != before.get(name):
            raise UsageError(
                f"--resume: expected {name} {before.get(name)}, as in the checkpoint, got {value}. "
                "Resume with the arguments of the first run, or use another --output-dir."
            )
    if now["epochs"] != before["epochs"]:
        console.print(
            f"The learning rate was planned for {before['epochs']} epochs and now follows a plan "
            f"for {now['epochs']}: the curve will not be that of {now['epochs']} epochs in one go. "
            "(To stop early without that, use --stop-after.)",
            style="yellow",
        )
