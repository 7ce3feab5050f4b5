"""Eight CPU devices, strict promotion rules, and one compilation cache for every run of the suite."""

import collections
import os
import pathlib
import tempfile
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
cache = pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", pathlib.Path(tempfile.gettempdir()) / "jaxce-jit"))
jax.config.update("jax_compilation_cache_dir", str(cache / f"jax-{jax.__version__}"))
if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # tests/mutants.py keeps every program
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quarter", type=int, choices=range(4), help="a part of the slow tests: which")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test with many cases, `make test` runs an eighth, at least one, and `make test-slow` the others.

    Which, a hash says: the same ones every time, and not always the first of each parameter.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not any(map(item.get_closest_marker, ("slow", "every_case"))):
            cases[item.parent.nodeid, item.originalname].append(item)
    for same in cases.values():
        same.sort(key=lambda item: zlib.crc32(item.name.encode()))
        for item in same[-(-len(same) // 8) :]:
            item.add_marker("slow")
    if (quarter := config.getoption("quarter")) is not None:
        items[:] = [
            item
            for item in items
            if not item.get_closest_marker("slow") or zlib.crc32(item.nodeid.split("[")[0].encode()) % 4 == quarter
        ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Programs are compiled in half the time, with few of LLVM's optimizations; tests of figures and digits say no."""
    few = item.get_closest_marker("optimized") is None
    if few != jax.config.values["jax_disable_most_optimizations"]:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", few)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261123)


@pytest.fixture
def x64():
    """The test runs with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
