"""Train a small GPT with jaxce's loss that never holds the logits.

    python -m jaxce.examples.language_model                  a few minutes on two cores
    python -m jaxce.examples.language_model --loss dense     the same curve with the logits in memory
    python -m jaxce.examples.language_model --data ~/notes   your own text: a file, or all files in a folder
    python -m jaxce.examples.language_model --tokens bytes   256 classes instead of thousands
    python -m jaxce.examples.language_model --mode store     gradients in the forward pass
    python -m jaxce.examples.language_model --processes 2    each with half of the embedding table

The text is what comes with Python: its reference manual, and the licences and documentation of
the installed packages. Nothing is downloaded. The embedding table [V, D] is the output layer too,
and the loss takes it as it is. The program prints what memory both losses need and a table of the
loss, and writes curves.png and history.json to --output-dir; it ends with text of its own.

Needs the extra: pip install "jaxce[examples]"
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import jaxce
from jaxce.examples.common import UsageError, checked, exit_code, natural_number, positive_integer, progress_bar
from jaxce.examples.language_model import data as texts
from jaxce.examples.language_model import model as networks
from jaxce.examples.language_model import processes
from jaxce.examples.language_model import report as reports
from jaxce.examples.language_model.data import Dataset, UnusableTextError
from jaxce.examples.language_model.model import HEAD_SIZE, LanguageModel
from jaxce.examples.language_model.report import Measures, Row, Yardsticks

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1  # of the steps
ROWS = 10  # in the table
VOCAB_SIZE = 4096
SAMPLE_PROMPT = "The"
SAMPLE_TOKENS = 200
SAMPLE_TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides how training goes: on one machine and text, equal settings, equal curves."""

    loss: str
    mode: str | None
    tokens: str
    vocab_size: int | None  # asked for, and for byte pairs only; short texts may have fewer
    context: int
    width: int
    layers: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int


# The loss, in either form.


