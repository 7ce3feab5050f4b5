"""The divergence of two rows of logits, and its gradient: by classes, whose numbers add up to those of the row.

A row may come whole, in blocks, or in shards on several devices. A first pass leaves of each model a record of the row
(`Side`), a second compares the classes (`compare`), and adds up (`sums`) what `finish` makes the divergence of; a third
has the gradients (`slopes`). With teacher p, student q and Δ = log q − log p:

**Terms that are not negative.** As both distributions sum to 1, KL(p‖q) is Σ p·f(Δ) with f(x) = exp(x) − 1 − x >= 0.
Nothing cancels in it: of two models that nearly agree the terms −p·Δ would, and leave nothing but rounding errors. The
Jensen-Shannon divergence is made of KL(p‖m) and KL(q‖m), m = β·p + (1 − β)·q, by the same terms.

**Differences first.** Δ is the difference of the logits' distances below the maxima, each with its rounding error, less
`gap`, what is between the two log-sums. So neither a common offset nor a temperature costs it digits.

**The gap, better.** The log-sums are off by an ε of themselves, which is more than Δ may be. But Σ (q − p), which is to
be 0, tells by how much the gap is off: by log1p of it, `slip`. At the right gap the divergence is stationary, so there
only the square of the slip is taken off it. The gradients take the right gap.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxce.stats import RowStats, tempered, times

_NEAR = 0.5


@dataclasses.dataclass(frozen=True)
class Divergence:
    """kind: `"forward_kl"`, KL(p‖q); `"reverse_kl"`, KL(q‖p); `"jsd"`, β·KL(p‖m) + (1 − β)·KL(q‖m), 0 < β < 1."""

    kind: str = "forward_kl"
    beta: float = 0.5


class Side(NamedTuple):
    """What the classes of one model's row have in common: `max` of the logits; log Σ exp((z − max)/T); its inverse."""

    max: Array
    log_sum: Array
    inverse: Array


class Pair(NamedTuple):
    """Classes of both models.

    teacher, student: p and q.
    log_ratio: Δ = log q − log p.
    base, apart: the teacher's (z − max)/T, and by how much the student's is larger; 0 and the student's if p is 0.
    """

    teacher: Array
    student: Array
    log_ratio: Array
    base: Array
    apart: Array


class Sums(NamedTuple):
    """Over classes: the terms of KL(p‖m) and of KL(q‖m), and q − p. Those of blocks and shards add up."""

    of_teacher: Array
    of_student: Array
    excess: Array


class Row(NamedTuple):
    """The divergence; KL(p‖m) and KL(q‖m), of which it is made; and by how much the gap is too small."""

    value: Array
    of_teacher: Array
    of_student: Array
    slip: Array


def side_of(stats: RowStats, offset: Array | None = None) -> Side:
    """From the record of a complete row of finite maximum; `offset` was subtracted before a division by T."""
    log_sum, inverse = jnp.log1p(stats.rest), 1 / (1 + stats.rest)
    if offset is None:
        return Side(stats.max, log_sum, inverse)
    return Side(offset, stats.max + log_sum, jnp.exp(-stats.max) * inverse)


def compare(
    logits: Array,
    teacher_logits: Array,
    student: Side,
    teacher: Side,
    temperature: Array | None = None,
    slip: Array | None = None,
) -> Pair:
    """Of logits `[..., V]`, capped and masked, of all classes or of some. `slip`: of `Row`, for the gradients."""
    (a, a_error), (b, b_error) = _below(logits, student.max), _below(teacher_logits, teacher.max)
    apart = jnp.where((a == -jnp.inf) & (b == -jnp.inf), 0, (a - b) + (a_error - b_error))
    if temperature is not None:
        a, b, apart = (tempered(x, temperature[..., None], None) for x in (a, b, apart))
    log_ratio = apart - (student.log_sum - teacher.log_sum)[..., None]
    if slip is not None:
        log_ratio = log_ratio - slip[..., None]
    there = b > -jnp.inf
    return Pair(
        jnp.exp(b) * teacher.inverse[..., None],
        jnp.exp(a) * student.inverse[..., None],
        log_ratio,
        jnp.where(there, b, 0),
        jnp.where(there, apart, a),
    )


def _below(z: Array, maximum: Array) -> tuple[Array, Array]:
    """z − max, and its rounding error (Knuth's), of which neither has a derivative of its own."""
    maximum = maximum[..., None]
    d = z - maximum
    fixed, high, largest = (lax.stop_gradient(x) for x in (z, d, maximum))
    minus = high - fixed
    error = (fixed - (high - minus)) - (largest + minus)
    return d, jnp.where(jnp.isfinite(error), error, 0)


def sums(of: Divergence, pair: Pair) -> Sums:
    return Sums(*(jnp.sum(x, -1) for x in (*_by_class(of, pair), lax.stop_gradient(_excess(pair)))))


