"""Mutation testing: changes jaxce in one small way at a time, and sees whether a test notices.

    python tests/mutants.py --count 100 --seed 0 [--files jaxce/stats.py ...] [--only 3] [--timeout 600] [--list]

Mutants are drawn uniformly from all the places where one of the changes below applies. Each is written into a copy of
the tree and tested there by the files in `TESTS`, the cheapest killer first, until one of them fails. Most mutants fall
to `EAGER`, tests without jit in a process that stays, in seconds: nothing is compiled for them. The others need minutes
for what has to be compiled anew; what a mutant does not change comes from a compilation cache that all runs share. One
that no test has caught when its time is up counts as a survivor, so the rate is a lower bound.

Left out: tests that compile for TPU, and files that test the surroundings (notebooks, README, examples).
So what only those would notice survives here: layout, donation, barriers, and code that runs on accelerators alone.

Of the tools for this, mutmut leaves decorated functions alone (all the JVP rules) and forks a process in which JAX
runs threads; cosmic-ray has one test command for all files, mutates in place and draws no sample.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import os
import pathlib
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
# For each source file, or folder, what to run on its mutants: test files, or tests that come before their whole file.
DENSE = [
    "compose",
    "linear::test_equals_the_dense_loss",
    "sums",
    "sweep",
    "numbers::test_every_gradient_with_random_cotangents",
    "numbers",
    "temperature",
    "axis_name",
    "checks",
    "log_probs",
    "left_out",
]
LINEAR = ["linear::test_equals_the_dense_loss", "linear::test_every_gradient_against_the_oracle"]
LINEAR += ["linear", "linear_plan", "axis_name", "checks", "sweep"]
TESTS = {
    "jaxce/stats.py": DENSE,
    "jaxce/lookup.py": DENSE,
    "jaxce/sums.py": DENSE,
    "jaxce/gradient.py": DENSE,
    "jaxce/compose.py": DENSE,
    "jaxce/targets.py": DENSE,
    "jaxce/log_probabilities.py": ["log_probs"],
    "jaxce/divergence.py": ["distillation", "linear_distillation"],
    "jaxce/distillation.py": ["distillation", "linear_distillation"],
    "jaxce/linear": LINEAR,
    "jaxce/linear/__init__.py": [*LINEAR, "linear_tune"],
    "jaxce/linear/blocks.py": [LINEAR[0], "axis_name", *LINEAR],
    "jaxce/linear/log_probabilities.py": ["log_probs"],
    "jaxce/linear/store.py": [LINEAR[0], "linear_plan", "linear_costs", *LINEAR],
    "jaxce/linear/recompute.py": [LINEAR[0], "linear_plan", "linear_costs", *LINEAR],
    "jaxce/linear/distillation.py": ["linear_distillation"],
    "jaxce/linear/plan.py": ["linear_plan", "linear_costs", *LINEAR, "linear_tune"],
    "jaxce/linear/costs.py": ["linear_plan", "linear_costs", *LINEAR],
    "jaxce/linear/chips.py": ["linear_costs", *LINEAR],
    "jaxce/linear/tune.py": ["linear_tune", "checks"],
    "jaxce/linear/arguments.py": [*LINEAR, "linear_tune"],
    "jaxce/linear/pallas_tpu.py": ["pallas_tpu"],
}

# These pass without jit as well, and most mutants do not pass these.
EAGER = ["tests/test_compose.py", "tests/test_linear.py::test_equals_the_dense_loss"]

# Mutants that no test should tell from the original: the line, the changes to it, and why.
EQUIVALENT = {
    ("jaxce/lookup.py", "_MAX_COMPARED = 8", ("8 -> 9", "8 -> 7")): "both ways to look up give the same numbers",
    (
        "jaxce/lookup.py",
        "if indices.shape[-1] > _MAX_COMPARED:",
        ("indices.shape[-1] > _MAX_COMPARED -> False", "indices.shape[-1] > _MAX_COMPARED -> True"),
    ): "on CPU it is a gather in any case",
    (
        "jaxce/lookup.py",
        "if indices.shape[-1] <= _MAX_COMPARED or explicitly_sharded(array, indices):",
        ("indices.shape[-1] <= _MAX_COMPARED or explicitly_sharded(array, indices) -> True",),
    ): "both ways to put give the same numbers",
    (
        "jaxce/stats.py",
        "return jnp.where((low + high >= 0.5) & (low + high < 1.5), low, low + (high - 1))",
        ("low + high >= 0.5 -> low + high > 0.5", "0.5 -> 0.625", "low + high < 1.5 -> low + high <= 1.5"),
    ): "the sum is 0 or at least 1, and at 1.5 both ways are exact to a few ulps",
    (
        "jaxce/distillation.py",
        "value = divergence(jnp.where(kept, log_q, 0), jnp.where(kept, p, 1))",
        ("1 -> 0", "1 -> 2"),
    ): "the value of such a row is replaced, and p is a constant",
    (
        "jaxce/divergence.py",
        "log_ratio = jnp.where((log_q == -jnp.inf) & (p == 0), 0, log_q - jnp.log(p))",
        ("-jnp.inf -> jnp.inf",),
    ): "what is multiplied by probabilities of 0 is 0, and NaN too",
    ("jaxce/linear/tune.py", "rng = np.random.default_rng(0)", ("0 -> 1",)): "other random numbers",
    ("jaxce/linear/tune.py", "return jnp.sum(loss), aux", ("jnp.sum -> jnp.max",)): "the value is not looked at",
    (
        "jaxce/linear/pallas_tpu.py",
        "argmax = jnp.zeros(shape, _F32)",
        ("jnp.zeros -> jnp.ones",),
    ): "each lane has a largest logit, but for NaN, where no class is right",
}


class Mutant(NamedTuple):
    file: str
    line: int
    span: tuple[int, int]  # bytes of the file
    new: str  # in their place
    change: str  # the same for a reader
    text: str  # of the line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.change}"


# --- the changes ----------------------------------------------------------------------------------------------------

OPERATORS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
    **{ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
PAIRS = "maximum minimum, max min, any all, pmax pmin, argmax argmin, zeros_like ones_like, zeros ones, log1p log"
NAMES = {a: b for pair in PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])} | {"sum": "max"}
# Functions that an argument can stand for: the one that is much like the result.
MUCH_LIKE = {"_alive": 1, "_shift": 0, "_finite_distance": 0, "_zero_if_too_large": 0, "taking_part": 0}
MUCH_LIKE |= {"stop_gradient": 0, "sum_over": 0, "vary": 0, "abs": 0, "broadcast_to": 0, "expm1": 0, "minimum": 0}


def swapped(op: ast.AST) -> ast.AST:
    return OPERATORS.get(type(op), type(op))()


def variants(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST | None]]:
    """What to replace, in or at `node`, and by what."""
    match node:
        case ast.BinOp(left, op, right):
            yield node, ast.BinOp(left, swapped(op), right)
        case ast.AugAssign(target, op, value):
            yield node, ast.AugAssign(target, swapped(op), value)
        case ast.BoolOp(op, values):
            yield node, ast.BoolOp(swapped(op), values)
        case ast.Compare(left, [op], right):
            yield node, ast.Compare(left, [swapped(op)], right)
        case ast.UnaryOp(ast.USub(), ast.Constant(value)):
            yield node, ast.Constant(0)
        case ast.UnaryOp(_, operand):
            yield node, operand
        case ast.Constant(bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(int(value)):
            yield from ((node, ast.Constant(x)) for x in ((value + 1, value - 1) if value else (1,)))
        case ast.Constant(float(value)):
            yield node, ast.Constant(value * 1.25 if value else 1.0)
        case ast.Call(func, args, keywords):
            name = getattr(func, "attr", getattr(func, "id", ""))
            for i in range(len(keywords)):
                yield node, ast.Call(func, args, keywords[:i] + keywords[i + 1 :])
            if name in NAMES and isinstance(func, ast.Attribute):
                yield func, ast.Attribute(func.value, NAMES[name])
            if name in MUCH_LIKE and len(args) > MUCH_LIKE[name]:
                yield node, args[MUCH_LIKE[name]]
            if name == "times":  # it makes 0·inf 0
                yield node, ast.BinOp(args[0], ast.Mult(), args[1])
            if name == "where" and len(args) == 3:
                yield node, ast.Call(func, [args[0], args[2], args[1]], keywords)
            if name == "astype":
                yield node, func.value
        case ast.Assign([ast.Name(target)], value):
            if any(isinstance(x, ast.Name) and x.id == target for x in ast.walk(value)):
                yield node, ast.Pass()
        case ast.If(test) | ast.IfExp(test):
            yield from ((test, ast.Constant(x)) for x in (True, False))


def points(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """All of them at and below `node`, but for annotations, decorators and messages."""
    if isinstance(node, (ast.JoinedStr, ast.Raise)) or getattr(getattr(node, "func", None), "attr", "") == "fail":
        return
    yield from variants(node)
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list") and not is_negative_number(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from points(child)


def is_negative_number(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant)


def mutants_of(file: str) -> list[Mutant]:
    source = (ROOT / file).read_bytes()
    starts = [0]  # of the lines; columns are counted in bytes
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for old, new in points(ast.parse(source)):
        span = starts[old.lineno - 1] + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset
        text = source[starts[old.lineno - 1] : starts[old.lineno]].decode().strip()
        change = f"{ast.unparse(old)} -> {ast.unparse(new)}"
        if isinstance(old, ast.Call) and isinstance(new, ast.Call) and len(old.keywords) > len(new.keywords):
            (dropped,) = set(old.keywords) - set(new.keywords)
            change = f"{ast.unparse(old.func)}({ast.unparse(dropped)}) -> {ast.unparse(old.func)}()"
        if ast.unparse(old) != ast.unparse(new):
            found.append(Mutant(file, old.lineno, span, ast.unparse(new), change, text))
    return found


def mutated(mutant: Mutant) -> bytes:
    source = (ROOT / mutant.file).read_bytes()
    statement = mutant.new == "pass" or re.match(r"\w+ .= ", mutant.new)
    new = mutant.new if statement else f"({mutant.new})"
    return source[: mutant.span[0]] + new.encode() + source[mutant.span[1] :]


def why_equivalent(mutant: Mutant) -> str | None:
    for (file, text, changes), reason in EQUIVALENT.items():
        if (mutant.file, mutant.text) == (file, text) and mutant.change in changes:
            return reason
    return None


# --- running the tests ----------------------------------------------------------------------------------------------


def to_run(file: str, names: list[str] | None) -> list[str]:
    names = names or TESTS.get(file) or TESTS.get(str(pathlib.Path(file).parent)) or DENSE
    parts = [name.partition("::") for name in dict.fromkeys(names)]
    return [f"tests/test_{file}.py{at}{test}" for file, at, test in parts if (ROOT / f"tests/test_{file}.py").exists()]


def copy_tree(tree: pathlib.Path) -> None:
    for name in ("jaxce", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)


OUT_OF_TIME = "out of time"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not aot", "--tb=no"]


class Runner:
    """Runs tests in a copy of the tree. Those of `EAGER` share a process: nothing is imported or compiled for them."""

    def __init__(self, tree: pathlib.Path):
        cache = pathlib.Path(tempfile.gettempdir()) / "jaxce-mutants-jit"
        self.tree, self.worker = tree, None
        self.env = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        self.env |= os.environ
        # No bytecode: a mutant can have the size and the time of the one before it.
        self.env |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        self.env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def killer(self, tests: Iterable[str], timeout: float) -> str | None:
        """The test that fails, `OUT_OF_TIME`, or None."""
        end = time.monotonic() + timeout
        for test in tests:
            run = self._eagerly if test in EAGER else self._compiled
            if time.monotonic() > end:
                return OUT_OF_TIME
            failed = run(test, max(end - time.monotonic(), 1))
            if failed and re.search(r"exit status [345]", failed):  # pytest itself failed, or found no test
                sys.exit(f"Could not run {failed}.")
            if failed:
                return failed
        return None

    def _start(self, arguments: list[str], **env: str) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        arguments = [sys.executable, *arguments]
        return subprocess.Popen(arguments, cwd=self.tree, env=self.env | env, start_new_session=True, **pipes)

    def _compiled(self, test: str, timeout: float) -> str | None:
        process = self._start(["-m", "pytest", *OPTIONS, test])
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        finally:
            stop(process)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        return failed[1] if failed else f"{test} (exit status {process.returncode})" if process.returncode else None

    def _eagerly(self, test: str, timeout: float) -> str | None:
        if self.worker is None or self.worker.poll() is not None:
            self.worker = self._start(["tests/mutants.py", "--worker"], JAX_DISABLE_JIT="1")
        print(test, file=self.worker.stdin, flush=True)
        if not select.select([self.worker.stdout], [], [], timeout)[0]:
            stop(self.worker)
            return OUT_OF_TIME
        answer = self.worker.stdout.readline()
        return answer.strip() if answer else f"{test} (crashed)"


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def work() -> None:
    """Reads names of tests, runs each on the jaxce that is there by then, and writes which one failed, or nothing."""
    import pytest

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for test in map(str.strip, sys.stdin):
        for name in list(sys.modules):
            if name.split(".")[0] in ("jaxce", "tests", "oracle", "conftest") or name.startswith("test_"):
                del sys.modules[name]
        failures = Failures()
        status = int(pytest.main([*OPTIONS, test], plugins=[failures]))
        print(failures.first or (f"{test} (exit status {status})" if status else ""), file=answers, flush=True)


class Failures:
    """A plugin for pytest."""

    first = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.first:
            self.first = report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def report(results: list[dict]) -> None:
    columns = ("killed", "survived", OUT_OF_TIME, "equivalent")
    counts = collections.defaultdict(collections.Counter)
    for result in results:
        for file in (result["file"], "all"):
            counts[file][result["outcome"]] += 1
    print(f"\n{'file':30}" + "".join(f"{column:>12}" for column in columns) + f"{'kill rate':>12}")
    for file in sorted(counts, key=lambda file: (file == "all", file)):
        count = counts[file]
        rate = count["killed"] / max(count["killed"] + count["survived"] + count[OUT_OF_TIME], 1)
        print(f"{file:30}" + "".join(f"{count[column]:12}" for column in columns) + f"{rate:12.1%}")
    for result in results:
        if result["outcome"] != "killed":
            why = f"\n    ({result['reason']})" if result["reason"] else ""
            print(f"\n{result['outcome']}: {result['file']}:{result['line']}: {result['text']}{why}")
            print(f"    {result['change']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", default=list(TESTS), help="source files, or folders of them")
    parser.add_argument("--tests", nargs="+", help="test files instead of those in TESTS, as in TESTS")
    parser.add_argument("--only", type=int, nargs="+", help="of those drawn, the ones with these numbers")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one mutant")
    parser.add_argument("--list", action="store_true", help="print what would be run")
    parser.add_argument("--trust", action="store_true", help="do not run the tests on the unchanged tree first")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return
    paths = dict.fromkeys(p for name in args.files for p in (sorted((ROOT / name).glob("*.py")) or [ROOT / name]))
    everything = [mutant for path in paths for mutant in mutants_of(path.relative_to(ROOT).as_posix())]
    drawn = random.Random(args.seed).sample(everything, min(args.count, len(everything)))
    chosen = [(i, mutant) for i, mutant in enumerate(drawn) if args.only is None or i in args.only]
    print(f"{len(chosen)} of {len(everything)} mutants")
    if args.list:
        print(*(f"{i:4} {mutant}" for i, mutant in chosen), sep="\n")
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="jaxce-mutants-") as folder:
        tree = pathlib.Path(folder)
        copy_tree(tree)
        start = time.monotonic()
        tests = {} if args.trust else dict.fromkeys(test for _, m in chosen for test in to_run(m.file, args.tests))
        runner = Runner(tree)
        failed = runner.killer(tests, 7200)
        if failed:
            sys.exit(f"The tests must pass before they can tell anything: {failed} failed.")
        print(f"unchanged: passes, {time.monotonic() - start:.0f} s", flush=True)
        for i, mutant in chosen:
            start = time.monotonic()
            reason = why_equivalent(mutant)
            by = None
            if not reason:
                (tree / mutant.file).write_bytes(mutated(mutant))
                by = runner.killer(to_run(mutant.file, args.tests), args.timeout)
                shutil.copy(ROOT / mutant.file, tree / mutant.file)
            outcome = "equivalent" if reason else {None: "survived", OUT_OF_TIME: OUT_OF_TIME}.get(by, "killed")
            seconds = round(time.monotonic() - start, 1)
            print(f"{i:4} {mutant}: {outcome}{f' by {by}' if outcome == 'killed' else ''}, {seconds} s", flush=True)
            results.append({**mutant._asdict(), "outcome": outcome, "by": by, "reason": reason, "seconds": seconds})
            if args.output:
                args.output.write_text(json.dumps({"seed": args.seed, "mutants": results}, indent=1) + "\n")
        if runner.worker:
            stop(runner.worker)
    report(results)


if __name__ == "__main__":
    main()
