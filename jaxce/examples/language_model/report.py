"""What the language-model example says and writes: table rows, the warning at the start, PNG and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from jaxce.examples.common import start_warning, surroundings

HEADER = "  step   train loss   validation loss   perplexity   bits per byte   seconds"


def bits_per_byte(nats: float, byte_count: int) -> float:
    """What it takes to write down text of so many bytes whose tokens cost so many nats in all.

    Unlike a loss per token, this can be compared between vocabularies. Plain bytes are 8.
    """
    return nats / math.log(2) / byte_count


class Measures(NamedTuple):
    """How well a text is predicted."""

    loss: float  # per token, in nats
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """Guessing among so many tokens, all alike, would cost as much."""
        return math.exp(self.loss)


@dataclasses.dataclass(frozen=True)
class Row:
    step: int
    train_loss: float  # the mean since the row before
    validation: Measures
    seconds: float  # since the row before

    def __str__(self) -> str:
        return (
            f"{self.step:6d}   {self.train_loss:10.4f}   {self.validation.loss:15.4f}   "
            f"{self.validation.perplexity:10.2f}   {self.validation.bits_per_byte:13.3f}   {self.seconds:7.1f}"
        )

    def as_dict(self) -> dict[str, float]:
        return {
            "step": self.step,
            "train_loss": self.train_loss,
            "validation_loss": self.validation.loss,
            "perplexity": self.validation.perplexity,
            "bits_per_byte": self.validation.bits_per_byte,
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
    path: Path, about: dict[str, Any], yardsticks: Yardsticks, start: Measures, rows: Sequence[Row]
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


def plot_history(path: Path, title: str, yardsticks: Yardsticks, start: Measures, rows: Sequence[Row]) -> None:
    steps = [row.step for row in rows]
    validation = [start, *(row.validation for row in rows)]
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    losses, bits = figure.subplots(1, 2, sharex=True)

    losses.axhline(yardsticks.chance_loss, color="0.5", linestyle="--", label=f"guessing, ln {yardsticks.vocab_size}")
    losses.axhline(yardsticks.unigram_entropy, color="0.5", linestyle=":", label="token frequencies alone")
    losses.plot(steps, [row.train_loss for row in rows], "o-", label="training, since the point before")
    losses.plot([0, *steps], [measures.loss for measures in validation], "o-", label="validation")
    losses.set(ylabel="cross-entropy (nats per token)", ylim=(0, None))
    losses.legend(loc="lower left")

    bits.plot([0, *steps], [measures.bits_per_byte for measures in validation], "o-", color="C1", label="validation")
    bits.set(ylabel="bits per byte", ylim=(0, None))
    bits.legend(loc="lower left")

    for axes in (losses, bits):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
