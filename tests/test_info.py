"""`python -m jaxce.info`, which people paste into bug reports: all that is asked for, nothing that tells on them."""

from __future__ import annotations

import getpass
import os
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jaxce
from jaxce import info


def printed(**environment: str) -> str:
    command = [sys.executable, "-m", "jaxce.info"]
    return subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    ).stdout


def test_what_it_prints(tmp_path):
    flags = (
        f"--xla_force_host_platform_device_count=3 --xla_dump_to={tmp_path} '--xla_dump_hlo_as_text' {tmp_path}/flags"
    )
    text = printed(
        XLA_FLAGS=flags,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path),
        JAX_ENABLE_X64="1",
    )
    found = {tuple(line.split(maxsplit=1)) for line in text.splitlines()}
    versions = {"jaxce": jaxce, "jax": jax, "jaxlib": jaxlib, "numpy": np}
    assert found >= {(name, module.__version__) for name, module in versions.items()}
    assert found >= {
        ("Python", f"{platform.python_version()}, CPython"),
        ("jax_enable_x64", "True"),
        ("jax_debug_nans", "False"),
        ("jax_numpy_rank_promotion", "allow"),
        ("devices", "3 x cpu, cpu"),
        ("processes", "1"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=3 --xla_dump_to=... --xla_dump_hlo_as_text"),
    }
    hidden, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8192, 2048), (2048, 131072)))
    labels = jax.ShapeDtypeStruct((8192,), jnp.int32)
    assert text.endswith(f"\n{jaxce.plan_linear_cross_entropy(hidden, kernel, labels, reduction='mean')}\n")
    assert "not in this version" not in text
    for secret in platform.node(), getpass.getuser(), os.path.expanduser("~"), tmp_path.name, sys.prefix:
        assert secret not in text
    assert not re.search(r"(^|[\s='\"])[/~]", text)


def test_flags_with_a_quote_that_nothing_closes(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/o'neil --xla_dump_hlo_as_text")
    assert dict(info.rows())["XLA_FLAGS"] == "--xla_dump_to=... --xla_dump_hlo_as_text"


def test_it_speaks_where_jax_cannot_start():
    lines = printed(JAX_PLATFORMS="no-such-platform").splitlines()
    assert lines[0].split() == ["jaxce", jaxce.__version__]
    assert "none: JAX cannot start" in lines[-1]
