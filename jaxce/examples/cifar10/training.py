"""Train a convolutional network on CIFAR-10 with jaxce's loss.

    python -m jaxce.examples.cifar10                         past 70% in minutes on two cores
    python -m jaxce.examples.cifar10 --data-dir ~/data       CIFAR-10 that is on disk already
    python -m jaxce.examples.cifar10 --loss optax            the same curve with optax's loss
    python -m jaxce.examples.cifar10 --mixup 0.2 --label-smoothing 0.1
    python -m jaxce.examples.cifar10 --recipe full           aims past 90%, in hours
    python -m jaxce.examples.cifar10 --recipe full --resume  goes on where it was interrupted

CIFAR-10 (the official binary version, 162 MB) is downloaded when --data-dir does not hold it;
without a network the program trains on scikit-learn's digits instead. It prints a row per epoch
and, at the end, a report of what the loss on the test images means; it writes curves.png,
report.png, history.json, report.json and checkpoint/ to --output-dir.

Needs the extra: pip install "jaxce[examples]"
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import jaxce
from jaxce.examples.cifar10 import data as datasets
from jaxce.examples.cifar10 import model as networks
from jaxce.examples.cifar10 import report as reports
from jaxce.examples.cifar10.checkpoint import Checkpoint
from jaxce.examples.cifar10.data import NUM_CLASSES, DamagedDataError, Dataset
from jaxce.examples.cifar10.report import EpochRow
from jaxce.examples.common import UsageError, checked, exit_code, natural_number, positive_integer, progress_bar

Targets = jax.Array | jaxce.SparseTargets

WEIGHT_DECAY = 5e-4
EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What goes well together; the flags of the same names override it."""

    network: Callable[[int, int, int, nnx.Rngs], networks.Network]
    width: int
    epochs: int
    batch_size: int
    learning_rate: float  # the peak, for this batch size
    label_smoothing: float
    crop: bool


RECIPES = {
    "demo": Recipe(
        network=networks.small_network,
        width=32,
        epochs=5,
        batch_size=64,
        learning_rate=0.1,
        label_smoothing=0.0,
        crop=False,
    ),
    "full": Recipe(
        network=networks.residual_network,
        width=32,
        epochs=24,
        batch_size=128,
        learning_rate=0.2,
        label_smoothing=0.1,
        crop=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides how training goes: on one machine, equal settings, equal curves."""

    recipe: str
    loss: str
    epochs: int
    batch_size: int
    width: int
    label_smoothing: float
    mixup: float
    seed: int
    train_examples: int | None
    test_examples: int | None

    @property
    def learning_rate(self) -> float:
        """In proportion to the batch size (Goyal et al. 2017, arXiv:1706.02677)."""
        recipe = RECIPES[self.recipe]
        return recipe.learning_rate * self.batch_size / recipe.batch_size


# The loss, from either library.


def jaxce_loss(logits: jax.Array, targets: Targets, label_smoothing: float) -> jax.Array:
    return jaxce.softmax_cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="mean")


def optax_loss(logits: jax.Array, targets: Targets, label_smoothing: float) -> jax.Array:
    """The same from optax, which wants dense targets for all but plain labels."""
    if isinstance(targets, jaxce.SparseTargets):
        one_hot = jax.nn.one_hot(targets.indices, logits.shape[-1])
        dense = jnp.sum(targets.probs[..., None] * one_hot, axis=-2)
    elif label_smoothing:
        dense = jax.nn.one_hot(targets, logits.shape[-1])
    else:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(dense, label_smoothing)).mean()


LOSSES = {"jaxce": jaxce_loss, "optax": optax_loss}


# Training.


class Trainer:
    """A network, its optimizer, and the compiled steps that train and test it."""

    def __init__(self, data: Dataset, settings: Settings) -> None:
        self.data = data
        self.settings = settings
        self.steps_per_epoch = len(data.train_labels) // settings.batch_size
        if not self.steps_per_epoch:
            raise UsageError(
                f"--batch-size: expected at most {len(data.train_labels)}, the number of training "
                f"examples, got {settings.batch_size}."
            )
        channels = data.train_images.shape[-1]
        network = RECIPES[settings.recipe].network
        self.model = network(channels, settings.width, NUM_CLASSES, nnx.Rngs(settings.seed))
        self.optimizer = make_optimizer(self.model, settings, self.steps_per_epoch)
        self._train_step = make_train_step(settings, data.mirrors)
        self._test_step = make_test_step(settings)
        self._summary_step = nnx.jit(lambda model, images, labels: jaxce.diagnostics.summarize(model(images), labels))

    @property
    def modules(self) -> tuple[nnx.Module, nnx.Optimizer]:
        """All that training changes."""
        return self.model, self.optimizer

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model, nnx.Param)))

    def train_epoch(self, epoch: int, on_step: Callable[[float], None]) -> float:
        """One pass over the training images; the mean of the losses on the way."""
        losses = []
        for batch in self.batches(epoch):
            images, labels = self.data.train_images[batch], self.data.train_labels[batch]
            losses.append(float(self._train_step(self.model, self.optimizer, images, labels)))
            on_step(losses[-1])
        return float(np.mean(losses))

    def test(self) -> tuple[float, float]:
        """Loss and accuracy on the test images."""
        model = nnx.view(self.model, use_running_average=True)
        images, labels = self.data.test_images, self.data.test_labels
        totals = np.zeros(2)
        for start in range(0, len(labels), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            totals += jax.device_get(self._test_step(model, images[batch], labels[batch]))
        loss, accuracy = totals / len(labels)
        return float(loss), float(accuracy)

    def report(self) -> jaxce.diagnostics.Report:
        """What the loss on the test images means."""
        model = nnx.view(self.model, use_running_average=True)
        images, labels = self.data.test_images, self.data.test_labels
        summaries = []
        for start in range(0, len(labels), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            summaries.append(self._summary_step(model, images[batch], labels[batch]))
        return jaxce.diagnostics.finish(
            functools.reduce(jaxce.diagnostics.merge, summaries), class_names=self.data.class_names
        )

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Indices of the batches, in an order that only (seed, epoch) decide.

        The few images that fill no batch sit out, others in every epoch.
        """
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.data.train_labels))
        used = self.steps_per_epoch * self.settings.batch_size
        return np.split(order[:used], self.steps_per_epoch)


