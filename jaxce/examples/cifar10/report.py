"""What the CIFAR-10 example says and writes: table rows, the warning at the start, PNG and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxce.diagnostics import Report
from jaxce.diagnostics.findings import CALIBRATION_MARGIN
from jaxce.examples.cifar10.data import NUM_CLASSES
from jaxce.examples.common import start_warning, surroundings

CHANCE_LOSS = math.log(NUM_CLASSES)
HEADER = "epoch   train loss   test loss   accuracy    skill   seconds"


@dataclasses.dataclass(frozen=True)
class EpochRow:
    epoch: int
    train_loss: float  # the training objective, smoothing and mixup included
    test_loss: float
    test_accuracy: float
    seconds: float

    @property
    def skill(self) -> float:
        """0 is guessing, 1 is perfect."""
        return 1 - self.test_loss / CHANCE_LOSS

    def __str__(self) -> str:
        return (
            f"{self.epoch:5d}   {self.train_loss:10.4f}   {self.test_loss:9.4f}   "
            f"{self.test_accuracy:8.2%}   {self.skill:6.3f}   {self.seconds:7.1f}"
        )


def start_message(loss: float) -> str:
    """The loss before training beside that of guessing, and a warning if they are far apart."""
    message = f"loss before training: {loss:.4f}; of guessing: ln {NUM_CLASSES} = {CHANCE_LOSS:.4f}"
    too_high = "The initial logits are too large, or the input is not normalised."
    return message + start_warning(loss, CHANCE_LOSS, "them", "each other", too_high)


def write_history(path: Path, about: dict[str, Any], start_loss: float, rows: Sequence[EpochRow]) -> None:
    """Write the rows, with ``about``: what the run was asked to do, and on which data."""
    history = about | {
        **surroundings(),
        "chance_loss": CHANCE_LOSS,
        "start_loss": start_loss,
        "epochs": [dataclasses.asdict(row) | {"skill": row.skill} for row in rows],
    }
    path.write_text(json.dumps(history, indent=2) + "\n")


def write_report(folder: Path, report: Report) -> None:
    """What the loss on the test images means: its picture and its numbers."""
    report.plot().savefig(folder / "report.png", dpi=120)
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")


def plot_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """How many images of each class (row) were taken for each (column)."""
    from sklearn.metrics import ConfusionMatrixDisplay  # slow to import, needed once

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(confusion, display_labels=class_names)
    display.plot(ax=axes, cmap="Blues", xticks_rotation=45, values_format="d", colorbar=False)
    axes.set(xlabel="taken for", ylabel="class")
    figure.savefig(path, dpi=120)


def in_words(report: Report, confusion: np.ndarray) -> str:
    """Three lines: the loss and the accuracy beside guessing, the classes confused most, and the calibration."""
    side = "below" if report.loss <= report.chance else "above"
    mistakes = np.triu(confusion + confusion.T, 1)  # in either direction
    most = [np.unravel_index(i, mistakes.shape) for i in np.argsort(-mistakes, axis=None, kind="stable")[:3]]
    names = [c.name for c in report.per_class]
    pairs = ", ".join(f"{names[a]} and {names[b]} ({mistakes[a, b]:,} times)" for a, b in most if mistakes[a, b])
    gap = report.confidence - report.accuracy
    kind = "Well calibrated"
    if abs(gap) > CALIBRATION_MARGIN:
        kind = "Too sure of itself" if gap > 0 else "Less sure than it may be"
    return (
        f"Beside guessing: the loss of {report.loss:.3f} is {abs(report.skill):.0%} {side} the {report.chance:.3f} of "
        f"guessing, and {report.accuracy:.1%} of the images are told right, not {1 / report.classes:.0%}.\n"
        f"Most often confused: {pairs or 'none'}.\n"
        f"{kind}: {report.confidence:.1%} sure on average, right {report.accuracy:.1%} of the time; "
        f"{report.expected_calibration_error:.1%} apart among images it is equally sure of."
    )


def plot_history(path: Path, title: str, start_loss: float, rows: Sequence[EpochRow]) -> None:
    epochs = [row.epoch for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    losses, accuracy = figure.subplots(1, 2, sharex=True)

    losses.axhline(CHANCE_LOSS, color="0.5", linestyle="--", label=f"guessing, ln {NUM_CLASSES}")
    losses.plot(epochs, [row.train_loss for row in rows], "o-", label="training objective")
    losses.plot([0, *epochs], [start_loss, *(row.test_loss for row in rows)], "o-", label="test")
    losses.set(ylabel="cross-entropy (nats)", ylim=(0, None))
    losses.legend(loc="upper right", bbox_to_anchor=(1, 0.92))  # clear of the line at the top

    accuracy.axhline(1 / NUM_CLASSES, color="0.5", linestyle="--", label="guessing")
    accuracy.plot(epochs, [row.test_accuracy for row in rows], "o-", color="C1", label="test")
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    accuracy.legend(loc="center right")

    for axes in (losses, accuracy):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
