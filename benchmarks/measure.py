"""Timing side by side, and what a program needs when compiled."""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import jax
import numpy as np


def add_options(command: argparse.ArgumentParser, seconds: float, smoke: str) -> None:
    """What the benchmarks have in common."""
    add_output_options(command, smoke)
    command.add_argument(
        "--seconds", type=float, default=seconds, help="time for each comparison (default: %(default)g)"
    )


def add_output_options(command: argparse.ArgumentParser, smoke: str) -> None:
    """Of those too that take no time."""
    command.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    command.add_argument("--smoke", action="store_true", help=smoke)


def interleaved(
    runs: dict[str, Callable[[], Any]], seconds: float, most: int = 400, least: int = 7, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds per call of each function, called in turn until the time is up, at least `least` times each.

    In turn, because a machine's speed drifts: a ratio of two calls made next to each other is worth more than a ratio
    of two averages. Each function must block until its result is there.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    order = list(runs)
    for i in range(most):
        for name in order if i % 2 == 0 else reversed(order):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
        if i + 1 >= least and time.perf_counter() > end:
            break
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    return float(np.exp(np.mean([math.log(v) for v in values])))


def compiled(f: Callable, *args: Any) -> tuple[Callable, dict[str, float]]:
    """`f` compiled for these arguments, the seconds that took, and the temporary bytes that the program needs."""
    lowered = jax.jit(f).lower(*args)
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    return program, {"compile_s": seconds, "temp_bytes": temp_bytes(program)}


def temp_bytes(program: jax.stages.Compiled) -> int:
    """The temporary bytes that a program needs."""
    memory = program.memory_analysis()
    assert memory is not None  # it is for a platform that says
    return memory.temp_size_in_bytes


def first_call(f: Callable, *args: Any) -> tuple[Callable, dict[str, float]]:
    """`f` compiled, and the seconds of a first call, tracing included, before it runs."""
    start = time.perf_counter()
    program, figures = compiled(f, *args)
    return program, {"first_call_s": time.perf_counter() - start, **figures}


def environment(*packages: str) -> dict[str, Any]:
    """Versions and machine, for a results file."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
