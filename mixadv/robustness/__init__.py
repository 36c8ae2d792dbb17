"""What adversarial training bought: robustness, calibration, statistics, and what neurons know."""

from mixadv.robustness.ascents import token_norm
from mixadv.robustness.batches import Batch, text_batches
from mixadv.robustness.data import DataError, Rows, read
from mixadv.robustness.evaluate import evaluate
from mixadv.robustness.predictions import (
    Predictions,
    drop,
    expected_calibration_error,
    predict,
)
from mixadv.robustness.report import Report, compare
from mixadv.robustness.statistics import (
    Comparison,
    Estimate,
    bootstrap,
    bootstrap_difference,
    holm,
    paired,
    t_interval,
)
from mixadv.robustness.vicinity import (
    LossIncrease,
    accuracy_at_radii,
    all_correct,
    loss_increase,
)

__all__ = [
    "Batch",
    "Comparison",
    "DataError",
    "Estimate",
    "LossIncrease",
    "Predictions",
    "Report",
    "Rows",
    "accuracy_at_radii",
    "all_correct",
    "bootstrap",
    "bootstrap_difference",
    "compare",
    "drop",
    "evaluate",
    "expected_calibration_error",
    "holm",
    "loss_increase",
    "paired",
    "predict",
    "read",
    "t_interval",
    "text_batches",
    "token_norm",
]
