"""The commands of the benchmarks: what they refuse before time is spent, and where results go."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from unittest import mock

import pytest

from benchmarks import __main__ as command
from benchmarks import dense, gpu, posttraining, readme


@pytest.fixture
def measured(monkeypatch):
    """Runs `python -m benchmarks ...` up to the measurement: the arguments of that, and the platform it would be on."""
    found = []
    for module in dense, gpu, posttraining:
        monkeypatch.setattr(module, "run", lambda given: found.append((given, os.environ.get("JAX_PLATFORMS"))))

    def run(*arguments: str) -> tuple[argparse.Namespace, str | None]:
        with mock.patch.object(sys, "argv", ["benchmarks", *arguments]), mock.patch.dict(os.environ):
            os.environ.pop("JAX_PLATFORMS", None)
            command.main()
        return found[-1]

    return run


def test_times_on_cpu_are_of_the_cpu_and_others_are_not(measured, tmp_path):
    assert measured("dense", "--output-dir", str(tmp_path))[1] == "cpu"
    assert measured("gpu", "--output-dir", str(tmp_path))[1] is None
    assert measured("posttraining", "--h100-target-config", "card", "--output-dir", str(tmp_path))[1] is None


def test_toy_figures_go_where_no_table_is_made_of_them(measured, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(pathlib.Path, "mkdir", lambda path, **_: made.append(path))
    monkeypatch.setattr(command.tempfile, "TemporaryFile", lambda **_: mock.Mock())
    assert measured("dense", "--smoke")[0].output_dir == readme.RESULTS / "smoke"
    assert measured("dense")[0].output_dir == readme.RESULTS
    assert measured("dense", "--smoke", "--output-dir", str(tmp_path))[0].output_dir == tmp_path
    assert made == [readme.RESULTS / "smoke", readme.RESULTS, tmp_path]


def test_a_folder_that_cannot_be_written_is_refused_before_the_time_is_spent(measured, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    for path in tmp_path / "file" / "results", tmp_path:
        with pytest.raises(SystemExit, match="2"):
            measured("dense", "--output-dir", str(path))
        monkeypatch.setattr(command.tempfile, "TemporaryFile", read_only)
    errors = capsys.readouterr().err
    assert f"--output-dir: expected a folder, got {tmp_path / 'file' / 'results'}: Not a directory" in errors
    assert f"--output-dir: expected a folder, got {tmp_path}: Read-only file system" in errors


def test_shapes_that_are_none_are_refused(measured, capsys):
    with pytest.raises(SystemExit, match="2"):
        measured("dense", "--cells", "128,10")
    assert "invalid choice: '128,10'" in capsys.readouterr().err


def test_tables_are_not_made_of_results_without_tpu(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    (tmp_path / "some.json").write_text(json.dumps({"tpu": []}))
    with pytest.raises(SystemExit, match=r"^some\.json: no figures for TPU"):
        readme.results_in("some.json")
