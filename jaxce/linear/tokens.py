"""The arguments of the linear loss, by what they belong to."""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

from jaxce.compose import Amounts, Options
from jaxce.linear.vocabulary import Inputs
from jaxce.stats import Spec
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


def spec_of(options: Options) -> Spec:
    return Spec(options.logit_softcap, options.label_smoothing, options.return_aux)


def inputs_of(tokens: Tokens, shared: Shared, options: Options) -> Inputs:
    dense = tokens.indices is None
    return Inputs(
        tokens.hidden,
        shared.kernel,
        shared.bias,
        tokens.indices,
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
