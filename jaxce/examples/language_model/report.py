"""What the language-model example says and writes: table rows, the warning at the start, PNG and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxce.examples.common import start_warning, surroundings

HEADER = "  step   train loss   validation loss   perplexity   bits per byte   seconds"


def bits_per_byte(nats: float, byte_count: int) -> float:
    """What it takes to write down text of so many bytes whose tokens cost so many nats in all.

    Unlike a loss per token, this can be compared between vocabularies. Plain bytes are 8.
    """
    return nats / math.log(2) / byte_count


class Tested(Protocol):
    """What held-out text says of a network; as a string, its columns in a row."""

    def as_dict(self) -> dict[str, Any]: ...


T = TypeVar("T", bound=Tested)


class Measures(NamedTuple):
    """How well a text is predicted."""

    loss: float  # per token, in nats
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """Guessing among so many tokens, all alike, would cost as much."""
        return math.inf if self.loss > 700 else math.exp(self.loss)  # of a run that diverges

    def __str__(self) -> str:
        return f"{self.loss:15.4f}   {self.perplexity:10.2f}   {self.bits_per_byte:13.3f}"

    def as_dict(self) -> dict[str, float]:
        return {
            "validation_loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


@dataclasses.dataclass(frozen=True)
class Row(Generic[T]):
    step: int
    train_loss: float  # the mean since the row before
    validation: T
    seconds: float  # since the row before

    def __str__(self) -> str:
        return f"{self.step:6d}   {self.train_loss:10.4f}   {self.validation}   {self.seconds:7.1f}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "train_loss": self.train_loss,
            **self.validation.as_dict(),
            "seconds": self.seconds,
        }


@dataclasses.dataclass(frozen=True)
class Yardsticks:
    """Losses of guessing, in nats per token, to measure others by."""

    vocab_size: int
    unigram_entropy: float

    @property
    def chance_loss(self) -> float:
        return math.log(self.vocab_size)

    def start_message(self, loss: float) -> str:
        """The loss before training beside those of guessing, and a warning if it is not that of guessing."""
        message = (
            f"loss before training: {loss:.4f}; of guessing: ln {self.vocab_size} = {self.chance_loss:.4f}; "
            f"of knowing how frequent each token is: {self.unigram_entropy:.4f}"
        )
        guessing = f"ln {self.vocab_size}"
        return message + start_warning(loss, self.chance_loss, "it", guessing, "The initial logits are too large.")


def write_history(
    path: Path, about: dict[str, Any], yardsticks: Yardsticks, start: Measures, rows: Sequence[Row[Measures]]
) -> None:
    """Write the rows, with ``about``: what the run was asked to do, and on which data."""
    history = about | {
        **surroundings("tokenizers"),
        "chance_loss": yardsticks.chance_loss,
        "unigram_entropy": yardsticks.unigram_entropy,
        "start": start._asdict(),
        "rows": [row.as_dict() for row in rows],
    }
    path.write_text(json.dumps(history, indent=2) + "\n")


@contextlib.contextmanager
def panels(path: Path, title: str, count: int = 2) -> Iterator[list[Axes]]:
    """Empty panels side by side, by step; written to ``path`` once they are filled."""
    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    figure.suptitle(title)
    filled = list(figure.subplots(1, count, sharex=True))
    yield filled
    for axes in filled:
        axes.set(xlabel="step")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="lower left")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_history(
    path: Path, title: str, yardsticks: Yardsticks, start: Measures, rows: Sequence[Row[Measures]]
) -> None:
    steps = [row.step for row in rows]
    validation = [start, *(row.validation for row in rows)]
    with panels(path, title) as (losses, bits):
        losses.axhline(
            yardsticks.chance_loss, color="0.5", linestyle="--", label=f"guessing, ln {yardsticks.vocab_size}"
        )
        losses.axhline(yardsticks.unigram_entropy, color="0.5", linestyle=":", label="token frequencies alone")
        losses.plot(steps, [row.train_loss for row in rows], "o-", label="training, since the point before")
        losses.plot([0, *steps], [measures.loss for measures in validation], "o-", label="validation")
        losses.set(ylabel="cross-entropy (nats per token)", ylim=(0, None))

        bits.plot(
            [0, *steps], [measures.bits_per_byte for measures in validation], "o-", color="C1", label="validation"
        )
        bits.set(ylabel="bits per byte", ylim=(0, None))
