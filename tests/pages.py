"""The code on a page, run as a reader runs it: from the top, in one namespace."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re

import jax
import numpy as np

_BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n\n)?^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.S | re.M)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def blocks(text: str) -> list[tuple[str, str, str]]:
    """What each block needs that may not be there, its code, and what it prints, if anything."""
    found = _BLOCK.findall(text)
    assert len(found) == text.count("```python") > 0
    return found


def run(text: str) -> None:
    """Every block prints what follows it, but for those that need what is not there."""
    namespace: dict = {"__name__": "__main__"}
    with (
        jax.numpy_dtype_promotion("standard"),  # this and the rest as a reader has it
        jax.numpy_rank_promotion("allow"),
        np.printoptions(precision=8, suppress=False, linewidth=75),
    ):
        for needed, code, expected in blocks(text):
            if needed and not installed(needed):
                continue
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            assert out.getvalue().strip() == expected.strip(), f"{code}\n# prints\n{out.getvalue()}"
