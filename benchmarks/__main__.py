"""`python -m benchmarks NAME`."""

from __future__ import annotations

import argparse
import pathlib

from benchmarks import dense, readme


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("dense", help="the loss on logits beside optax (and torch, if it is installed)")
    command.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    command.add_argument("--seconds", type=float, default=2.0, help="time for each comparison (default: 2)")
    command.add_argument("--smoke", action="store_true", help="the two smallest shapes, quickly, to see that it runs")
    command.set_defaults(run=dense.run)
    command = commands.add_parser("readme", help="write the tables of the README from the results files")
    command.set_defaults(run=readme.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
