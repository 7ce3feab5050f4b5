"""The networks of the CIFAR-10 example, and what is done to a batch before they see it.

Both networks take uint8 images of any number of channels and a side divisible by 8, channels last. They follow
airbench (Jordan 2024, arXiv:2404.00498), which learns CIFAR-10 in few epochs. Inside, channels come first and
images last, ``[C, H, W, N]``, as ``convolve`` wants them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxce
from jaxce.examples.cifar10.convolution import convolve

WHITENING_IMAGES = 5000


class Frozen(nnx.Variable[jax.Array]):
    """Kept with the weights, but not trained."""


def scaled(images: jax.Array | np.ndarray) -> jax.Array:
    """About mean 0 and deviation 1 for photographs."""
    return (jnp.asarray(images, jnp.float32) - 128) / 64


def whitening_filters(images: np.ndarray, side: int, components: int, noise: float) -> np.ndarray:
    """The first principal components of the images' patches, scaled to variance 1, and their negatives.

    Neighbouring pixels are much alike, and a network learns faster from inputs that are not. What varies no more than
    the noise is left small. The negatives are there because the activation that follows lets little of what is negative
    pass.
    """
    windows = np.lib.stride_tricks.sliding_window_view(scaled(images[:WHITENING_IMAGES]), (side, side), axis=(1, 2))
    patches = np.moveaxis(windows, 3, -1).reshape(-1, side * side * images.shape[-1])
    variances, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / np.sqrt(variances + noise))[:, ::-1][:, :components]
    return np.concatenate([filters, -filters], axis=1).reshape(side, side, images.shape[-1], -1)


def identity_first(key: jax.Array, shape: Sequence[int], dtype: jnp.dtype) -> jax.Array:
    """A kernel ``[outputs, 3, 3, inputs]`` whose first outputs are the inputs; those beyond are random.

    So a deep network begins as a shallow one.
    """
    outputs, *_, inputs = shape
    kernel = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=0)(key, shape, dtype)
    same = jnp.zeros(shape, dtype).at[:, 1, 1].set(jnp.eye(outputs, inputs, dtype=dtype))
    return jnp.where(jnp.arange(outputs)[:, None, None, None] < inputs, same, kernel)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2 square: ``nnx.max_pool`` in a form that XLA differentiates faster.

    A max over a reshaped axis has a gradient of plain selections, where that of a pooling window
    is a scatter; on CPU this shortens the whole training step by a sixth.
    """
    channels, height, width, n = x.shape
    return x.reshape(channels, height // 2, 2, width // 2, 2, n).max(axis=(2, 4))


class ConvBlock(nnx.Module):
    """3x3 convolution, pooling if asked for, batch norm, GELU.

    Pooling comes before the normalisation and not after it, the same family of functions, so that
    everything after the convolution works on a quarter of the values.
    """

    def __init__(self, inputs: int, outputs: int, *, pool: bool, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(identity_first(rngs.params(), (outputs, 3, 3, inputs), jnp.float32))
        self.norm = nnx.BatchNorm(outputs, axis=0, momentum=0.9, use_scale=False, rngs=rngs)
        self.pool = pool

    def __call__(self, x: jax.Array) -> jax.Array:
        x = convolve(x, self.kernel[...])
        if self.pool:
            x = max_pool(x)
        return nnx.gelu(self.norm(x))


class Network(nnx.Module):
    """Fixed filters; two blocks of each width, the first of which pools; the maximum over the image; a linear layer."""

    def __init__(self, filters: np.ndarray, stride: int, widths: Sequence[int], classes: int, rngs: nnx.Rngs) -> None:
        self.filters = Frozen(jnp.asarray(filters))
        self.stride = stride
        blocks = []
        for inputs, outputs in zip((filters.shape[-1], *widths), widths, strict=False):
            blocks.append(ConvBlock(inputs, outputs, pool=True, rngs=rngs))
            blocks.append(ConvBlock(outputs, outputs, pool=False, rngs=rngs))
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(widths[-1], classes, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        layout = ("NHWC", "HWIO", "CHWN")
        x = jax.lax.conv_general_dilated(scaled(images), self.filters[...], strides, "SAME", dimension_numbers=layout)
        x = nnx.gelu(x)
        for block in self.blocks:
            x = block(x)
        # Small logits: before it has seen anything, the network should be guessing.
        return self.head(x.max(axis=(1, 2)).T) / 9


def small_network(images: np.ndarray, width: int, classes: int, rngs: nnx.Rngs) -> Network:
    """Four convolutions, of widths w, w, 2w and 2w, on half the resolution: past 75% in minutes on two cores."""
    return Network(whitening_filters(images, 4, 16, 5e-4), 2, (width, 2 * width), classes, rngs)


def large_network(images: np.ndarray, width: int, classes: int, rngs: nnx.Rngs) -> Network:
    """Six convolutions, of widths w to 4w, as in airbench94 (which is w = 64).

    All components of patches this small are taken: half of them are mostly noise in images that were stored as JPEG.
    """
    return Network(whitening_filters(images, 2, 12, 0.03), 1, (width, 4 * width, 4 * width), classes, rngs)


def mean_of_views(model: Network, images: jax.Array) -> jax.Array:
    """The mean of the logits of each image and of its mirror image."""
    return (model(images) + model(images[:, :, ::-1])) / 2


def flip(images: jax.Array, flipped: jax.Array) -> jax.Array:
    """Mirror those images, left to right."""
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def random_crop(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """A square of ``[side, side]`` out of each image, from anywhere in it or up to an eighth of its side beyond."""
    n, height, _, channels = images.shape
    margin = height // 8 if side == height else 0
    padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="reflect")
    corners = jax.random.randint(key, (n, 2), 0, height + 2 * margin - side + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*corner, 0), (side, side, channels))

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
