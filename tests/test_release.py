"""What `make release-check` holds to be one version; the rest of it takes minutes, and is not among the tests."""

from __future__ import annotations

import pathlib

import pytest

import jaxce
from tests import release


@pytest.fixture
def copy(tmp_path):
    """The files that name the version."""
    for name in ("jaxce/__init__.py", "CHANGELOG.md", "CITATION.cff"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text((release.ROOT / name).read_text())
    return tmp_path


def change(file: pathlib.Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_the_version_is_the_same_everywhere():
    assert release.version(release.ROOT, []) == jaxce.__version__


@pytest.mark.every_case
@pytest.mark.parametrize("name", ["jaxce/__init__.py", "CHANGELOG.md", "CITATION.cff"])
def test_another_version_is_noticed(copy, name):
    change(copy / name, jaxce.__version__, "9.9.9")
    with pytest.raises(release.ReleaseError, match=rf"versions differ: .*'{name}': '9.9.9'"):
        release.version(copy, [])


def test_a_tag_names_the_version_and_the_changelog_its_date(copy):
    heading = (copy / "CHANGELOG.md").read_text().split("\n## ")[1].split("\n")[0]
    tag = f"v{jaxce.__version__}"
    change(copy / "CHANGELOG.md", heading, f"{jaxce.__version__}, 2027-01-31")
    assert release.version(copy, [tag, "nightly"]) == jaxce.__version__
    with pytest.raises(release.ReleaseError, match=r"versions differ: .*'tag v9\.9\.9'"):
        release.version(copy, [tag, "v9.9.9"])
    change(copy / "CHANGELOG.md", "2027-01-31", "unreleased")
    assert release.version(copy, []) == jaxce.__version__
    with pytest.raises(release.ReleaseError, match="has its date, and not 'unreleased'"):
        release.version(copy, [tag])
