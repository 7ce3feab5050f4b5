"""A release, tried before it is made: `make release-check`.

Versions agree. Source archive and wheel are built and pass the checks of the package index. Each installs where nothing
else is, and runs the first example of the README. The wheel has its types. All tests are found in the source archive,
and those that need more than its code pass.

    python tests/release.py [folder]

`folder`: where to leave what was built; without, nothing is left.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).parents[1]
TESTS = ("docs", "info", "layout", "notebooks", "package", "readme")  # of tests/test_*.py
QUIET = {"JAX_PLATFORMS": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
ALONE = """
import importlib.resources, importlib.util, jaxce
assert not any(map(importlib.util.find_spec, ("flax", "optax", "chex"))), "the environment is not empty"
assert importlib.resources.files("jaxce").joinpath("py.typed").is_file()
"""


class ReleaseError(Exception):
    """What keeps this from being released."""


def run(*command: object, cwd: pathlib.Path = ROOT, **environment: object) -> str:
    """What a command prints."""
    env = os.environ | QUIET | {name: str(value) for name, value in environment.items()}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def found(pattern: str, file: pathlib.Path) -> str:
    match = re.search(pattern, file.read_text(), re.M | re.S)
    if match is None:
        raise ReleaseError(f"{file.name}: nothing like {pattern}")
    return match[1]


def version(root: pathlib.Path, tags: list[str]) -> str:
    """The one that the package, the changelog, the citation and, if there is one, the tag of this commit agree on."""
    said = {
        "jaxce/__init__.py": found(r'^__version__ = "(.*?)"', root / "jaxce" / "__init__.py"),
        "CHANGELOG.md": found(r"^## ([^,\n]+), ", root / "CHANGELOG.md"),
        "CITATION.cff": found(r"^version: (\S+)", root / "CITATION.cff"),
    } | {f"tag {tag}": tag.removeprefix("v") for tag in tags if re.match(r"v?\d", tag)}
    if len(set(said.values())) > 1:
        raise ReleaseError(f"versions differ: {said}")
    date = found(r"^## [^,\n]+, (.*?)$", root / "CHANGELOG.md")
    if len(said) > 3 and not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise ReleaseError(f"CHANGELOG.md: the version of a tag has its date, and not {date!r}")
    return said["jaxce/__init__.py"]


def holds_all(sdist: pathlib.Path) -> None:
    """Every file of the repository, and no other."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    if odd := (names - {"PKG-INFO"}) ^ {name for name in listed if (ROOT / name).exists()}:
        raise ReleaseError(f"{sdist.name}: only there or only in the repository: {', '.join(sorted(odd))}")


def runs_alone(package: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The Python of an environment that holds the package and what it needs, and prints what the README says."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", package)
    code, expected = re.findall(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M
    )[0]
    run(python, "-c", ALONE, cwd=folder)
    if (printed := run(python, "-c", code, cwd=folder)).strip() != expected.strip():
        raise ReleaseError(f"{package.name}: the first example of the README prints\n{printed}\nand not\n{expected}")
    return python


def tests_itself(sdist: pathlib.Path, folder: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0")
    run(*pytest, "--collect-only", cwd=root, PYTHONPATH=root)
    imported = run(sys.executable, "-c", "import jaxce; print(jaxce.__file__)", cwd=root, PYTHONPATH=root)
    assert imported.startswith(str(root)), imported
    files = [f"tests/test_{name}.py" for name in TESTS]
    print(run(*pytest, "-m", "not slow", *files, cwd=root, PYTHONPATH=root).splitlines()[-1])


def step(name: str) -> None:
    print(f"{time.perf_counter() - START:4.0f} s  {name}", flush=True)


def check(dist: pathlib.Path, scratch: pathlib.Path) -> None:
    step(
        f"jaxce {version(ROOT, run('git', 'tag', '--points-at', 'HEAD').split())}: source archive, and a wheel from it"
    )
    run(sys.executable, "-m", "build", "--outdir", dist)
    sdist, wheel = *dist.glob("jaxce-*.tar.gz"), *dist.glob("jaxce-*.whl")
    holds_all(sdist)
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    step("the wheel alone, and its types")
    print(run(sys.executable, "tests/types/check.py", runs_alone(wheel, scratch / "wheel")), end="")
    step("the source archive alone")
    runs_alone(sdist, scratch / "sdist")
    step("the tests of the source archive")
    tests_itself(sdist, scratch / "tests")
    step("all is well")


if __name__ == "__main__":
    START = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            check(pathlib.Path(*sys.argv[1:2] or [f"{temporary}/dist"]), pathlib.Path(temporary))
        except ReleaseError as error:
            sys.exit(f"error: {error}")
