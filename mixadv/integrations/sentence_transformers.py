"""Adversarial training inside sentence-transformers: its Trainers of embeddings play a game.

Its losses return one number and no predictions. What solvers compare are the scores that the loss
is about, computed here from what the loss itself asked the model for.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from sentence_transformers import SentenceTransformerTrainer, SparseEncoderTrainer
    from sentence_transformers.sentence_transformer import losses
except ImportError as error:
    raise ImportError(
        "mixadv.integrations.sentence_transformers needs sentence-transformers: "
        "pip install 'mixadv[sentence-transformers]'."
    ) from error

from mixadv.errors import GameError
from mixadv.integrations.scored import Scored, nested
from mixadv.maths.divergence import never

_RANKING, _CLASSES = losses.MultipleNegativesRankingLoss, losses.SoftmaxLoss
_OTHERWISE = (
    losses.ContrastiveTensionLoss,
    losses.ContrastiveTensionLossInBatchNegatives,
    losses.DenoisingAutoEncoderLoss,
)
"""Losses that are not about embeddings of the model alone."""


class OfEmbeddings(Scored):
    """Scores from embeddings, of one text or of several texts a row."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if self.solver.reads is not None and self.solver.reads.module is None:
            last = [*dict(self.model.named_children())][-1]  # pyright: ignore
            raise ValueError(
                f"{type(self.solver).__name__} reads a representation, which of "
                f"sentence-transformers is the embedding: give source={last!r}, "
                "representation=lambda found: found['sentence_embedding']."
            )

    def check_loss(self, loss: nn.Module) -> None:
        """Raise ValueError for a loss that cannot be played, or not by the solver."""
        who, kind, compares = type(self.solver).__name__, type(loss).__name__, self.solver.compares
        inner = nested(loss)[-1]
        if compares is not None and isinstance(inner, _OTHERWISE):
            raise ValueError(
                f"{who} compares scores, and {kind} does not compute its loss from embeddings of "
                "the model alone: choose a solver that needs the loss alone, such as "
                "mixadv.FreeLB()."
            )
        super().check_loss(loss)
        many = isinstance(loss, (losses.MatryoshkaLoss, losses.AdaptiveLayerLoss))
        if many and self.args.torch_compile:
            raise ValueError(
                f"{kind} replaces the model's forward in each pass, where compiled code does not "
                "take δ: leave torch_compile out."
            )
        if many and self.solver.reads_labels:
            raise ValueError(
                f"{who} reads one class for each row, and {kind} has one for each dimension or "
                "layer too: use the loss within by itself, or choose another solver."
            )
        kind = type(inner).__name__
        if self.solver.reads_labels and not isinstance(inner, (_RANKING, _CLASSES)):
            raise ValueError(
                f"{who} reads classes, and the scores of {kind} have none: use "
                "MultipleNegativesRankingLoss or SoftmaxLoss, or choose another solver."
            )
        logits = isinstance(inner, (_RANKING, _CLASSES, losses.DistillKLDivLoss))
        if not (logits or compares in (None, "squared_error") or callable(compares)):
            raise ValueError(
                f"{who} compares the scores of {kind} by {compares!r}, which takes logits of "
                "classes: choose divergence='squared_error' (payoff= for PGD)."
            )

    def collect_features(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Return the texts and labels of a batch; the model writes into the texts themselves.

        `AdaptiveLayerLoss` reads there what an earlier call wrote. Of plain dictionaries the model
        is given copies.
        """
        columns, labels = super().collect_features(inputs)  # pyright: ignore
        return [OrderedDict(column) for column in columns], labels

    def predictions(
        self, loss: nn.Module, inputs: dict[str, Any], found: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return the scores; of a loss that is computed several times they are several heads."""
        texts, labels = self.collect_features(inputs)
        if not found or len(found) % len(texts):
            raise GameError(
                f"{type(self.solver).__name__} compares the scores of a row's texts, and "
                f"{type(loss).__name__} embeds {len(found)} times for {len(texts)} texts: "
                "override predictions, or choose a solver that needs the loss alone, such as "
                "mixadv.FreeLB()."
            )
        inner, size = nested(loss)[-1], len(texts)
        heads = [
            self.scores(inner, torch.stack(found[i : i + size])) for i in range(0, len(found), size)
        ]
        if len(heads) > 1:
            return {f"{i}_logits": head["logits"] for i, head in enumerate(heads)}
        return {"labels": labels, **heads[0]} if isinstance(inner, _CLASSES) else heads[0]

    def scores(self, loss: nn.Module, embeddings: Tensor) -> dict[str, Tensor]:
        """Return the predictions that solvers compare; override for a loss of your own.

        Args:
            loss: of sentence-transformers, the innermost of such as hold another.
            embeddings: `[texts, B, d]`, of the first text of each row, the second, and so on.

        Returns:
            `logits` `[B, C]`, and `labels` `[B]` where they are logits of classes.
        """
        first, others = embeddings[0], embeddings[1:]
        if isinstance(loss, _RANKING):
            logits = loss.similarity_fct(first, others.flatten(0, 1)) * loss.scale
            if logits.shape[1] == 1:  # one row alone: its text is sure, as the loss is 0
                logits = F.pad(logits, (0, 1), value=never(logits.dtype))
            return {"logits": logits, "labels": torch.arange(len(first), device=first.device)}
        if isinstance(loss, _CLASSES):
            return {"logits": _classified(loss, *embeddings)}
        if isinstance(loss, losses.EmbedDistillLoss) or not len(others):
            return {"logits": embeddings.transpose(0, 1).flatten(1)}
        if isinstance(loss, losses.DistillKLDivLoss):
            of, scale = loss.similarity_fct, 1 / loss.student_temperature
        else:
            model: Any = self.accelerator.unwrap_model(self.model)
            of, scale = model.similarity_pairwise, 1
        return {"logits": torch.stack([of(first, o) for o in others], -1) * scale}


class AdversarialSentenceTransformerTrainer(OfEmbeddings, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` that plays a game; see `Adversarial`.

    Each text of a row has a δ of its own. With in-batch negatives a text is the candidate of other
    rows too: adversaries of all rows raise the loss of the batch together. A last batch of one row
    has no candidates beside its own: loss and divergences are 0, as without a game.

    Solvers that compare predictions get those that the loss is about:

    - of a ranking among candidates (`MultipleNegativesRankingLoss` and its symmetric form) the
      scaled scores of each row's first text with all candidates, `[B, candidates]`: the logits that
      its cross entropy reads, so that any divergence is one of distributions over candidates.
      Scores of its other `directions` and its `hardness_mode` are left out;
    - of `SoftmaxLoss` the logits of its classes, of `DistillKLDivLoss` those of its candidates;
    - of `MSELoss` and `EmbedDistillLoss`, and where a row has one text, the embeddings,
      `[B, texts · d]`: numbers, for which `divergence="squared_error"` is needed;
    - of other losses the model's own similarity of a row's first text with each other one,
      `[B, texts - 1]`: numbers too;
    - of `MatryoshkaLoss` and `AdaptiveLayerLoss` those of the loss within, at each dimension or
      layer of the step. Their divergences are added up, as the losses are, each with weight 1.

    Override `scores` for other predictions. CreAT and CAT compare what `source=` names, such as the
    embeddings. Solvers that weigh rows are refused, for these losses return no loss per row.

    Raises:
        ValueError: for a solver or a loss that cannot be played, and why.

    Example:
        >>> from mixadv.integrations.transformers import Adversarial
        >>> issubclass(AdversarialSentenceTransformerTrainer, Adversarial)
        True
    """


class AdversarialSparseEncoderTrainer(OfEmbeddings, SparseEncoderTrainer):
    """`SparseEncoderTrainer` that plays a game; see `AdversarialSentenceTransformerTrainer`.

    `SpladeLoss` and `CSRLoss` are about the scores of the loss within. What they add to it, such as
    their regularizer, the adversary climbs too.

    Example:
        >>> AdversarialSparseEncoderTrainer.scores is AdversarialSentenceTransformerTrainer.scores
        True
    """


def _classified(loss: losses.SoftmaxLoss, first: Tensor, second: Tensor) -> Tensor:
    """Return the logits of its classes, `[B, C]`."""
    parts = [first, second] if loss.concatenation_sent_rep else []
    parts += [(first - second).abs()] if loss.concatenation_sent_difference else []
    parts += [first * second] if loss.concatenation_sent_multiplication else []
    return loss.classifier(torch.cat(parts, 1).to(loss.classifier.weight.dtype))
