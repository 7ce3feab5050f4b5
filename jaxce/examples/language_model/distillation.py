"""Distillation in the language-model example: a student that learns from a teacher, beside one of text alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxce
from jaxce.examples.language_model.data import Dataset
from jaxce.examples.language_model.model import HEAD_SIZE, LanguageModel
from jaxce.examples.language_model.report import Measures, Row, Yardsticks, panels
from jaxce.examples.language_model.training import Settings, Trainer, make_train_step
from jaxce.types import Mode


class Comparison(NamedTuple):
    """How well both students predict a text."""

    text: Measures
    distilled: Measures

    def __str__(self) -> str:
        return "   ".join(f"{student.loss:10.4f}   {student.bits_per_byte:13.3f}" for student in self)

    def as_dict(self) -> dict[str, Any]:
        return {name: student.as_dict() for name, student in self._asdict().items()}


class Students:
    """Two students from the same weights, on the same batches: one learns from text, one from the teacher."""

    name = "students"
    header = "  step   divergence   text alone   bits per byte    distilled   bits per byte   seconds"

    def __init__(self, teacher: Trainer) -> None:
        self.teacher = teacher.model
        self.data: Dataset = teacher.data
        self.settings = student_settings(teacher.settings)
        self.text, self.distilled = (Trainer(self.data, self.settings) for _ in range(2))
        self._distil = make_train_step(make_objective(self.settings.mode))

    def train_step(self, step: int) -> float:
        """Train both; returns the divergence of one of them from the teacher."""
        self.text.train_step(step)
        student = self.distilled
        return float(self._distil(student.model, student.optimizer, self.teacher, student.batch(step)))

    def test(self) -> Comparison:
        return Comparison(self.text.test(), self.distilled.test())

    def start_message(self, start: Comparison) -> str:
        yardsticks = Yardsticks(self.data.tokenizer.vocab_size, self.data.unigram_entropy)
        return (
            f"\ntwo students of width {self.settings.width}, layers: {self.settings.layers}, {self.text.parameters:,} "
            f"parameters each: one learns from text alone, one from the network above\n"
            f"{yardsticks.start_message(start.distilled.loss)}"
        )

    def closing(self, rows: Sequence[Row[Comparison]]) -> str:
        text, distilled = rows[-1].validation
        nats, bits = text.loss - distilled.loss, text.bits_per_byte - distilled.bits_per_byte
        return (
            f"After {rows[-1].step:,} steps each, distillation is {abs(nats):.4f} nats per token ({abs(bits):.3f} bits "
            f"per byte) {'ahead of' if nats > 0 else 'behind'} text alone."
        )

    def plot(
        self,
        path: Path,
        title: str,
        teacher: Sequence[Row[Measures]],
        start: Comparison,
        rows: Sequence[Row[Comparison]],
    ) -> None:
        """Both curves, and the level that the teacher reached."""
        steps = [0, *(row.step for row in rows)]
        found = [start, *(row.validation for row in rows)]
        with panels(path, title) as both:
            for axes, measure, label in zip(
                both, ("loss", "bits_per_byte"), ("validation loss (nats per token)", "bits per byte"), strict=True
            ):
                level = getattr(teacher[-1].validation, measure)
                axes.axhline(level, color="0.5", linestyle="--", label="the teacher, at its end")
                for name, student in ("text", "student of text alone"), ("distilled", "student of the teacher"):
                    axes.plot(steps, [getattr(getattr(x, name), measure) for x in found], "o-", label=student)
                axes.set(ylabel=label, ylim=(0, None))


def student_settings(settings: Settings) -> Settings:
    """Half the width and half the layers, as far as they can be halved."""
    return dataclasses.replace(settings, width=max(settings.width // 2, HEAD_SIZE), layers=max(settings.layers // 2, 1))


def make_objective(mode: Mode | None) -> Callable[..., jax.Array]:
    """The mean divergence ``(student, teacher, windows)`` of the student from the teacher.

    By blocks of the vocabulary unless another mode is asked for: a batch of the example is one block of tokens, so
    "store" would hold its logits.
    """

    def objective(student: LanguageModel, teacher: LanguageModel, windows: jax.Array) -> jax.Array:
        tokens = windows[:, :-1]
        return jaxce.linear_distillation_loss(
            student(tokens),
            student.table,
            teacher(tokens),
            teacher.table,
            vocab_axis=0,
            divergence="forward_kl",
            mode=mode or "recompute",
            reduction="mean",
        )

    return objective
