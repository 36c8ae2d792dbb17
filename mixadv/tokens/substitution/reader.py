"""A classifier that reads texts: losses, predictions, and how much each word matters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixadv.model.masks import batch_is_second
from mixadv.tokens.reading.encoding import Text, batches, check_fast, longest
from mixadv.tokens.reading.words import Words, overlapping


class ReadText(NamedTuple):
    """What a classifier makes of a text."""

    loss: float  # cross-entropy of the label, nats, of fp64 logits
    prediction: int
    importances: dict[int, float]  # of the words that were read: norms of their gradients


class Several(ABC):
    """A classifier that predicts by several."""

    @abstractmethod
    def parts(self) -> Iterator[tuple[float, nn.Module]]:
        """Yield the weight of each part, and the part while it plays."""


@dataclass
class Reader:
    """A classifier and its tokenizer, as a function of texts.

    Where it predicts by several, a word matters by the mean over them of the squared norms of the
    gradients of their own losses.

    Raises:
        TypeError: for a tokenizer that does not tell where its tokens lie, or a model whose
            embeddings are not to be found.
    """

    model: nn.Module  # returns logits [texts, labels], by themselves or as `.logits`
    tokenizer: Any
    max_length: int | None  # tokens; the rest of a text is cut; None asks the model
    batch_size: int
    column: int  # which text of a pair the words are of

    def __post_init__(self) -> None:
        check_fast(self.tokenizer)
        if not isinstance(self.model, Several) and not hasattr(self.model, "get_input_embeddings"):
            raise TypeError(
                f"{type(self.model).__name__} has no get_input_embeddings(): pass the bare model, "
                "not one wrapped for several devices."
            )
        self.max_length = self.max_length or longest(self.model, self.tokenizer)

    def read(
        self, texts: Sequence[Text], labels: Sequence[int], words: Sequence[Words] = ()
    ) -> list[ReadText]:
        """Read texts; words, where they are given, are weighed by one backward pass."""
        found: dict[int, ReadText] = {}
        given = batches(self.model, self.tokenizer, texts, self.max_length, self.batch_size)
        with torch.inference_mode(False), torch.set_grad_enabled(bool(words)):
            for rows, encoding in given:
                wanted = torch.tensor([labels[i] for i in rows])
                logits, norms = self._pass(encoding, wanted, bool(words))
                losses = F.cross_entropy(logits, wanted, reduction="none").tolist()
                weights: list[dict[int, float]] = [{} for _ in rows]
                if words:
                    column = 0 if isinstance(texts[0], str) else self.column
                    weighed = zip(rows, encoding.encodings, norms.tolist(), strict=True)
                    weights = [_by_word(words[i], column, own, norm) for i, own, norm in weighed]
                read = map(ReadText, losses, logits.argmax(-1).tolist(), weights)
                found.update(zip(rows, read, strict=True))
        return [found[i] for i in range(len(texts))]

    def _pass(self, encoding: Any, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Return logits, and squared norms of the loss's gradient to each embedding."""
        if not gradient:
            return _checked(self.model(**encoding), labels), torch.empty(0)
        if not isinstance(self.model, Several):
            return _slopes(self.model, encoding, labels)
        norms: list[Tensor] = []
        for weight, part in self.model.parts():
            norms.append(weight * _slopes(part, encoding, labels)[1])
        return _checked(self.model(**encoding), labels), torch.stack(norms).sum(0)


def _slopes(model: Any, encoding: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits of a model, and squared norms of its loss's gradient to each embedding."""
    leaves: list[Tensor] = []
    read: list[Any] = []

    def leaf(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        read.append(given[0] if given else None)
        return leaves[-1].clone()  # which the model may change in place

    with model.get_input_embeddings().register_forward_hook(leaf):
        logits = _checked(model(**encoding), labels)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    [slope] = torch.autograd.grad(loss, leaves[:1])
    squares = slope.float().square().sum(-1).cpu()
    turned = batch_is_second([encoding], slope, read[0])  # as XLNet's
    return logits.detach(), squares.T if turned else squares


def _checked(output: Any, labels: Tensor) -> Tensor:
    """Return logits in fp64 on the CPU; raise unless labels are numbers of their classes."""
    # In fp32 the loss of a sure prediction is 0, and no change of a word would raise it.
    logits = class_logits(output).cpu().double()
    if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
        raise ValueError(
            f"labels must be numbers from 0 to {logits.shape[1] - 1}, the model's classes; "
            f"got {labels.min()} to {labels.max()}."
        )
    if broken := int(logits.isnan().any(-1).sum()):
        raise ValueError(
            f"The model's logits are NaN for {broken} of {len(logits)} texts, which are of no "
            "class: look at its weights, at its dtype, and at the tokenizer's padding_side."
        )
    return logits


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


def _by_word(words: Words, column: int, encoding: Any, squares: list[float]) -> dict[int, float]:
    """Return the norm of the gradient to the tokens of each word that has any."""
    found: dict[int, float] = {}
    tokens = zip(encoding.offsets, encoding.sequence_ids, squares, strict=True)
    for (begin, end), which, square in tokens:
        for at in overlapping(words.spans, begin, end) if which == column and begin < end else ():
            found[at] = found.get(at, 0.0) + square
    return {at: math.sqrt(square) for at, square in found.items()}
