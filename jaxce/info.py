"""What a bug report has to say of the machine: `python -m jaxce.info` prints versions, devices, settings and a plan."""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import os
import platform
import re
import shlex
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import jaxce

_PACKAGES = ("jax", "jaxlib", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax")
_SETTINGS = (
    "jax_platforms",
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_device",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_enable_checks",
    "jax_check_tracer_leaks",
)
N, D, V = 8192, 2048, 131072  # of a language model of today


def rows() -> Iterator[tuple[str, str]]:
    """Names and what they stand for. No row tells a path, or of whom or which machine it is."""
    yield "jaxce", jaxce.__version__
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    yield "Python", f"{platform.python_version()}, {platform.python_implementation()}"
    yield "platform", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    for name in _SETTINGS:
        yield name, str(jax.config.values.get(name, "not in this version"))
    yield "XLA_FLAGS", _without_paths(os.environ.get("XLA_FLAGS", ""))
    try:
        kinds = collections.Counter((device.platform, device.device_kind) for device in jax.devices())
    except RuntimeError:  # its message may hold paths
        yield "devices", "none: JAX cannot start, python -c 'import jax; jax.devices()' says why"
        return
    for (name, kind), count in kinds.items():
        yield "devices", f"{count} x {name}, {kind}"
    yield "processes", str(jax.process_count())
    hidden, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((N, D), (D, V)))
    plan = jaxce.plan_linear_cross_entropy(hidden, kernel, jax.ShapeDtypeStruct((N,), jnp.int32), reduction="mean")
    yield f"\nlinear loss, {N} x {D} x {V}, bfloat16", f"\n{plan}"


def _without_paths(flags: str) -> str:
    """Values other than numbers and bools are left out."""
    try:
        words = shlex.split(flags)
    except ValueError:  # a quote that nothing closes
        words = flags.split()
    given = [flag for flag in words if flag.startswith("--")]
    return " ".join(re.sub(r"=(?!(true|false|[\d.]+)$).*", "=...", flag) for flag in given)


def main() -> None:
    argparse.ArgumentParser(prog="python -m jaxce.info", description=__doc__).parse_args()
    for name, value in rows():
        print(f"{name:<32}{value}".rstrip(), flush=True)  # XLA may end the process at the next row


if __name__ == "__main__":
    main()