def make_loss(name: str, mode: str | None = None, mesh: Mesh | None = None) -> Loss:
    """The mean loss, as a function of hidden ``[B, T, D]``, table ``[V, D]`` and targets ``[B, T]``.

    With a mesh, the fused loss takes the table as it is: split over the devices.
    """
    options: dict[str, Any] = {"vocab_axis": 0, "mode": mode, "reduction": "mean"}

    def fused(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(hidden, table, targets, **options)

    if mesh is not None:
        options["axis_name"] = processes.AXIS
        split = (P(), processes.TABLE, P())
        fused = jax.shard_map(fused, mesh=mesh, in_specs=split, out_specs=P())

    def dense(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
        return jaxce.softmax_cross_entropy(hidden @ table.T, targets, reduction="mean")

    return {"fused": fused, "dense": dense}[name]


def loss_arguments(settings: Settings, vocab_size: int, mesh: Mesh | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of hidden, table and targets in a training step."""
    batch = (settings.batch_size, settings.context)
    whole, split = (NamedSharding(mesh, P()), NamedSharding(mesh, processes.TABLE)) if mesh else (None, None)
    return (
        jax.ShapeDtypeStruct((*batch, settings.width), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((vocab_size, settings.width), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct(batch, jnp.int32, sharding=whole),
    )


def temporary_bytes(loss: Loss, settings: Settings, vocab_size: int, mesh: Mesh | None = None) -> int:
    """The memory that loss and gradients need on each device beside arguments and results."""
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step.lower(*loss_arguments(settings, vocab_size, mesh)).compile().memory_analysis().temp_size_in_bytes


# Training.


class Trainer:
    """A network, its optimizer, and the compiled steps that train and test it."""

    def __init__(self, data: Dataset, settings: Settings, mesh: Mesh | None = None) -> None:
        self.data = data
        self.settings = settings
        shortest = min(len(data.train), len(data.validation))
        if settings.context >= shortest:
            raise UsageError(
                f"--context: expected fewer than {shortest}, the tokens of the shorter part of the text, "
                f"got {settings.context}."
            )
        if settings.width % HEAD_SIZE:
            raise UsageError(
                f"--width: expected a multiple of {HEAD_SIZE}, the size of an attention head, got {settings.width}."
            )
        self.model = LanguageModel(
            data.tokenizer.vocab_size, settings.context, settings.width, settings.layers, nnx.Rngs(settings.seed)
        )
        if mesh is not None:
            tokens = data.tokenizer.vocab_size
            if tokens % mesh.size:
                raise UsageError(f"--processes: expected a number that divides the {tokens} tokens, got {mesh.size}.")
            processes.place(self.model, mesh, self.model.embedding.embedding)
        self.optimizer = make_optimizer(self.model, settings)
        if mesh is not None:
            processes.place(self.optimizer, mesh)
        loss = make_loss(settings.loss, settings.mode, mesh)
        self._train_step = make_train_step(loss)
        self._test_step = make_test_step(loss)

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model, nnx.Param)))

    def train_step(self, step: int) -> float:
        return float(self._train_step(self.model, self.optimizer, self.batch(step)))

    def batch(self, step: int) -> np.ndarray:
        """Windows ``[B, T + 1]`` from places that only (seed, step) decide: T tokens, and the one after each."""
        windows = np.lib.stride_tricks.sliding_window_view(self.data.train, self.settings.context + 1)
        rng = np.random.default_rng((self.settings.seed, step))
        return windows[rng.integers(len(windows), size=self.settings.batch_size)]

    def test(self) -> Measures:
        """How well the held-out text is predicted."""
        windows = self.validation_windows()
        nats = 0.0
        for start in range(0, len(windows), self.settings.batch_size):
            batch = windows[start : start + self.settings.batch_size]
            nats += float(self._test_step(self.model, batch)) * batch[:, 1:].size
        targets = windows[:, 1:]
        byte_count = int(self.data.tokenizer.byte_counts[targets].sum())
        return Measures(nats / targets.size, reports.bits_per_byte(nats, byte_count))

    def validation_windows(self) -> np.ndarray:
        """Windows that overlap by one token, so that each token but the first is predicted once.

        What is left at the end and fills no window sits out.
        """
        context = self.settings.context
        return np.lib.stride_tricks.sliding_window_view(self.data.validation, context + 1)[::context]

    def sample(self) -> str:
        """Text that the model makes up."""
        prompt = self.data.tokenizer.encode(SAMPLE_PROMPT)[-self.settings.context :]
        tokens = networks.generate(self.model, prompt, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, self.settings.seed)
        return self.data.tokenizer.decode(tokens)


def make_optimizer(model: nnx.Module, settings: Settings) -> nnx.Optimizer:
    """AdamW, its rate rising for a tenth of the run and then falling to a tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=settings.learning_rate / 10,
        peak_value=settings.learning_rate,
        warmup_steps=int(WARMUP_SHARE * settings.steps),
        decay_steps=settings.steps,
        end_value=settings.learning_rate / 10,
    )

    def matrices(parameters: Any) -> Any:
        return jax.tree.map(lambda parameter: parameter.ndim > 1, parameters)

    descent = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=WEIGHT_DECAY, mask=matrices),
    )
    return nnx.Optimizer(model, descent, wrt=nnx.Param)


