"""The terms of the loss for one example in plain differentiable JAX, lifted to batches with vmap.

No custom derivative anywhere, so every transform applies: forward mode (jvp, jacfwd, linearize) as well as reverse.
It is written from the definitions, for one row, and shares no arithmetic with the default implementation; the tests
hold the two against each other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce.arguments import Examples, Options, Shared
from jaxce.selection import select
from jaxce.sharding import AxisNames, sum_over
from jaxce.stats import Terms, shift, tempered, working_dtype


def terms(options: Options, logits: Array, examples: Examples, shared: Shared) -> Terms:
    """As `jaxce.softmax.softmax_terms`."""
    probs, where, class_weights = examples.probs, examples.where, shared.class_weights
    z = logits.astype(working_dtype(logits.dtype))
    if where is not None:
        where = jnp.broadcast_to(where, logits.shape)
        z = select(where, z, 0)  # a masked logit may be NaN, where a tanh has no derivative
    if options.logit_softcap is not None:
        z = options.logit_softcap * jnp.tanh(z / options.logit_softcap)
    if examples.temperature is not None:
        offset = None if examples.offset is None else examples.offset[..., None]
        z = tempered(z, examples.temperature[..., None], offset)
    z = z + select(z == jnp.inf, jnp.nan, 0)
    if where is not None:
        z = select(where, z, -jnp.inf)
    if probs is not None and class_weights is not None:
        probs = probs * jnp.broadcast_to(class_weights, probs.shape)

    def row(z: Array, i: Array | None, t: Array | None, mask: Array | None) -> Terms:
        return _row_terms(options, z, i, t, class_weights, mask)

    for _ in logits.shape[:-1]:
        row = jax.vmap(row)
    return row(z, examples.indices, probs, where)


def _row_terms(
    options: Options, z: Array, indices: Array | None, probs: Array | None, v: Array | None, where: Array | None
) -> Terms:
    axes = options.axis_name
    z_max = lax.stop_gradient(jnp.max(z))
    z_max = lax.pmax(z_max, axes) if axes else z_max
    d = z - z_max
    log_sum = log_sum_exp(d, axes)
    surprise = log_sum - d  # −log p of each class
    p = jnp.exp(-surprise)

    if probs is not None:
        target = _expectation(probs.astype(z.dtype), surprise, axes)
    else:
        target = jax.vmap(lambda i: _index_loss(z, z_max, i, surprise, axes))(indices)
    smoothing = entropy = None
    if options.label_smoothing:
        v = jnp.ones_like(z) if v is None else v
        smoothing = _expectation(v if where is None else select(where, v, 0), surprise, axes)
    if options.return_aux:
        entropy = _expectation(p, jnp.minimum(surprise, 1e4), axes)  # at which p is 0, and no more than times its slope
    tail = _log_mass_outside(z, z_max + log_sum, indices, axes) if options.tail and indices is not None else None
    return Terms(z_max + log_sum, target, smoothing, entropy, tail)


def _log_mass_outside(z: Array, log_normalizer: Array, indices: Array, axes: AxisNames) -> Array:
    hits = jax.vmap(lambda index: jnp.arange(z.size, dtype=index.dtype) == index)(indices)
    z = select(jnp.any(hits, 0), -jnp.inf, z)
    maximum = lax.stop_gradient(jnp.max(z))
    maximum = shift(lax.pmax(maximum, axes) if axes else maximum)
    total = sum_over(jnp.sum(jnp.exp(z - maximum)), axes)
    log_total = select(total == 0, -jnp.inf, jnp.log(select(total == 0, 1, total)))
    return (maximum - log_normalizer) + log_total


def log_sum_exp(d: Array, axes: AxisNames) -> Array:
    """log Σ exp(d) of distances below the maximum.

    The terms near 1 enter as expm1(d) and a count, so that the 1 of the maximum can be left out: beside it the digits
    of a small sum would be lost.
    """
    near = d > -0.5
    count = sum_over(jnp.sum(near.astype(d.dtype), -1), axes)
    apart = sum_over(jnp.sum(select(near, jnp.expm1(select(near, d, 0)), jnp.exp(d)), -1), axes)
    return jnp.log1p(apart + (count - 1))


def _index_loss(z: Array, z_max: Array, index: Array, surprise: Array, axes: AxisNames) -> Array:
    """−log p of one class: log1p of the other classes' odds if it is the most likely one, where p is near 1."""
    target = jnp.arange(z.size, dtype=index.dtype) == index
    z_y = sum_over(jnp.sum(select(target, z, 0)), axes)
    likely = z_y >= z_max
    odds = select(target, 0, jnp.exp(select(likely & ~target, z - z_y, 0)))
    found, odds, of_target, anything = sum_over(
        (jnp.sum(target), jnp.sum(odds), jnp.sum(select(target, surprise, 0)), jnp.sum(z)), axes
    )
    # A label that is no class: something that depends on the whole row, for the caller's NaN to spread over.
    return select(found > 0, select(likely, jnp.log1p(odds), of_target), anything)


def _expectation(weights: Array, x: Array, axes: AxisNames) -> Array:
    """Σ weights·x, where a weight of 0 takes away what is not finite."""
    return sum_over(jnp.sum(weights * select((weights == 0) & ~jnp.isfinite(x), 0, x)), axes)
