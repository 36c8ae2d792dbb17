"""The representation that a solver reads from a pass, and what reading leaves behind: nothing."""

import contextlib
import weakref

import pytest
import torch
from torch import Tensor, nn

import mixadv
from mixadv.model.representation import first_token
from tests.worlds import breaking, classified, gradients
from tests.zoo import TRANSFORMERS, WAYS, assert_same, fingerprint, play, player, small, wrapped

ENCODER_DECODER = ("t5", "bart")
READERS = {"creat": mixadv.CreAT, "cat": mixadv.CAT}
each_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


def representation(game: mixadv.Game, closure) -> Tensor:
    with game.rounds.open(closure) as update:
        (stage,) = update.stages
        return stage.clean().representation


# What is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_by_default_it_is_the_first_token_of_the_encoders_last_hidden_state(family):
    one = player(family, rows=4)
    one.model.eval()
    found = representation(mixadv.Game(one.model, mixadv.CreAT()), one.closure())
    kind = "encoder_hidden_states" if family in ENCODER_DECODER else "hidden_states"
    states = one.model(**one.batch, output_hidden_states=True)[kind]
    assert_same(found, states[-1][:, 0])


@pytest.mark.parametrize("layer", [0, 1])
def test_another_module_is_read_by_name(layer):
    one = player("bert", rows=4)
    one.model.eval()
    solver = mixadv.CreAT(
        source=f"bert.encoder.layer.{layer}", representation=lambda out: out[..., 1:3, :].mean(1)
    )
    found = representation(mixadv.Game(one.model, solver), one.closure())
    states = one.model(**one.batch, output_hidden_states=True).hidden_states
    assert_same(found, states[layer + 1][:, 1:3].mean(1))


def test_an_output_without_tokens_is_read_as_it_is():
    one = player("bert", rows=4)
    one.model.eval()
    solver = mixadv.CAT(source="bert.pooler")
    found = representation(mixadv.Game(one.model, solver), one.closure())
    hidden = one.model.bert(**{k: v for k, v in one.batch.items() if k != "labels"})
    assert_same(found, hidden.pooler_output)


def test_a_model_of_ones_own_is_read_at_its_output():
    one = small()
    one.model.eval()
    found = representation(mixadv.Game(one.model, mixadv.CreAT()), one.closure())
    assert_same(found, one.model(one.batch["ids"]))


@pytest.mark.parametrize("wrap", [tuple, list, lambda out: out[0]], ids=["tuple", "list", "tensor"])
def test_the_first_token_of_what_layers_return(wrap):
    hidden = torch.randn(2, 5, 3)
    assert_same(first_token(wrap([hidden, None])), hidden[:, 0])


@each_reader
def test_it_is_differentiated_and_sees_the_adversary(reader):
    one = small()
    seen = []

    def note(out: Tensor) -> Tensor:
        seen.append(out)
        return out

    optimizer = wrapped(one.model, reader(source="hidden", representation=note))
    optimizer.step(one.closure())
    clean, perturbed = seen[-2:]
    assert perturbed.requires_grad
    assert not torch.equal(perturbed, clean)


# What is refused ----------------------------------------------------------------------------------


@each_reader
def test_a_name_that_the_model_does_not_have_is_refused_with_the_nearest(reader):
    one = player("bert", rows=2)
    with pytest.raises(ValueError, match=r"no module 'bert\.poler'.*'bert\.pooler'"):
        mixadv.Game(one.model, reader(source="bert.poler"))


@each_reader
@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"source": 3}, "source must be a submodule's name, got 3"),
        ({"representation": "mean"}, "representation must be callable, got 'mean'"),
    ],
)
def test_words_that_are_no_source_are_refused_at_once(reader, words, error):
    with pytest.raises(TypeError, match=f"{reader.__name__}: {error}"):
        reader(**words)


