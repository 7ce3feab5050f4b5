"""The command line of the CIFAR-10 example."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxce.examples import cifar10
from jaxce.examples.cifar10.data import DamagedDataError
from jaxce.examples.cifar10.program import SAVE_SECONDS, run
from jaxce.examples.cifar10.training import LOSSES, RECIPES, Settings
from jaxce.examples.common import checked, exit_code, natural_number, positive_integer

nonnegative = checked(float, "a finite number from 0 up", lambda x: 0 <= x < math.inf)
fraction = checked(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxce.examples.cifar10",
        description=cifar10.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data-dir",
        type=Path,
        default=Path("runs/data"),
        help="where CIFAR-10 is, or is downloaded to (default: %(default)s)",
    )
    files.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/cifar10"),
        help="where the results go (default: %(default)s)",
    )
    files.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output-dir")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--recipe",
        choices=RECIPES,
        default="demo",
        help="what the defaults below are: a quick start, or a good result (default: %(default)s)",
    )
    training.add_argument(
        "--loss",
        choices=LOSSES,
        default="jaxce",
        help="the library the loss comes from (default: %(default)s)",
    )
    training.add_argument("--epochs", type=positive_integer, help=recipe_default("epochs"))
    training.add_argument(
        "--stop-after",
        type=positive_integer,
        metavar="EPOCH",
        help="end there, with the learning rate of --epochs; for a later --resume",
    )
    training.add_argument("--batch-size", type=positive_integer, help=recipe_default("batch_size"))
    training.add_argument(
        "--width",
        type=positive_integer,
        help="channels of the first convolution " + recipe_default("width"),
    )
    training.add_argument(
        "--label-smoothing",
        type=fraction,
        metavar="EPSILON",
        help="share of each target spread over all classes " + recipe_default("label_smoothing"),
    )
    training.add_argument(
        "--mixup",
        type=nonnegative,
        default=0.0,
        metavar="ALPHA",
        help="blend pairs of images, with shares drawn from Beta(ALPHA, ALPHA) (default: 0, don't)",
    )
    training.add_argument("--seed", type=natural_number, default=0, help="(default: %(default)s)")
    for split in ("train", "test"):
        training.add_argument(
            f"--{split}-examples",
            type=positive_integer,
            metavar="N",
            help=f"{split} on the first N images only",
        )
    return parser


def recipe_default(field: str) -> str:
    values = ", ".join(f"{name}: {getattr(recipe, field)}" for name, recipe in RECIPES.items())
    return f"(default for {values})"


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The arguments, with the recipe's values for those not given."""
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    recipe = vars(RECIPES[arguments.recipe])
    chosen: dict[str, Any] = {k: recipe.get(k) if v is None else v for k, v in given.items()}
    return Settings(**chosen)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)

    def program() -> None:
        run(
            settings_from(arguments),
            data_dir=arguments.data_dir,
            output_dir=arguments.output_dir,
            resume=arguments.resume,
            stop_after=arguments.stop_after,
            console=Console(highlight=False, soft_wrap=True),
        )

    interrupted = f"Interrupted. --resume goes on from the newest checkpoint, one of every {SAVE_SECONDS:.0f} seconds."
    return exit_code(program, DamagedDataError, interrupted)


if __name__ == "__main__":
    sys.exit(main())
