"""`python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import importlib
import sys

NAMES = {
    "dense": "the loss on logits beside optax (and torch, if it is installed)",
    "linear": "the loss of a linear layer beside optax, and what else is installed",
    "sharded": "both losses with the vocabulary split over devices, beside optax",
    "posttraining": "log-probabilities and distillation from hidden states, beside the same on materialised logits",
    "pallas": "the kernels for TPU beside jaxce's loop and optax: compiled and counted, without a TPU",
    "gpu": "both losses and the plans of the linear one on a GPU; needs jax and numpy alone",
    "readme": "write the tables of the README and the documentation from the results files",
}


def main() -> None:
    names = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = names.add_subparsers(dest="name", required=True)
    for name, what in NAMES.items():
        commands.add_parser(name, help=what, add_help=False)
    name = names.parse_known_args()[0].name
    module = importlib.import_module(f"benchmarks.{name}")  # and no other, which would need other packages
    command = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=NAMES[name])
    module.add_options(command)
    module.run(command.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    main()
