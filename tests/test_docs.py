"""The reference covers every public name, and every notebook is a page. `make docs` builds it, warnings as errors."""

from __future__ import annotations

import pathlib
import re

import pytest

import jaxce
from jaxce import diagnostics

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGES = [path.read_text() for path in DOCS.glob("api/*.rst")]
DOCUMENTED = {name.split(".")[-1] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", "\n".join(PAGES), re.M)}


@pytest.mark.parametrize("name", [*jaxce.__all__, *diagnostics.__all__])
def test_every_public_name_is_in_the_reference(name):
    assert name in DOCUMENTED


@pytest.mark.parametrize("pattern", ["docs/api/*.rst", "notebooks/*.ipynb"])
def test_every_page_is_reachable(pattern):
    index = (DOCS / "index.md").read_text()
    pages = list(DOCS.parent.glob(pattern))
    assert pages
    assert [page.stem for page in pages if f"\n{page.parent.name}/{page.stem}\n" not in index] == []
