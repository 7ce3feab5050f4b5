"""What the losses and their gradients should be, from the definitions, on the very numbers that jaxce is given.

It shares no code with jaxce and holds everything densely: a target is a distribution over all classes, whatever form
jaxce gets it in. Inputs of at most float32 are worked in float64 (NumPy), float64 inputs with 50 digits (mpmath); the
formulas are written once, for arrays of either. Nothing cancels in them, so the small numbers are right as well;
`test_numbers.py` checks them in turn against the bare definitions at 400 digits.

Next to each value stands its `size`: the same sum with every term made positive. A rounding error is measured by it
wherever terms of both signs meet, and where they do not it is the value's own magnitude.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import mpmath
import numpy as np

mpmath.mp.dps = 50

_EXP, _LOG1P = np.frompyfunc(mpmath.exp, 1, 1), np.frompyfunc(mpmath.log1p, 1, 1)


class Valued(NamedTuple):
    """A value, and the magnitude that its rounding error is measured by."""

    value: np.ndarray
    size: np.ndarray


class Softmax(NamedTuple):
    """Of each row: max; the distance of each class below it; p; 1 − p; −log p; and log Σ exp(z − max)."""

    max: np.ndarray
    below: np.ndarray
    p: np.ndarray
    q: np.ndarray
    surprise: np.ndarray
    log_sum: np.ndarray


class Losses(NamedTuple):
    loss: Valued
    nll: Valued
    log_normalizer: Valued
    entropy: Valued


class Gradients(NamedTuple):
    logits: Valued
    targets: Valued
    weights: Valued
    class_weights: Valued
    label_smoothing: Valued
    z_loss: Valued


class Cotangents(NamedTuple):
    """One number per row for each output; None stands for zeros."""

    loss: Any = None
    nll: Any = None
    log_normalizer: Any = None
    entropy: Any = None


def lift(x: Any, precise: bool = False) -> np.ndarray:
    """`x` exactly, in the oracle's arithmetic: float64, or mpmath numbers if `precise`."""
    x = np.asarray(x)
    x = x.astype(np.float64)
    return np.frompyfunc(mpmath.mpf, 1, 1)(x) if precise else x


def lower(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)


def one_hot(labels: Any, num_classes: int) -> np.ndarray:
    return (np.asarray(labels)[..., None] == np.arange(num_classes)).astype(np.float64)


def dense(indices: Any, probs: Any, num_classes: int) -> np.ndarray:
    """The distribution that indices `[..., K]` and probs `[..., K]` stand for."""
    hits = np.asarray(indices)[..., None] == np.arange(num_classes)
    return np.sum(hits * np.asarray(probs, np.float64)[..., None], -2)


def softmax(z: np.ndarray) -> Softmax:
    """Of rows `[N, V]` with a finite maximum."""
    exp, log1p = (_EXP, _LOG1P) if z.dtype == object else (np.exp, np.log1p)
    first = np.argmax(z, -1)[:, None] == np.arange(z.shape[-1])
    top = np.max(z, -1)
    below = top[:, None] - z
    e = exp(-below)
    rest = np.sum(np.where(first, e * 0, e), -1)
    total = (1 + rest)[:, None]
    return Softmax(
        top,
        below,
        e / total,
        np.where(first, rest[:, None], total - e) / total,
        below + log1p(rest)[:, None],
        log1p(rest),
    )


