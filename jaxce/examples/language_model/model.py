"""The network of the language-model example: a small GPT whose embedding table is its output layer too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

HEAD_SIZE = 32


class Attention(nnx.Module):
    """Every position looks at itself and at those before it (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.inputs = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.output = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, context, width = x.shape
        heads = self.inputs(x).reshape(batch, context, 3, width // HEAD_SIZE, HEAD_SIZE)
        query, key, value = (heads[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.reshape(x.shape))


class Block(nnx.Module):
    """Attention and two dense layers, each normalised before and added to what went in."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, rngs=rngs)
        self.dense_norm = nnx.LayerNorm(width, rngs=rngs)
        self.widen = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.narrow(nnx.gelu(self.widen(self.dense_norm(x))))


class LanguageModel(nnx.Module):
    """From tokens ``[B, T]`` to the hidden states ``[B, T, D]`` that the next tokens are told from.

    The logits are ``hidden @ table.T``. They are left to the loss, which may have better to do than to hold them all.
    """

    def __init__(self, vocab_size: int, context: int, width: int, layers: int, rngs: nnx.Rngs) -> None:
        # Small: the table also makes the logits, and an untrained network should be guessing.
        small = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(vocab_size, width, embedding_init=small, rngs=rngs)
        self.position = nnx.Embed(context, width, embedding_init=small, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[-1])[None])
        for block in self.blocks:
            x = block(x)
        hidden: jax.Array = self.norm(x)
        return hidden

    @property
    def table(self) -> jax.Array:
        """The embedding of each token, ``[V, D]``."""
        return self.embedding.embedding[...]


@nnx.jit
def next_token(
    model: LanguageModel, window: jax.Array, last: jax.Array, key: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Draw the token after position ``last``; what the window holds behind it is not looked at."""
    hidden = model(window[None])[0, last]
    return jax.random.categorical(key, model.table @ hidden / temperature)


def generate(model: LanguageModel, prompt: np.ndarray, count: int, temperature: float, seed: int) -> np.ndarray:
    """The prompt and ``count`` tokens more, each drawn from what the model makes of those before it.

    Below 1, ``temperature`` favours likely tokens.
    """
    context = model.position.num_embeddings
    tokens = np.zeros(len(prompt) + count, np.int32)
    tokens[: len(prompt)] = prompt
    for end, key in enumerate(jax.random.split(jax.random.key(seed), count), start=len(prompt)):
        window = np.zeros(context, np.int32)
        known = tokens[max(0, end - context) : end]
        window[: len(known)] = known
        tokens[end] = next_token(model, jnp.array(window), jnp.int32(len(known) - 1), key, jnp.float32(temperature))
    return tokens
