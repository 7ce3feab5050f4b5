"""`python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

from benchmarks import dense, linear, readme, sharded


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("dense", help="the loss on logits beside optax (and torch, if it is installed)")
    _add_options(command, dense.run, seconds=0.5, smoke="the smallest shape, quickly, to see that it runs")
    command.add_argument("--regime", nargs="+", choices=dense.REGIMES, help="some kinds of logits only; writes no file")
    command.add_argument("--cases", nargs="+", choices=dense.CASES, help="some kinds of targets only; writes no file")
    command.add_argument("--cells", nargs="+", metavar="NxV", help="some shapes only, 128x10 say; writes no file")
    command = commands.add_parser("linear", help="the loss of a linear layer beside optax, and what else is installed")
    _add_options(command, linear.run, seconds=3.0, smoke="tiny shapes, quickly, to see that it runs")
    command.add_argument("--h100-target-config", type=pathlib.Path, help="description of the GPU, to compile for it")
    command = commands.add_parser("sharded", help="both losses with the vocabulary split over devices, beside optax")
    _add_options(command, sharded.run, seconds=3.0, smoke="one small mesh, quickly, to see that it runs")
    command = commands.add_parser("readme", help="write the tables of the README from the results files")
    command.set_defaults(run=readme.run)
    args = parser.parse_args()
    args.run(args)


def _add_options(
    command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], seconds: float, smoke: str
) -> None:
    command.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    command.add_argument(
        "--seconds", type=float, default=seconds, help="time for each comparison (default: %(default)g)"
    )
    command.add_argument("--smoke", action="store_true", help=smoke)
    command.set_defaults(run=run)


if __name__ == "__main__":
    main()
