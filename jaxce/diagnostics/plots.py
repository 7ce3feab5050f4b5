"""The picture of a report. Needs matplotlib, which is imported when a picture is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_CLASSES = 20  # bars that can still be read
RIGHT, WRONG, REFERENCE = "#0072B2", "#D55E00", "0.35"  # Okabe and Ito's blue and vermilion, and grey


def plot(report: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = 'Report.plot() needs matplotlib: pip install "jaxce[plot]". print(report) works without.'
        raise ImportError(message) from error

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    figure.suptitle(
        f"loss {report.loss:.4g}, guessing {report.chance:.4g}, "
        f"skill {report.skill:.3f}, accuracy {report.accuracy:.1%}"
    )
    reliability, histogram, classes = figure.subplots(1, 3)
    _reliability(reliability, report)
    _histogram(histogram, report)
    _classes(classes, report)
    return figure


def _reliability(axes: Any, report: Any) -> None:
    low, high, weight, accuracy = np.array([(b.low, b.high, b.weight, b.accuracy) for b in report.calibration]).T
    confidence = np.array([b.confidence for b in report.calibration])
    some = np.isfinite(accuracy)
    shares = np.nan_to_num(weight / np.nansum(weight))
    axes.bar(low, shares, high - low, align="edge", color="0.85", label="share of examples")
    axes.plot([0, 1], [0, 1], "--", color=REFERENCE, label="perfectly calibrated")
    axes.plot(confidence[some], accuracy[some], "o-", color=RIGHT, label="model")
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1.3),  # room for the legend
        yticks=np.linspace(0, 1, 6),
        xlabel="confidence",
        ylabel="accuracy of the bin",
        title=f"Reliability: expected calibration error {report.expected_calibration_error:.3f}",
    )
    axes.legend(loc="upper center", ncols=2)


def _histogram(axes: Any, report: Any) -> None:
    edges = np.array(report.histogram.edges)
    step = edges[1] / edges[0]
    edges = np.concatenate([edges[:1] / step, edges, edges[-1:] * step])  # the open bins, drawn as wide as the others
    right, wrong = np.array(report.histogram.right), np.array(report.histogram.wrong)
    filled = np.flatnonzero(right + wrong)
    used = slice(filled[0], filled[-1] + 1) if filled.size else slice(0, len(right))
    left, width = edges[:-1][used], np.diff(edges)[used]
    axes.bar(left, right[used], width, align="edge", color=RIGHT, label="right")
    axes.bar(left, wrong[used], width, bottom=right[used], align="edge", color=WRONG, hatch="//", edgecolor="white",
             linewidth=0, label="wrong")  # fmt: skip
    if np.isfinite(report.loss):
        axes.axvline(report.loss, ymax=0.74, color="black", label=f"mean, {report.loss:.3g}")
    axes.axvline(report.chance, ymax=0.74, color=REFERENCE, linestyle="--", label=f"guessing, {report.chance:.3g}")
    axes.set(
        xscale="log",
        xlabel="loss of an example (nats)",
        ylabel="examples",
        title="Losses of right and wrong predictions",
        ylim=(0, 1.4 * (float(np.nanmax(right + wrong)) or 1.0)),  # room for the legend, whatever the shape
    )
    axes.legend(loc="upper center", ncols=2)
    _few_ticks(axes.xaxis, *axes.get_xlim())


def _few_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers that do not run into each other: matplotlib labels every digit where a log axis is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    decades = np.log10(high / low)
    digits = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _classes(axes: Any, report: Any) -> None:
    seen = sorted((c for c in report.per_class if c.count and np.isfinite(c.loss)), key=lambda c: -c.loss)
    shown = seen[:MAX_CLASSES]
    places = np.arange(len(shown))
    axes.barh(places, [c.loss for c in shown], color=RIGHT)
    axes.plot([c.chance for c in shown], places, "D", color="white", markeredgecolor="black")
    names = [c.name if len(c.name) <= 18 else c.name[:17] + "…" for c in shown]
    axes.set_yticks(places, names, parse_math=False)
    axes.invert_yaxis()
    some = f", the {MAX_CLASSES} of {len(seen):,} that cost most" if len(seen) > MAX_CLASSES else ""
    title = f"Loss by class{some} (◇ guessing by frequency)"
    axes.set(xlabel="loss (nats)", ylabel="class", title=title, xlim=(0, None))
