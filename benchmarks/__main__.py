"""`python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile

NAMES = {
    "dense": "the loss on logits beside optax (and torch, if it is installed)",
    "linear": "the loss of a linear layer beside optax, and what else is installed",
    "sharded": "both losses with the vocabulary split over devices, beside optax",
    "posttraining": "log-probabilities and distillation from hidden states, beside the same on materialised logits",
    "pallas": "the kernels for TPU beside jaxce's loop and optax: compiled and counted, without a TPU",
    "gpu": "both losses and the plans of the linear one on a GPU; needs jax and numpy alone",
    "readme": "write the tables of the README and the documentation from the results files",
}


NOT_ON_CPU = "gpu", "readme"  # the others time on CPU, and compile for TPU without one


def main() -> None:
    names = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = names.add_subparsers(dest="name", required=True)
    for name, what in NAMES.items():
        commands.add_parser(name, help=what, add_help=False)
    name = names.parse_known_args()[0].name
    if name not in NOT_ON_CPU and not any(argument.startswith("--h100") for argument in sys.argv):
        os.environ["JAX_PLATFORMS"] = "cpu"  # read by the import of JAX
    module = importlib.import_module(f"benchmarks.{name}")  # and no other, which would need other packages
    command = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=NAMES[name])
    module.add_options(command)
    arguments = command.parse_args(sys.argv[2:])
    if "output_dir" in arguments:
        prepare(command, arguments)
    module.run(arguments)


def prepare(command: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """The folder for results, before the time is spent; toy figures go where no table is made of them."""
    if (
        getattr(arguments, "smoke", False)
        and arguments.output_dir.resolve() == command.get_default("output_dir").resolve()
    ):
        arguments.output_dir /= "smoke"
    try:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=arguments.output_dir).close()
    except OSError as problem:
        command.error(f"--output-dir: expected a folder, got {arguments.output_dir}: {problem.strerror}")


if __name__ == "__main__":
    main()
