"""What counts is told by the model within a wrapper, and by what reads it, not from outside."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mixadv

PAD = 1
SMALL = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 16}


class Wrap(nn.Module):
    """A module around a model, that has nothing of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any, **batch: Any) -> Any:
        return self.inner(*inputs, **batch)


class Tagger(nn.Module):
    """A model of one's own, which foretells the next token or tags its own."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.words, self.out = nn.Embedding(30, 8), nn.Linear(8, 30)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        logits = self.out(self.words(input_ids).cumsum(1).tanh())
        read = logits[:, : logits.shape[1] - self.ahead].flatten(0, 1)
        loss = F.cross_entropy(read, labels[:, self.ahead :].flatten())
        return {"loss": loss, "logits": logits}


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = 0
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=30, d_kv=8, pad_token_id=PAD, decoder_start_token_id=0, **SMALL
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> Any:
    sides = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    }
    config = transformers.BartConfig(vocab_size=30, d_model=16, pad_token_id=PAD, **sides)
    return transformers.BartForConditionalGeneration(config).eval()


def padded(labels: int = 6) -> dict[str, Tensor]:
    """Return a batch whose first row is half padding, with labels of real tokens."""
    ids, mask = torch.randint(3, 30, (2, 6)), torch.ones(2, 6).long()
    ids[0, 3:], mask[0, 3:] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, 30, (2, labels))}


def counted(model: nn.Module, batch: dict[str, Tensor]) -> list[list[int]]:
    """Return which predictions count in a clean pass, and compare with those the loss reads."""
    kept: list[Any] = []

    def closure() -> Any:
        kept.append(model(**batch))
        if kept[-1]["logits"].requires_grad:
            kept[-1]["logits"].retain_grad()
        return kept[-1]

    with mixadv.Game(model, mixadv.R3F()).rounds.open(closure) as update:
        (stage,) = update.stages
        mask = stage.clean().mask
    kept[-1]["loss"].backward()
    assert mask is not None
    assert torch.equal(mask > 0, kept[-1]["logits"].grad.ne(0).any(-1))
    return mask.int().tolist()


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (gpt2, 3),
        (lambda: Wrap(gpt2()), 3),
        (lambda: Wrap(Wrap(gpt2())), 3),
        (lambda: Tagger(ahead=1), 3),
        (lambda: Wrap(Tagger(ahead=1)), 3),
        (lambda: Tagger(ahead=0), 4),
    ],
)
def test_predictions_are_those_the_loss_reads_in_a_wrapper_and_in_ones_own(make: Any, first: int):
    """Off by one, the adversary would play the token before, or behind, each that is learnt."""
    torch.manual_seed(0)
    batch = padded()
    batch["attention_mask"][:] = 1
    batch["labels"][:, :4] = -100
    row = [int(first <= i < first + 2) for i in range(6)]
    assert counted(make(), batch) == [row, row]


@pytest.mark.parametrize("make", [t5, bart])
def test_a_wrapped_decoder_is_not_padded_as_its_encoder_is(make: Any):
    torch.manual_seed(0)
    batch = padded()
    batch["labels"][1, 4:] = -100
    assert counted(Wrap(make()), batch) == [[1] * 6, [1] * 4 + [0] * 2]


def test_an_encoder_alone_in_a_wrapper_is_no_decoder():
    class Tag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.out = bart().get_encoder(), nn.Linear(16, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            read = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
            return self.out(read.last_hidden_state)

    torch.manual_seed(0)
    model, batch = Tag(), padded()
    labels = batch.pop("labels") % 3

    def closure() -> Any:
        logits = model(**batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    with mixadv.Game(model, mixadv.R3F()).rounds.open(closure) as update:
        mask = update.stages[0].clean().mask
    assert mask is not None
    assert torch.equal(mask > 0, batch["attention_mask"] > 0)


def test_places_of_images_are_left_alone_in_a_wrapper():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(30, 8), nn.Linear(8, 3)
            self.config = SimpleNamespace(image_token_id=7)

        def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
            image = (ids == 7)[..., None]
            return self.out(torch.where(image, pixels[:, None], self.words(ids)).tanh().mean(1))

    ids, pixels = torch.tensor([[7, 7, 3, 4], [7, 7, 5, 6]]), torch.randn(2, 8)
    model = Wrap(Reader())
    game = mixadv.Game(model, mixadv.UniformNoise())
    game.backward(lambda: F.cross_entropy(model(ids, pixels), torch.arange(2)))
    assert torch.equal(game.strategy.points[0][0].any(-1), ids != 7)


# Sites behind an encoder, and in a second tower --------------------------------------------------


@pytest.mark.parametrize("length", [6, 7])
@pytest.mark.parametrize(
    ("make", "site"),
    [
        (t5, "decoder.embed_tokens"),
        (t5, "decoder.block.0"),
        (bart, "model.decoder.embed_tokens"),
        (bart, "model.decoder.layers.0.fc1"),
    ],
)
def test_a_site_in_a_decoder_is_not_padded_as_the_encoder_is(make: Any, site: str, length: int):
    """Whether it was, would depend on a coincidence of lengths."""
    torch.manual_seed(0)
    model, batch = make(), padded(labels=length)
    game = mixadv.Game(model, mixadv.UniformNoise(), site=site)
    game.backward(lambda: model(**batch))
    assert game.strategy.points[0].any(-1).all()


def test_a_decoder_keeps_a_mask_of_its_own_in_all_its_layers():
    model, batch = t5(), padded()
    mask = torch.ones(2, 6).long()
    mask[1, 4:] = 0
    game = mixadv.Game(model, mixadv.UniformNoise(), site="decoder.block.0.layer.2")
    game.backward(lambda: model(**batch, decoder_attention_mask=mask))
    assert torch.equal(game.strategy.points[0][0].any(-1), mask > 0)


class Towers(nn.Module):
    """Two texts, of which the first alone comes with a mask, at the outermost module."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.document = (self.tower() for _ in range(2))
        self.out = nn.Linear(16, 2)

    @staticmethod
    def tower() -> nn.Module:
        class Tower(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words = nn.Embedding(30, 8)

            def forward(self, input_ids: Tensor) -> Tensor:
                return self.words(input_ids).mean(1)

        return Tower()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, documents: Tensor) -> Tensor:
        dropped = input_ids.clone()
        dropped[:, 0] = 0  # some of the words, as of a model that masks them
        return self.out(torch.cat([self.query(dropped), self.document(documents)], 1))


@pytest.mark.parametrize("length", [6, 7])
def test_a_second_tower_is_not_padded_as_the_first_is(length: int):
    torch.manual_seed(0)
    batch, model = padded(), Towers()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    documents = torch.randint(3, 30, (2, length))
    game = mixadv.Game(model, mixadv.UniformNoise(), site=["query.words", "document.words"])
    game.backward(lambda: F.cross_entropy(model(ids, mask, documents), torch.arange(2)))
    query, document = game.strategy.points
    assert torch.equal(query[0].any(-1), mask > 0)
    assert document[0].any(-1).all()