class Problem:
    """Rows of logits `[N, V]` with target distributions `[N, V]` and the options of the loss."""

    def __init__(
        self,
        logits: Any,
        targets: Any,
        *,
        weights: Any = 1.0,
        class_weights: Any = 1.0,
        label_smoothing: Any = 0.0,
        z_loss: Any = 0.0,
        where: Any = True,
        precise: bool = False,
    ):
        rows, classes = np.shape(logits)
        self.precise = precise
        self.mask = np.broadcast_to(where, (rows, classes))
        z = lift(logits, precise)
        self.softmax = softmax(np.where(self.mask, z, -np.inf * np.ones_like(z)))
        self.t = lift(targets, precise)
        self.w = lift(np.broadcast_to(lift(weights), rows), precise)
        self.v = np.where(self.mask, lift(np.broadcast_to(lift(class_weights), classes), precise), 0)
        self.smoothing, self.z_loss = lift(label_smoothing, precise), lift(z_loss, precise)
        self.count = self.mask.sum(-1)

    def losses(self) -> Losses:
        m, _, p, _, surprise, log_sum = self.softmax
        nll, target, smoothing = self._three()
        log_normalizer = Valued(m + log_sum, abs(m) + log_sum)
        loss, size = (
            self.w * ((1 - self.smoothing) * target + _times(self.smoothing, smoothing) + self.z_loss * lse * lse)
            for lse in log_normalizer
        )
        entropy = np.sum(_times(p, surprise), -1)
        return Losses(Valued(loss, abs(size)), Valued(nll, nll), log_normalizer, Valued(entropy, entropy))

    def _three(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        surprise = self.softmax.surprise
        nll = np.sum(_times(self.t, surprise), -1)
        target = np.sum(_times(self.t * self.v, surprise), -1)
        return nll, target, np.sum(_times(self.v, surprise), -1) / self.count

    def gradients(self, ct: Cotangents) -> Gradients:
        """Of Σ over rows and outputs of cotangent times output."""
        m, below, p, q, surprise, log_sum = self.softmax
        a, b, c, h = (lift(np.zeros(len(m)) if x is None else x, self.precise) for x in ct)
        _, target, smoothing = self._three()
        lse, lse_size = m + log_sum, abs(m) + log_sum
        aw, keep = (a * self.w)[:, None], 1 - self.smoothing
        # The coefficient of each class's −log p; its derivative in z_j is p_j·Σκ − κ_j.
        given = aw * keep * self.v * self.t + b[:, None] * self.t
        spread_out = aw * (self.smoothing / self.count)[:, None] * self.v
        kappa = given + spread_out
        total = np.sum(kappa, -1, keepdims=True)
        kappa_size = abs(given) + abs(spread_out)
        # The entropy's is p_j·(below_j − Σ_k p_k·below_k).
        mean_below = np.sum(_times(p, below), -1, keepdims=True)
        of_lse = [
            (c + 2 * a * self.w * self.z_loss * lse)[:, None],
            abs(c) + 2 * abs(a * self.w) * self.z_loss * lse_size,
        ]
        logits = Valued(
            p * (total - kappa) - q * kappa + p * of_lse[0] + h[:, None] * (_times(p, below) - p * mean_below),
            p * np.sum(kappa_size, -1, keepdims=True)
            + kappa_size
            + p * of_lse[1][:, None]
            + abs(h)[:, None] * (_times(p, below) + p * mean_below),
        )
        by_target = [_times(aw * keep * self.v + b[:, None], surprise)]
        by_target.append(_times(abs(aw) * keep * self.v + abs(b)[:, None], surprise))
        inner = [keep * target + _times(self.smoothing, smoothing) + self.z_loss * x * x for x in (lse, lse_size)]
        share = keep * self.t + np.where(self.mask, (self.smoothing / self.count)[:, None], 0)
        return Gradients(
            logits,
            Valued(*by_target),
            Valued(a * inner[0], abs(a) * inner[1]),
            Valued(*(np.sum(_times(x * share, surprise), 0) for x in (aw, abs(aw)))),
            Valued(np.sum(aw[:, 0] * (smoothing - target)), np.sum(abs(aw[:, 0]) * (smoothing + target))),
            Valued(np.sum(aw[:, 0] * lse * lse), np.sum(abs(aw[:, 0]) * lse_size * lse_size)),
        )


def _times(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """a·x with 0·inf = 0."""
    return a * np.where((a == 0) & (x == np.inf), 0, x)


# --- what rounding allows -------------------------------------------------------------------------------------------


def half_ulp(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Half the spacing of `dtype` at the magnitude of x: the error of rounding x to it, subnormal numbers included."""
    info = ml_dtypes.finfo(dtype)
    magnitude = np.maximum(np.abs(lower(x)), float(info.smallest_normal))
    return 2.0 ** (np.floor(np.log2(magnitude)) - info.nmant - 1)


def assert_within(actual: Any, expected: np.ndarray, bound: np.ndarray, what: str = "") -> None:
    """|actual − expected| <= bound everywhere; where expected is infinite, equal."""
    got, expected = np.asarray(actual).astype(np.float64), np.asarray(expected)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, not {expected.shape}"
    infinite = np.asarray(abs(expected) == np.inf)  # of a single mpmath number it is a bool
    np.testing.assert_array_equal(got[infinite], lower(expected[infinite]), err_msg=what)
    finite = ~infinite
    # The difference in the oracle's arithmetic: a float64 difference of float64 results would round.
    error = lower(abs(np.where(finite, lift(got, expected.dtype == object) - np.where(finite, expected, 0), 0)))
    bound = np.broadcast_to(lower(bound), error.shape)
    bad = finite & ~(error <= bound)
    if bad.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            worst = np.unravel_index(np.argmax(np.where(bad, error / bound, -1)), error.shape)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} out of bounds; worst at {tuple(map(int, worst))}: "
            f"{got[worst]!r} for {float(expected[worst])!r}, "
            f"error {error[worst]:.4g} with {bound[worst]:.4g} allowed"
        )
