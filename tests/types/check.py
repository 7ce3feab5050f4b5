"""Whether mypy and pyright accept `right.py`, and of `wrong.py` complain of the lines that are marked, and no others.

    python tests/types/check.py [python]

`python`: that of an environment with jaxce installed, of which the types are taken.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import tempfile

FOLDER = pathlib.Path(__file__).parent


def mypy(file: pathlib.Path, python: str) -> set[int]:
    """The lines it complains of."""
    with tempfile.TemporaryDirectory() as elsewhere:
        options = ["--strict", "--config-file=", "--cache-dir", elsewhere, "--python-executable", python, "--no-pretty"]
        options += ["--untyped-calls-exclude", "jax"]
        printed = _run([sys.executable, "-m", "mypy", *options, str(file)], elsewhere)
    return {int(line) for line in re.findall(rf"{file.name}:(\d+): error", printed)}


def pyright(file: pathlib.Path, python: str) -> set[int]:
    """The lines it complains of: here it is basedpyright, which brings what it runs on, with pyright's own rules."""
    with tempfile.TemporaryDirectory() as elsewhere:
        config = pathlib.Path(elsewhere, "pyrightconfig.json")
        config.write_text(json.dumps({"include": [str(file)], "typeCheckingMode": "standard"}))
        command = [
            sys.executable,
            "-m",
            "basedpyright",
            "--outputjson",
            "--pythonpath",
            python,
            "--project",
            str(config),
        ]
        found = json.loads(_run(command, elsewhere))
    assert found["summary"]["filesAnalyzed"] == 1
    return {one["range"]["start"]["line"] + 1 for one in found["generalDiagnostics"] if one["severity"] == "error"}


def _run(command: list[str], folder: str) -> str:
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False).stdout


def marked(file: pathlib.Path) -> set[int]:
    return {i for i, line in enumerate(file.read_text().splitlines(), 1) if "# wrong" in line}


def complaints(python: str) -> list[str]:
    found = []
    for checker in mypy, pyright:
        for file in FOLDER / "right.py", FOLDER / "wrong.py":
            lines = checker(file, python)
            found += [f"{checker.__name__} accepts {file.name}:{i}" for i in sorted(marked(file) - lines)]
            found += [f"{checker.__name__} does not accept {file.name}:{i}" for i in sorted(lines - marked(file))]
    return found


if __name__ == "__main__":
    sys.exit("\n".join(complaints(sys.argv[1] if len(sys.argv) > 1 else sys.executable)) or None)
