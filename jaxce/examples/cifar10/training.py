"""Recipes and settings of the CIFAR-10 example, the loss from either library, and the trainer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxce
from jaxce.examples.cifar10 import model as networks
from jaxce.examples.cifar10.data import NUM_CLASSES, Dataset
from jaxce.examples.cifar10.model import Network
from jaxce.examples.common import UsageError, parameter_count

Targets = jax.Array | jaxce.SparseTargets
Predict = Callable[[Network, jax.Array], jax.Array]

WEIGHT_DECAY = 1.3e-3
MOMENTUM = 0.85
BIAS_RATE = 64  # times that of the other weights: the biases are few and their gradients small
WARMUP_SHARE = 0.23  # of the steps
EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What goes well together; the flags of the same names override it."""

    network: Callable[[np.ndarray, int, int, nnx.Rngs], Network]
    width: int
    epochs: int
    batch_size: int
    learning_rate: float  # the peak, for this batch size
    label_smoothing: float
    crop: bool
    small_crops: float  # share of the epochs, the first, that see three quarters of an image's height and width
    two_views: bool  # test with an image and its mirror image, where that shows the same class


RECIPES = {
    "demo": Recipe(
        network=networks.small_network,
        width=48,
        epochs=4,
        batch_size=128,
        learning_rate=0.19,
        label_smoothing=0.0,
        crop=False,
        small_crops=0.0,
        two_views=False,
    ),
    "full": Recipe(
        network=networks.large_network,
        width=128,
        epochs=20,
        batch_size=128,
        learning_rate=0.19,
        label_smoothing=0.2,
        crop=True,
        small_crops=0.7,
        two_views=True,
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
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))
    return jnp.mean(optax.softmax_cross_entropy(logits, optax.smooth_labels(dense, label_smoothing)))


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
        recipe = RECIPES[settings.recipe]
        self.model = recipe.network(data.train_images, settings.width, NUM_CLASSES, nnx.Rngs(settings.seed))
        self.optimizer = make_optimizer(self.model, settings, self.steps_per_epoch)
        predict = networks.mean_of_views if recipe.two_views and data.mirrors else Network.__call__
        self._train_step = make_train_step(settings)
        self._test_step = make_test_step(settings, predict)
        self._report_step = make_report_step(predict)

    @property
    def modules(self) -> tuple[Network, nnx.Optimizer[Network]]:
        """All that training changes."""
        return self.model, self.optimizer

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

    @property
    def step(self) -> int:
        """How many training steps were made."""
        return int(self.optimizer.step[...])

    def train_epoch(self, epoch: int, done: int = 0) -> Iterator[float]:
        """One pass over the training images, but for the first ``done`` batches: the losses, each after its step."""
        flipped, side = self.flipped(epoch), self.side(epoch)
        for batch in self.batches(epoch)[done:]:
            images, labels = self.data.train_images[batch], self.data.train_labels[batch]
            yield float(self._train_step(self.model, self.optimizer, images, labels, flipped[batch], side))

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

    def report(self) -> tuple[jaxce.diagnostics.Report, np.ndarray]:
        """What the loss on the test images means, and how many of each class (row) were taken for each (column)."""
        model = nnx.view(self.model, use_running_average=True)
        images, labels = self.data.test_images, self.data.test_labels
        summaries = []
        confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
        for start in range(0, len(labels), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            summary, predictions = self._report_step(model, images[batch], labels[batch])
            summaries.append(summary)
            np.add.at(confusion, (labels[batch], predictions), 1)
        summary = functools.reduce(jaxce.diagnostics.merge, summaries)
        return jaxce.diagnostics.finish(summary, class_names=self.data.class_names), confusion

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Indices of the batches, in an order that only (seed, epoch) decide.

        The few images that fill no batch sit out, others in every epoch.
        """
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.data.train_labels))
        used = self.steps_per_epoch * self.settings.batch_size
        return np.split(order[:used], self.steps_per_epoch)

    def flipped(self, epoch: int) -> np.ndarray:
        """Which images are mirrored: half of them, drawn once, and the others in the next epoch.

        Two epochs in a row show both sides of each image; drawn anew, half of the images would show one twice.
        """
        count = len(self.data.train_labels)
        if not self.data.mirrors:
            return np.zeros(count, bool)
        sides = np.random.default_rng(self.settings.seed).integers(2, size=count)
        return np.equal(sides, epoch % 2)

    def side(self, epoch: int) -> int:
        """Of the squares that an epoch trains on.

        Small crops take half the time, and no crop shows the whole image, so the network learns more slowly by heart;
        the last epochs bring it back to what it is tested on.
        """
        side: int = self.data.train_images.shape[1]
        if epoch > RECIPES[self.settings.recipe].small_crops * self.settings.epochs:
            return side
        return 8 * max(1, 3 * side // 32)  # three quarters, in steps of 8


def make_optimizer(model: Network, settings: Settings, steps_per_epoch: int) -> nnx.Optimizer[Network]:
    """SGD with Nesterov momentum, its rate rising for a quarter of the run and then falling to 0."""
    steps = steps_per_epoch * settings.epochs
    warmup = max(1, int(WARMUP_SHARE * steps))
    schedule = optax.schedules.join_schedules(
        [
            optax.linear_schedule(0.2 * settings.learning_rate, settings.learning_rate, warmup),
            optax.linear_schedule(settings.learning_rate, 0.0, steps - warmup),
        ],
        [warmup],
    )

    def biases(parameters: Any) -> Any:
        return jax.tree.map(lambda parameter: parameter.ndim == 1, parameters)

    def matrices(parameters: Any) -> Any:
        return jax.tree.map(lambda parameter: parameter.ndim > 1, parameters)

    descent = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, mask=matrices),
        optax.masked(optax.scale(BIAS_RATE), biases),
        optax.sgd(schedule, MOMENTUM, nesterov=True),
    )
    return nnx.Optimizer(model, descent, wrt=nnx.Param)


def make_train_step(settings: Settings) -> Callable[..., jax.Array]:
    """The step ``(model, optimizer, images, labels, flipped, side) -> loss``, which updates the first two.

    Images come in as bytes, a quarter of the floats they become inside.
    """
    loss = LOSSES[settings.loss]
    crop = RECIPES[settings.recipe].crop

    def prepare(key: jax.Array, images: jax.Array, labels: jax.Array, side: int) -> tuple[jax.Array, Targets]:
        crop_key, mixup_key = jax.random.split(key)
        if crop:
            images = networks.random_crop(crop_key, images, side)
        if settings.mixup:
            return networks.mixup(mixup_key, images, labels, settings.mixup)
        return images, labels

    def train_step(
        model: Network,
        optimizer: nnx.Optimizer[Network],
        images: jax.Array,
        labels: jax.Array,
        flipped: jax.Array,
        side: int,
    ) -> jax.Array:
        # Drawn from (seed, step) alone, so a resumed run goes on with the same random numbers.
        key = jax.random.fold_in(jax.random.key(settings.seed), optimizer.step[...])
        inputs, targets = prepare(key, networks.flip(images, flipped), labels, side)

        def objective(model: Network) -> jax.Array:
            return loss(model(inputs), targets, settings.label_smoothing)

        value: jax.Array
        value, gradients = nnx.value_and_grad(objective)(model)
        optimizer.update(model, gradients)
        return value

    return nnx.jit(train_step, donate_argnums=(0, 1), static_argnames="side")


def make_test_step(settings: Settings, predict: Predict) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The step ``(model, images, labels) -> (sum of plain losses, number of hits)``."""
    loss = LOSSES[settings.loss]

    def test_step(model: Network, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = predict(model, images)
        return loss(logits, labels, 0.0) * len(labels), jnp.sum(logits.argmax(-1) == labels)

    return nnx.jit(test_step)


def make_report_step(predict: Predict) -> Callable[..., tuple[jaxce.diagnostics.Summary, jax.Array]]:
    """The step ``(model, images, labels) -> (what the report is made of, predictions)``."""

    def report_step(
        model: Network, images: jax.Array, labels: jax.Array
    ) -> tuple[jaxce.diagnostics.Summary, jax.Array]:
        logits = predict(model, images)
        return jaxce.diagnostics.summarize(logits, labels), logits.argmax(-1)

    return nnx.jit(report_step)
