"""The divergence of two rows of logits, and its gradient: by classes, whose numbers add up to those of the row.

A row may come whole, in blocks, or in shards on several devices. A first pass leaves of each model a record of the row
(`Side`), a second compares the classes (`compare`), and adds up (`sums`) what `finish` makes the divergence of; a third
has the gradients (`gradient`, `temperature_gradient`). With teacher p, student q and Δ = log q − log p:

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
import functools
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxce.selection import select
from jaxce.stats import RowStats, tempered, times

T = TypeVar("T")
KINDS = ("forward_kl", "reverse_kl", "jsd")


class Models(NamedTuple, Generic[T]):
    """The student's and the teacher's."""

    student: T
    teacher: T


@dataclasses.dataclass(frozen=True)
class Divergence:
    """kind: `"forward_kl"`, KL(p‖q); `"reverse_kl"`, KL(q‖p); `"jsd"`, β·KL(p‖m) + (1 − β)·KL(q‖m), 0 < β < 1."""

    kind: str = "forward_kl"
    beta: float = 0.5

    @property
    def shares(self) -> Models[float]:
        """What KL(q‖m) and KL(p‖m) are multiplied by, as far as the divergence is made of them."""
        return Models(1 - self.beta, self.beta) if self.kind == "jsd" else Models(1, 1)


def divergence_of(kind: str, beta: float) -> Divergence:
    """With the limits of β: as a Jensen-Shannon divergence it would be 0 there."""
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse_kl" if beta else "forward_kl"
    return Divergence(kind, beta) if kind == "jsd" else Divergence(kind)


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
    """Over classes; those of blocks and shards add up. Of a KL divergence m is the other distribution.

    excess: of q − p.
    parts: of the terms of KL(q‖m) and KL(p‖m), as far as the divergence is made of them.
    leading, others, mass: what log(q/m) is where q is large; of q·log(q/m) elsewhere, and of q.
    """

    excess: Array
    parts: Models[Array | None]
    leading: Array | None = None
    others: Array | None = None
    mass: Array | None = None


class Row(NamedTuple):
    """What the classes' gradients need to know of the row.

    value: the divergence.
    slip: by how much the gap is too small.
    parts: KL(q‖m) and KL(p‖m), as far as it is made of them.
    leading, rest: KL(q‖m) in two parts, of which the first is log(q/m) at a class that has nearly all of q.
    """

    value: Array
    slip: Array
    parts: Models[Array | None]
    leading: Array | None = None
    rest: Array | None = None


def side_of(stats: RowStats, offset: Array | None = None) -> Side:
    """From the record of a complete row of finite maximum; `offset` was subtracted before a division by T."""
    log_sum, inverse = jnp.log1p(stats.rest), 1 / (1 + stats.rest)
    if offset is None:
        return Side(stats.max, log_sum, inverse)
    return Side(offset, stats.max + log_sum, jnp.exp(-stats.max) * inverse)


def compare(logits: Models[Array], sides: Models[Side], temperature: Array | None = None) -> Pair:
    """Of logits `[..., V]`, capped and masked, not divided, of all classes or of some."""
    (a, a_error), (b, b_error) = (_below(z, side.max) for z, side in zip(logits, sides, strict=True))
    apart = select((a == -jnp.inf) & (b == -jnp.inf), 0, (a - b) + (a_error - b_error))
    if temperature is not None:
        a, b, apart = (tempered(x, temperature[..., None], None) for x in (a, b, apart))
    there = b > -jnp.inf
    return Pair(
        jnp.exp(b) * sides.teacher.inverse[..., None],
        jnp.exp(a) * sides.student.inverse[..., None],
        apart - (sides.student.log_sum - sides.teacher.log_sum)[..., None],
        select(there, b, 0),
        select(there, apart, a),
    )


def _below(z: Array, maximum: Array) -> tuple[Array, Array]:
    """z − max, and its rounding error (Knuth's), which has no derivative."""
    maximum = maximum[..., None]
    d = z - maximum
    fixed, high, largest = (lax.stop_gradient(x) for x in (z, d, maximum))
    minus = high - fixed
    error = (fixed - (high - minus)) - (largest + minus)
    return d, select(jnp.isfinite(error), error, 0)


def sums(of: Divergence, pair: Pair) -> Sums:
    parts = jax.tree.map(_total, _by_class(of, pair))
    total = Sums(lax.stop_gradient(_total(_excess(pair))), parts)
    if parts.student is None:
        return total
    q, log_ratio = pair.student, _over_mixture(of, pair)
    # In between a class is in both parts, so that it does not matter how a compiler rounds q for each of the sums.
    share = jnp.clip((q - 0.6) / 0.15, 0, 1)
    return total._replace(
        leading=_total(times(share, log_ratio)),
        others=_total(times((1 - share) * q, log_ratio)),
        mass=_total(select(q > 0.6, 0, q)),
    )


def finish(of: Divergence, total: Sums) -> Row:
    """From the sums over all classes."""
    slip, rest = jnp.log1p(total.excess), None
    by_student, by_teacher = of.shares

    def right(part: Array | None, share: float) -> Array | None:
        if part is None:
            return None
        part = part - share * share * (slip * slip / 2)
        return part - lax.stop_gradient(jnp.minimum(part, 0))  # not `jnp.maximum`: at 0 its slope is a half

    parts = Models(right(total.parts.student, by_teacher), right(total.parts.teacher, by_student))
    if total.leading is not None and total.others is not None and total.mass is not None:
        rest = total.others - total.leading * total.mass
    return Row(_joined(of, parts), slip, parts, total.leading, rest)


def gradient(of: Divergence, pair: Pair, row: Row) -> Array:
    """In the student's logits, divided by T."""
    if row.leading is None or row.rest is None:
        return _excess(_without_slip(pair, row))
    # Of a class that has nearly all of q, log(q/m) is nearly its mean. And a slip is in all three numbers.
    distance = (_over_mixture(of, pair) - row.leading[..., None]) - row.rest[..., None]
    return of.shares.student * times(pair.student, distance)


def temperature_gradient(of: Divergence, pair: Pair, row: Row, student: Array) -> Array:
    """That of these classes, times T; `student`: from `gradient`. It adds up as the sums do.

    It is −Σ of what either model's (z − max)/T is times its gradient. Both gradients together are small of themselves,
    as a common change of both models changes little, so they are taken together.
    """
    terms, probs = _by_class(of, _without_slip(pair, row)), Models(pair.student, pair.teacher)
    together = jnp.zeros_like(student)
    for share, p, term, mean in zip(of.shares, probs, terms, row.parts, strict=True):
        if term is not None and mean is not None:
            together = together + share * (term - times(p, mean[..., None]))
    return -_total(together * pair.base + times(student, pair.apart))


def divergence_of_log_probs(of: Divergence, log_q: Array, p: Array, whole: bool = False) -> Array:
    """The divergence from the student's log-probabilities and the teacher's probabilities, a constant, both `[..., K]`.

    Without `whole` neither has to sum to 1: it is Σ p·log(p/q), Σ q·log(q/p), or β and 1 − β of these sums with m for
    the other. With it both do, and that they are rounded makes no difference.
    """
    p = lax.stop_gradient(p)
    log_ratio = select((log_q == -jnp.inf) & (p == 0), 0, log_q - jnp.log(p))
    pair = Pair(p, jnp.exp(log_q), log_ratio, jnp.zeros_like(p), log_ratio)
    if whole:
        return finish(of, sums(of, pair)).value
    excess = _total(_excess(pair))
    total = _joined(of, jax.tree.map(_total, _by_class(of, pair)))
    return total + {"forward_kl": -1, "reverse_kl": 1, "jsd": 0}[of.kind] * excess


def _total(x: Array) -> Array:
    return jnp.sum(x, -1)


def _joined(of: Divergence, parts: Models[Array | None]) -> Array:
    there = [share * part for share, part in zip(of.shares, parts, strict=True) if part is not None]
    return functools.reduce(jnp.add, there)


def _without_slip(pair: Pair, row: Row) -> Pair:
    return pair._replace(log_ratio=pair.log_ratio - row.slip[..., None])


def _excess(pair: Pair) -> Array:
    """q − p."""
    near, delta = _near(pair.log_ratio)
    return select(near, pair.teacher * jnp.expm1(delta), pair.student - pair.teacher)


def _by_class(of: Divergence, pair: Pair) -> Models[Array | None]:
    """The terms of KL(q‖m) and of KL(p‖m), as far as the divergence is made of them."""
    p, q, delta = pair.teacher, pair.student, pair.log_ratio
    if of.kind == "forward_kl":
        return Models(None, _term(p, delta, q))
    if of.kind == "reverse_kl":
        return Models(_term(q, -delta, p), None)
    by_p, by_q = _to_mixture(of, delta)
    m = of.beta * p + (1 - of.beta) * q
    return Models(_term(q, by_q, m), _term(p, by_p, m))


def _over_mixture(of: Divergence, pair: Pair) -> Array:
    """log(q/m)."""
    return -_to_mixture(of, pair.log_ratio)[1] if of.kind == "jsd" else pair.log_ratio


def _to_mixture(of: Divergence, delta: Array) -> tuple[Array, Array]:
    """log(m/p) and log(m/q), of which one is up to 0 and the other from 0 on."""
    larger = delta > 0  # q is
    down = select(larger, -delta, delta)
    less, more = (select(larger, x, 1 - x).astype(delta.dtype) for x in (of.beta, 1 - of.beta))
    odds = jnp.expm1(down)
    low = jnp.log1p(less * odds)
    inner = jnp.maximum(odds, -0.99)
    # exp(−x) − 1 is −e/(1 + e) for e = exp(x) − 1: the sum low − down has lost its digits where it is small.
    high = select(odds > -0.99, jnp.log1p(-more * inner / (1 + inner)), low - down)
    return select(larger, high, low), select(larger, low, high)


def _term(p: Array, y: Array, m: Array) -> Array:
    """p·f(y) for m = p·exp(y), with p = 0 at y = inf."""
    near, small = _near(y)
    count = 10 if jnp.finfo(y.dtype).bits == 32 else 17  # what is left out is less than ε of x²/2
    series = jnp.ones_like(small)
    for n in range(count + 1, 2, -1):
        series = 1 + small / n * series
    return select(near, p * (small * small / 2 * series), m - p - times(p, y))


def _near(x: Array) -> tuple[Array, Array]:
    """Where |x| is small; and x there, 0 elsewhere."""
    near = jnp.abs(x) < 1
    return near, select(near, x, 0)
