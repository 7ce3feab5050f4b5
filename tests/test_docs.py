"""The reference covers every public name, every page is reachable, and the built pages need nothing from elsewhere.

What the pages say, tests/test_readme.py runs. `make docs` builds them, warnings as errors.
"""

from __future__ import annotations

import doctest
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest

import jaxce
from jaxce import diagnostics

pytestmark = pytest.mark.every_case

DOCS = pathlib.Path(__file__).parents[1] / "docs"
REFERENCE = {path: path.read_text() for path in DOCS.glob("api/*.rst")}
ENTRIES = {  # what the reference says of each name below its docstring
    name.split(".")[-1]: below
    for text in REFERENCE.values()
    for name, below in re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)\n((?:\n|   .*\n?)*)", text, re.M)
}


@pytest.mark.parametrize("name", [*jaxce.__all__, *diagnostics.__all__])
def test_every_public_name_is_in_the_reference(name):
    assert name in ENTRIES or f".. automodule:: jaxce.{name}\n" in "\n".join(REFERENCE.values())


def test_no_page_has_the_marks_of_a_merge():
    pages = [*DOCS.rglob("*.md"), *DOCS.rglob("*.rst"), *DOCS.parent.glob("*.md")]
    assert [page.name for page in pages if re.search(r"^(<{7}|>{7}) ", page.read_text(), re.M)] == []


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_of_the_reference_has_an_example(name):
    found = getattr(jaxce, name, None) or getattr(diagnostics, name, None) or getattr(jaxce.linear.plan, name)
    assert ">>> " in found.__doc__ + ENTRIES[name]


@pytest.mark.parametrize("page", REFERENCE, ids=lambda path: path.stem)
def test_the_examples_beside_the_docstrings(page):
    with np.printoptions(precision=8, suppress=False, linewidth=75):
        found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted > 0
    assert found.failed == 0


def test_what_the_guide_for_developers_names_exists():
    root, text = DOCS.parent, (DOCS.parent / "DEVELOPING.md").read_text()
    paths = set(re.findall(r"(?:jaxce|tests|benchmarks|docs)/[\w./]*\w", text)) | {"CHANGELOG.md", ".ci/run"}
    paths |= {f"jaxce/linear/{name}" for name in re.findall(r"(?<![\w/])\w+\.py", text)}
    assert [path for path in sorted(paths) if not (root / path).exists()] == []
    targets = set(re.findall(r"make ([a-z-]+)", text)) - {"in"}
    assert len(targets) > 5
    assert [name for name in targets if f"\n{name}:" not in (root / "Makefile").read_text()] == []
    code = "\n".join(path.read_text() for path in (root / "jaxce").rglob("*.py"))
    others = {"linear", "pallas", "sharded", "posttraining", "gpu", "optimized", "slow"}
    names = set(re.findall(r"`([a-z]\w+)`", text)) - others
    assert [name for name in names if f"def {name}(" not in code] == []


@pytest.mark.parametrize(
    "pattern", ["docs/api/*.rst", "docs/explanation/*.md", "docs/how-to/index.md", "notebooks/*.ipynb"]
)
def test_every_page_is_reachable(pattern):
    index = (DOCS / "index.md").read_text()
    pages = list(DOCS.parent.glob(pattern))
    assert pages
    assert [page.stem for page in pages if f"\n{page.parent.name}/{page.stem}\n" not in index] == []


class Page(HTMLParser):
    """What a built page loads, where it leads to, what can be linked to in it, and its pictures."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.alts: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found["id"]} if "id" in found else set()
        if "src" in found or tag == "link":
            self.loads.append(found.get("src") or found["href"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "img" and "_static/" not in found["src"]:
            self.alts.append(found.get("alt", ""))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    for name in ("sphinx", "furo", "myst_nb", "latex2mathml"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", DOCS, folder], check=True, cwd=DOCS.parent
    )
    return {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")}, folder


def local(link: str) -> bool:
    return not re.match(r"(https?:)?//|data:", link)


@pytest.mark.slow
def test_built_pages_load_nothing_from_elsewhere(built):
    pages, folder = built
    assert len(pages) > 20
    assert [(name, load) for name, page in pages.items() for load in page.loads if not local(load)] == []
    styles = "\n".join(path.read_text() for path in folder.glob("_static/**/*.css"))
    assert not re.search(r"@import|url\([\"']?(https?:)?//", styles)


@pytest.mark.slow
def test_formulas_of_built_pages_are_mathml(built):
    formulas = [f for path in built[1].rglob("*.html") for f in re.findall("<math.*?</math>", path.read_text(), re.S)]
    assert len(formulas) > 40
    unread = r"\\|>\s*(\*|&#x0002A;)\s*<|<mo ?/>"  # a command that was not understood, its star, a name left empty
    assert [formula for formula in formulas if re.search(unread, formula)] == []


@pytest.mark.slow
def test_links_of_built_pages_lead_somewhere(built):
    pages, folder = built
    for name, page in pages.items():
        for link in filter(local, page.links):
            path, _, anchor = unquote(link).partition("#")
            target = (folder / name).parent / path if path else folder / name
            assert target.is_file(), (name, link)
            if anchor and target.suffix == ".html":
                assert anchor in pages[target.resolve().relative_to(folder.resolve()).as_posix()].ids, (name, link)


@pytest.mark.slow
def test_pictures_of_built_pages_say_what_they_show(built):
    alts = [alt for page in built[0].values() for alt in page.alts]
    assert len(alts) > 15
    assert [alt for alt in alts if len(alt) < 20 or alt.endswith(".png")] == []


@pytest.mark.slow
def test_built_pages_show_the_version(built):
    assert f"jaxce {jaxce.__version__}</title>" in (built[1] / "index.html").read_text()
