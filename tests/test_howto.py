"""The code of each how-to page runs and prints what the page says, where its framework is installed."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import pages

PAGES = {path.stem: path for path in (pathlib.Path(__file__).parents[1] / "docs/how-to").glob("*.md")}
PAGES.pop("index", None)
OWN_PROCESS = {"from-keras", "keras"}  # Keras takes its backend from the environment, once
FAST = {"haiku", "optax-training"}  # these in `make test`, the others, of up to 20 s, in `make test-slow`


@pytest.mark.every_case
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in sorted(PAGES)])
def test_every_code_block_prints_what_the_page_says(name):
    text = PAGES[name].read_text()
    assert all(expected for *_, expected in pages.blocks(text))
    if (needed := re.match(r"<!-- needs: (\w+) -->\n\n", text)) and not pages.installed(needed[1]):
        pytest.skip(f"{needed[1]} is not installed")
    if name in OWN_PROCESS:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    else:
        pages.run(text)


if __name__ == "__main__":
    pages.run(PAGES[sys.argv[1]].read_text())
