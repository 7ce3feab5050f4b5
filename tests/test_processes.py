"""Two processes that work as one give the loss and the gradients of a single one."""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxce

EPS = float(np.finfo(np.float32).eps)
N, D, V = 13, 7, 28
PROCESSES, DEVICES = 2, 2  # devices of each


def arguments():
    rng = np.random.default_rng(5)
    hidden = rng.standard_normal((N, D), np.float32)
    kernel = rng.standard_normal((D, V), np.float32)
    return hidden, kernel, rng.integers(0, V, N).astype(np.int32)


def linear(hidden, kernel, labels, **options):
    return jaxce.linear_cross_entropy(hidden, kernel, labels, label_smoothing=0.1, reduction="mean", **options)


def dense(hidden, kernel, labels, **options):
    logits = hidden @ kernel
    return jaxce.softmax_cross_entropy(logits, labels, label_smoothing=0.1, reduction="mean", **options)


LOSSES = {"linear": linear, "dense": dense}


def work(address, index, path):
    """In one of the processes: loss and gradients, written by the first of them."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, PROCESSES, index)
    assert jax.device_count() == PROCESSES * DEVICES
    mesh = jax.make_mesh((PROCESSES * DEVICES,), ("v",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, P())
    found = {}
    for name, f in LOSSES.items():
        loss = jax.shard_map(
            lambda h, k, y, f=f: f(h, k, y, axis_name="v"), mesh=mesh, in_specs=(P(), P(None, "v"), P()), out_specs=P()
        )
        run = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=whole)
        found[name] = [np.asarray(x).tolist() for x in jax.tree.leaves(run(*arguments()))]
    if index == 0:
        pathlib.Path(path).write_text(json.dumps(found))
    jax.distributed.shutdown()


def test_loss_and_gradients_of_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    path = tmp_path / "found.json"
    code = "import sys; from tests.test_processes import work; work(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(i), str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for i in range(PROCESSES)
    ]
    try:
        said = [worker.communicate(timeout=300)[0].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * PROCESSES, "\n".join(said)
    found = json.loads(path.read_text())
    for name, f in LOSSES.items():
        wanted = jax.tree.leaves(jax.value_and_grad(f, (0, 1))(*arguments()))
        for got, want in zip(found[name], wanted, strict=True):
            # Sums in another order: a logit is off by (D + 2) ε Σ|h||k| < 300 ε, see test_linear.py.
            np.testing.assert_allclose(got, want, rtol=600 * EPS, atol=600 * EPS * np.abs(want).max(), err_msg=name)
