"""What the examples share: argument types, the progress bar, what a loss at the start may be, versions."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Logits spread with deviation s before training cost about s²/2 above chance. A loss half a nat off
# thus means a deviation above 1: sure of itself before it has seen anything. No untrained network
# is that far below chance.
START_MARGIN = 0.5


class UsageError(Exception):
    """Arguments that do not fit the data or the checkpoint."""


def exit_code(program: Callable[[], None], problem: type[Exception], interrupted: str) -> int:
    """Run a program; what the user can mend is told in a line, without a traceback."""
    try:
        program()
    except (UsageError, problem) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    return 0


def checked(kind: type[int] | type[float], expected: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type whose complaint says what was expected."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


positive_integer = checked(int, "a whole number from 1 up", lambda n: n >= 1)
natural_number = checked(int, "a whole number from 0 up", lambda n: n >= 0)


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


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("jaxce", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # jaxce itself, run from a checkout
    return found
