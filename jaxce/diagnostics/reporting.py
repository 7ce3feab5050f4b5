"""The report: what a summary comes to, as numbers, as a table, as a dict, as a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxce import checks
from jaxce.diagnostics import plots
from jaxce.diagnostics.findings import findings
from jaxce.diagnostics.summary import LOSS_EDGES, Summary, check_one, summarize
from jaxce.types import ArrayLike, takes_variables

LISTED_CLASSES = 10  # in the printed table; `per_class` has them all
LISTED_EXAMPLES = 5


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """The examples of one label. `chance` is what guessing with the class frequencies costs them: −ln frequency."""

    name: str
    count: int
    frequency: float
    loss: float
    chance: float
    accuracy: float
    predicted: float  # the share of all predictions that name this class


@dataclasses.dataclass(frozen=True)
class ExampleResult:
    """One example; `cost` is its loss times its weight."""

    index: int
    label: str
    predicted: str
    loss: float
    cost: float


@dataclasses.dataclass(frozen=True)
class Bin:
    """The predictions with a confidence in (low, high]; NaN where there are none."""

    low: float
    high: float
    weight: float
    confidence: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Losses of right and of wrong predictions, counted between `edges`; the outer bins are open."""

    edges: tuple[float, ...]
    right: tuple[float, ...]
    wrong: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a loss value means. Losses are in nats; means are weighted if examples are.

    Attributes:
      effective_examples: (Σ w)²/Σ w², how many examples of equal weight would tell as much.
      loss: the mean cross-entropy, and `standard_error`, how far it may be off by the choice of examples (NaN for one).
      chance: the loss of guessing uniformly; `prior_chance`: of guessing with the class frequencies of these labels.
      skill: 1 − loss/chance; `prior_skill`: 1 − loss/prior_chance (NaN if there is one class only).
      accuracy: the share of right predictions; `accuracy_bound`: the least that goes with this loss.
      top_k: for each k, how often the label is among the k largest logits.
      expected_calibration_error, maximum_calibration_error, brier: see `calibration` and `brier`.
      confidence: the mean probability of the predicted class.
      right_loss, wrong_loss: the mean loss of right and of wrong predictions, NaN if there are none.
      per_class, costliest, calibration, histogram: the parts of the picture.
      probability_rows: how many rows of logits look like probabilities.
      findings: all that in words.
    """

    examples: int
    effective_examples: float
    weight: float
    classes: int
    loss: float
    standard_error: float
    perplexity: float
    bits: float
    chance: float
    prior_chance: float
    skill: float
    prior_skill: float
    accuracy: float
    accuracy_bound: float
    top_k: dict[int, float]
    confidence: float
    expected_calibration_error: float
    maximum_calibration_error: float
    brier: float
    right_loss: float
    wrong_loss: float
    per_class: tuple[ClassResult, ...]
    costliest: tuple[ExampleResult, ...]
    calibration: tuple[Bin, ...]
    histogram: Histogram
    probability_rows: int

    @property
    def findings(self) -> tuple[str, ...]:
        return findings(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it; numbers that are not finite become "nan", "inf", "-inf", which float() reads."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self) | {"findings": self.findings})
        return plain

    def plot(self) -> Any:
        """A matplotlib figure: the reliability diagram, the histogram of losses, the loss of each class."""
        return plots.plot(self)

    def __str__(self) -> str:
        within = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.4f}"
        rows = [
            ("examples", f"{self.examples:,} of {self.classes:,} classes"),
            (
                "loss",
                f"{self.loss:.4f}{within} nats: {self.bits:.4f} bits, perplexity {self.perplexity:.4g}",
            ),
            ("guessing", f"{self.chance:.4f} uniformly, {self.prior_chance:.4f} with the class frequencies"),
            ("skill", f"{self.skill:z.4f} and {self.prior_skill:z.4f} (0 is guessing, 1 is perfect)"),
            ("accuracy", f"{self.accuracy:.2%}, at least {self.accuracy_bound:.2%} at this loss"),
            *((f"top-{k}", f"{share:.2%}") for k, share in self.top_k.items()),
            ("loss if right", f"{self.right_loss:.4f}"),
            ("loss if wrong", f"{self.wrong_loss:.4f}"),
            ("confidence", f"{self.confidence:.2%} on average"),
            (
                "calibration",
                f"{self.expected_calibration_error:.4f} expected error, {self.maximum_calibration_error:.4f} maximum",
            ),
            ("Brier score", f"{self.brier:.4f}"),
        ]
        parts = ["\n".join(f"{name:<15}{value}" for name, value in rows)]
        classes = sorted((c for c in self.per_class if c.count), key=lambda c: (not math.isnan(c.loss), -c.loss))
        some = " that cost most" if len(classes) > LISTED_CLASSES else ""
        parts.append(
            _table(
                (f"classes{some}", "examples", "loss", "chance", "accuracy"),
                [
                    (c.name, f"{c.count:,}", f"{c.loss:.4f}", f"{c.chance:.4f}", f"{c.accuracy:.2%}")
                    for c in classes[:LISTED_CLASSES]
                ],
            )
        )
        parts.append(
            _table(
                ("costliest", "loss", "label", "predicted"),
                [(f"{e.index}", f"{e.loss:.4f}", e.label, e.predicted) for e in self.costliest[:LISTED_EXAMPLES]],
            )
        )
        parts.append("\n".join(self.findings))
        return "\n\n".join(part for part in parts if part)


def finish(summary: Summary, *, class_names: Sequence[str] | None = None) -> Report:
    r"""The report of a summary.

    .. math::
        \bar\ell = \frac{\sum_n w_n \ell_n}{\sum_n w_n}

    Args:
      summary: what `summarize` and `merge` made; outside of jit.
      class_names: V names, for the tables and the picture; without, classes have their numbers.

    Returns:
      A `Report`.

    Raises:
      TypeError: inside of a transformation.
      ValueError: no example counts, or 2³¹ or more; several summaries, stacked; the names are not as many as the
        classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxce import diagnostics
      >>> summary = diagnostics.summarize(jnp.array([[0.0, 2.0], [1.0, 0.0]]), jnp.array([1, 1]))
      >>> print(diagnostics.finish(summary, class_names=["no", "yes"]).costliest[0].predicted)
      no

    Note:
      Computed from the sums in float64.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(summary)):
        hint = "Return the summary from the function that is compiled, and finish it outside."
        checks.fail(TypeError, "summary", "numbers", "a traced summary", hint)
    check_one("summary", summary)
    s: Any = jax.tree.map(np.asarray, summary)
    s = jax.tree.map(lambda x: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x, s)
    if s.seen < 0:
        hint = "Finish the summaries of parts of them."
        checks.fail(ValueError, "summary", "at most 2**31 - 1 examples", "more, which wrapped around", hint)
    if s.examples == 0:
        hint = "All are ignored or weigh nothing."
        checks.fail(ValueError, "summary", "at least one example that counts", f"none among {int(s.seen):,}", hint)
    size = s.class_weight.shape[0]
    if class_names is not None and len(class_names) != size:
        checks.fail(ValueError, "class_names", f"{size} names, one per class", f"{len(class_names)}")
    names = [str(n) for n in class_names] if class_names is not None else [str(c) for c in range(size)]

    def name(index: int) -> str:
        return names[index] if 0 <= index < size else "no class"

    with np.errstate(all="ignore"):  # 0/0 is NaN where there is nothing
        weight = s.class_weight.sum() + s.unattributed
        loss = (s.right_loss + s.wrong_loss) / weight
        # Of few wrong predictions among millions, a difference of large sums would leave nothing.
        right, wrong = s.right_histogram.sum(), s.wrong_histogram.sum()
        unknown = 0 * (s.class_hits.sum() + s.unattributed)  # or NaN
        squares = s.weight_squares if 0 < s.weight_squares < np.inf else math.nan  # float32 does not hold all
        effective = np.clip(weight**2 / squares, 1, s.examples)
        variance = np.maximum(s.loss_squares / weight - loss**2, 0)
        error = np.sqrt(variance / (effective - 1)) if effective > 1 + 1e-6 else math.nan  # float32 has no more digits
        frequency = s.class_weight / weight
        surprise = -np.log(frequency) + 0.0  # not -0.0 where there is one class
        prior_chance = float(np.sum(np.where(frequency == 0, 0, frequency * surprise)))
        chance = math.log(size)
        reliability = s.calibration
        gap = np.abs(reliability.confidences - reliability.hits)
        class_loss, class_accuracy = s.class_loss / s.class_weight, s.class_hits / s.class_weight
        confidence, accuracy = reliability.confidences / reliability.weight, reliability.hits / reliability.weight
        edges = np.linspace(0, 1, len(gap) + 1)
        return Report(
            examples=int(s.examples),
            effective_examples=float(effective),
            weight=float(weight),
            classes=size,
            loss=float(loss),
            standard_error=float(error),
            perplexity=float(np.exp(loss)),
            bits=float(loss / np.log(2)),
            chance=chance,
            prior_chance=prior_chance,
            skill=float(1 - np.float64(loss) / chance) if chance else math.nan,
            prior_skill=float(1 - np.float64(loss) / prior_chance) if prior_chance else math.nan,
            accuracy=float(right / (right + wrong) + unknown),
            accuracy_bound=float(np.maximum(1 - loss / np.log(2), 0)),
            top_k={k: float(h / weight) for k, h in s.top_k_hits.items()},
            confidence=float(reliability.confidences.sum() / weight),
            expected_calibration_error=float(gap.sum() / weight),
            maximum_calibration_error=float(np.max(np.where(reliability.weight == 0, 0, gap / reliability.weight))),
            brier=float(s.brier / weight),
            right_loss=float(s.right_loss / right),
            wrong_loss=float(s.wrong_loss / wrong),
            per_class=tuple(
                ClassResult(
                    names[c],
                    int(s.class_examples[c]),
                    float(frequency[c]),
                    float(class_loss[c]),
                    float(surprise[c]),
                    float(class_accuracy[c]),
                    float(s.predicted_weight[c] / weight),
                )
                for c in range(size)
            ),
            costliest=tuple(
                ExampleResult(int(i), name(int(label)), name(int(predicted)), float(loss), float(cost))
                for i, label, predicted, loss, cost in zip(
                    s.costliest.example,
                    s.costliest.label,
                    s.costliest.prediction,
                    s.costliest.loss,
                    s.costliest.cost,
                    strict=True,
                )
                if cost != -1
            ),
            calibration=tuple(
                Bin(*map(float, row))
                for row in zip(edges[:-1], edges[1:], reliability.weight, confidence, accuracy, strict=True)
            ),
            histogram=Histogram(
                tuple(map(float, LOSS_EDGES)),
                tuple(map(float, s.right_histogram)),
                tuple(map(float, s.wrong_histogram)),
            ),
            probability_rows=int(s.probability_rows),
        )


