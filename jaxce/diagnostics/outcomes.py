"""What a model made of each example: its loss, prediction, confidence, squared error and the rank of its label."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxce import checks
from jaxce.sharding import explicit_mesh, place_together
from jaxce.softmax import softmax_cross_entropy
from jaxce.stats import working_dtype
from jaxce.targets import class_indices


class Outcomes(NamedTuple):
    """Per example, `[N]`. What cannot be known (a NaN logit, a label that is no class) is NaN, `hit` included.

    used: whether the example counts: not ignored, and of a weight other than 0.
    label: int32, from 0 to V-1, or V where the label is no class or the example does not count.
    """

    used: Array
    weight: Array
    label: Array
    prediction: Array
    nll: Array
    hit: Array
    confidence: Array
    brier: Array
    rank: Array

    def total(self, values: Array) -> Array:
        """The weighted sum over the examples that count."""
        return jnp.sum(self.weighted(values))

    def weighted(self, values: Array) -> Array:
        return jnp.where(self.used, self.weight * values, jnp.zeros_like(values))

    def mean(self, values: Array) -> Array:
        """The weighted mean; 0 over nothing, like the means of jaxce's losses."""
        divisor = self.total(jnp.ones_like(values))
        return jnp.where(divisor == 0, 0, self.total(values) / jnp.where(divisor == 0, 1, divisor))


_ROWS = 256  # that are added one after the other


def sums_by(index: Array, values: Array, size: int) -> Array:
    """`[size]`, the sums of `values [N]` by `index [N]`; what has none from 0 to size−1 is in no sum.

    One after the other, a million values of 0.97 lose a hundredth of their sum in float32. So no more than 256 of them
    go into one sum, and these are added in pairs.
    """
    (n,) = values.shape
    tables = max(-(-n // _ROWS), 1) if isinstance(n, int) else _ROWS  # as many for a symbol
    index = jnp.where((index >= 0) & (index < size), index, size)  # a column of its own, which is cut off
    sums = jnp.zeros((tables, size + 1), values.dtype).at[jnp.arange(n) % tables, index].add(values)
    while len(sums) > 1:
        sums = jnp.pad(sums, ((0, len(sums) % 2), (0, 0)))
        sums = sums[::2] + sums[1::2]
    return sums[0, :size]


def checked(
    logits: Any, targets: Any, weights: Any, ignore_index: int | None
) -> tuple[Array, Array, Array, int | None]:
    """Logits, labels, weights in the working dtype, which `flat` takes; and the number that ignored labels have."""
    logits = checks.float_array("logits", logits, targets)
    checks.num_classes("logits", logits.shape[-1])
    one_hot = "The classes of one-hot targets are targets.argmax(-1)."
    if not checks.is_integers(targets):
        checks.not_labels("targets", targets, logits.ndim, one_hot)
    targets, ignore_index = class_indices("targets", targets, ignore_index)
    batch = logits.shape[:-1]
    checks.indices("targets", targets, batch, logits.shape, one_hot=one_hot)
    dtype = working_dtype(logits.dtype)
    weights = checks.example_weights(1.0 if weights is None else weights, batch).astype(dtype)
    weights = jnp.broadcast_to(jnp.where(weights >= 0, weights, jnp.nan), batch)
    if (mesh := explicit_mesh(logits, targets, weights)) is not None:  # counts by class are of all examples
        given = {"logits": logits, "targets": targets, "weights": weights}
        logits, targets, weights = place_together(mesh, {n: (x, [None] * x.ndim) for n, x in given.items()}).values()
    return logits, targets, weights, ignore_index


def flat(logits: Array, labels: Array, weights: Array) -> tuple[Array, Array, Array]:
    """`logits [N, V]`, `labels [N]` and `weights [N]`. In a compiled program: `jax_debug_nans` looks at every other."""
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), weights.reshape(-1)


def outcomes(logits: Array, labels: Array, weights: Array, ignore_index: int | None) -> Outcomes:
    """`logits [N, V]`, `labels [N]` and `weights [N]` as `flat` returns them."""
    num_classes = logits.shape[-1]
    # z_loss etc. are no part of what a model knows: the plain loss, whatever it was trained with.
    _, aux = softmax_cross_entropy(logits, labels, weights=weights, ignore_index=ignore_index, return_aux=True)
    used = aux.weight != 0
    inside = (labels >= 0) & (labels < num_classes)
    label = jnp.where(inside & used, labels, jnp.zeros_like(labels)).astype(jnp.int32)

    logits = logits.astype(aux.nll.dtype)
    unknown = jnp.where(jnp.isnan(aux.nll), aux.nll, 0)
    hit = (aux.prediction == label).astype(aux.nll.dtype) + unknown
    # The loss of the predicted class, not max - logsumexp: a common offset of the logits must not cost digits.
    confidence = jnp.exp(-softmax_cross_entropy(logits, aux.prediction))
    classes = jnp.arange(num_classes, dtype=jnp.int32)[None]
    is_label = classes == label[:, None]
    others = jnp.where(is_label, 0, jax.nn.softmax(logits, -1))
    brier = jnp.sum(others * others, -1) + jnp.square(jnp.expm1(-aux.nll))
    own = jnp.take_along_axis(logits, label[:, None], -1)
    ahead = (logits > own) | ((logits == own) & (classes < label[:, None]))  # of equals the first, as argmax has it
    return Outcomes(
        used=used,
        weight=jnp.where(used, weights, 0),
        label=jnp.where(inside & used, label, num_classes),
        prediction=aux.prediction,
        nll=aux.nll,
        hit=hit,
        confidence=confidence,
        brier=brier,
        rank=jnp.sum(ahead, -1, dtype=jnp.int32),
    )
