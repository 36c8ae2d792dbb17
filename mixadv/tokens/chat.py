"""Chats as a causal language model reads them: ids, what is learned, and where δ may act.

Rows are those of preference data (`prompt`, `chosen`, `rejected`), written by the tokenizer's own
chat template. δ belongs on what the user wrote: `where` is 1 at its tokens, and 0 at the
template's, at answers and at padding. One δ can so serve several answers to one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixadv.model.visits import Call
from mixadv.tokens.chat_rows import Answer, Prompt, Row, messages_of, row_of, said
from mixadv.tokens.reading.encoding import check_fast

IGNORED = -100  # the label of a token that is not learned


class ChatBatch(NamedTuple):
    """Chats side by side; every tensor is `[B, n]`.

    Attributes:
        input_ids: of template, prompt and answer, padded.
        attention_mask: 1 at real tokens.
        labels: the ids of the answer with the end of its turn, −100 elsewhere.
        where: True at the tokens of what the user wrote last.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    where: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with; it returns logits."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: Any) -> ChatBatch:
        """Return the batch on a device."""
        return ChatBatch(*(tensor.to(device) for tensor in self))


def chat_batch(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer] | None = None,
    *,
    system: str | None = None,
    complete: bool = True,
    padding_side: str = "right",
) -> ChatBatch:
    """Return prompts, and answers to them, as the tokenizer's chat template writes them.

    Args:
        tokenizer: fast, with a chat template. Without a pad token the end of text stands for it,
            which the mask hides.
        prompts: B, texts or lists of messages.
        answers: as many; None ends each row where the assistant's turn begins.
        system: a system message in front of prompts that are texts.
        complete: end the assistant's turn. False writes answers, which are texts then, as they
            stand: an answer that is to be gone on with, or the target of an attack.
        padding_side: `"left"` is for generation; training on it would shift the positions of models
            that count them from the start of a row (GPT-2, OPT).

    Raises:
        ValueError: without prompts or for one without text; for an answer without text; without a
            chat template, or for one that has no prompt boundary.

    Example:
        >>> from transformers import AutoTokenizer  # doctest: +SKIP
        >>> tokenizer = AutoTokenizer.from_pretrained("runs/smollm2")  # doctest: +SKIP
        >>> batch = chat_batch(tokenizer, ["What is ice?"], ["Frozen water."])  # doctest: +SKIP
        >>> tokenizer.decode(batch.input_ids[batch.where])  # doctest: +SKIP
        'What is ice?'
    """
    check_fast(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template: set tokenizer.chat_template, or use "
            "the tokenizer of an instruction-tuned model."
        )
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}.")
    if isinstance(answers, str):
        raise ValueError(f"answers must be a list of answers, got {answers!r}.")
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts and {len(answers)} answers to them.")
    rows = []
    for number, prompt in enumerate(prompts):
        answer = None if answers is None else said(answers[number], complete, prompt)
        rows.append(row_of(tokenizer, messages_of(prompt, system, number), answer, complete))
    return _padded(tokenizer, rows, padding_side)


def preference_batches(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], **how: Any
) -> tuple[ChatBatch, ChatBatch]:
    """Return the chosen and the rejected answers of rows `prompt`, `chosen`, `rejected`.

    A game whose adversary wants the rejected answer and whose learner the chosen one plays one δ
    on both: their prompts agree token by token. Both batches are padded to one length. Padded on
    the right, as they are by default, one `where` serves both. `how` is that of `chat_batch`.

    Raises:
        ValueError: for a row that lacks a column, and as `chat_batch` does.
    """
    for number, row in enumerate(rows):
        lacking = [name for name in ("prompt", "chosen", "rejected") if name not in row]
        if lacking:
            raise ValueError(f"Row {number} has no {lacking[0]!r}, it has {', '.join(row)}.")
    prompts = [row["prompt"] for row in rows]
    answers = [row[name] for name in ("chosen", "rejected") for row in rows]
    both = chat_batch(tokenizer, [*prompts, *prompts], answers, **how)
    half = len(rows)
    return ChatBatch(*(t[:half] for t in both)), ChatBatch(*(t[half:] for t in both))


def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of each row's answer, in nats a token, `[B]`.

    Args:
        logits: `[B, n, V]`, of which those before a token predict it.
        labels: `[B, n]`, −100 at what is not part of the answer.

    Example:
        >>> labels = torch.tensor([[-100, 1, 2]])
        >>> answer_losses(torch.zeros(1, 3, 4), labels).exp()
        tensor([4.])
    """
    return mean_over_answers(
        logits, labels, lambda wide, ids: F.cross_entropy(wide, ids, reduction="none")
    )


def mean_over_answers(
    logits: Tensor, labels: Tensor, losses_of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the mean of a loss of each row's answer over its tokens, `[B]`.

    Args:
        logits: as for `answer_losses`.
        labels: likewise.
        losses_of: makes of the logits `[T, V]` before T tokens, in fp32 at least, and of these
            tokens `[T]` their losses `[T]`; those of other tokens than answers' are left out.
    """
    targets = labels[:, 1:]
    told = targets != IGNORED
    # A mask in place of an index, whose size the host would have to read.
    before = logits[:, :-1].masked_fill(~told[..., None], 0)  # padding may have no finite ones
    wide = before.to(torch.promote_types(logits.dtype, torch.float32))
    losses = losses_of(wide.flatten(0, 1), targets.clamp(min=0).flatten()).view_as(told)
    return losses.where(told, 0).sum(1) / told.sum(1).clamp(min=1)


class Reader:
    """Calls a model on chats; δ acts at what the user wrote in that which it reads."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.read: ChatBatch | None = None

    def losses(self, of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[ChatBatch], Tensor]:
        """Return a function of chats to a loss for each."""

        def losses(batch: ChatBatch) -> Tensor:
            self.read = batch
            return of(self.model(**batch.inputs).logits, batch.labels)

        return losses

    def where(self, call: Call) -> Tensor:
        """Return where δ may act in the call that runs."""
        assert self.read is not None
        return self.read.where


def _padded(tokenizer: Any, rows: Sequence[Row], side: str) -> ChatBatch:
    if side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {side!r}.")
    length = max(len(row.ids) for row in rows)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def filled(columns: Sequence[Sequence[Any]], value: Any) -> Tensor:
        padded = []
        for column in columns:
            more = [value] * (length - len(column))
            padded.append([*more, *column] if side == "left" else [*column, *more])
        return torch.tensor(padded)

    labels = [[*[IGNORED] * row.prompt, *row.ids[row.prompt :]] for row in rows]
    return ChatBatch(
        filled([row.ids for row in rows], pad),
        filled([[1] * len(row.ids) for row in rows], 0),
        filled(labels, IGNORED),
        filled([row.where for row in rows], False),
    )
