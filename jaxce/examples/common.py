"""What the examples share: how a program ends, argument types, the progress bar, the loss to expect at the start."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Logits spread with deviation s before training cost about s²/2 above chance. A loss half a nat off
# thus means a deviation above 1: sure of itself before it has seen anything. No untrained network
# is that far below chance.
START_MARGIN = 0.5


class UsageError(Exception):
    """Arguments that do not fit the data or the checkpoint."""


def exit_code(program: Callable[[], int | None], problem: type[Exception], interrupted: str) -> int:
    """Run a program; what the user can mend is told in a line, without a traceback."""
    try:
        return program() or 0
    except (UsageError, problem) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130


def checked(kind: type[int] | type[float], expected: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type whose complaint says what was expected."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


positive_integer = checked(int, "a whole number from 1 up", lambda n: n >= 1)
natural_number = checked(int, "a whole number from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # leave a log file with the rows alone
    )


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # or a run would find out at its end
    except OSError as problem:
        raise UsageError(f"--output-dir: expected a folder, got {path}: {problem.strerror}.") from problem


def parameter_count(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def start_warning(loss: float, chance: float, subject: str, guessing: str, too_high: str) -> str:
    """A line for a loss before training that is not that of guessing; nothing for one that is."""
    if abs(loss - chance) <= START_MARGIN:
        return ""
    too_low = "A network that has seen nothing cannot know that much: are these weights trained?"
    hint = too_low if loss < chance else too_high
    return f"\nWarning: expected {subject} within {START_MARGIN} of {guessing}. {hint}"


def surroundings(*packages: str) -> dict[str, dict[str, str | int | None]]:
    """The versions of Python, of what both examples use and of `packages`, and the machine."""
    found: dict[str, str | int | None] = {"python": platform.python_version()}
    for package in ("jaxce", "jax", "jaxlib", "flax", "optax", "numpy", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # jaxce itself, run from a checkout
    return {"versions": found, "machine": {"platform": platform.platform(), "cpu_count": os.cpu_count()}}
