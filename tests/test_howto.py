"""The code of each how-to page runs and prints what the page says, where its framework is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

PAGES = {path.stem: path for path in (pathlib.Path(__file__).parents[1] / "docs/how-to").glob("*.md")}
PAGES.pop("index", None)
OWN_PROCESS = {"from-keras", "keras"}  # Keras takes its backend from the environment, once
FAST = {"haiku", "optax-training"}  # these in `make test`, the others, of up to 20 s, in `make test-slow`
NEEDS = r"<!-- needs: (\w+) -->\n\n"  # first of all: the page needs it; before a block: the block does
BLOCK = re.compile(rf"(?:{NEEDS})?```python\n(.*?)```\n\n```text\n(.*?)```", re.S)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(text: str) -> None:
    """Every block, one after the other in one namespace, but those that need what is not there."""
    namespace: dict = {"__name__": "__main__"}
    for needed, code, expected in BLOCK.findall(text):
        if needed and not installed(needed):
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
        assert out.getvalue().strip() == expected.strip(), f"{code}\n# prints\n{out.getvalue()}"


@pytest.mark.every_case
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in sorted(PAGES)])
def test_every_code_block_prints_what_the_page_says(name):
    text = PAGES[name].read_text()
    assert len(BLOCK.findall(text)) == text.count("```python") > 0
    if (needed := re.match(NEEDS, text)) and not installed(needed[1]):
        pytest.skip(f"{needed[1]} is not installed")
    if name in OWN_PROCESS:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    else:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), np.printoptions():
            run(text)


@pytest.mark.every_case
@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_linked_page_exists(name):
    for link in re.findall(r"\]\(([^)#]+)\)", BLOCK.sub("", PAGES[name].read_text())):
        assert link.startswith("https://") or (PAGES[name].parent / link).exists(), link


if __name__ == "__main__":
    run(PAGES[sys.argv[1]].read_text())
