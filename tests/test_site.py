"""Where δ acts: the module that is found, the tokens that are real, the length of one unit."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import mixadv
from mixadv.model import walk
from tests.zoo import (
    PAD,
    TRANSFORMERS,
    VOCABULARY,
    Player,
    assert_same,
    hooks,
    or_refused,
    player,
    stepwise,
    text_batch,
    without_dropout,
    wrapped,
)

PLAY = mixadv.PGD(steps=1)


def game_of(p: Player, site: Any = None, solver: mixadv.Solver = PLAY) -> mixadv.Game:
    return mixadv.Game(p.model, solver, site=site)


def assert_real_tokens_only(points: Tensor, mask: Tensor) -> None:
    """Points `[1, B, n, D]` are zero at padding, and at no real token."""
    lengths = points[0].norm(dim=-1)
    assert torch.equal(lengths > 0, mask > 0)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_listings_of_a_model_are_those_of_torch(name: str):
    """Of weights and modules that have several names, too."""
    model = player(name).model
    model.again, model.nested = model.get_input_embeddings(), nn.ModuleList([model.base_model])
    assert walk.modules(model) == [*model.modules()]
    assert_same(walk.parameters(walk.modules(model)), [*model.parameters()])
    assert walk.names(model) == {id(p): name for name, p in model.named_parameters()}
    inner = [model.get_input_embeddings()]
    holding = [m for m in model.modules() if m not in inner and {*inner} & {*m.modules()}]
    assert walk.around(model, inner) == holding


class Bag(nn.Module):
    """A model of one's own: named embeddings, a mean, a head."""

    def __init__(self, *embeddings: str, padding: int | None = None) -> None:
        super().__init__()
        for name in embeddings:
            self.add_module(name, nn.Embedding(VOCABULARY, 6, padding_idx=padding))
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(sum(m(ids).mean(1) for m in self.children() if m is not self.head))


def classify(model: nn.Module, *inputs: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    labels = torch.arange(len(inputs[0])) % 3
    return lambda: (F.cross_entropy(logits := model(*inputs), labels), logits)


# Finding the module ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*TRANSFORMERS, "llama-causal"])
def test_the_site_is_the_embedding_that_the_encoder_reads_its_ids_with(family: str) -> None:
    p = player(family, rows=4)
    readers = []

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if args[0].shape == p.batch["input_ids"].shape and (args[0] == p.batch["input_ids"]).all():
            readers.append(module)

    tables = [m for m in p.model.modules() if isinstance(m, nn.Embedding)]
    handles = [m.register_forward_hook(note) for m in tables]
    p.closure()()
    for handle in handles:
        handle.remove()
    assert [module for _, module in game_of(p).site.targets] == readers
    assert len(readers) == 1


def test_models_of_images_and_tables_are_perturbed_at_their_input() -> None:
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**size))
    table = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    images, rows = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    see = lambda: vit(pixel_values=images, labels=torch.arange(4) % 3)  # noqa: E731
    for model, inputs, closure in ((vit, images, see), (table, rows, classify(table, rows))):
        game = mixadv.Game(model, PLAY)
        game.backward(closure)
        assert game.site.names == ["input"]
        assert game.strategy.points[0].shape == (1, *inputs.shape)
        assert (game.strategy.points[0].flatten(2).norm(dim=-1) > 0).all()


def test_a_model_of_ones_own_is_perturbed_at_its_only_embedding() -> None:
    assert mixadv.Game(Bag("words"), PLAY).site.names == ["words"]
    with pytest.raises(ValueError, match=r"2 embeddings.*'words', 'places'.*site="):
        mixadv.Game(Bag("words", "places"), PLAY)