@takes_variables
def report(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    top_k: int | tuple[int, ...] | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    num_bins: int = 15,
    num_costliest: int = 10,
) -> Report:
    r"""What the loss of these predictions means: beside guessing, accuracy, confidence, class by class, in words.

    .. math::
        \text{skill} = 1 - \ell / \ln C, \qquad \text{accuracy} \ge 1 - \ell / \ln 2

    Args:
      logits: floats `[..., V]`; of probabilities, their logarithm.
      targets: integers `[...]`, class indices.
      class_names: V names, for the tables and the picture.
      top_k: one or several k; None: 5 if there are more classes than that.
      weights: numbers that broadcast to `[...]`, >= 0.
      ignore_index: examples with this label count nowhere.
      num_bins: of confidence.
      num_costliest: how many of the examples with the largest costs, weight times loss, to keep.

    Returns:
      A `Report`, which prints as a table; `to_dict()` and `plot()` give the rest. A NaN logit or a label that is no
      class makes the numbers it enters NaN.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range, or no example counts; inside of jit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxce import diagnostics
      >>> found = diagnostics.report(jnp.log(jnp.array([[0.1, 0.5, 0.1, 0.1, 0.2]])), jnp.array([0]))
      >>> print(f"{found.loss:.6f} {found.skill:.4f} {found.costliest[0].predicted}")
      2.302585 -0.4307 1

    Note:
      Batch by batch: `summarize` each, `merge` them, and `finish`. For the sources of the parts see there.
    """
    options: dict[str, Any] = {"weights": weights, "ignore_index": ignore_index, "top_k": top_k}
    summary = summarize(logits, targets, num_bins=num_bins, num_costliest=num_costliest, **options)
    return finish(summary, class_names=class_names)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """The first column to the left, the others to the right."""
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "   ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    )


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
