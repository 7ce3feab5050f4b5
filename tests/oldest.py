"""The oldest versions that `pyproject.toml` allows, as requirements for pip: `make test-oldest` installs them.

Run with `python tests/oldest.py`.
"""

from __future__ import annotations

import pathlib
import re
import tomllib

TOOLS = {"basedpyright", "jax", "mypy", "ruff"}  # jax in the extra `test` comes with libtpu, to compile for TPU


def oldest() -> list[str]:
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + [
        requirement
        for requirement in extras["examples"] + extras["test"]
        if not requirement.startswith("jaxce") and re.split(r"\W", requirement, maxsplit=1)[0] not in TOOLS
    ]
    return [requirement.replace(">=", "==") for requirement in requirements]


if __name__ == "__main__":
    print(*oldest(), sep="\n")
