"""One δ under two answers, whether conversations are padded right or left, or packed into a row."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixadv
from mixadv.tokens import answer_losses, preference_batches
from mixadv.tokens.chat import ChatBatch
from tests.chat_zoo import FAMILIES, chatting, speaking

ROWS = [
    {"prompt": "What is a film?", "chosen": "I would rather not.", "rejected": "A story."},
    {"prompt": "Why? Is it good?", "chosen": "No.", "rejected": "It is a very good film, indeed."},
]
TOKENIZER = chatting()


class Packed:
    """The rows of a batch one behind another in one row; `read` gives the loss of each answer."""

    def __init__(self, batch: ChatBatch) -> None:
        real = [mask > 0 for mask in batch.attention_mask]
        self.lengths = [int(own.sum()) for own in real]
        join = lambda values: torch.cat([x[own] for x, own in zip(values, real, strict=True)])[None]  # noqa: E731
        self.ids, self.labels = join(batch.input_ids), join(batch.labels)
        self.where = join(batch.where)
        self.positions = torch.cat([torch.arange(n) for n in self.lengths])[None]

    def read(self, model: nn.Module) -> Tensor:
        logits = model(input_ids=self.ids, position_ids=self.positions, use_cache=False).logits
        each = zip(logits[0].split(self.lengths), self.labels[0].split(self.lengths), strict=True)
        return torch.cat([answer_losses(own[None], labels[None]) for own, labels in each])


class Padded:
    """The rows of a batch as they are."""

    def __init__(self, batch: ChatBatch) -> None:
        self.batch, self.where = batch, batch.where

    def read(self, model: nn.Module) -> Tensor:
        return answer_losses(model(**self.batch.inputs).logits, self.batch.labels)


def after_a_round(family: str, per: Any, kind: Any, **how: Any) -> tuple[Any, list[Tensor]]:
    """Return a game whose δ acted at the prompts of both answers, and the weights after a step."""
    chosen, rejected = (kind(batch) for batch in preference_batches(TOKENIZER, ROWS, **how))
    model = speaking(family, TOKENIZER)
    solver = mixadv.PGD(steps=2, step_size=0.2, radius=0.3, per=per, start="zero")
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.05), model, solver)
    optimizer.step(
        lambda: 0.5 * chosen.read(model).mean() - 0.1 * rejected.read(model).mean(),
        adversary=lambda: -rejected.read(model),
        where={"closure": [chosen.where, rejected.where], "adversary": rejected.where},
    )
    return optimizer.game, list(model.parameters())


@pytest.mark.parametrize("per", ["token", "sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_conversations_play_as_padded_ones(family: str, per: str):
    """Answers differ in length, so a prompt lies elsewhere in the row of chosen and of rejected."""
    game, packed = after_a_round(family, per, Packed)
    _, padded = after_a_round(family, per, Padded)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-8)
    _, rejected = preference_batches(TOKENIZER, ROWS)
    told = Packed(rejected)
    delta = game.strategy.points[0][0, 0]
    assert not delta[told.where[0] == 0].any()
    if per == "sample":
        for text in delta.split(told.lengths):
            assert float(text.norm()) == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "GPT2"])
def test_padding_on_the_left_plays_as_on_the_right(family: str):
    """But for GPT-2, which counts padding among its positions: a warning says so."""
    sides = [
        after_a_round(family, "sample", Padded, padding_side=side) for side in ("left", "right")
    ]
    torch.testing.assert_close(sides[0][1], sides[1][1], rtol=0, atol=1e-7)
