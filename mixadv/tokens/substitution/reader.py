"""A classifier that reads texts: losses, predictions, and how much each word matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixadv.tokens.reading.encoding import Text, batches, check_fast, longest
from mixadv.tokens.reading.words import Words, overlapping


class ReadTexts(NamedTuple):
    """What a classifier makes of texts.

    Attributes:
        losses: cross-entropy of each text's label, nats, [texts], fp64 on the CPU.
        predictions: label numbers, [texts].
        importances: of each text, the words that were read and the norms of their gradients.
    """

    losses: Tensor
    predictions: Tensor
    importances: list[dict[int, float]]


class Reader:
    """A classifier and its tokenizer, as a function of texts.

    Args:
        model: returns logits [texts, labels], by themselves or as `.logits`; with
            `get_input_embeddings()`.
        tokenizer: of the model, a fast one.
        max_length: tokens; the rest of a text is cut. `None` asks the model.
        batch_size: texts that the model reads at a time.
        column: which text of a pair the words are of.

    Raises:
        TypeError: for a tokenizer that does not tell where its tokens lie, or a model whose
            embeddings are not to be found.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, max_length: int | None, batch_size: int, column: int
    ) -> None:
        check_fast(tokenizer)
        if not hasattr(model, "get_input_embeddings"):
            raise TypeError(
                f"{type(model).__name__} has no get_input_embeddings(): pass the bare model, not "
                "one wrapped for several devices."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length or longest(model, tokenizer)
        self.batch_size = batch_size
        self.column = column

    def read(self, texts: Sequence[Text], labels: Sequence[int]) -> ReadTexts:
        """Read texts without gradients; `importances` is empty."""
        with torch.no_grad():
            return self._in_batches(texts, labels, [])

    def weigh(self, texts: Sequence[Text], labels: Sequence[int], words: list[Words]) -> ReadTexts:
        """Read texts with one backward pass to their embeddings, which weighs their words."""
        with torch.inference_mode(False), torch.enable_grad():
            return self._in_batches(texts, labels, words)

    def _in_batches(
        self, texts: Sequence[Text], labels: Sequence[int], words: list[Words]
    ) -> ReadTexts:
        losses = torch.zeros(len(texts), dtype=torch.double)
        predictions = torch.zeros(len(texts), dtype=torch.long)
        importances: list[dict[int, float]] = [{} for _ in texts]
        weighed, limits = bool(words), (self.max_length, self.batch_size)
        more = {"return_offsets_mapping": weighed}
        for rows, encoding in batches(self.model, self.tokenizer, texts, *limits, **more):
            offsets = encoding.pop("offset_mapping", None)
            wanted = torch.tensor([labels[i] for i in rows])
            logits, norms = self._pass(encoding, wanted, weighed)
            losses[rows] = F.cross_entropy(logits, wanted, reduction="none")
            predictions[rows] = logits.argmax(-1)
            for at, i in enumerate(rows if weighed else ()):
                column = 0 if isinstance(texts[i], str) else self.column
                own = [number == column for number in encoding.sequence_ids(at)]
                importances[i] = _by_word(words[i], offsets[at].tolist(), norms[at], own)
        return ReadTexts(losses, predictions, importances)

    def _pass(self, encoding: Any, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Return logits, and squared norms of the loss's gradient to each embedding."""
        leaves: list[Tensor] = []

        def leaf(module: nn.Module, given: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        embeddings: Any = self.model.get_input_embeddings
        with embeddings().register_forward_hook(leaf) if gradient else nullcontext():
            output = self.model(**encoding)
        # In fp32 the loss of a sure prediction is 0, and no change of a word would raise it.
        logits = class_logits(output).cpu().double()
        if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
            raise ValueError(
                f"labels must be numbers from 0 to {logits.shape[1] - 1}, the model's classes; "
                f"got {labels.min()} to {labels.max()}."
            )
        if not gradient:
            return logits, torch.empty(0)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        [slope] = torch.autograd.grad(loss, leaves[:1])
        return logits.detach(), slope.float().square().sum(-1).cpu()


def class_logits(output: Any) -> Tensor:
    """Return the logits of a model's output; raise unless they are of classes."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            "The model must return logits [texts, labels] of at least two labels, got "
            f"{found}: an attack changes a predicted class."
        )
    return logits


def _by_word(
    words: Words, offsets: list[list[int]], norms: Tensor, own: list[bool]
) -> dict[int, float]:
    """Return the norm of the gradient to the tokens of each word that has any."""
    squares: dict[int, float] = {}
    for (begin, end), square, is_own in zip(offsets, norms.tolist(), own, strict=True):
        for at in overlapping(words.spans, begin, end) if is_own and begin < end else ():
            squares[at] = squares.get(at, 0.0) + square
    return {at: math.sqrt(square) for at, square in squares.items()}
