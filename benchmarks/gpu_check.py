"""Whether the losses hold their numeric promises on the device at hand: in bfloat16 and float32, dense and linear.

The right values are worked out in NumPy's float64 from the very inputs. What may be off follows from the arithmetic:
ε of float32 for sums and exponentials, ε of the dtype for the rounding of a gradient and of the gradient of the logits
before a matmul, and what the product that makes the logits can be off in the precision that was asked for.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxce

EPS = float(np.finfo(np.float32).eps)
DTYPES = {"float32": EPS, "bfloat16": 2.0**-7}
V = 1003  # which no block divides


def run() -> None:
    """Prints a line for each case; ends with status 1 if one fails."""
    failed = 0
    for name, worst in itertools.chain(dense_cases(), exact_cases(), linear_cases()):
        failed += not worst <= 1
        print(f"{'ok' if worst <= 1 else 'WRONG':6}{name}: {worst:.2f} of what is allowed", flush=True)
    print("all as promised" if not failed else f"{failed} of the cases above are wrong")
    if failed:
        sys.exit(1)


def truth(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses `[N]` and their gradients `[N, V]`, in float64, with all digits of a confident row."""
    z = logits.astype(np.float64)
    rows, top = np.arange(len(z)), z.max(-1, keepdims=True)
    e = np.exp(z - top)
    others = e.copy()
    others[rows, labels] = 0
    rest, own = others.sum(-1), e[rows, labels]
    with np.errstate(divide="ignore", over="ignore"):
        loss = np.where(own > 0.5, np.log1p(rest / own), top[:, 0] - z[rows, labels] + np.log(rest + own))
    gradient = others / (rest + own)[:, None]
    gradient[rows, labels] = -rest / (rest + own)
    return loss, gradient


def off(got: Any, want: np.ndarray, allowed: Any) -> float:
    """The largest difference in units of what is allowed; infinite where one is not a number and the other is."""
    got = np.asarray(got, np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(same, 0, np.abs(got - want) / allowed)
    return float(np.nan_to_num(ratio, nan=np.inf).max(initial=0))


TINY = float(np.finfo(np.float32).tiny)  # below it numbers have fewer digits, or are 0


def dense_cases() -> Any:
    """Losses within 16 ε; gradients within (16 + |z_j - max|)·ε, and rounded to their dtype."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, 64)
    normal = rng.standard_normal((64, V))
    leads = normal.copy()
    leads[np.arange(64), labels] = normal.max(-1) + rng.uniform(5, 60, 64)
    masked = np.where(rng.random((64, V)) < 0.5, -np.inf, normal)
    masked[np.arange(64), labels] = 0
    gradient_of = jax.jit(jax.value_and_grad(_dense_loss, has_aux=True))
    kinds = {"fresh": normal, "trained": 3 * normal, "confident": leads, "far from 0": normal + 1e4, "masked": masked}
    for (kind, values), (dtype, eps) in itertools.product(kinds.items(), DTYPES.items()):
        logits = jnp.asarray(values, dtype)
        (_, loss), gradient = gradient_of(logits, labels)
        z = np.asarray(logits, np.float64)
        want, dz = truth(z, labels)
        distance = np.where(np.isfinite(z), z.max(-1, keepdims=True) - z, 0)
        allowed = ((16 + distance) * EPS + (dtype != "float32") * eps) * np.abs(dz) + TINY
        yield f"dense {dtype} {kind}, loss", off(loss, want, 16 * EPS * np.abs(want) + TINY)
        yield f"dense {dtype} {kind}, gradient", off(gradient, dz, allowed)


def _dense_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses = jaxce.softmax_cross_entropy(logits, labels)
    return jnp.sum(losses), losses


def exact_cases() -> Any:
    """Values that optax gets wrong, and rows that must not, or must, become NaN."""
    cases = {
        "float32 [0, -20], label 0": ([0, -20], 0, "float32", 2.0611536e-09),
        "float32 [1e6, 1e6 - 1], label 0": ([1e6, 1e6 - 1], 0, "float32", 0.3132616875),
        "bfloat16 [256, 255], label 0": ([256, 255], 0, "bfloat16", 0.3132616875),
        "a NaN logit": ([0, np.nan], 0, "float32", np.nan),
        "a label that is no class": ([0, 1], 2, "float32", np.nan),
        "a NaN logit in an ignored row": ([0, np.nan], -1, "float32", 0.0),
        "a label on a logit of -inf": ([0, -np.inf], 1, "float32", np.inf),
    }
    for name, (logits, label, dtype, want) in cases.items():
        loss = jax.jit(lambda z, y: jaxce.softmax_cross_entropy(z, y, ignore_index=-1))
        got = loss(jnp.asarray(logits, dtype), jnp.asarray(label))
        yield name, off(got, np.asarray(want), 16 * EPS * abs(want) + TINY)


def linear_cases() -> Any:
    """Every mode and precision, beside float64 products of the very inputs."""
    rng = np.random.default_rng(1)
    N, D = 96, 80
    labels = rng.integers(0, V, N)
    for dtype, mode, precision in itertools.product(DTYPES, ("recompute", "store"), (None, "highest")):
        hidden = jnp.asarray(rng.standard_normal((N, D)), dtype)
        kernel = jnp.asarray(3 / D**0.5 * rng.standard_normal((D, V)), dtype)

        options = {"mode": mode, "precision": precision, "memory_budget": 2**21}  # several blocks
        loss = functools.partial(jaxce.linear_cross_entropy, reduction="sum", **options)
        got, (dhidden, dkernel) = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel, labels)
        h, k = (np.asarray(x, np.float64) for x in (hidden, kernel))
        want, dz = truth(h @ k, labels)
        # float32 factors are rounded to 11 bits, or not at all; so is the gradient of the logits, to its dtype.
        factor = 2.0**-11 if dtype == "float32" and precision is None else 0.0
        rounding = 2.0**-9 if dtype == "bfloat16" else factor
        product = np.abs(h) @ np.abs(k) * (D * EPS + 2 * factor)  # what a logit may be off
        relative = 2 * product.max() + (16 + np.ptp(h @ k)) * EPS  # and so an entry of dz
        yield (
            f"linear {dtype} {mode} {precision}, loss",
            off(got, want.sum(), 2 * product.max() * N + 16 * EPS * want.sum()),
        )
        for name, found, a, b in (("hidden", dhidden, dz, k.T), ("kernel", dkernel, h.T, dz)):
            size = np.abs(a) @ np.abs(b)
            allowed = size * (relative + rounding + factor + len(b) * EPS) + np.abs(a @ b) * DTYPES[dtype] + TINY
            yield f"linear {dtype} {mode} {precision}, gradient in {name}", off(found, a @ b, allowed)
