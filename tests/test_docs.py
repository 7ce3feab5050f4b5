"""The reference covers every public name, and every notebook is a page. `make docs` builds it, warnings as errors."""

from __future__ import annotations

import pathlib
import re

import pytest

import jaxce
from jaxce import diagnostics

pytestmark = pytest.mark.every_case

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = [path.read_text() for path in DOCS.glob("api/*.rst")]
DOCUMENTED = {name.split(".")[-1] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", "\n".join(PAGES), re.M)}


@pytest.mark.parametrize("name", [*jaxce.__all__, *diagnostics.__all__])
def test_every_public_name_is_in_the_reference(name):
    assert name in DOCUMENTED


def test_what_the_guide_for_developers_names_exists():
    root, text = DOCS.parent, (DOCS.parent / "DEVELOPING.md").read_text()
    paths = set(re.findall(r"(?:jaxce|tests|benchmarks|docs)/[\w./]*\w", text)) | {"CHANGELOG.md", ".ci/run"}
    paths |= {f"jaxce/linear/{name}" for name in re.findall(r"(?<![\w/])\w+\.py", text)}
    assert [path for path in sorted(paths) if not (root / path).exists()] == []
    targets = set(re.findall(r"make ([a-z-]+)", text)) - {"in"}
    assert len(targets) > 5
    assert [name for name in targets if f"\n{name}:" not in (root / "Makefile").read_text()] == []
    code = "\n".join(path.read_text() for path in (root / "jaxce").rglob("*.py"))
    names = set(re.findall(r"`([a-z]\w+)`", text)) - {"linear", "sharded", "gpu", "optimized", "slow"}
    assert [name for name in names if f"def {name}(" not in code] == []


@pytest.mark.parametrize("pattern", ["docs/api/*.rst", "notebooks/*.ipynb"])
def test_every_page_is_reachable(pattern):
    index = (DOCS / "index.md").read_text()
    pages = list(DOCS.parent.glob(pattern))
    assert pages
    assert [page.stem for page in pages if f"\n{page.parent.name}/{page.stem}\n" not in index] == []
