"""The networks of the CIFAR-10 example, and what is done to a batch before they see it.

Both networks take uint8 images of any number of channels and a side divisible by 8, channels last.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

import jaxce


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2 square: ``nnx.max_pool`` in a form that XLA differentiates faster.

    A max over a reshaped axis has a gradient of plain selections, where that of a pooling window
    is a scatter; on CPU this shortens the whole training step by a quarter.
    """
    n, height, width, channels = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class ConvBlock(nnx.Module):
    """3x3 convolution, pooling if asked for, batch norm, ReLU.

    Pooling comes before the normalisation and not after it, the same family of functions, so that
    everything after the convolution works on a quarter of the values.
    """

    def __init__(self, inputs: int, outputs: int, *, pool: bool = False, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(inputs, outputs, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        if self.pool:
            x = max_pool(x)
        return nnx.relu(self.norm(x))


class Residual(nnx.Module):
    """Two blocks, added to what went in."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.first = ConvBlock(width, width, rngs=rngs)
        self.second = ConvBlock(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.second(self.first(x))


class Network(nnx.Module):
    """A stack of blocks, the mean over what is left of the image, and a linear layer."""

    def __init__(self, blocks: Sequence[nnx.Module], width: int, classes: int, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List(blocks)
        # Small weights: before it has seen anything, the network should be guessing.
        small = nnx.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        self.head = nnx.Linear(width, classes, kernel_init=small, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        # About mean 0 and deviation 1 for photographs; the first batch norm does the rest.
        x = (images.astype(jnp.float32) - 128) / 64
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def small_network(channels: int, width: int, classes: int, rngs: nnx.Rngs) -> Network:
    """Three convolutions, of widths w, 2w and 2w: past 70% in a few minutes on two cores."""
    blocks = [
        ConvBlock(channels, width, pool=True, rngs=rngs),
        ConvBlock(width, 2 * width, pool=True, rngs=rngs),
        ConvBlock(2 * width, 2 * width, pool=True, rngs=rngs),
    ]
    return Network(blocks, 2 * width, classes, rngs)


def residual_network(channels: int, width: int, classes: int, rngs: nnx.Rngs) -> Network:
    """Nine layers, of widths w to 8w, after David Page's ResNet-9 (which is w = 64)."""
    blocks = [
        ConvBlock(channels, width, rngs=rngs),
        ConvBlock(width, 2 * width, pool=True, rngs=rngs),
        Residual(2 * width, rngs=rngs),
        ConvBlock(2 * width, 4 * width, pool=True, rngs=rngs),
        ConvBlock(4 * width, 8 * width, pool=True, rngs=rngs),
        Residual(8 * width, rngs=rngs),
    ]
    return Network(blocks, 8 * width, classes, rngs)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirror half of the images, left to right."""
    flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def random_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shift every image by up to an eighth of its side, in both directions."""
    n, height, width, channels = images.shape
    margin = height // 8
    padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="reflect")
    corners = jax.random.randint(key, (n, 2), 0, 2 * margin + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def mixup(key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float) -> tuple[jax.Array, jaxce.SparseTargets]:
    """Blend pairs of images, and their labels likewise (Zhang et al. 2018, arXiv:1710.09412).

    The target of a blend has two classes, which is what SparseTargets is for: no one-hot array.
    The batch is shuffled already, so reversing it draws partners at random.
    """
    share = jax.random.beta(key, alpha, alpha, shape=(len(images),))
    pixels = images.astype(jnp.float32)
    blend = share[:, None, None, None]
    targets = jaxce.SparseTargets(
        indices=jnp.stack([labels, labels[::-1]], axis=-1),
        probs=jnp.stack([share, 1 - share], axis=-1),
    )
    return blend * pixels + (1 - blend) * pixels[::-1], targets
