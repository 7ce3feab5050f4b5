"""The checked arguments of a loss, once: what differs by example, what all examples share, constants of the program.

The fields have the names of the public arguments. Functions that need only some of them get the record all the same,
and a derivative in a record is a record.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxce import checks
from jaxce.label_check import check_targets
from jaxce.sharding import AxisNames
from jaxce.stats import working_dtype
from jaxce.targets import Ids, sort_by_kind
from jaxce.types import Implementation, Reduction

Change = Callable[[Array], Array]
Models = TypeVar("Models")  # a `Projection`, or several


def _unchanged(x: Array) -> Array:
    return x


class Examples(NamedTuple):
    """What differs by example, or token, beside its logits or hidden states.

    Class indices are `indices [..., K]`, with `probs [..., K]` unless each is 1; probabilities are `probs [..., V]`
    without indices. The logits are divided by `temperature [...]`, after `offset [...]` is subtracted if there is one:
    of exact logits the differences are exact, and quotients would not be.
    """

    indices: Array | None = None
    probs: Array | None = None
    weights: Array | None = None
    where: Array | None = None
    temperature: Array | None = None
    offset: Array | None = None

    def by_kind(self, row: Change = _unchanged, entries: Change = _unchanged, classes: Change = _unchanged) -> Examples:
        """Each array through the function for its kind: numbers of rows `[...]`, `[..., K]`, or `[..., V]`."""
        of = dict.fromkeys(self._fields, row) | {"indices": entries, "where": classes}
        of["probs"] = classes if self.indices is None else entries
        return Examples(**{name: of[name](x) for name, x in self._asdict().items() if x is not None})

    @property
    def counted_probs(self) -> Array | None:
        """Probability targets, if every row of them counts."""
        return self.probs if self.indices is None and self.where is None and self.weights is None else None


class Projection(NamedTuple):
    """Of the linear loss, whose logits are hidden @ kernel + bias."""

    hidden: Array
    kernel: Array
    bias: Array | None = None


class Shared(NamedTuple):
    """What all examples share."""

    class_weights: Array | None = None
    label_smoothing: Array | None = None
    z_loss: Array | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """Constants of the compiled program."""

    label_smoothing: bool = False  # whether there is any: its amount is an array
    z_loss: bool = False
    temperature: bool = False
    logit_softcap: float | None = None
    ignore_index: int | None = None
    reduction: str = "none"
    return_aux: bool = False
    tail: bool = False  # whether the mass of the classes outside the target indices is asked for
    implementation: str = "xla"
    axis_name: AxisNames = ()
    batch_axis_name: AxisNames = ()

    @property
    def of_nll(self) -> Options:
        """For the negative log-likelihood alone."""
        return dataclasses.replace(self, label_smoothing=False, return_aux=False)


def checked(
    targets: Any,
    full: tuple[int, ...],
    class_axes: Sequence[int],
    dtype: DTypeLike,
    targets_name: str = "targets",
    *,
    where: Any = None,
    weights: Any = None,
    ignore_index: int | None = None,
    axis_name: Any = None,
    **options: Any,
) -> tuple[Examples, Shared, Options]:
    """Checks what goes with logits of this dtype and of shape `full`; numbers become arrays of the working dtype.

    Along the class axes that is their length on this device, if they are split.
    """
    indices, probs, ignore_index = sort_by_kind(targets, full, class_axes, dtype, ignore_index, targets_name)
    examples, shared, constants = checked_options(
        full, class_axes, dtype, where=where, weights=weights, axis_name=axis_name, **options
    )
    examples = examples._replace(indices=indices, probs=probs)
    if (probs := examples.counted_probs) is not None and not isinstance(probs, jax.core.Tracer):
        checks.no_logits(targets_name, probs, tuple(class_axes))
    tail = constants.return_aux and isinstance(targets, Ids)
    return examples, shared, dataclasses.replace(constants, ignore_index=ignore_index, tail=tail)


def with_targets_checked(
    result: Any, targets: Any, examples: Examples, class_axes: Sequence[int], options: Options
) -> Any:
    """The loss, or loss and aux, of these targets as they came: traced probabilities are looked at under checkify."""
    traced = isinstance(targets, jax.core.Tracer) and not options.axis_name
    if not traced or examples.counted_probs is None:
        return result
    loss, *aux = result if options.return_aux else (result,)
    loss = check_targets(loss, targets, tuple(class_axes))
    return (loss, *aux) if aux else loss


def checked_options(
    full: tuple[int, ...],
    class_axes: Sequence[int],
    dtype: DTypeLike,
    *,
    where: Any = None,
    weights: Any = None,
    class_weights: Any = None,
    label_smoothing: Any = 0.0,
    z_loss: Any = 0.0,
    logit_softcap: float | None = None,
    temperature: Any = 1.0,
    reduction: str = "none",
    axis_name: Any = None,
    batch_axis_name: Any = None,
    return_aux: bool = False,
    implementation: str | None = None,
    implementations: tuple[str, ...] = get_args(Implementation),
) -> tuple[Examples, Shared, Options]:
    """The same without targets."""
    batch = checks.batch_shape(full, class_axes)
    if where is not None:
        where = checks.where_mask(where, full, batch, class_axes)
    checks.scalar("label_smoothing", label_smoothing, 0, 1)
    checks.scalar("z_loss", z_loss, 0, math.inf)
    checks.one_of("reduction", reduction, get_args(Reduction))
    checks.one_of("implementation", implementation, (None, *implementations))
    checks.one_of("return_aux", return_aux, (False, True))
    split_classes, split_batch = checks.mesh_axes(axis_name, batch_axis_name, reduction)
    if logit_softcap is not None:
        checks.softcap("logit_softcap", logit_softcap)
    dtype = working_dtype(dtype)
    if weights is not None:
        weights = checks.example_weights(weights, batch).astype(dtype)
    if _is(1, temperature):
        temperature = None
    else:
        temperature = jnp.broadcast_to(jnp.asarray(checks.temperature(temperature, batch), dtype), batch)
    if class_weights is not None:
        num_classes = math.prod(full[i] for i in class_axes)
        class_weights = checks.class_weights(class_weights, num_classes).astype(dtype)
    options = Options(
        label_smoothing=not _is(0, label_smoothing),
        z_loss=not _is(0, z_loss),
        logit_softcap=None if logit_softcap is None else float(logit_softcap),
        temperature=temperature is not None,
        reduction=reduction,
        return_aux=return_aux,
        implementation=implementation or "xla",
        axis_name=split_classes,
        batch_axis_name=split_batch,
    )
    shared = Shared(
        class_weights=class_weights,
        label_smoothing=jnp.asarray(label_smoothing, dtype) if options.label_smoothing else None,
        z_loss=jnp.asarray(z_loss, dtype) if options.z_loss else None,
    )
    return Examples(weights=weights, where=where, temperature=temperature), shared, options


def _is(number: int, x: Any) -> bool:
    return isinstance(x, (int, float)) and x == number


def of_terms(options: Options, examples: Examples, shared: Shared) -> tuple[Examples, Shared]:
    """What the terms of rows depend on, which are composed to a loss with the rest."""
    by_class = examples.indices is None
    weighted = by_class or options.label_smoothing
    if options.tail and options.ignore_index is not None and examples.indices is not None:
        # An ignored id may be a class all the same, which is then outside the others.
        ignored = examples.indices == options.ignore_index
        none = jnp.full_like(examples.indices, -1)
        examples = examples._replace(indices=jnp.where(ignored, none, examples.indices))
    return (
        examples._replace(probs=examples.probs if by_class else None, weights=None),
        Shared(shared.class_weights if weighted else None),
    )


def of_nll(options: Options, examples: Examples, shared: Shared) -> tuple[Options, Examples, Shared] | None:
    """The same for the aux record's nll, where probability targets are weighted by class in the loss; else None."""
    if not options.return_aux or examples.indices is not None or shared.class_weights is None:
        return None
    without = options.of_nll
    return without, *of_terms(without, examples, shared._replace(class_weights=None))


def flat(batch: list[int], models: Models, examples: Examples) -> tuple[Models, Examples]:
    """One axis of N tokens in place of the batch axes."""
    n = math.prod(batch)

    def row(x: Array) -> Array:
        return jnp.broadcast_to(x, batch).reshape(n)

    def entries(x: Array) -> Array:
        return x.reshape(n, x.shape[-1])

    def classes(x: Array) -> Array:
        if all(k == 1 for k in x.shape[:-1]):  # a mask that is the same for all
            return x.reshape(1, x.shape[-1])
        return entries(jnp.broadcast_to(x, (*batch, x.shape[-1])))

    flat_models: Models = jax.tree.map(
        lambda x: x._replace(hidden=entries(x.hidden)), models, is_leaf=lambda x: isinstance(x, Projection)
    )
    return flat_models, examples.by_kind(row, entries, classes)
