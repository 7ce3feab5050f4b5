"""The committed notebooks were run from top to bottom and show nothing but what a reader should see."""

from __future__ import annotations

import copy
import json
import pathlib
import re
from typing import Any

import pytest

NOTEBOOKS = sorted(pathlib.Path(__file__).parents[1].glob("notebooks/*.ipynb"))
ROOTS = "home|root|Users|tmp|work|usr|opt|var|mnt|srv|private"
PATH = re.compile(rf"(?<![\w.:/])/({ROOTS})/|[A-Z]:\\|site-packages|ipykernel_")
PICTURES = ("image/png", "image/jpeg")


def texts(cell: dict[str, Any]) -> list[str]:
    """What a cell says, its pictures left out."""
    found = ["".join(cell["source"])]
    for output in cell.get("outputs", []):
        found.append("".join(output.get("text", "")))
        found += ["".join(text) for kind, text in output.get("data", {}).items() if kind not in PICTURES]
    return found


def problems(notebook: dict[str, Any]) -> list[str]:
    found = []
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("cells were not run once each, from the top")
    for number, cell in enumerate(code, 1):
        if not cell["outputs"]:
            found.append(f"code cell {number} has no output")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"code cell {number} ends in {output['ename']}")
            if output.get("name") == "stderr":
                found.append(f"code cell {number} writes to stderr")
    for cell in notebook["cells"]:
        for text in texts(cell):
            if match := PATH.search(text):
                found.append(f"a path of some machine: {text[match.start() : match.end() + 20]!r}")
            if "Warning" in text:
                found.append("a warning")
        if "execution" in cell["metadata"]:
            found.append("times of execution, which change in every run")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_was_run_from_the_top(path):
    assert problems(json.loads(path.read_text())) == []


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1-", "2-", "3-", "4-"]


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": [text]}


BROKEN = {
    "not run once each": lambda cell: cell.update(execution_count=3),
    "from the top": lambda cell: cell.update(execution_count=None),
    "no output": lambda cell: cell.update(outputs=[]),
    "ends in ValueError": lambda cell: cell["outputs"].append({"output_type": "error", "ename": "ValueError"}),
    "stderr": lambda cell: cell["outputs"].append(stream("hm", "stderr")),
    "path of some machine": lambda cell: cell["outputs"].append(stream("wrote /home/someone/x.png")),
    "a path": lambda cell: cell.update(source=["open('/tmp/x')"]),
    "a warning": lambda cell: cell["outputs"].append(stream("UserWarning: x")),
    "times of execution": lambda cell: cell["metadata"].update(execution={}),
}


@pytest.mark.parametrize("complaint", BROKEN)
def test_what_is_wrong_with_a_notebook_is_found(complaint):
    good = {
        "cells": [
            {"cell_type": "markdown", "metadata": {}, "source": ["text, and/or https://example.org/home/x"]},
            {"cell_type": "code", "metadata": {}, "source": ["1"], "execution_count": 1, "outputs": [stream("1 kB/s")]},
        ]
    }
    assert problems(good) == []
    broken = copy.deepcopy(good)
    BROKEN[complaint](broken["cells"][1])
    assert len(problems(broken)) == 1
    assert complaint in problems(broken)[0]
