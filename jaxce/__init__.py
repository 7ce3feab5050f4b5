"""Softmax cross-entropy for JAX: exact to the last digits, with every option, fast and memory-lean."""

import typing as _typing

from jaxce.compose import CrossEntropyAux
from jaxce.distillation import distillation_loss
from jaxce.linear import linear_cross_entropy, plan_linear_cross_entropy
from jaxce.linear.distillation import linear_distillation_loss
from jaxce.linear.log_probabilities import linear_log_probs
from jaxce.linear.plan import LinearPlan
from jaxce.linear.tune import tune_linear_cross_entropy
from jaxce.log_probabilities import LogProbsAux, log_probs
from jaxce.probs import cross_entropy_from_probs
from jaxce.softmax import softmax_cross_entropy, softmax_cross_entropy_with_integer_labels
from jaxce.targets import SparseTargets

if _typing.TYPE_CHECKING:
    from jaxce import diagnostics as diagnostics
else:

    def __getattr__(name: str) -> object:
        if name != "diagnostics":  # of which most programs have no use, so it is imported when it is asked for
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import jaxce.diagnostics as diagnostics

        return diagnostics

    def __dir__() -> list[str]:
        return sorted({*globals(), "diagnostics"})


__version__ = "0.1.0"

__all__ = [
    "CrossEntropyAux",
    "LinearPlan",
    "LogProbsAux",
    "SparseTargets",
    "cross_entropy_from_probs",
    "diagnostics",
    "distillation_loss",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_log_probs",
    "log_probs",
    "plan_linear_cross_entropy",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "tune_linear_cross_entropy",
]
