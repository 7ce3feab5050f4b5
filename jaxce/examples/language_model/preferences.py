"""Direct Preference Optimization in the language-model example (Rafailov et al. 2023, arXiv:2305.18290).

Which of two answers is better needs no judge here: to a prompt from the text, the text's own continuation is, and the
continuation of another passage is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxce
from jaxce.examples.language_model.model import LanguageModel
from jaxce.examples.language_model.report import Measures, Row, panels
from jaxce.examples.language_model.training import Trainer, consecutive_windows, make_optimizer, make_train_step

BETA = 0.1
LEARNING_RATE = 1e-4
IGNORED = -1  # in place of a token of the prompt
START_TOLERANCE = 1e-3  # of margin and loss before the first step


class Preference(NamedTuple):
    """What a policy makes of pairs of answers."""

    loss: float  # per pair, in nats
    margin: float  # the reward of the chosen answer less that of the rejected one
    preferred: float  # the share of pairs with a margin above 0

    def __str__(self) -> str:
        return f"{self.loss:15.4f}   {self.margin:6.3f}   {self.preferred:9.1%}"

    def as_dict(self) -> dict[str, float]:
        return {"validation_loss": self.loss, "margin": self.margin, "preferred": self.preferred}


class Preferences:
    """A trained network as the policy, a frozen copy of it as the reference, and the pairs to tell apart."""

    name = "preferences"
    header = "  step   train loss   validation loss   margin   preferred   seconds"

    def __init__(self, trainer: Trainer) -> None:
        text, data = trainer.settings, trainer.data
        self.trainer = trainer
        self.settings = dataclasses.replace(text, steps=text.preference_steps, learning_rate=LEARNING_RATE)
        self.policy = trainer.model
        graph, state = nnx.split(self.policy)
        self.reference = nnx.merge(graph, jax.tree.map(jnp.copy, state))  # training donates the policy's own arrays
        self.optimizer = make_optimizer(self.policy, self.settings)
        self._train_step = make_train_step(preference_loss)
        self._answer_log_probs: Callable[..., jax.Array] = nnx.jit(answer_log_probs)
        elsewhere = np.roll(data.validation, len(data.validation) // 2)
        self.held_out = pairs(*(consecutive_windows(part, text.context) for part in (data.validation, elsewhere)))
        self._of_reference = self.log_probs(self.reference)

    def batch(self, step: int) -> np.ndarray:
        """Pairs of passages that the text's own steps did not draw."""
        first = self.trainer.settings.steps + 2 * step
        return pairs(self.trainer.batch(first), self.trainer.batch(first + 1))

    def train_step(self, step: int) -> float:
        return float(self._train_step(self.policy, self.optimizer, self.reference, self.batch(step)))

    def log_probs(self, model: LanguageModel) -> jax.Array:
        """Of the held-out answers, ``[2, B]``."""
        size = self.settings.batch_size
        starts = range(0, self.held_out.shape[1], size)
        parts = [self._answer_log_probs(model, self.held_out[:, start : start + size]) for start in starts]
        return jnp.concatenate(parts, axis=1)

    def test(self) -> Preference:
        """How well the held-out pairs are told apart."""
        margin = np.asarray(margins(self.log_probs(self.policy), self._of_reference), np.float64)
        return Preference(float(np.logaddexp(0, -margin).mean()), float(margin.mean()), float((margin > 0).mean()))

    def start_message(self, start: Preference) -> str:
        """Margin and loss before the first step, and a warning if they are not those of policy and reference alike."""
        chance = math.log(2)
        message = (
            f"\npreferences: {self.held_out.shape[1]:,} held-out pairs; before the first step their margin is "
            f"{start.margin:.4f} and the loss {start.loss:.4f}; by definition: 0 and ln 2 = {chance:.4f}"
        )
        if abs(start.margin) + abs(start.loss - chance) <= START_TOLERANCE:
            return message
        return f"{message}\nWarning: expected them within {START_TOLERANCE}. Is the reference a copy of the policy?"

    def closing(self, rows: Sequence[Row[Preference]]) -> str:
        end = rows[-1].validation
        return (
            f"After {rows[-1].step:,} steps of preferences, the chosen answer has the higher reward in "
            f"{end.preferred:.1%} of held-out pairs, with a mean margin of {end.margin:.3f}; the loss is "
            f"{end.loss:.4f}, and was {math.log(2):.4f}."
        )

    def plot(
        self, path: Path, title: str, text: Sequence[Row[Measures]], start: Preference, rows: Sequence[Row[Preference]]
    ) -> None:
        steps = [0, *(row.step for row in rows)]
        held_out = [start, *(row.validation for row in rows)]
        with panels(path, title, count=3) as (losses, rewards, shares):
            losses.axhline(math.log(2), color="0.5", linestyle="--", label="policy as reference, ln 2")
            losses.plot(steps[1:], [row.train_loss for row in rows], "o-", label="training, since the point before")
            losses.plot(steps, [found.loss for found in held_out], "o-", label="held-out pairs")
            losses.set(ylabel="loss (nats per pair)", ylim=(0, None))
            rewards.plot(steps, [found.margin for found in held_out], "o-", color="C1")
            rewards.set(ylabel="reward margin of held-out pairs")
            shares.plot(steps, [found.preferred for found in held_out], "o-", color="C1")
            shares.set(ylabel="share of them above 0", ylim=(0, 1.05))


def prompt_length(window: int) -> int:
    return window // 2


def pairs(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Chosen and rejected ``[2, B, T + 1]``: prompts of ``own``, each with its own answer and with one of ``other``."""
    prompt = prompt_length(own.shape[1])
    return np.stack([own, np.concatenate([own[:, :prompt], other[:, prompt:]], axis=1)])


def answer_log_probs(model: LanguageModel, pairs: jax.Array) -> jax.Array:
    """The log-probabilities ``[2, B]`` of the answers, without those of the prompts."""
    tokens = pairs.reshape(-1, pairs.shape[-1])
    targets = tokens[:, 1:].at[:, : prompt_length(pairs.shape[-1]) - 1].set(IGNORED)
    hidden = model(tokens[:, :-1])
    by_token = jaxce.linear_log_probs(hidden, model.table, targets, vocab_axis=0, ignore_index=IGNORED)
    return by_token.sum(-1).reshape(pairs.shape[:2])


def margins(policy: jax.Array, reference: jax.Array) -> jax.Array:
    """By how much the reward of the chosen answer is above that of the rejected one, ``[B]``."""
    reward = BETA * (policy - reference)
    return reward[0] - reward[1]


def preference_loss(policy: LanguageModel, reference: LanguageModel, pairs: jax.Array) -> jax.Array:
    """Equation 7 of the paper, its mean over pairs."""
    margin = margins(answer_log_probs(policy, pairs), answer_log_probs(reference, pairs))
    return -jax.nn.log_sigmoid(margin).mean()
