"""Adversarial training of cross-encoders, which read two texts at once, in sentence-transformers.

Their losses return one number. What solvers compare are the scores that the loss asked the model
for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from sentence_transformers import CrossEncoderTrainer
    from sentence_transformers.cross_encoder import losses
except ImportError as error:
    raise ImportError(
        "mixadv.integrations.cross_encoder needs sentence-transformers: "
        "pip install 'mixadv[sentence-transformers]'."
    ) from error

from mixadv.errors import GameError
from mixadv.integrations.scored import Scored

_CLASSES = (losses.CrossEntropyLoss, losses.MultipleNegativesRankingLoss)


class AdversarialCrossEncoderTrainer(Scored, CrossEncoderTrainer):
    """`CrossEncoderTrainer` that plays a game; see `Adversarial`.

    Each pair of texts has a δ of its own, at the tokens of both.

    Solvers that compare predictions get the model's scores, as the loss activates them:

    - of `CrossEntropyLoss` the logits of classes, `[B, C]`;
    - of `MultipleNegativesRankingLoss` the scaled scores of a row's candidates, the right one
      first, `[B, candidates]`: logits too. The negatives drawn are the same in all passes;
    - of `BinaryCrossEntropyLoss` the logit of yes, `[B, 1]`: say `divergence="bernoulli"`;
    - of other losses numbers, `[B, pairs of a row]`: say `divergence="squared_error"`;
    - of losses of lists (`LambdaLoss`, `ListNetLoss`, …) numbers, `[pairs, 1]`, where
      `mini_batch_size=-1` has all pairs of a batch scored in one call.

    Solvers that weigh rows are refused, for these losses return no loss per row.

    Raises:
        ValueError: for a solver or a loss that cannot be played, and why.

    Example:
        >>> from mixadv.integrations.transformers import Adversarial
        >>> issubclass(AdversarialCrossEncoderTrainer, Adversarial)
        True
    """

    returns = "scores"

    def check_loss(self, loss: nn.Module) -> None:
        """Raise ValueError for a loss that cannot be played, or not by the solver."""
        super().check_loss(loss)
        who, kind, compares = type(self.solver).__name__, type(loss).__name__, self.solver.compares
        if self.solver.reads_labels and not isinstance(loss, _CLASSES):
            raise ValueError(
                f"{who} reads classes, and the scores of {kind} have none: use CrossEntropyLoss or "
                "MultipleNegativesRankingLoss, or choose another solver."
            )
        size = getattr(loss, "mini_batch_size", -1)
        reads = compares is not None or self.solver.reads is not None
        if reads and (size is None or size >= 0):
            raise ValueError(
                f"{who} compares the pairs of a batch, and {kind} scores them in parts: give it "
                "mini_batch_size=-1, or choose a solver that needs the loss alone, such as "
                "mixadv.FreeLB()."
            )
        suits = "bernoulli" if isinstance(loss, losses.BinaryCrossEntropyLoss) else "squared_error"
        fits = compares in (None, suits, "squared_error") or callable(compares)
        if not (fits or isinstance(loss, _CLASSES)):
            raise ValueError(
                f"{who} compares the scores of {kind} by {compares!r}, which takes logits of "
                f"classes: choose divergence={suits!r} (payoff= for PGD)."
            )

    def predictions(
        self, loss: nn.Module, inputs: dict[str, Any], found: list[Tensor]
    ) -> dict[str, Any]:
        """Return the scores of each row's pairs, with labels where they are logits of classes."""
        if len({len(scores) for scores in found}) != 1:
            raise GameError(
                f"{type(self.solver).__name__} compares scores row by row, and "
                f"{type(loss).__name__} asks the model for those of {[len(x) for x in found]} "
                "pairs: override predictions, or choose a solver that needs the loss alone, such "
                "as mixadv.FreeLB()."
            )
        activate: Any = getattr(loss, "activation_fn", None) or nn.Identity()
        logits = activate(torch.cat(found, 1))
        if isinstance(loss, losses.MultipleNegativesRankingLoss):
            labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            return {"logits": logits * (loss.scale or 1), "labels": labels}
        if isinstance(loss, losses.CrossEntropyLoss):
            return {"logits": logits, "labels": inputs["label"]}
        return {"logits": logits}
