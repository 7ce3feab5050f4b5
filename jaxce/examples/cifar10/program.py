"""The program of the CIFAR-10 example: load, train, save, report, and go on from a checkpoint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from jaxce.examples.cifar10 import data as datasets
from jaxce.examples.cifar10 import report as reports
from jaxce.examples.cifar10.checkpoint import Checkpoint
from jaxce.examples.cifar10.report import EpochRow
from jaxce.examples.cifar10.training import Settings, Trainer
from jaxce.examples.common import UsageError, progress_bar


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
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(output_dir)
    if resume and checkpoint.epoch is None:
        raise UsageError(
            f"--resume: expected a checkpoint in {checkpoint.path}, found none. "
            "Run without --resume first, or name the --output-dir of that run."
        )
    data = datasets.load(data_dir, console)
    data = data.first(settings.train_examples, settings.test_examples)
    trainer = Trainer(data, settings)
    console.print(f"{data}\nnetwork: {trainer.parameters:,} parameters; loss: {settings.loss}")

    if resume:
        start_loss, rows = restore(checkpoint, trainer, console)
    else:
        start_loss, rows = trainer.test()[0], []
        console.print(reports.start_message(start_loss))

    about = {"arguments": dataclasses.asdict(settings), "data": str(data)}

    def on_epoch(row: EpochRow) -> None:
        rows.append(row)
        console.print(str(row))
        record = about | {"start_loss": start_loss, "rows": [dataclasses.asdict(r) for r in rows]}
        checkpoint.save(row.epoch, trainer.modules, record)

    console.print("\n".join([reports.HEADER, *map(str, rows)]))
    last = min(settings.epochs, stop_after or settings.epochs)
    train(trainer, range(len(rows) + 1, last + 1), on_epoch, console)

    title = f"{data.name}, {settings.recipe} recipe, {settings.loss} loss: accuracy {rows[-1].test_accuracy:.1%}"
    reports.plot_history(output_dir / "curves.png", title, start_loss, rows)
    reports.write_history(output_dir / "history.json", about, start_loss, rows)
    report = trainer.report()
    console.print(f"\nWhat the loss on the {len(data.test_labels):,} test images means\n\n{report}\n")
    reports.write_report(output_dir, report)
    console.print(f"wrote curves.png, report.png, history.json, report.json and checkpoint/ to {output_dir}")
    return rows


def train(trainer: Trainer, epochs: range, on_epoch: Callable[[EpochRow], None], console: Console) -> None:
    """Train and test for the given epochs under a progress bar; each row goes to ``on_epoch``."""
    with progress_bar(console) as progress:
        total = len(epochs) * trainer.steps_per_epoch
        task = progress.add_task("", total=total, loss="")
        for epoch in epochs:
            progress.update(task, description=f"epoch {epoch}/{epochs[-1]}")
            started = time.perf_counter()
            train_loss = trainer.train_epoch(
                epoch, on_step=lambda loss: progress.update(task, advance=1, loss=f"loss {loss:.3f}")
            )
            test_loss, test_accuracy = trainer.test()
            seconds = time.perf_counter() - started
            on_epoch(EpochRow(epoch, train_loss, test_loss, test_accuracy, seconds))


def restore(checkpoint: Checkpoint, trainer: Trainer, console: Console) -> tuple[float, list[EpochRow]]:
    """Put the trainer where the checkpoint left off; the loss at the start, and the rows so far.

    The settings must be those of the checkpoint, but for the number of epochs.
    """
    record = checkpoint.record()
    before = record["arguments"] | {"data": record["data"]}
    now = dataclasses.asdict(trainer.settings) | {"data": str(trainer.data)}
    for name, value in now.items():
        if name != "epochs" and value != before[name]:
            raise UsageError(
                f"--resume: expected {name} {before[name]}, as in {checkpoint.path}, got {value}. "
                "Resume with the arguments of the first run, or use another --output-dir."
            )
    if now["epochs"] != before["epochs"]:
        console.print(
            f"The learning rate was planned for {before['epochs']} epochs and now follows a plan "
            f"for {now['epochs']}: the curve will not be that of {now['epochs']} epochs in one go. "
            "(To stop early without that, use --stop-after.)",
            style="yellow",
        )
    checkpoint.restore(trainer.modules)
    return record["start_loss"], [EpochRow(**row) for row in record["rows"]]
