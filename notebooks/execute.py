"""Runs the notebooks, each from the top in a kernel of its own, and writes them with their outputs.

    python notebooks/execute.py                                  all of them, in place
    python notebooks/execute.py --output-dir /tmp/executed       all of them, and leaves these as they are
    python notebooks/execute.py notebooks/3-cifar10.ipynb        this one

With JAXCE_NOTEBOOK_SMALL=1 those that train or time something do less of it. An error in a cell ends the run.

Needs the extra: pip install "jaxce[notebooks]"
"""

from __future__ import annotations

import argparse
import pathlib
import time

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent


def execute(path: pathlib.Path, output_dir: pathlib.Path | None) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=3600,
        record_timing=False,  # it would change in every run
        coalesce_streams=True,
        resources={"metadata": {"path": str(FOLDER)}},  # where the notebooks look for files from
        extra_arguments=["--log-level=ERROR"],  # it warns that the connection to this process is not encrypted
    )
    client.execute()
    notebook.metadata.language_info = {"name": "python"}  # of any version
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / path.name
    nbformat.write(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--output-dir", type=pathlib.Path, help="where the results go (default: in place)")
    arguments = parser.parse_args()
    for path in arguments.notebooks:
        started = time.perf_counter()
        execute(path, arguments.output_dir)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
