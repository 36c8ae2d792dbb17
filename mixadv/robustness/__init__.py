"""What adversarial training bought: robustness, calibration and statistics."""

try:
    from mixadv.robustness.ascents import token_norm
    from mixadv.robustness.boosting import Boosted, boost
    from mixadv.robustness.data import DataError, Rows, read_rows
    from mixadv.robustness.evaluate import Evaluation, evaluate
    from mixadv.robustness.generation import Judge, Speaker, judged, lacks, says
    from mixadv.robustness.generation_attacks import (
        EmbeddingAttack,
        GenerationAttack,
        NoAttack,
        Prefill,
        Rewrites,
        Suffixes,
    )
    from mixadv.robustness.generators import (
        GenerationEvaluation,
        GenerationReport,
        evaluate_generator,
    )
    from mixadv.robustness.groups import accuracy_by_group
    from mixadv.robustness.images import (
        ImageAccuracy,
        ImageAttack,
        auto_attack,
        image_accuracy,
        pgd_attack,
        torchattack,
    )
    from mixadv.robustness.mixture_accuracy import MixtureAccuracy, MixtureAttacks, mixture_accuracy
    from mixadv.robustness.mixture_response import MixtureResponse, attack_mixture
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
        wilson,
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
    "Boosted",
    "Comparison",
    "DataError",
    "EmbeddingAttack",
    "Estimate",
    "Evaluation",
    "GenerationAttack",
    "GenerationEvaluation",
    "GenerationReport",
    "ImageAccuracy",
    "ImageAttack",
    "Judge",
    "LossIncrease",
    "MixtureAccuracy",
    "MixtureAttacks",
    "MixtureResponse",
    "NoAttack",
    "Predictions",
    "Prefill",
    "Report",
    "Rewrites",
    "Rows",
    "Speaker",
    "Suffixes",
    "accuracy_at_radii",
    "accuracy_by_group",
    "accuracy_drop",
    "all_correct",
    "attack_mixture",
    "auto_attack",
    "boost",
    "bootstrap",
    "bootstrap_difference",
    "compare",
    "evaluate",
    "evaluate_generator",
    "expected_calibration_error",
    "holm",
    "image_accuracy",
    "judged",
    "lacks",
    "loss_increase",
    "mixture_accuracy",
    "paired_t_test",
    "pgd_attack",
    "predict",
    "read_rows",
    "says",
    "t_interval",
    "text_batches",
    "token_norm",
    "torchattack",
    "wilson",
]
