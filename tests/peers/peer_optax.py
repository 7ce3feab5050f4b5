"""optax's tests of its softmax losses, and of what it builds on them."""

import functools

import optax
from optax.losses import _classification

import jaxce

_DENSE = "SoftmaxCrossEntropyTest"
_CASES = (_DENSE, "SafeSoftmaxCrossEntropyTest", "SoftmaxCrossEntropyWithIntegerLabelsTest")


def install(implementation=None):
    dense = functools.partial(jaxce.softmax_cross_entropy, implementation=implementation)
    integer = jaxce.softmax_cross_entropy_with_integer_labels
    if implementation:

        def integer(logits, labels, axis=-1, where=None):
            return dense(logits, labels, axis, where)

    for module in (optax, optax.losses, _classification):
        module.softmax_cross_entropy = dense
        module.safe_softmax_cross_entropy = dense
        module.softmax_cross_entropy_with_integer_labels = integer


def selected(implementation=None):
    return [
        "--pyargs",
        *(f"optax.losses._classification_test::{case}" for case in (*_CASES, "PolyLossTest")),
        "optax.losses._fenchel_young_test",
        *(f"optax._src.alias_test::LBFGSTest::test_multiclass_logreg{i}" for i in (0, 1)),
    ]


def differences(implementation=None):
    masked = "inf location mismatch", "a probability on a class that `where` takes out costs +inf; optax leaves it out"
    found = {f"_classification_test.{case}.test_mask{i}": masked for case in (_DENSE, "PolyLossTest") for i in (0, 1)}
    if implementation != "autodiff":
        forward = "expected 'autodiff' for forward mode", 'checks forward mode too: implementation="autodiff" has it'
        found |= {f"_classification_test.{case}.test_gradient": forward for case in _CASES}
    return found
