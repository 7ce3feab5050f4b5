"""The gradient of the terms of a row of logits, from its record: one rule for every option and kind of target."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxce.sharding import mask_like
from jaxce.stats import RowStats, Spec, Terms, exponentials, put, smoothing_distribution, times, working_dtype


class Row(NamedTuple):
    """What a gradient is made from: logits `[..., V]`, all or some classes of the rows whose record is `stats`."""

    logits: Array
    indices: Array | None
    probs: Array | None
    smoothing_weights: Array | None
    where: Array | None
    stats: RowStats


def effective(spec: Spec, logits: Array, where: Array | None) -> Array:
    """The logits that the softmax sees: capped, then masked. Without either they keep their dtype."""
    if spec.logit_softcap is not None:
        logits = logits.astype(working_dtype(logits.dtype))
        logits = spec.logit_softcap * jnp.tanh(logits / spec.logit_softcap)
    return logits if where is None else jnp.where(mask_like(where, logits), logits, -jnp.inf)


def gradient(spec: Spec, row: Row, ct: Terms) -> tuple[Array, Array | None, Array | None]:
    """The gradients in logits, probs and smoothing_weights, for the cotangents of the terms of each row.

    With p = softmax(z): d/dz_j = a·p_j + h·p_j·(max − z_j) − τ_j − σ_j, and the exact form at index targets.

    a gathers whatever multiplies p in a row: the cotangents of the log-normalizer, of the target and smoothing terms
    (times the mass of their distributions) and −h times the mean of max − z; h is the cotangent of the entropy;
    τ and σ are target and smoothing distribution times their cotangents.
    """
    stats = row.stats
    dtype = stats.rest.dtype
    # A row that is not finite gives NaN, unless nothing depends on it: then it gives 0, which takes finite numbers.
    dead = ~(jnp.isfinite(stats.max) & jnp.isfinite(stats.rest)) & ~_any_used(ct)

    def alive(x: Array) -> Array:
        return jnp.where(dead.reshape(dead.shape + (1,) * (x.ndim - dead.ndim)), jnp.zeros_like(x), x)

    def taking_part(x: Array) -> Array:
        return x if row.where is None else jnp.where(mask_like(row.where, x), x, jnp.zeros_like(x))

    z = effective(spec, row.logits, row.where)
    maximum, rest = alive(stats.max), alive(stats.rest)
    inverse = 1 / (1 + rest)
    a = ct.log_normalizer + (jnp.sum(ct.target, -1) if row.indices is not None else ct.target * stats.target.mass)
    if spec.smoothing:
        a = a + ct.smoothing * stats.smoothing.mass
    e = alive(exponentials(z, stats.max))
    z = z.astype(dtype)
    if spec.entropy:
        h = ct.entropy * inverse
        a = a - h * alive(stats.spread)
        dz = e * ((a * inverse)[..., None] + h[..., None] * _finite_distance(maximum[..., None] - alive(z)))
    else:
        dz = e * (a * inverse)[..., None]
    if row.indices is not None:
        dz = put(dz, row.indices, _at_targets(spec, row.indices, ct, a, alive(stats.picked), maximum, rest, inverse))

    dprobs = dweights = None
    surprise = (maximum[..., None] - alive(z)) + jnp.log1p(rest)[..., None]  # −log p
    if row.probs is not None:
        dz = dz - ct.target[..., None] * row.probs.astype(dtype)
        dprobs = taking_part(times(ct.target[..., None], surprise)).astype(row.probs.dtype)
    if spec.smoothing:
        share = ct.smoothing[..., None]
        dz = dz - share * smoothing_distribution(dz.shape, dtype, row.smoothing_weights, row.where)
        if row.smoothing_weights is not None:
            dweights = jnp.sum(taking_part(times(share, surprise)), tuple(range(dz.ndim - 1)))
    dz = taking_part(dz)
    if spec.logit_softcap is not None:
        t = jnp.tanh(row.logits.astype(dtype) / spec.logit_softcap)
        dz = dz * ((1 - t) * (1 + t))
    return dz.astype(row.logits.dtype), dprobs, dweights


def _at_targets(
    spec: Spec,
    indices: Array,
    ct: Terms,
    a: Array,
    picked: Array,
    maximum: Array,
    rest: Array,
    inverse: Array,
) -> Array:
    """dz at the K target indices, before smoothing: p·a − c without the cancellation of p − 1.

    With c the sum of the cotangents of all entries on this class, p·a − c = p·(a − c) − (1 − p)·c, and the mass of all
    the other classes, 1 − p, is (rest − expm1(z − max))/(1 + rest): two numbers of one sign.
    """
    below = picked - maximum[..., None]
    same = indices[..., :, None] == indices[..., None, :]
    c = jnp.sum(jnp.where(same, ct.target[..., None, :], jnp.zeros_like(ct.target[..., None, :])), -1)
    others = rest[..., None] - jnp.expm1(below)
    value = jnp.exp(below) * (inverse[..., None] * (a[..., None] - c)) - (inverse[..., None] * c) * others
    if spec.entropy:
        value = value + jnp.exp(below) * ((inverse * ct.entropy)[..., None] * _finite_distance(-below))
    return value


def _finite_distance(below: Array) -> Array:
    """max − z, or where that is infinite the largest float: there exp(z − max) is 0, and so must their product be."""
    return jnp.minimum(below, jnp.finfo(below.dtype).max)


def _any_used(ct: Terms) -> Array:
    used = ct.log_normalizer != 0
    for x in (ct.target, ct.smoothing, ct.entropy):
        if x is not None:
            used = used | (jnp.any(x != 0, -1) if x.ndim > used.ndim else x != 0)
    return used
