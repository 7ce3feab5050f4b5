"""The terms of the loss for one example in plain differentiable JAX, lifted to batches with vmap.

No custom derivative anywhere, so every transform applies: forward mode (jvp, jacfwd, linearize) as well as reverse.
It is written from the definitions, for one row, and shares no arithmetic with the default implementation; the tests
hold the two against each other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce.stats import Spec, Terms, working_dtype


def terms(
    spec: Spec,
    logits: Array,
    indices: Array | None,
    probs: Array | None,
    smoothing_weights: Array | None,
    where: Array | None,
) -> Terms:
    """As `jaxce.softmax.softmax_terms`."""
    if where is not None:
        where = jnp.broadcast_to(where, logits.shape)

    def row(z: Array, i: Array | None, t: Array | None, mask: Array | None) -> Terms:
        return _row_terms(spec, z, i, t, smoothing_weights, mask)

    for _ in logits.shape[:-1]:
        row = jax.vmap(row)
    return row(logits.astype(working_dtype(logits.dtype)), indices, probs, where)


def _row_terms(
    spec: Spec, z: Array, indices: Array | None, probs: Array | None, v: Array | None, where: Array | None
) -> Terms:
    if spec.logit_softcap is not None:
        z = spec.logit_softcap * jnp.tanh(z / spec.logit_softcap)
    z = z + jnp.where(z == jnp.inf, jnp.nan, 0)
    if where is not None:
        z = jnp.where(where, z, -jnp.inf)
    z_max = lax.stop_gradient(jnp.max(z))
    d = z - z_max
    # log Σ exp(d), where the terms near 1 enter as expm1(d) and a count, so that the 1 of the maximum can be left out:
    # beside it the digits of a small sum would be lost.
    near = d > -0.5
    count = jnp.sum(near.astype(z.dtype))
    log_sum = jnp.log1p(jnp.sum(jnp.where(near, jnp.expm1(jnp.where(near, d, 0)), jnp.exp(d))) + (count - 1))
    surprise = log_sum - d  # −log p of each class
    p = jnp.exp(-surprise)

    if indices is not None:
        target = jax.vmap(lambda i: _index_loss(z, i, surprise))(indices)
    else:
        target = _expectation(probs.astype(z.dtype), surprise)
    smoothing = entropy = None
    if spec.smoothing:
        v = jnp.ones_like(z) if v is None else v
        smoothing = _expectation(v if where is None else jnp.where(where, v, 0), surprise)
    if spec.entropy:
        entropy = _expectation(p, surprise)
    return Terms(z_max + log_sum, target, smoothing, entropy)


def _index_loss(z: Array, index: Array, surprise: Array) -> Array:
    """−log p of one class: log1p of the other classes' odds if it is the most likely one, where p is near 1."""
    target = jnp.arange(z.size, dtype=index.dtype) == index
    z_y = jnp.sum(jnp.where(target, z, 0))
    likely = jnp.all(z <= z_y)
    odds = jnp.where(target, 0, jnp.exp(jnp.where(likely & ~target, z - z_y, 0)))
    loss = jnp.where(likely, jnp.log1p(jnp.sum(odds)), jnp.sum(jnp.where(target, surprise, 0)))
    # A label that is no class: something that depends on the whole row, for the caller's NaN to spread over.
    return jnp.where(jnp.any(target), loss, jnp.sum(z))


def _expectation(weights: Array, x: Array) -> Array:
    """Σ weights·x, where a weight of 0 takes away what is not finite."""
    return jnp.sum(weights * jnp.where((weights == 0) & ~jnp.isfinite(x), 0, x))
