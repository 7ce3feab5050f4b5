"""The 3x3 convolution of the CIFAR-10 networks, in the form that is fast where it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[C, H, W, N]`` with ``[outputs, 3, 3, C]`` to ``[outputs, H, W, N]``, zeros beyond the border.

    What is multiplied is rounded to bfloat16, and summed in float32, as TPUs do by themselves.
    """
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    out: jax.Array = jax.lax.platform_dependent(x, kernel, cpu=convolve_by_matmul, default=convolve_by_xla)
    return out


def convolve_by_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("CHWN", "OHWI", "CHWN")
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


@jax.custom_vjp
def convolve_by_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As one product of matrices, and each derivative too.

    XLA's convolutions on CPU gain nothing from bfloat16, and their derivatives run at half their own speed or less.
    With channels first and images last no product has a transposed matrix on its left, which XLA would multiply in
    float32, and patches are copied in long runs.
    """
    return product("of,fp->op", flat(kernel), patches(x)).reshape(-1, *x.shape[1:])


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve_by_matmul(x, kernel), (x, kernel)


def _backward(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """With respect to x it is a convolution with the kernel turned by half a circle."""
    x, kernel = residuals
    cotangent = cotangent.astype(x.dtype)
    turned = kernel[:, ::-1, ::-1].transpose(3, 1, 2, 0)
    of_x = convolve_by_matmul(cotangent, turned)
    of_kernel = product("op,fp->of", flat(cotangent), patches(x)).reshape(kernel.shape)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


convolve_by_matmul.defvjp(_forward, _backward)


def product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1)


def patches(x: jax.Array) -> jax.Array:
    """``[9 C, H W N]``: of each pixel of each image, the 3x3 pixels around it, in the order of a flat kernel.

    Columns first and then rows, six slices: copied in a third of the time of nine.
    """
    channels, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    columns = jnp.concatenate([padded[:, :, j : j + width] for j in range(3)])
    return jnp.concatenate([columns[:, i : i + height].reshape(3 * channels, -1) for i in range(3)])
