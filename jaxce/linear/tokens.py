"""The arguments of the linear loss, by what they belong to."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from jaxce.compose import Amounts, Options
from jaxce.linear.vocabulary import Inputs
from jaxce.sharding import AxisNames, on_this_device, vary, varying
from jaxce.targets import Targets


class Tokens(NamedTuple):
    """What belongs to tokens: `hidden [..., D]`, targets, weights, and a mask that broadcasts to `[..., V]`."""

    hidden: Array
    indices: Array | None = None
    probs: Array | None = None
    weights: Array | None = None
    where: Array | None = None


class Shared(NamedTuple):
    """What all tokens share."""

    kernel: Array
    bias: Array | None = None
    class_weights: Array | None = None
    label_smoothing: Array | None = None
    z_loss: Array | None = None


def targets_of(tokens: Tokens) -> Targets:
    return Targets(tokens.indices, tokens.probs)


def amounts_of(tokens: Tokens, shared: Shared) -> Amounts:
    return Amounts(tokens.weights, shared.class_weights, shared.label_smoothing, shared.z_loss)


def row_axes(tokens: Tokens, shared: Shared, axis_name: AxisNames) -> frozenset[str]:
    """The mesh axes along which the numbers of a row differ, once they are merged over those of the classes."""
    every = varying(tokens, shared) - set(axis_name)
    probs = tokens.probs if tokens.indices is not None else None
    return every | varying(tokens.indices, probs, tokens.weights, shared.label_smoothing, shared.z_loss)


def vary_by_kind(tokens: Tokens, shared: Shared, axis_name: AxisNames) -> tuple[Tokens, Shared]:
    """What has a class axis differs along every mesh axis in play, and the rest along those of the rows."""
    rows = row_axes(tokens, shared, axis_name)
    classes = rows | set(axis_name)
    hidden, indices, probs, weights, where = tokens
    return (
        Tokens(
            vary(hidden, rows),
            vary(indices, rows),
            vary(probs, classes if indices is None else rows),
            vary(weights, rows),
            vary(where, classes),
        ),
        Shared(*vary(shared[:3], classes), *vary(shared[3:], rows)),
    )


def inputs_of(tokens: Tokens, shared: Shared, vocab_axis: int, options: Options) -> Inputs:
    dense = tokens.indices is None
    V = shared.kernel.shape[vocab_axis]
    return Inputs(
        tokens.hidden,
        shared.kernel,
        shared.bias,
        None if dense else on_this_device(tokens.indices, V, options.axis_name),
        tokens.probs if dense else None,
        shared.class_weights if dense else None,
        shared.class_weights if options.label_smoothing else None,
        tokens.where,
    )


def without_class_weights(inputs: Inputs, options: Options) -> Inputs | None:
    """The inputs of the aux record's nll, where probability targets are weighted by class in the loss; else None."""
    if not options.return_aux or inputs.target_weights is None:
        return None
    return inputs._replace(target_weights=None, smoothing_weights=None)