def test_a_site_is_named_given_or_listed() -> None:
    p = player("bert", rows=4)
    layer = p.model.bert.encoder.layer[0]
    by_name, by_object = (game_of(p, site) for site in ("bert.encoder.layer.0", layer))
    assert by_name.site.targets == by_object.site.targets == [("bert.encoder.layer.0", layer)]
    both = game_of(p, ["bert.embeddings.word_embeddings", layer])
    both.backward(p.closure())
    assert len(both.strategy.points) == 2
    assert all((length > 0).all() for length in both.strategy.norms())
    assert mixadv.Game(Bag("words", "places"), PLAY, site="input").site.names == ["input"]


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        ("bert.encoder.layers.0", ValueError, r"no module named.*Did you mean 'bert.encoder.layer"),
        ("", ValueError, "no module named"),
        (nn.Linear(2, 2), ValueError, "not part of the model"),
        ([], ValueError, "names no module"),
        (3, TypeError, "got 3"),
    ],
)
def test_a_site_that_is_not_there_is_refused(site: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        game_of(player("bert", rows=2), site)


def test_a_site_that_is_never_called_or_returns_no_numbers_is_refused() -> None:
    p = player("bart", rows=4)
    with pytest.raises(mixadv.GameError, match="not called"):
        game_of(p, "model.shared").backward(p.closure())
    with pytest.raises(mixadv.GameError, match="floating-point tensor"):
        game_of(p, "model").backward(p.closure())
    assert not hooks(p.model)


# What δ does -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-causal"])
def test_delta_is_added_to_the_embedding_and_to_nothing_else(family: str) -> None:
    """Also where the output layer is tied to the embedding: only what is read is perturbed."""
    p = player(family, rows=4)
    without_dropout(p.model).double()
    seen: list[Tensor] = []
    if family == "gpt2":
        p = p._replace(model=transformers.GPT2LMHeadModel(p.model.config).double())
        assert p.model.lm_head.weight is p.model.transformer.wte.weight
        without_dropout(p.model)

    def closure() -> Any:
        output = p.model(**inputs)
        seen.append(output.logits.detach())
        return output

    inputs = {**p.batch, "labels": p.batch["input_ids"] if family == "gpt2" else p.batch["labels"]}
    game = game_of(p)
    game.backward(closure)
    table = p.model.get_input_embeddings()
    delta = game.unit * game.strategy.points[0][0]
    assert delta.any()
    inputs["inputs_embeds"] = table(inputs.pop("input_ids")) + delta
    expected = p.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    torch.testing.assert_close(seen[-1], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_frozen_embedding_is_perturbed_and_stays_frozen(name: str) -> None:
    p = player("bert", rows=4)
    p.model.bert.requires_grad_(False)
    base = torch.optim.SGD(p.model.classifier.parameters(), lr=0.1)
    optimizer = mixadv.wrap(base, p.model, mixadv.make_solver(name))
    taken = stepwise(optimizer)
    optimizer.step(p.closure())
    assert all((length > 0).all() for length in optimizer.game.strategy.norms())
    assert not any(q.requires_grad for q in p.model.bert.parameters())
    assert all(step.keys() == {"classifier.weight", "classifier.bias"} for step in taken)
    assert taken[0]["classifier.weight"].any()


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_call_at_the_site_that_the_loss_ignores_is_no_obstacle(name: str) -> None:
    """A second branch without gradients: a momentum target, features for a metric."""
    model = Bag("words")
    ids = torch.randint(0, VOCABULARY, (4, 5))
    loss = classify(model, ids)

    def closure() -> tuple[Tensor, Tensor]:
        model(ids.flip(0)).detach()
        return loss()

    optimizer = wrapped(model, name)
    taken = stepwise(optimizer)
    optimizer.step(closure)
    assert len(optimizer.game.strategy.points) == 2
    assert taken[0]["head.weight"].any()


# The mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_padding_is_never_perturbed(family: str, side: str) -> None:
    p = player(family, rows=6, side=side)
    game = game_of(p)
    game.backward(p.closure())
    assert_real_tokens_only(game.strategy.points[0], p.batch["attention_mask"])


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("hidden layer")
def test_no_solver_perturbs_padding_of_a_hidden_layer(name: str, norm: str) -> None:
    p = player("bert", rows=6, side="left")
    p.model.double()  # in which a start that small in L1 moves every prediction
    more = {"mat": {"temperature": 0.01, "particles": 2}, "cat": {"per": "token"}}.get(name, {})
    optimizer = wrapped(p, name, site="bert.encoder.layer.0", norm=norm, **more)
    optimizer.step(p.closure())
    game = optimizer.game
    outside = p.batch["attention_mask"] == 0
    assert not game.strategy.points[0][:, outside].any()
    assert all((length > 0).all() for length in game.strategy.norms())


class Masked(Bag):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head((self.words(ids) * attention_mask[..., None]).mean(1))


@pytest.mark.parametrize("how", ["inner encoder", "by position"])
def test_the_mask_is_found_however_the_encoder_is_called(how: str) -> None:
    p = player("bert", rows=6)
    ids, mask, labels = (p.batch[k] for k in ("input_ids", "attention_mask", "labels"))
    mask[:, 1] = 0  # not what a padding index would give: the mask goes first
    model = p.model if how == "inner encoder" else Masked("words", padding=PAD)

    def closure() -> tuple[Tensor, Tensor]:
        if how == "by position":
            logits = model(ids, mask)
        else:
            logits = model.classifier(model.bert(ids, attention_mask=mask).pooler_output)
        return F.cross_entropy(logits, labels), logits

    game = mixadv.Game(model, PLAY)
    game.backward(closure)
    assert_real_tokens_only(game.strategy.points[0], mask)


def test_without_a_mask_the_padding_index_tells_the_real_tokens() -> None:
    ids = text_batch(6)["input_ids"]
    for padding in (PAD, None):
        model = Bag("words", padding=padding)
        game = mixadv.Game(model, PLAY)
        game.backward(classify(model, ids))
        real = torch.ones_like(ids) if padding is None else ids != PAD
        assert_real_tokens_only(game.strategy.points[0], real)


# The unit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("family", ["bert", "t5", "bart", "llama"])
def test_the_unit_is_the_mean_length_of_a_real_tokens_output(
    family: str, scaled: bool, side: str
) -> None:
    p = player(family, rows=6, side=side)
    ids, mask = p.batch["input_ids"], p.batch["attention_mask"]
    holder = p.model.get_encoder() if family in ("t5", "bart") else p.model
    table = holder.get_input_embeddings()
    if scaled:  # as BART with scale_embedding, and Gemma, do
        table.register_forward_hook(lambda module, args, output: 4.0 * output)
    by_hand = table(ids).detach().norm(dim=-1)[mask > 0].mean().item()
    game = game_of(p)
    assert game.explain(p.closure()).unit == pytest.approx(by_hand, rel=1e-6)
    assert game.unit is None
    game.backward(p.closure())
    assert game.unit == pytest.approx(by_hand, rel=1e-6)
    assert game.explain().radius == pytest.approx(PLAY.radius * by_hand, rel=1e-6)


def test_a_scaled_embedding_is_measured_with_its_scale() -> None:
    units = {}
    for scaled in (False, True):
        config = player("bart", rows=2).model.config
        config.scale_embedding = scaled
        torch.manual_seed(0)
        model = transformers.BartForSequenceClassification(config)
        batch = text_batch(4)
        game = mixadv.Game(model, PLAY)
        estimate = game.explain().unit
        game.backward(lambda model=model, batch=batch: model(**batch))
        units[scaled] = game.unit
        assert estimate == pytest.approx(game.unit, rel=0.2)
    assert units[True] == pytest.approx(4.0 * units[False], rel=1e-5)  # √16


def test_the_unit_is_measured_once_and_saved() -> None:
    p = player("bert", rows=4)
    game = game_of(p)
    game.backward(p.closure())
    state = game.state_dict()
    assert state["unit"] == game.unit
    with torch.no_grad():
        p.model.get_input_embeddings().weight.mul_(10)
    other = game_of(p)
    other.load_state_dict(state)
    for each in (game, other):
        each.backward(p.closure())
        assert each.unit == state["unit"]
    assert game_of(p, solver=mixadv.PGD(unit="absolute")).rounds.arena.scale("") == 1.0


# Packed batches ----------------------------------------------------------------------------------


TEXTS = ((5, 3), (4, 3, 1))  # lengths of the texts of each row
WORDS = torch.randint(10, VOCABULARY, (16,), generator=torch.Generator().manual_seed(0))


def told(way: str) -> tuple[Tensor, dict[str, Any]]:
    """Return ids, and how a model is told of the texts in their rows."""
    cut = torch.cat([torch.arange(length) for row in TEXTS for length in row])
    rows = 1 if way in ("flattened", "lengths") else len(TEXTS)
    ids, positions = (x.view(rows, -1) for x in (WORDS, cut))
    number = (positions == 0).cumsum(1)
    seen = (number[:, None] == number[..., None]).tril()[:, None]
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e9)
    ends = torch.tensor([*(positions.flatten() == 0).nonzero().flatten(), positions.numel()])
    words: dict[str, dict[str, Any]] = {
        "both": {"attention_mask": seen, "position_ids": positions},
        "mask": {"attention_mask": seen},
        "mask of all rows' heads": {"attention_mask": seen.expand(-1, 2, -1, -1)},
        "added": {"attention_mask": added},
        "flattened": {"position_ids": positions, "use_cache": False},  # else one text
        "lengths": {"cu_seq_lens_q": ends.int(), "attention_mask": seen},
        "numbers": {"seq_idx": number.int(), "attention_mask": seen},
    }
    return ids, words[way]


WAYS = ("both", "mask", "mask of all rows' heads", "added", "flattened", "lengths", "numbers")


def packed(p: Player, way: str = "both") -> Callable[[], Any]:
    """Return a closure on rows that hold several texts, the loss a mean over their tokens."""
    ids, words = told(way)
    labels = ids.clone().view(-1)
    labels[[0, 5, 8, 12, 15]] = -100  # from nothing no first word is foretold
    labels = labels.view_as(ids)
    return lambda: p.model(input_ids=ids, labels=labels, **words)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("name", ["noise", "pgd", "freelb", "smart", "mat"])
def test_texts_that_share_a_row_each_play_in_a_ball_of_their_own(name: str, norm: str) -> None:
    p = player("llama-causal", rows=2)
    settings = {"proximal_weight": 0.0} if name == "smart" else {}
    settings |= {"learner_steps": 1} if name == "mat" else {}
    optimizer = wrapped(p, name, norm=norm, radius=0.1, unit="absolute", **settings)
    optimizer.step(packed(p))
    points = optimizer.game.strategy.points[0].flatten(0, 1).double()
    order = {"l1": 1, "l2": 2, "linf": torch.inf}[norm]
    lengths = []
    for row, texts in zip(points, [*TEXTS] * (len(points) // 2), strict=True):
        for text in row.split(texts):
            lengths.append(float(torch.linalg.vector_norm(text, order)))
    assert max(lengths) <= 0.1 * (1 + 1e-6)
    torch.testing.assert_close(
        float(optimizer.outcome.radius), sum(lengths) / len(lengths), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_text_meets_the_same_delta_packed_and_by_itself(norm: str, way: str) -> None:
    p = player("llama-causal", rows=2)
    p.model.eval().double()
    solver = mixadv.PGD(start="zero", norm=norm, unit="absolute", radius=0.1, step_size=0.03)
    game = mixadv.Game(p.model, solver)
    game.backward(packed(p, way))
    met = game.strategy.points[0].flatten(0, 2)
    texts = met.split([length for row in TEXTS for length in row])
    assert len(texts) == 5

    def alone(ids: Tensor) -> Callable[[], Any]:
        return lambda: p.model(input_ids=ids[None], labels=ids[None])

    apart = mixadv.Game(p.model, solver)
    for ids, met in zip(WORDS.split([n for row in TEXTS for n in row]), texts, strict=True):
        if len(ids) == 1:  # from which nothing is foretold
            assert not met.any()
            continue
        apart.backward(alone(ids))
        torch.testing.assert_close(apart.strategy.points[0][0, 0], met, rtol=1e-6, atol=1e-9)


def test_texts_play_for_themselves_under_a_payoff_of_their_own_too() -> None:
    found = []
    for goals in ({}, {"adversary": True}):
        p = player("llama-causal", rows=2)
        p.model.eval()
        game = mixadv.Game(p.model, mixadv.PGD(steps=2, radius=0.1, unit="absolute"))
        game.backward(packed(p), **{name: packed(p, "both") for name in goals})
        found.append(game.strategy.points[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("way", ["positions", "numbers", "lengths", "mask"])
def test_texts_play_for_themselves_whatever_the_first_batch_held(way: str) -> None:
    """Of this process or of another: else their passes in the first round would differ too."""
    p = player("llama-causal", rows=1)
    ids = WORDS[None]
    one, two = torch.arange(16)[None], torch.arange(8).repeat(2)[None]
    texts = [torch.zeros(1, 16).int(), torch.arange(16)[None] // 8]
    causal = torch.ones(16, 16).tril() > 0
    seen = [(n[:, None] == n[..., None])[:, None] & causal for n in texts]
    words = {
        "positions": [{"position_ids": x, "use_cache": False} for x in (one, two)],
        "numbers": [{"seq_idx": n, "attention_mask": s} for n, s in zip(texts, seen, strict=True)],
        "lengths": [{"cu_seq_lens_q": torch.arange(0, 17, n)} for n in (16, 8)],
        "mask": [{"attention_mask": s} for s in seen],
    }[way]
    game = mixadv.Game(p.model, mixadv.PGD(radius=0.1, unit="absolute", steps=3))
    for told_so in words:
        game.backward(lambda told_so=told_so: p.model(input_ids=ids, labels=ids, **told_so))
    for text in game.strategy.points[0][0, 0].split(8):
        torch.testing.assert_close(float(text.norm()), 0.1, rtol=1e-5, atol=0)


def test_rows_that_are_mapped_to_samples_stay_one_sample_where_positions_are_told() -> None:
    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = torch.nn.Embedding(20, 4), torch.nn.Linear(4, 2)

        def forward(self, ids: Tensor, position_ids: Tensor, segments: Tensor) -> Tensor:
            rows = self.out(self.words(ids).mean(1).tanh())
            return torch.zeros(2, 2).index_add(0, segments, rows)

    model, segments = Reader(), torch.tensor([0, 0, 1])
    ids = torch.arange(12).view(3, 4)
    places = torch.arange(4).expand(3, 4)
    game = mixadv.Game(model, mixadv.PGD(radius=0.1, unit="absolute"))

    def closure() -> Any:
        logits = model(ids, position_ids=places, segments=segments)
        return torch.nn.functional.cross_entropy(logits, torch.arange(2), reduction="none"), logits

    game.backward(closure)
    delta = game.strategy.points[0][0]
    for own in (delta[:2], delta[2:]):
        assert float(own.norm()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("short", [0, 1])
@pytest.mark.parametrize("way", ["mask", "lengths", "positions", "left"])
def test_a_row_of_one_text_is_that_text(
    way: str, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is no text of its own, and lengths of other rows tell nothing."""
    p = player("llama-causal", rows=2)
    p.model.eval()
    ids = p.batch["input_ids"]
    length = ids.shape[1]
    rows = torch.tensor([[length - 3 * (row == short)] for row in range(2)])
    real = torch.arange(length) < rows
    seen = (torch.ones(length, length).tril() > 0) & real[:, None, None, :]
    left = real.flip(1)
    words: dict[str, Any] = {
        "mask": {"attention_mask": seen},
        "lengths": {
            "attention_mask": real,
            "cu_seq_lens_q": F.pad(rows.flatten().cumsum(0), (1, 0)),
        },
        "positions": {
            "attention_mask": real,
            "position_ids": (real.cumsum(1) - 1).masked_fill(~real, 1),
        },
        "left": {
            "attention_mask": left,
            "position_ids": (left.cumsum(1) - 1).masked_fill(~left, 1),
        },
    }
    found = []
    for solver in (mixadv.PGD(norm="l1"), mixadv.UniformNoise()):
        for find in (None, lambda stage: False):
            if find is not None:
                monkeypatch.setattr("mixadv.round.first_round.find_texts", find)
            game = mixadv.Game(p.model, solver)
            run = functools.partial(p.model, input_ids=ids, labels=ids, **words[way])
            outcome = game.backward(run)
            assert game.site.packed == (find is None)
            found.append([game.strategy.points[0], outcome.radius])
        monkeypatch.undo()
        torch.testing.assert_close(*found[-2:], rtol=1e-4, atol=1e-7)


def test_lengths_that_do_not_fit_the_rows_are_refused() -> None:
    p = player("llama-causal", rows=2)
    ids = p.batch["input_ids"]

    def wrong() -> Any:
        return p.model(input_ids=ids, labels=ids, cu_seq_lens_q=torch.tensor([0, 3, 5, 9]))

    with pytest.raises(mixadv.GameError, match=r"3 texts by .* end at 9.*begin anew.*per='token'"):
        mixadv.Game(p.model, mixadv.PGD()).backward(wrong)
    assert mixadv.Game(p.model, mixadv.PGD(per="token")).backward(wrong).radius > 0


def test_texts_that_a_block_mask_alone_tells_of_are_refused() -> None:
    class BlockMask:
        """Stands for that of torch.nn.attention.flex_attention, which tells blocks alone."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)

        def forward(self, input_ids: Tensor, attention_mask: Any, **_: Any) -> Tensor:
            return self.embedding(input_ids).square().mean()

    model, ids = Model(), torch.arange(8).view(1, 8)
    run = functools.partial(model, ids, BlockMask())
    with pytest.raises(mixadv.GameError, match=r"BlockMask.*position_ids that begin anew"):
        mixadv.Game(model, mixadv.PGD(unit="absolute")).backward(run)
    game = mixadv.Game(model, mixadv.PGD(unit="absolute"))
    game.backward(functools.partial(run, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])))
    assert game.site.packed


def test_tokens_of_packed_rows_play_as_of_any_rows() -> None:
    p = player("llama-causal", rows=2)
    game = mixadv.Game(p.model, mixadv.FreeLB(per="token"))
    assert game.backward(packed(p)).radius > 0
    assert not game.site.packed


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_counted_over_real_tokens_are_not_taken_for_packing(side: str, fill: int) -> None:
    p = player("llama-causal", rows=4, side=side)
    mask = p.batch["attention_mask"]
    p.batch["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill)
    assert game_of(p).backward(p.closure()).radius > 0


# Hooks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [None, "input", "bert.encoder.layer.0"])
def test_no_hook_outlives_a_round(site: str | None) -> None:
    p = player("vision" if site == "input" else "bert", rows=4)
    game = game_of(p, site)
    during: list[int] = []

    def closure() -> Any:
        during.append(len(hooks(p.model)))
        return p.forward(p.model, p.batch)

    game.explain(closure)
    assert not hooks(p.model)
    game.backward(closure)
    assert max(during) > 0
    assert not hooks(p.model)
    raised = len(during) + 1

    def failing() -> Any:
        if len(during) >= raised:
            raise RuntimeError("in the middle of a round")
        return closure()

    with pytest.raises(RuntimeError, match="in the middle"):
        game.backward(failing)
    assert not hooks(p.model)


def test_evaluation_and_generation_do_not_see_the_adversary() -> None:
    p = player("llama-causal", rows=4, side="left")
    p.model.eval()
    prompt = {k: p.batch[k] for k in ("input_ids", "attention_mask")}

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            made = p.model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=PAD)
            return [made, p.model(**prompt).logits]

    before = outputs()
    game = game_of(p)
    game.backward(p.closure())
    assert_same(outputs(), before)
    with torch.no_grad():
        plain = p.closure()().loss
        assert torch.equal(game.loss(p.closure()), plain)