SHAPES = {
    "a tensor per token": (lambda out: out.last_hidden_state, r"\[4, 9, 16\]"),
    "one number per sample": (lambda out: out.last_hidden_state[:, 0, 0], r"\[4\]"),
    "numbers of a class": (lambda out: out.last_hidden_state[:, 0].long(), r"\[4, 16\]"),
    "no tensor": (lambda out: "hidden", "str"),
    "all of it": (lambda out: out, "Output"),
}


@each_reader
@pytest.mark.parametrize(("read", "what"), SHAPES.values(), ids=SHAPES)
def test_what_is_no_representation_is_refused_in_the_first_round(reader, read, what):
    one = player("bert", rows=4)
    game = mixadv.Game(one.model, reader(representation=read))
    with pytest.raises(mixadv.GameError, match=rf"'bert' must be \[B, d\].*got .*{what}"):
        game.backward(one.closure())


@each_reader
def test_a_module_that_is_not_called_is_refused(reader):
    one = small()
    game = mixadv.Game(one.model, reader(source="unused"))
    with pytest.raises(mixadv.GameError, match=r"'unused'.*was not called.*source="):
        game.backward(one.closure())


@each_reader
def test_a_representation_that_the_adversary_cannot_move_is_refused(reader):
    """It lies before the site."""
    one = player("bert", rows=4)
    solver = reader(source="bert.embeddings.word_embeddings")
    game = mixadv.Game(one.model, solver, site="bert.encoder.layer.0")
    with pytest.raises(mixadv.GameError, match="does not depend on δ"):
        game.backward(one.closure())


# What is left behind ------------------------------------------------------------------------------


@each_reader
@pytest.mark.parametrize("way", WAYS)
def test_no_hook_outlives_a_round(reader, way):
    one = player("bert", rows=4)
    hooks = fingerprint(one.model)["hooks"]
    optimizer = wrapped(one.model, reader())
    for _ in range(2):
        play(optimizer, one.closure(), way)
        assert fingerprint(one.model)["hooks"] == hooks


@each_reader
@pytest.mark.parametrize("broken", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_broken_round_leaves_neither_hook_nor_graph(reader, way, broken):
    """Broken in its n-th pass, after the representation has been read."""
    one, kept = player("bert", rows=4), []

    def note(out):
        kept.append(weakref.ref(out.last_hidden_state))
        return first_token(out)

    hooks = fingerprint(one.model)["hooks"]
    optimizer = wrapped(one.model, reader(representation=note))
    with contextlib.suppress(MemoryError):
        play(optimizer, breaking(one.closure(), broken), way)
        pytest.fail("the round was not broken")
    assert fingerprint(one.model)["hooks"] == hooks
    assert all(ref() is None for ref in kept)
    play(optimizer, one.closure(), way)  # and the next round plays


@each_reader
def test_evaluation_reads_nothing(reader):
    one, reads = player("bert", rows=4), []

    def note(out):
        reads.append(1)
        return first_token(out)

    game = mixadv.Game(one.model, reader(representation=note))
    game.backward(one.closure())
    read = len(reads)
    one.model.eval()
    with torch.no_grad():
        one.closure()()
        game.loss(one.closure())
    assert len(reads) == read


@each_reader
def test_a_compiled_model_is_read_alike_and_evaluation_reads_nothing(reader):
    torch._dynamo.reset()
    reads, found = [], []

    def note(out: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            reads.append(1)
        return out

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(12, 6), nn.Linear(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.hidden(self.embedding(ids).mean(1))))

    torch.manual_seed(0)
    plain, ids, labels = Text(), torch.randint(0, 12, (4, 5)), torch.tensor([0, 1, 2, 0])
    for model in (plain, torch.compile(plain, backend="eager")):
        words = {"source": "hidden", "representation": note}
        words |= {} if reader is mixadv.CAT else {"start": "zero"}  # where CAT starts anyway
        game = mixadv.Game(model, reader(**words))
        game.backward(classified(model, ids, labels=labels))
        found.append(gradients(plain))
        count = len(reads)
        with torch.no_grad():
            model(ids)
        assert len(reads) == count
        game.close()
    assert not plain.hidden._forward_hooks
    torch.testing.assert_close(*found)