def make_train_step(loss: Loss) -> Callable[..., jax.Array]:
    """The step ``(model, optimizer, windows) -> loss``, which updates the first two."""

    def train_step(model: LanguageModel, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
        def objective(model: LanguageModel) -> jax.Array:
            return loss(model(windows[:, :-1]), model.table, windows[:, 1:])

        value, gradients = nnx.value_and_grad(objective)(model)
        optimizer.update(model, gradients)
        return value

    return nnx.jit(train_step, donate_argnums=(0, 1))


def make_test_step(loss: Loss) -> Callable[..., jax.Array]:
    """The step ``(model, windows) -> loss``."""

    def test_step(model: LanguageModel, windows: jax.Array) -> jax.Array:
        return loss(model(windows[:, :-1]), model.table, windows[:, 1:])

    return nnx.jit(test_step)


# The program.


def run(settings: Settings, *, data: Path | None, output_dir: Path, console: Console) -> list[Row]:
    """Load, train, save; returns the rows."""
    mesh = processes.make_mesh()
    corpus = texts.load(data)
    console.print(str(corpus))
    dataset = texts.tokenize(corpus, settings.vocab_size)
    trainer = Trainer(dataset, settings, mesh)
    make_folder(output_dir)  # before the time is spent on training
    console.print(f"{dataset}\nnetwork: {trainer.parameters:,} parameters; loss: {settings.loss}")

    memory = report_memory(settings, dataset.tokenizer.vocab_size, console, mesh)
    plan = jaxce.plan_linear_cross_entropy(
        *loss_arguments(settings, dataset.tokenizer.vocab_size), vocab_axis=0, mode=settings.mode, reduction="mean"
    )
    console.print(f"how the fused loss goes about it:\n{plan}", markup=False)
    yardsticks = Yardsticks(dataset.tokenizer.vocab_size, dataset.unigram_entropy)
    start = trainer.test()
    console.print(yardsticks.start_message(start.loss))

    rows = train(trainer, console)

    sample = trainer.sample()
    if jax.process_index() > 0:
        return rows
    about = {
        "arguments": dataclasses.asdict(settings),
        "data": str(corpus),
        "tokens": str(dataset),
        "temporary_bytes": memory,
        "plan": str(plan),
        "sample": sample,
    }
    title = f"{corpus.name}, {settings.loss} loss: {rows[-1].validation.bits_per_byte:.2f} bits per byte"
    reports.plot_history(output_dir / "curves.png", title, yardsticks, start, rows)
    reports.write_history(output_dir / "history.json", about, yardsticks, start, rows)
    console.print(f"wrote curves.png and history.json to {output_dir}\n\n{SAMPLE_TOKENS} tokens that it makes up:\n")
    console.print(sample, markup=False)
    return rows


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UsageError(f"--output-dir: expected a folder, got {path}: {problem.strerror}.") from problem


def report_memory(settings: Settings, vocab_size: int, console: Console, mesh: Mesh | None = None) -> dict[str, int]:
    """Print, and return in bytes, what both losses need on each device beside arguments and results."""
    losses = {"fused": make_loss("fused", settings.mode, mesh), "dense": make_loss("dense")}
    memory = {name: temporary_bytes(loss, settings, vocab_size, mesh) for name, loss in losses.items()}
    rows = settings.batch_size * settings.context
    needs = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in memory.items())
    console.print(
        f"temporary memory of loss and gradients for {rows:,} x {vocab_size:,} logits "
        f"({4 * rows * vocab_size / 1e6:.2f} MB): {needs}"
    )
    return memory


def train(trainer: Trainer, console: Console) -> list[Row]:
    """Train under a progress bar, with a row printed every now and then."""
    steps = trainer.settings.steps
    row_steps = {math.ceil(steps * i / ROWS) for i in range(1, ROWS + 1)}
    rows: list[Row] = []
    losses: list[float] = []
    console.print(reports.HEADER)
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=steps, loss="")
        started = time.perf_counter()
        for step in range(1, steps + 1):
            losses.append(trainer.train_step(step))
            progress.update(task, advance=1, loss=f"loss {losses[-1]:.3f}")
            if step in row_steps:
                validation = trainer.test()
                rows.append(Row(step, float(np.mean(losses)), validation, time.perf_counter() - started))
                console.print(str(rows[-1]))
                losses, started = [], time.perf_counter()
    return rows


# The command line.

positive = checked(float, "a finite number above 0", lambda x: 0 < x < math.inf)
vocabulary = checked(int, f"a whole number from {texts.BYTES} up", lambda n: n >= texts.BYTES)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxce.examples.language_model",
        description=__doc__,
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
            f"--vocab-size: expected none with --tokens bytes, which are {texts.BYTES}, got {arguments.vocab_size}."
        )
    chosen = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)}
    if arguments.tokens == "pairs" and arguments.vocab_size is None:
        chosen["vocab_size"] = VOCAB_SIZE
    return Settings(**chosen)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser().parse_args(argv)
    if arguments.processes == 1:
        return work(argv)
    return processes.launch(work, argv, arguments.processes)


def work(argv: Sequence[str]) -> int:
    """The program in one process. The first of several speaks for all."""
    arguments = make_parser().parse_args(argv)

    def program() -> None:
        run(
            settings_from(arguments),
            data=arguments.data,
            output_dir=arguments.output_dir,
            console=Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0),
        )

    return exit_code(program, UnusableTextError, "Interrupted.")
