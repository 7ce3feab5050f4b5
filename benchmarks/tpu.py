"""What the real TPU compiler says of a program, on a machine without a TPU: compiled for, not run on.

libtpu compiles for a chip it is only told about. `bytes` and `cycles` are its own cost model's figures: good for
comparing two programs, not for promising a time.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from benchmarks.hlo import corrected_cycles, estimated_cycles
from benchmarks.measure import temp_bytes

# Without these libtpu looks for the machine's metadata, which only a cloud machine has, and lets only one process in.
for _name, _value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(_name, _value)

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1", "v4": "v4:2x2x1"}


def compile_for(chip: str, f: Callable, *shapes: Any, told: bool = True, hbm: float | None = None) -> dict[str, Any]:
    """Bytes accessed, estimated cycles, temporary HBM, and the gathers and scatters in `f` compiled for one chip.

    `cycles` counts the body of a loop as often as it runs; `bytes` counts it once. Unless it is `told`, the chip is not
    known while `f` is traced, as on any machine that has none. With the bytes from `hbm` in a cycle, `corrected_cycles`
    as well.
    """
    one = SingleDeviceSharding(_device(chip))
    with traced_for(chip) if told else contextlib.nullcontext(), uncached():
        program = jax.jit(f, in_shardings=one, out_shardings=one).lower(*shapes).compile()
    text, cost = program.as_text() or "", program.cost_analysis() or {}
    return {
        "bytes": cost.get("bytes accessed"),
        "cycles": estimated_cycles(text),
        "corrected_cycles": corrected_cycles(text, hbm) if hbm else None,
        "temp_bytes": temp_bytes(program),
        "gathers_and_scatters": [*re.findall(r"= (\S+) (?:gather|scatter)\(", text)],
    }


def traced_for(chip: str) -> contextlib.AbstractContextManager:
    """While it lasts, code that asks for platform and chip as it is traced is told this chip."""
    return told(_device(chip))


def told(device: Any) -> contextlib.AbstractContextManager:
    """The same for a device of any platform, one that a topology describes."""
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform=device.platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("i",), (AxisType.Auto,), abstract_device=abstract))


def _device(chip: str) -> Any:
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """A program for a chip that is not here cannot be read back from the compilation cache: it must not go there."""
    config: Any = jax.config
    seconds = config.jax_persistent_cache_min_compile_time_secs
    config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        yield
    finally:
        config.update("jax_persistent_cache_min_compile_time_secs", seconds)
