"""The language-model example on several processes, each with its share of the embedding table."""

# mypy: untyped-calls-exclude=jax

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Sequence

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

AXIS = "vocabulary"
TABLE = P(AXIS)


def launch(program: Callable[..., int], arguments: Sequence[object], count: int) -> int:
    """Run ``program(*arguments)`` in so many processes on this machine that work as one.

    Returns the first exit code that is not 0. On several machines, start the program once on each with
    `jax.distributed.initialize` instead.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # A fork would share the parent's threads, which JAX does not survive.
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(program, arguments, address, count, i)) for i in range(count)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()
    return next((worker.exitcode for worker in workers if worker.exitcode), 0)


def _work(program: Callable[..., int], arguments: Sequence[object], address: str, count: int, index: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index)
    raise SystemExit(program(*arguments))


def make_mesh() -> Mesh | None:
    """All devices of all processes in a row; None for one process."""
    if jax.process_count() == 1:
        return None
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def place(module: nnx.Pytree, mesh: Mesh, table: nnx.Param[jax.Array] | None = None) -> None:
    """Give each device its share of the table, and a copy of everything else that was made on one of them.

    That includes an optimizer's counters: left there, they would make the second step another program than the first.
    """
    for variable in jax.tree.leaves(nnx.state(module), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        if isinstance(variable[...].sharding, SingleDeviceSharding):
            spec = TABLE if table is not None and variable[...] is table[...] else P()
            variable[...] = jax.device_put(variable[...], NamedSharding(mesh, spec))
