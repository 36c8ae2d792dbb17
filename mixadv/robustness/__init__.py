"""What adversarial training bought: robustness, calibration, statistics, and what neurons know."""

from importlib.util import find_spec

try:
    from mixadv.robustness.activations import Activations, activations
    from mixadv.robustness.ascents import token_norm
    from mixadv.robustness.batches import Batch, text_batches
    from mixadv.robustness.data import DataError, Rows, read
    from mixadv.robustness.evaluate import evaluate
    from mixadv.robustness.neuron_analysis import NeuronAnalysis
    from mixadv.robustness.neurons import analyse_neurons
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

    if find_spec("sklearn") is None:  # imported when a probe is fitted: it takes a second
        raise ModuleNotFoundError("No module named 'sklearn'")
except ImportError as error:
    raise ImportError(
        f"mixadv.robustness needs numpy, scipy, scikit-learn and tqdm ({error}): "
        "pip install 'mixadv[robustness]'."
    ) from error

__all__ = [
    "Activations",
    "Batch",
    "Comparison",
    "DataError",
    "Estimate",
    "LossIncrease",
    "NeuronAnalysis",
    "Predictions",
    "Report",
    "Rows",
    "accuracy_at_radii",
    "activations",
    "all_correct",
    "analyse_neurons",
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
