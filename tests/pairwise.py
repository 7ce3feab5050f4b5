"""Few combinations of parameters instead of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any


def pairwise(*axes: Iterable[Any], allowed: Callable[..., bool] = lambda *row: True) -> list[tuple[Any, ...]]:
    """Rows with one value of each axis, in which every pair of values of two axes occurs that an allowed row can have.

    Most faults need two options to meet, hardly one three; `tests.sweep` draws from all combinations.
    """
    rows = [row for row in itertools.product(*axes) if allowed(*row)]
    chosen, missing = [], {pair for row in rows for pair in _pairs(row)}
    while missing:
        best = max(rows, key=lambda row: len(missing & _pairs(row)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(row: tuple[Any, ...]) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(row), 2))
