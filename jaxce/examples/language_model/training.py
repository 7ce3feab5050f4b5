"""Settings of the language-model example, the loss in either form and what memory it needs, and the trainer."""

# mypy: untyped-calls-exclude=jax

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxce
from jaxce.examples.common import UsageError, parameter_count
from jaxce.examples.language_model import processes
from jaxce.examples.language_model.data import Dataset
from jaxce.examples.language_model.model import HEAD_SIZE, LanguageModel, generate
from jaxce.examples.language_model.report import Measures, bits_per_byte
from jaxce.types import Mode

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1  # of the steps
SAMPLE_PROMPT = "The"
SAMPLE_TOKENS = 200
SAMPLE_TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides how training goes: on one machine and text, equal settings, equal curves."""

    loss: str
    mode: Mode | None
    tokens: str
    vocab_size: int | None  # asked for, and for byte pairs only; short texts may have fewer
    context: int
    width: int
    layers: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    objective: str
    preference_steps: int  # after those on text; 0 unless the objective is "dpo"


# The loss, in either form.


def make_loss(name: str, mode: Mode | None = None, mesh: Mesh | None = None) -> Loss:
    """The mean loss, as a function of hidden ``[B, T, D]``, table ``[V, D]`` and targets ``[B, T]``.

    With a mesh, the fused loss takes the table as it is: split over the devices.
    """
    axis_name = None if mesh is None else processes.AXIS

    def fused(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
        return jaxce.linear_cross_entropy(
            hidden, table, targets, vocab_axis=0, mode=mode, reduction="mean", axis_name=axis_name
        )

    if mesh is not None:
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
    memory = step.lower(*loss_arguments(settings, vocab_size, mesh)).compile().memory_analysis()
    if memory is None:
        raise UsageError("--loss: the compiler of this backend does not say what memory it takes.")
    return int(memory.temp_size_in_bytes)


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

        def objective(model: LanguageModel, windows: jax.Array) -> jax.Array:
            return loss(model(windows[:, :-1]), model.table, windows[:, 1:])

        self._train_step = make_train_step(objective)
        self._test_step: Callable[..., jax.Array] = nnx.jit(objective)

    @property
    def parameters(self) -> int:
        return parameter_count(self.model)

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
        return Measures(nats / targets.size, bits_per_byte(nats, byte_count))

    def validation_windows(self) -> np.ndarray:
        return consecutive_windows(self.data.validation, self.settings.context)

    def sample(self) -> str:
        """Text that the model makes up."""
        prompt = self.data.tokenizer.encode(SAMPLE_PROMPT)[-self.settings.context :]
        tokens = generate(self.model, prompt, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, self.settings.seed)
        return self.data.tokenizer.decode(tokens)


def consecutive_windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """Windows ``[B, T + 1]`` that overlap by one token, so that each token but the first is predicted once.

    What is left at the end and fills no window sits out.
    """
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]


def make_optimizer(model: LanguageModel, settings: Settings) -> nnx.Optimizer[LanguageModel]:
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


def make_train_step(objective: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The step ``(model, optimizer, *inputs) -> objective(model, *inputs)``, which updates the first two."""

    def train_step(model: LanguageModel, optimizer: nnx.Optimizer[LanguageModel], *inputs: Any) -> jax.Array:
        value: jax.Array
        value, gradients = nnx.value_and_grad(objective)(model, *inputs)
        optimizer.update(model, gradients)
        return value

    return nnx.jit(train_step, donate_argnums=(0, 1))