def finish(of: Divergence, total: Sums) -> Row:
    """From the sums over all classes."""
    slip = jnp.log1p(total.excess)
    by_kind = {"forward_kl": (1, 0, 1), "reverse_kl": (0, 1, 1), "jsd": (of.beta, 1 - of.beta, of.beta * (1 - of.beta))}
    teacher, student, curvature = by_kind[of.kind]
    value = teacher * total.of_teacher + student * total.of_student - curvature * (slip * slip / 2)
    return Row(jnp.maximum(value, 0), total.of_teacher, total.of_student, slip)


def slopes(of: Divergence, pair: Pair, row: Row) -> tuple[Array, Array]:
    """The gradient in the student's logits (z − max)/T; and the sum of that and of the gradient in the teacher's.

    The sum is small of itself, as a common change of both models changes little. The gradient in T is −1/T times
    Σ sum·base + gradient·apart.
    """
    p, q = pair.teacher, pair.student
    value, of_teacher, of_student = (x[..., None] for x in (row.value, row.of_teacher, row.of_student))
    term_p, term_q = _by_class(of, pair)
    if of.kind == "forward_kl":
        return _excess(pair), term_p - times(p, value)
    if of.kind == "reverse_kl":
        return times(q, pair.log_ratio - value), term_q - times(q, value)
    by_teacher, by_student = of.beta, 1 - of.beta
    student = by_student * times(q, -_to_mixture(of, pair.log_ratio)[1] - of_student)
    return student, by_teacher * (term_p - p * of_teacher) + by_student * (term_q - q * of_student)


def divergence_of_log_probs(of: Divergence, log_q: Array, p: Array, whole: bool = False) -> Array:
    """The divergence from the student's log-probabilities and the teacher's probabilities, a constant, both `[..., K]`.

    Without `whole` neither has to sum to 1: it is Σ p·log(p/q), Σ q·log(q/p), or β and 1 − β of these sums with m for
    the other. With it both do, and that they are rounded makes no difference.
    """
    p = lax.stop_gradient(p)
    q, log_p = jnp.exp(log_q), jnp.log(p)
    log_ratio = jnp.where((log_q == -jnp.inf) & (p == 0), 0, log_q - log_p)
    pair = Pair(p, q, log_ratio, jnp.zeros_like(p), log_ratio)
    if whole:
        return finish(of, sums(of, pair)).value
    term_p, term_q = (jnp.sum(x, -1) for x in _by_class(of, pair))
    if of.kind == "jsd":
        return of.beta * term_p + (1 - of.beta) * term_q
    excess = jnp.sum(_excess(pair), -1)
    return term_p - excess if of.kind == "forward_kl" else term_q + excess


def _excess(pair: Pair) -> Array:
    """q − p."""
    near, delta = _near(pair.log_ratio)
    return jnp.where(near, pair.teacher * jnp.expm1(delta), pair.student - pair.teacher)


def _by_class(of: Divergence, pair: Pair) -> tuple[Array, Array]:
    """The terms of KL(p‖m) and of KL(q‖m), where m is the other distribution unless it is a mixture."""
    p, q, delta = pair.teacher, pair.student, pair.log_ratio
    if of.kind == "forward_kl":
        return _term(p, delta, q), jnp.zeros_like(q)
    if of.kind == "reverse_kl":
        return jnp.zeros_like(p), _term(q, -delta, p)
    by_p, by_q = _to_mixture(of, delta)
    m = of.beta * p + (1 - of.beta) * q
    return _term(p, by_p, m), _term(q, by_q, m)


def _to_mixture(of: Divergence, delta: Array) -> tuple[Array, Array]:
    """log(m/p) and log(m/q), of which one is up to 0 and the other from 0 on."""
    larger = delta > 0  # q is
    down = jnp.where(larger, -delta, delta)
    less, more = (jnp.where(larger, x, 1 - x).astype(delta.dtype) for x in (of.beta, 1 - of.beta))
    odds = jnp.expm1(down)
    low = jnp.log1p(less * odds)
    inner = jnp.maximum(odds, -0.99)
    # exp(−x) − 1 is −e/(1 + e) for e = exp(x) − 1: the sum low − down has lost its digits where it is small.
    high = jnp.where(odds > -0.99, jnp.log1p(-more * inner / (1 + inner)), low - down)
    return jnp.where(larger, high, low), jnp.where(larger, low, high)


def _term(p: Array, y: Array, m: Array) -> Array:
    """p·f(y) for m = p·exp(y), with p = 0 at y = inf."""
    near, small = _near(y)
    count = 8 if jnp.finfo(y.dtype).bits == 32 else 14  # up to x^9/9! and x^15/15!: less than ε of x²/2
    series = jnp.ones_like(small)
    for n in range(count + 1, 2, -1):
        series = 1 + small / n * series
    return jnp.where(near, p * (small * small / 2 * series), m - p - times(p, y))


def _near(x: Array) -> tuple[Array, Array]:
    """Where |x| is small; and x there, 0 elsewhere."""
    near = jnp.abs(x) < _NEAR
    return near, jnp.where(near, x, 0)
