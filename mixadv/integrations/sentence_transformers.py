"""Adversarial training inside sentence-transformers: its Trainer plays a game.

Its losses return one number and no predictions. What solvers compare are the similarity scores that
the loss is about, computed here from the embeddings that the loss itself asked the model for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

try:
    from sentence_transformers import SentenceTransformerTrainer
    from sentence_transformers.base.losses import column_merging_disabled
    from sentence_transformers.sentence_transformer import losses
except ImportError as error:
    raise ImportError(
        "mixadv.integrations.sentence_transformers needs sentence-transformers: "
        "pip install 'mixadv[sentence-transformers]'."
    ) from error

from mixadv.errors import GameError
from mixadv.integrations.transformers import Adversarial

_CACHED = (
    losses.CachedGISTEmbedLoss,
    losses.CachedMultipleNegativesRankingLoss,
    losses.CachedMultipleNegativesSymmetricRankingLoss,
)


class AdversarialSentenceTransformerTrainer(Adversarial, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` that plays a game; see `Adversarial`.

    Each text of a row has a δ of its own. With in-batch negatives a text is the candidate of other
    rows too: adversaries of all rows raise the loss of the batch together.

    Solvers that compare predictions get those that the loss is about:

    - of a ranking among candidates (`MultipleNegativesRankingLoss` and its symmetric form) the
      scaled scores of each row's first text with all candidates, `[B, candidates]`: the logits that
      its cross entropy reads, so that any divergence is one of distributions over candidates;
    - of other losses the model's own similarity of a row's first text with each other one,
      `[B, texts - 1]`: numbers, for which `divergence="squared_error"` is needed.

    Override `scores` for other predictions. CreAT and CAT compare what `source=` names, such as the
    embeddings. Solvers that weigh rows are refused, for these losses return no loss per row.

    Raises:
        ValueError: for a solver or a loss that cannot be played, and why.

    Example:
        >>> from mixadv.integrations.transformers import Adversarial
        >>> issubclass(AdversarialSentenceTransformerTrainer, Adversarial)
        True
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        who = type(self.solver).__name__
        if self.solver.weighs:
            raise ValueError(
                f"{who} weighs the rows of a batch by their losses, and losses of "
                "sentence-transformers return one for all: write a loop around "
                "optimizer.step(closure) with one loss per row, or choose another solver."
            )
        if self.solver.reads is not None and self.solver.reads.module is None:
            last = [*dict(self.model.named_children())][-1]  # pyright: ignore
            raise ValueError(
                f"{who} reads a representation, which of sentence-transformers is the embedding: "
                f"give source={last!r}, representation=lambda found: found['sentence_embedding']."
            )
        for name, column in {"where": self.where, "groups": self.groups}.items():
            if isinstance(column, str):
                raise ValueError(
                    f"{name}={column!r} names a column, and sentence-transformers takes columns "
                    "for texts: give where= a function of the call."
                )
        for loss in self.loss.values() if isinstance(self.loss, dict) else [self.loss]:
            self._check_loss(loss)
            while isinstance(inner := getattr(loss, "loss", None), nn.Module):
                _check_whole(inner)  # as within MatryoshkaLoss
                loss = inner

    def _check_loss(self, loss: nn.Module) -> None:
        """Raise ValueError for a loss that cannot be played, or not by the solver."""
        who, kind, compares = type(self.solver).__name__, type(loss).__name__, self.solver.compares
        _check_whole(loss)
        numbers = compares is not None and not isinstance(loss, losses.MultipleNegativesRankingLoss)
        if numbers and self.solver.reads_labels:
            raise ValueError(
                f"{who} reads classes, and the scores of {kind} have none: use "
                "MultipleNegativesRankingLoss, or choose another solver."
            )
        if numbers and compares != "squared_error" and not callable(compares):
            raise ValueError(
                f"{who} compares the scores of {kind} by {compares!r}, which takes logits of "
                "classes: choose divergence='squared_error' (payoff= for PGD)."
            )

    def forward_pass(
        self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, outputs: bool
    ) -> tuple[Tensor, Any]:
        """Run one pass; the arguments are those of `Adversarial.forward_pass`."""
        # A call per column, so that row b of each is sample b to what is weighed or compared.
        apart = outputs or self.solver.reads is not None
        with column_merging_disabled() if apart else nullcontext():
            if outputs:
                return self._with_scores(model, inputs, items)
            return super().forward_pass(model, inputs, items, False)

    def _with_scores(
        self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """Run one pass, each column of texts by a call of its own."""
        name, found = inputs.get("dataset_name"), []
        inner = self.accelerator.unwrap_model(model)
        hook = inner.register_forward_hook(
            lambda *called: found.append(called[-1]["sentence_embedding"])
        )
        try:
            loss, _ = super().forward_pass(model, dict(inputs), items, False)
        finally:
            hook.remove()
        columns, _ = self.collect_features(inputs)
        kind: Any = self.loss[name] if isinstance(self.loss, dict) else self.loss
        if len(columns) < 2 or len(found) != len(columns):
            raise GameError(
                f"{type(self.solver).__name__} compares the scores of a row's texts, and "
                f"{type(kind).__name__} embeds {len(found)} times for {len(columns)} texts: "
                "choose a solver that needs the loss alone, such as mixadv.FreeLB()."
            )
        return loss, self.scores(kind, torch.stack(found))

    def scores(self, loss: nn.Module, embeddings: Tensor) -> dict[str, Tensor]:
        """Return the predictions that solvers compare; override for a loss of your own.

        Args:
            loss: of sentence-transformers.
            embeddings: `[texts, B, d]`, of the first text of each row, the second, and so on.

        Returns:
            `logits` `[B, C]`, and `labels` `[B]` where they are logits of classes.
        """
        first, others = embeddings[0], embeddings[1:]
        if isinstance(loss, losses.MultipleNegativesRankingLoss):
            logits = loss.similarity_fct(first, others.flatten(0, 1)) * loss.scale
            return {"logits": logits, "labels": torch.arange(len(first), device=first.device)}
        model: Any = self.accelerator.unwrap_model(self.model)
        return {"logits": torch.stack([model.similarity_pairwise(first, o) for o in others], -1)}


def _check_whole(loss: nn.Module) -> None:
    """Raise ValueError for a loss that embeds its batch in parts, or that of other processes."""
    kind = type(loss).__name__
    if isinstance(loss, _CACHED):
        raise ValueError(
            f"{kind} embeds under no_grad and again in its backward, where the adversary gets "
            f"no gradient: use {kind.removeprefix('Cached')}, with "
            "gradient_checkpointing=True where memory is short."
        )
    if getattr(loss, "gather_across_devices", False):
        raise ValueError(
            "gather_across_devices=True is not tested under a round, whose passes would gather "
            "embeddings each: leave it out, and negatives are those of one process."
        )
