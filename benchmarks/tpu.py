"""What the real TPU compiler says of a program, on a machine without a TPU: compiled for, not run on.

libtpu compiles for a chip it is only told about. `bytes` and `cycles` are its own cost model's figures: good for
comparing two programs, not for promising a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# Without these libtpu looks for the machine's metadata, which only a cloud machine has, and lets only one process in.
for _name, _value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(_name, _value)

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
_UNKNOWN = 2**63 - 1


def compile_for(chip: str, f: Callable, *shapes: Any) -> dict[str, Any]:
    """Bytes accessed, estimated cycles, temporary HBM, and the gathers and scatters in `f` compiled for one chip."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    one = SingleDeviceSharding(topology.devices[0])
    program = jax.jit(f, in_shardings=one, out_shardings=one).lower(*shapes).compile()
    text = program.as_text()
    cycles = [int(c) for c in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    return {
        "bytes": program.cost_analysis()["bytes accessed"],
        "cycles": sum(c for c in cycles if c != _UNKNOWN),
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "gathers_and_scatters": [*re.findall(r"= (\S+) (?:gather|scatter)\(", text)],
    }
