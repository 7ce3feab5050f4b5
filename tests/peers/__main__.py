"""Runs the tests that optax, Keras and torch have of their own softmax cross-entropy, on jaxce.

    make peers                        # all of them, in an environment of its own
    python tests/peers optax keras    # some of them, in an environment that has them

Each library is a module here, `peer_*.py`, which puts jaxce in the place of the library's functions through a thin
adapter and selects the tests to run. They come from the installed package, as they are. Where jaxce differs on
purpose, `differences` names the test, what its failure says, and the reason. The exit code is not 0 when another test
fails, or when a test that is listed no longer fails in that way.
"""

import importlib
import importlib.util
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

# Rows of the summary, the longest first: a library, and a variant of what is run.
PEERS = ("torch-linear", "torch", "optax", "optax-autodiff", "keras")


class Judge:
    """A pytest plugin: a listed difference must fail, and in the way that is listed."""

    def __init__(self, differences):
        self.differences = differences
        self.differ, self.passed, self.skipped, self.failed = {}, set(), set(), []

    def pytest_runtest_setup(self, item):
        random.seed(0)  # some of the tests draw numbers from the global generators
        np.random.seed(0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        case = [item.cls.__name__] if item.cls else []
        name = ".".join([item.module.__name__.rpartition(".")[2], *case, item.name])
        if call.when == "call" and name in self.differences:
            pattern, reason = self.differences[name]
            if call.excinfo is None:
                report.outcome, report.longrepr = "failed", f"{name} is listed as a difference, and passes"
            elif pattern in str(call.excinfo.value):
                report.outcome, report.wasxfail = "skipped", reason
                self.differ[name] = reason
        if report.failed:
            self.failed.append(name)
        elif call.when == "call" and report.passed:
            self.passed.add(name)
        elif report.skipped and name not in self.differ:
            self.skipped.add(name)
        return report

    def row(self, peer):
        missing = [name for name in self.differences if name not in self.differ and name not in self.failed]
        counts = f"{len(self.passed)} passed, {len(self.differ)} differ as documented, {len(self.failed)} failed"
        counts += f", {len(self.skipped)} skipped" if self.skipped else ""
        counts += f", {len(missing)} listed but not found: {', '.join(missing)}" if missing else ""
        lines = [f"{peer:15} {counts}", *(f"    {name}: {reason}" for name, reason in sorted(self.differ.items()))]
        return "\n".join(lines), bool(missing or self.failed or not self.passed)


def run(peer):
    """In a process of its own: what one library sets up must not change the tests of another."""
    name, *variant = peer.split("-")
    module = importlib.import_module(f"peer_{name}")
    module.install(*variant)
    judge = Judge(module.differences(*variant))
    # --noconftest: the conftest.py of jaxce's tests makes JAX stricter than the libraries' own tests can take.
    options = ["-q", "--no-header", "--tb=short", "-rN", "--noconftest", "-c", os.devnull, "--rootdir", os.curdir]
    options += ["-p", "no:cacheprovider", "-p", "no:warnings"]
    code = pytest.main([*options, *module.selected(*variant)], plugins=[judge])
    row, bad = judge.row(peer)
    print("\n" + row)
    return bad or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)


def start(peer):
    if importlib.util.find_spec(peer.partition("-")[0]) is None:
        return subprocess.CompletedProcess([], 0, f"{peer:15} not installed\n")
    here = [sys.executable, __file__, "--here", peer]
    return subprocess.run(here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main(peers):
    if peers[:1] == ["--here"]:
        return run(peers[1])
    bad, rows = False, []
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(start, peers or PEERS):
            if done.returncode:
                print(done.stdout, flush=True)
            rows.append(done.stdout.rpartition("\n\n")[2].rstrip())
            bad |= done.returncode != 0
    print(*rows, sep="\n")
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
