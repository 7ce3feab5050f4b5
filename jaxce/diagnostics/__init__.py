"""What a loss value means: beside guessing, in other units, as accuracy, confidence and calibration."""

from jaxce.diagnostics.chance import accuracy_bound, bits, chance_loss, perplexity, skill
from jaxce.diagnostics.reliability import Calibration, brier, calibration
from jaxce.diagnostics.reporting import Report, finish, report
from jaxce.diagnostics.summary import Summary, merge, summarize
from jaxce.diagnostics.temperature import fit_temperature

__all__ = [
    "Calibration",
    "Report",
    "Summary",
    "accuracy_bound",
    "bits",
    "brier",
    "calibration",
    "chance_loss",
    "finish",
    "fit_temperature",
    "merge",
    "perplexity",
    "report",
    "skill",
    "summarize",
]
