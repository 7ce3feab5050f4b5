"""The kernels for TPU on CPU: interpreted, or on a simulated chip."""

from __future__ import annotations

import contextlib
from unittest import mock

import jax
from jax.experimental.pallas import tpu as pltpu

from jaxce.linear import chips, pallas_tpu
from jaxce.linear import plan as plans

STORED = {"on chip": (True, 1), "in HBM": (False, 1), "two cores": (False, 2), "on chip of two cores": (True, 2)}


@contextlib.contextmanager
def interpreted(stored="on chip", interpret=None, shape=(128, 128), lanes=128):
    """Programs for CPU have the kernels, where `implementation` asks for them, and interpret them.

    With fewer lanes than a chip has, problems of fewer classes have blocks.

    Until JAX 0.12 the faster interpreter reads what is written in place as it was before.
    """
    resident, cores = STORED[stored]
    interpret = interpret or (True if resident else simulated(cores))

    def kernels(problem, kind):
        return pallas_tpu.Blocks(shape, shape, resident, chips.Tpu("", 2**24, cores))

    with (
        mock.patch.object(pallas_tpu, "PLATFORMS", ("tpu", "cpu")),
        mock.patch.object(pallas_tpu, "INTERPRET", interpret),
        mock.patch.object(pallas_tpu, "kernels", kernels),
        mock.patch.object(pallas_tpu, "LANES", lanes),
        mock.patch.object(pallas_tpu, "_FEWEST_CLASSES", 2 * lanes),
    ):
        plans._plans.cache_clear()
        jax.clear_caches()
        yield
    plans._plans.cache_clear()
    jax.clear_caches()


def simulated(cores=1):
    """Memory, copies and cores of a chip: what was not written is NaN, copies arrive late, and races are found."""
    names = {"num_cores_or_threads", "num_cores_per_device"} & set(pltpu.InterpretParams.__dataclass_fields__)
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait", **dict.fromkeys(names, cores)
    )


def races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found
