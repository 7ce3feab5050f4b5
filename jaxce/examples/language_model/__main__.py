"""The command line of the language-model example."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxce.examples import language_model
from jaxce.examples.common import UsageError, checked, exit_code, natural_number, positive_integer
from jaxce.examples.language_model.data import BYTES, UnusableTextError
from jaxce.examples.language_model.model import HEAD_SIZE
from jaxce.examples.language_model.processes import launch
from jaxce.examples.language_model.program import work
from jaxce.examples.language_model.training import Settings

VOCAB_SIZE = 4096
PREFERENCE_STEPS = 100

positive = checked(float, "a finite number above 0", lambda x: 0 < x < math.inf)
vocabulary = checked(int, f"a whole number from {BYTES} up", lambda n: n >= BYTES)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxce.examples.language_model",
        description=language_model.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="a text file, or a folder of them (default: text that comes with Python and its packages)",
    )
    files.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/language_model"),
        help="where the results go (default: %(default)s)",
    )

    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--loss",
        choices=("fused", "dense"),
        default="fused",
        help="linear_cross_entropy, or softmax_cross_entropy of logits in memory (default: %(default)s)",
    )
    loss.add_argument("--mode", choices=("recompute", "store"), help="of the fused loss (default: chosen by jaxce)")

    loss.add_argument(
        "--objective",
        choices=("sft", "distill", "dpo"),
        default="sft",
        help="learn from text alone; then distill into a student of half the width and layers; or then prefer the "
        "text's own continuations to others (default: %(default)s)",
    )
    loss.add_argument(
        "--preference-steps", type=positive_integer, help=f"of dpo, after those on text (default: {PREFERENCE_STEPS})"
    )

    tokens = parser.add_argument_group("tokens")
    tokens.add_argument(
        "--tokens",
        choices=("pairs", "bytes"),
        default="pairs",
        help="byte pairs, merged into a vocabulary, or plain bytes (default: %(default)s)",
    )
    tokens.add_argument("--vocab-size", type=vocabulary, help=f"of byte pairs (default: {VOCAB_SIZE})")

    training = parser.add_argument_group("training")
    for name, default, what in (
        ("--context", 128, "tokens that a prediction can look at"),
        ("--width", 128, f"of the network, in multiples of {HEAD_SIZE}"),
        ("--layers", 4, "blocks of attention and dense layers"),
        ("--steps", 800, "updates of the weights"),
        ("--batch-size", 16, "sequences in a step"),
    ):
        training.add_argument(name, type=positive_integer, default=default, help=f"{what} (default: %(default)s)")
    training.add_argument(
        "--learning-rate", type=positive, default=3e-3, help="the peak, after the warm-up (default: %(default)s)"
    )
    training.add_argument(
        "--processes",
        type=positive_integer,
        default=1,
        help="that work together on this machine, the embedding table split over them (default: %(default)s)",
    )
    training.add_argument("--seed", type=natural_number, default=0, help="(default: %(default)s)")
    return parser


def settings_from(arguments: argparse.Namespace) -> Settings:
    if arguments.mode and arguments.loss == "dense":
        raise UsageError(f"--mode: expected none with --loss dense, which has no modes, got {arguments.mode}.")
    if arguments.vocab_size and arguments.tokens == "bytes":
        raise UsageError(
            f"--vocab-size: expected none with --tokens bytes, which are {BYTES}, got {arguments.vocab_size}."
        )
    if arguments.objective != "sft":
        check_objective(arguments)
    if arguments.preference_steps and arguments.objective != "dpo":
        raise UsageError(
            f"--preference-steps: expected none with --objective {arguments.objective}, which has no preferences, "
            f"got {arguments.preference_steps}."
        )
    chosen = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    if arguments.tokens == "pairs" and arguments.vocab_size is None:
        chosen["vocab_size"] = VOCAB_SIZE
    chosen["preference_steps"] = 0
    if arguments.objective == "dpo":
        chosen["preference_steps"] = arguments.preference_steps or PREFERENCE_STEPS
    return Settings(**chosen)


def check_objective(arguments: argparse.Namespace) -> None:
    objective = f"with --objective {arguments.objective}"
    if arguments.loss != "fused":
        raise UsageError(f"--loss: expected fused {objective}, which never holds the logits, got {arguments.loss}.")
    if arguments.processes > 1:
        raise UsageError(f"--processes: expected 1 {objective}, got {arguments.processes}.")
    if arguments.objective == "distill" and arguments.width != HEAD_SIZE and arguments.width % (2 * HEAD_SIZE):
        raise UsageError(
            f"--width: expected {HEAD_SIZE} or a multiple of {2 * HEAD_SIZE} {objective}, whose students have half of "
            f"it in attention heads of {HEAD_SIZE}, got {arguments.width}."
        )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)

    def program() -> int:
        cores = os.cpu_count() or 1
        if arguments.processes > cores:
            raise UsageError(f"--processes: expected at most {cores}, the cores here, got {arguments.processes}.")
        given = settings_from(arguments), arguments.data, arguments.output_dir
        return work(*given) if arguments.processes == 1 else launch(work, given, arguments.processes)

    return exit_code(program, UnusableTextError, "Interrupted.")


if __name__ == "__main__":
    sys.exit(main())
