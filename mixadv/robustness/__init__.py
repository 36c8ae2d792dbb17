"""What adversarial training bought: robustness, calibration and statistics."""

try:
    from mixadv.robustness.ascents import token_norm
    from mixadv.robustness.data import DataError, Rows, read_rows
    from mixadv.robustness.evaluate import Evaluation, evaluate
    from mixadv.robustness.mixture_accuracy import MixtureAccuracy, MixtureAttacks, mixture_accuracy
    from mixadv.robustness.predictions import (
        Batch,
        Predictions,
        accuracy_drop,
        expected_calibration_error,
        predict,
        text_batches,
    )
    from mixadv.robustness.report import Report, compare
    from mixadv.robustness.statistics import (
        Comparison,
        Estimate,
        bootstrap,
        bootstrap_difference,
        holm,
        paired_t_test,
        t_interval,
    )
    from mixadv.robustness.vicinity import (
        LossIncrease,
        accuracy_at_radii,
        all_correct,
        loss_increase,
    )
except ImportError as error:
    raise ImportError(
        f"mixadv.robustness needs numpy, scipy and tqdm ({error}): "
        "pip install 'mixadv[robustness]'."
    ) from error

__all__ = [
    "Batch",
    "Comparison",
    "DataError",
    "Estimate",
    "Evaluation",
    "LossIncrease",
    "MixtureAccuracy",
    "MixtureAttacks",
    "Predictions",
    "Report",
    "Rows",
    "accuracy_at_radii",
    "accuracy_drop",
    "all_correct",
    "bootstrap",
    "bootstrap_difference",
    "compare",
    "evaluate",
    "expected_calibration_error",
    "holm",
    "loss_increase",
    "mixture_accuracy",
    "paired_t_test",
    "predict",
    "read_rows",
    "t_interval",
    "text_batches",
    "token_norm",
]
