"""The README's code runs and prints what it says, and its figures are those of the results files."""

import contextlib
import io
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import readme as tables

pytestmark = pytest.mark.every_case

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README.read_text(), re.S)


def test_every_code_block_prints_what_the_readme_says():
    namespace: dict = {}
    assert len(BLOCKS) == README.read_text().count("```python")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a reader has it
        for code, expected in BLOCKS:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            assert out.getvalue().strip() == expected.strip(), code


def test_the_tables_are_those_of_the_results_files():
    assert tables.up_to_date(README.read_text()) == README.read_text(), "run: python -m benchmarks readme"


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert links
    for link in links:
        assert link.startswith("https://") or (README.parent / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("command", re.findall(r"`python -m (jaxce[\w.]*)`", README.read_text()))
def test_every_command_has_help(command):
    done = subprocess.run([sys.executable, "-m", command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage" in done.stdout
