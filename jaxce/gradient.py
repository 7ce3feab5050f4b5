"""The gradient of the terms of a row of logits, from its record: one rule for every option and kind of target."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxce.arguments import Examples, Options, Shared
from jaxce.lookup import put, sums_of_same
from jaxce.reverse_mode import is_symbolic_zero, materialised
from jaxce.selection import select
from jaxce.sharding import taking_part
from jaxce.stats import RowStats, Terms, shift, times
from jaxce.sums import effective, exponentials_for_gradient, left_out, rows_of, smoothing_distribution


class Factors(NamedTuple):
    """What the gradients in all the classes of a row have in common.

    dead: a row that is not finite, and on which nothing depends: it gives 0. One on which something does gives NaN.
    max: the largest logit; in a dead row inf, which makes exp(z − max) 0.
    log_sum: log Σ exp(z − max).
    scale: a/(1 + rest), what exp(z − max) is multiplied by; see `gradient`.
    at_targets: the gradients of the logits at the K target indices.
    target, smoothing: cotangents of these terms.
    entropy: that of the entropy, divided by 1 + rest.
    outside: of the classes outside the indices, the largest logit, and what exp(z − it) is multiplied by.
    """

    dead: Array
    max: Array
    log_sum: Array
    scale: Array
    at_targets: Array | None
    target: Array
    smoothing: Array | None
    entropy: Array | None
    outside: tuple[Array, Array] | None


def without_unused_tail(ct: Terms) -> Terms:
    """The cotangents as arrays, or None for a tail that nothing depends on: it would take exponentials of its own."""
    unused = is_symbolic_zero(ct.tail)
    return materialised(ct._replace(tail=None) if unused else ct)


def factors(indices: Array | None, stats: RowStats, alive: Array, ct: Terms) -> Factors:
    """What `gradient` needs to know of whole rows: their finite record, and the cotangents of the terms of each."""
    dead = ~alive & ~_any_used(ct)
    sound = select(alive | dead, 1, jnp.nan).astype(stats.rest.dtype)
    rest = stats.rest
    inverse = sound / (1 + rest)
    a = ct.log_normalizer + (jnp.sum(ct.target, -1) if stats.target is None else ct.target * stats.target.mass)
    if ct.smoothing is not None and stats.smoothing is not None:
        a = a + ct.smoothing * stats.smoothing.mass
    at_targets = entropy = outside = None
    if ct.tail is not None and stats.outside is not None:
        a = a - ct.tail
        largest, of_others = stats.outside.max, 1 + stats.outside.rest
        outside = largest, select(of_others > 0, sound * ct.tail / select(of_others > 0, of_others, 1), 0)
    if ct.entropy is not None and stats.spread is not None:
        entropy = ct.entropy * inverse
        a = a - entropy * stats.spread
    if indices is not None and stats.picked is not None:
        below = stats.picked - stats.max[..., None]
        # Above it are what is no class, whose derivative must not overflow, and a logit that was rounded anew.
        below = below - lax.stop_gradient(jnp.maximum(below, 0))
        at_targets = _at_targets(indices, ct.target, a, below, rest, inverse, entropy)
    maximum = select(dead, jnp.inf, stats.max)
    return Factors(
        dead, maximum, sound * jnp.log1p(rest), a * inverse, at_targets, ct.target, ct.smoothing, entropy, outside
    )


def gradient(
    options: Options, logits: Array, examples: Examples, shared: Shared, of: Factors, again: bool = False
) -> tuple[Array, Examples, Shared]:
    """The gradients in the arguments; in probabilities `[..., V]` it is not yet rounded to their dtype.

    The logits `[..., V]` are of all classes or of some, as is what weighs them.

    `again` is what `exponentials_for_gradient` takes.

    With p = softmax(z): d/dz_j = a·p_j + h·p_j·(max − z_j) + o·q_j − τ_j − σ_j, and the exact form at index targets.

    a gathers whatever multiplies p in a row: the cotangents of the log-normalizer, of the target and smoothing terms
    (times the mass of their distributions) and −h times the mean of max − z; h is the cotangent of the entropy;
    τ and σ are target and smoothing distribution times their cotangents; o is the cotangent of the tail, and q the
    softmax of the classes that are no target.
    """
    dtype, rows = of.scale.dtype, rows_of(options, logits, examples, shared)

    z = effective(options, rows)
    bare = rows._replace(indices=left_out(options, rows.indices), probs=None, smoothing_weights=None)
    e = exponentials_for_gradient(options, again, bare, of.max)
    below = of.max[..., None] - _alive(of.dead, z.astype(dtype))
    scale = of.scale[..., None]
    if of.entropy is not None:
        scale = scale + of.entropy[..., None] * _finite_distance(below)
    dz = e * scale
    if of.outside is not None:
        largest, share = (x[..., None] for x in of.outside)
        above = _alive(of.dead, z.astype(dtype)) - shift(largest)
        above = above - lax.stop_gradient(jnp.maximum(above, 0))  # whose slope is 1, also where it was rounded upwards
        dz = dz + jnp.exp(above) * share
    if rows.indices is not None and of.at_targets is not None:
        dz = put(dz, rows.indices, of.at_targets)

    dprobs = dweights = dtemperature = None
    surprise = below + of.log_sum[..., None]  # −log p
    batch = tuple(range(dz.ndim - 1))
    if examples.probs is not None and rows.probs is not None:
        dz = dz - of.target[..., None] * _alive(of.dead, rows.probs.astype(dtype))
        # A class of probability 0 whose target is 0 has no part in the loss, as in the other forms of it.
        absent = (examples.probs == 0) & (surprise == jnp.inf)
        dprobs = taking_part(rows.where, times(of.target[..., None], select(absent, 0, surprise)))
        if shared.class_weights is not None:
            dweights = jnp.sum(times(_alive(of.dead, examples.probs.astype(dtype)), dprobs), batch)
            dprobs = times(shared.class_weights, dprobs)
    if of.smoothing is not None:
        share = of.smoothing[..., None]
        dz = dz - share * smoothing_distribution(dz, dtype, rows.smoothing_weights, rows.where)
        if rows.smoothing_weights is not None:
            by_class = jnp.sum(taking_part(rows.where, times(share, surprise)), batch)
            dweights = by_class if dweights is None else dweights + by_class
    if rows.temperature is not None:
        divisor = select(of.dead[..., None], 1, rows.temperature)  # NaN where it is not positive
        dz = taking_part(rows.where, dz) / divisor
        dtemperature = -jnp.sum(times(dz, z), -1)
    if options.logit_softcap is not None:
        t = jnp.tanh(taking_part(rows.where, _alive(of.dead, logits.astype(dtype))) / options.logit_softcap)
        dz = dz * ((1 - t) * (1 + t))
    dz = taking_part(rows.where, dz)  # last: a masked logit may be NaN
    return dz.astype(logits.dtype), Examples(probs=dprobs, temperature=dtemperature), Shared(class_weights=dweights)


def _alive(dead: Array, x: Array) -> Array:
    return select(dead.reshape(dead.shape + (1,) * (x.ndim - dead.ndim)), jnp.zeros_like(x), x)


def _at_targets(
    indices: Array, target: Array, a: Array, below: Array, rest: Array, inverse: Array, entropy: Array | None
) -> Array:
    """dz at the K target indices, before smoothing: p·a − c without the cancellation of p − 1. `below` is z − max.

    With c the sum of the cotangents of all entries on this class, p·a − c = p·(a − c) − (1 − p)·c, and the mass of all
    the other classes, 1 − p, is (rest − expm1(z − max))/(1 + rest): two numbers of one sign.
    """
    c = sums_of_same(indices, target)
    others = rest[..., None] - jnp.expm1(below)
    value = jnp.exp(below) * (inverse[..., None] * (a[..., None] - c)) - (inverse[..., None] * c) * others
    if entropy is not None:
        value = value + jnp.exp(below) * (entropy[..., None] * _finite_distance(-below))
    return value


def _finite_distance(below: Array) -> Array:
    """max − z, or a finite number where exp(z − max) is 0, and so must their product be, whatever it is scaled by."""
    return jnp.minimum(below, 1e4)


def _any_used(ct: Terms) -> Array:
    used = ct.log_normalizer != 0
    for x in (ct.target, ct.smoothing, ct.entropy, ct.tail):
        if x is not None:
            used = used | (jnp.any(x != 0, -1) if x.ndim > used.ndim else x != 0)
    return used