def make_optimizer(model: nnx.Module, settings: Settings, steps_per_epoch: int) -> nnx.Optimizer:
    """SGD with Nesterov momentum, its rate rising for a quarter of the run and then falling."""
    schedule = optax.cosine_onecycle_schedule(
        steps_per_epoch * settings.epochs,
        settings.learning_rate,
        pct_start=0.25,
        div_factor=10,
        final_div_factor=100,
    )
    descent = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )
    return nnx.Optimizer(model, descent, wrt=nnx.Param)


def make_train_step(settings: Settings, mirrors: bool) -> Callable[..., jax.Array]:
    """The step ``(model, optimizer, images, labels) -> loss``, which updates the first two.

    Images come in as bytes, a quarter of the floats they become inside.
    """
    loss = LOSSES[settings.loss]
    crop = RECIPES[settings.recipe].crop

    def prepare(key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Targets]:
        flip_key, crop_key, mixup_key = jax.random.split(key, 3)
        if mirrors:
            images = networks.random_flip(flip_key, images)
        if crop:
            images = networks.random_crop(crop_key, images)
        if settings.mixup:
            return networks.mixup(mixup_key, images, labels, settings.mixup)
        return images, labels

    def train_step(model: nnx.Module, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
        # Drawn from (seed, step) alone, so a resumed run goes on with the same random numbers.
        key = jax.random.fold_in(jax.random.key(settings.seed), optimizer.step[...])
        inputs, targets = prepare(key, images, labels)

        def objective(model: nnx.Module) -> jax.Array:
            return loss(model(inputs), targets, settings.label_smoothing)

        value, gradients = nnx.value_and_grad(objective)(model)
        optimizer.update(model, gradients)
        return value

    return nnx.jit(train_step, donate_argnums=(0, 1))


def make_test_step(settings: Settings) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The step ``(model, images, labels) -> (sum of plain losses, number of hits)``."""
    loss = LOSSES[settings.loss]

    def test_step(model: nnx.Module, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(images)
        return loss(logits, labels, 0.0) * len(labels), jnp.sum(logits.argmax(-1) == labels)

    return nnx.jit(test_step)


# The program.


def run(
    settings: Settings,
    *,
    data_dir: Path,
    output_dir: Path,
    resume: bool = False,
    stop_after: int | None = None,
    console: Console,
) -> list[EpochRow]:
    """Load, train, save. Returns the rows of all epochs, those before a resumption included."""
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint(output_dir)
    if resume and checkpoint.epoch is None:
        raise UsageError(
            f"--resume: expected a checkpoint in {checkpoint.path}, found none. "
            "Run without --resume first, or name the --output-dir of that run."
        )
    data = datasets.load(data_dir, console)
    data = data.first(settings.train_examples, settings.test_examples)
    trainer = Trainer(data, settings)
    console.print(f"{data}\nnetwork: {trainer.parameters:,} parameters; loss: {settings.loss}")

    if resume:
        start_loss, rows = restore(checkpoint, trainer, console)
    else:
        start_loss, rows = trainer.test()[0], []
        console.print(reports.start_message(start_loss))

    about = {"arguments": dataclasses.asdict(settings), "data": str(data)}

    def on_epoch(row: EpochRow) -> None:
        rows.append(row)
        console.print(str(row))
        record = about | {"start_loss": start_loss, "rows": [dataclasses.asdict(r) for r in rows]}
        checkpoint.save(row.epoch, trainer.modules, record)

    console.print("\n".join([reports.HEADER, *map(str, rows)]))
    last = min(settings.epochs, stop_after or settings.epochs)
    train(trainer, range(len(rows) + 1, last + 1), on_epoch, console)

    title = f"{data.name}, {settings.recipe} recipe, {settings.loss} loss: accuracy {rows[-1].test_accuracy:.1%}"
    reports.plot_history(output_dir / "curves.png", title, start_loss, rows)
    reports.write_history(output_dir / "history.json", about, start_loss, rows)
    report = trainer.report()
    console.print(f"\nWhat the loss on the {len(data.test_labels):,} test images means\n\n{report}\n")
    reports.write_report(output_dir, report)
    console.print(f"wrote curves.png, report.png, history.json, report.json and checkpoint/ to {output_dir}")
    return rows


def train(trainer: Trainer, epochs: range, on_epoch: Callable[[EpochRow], None], console: Console) -> None:
    """Train and test for the given epochs under a progress bar; each row goes to ``on_epoch``."""
    with progress_bar(console) as progress:
        total = len(epochs) * trainer.steps_per_epoch
        task = progress.add_task("", total=total, loss="")
        for epoch in epochs:
            progress.update(task, description=f"epoch {epoch}/{epochs[-1]}")
            started = time.perf_counter()
            train_loss = trainer.train_epoch(
                epoch, on_step=lambda loss: progress.update(task, advance=1, loss=f"loss {loss:.3f}")
            )
            test_loss, test_accuracy = trainer.test()
            seconds = time.perf_counter() - started
            on_epoch(EpochRow(epoch, train_loss, test_loss, test_accuracy, seconds))


def restore(checkpoint: Checkpoint, trainer: Trainer, console: Console) -> tuple[float, list[EpochRow]]:
    """Put the trainer where the checkpoint left off; the loss at the start, and the rows so far.

    The settings must be those of the checkpoint, but for the number of epochs.
    """
    record = checkpoint.record()
    before = record["arguments"] | {"data": record["data"]}
    now = dataclasses.asdict(trainer.settings) | {"data": str(trainer.data)}
    for name, value in now.items():
        if name != "epochs" and value != before[name]:
            raise UsageError(
                f"--resume: expected {name} {before[name]}, as in {checkpoint.path}, got {value}. "
                "Resume with the arguments of the first run, or use another --output-dir."
            )
    if now["epochs"] != before["epochs"]:
        console.print(
            f"The learning rate was planned for {before['epochs']} epochs and now follows a plan "
            f"for {now['epochs']}: the curve will not be that of {now['epochs']} epochs in one go. "
            "(To stop early without that, use --stop-after.)",
            style="yellow",
        )
    checkpoint.restore(trainer.modules)
    return record["start_loss"], [EpochRow(**row) for row in record["rows"]]


# The command line.


nonnegative = checked(float, "a finite number from 0 up", lambda x: 0 <= x < math.inf)
fraction = checked(float, "a number from 0 to below 1", lambda x: 0 <= x < 1)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxce.examples.cifar10",
        description=__doc__,
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

    return exit_code(program, DamagedDataError, "Interrupted. --resume goes on after the last row above.")
