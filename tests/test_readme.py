"""The README and the pages of the documentation: their code prints what they say, figures and links are right."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from benchmarks import readme as tables
from tests import pages

pytestmark = pytest.mark.every_case

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
URLS = PROJECT["urls"]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in tables.pages()}
PROSE = {name: re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M) for name, text in TEXTS.items()}
LINKS = {name: re.findall(r"\]\(([^)\s]+)\)", text) for name, text in PROSE.items()}


@pytest.mark.parametrize(
    "page",
    # How-to pages need packages of their own: tests/test_howto.py.
    [name for name, text in TEXTS.items() if "```python" in text and not name.startswith("docs/how-to/")],
)
def test_code_prints_what_the_page_says(page):
    pages.run(TEXTS[page])


@pytest.mark.parametrize("page", TEXTS)
def test_the_tables_are_those_of_the_results_files(page):
    assert tables.up_to_date(TEXTS[page]) == TEXTS[page], "run: python -m benchmarks readme"


def test_every_table_has_one_place():
    assert sorted(name for text in TEXTS.values() for name in tables.names(text)) == sorted(tables.TABLES)


def anchors(text: str) -> set[str]:
    """What the headings of a page are linked by: lower case, hyphens for spaces, no other signs."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [name for name in LINKS if name != "README.md"])
def test_links_between_pages_lead_somewhere(page):
    for link in LINKS[page]:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        # Sphinx copies the notebooks into its own folder.
        file = ((ROOT / page).parent / path if path else ROOT / page).resolve()
        file = ROOT / file.relative_to(ROOT.resolve()).as_posix().replace("docs/notebooks/", "notebooks/")
        assert file.is_file(), link
        assert not anchor or anchor in anchors(re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.S | re.M)), link


def source(link: str) -> pathlib.Path | None:
    """The file here that a link to the project leads to; None for links to others, and to the project's front page."""
    docs, code = URLS["Documentation"], URLS["Source"]
    raw = code.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    for start in (f"{code}/blob/main/", f"{code}/tree/main/", raw):
        if link.startswith(start):
            return ROOT / link.removeprefix(start)
    if link.startswith(docs) and link != docs:
        stem = link.removeprefix(docs).removesuffix(".html")
        folder = ROOT if stem.startswith("notebooks/") else ROOT / "docs"
        return next(
            (file for kind in (".md", ".rst", ".ipynb") if (file := folder / f"{stem}{kind}").exists()), ROOT / link
        )
    return None


@pytest.mark.parametrize("page", LINKS)
def test_links_to_the_project_lead_to_its_files(page):
    files = {link: source(link) for link in LINKS[page]}
    assert page != "README.md" or sum(file is not None for file in files.values()) > 10
    assert [link for link, file in files.items() if file is not None and not file.exists()] == []


def test_the_readme_can_be_read_on_a_package_index():
    """Where links relative to this repository lead nowhere."""
    assert [link for link in LINKS["README.md"] if not link.startswith("https://")] == []
    assert not re.search(r"<(img|a) |^\[[^\]]+\]:", PROSE["README.md"], re.M)  # links that the line above does not see


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_versions_that_are_needed(page):
    needed = {"Python": PROJECT["requires-python"]} | dict(
        re.findall(r"(\w+)(>=[\d.]+)", " ".join(PROJECT["dependencies"]))
    )
    python, jax_, numpy = (needed[name].removeprefix(">=") for name in ("Python", "jax", "numpy"))
    assert f"needs Python {python}, JAX {jax_} and NumPy {numpy}, or newer" in TEXTS[page]


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_the_readme_shows_where_optax_is_faster():
    table = TEXTS["README.md"].split("<!-- front:begin -->")[1].split("<!-- front:end -->")[0]
    assert any(float(slowest) < 1 for slowest in re.findall(r"\| (\d\.\d\d): ", table))


def test_pictures_say_what_they_show():
    pictures = [text for prose in PROSE.values() for text in re.findall(r"!\[(.*?)\]", prose, re.S)]
    assert pictures
    assert min(map(len, pictures)) > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", sorted({name for text in TEXTS.values() for name in re.findall(r"`python -m (jaxce[\w.]*)`", text)})
)
def test_every_command_has_help(command):
    done = subprocess.run([sys.executable, "-m", command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage" in done.stdout
