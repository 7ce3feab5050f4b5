"""What a report says in words."""

from __future__ import annotations

import math
from typing import Any

FEW = 0.05  # "a few examples": at most this share of them ...
MOST = 0.5  # ... which carry at least this share of the loss
UNIFORM = 1.0001  # times 1/C: the confidence where all logits are equal, up to rounding
CALIBRATION_MARGIN = 0.03  # confidence and accuracy this close are as good as equal
LISTED = 5
KNOWN = 0.1  # nats that the entropy of class frequencies may be off by, for them to be a standard


def findings(report: Any) -> tuple[str, ...]:
    """Sentences, the most important first. `report` is a `Report`."""
    said = [_unknown(report), _probabilities(report)]
    if math.isfinite(report.loss):
        said += [_chance(report), _few(report), _confidence(report)]
    elif math.isinf(report.loss):
        said += ["The loss is infinite: some example's label has probability 0."]
    said += [_absent(report), _never_predicted(report)]
    return tuple(sentence for sentence in said if sentence)


def _unknown(report: Any) -> str:
    if not math.isnan(report.loss):
        return ""
    return (
        "The loss is NaN: there are logits that are NaN or +inf, rows of nothing but -inf, weights that are NaN, "
        "infinite or negative, or labels that are no class. The costliest examples show where."
    )


def _probabilities(report: Any) -> str:
    if report.classes == 1 or report.probability_rows < report.examples:
        return ""
    return (
        "The logits look like probabilities: every row sums to 1. Softmax is applied to logits, and of probabilities "
        "it makes a nearly uniform distribution; use jaxce.cross_entropy_from_probs, or pass jnp.log(probs) here."
    )


def _chance(report: Any) -> str:
    if report.classes == 1 or math.isnan(report.standard_error):  # one example says nothing of it
        return ""
    # The frequencies of few labels tell too much of these very labels: of K classes among n, about (K − 1)/2n (Miller
    # 1955), and of one class alone, all. 2n times what they tell is distributed as χ² of K − 1.
    fitted, twice = sum(c.count > 0 for c in report.per_class) - 1, 2 * report.effective_examples
    known = fitted <= KNOWN * twice and report.prior_chance
    guess = report.prior_chance if known else report.chance
    told = (fitted + 2 * math.sqrt(2 * fitted)) / twice if known else 0
    how = "guessing with the class frequencies" if guess < 0.99 * report.chance else "guessing"
    beaten = guess - report.loss
    beside = f"loss {report.loss:.4g}, guessing {guess:.4g}"
    margin = max(2 * report.standard_error, 1e-3 * guess)
    if beaten < -margin - told:
        confident = report.loss > report.chance + margin or report.confidence > report.accuracy + CALIBRATION_MARGIN
        why = "confident mistakes cost more than the rest gains" if confident else "the probabilities are too even"
        return f"Worse than {how} ({beside}): {why}."
    if beaten <= margin:
        return f"No better than {how} ({beside})."
    share = beaten / guess
    degree = "Far better" if share >= 0.5 else "Better" if share >= 0.1 else "Barely better"
    return f"{degree} than {how} ({beside}): {_percent(share, 0)} of that loss is gone."


def _percent(share: float, digits: int) -> str:
    """With so many digits after the point; with two that are not 0 if it is less than 1 %."""
    return f"{share:.{digits}%}" if share >= 0.01 else f"{100 * share:.2g}%"


def _uniform(report: Any) -> bool:
    return bool(report.classes > 1 and report.confidence * report.classes <= UNIFORM)


def _few(report: Any) -> str:
    total = report.loss * report.weight
    carried = 0.0
    for count, example in enumerate(report.costliest, 1):
        if count > max(1, FEW * report.examples):
            break
        carried += example.cost
        if total > 0 and carried >= MOST * total and report.examples > 2:
            verb = "carries" if count == 1 else "carry"
            return (
                f"A few examples carry most of the loss: {count} of {report.examples:,} examples {verb} "
                f"{carried / total:.0%}. Look at their labels first."
            )
    share = report.wrong_loss * (1 - report.accuracy) / report.loss if report.accuracy < 1 and report.loss else 0
    if share >= MOST and report.accuracy > 0.5:
        return f"The {_percent(1 - report.accuracy, 1)} of wrong predictions carry {share:.0%} of the loss."
    return ""


def _confidence(report: Any) -> str:
    # The first of equals is right by chance, and no temperature changes that; one example says nothing of it.
    if _uniform(report) or math.isnan(report.standard_error):
        return ""
    gap = report.confidence - report.accuracy
    # The share of hits among n examples is itself known to within its standard error only: that of hits which are as
    # likely as the model says, or as frequent as they were.
    variance = max(0, *(p * (1 - p) for p in (report.accuracy, report.confidence)))
    noise = 2 * math.sqrt(variance / report.effective_examples)
    if abs(gap) <= max(CALIBRATION_MARGIN, noise):
        return ""
    kind = "Overconfident" if gap > 0 else "Underconfident"
    return (
        f"{kind}: {report.confidence:.1%} sure on average, right {report.accuracy:.1%} of the time. "
        "Divide the logits by fit_temperature of held-out examples."
    )


def _absent(report: Any) -> str:
    names = [c.name for c in report.per_class if c.count == 0]
    return f"Labels that never occur: {_listed(names)}." if names else ""


def _never_predicted(report: Any) -> str:
    if _uniform(report) or math.isnan(report.accuracy):  # of equals, or of NaN, only the first is
        return ""
    names = [c.name for c in report.per_class if c.count and c.predicted == 0]
    return f"Classes that are never predicted: {_listed(names)}." if names else ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
