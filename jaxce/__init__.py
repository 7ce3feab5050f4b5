"""Softmax cross-entropy for JAX: exact to the last digits, with every option, fast and memory-lean."""

from jaxce import diagnostics
from jaxce.compose import CrossEntropyAux
from jaxce.linear import linear_cross_entropy, plan_linear_cross_entropy
from jaxce.linear.plan import LinearPlan
from jaxce.linear.tune import tune_linear_cross_entropy
from jaxce.probs import cross_entropy_from_probs
from jaxce.softmax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
from jaxce.targets import SparseTargets

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyAux",
    "LinearPlan",
    "SparseTargets",
    "cross_entropy_from_probs",
    "diagnostics",
    "linear_cross_entropy",
    "plan_linear_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "tune_linear_cross_entropy",
]
