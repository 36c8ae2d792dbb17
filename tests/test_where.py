"""δ acts where it is said to, and elsewhere at real positions alone; a sample's δ is its own.

Each test computes what the site sees by a hook of its own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.model.masks import told
from mixadv.model.visits import Call
from mixadv.players.rows import by_row
from mixadv.players.strategy import Strategy
from tests.families_zoo import FAMILIES
from tests.zoo import player

PLAYERS = ["noise", "fgm", "pgd", "freelb", "vat", "r3f", "smart", "mat"]
SPEECH = transformers.Wav2Vec2Config(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8),
    conv_stride=(4, 4),
    conv_kernel=(8, 4),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    classifier_proj_size=8,
    feat_extract_norm="layer",
    num_labels=3,
)


def first_points(model: nn.Module, solver: Any, closure: Callable[[], Any], **how: Any) -> Tensor:
    """Play a round and return the particles at the first call, `[M, B, ...]`."""
    game = mixadv.Game(model, solver, how.pop("site", None), seed=3)
    game.backward(closure, **how)
    return game.strategy.points[0]


@contextmanager
def moved(module: nn.Module, delta: Tensor) -> Iterator[None]:
    """Add δ to what a module returns."""
    hook = module.register_forward_hook(lambda module, args, output: output + delta)
    yield
    hook.remove()


# where= ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAYERS)
@pytest.mark.parametrize("how", ["mask", "broadcast", "list", "function"])
def test_nothing_moves_where_it_is_not_said(name: str, how: str):
    one = player("bert", rows=4)
    length = one.batch["input_ids"].shape[1]
    allowed = (torch.arange(length) % 3 == 0).expand(4, -1)
    ways = {
        "mask": allowed,
        "broadcast": allowed[:1, :, None],
        "list": [allowed],
        "function": lambda call: allowed,
    }
    solver = mixadv.make_solver(name)
    if hasattr(solver, "learner_steps"):
        base = torch.optim.SGD(one.model.parameters(), lr=0.0)
        optimizer = mixadv.wrap(base, one.model, solver)
        optimizer.step(one.closure(), where=ways[how])
        game = optimizer.game
    elif name == "smart":
        game = mixadv.Game(one.model, mixadv.SMART(proximal_weight=0.0))
        game.loss(one.closure(), where=ways[how]).backward()
    else:
        game = mixadv.Game(one.model, solver)
        game.backward(one.closure(), where=ways[how])
    points = game.strategy.points[0]
    assert points[:, allowed].any()
    assert not points[:, ~allowed].any()
    assert int(game.outcome.positions) == int(allowed.sum())
    embedded = game.site.targets[0][1](one.batch["input_ids"]).detach()
    assert game.unit == pytest.approx(float(embedded[allowed].norm(dim=-1).mean()), rel=1e-5)
    assert game.site.where is None  # of that round alone


@pytest.mark.parametrize("batching", ["stack", "auto", "vmap"])
def test_particles_in_one_batch_move_where_it_is_said(batching: str):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3))
    ids, labels = torch.randint(9, (4, 6)), torch.arange(4) % 3

    def closure() -> Any:
        logits = model(ids)
        losses = F.cross_entropy(logits, labels.repeat(len(logits) // 4), reduction="none")
        return losses, logits

    allowed = (torch.arange(6) % 2 == 0).expand(4, -1)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    solver = mixadv.MAT(particles=3, play_as="ensemble", particle_batching=batching)
    optimizer = mixadv.wrap(base, model, solver, site="0")
    for where in (None, allowed, lambda call: allowed):
        optimizer.step(closure, where=where)
        points = optimizer.game.strategy.points[0]
        assert points[:, allowed].any(-1).all()
        assert points[:, ~allowed].any() == (where is None)


def test_explain_says_how_many_positions_play():
    one = player("bert", rows=4)
    mask = one.batch["attention_mask"]
    game = mixadv.Game(one.model, mixadv.FGM())
    assert f"{int(mask.sum())} of {mask.numel()} positions" in str(game.explain(one.closure()))
    half = torch.arange(mask.shape[1]).expand(4, -1) < 2
    assert f"8 of {mask.numel()} positions" in str(game.explain(one.closure(), where=half))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (torch.ones(3, 9), r"where= is \[3, 9\], and the site returns \[4, 9, 16\]"),
        ("prompt", "where= is str"),
        ([], "where= has 0 masks, and the site is called more often"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_forgotten(where: Any, said: str):
    one = player("bert", rows=4)
    game = mixadv.Game(one.model, mixadv.FGM())
    with pytest.raises(mixadv.GameError, match=said):
        game.backward(one.closure(), where=where)
    game.backward(one.closure())
    assert game.strategy.points[0].any()


@pytest.mark.parametrize("unit", ["relative", "absolute"])
def test_a_mask_that_is_empty_is_refused_in_the_first_round(unit: Any):
    """Nobody attacks: training would be plain, and nothing would say so."""
    one = player("bert", rows=4)
    game = mixadv.Game(one.model, mixadv.FGM(unit=unit))
    with pytest.raises(mixadv.GameError, match="where= is empty"):
        game.backward(one.closure(), where=torch.zeros(4, 9))
    row = torch.zeros(4, 9).index_fill(0, torch.tensor(1), 1.0)
    game.backward(one.closure(), where=row)
    game.backward(one.closure(), where=torch.zeros(4, 9))
    assert game.outcome.positions == 0


@given(st.sampled_from([(2, 3, 4), (2, 4), (2, 3, 4, 5)]), st.data())
def test_a_mask_has_the_leading_sizes_or_broadcasts(shape: tuple[int, ...], data: st.DataObject):
    leading = data.draw(st.integers(1, len(shape)))
    mask = torch.rand(shape[:leading]) > 0.5
    call = Call(torch.Size(shape), torch.float32, torch.device("cpu"), None)
    found = told(mask, 0, call).mask
    ones = [1] * (len(shape) - leading)
    assert found.expand(shape).equal(mask.view(*mask.shape, *ones).expand(shape).float())
    assert len(found) == shape[0]


# Padding that is not a mask at an embedding ------------------------------------------------------


@pytest.mark.parametrize("solver", [mixadv.UniformNoise, mixadv.FreeLB, mixadv.PGD])
def test_padding_of_recordings_is_not_played(solver: Any):
    model = transformers.Wav2Vec2ForSequenceClassification(SPEECH).eval()
    model.freeze_feature_encoder()
    mask = torch.ones(4, 400, dtype=torch.long)
    mask[1, 100:] = 0
    sound, labels = torch.randn(4, 400) * mask, torch.arange(4) % 3
    closure = lambda: model(input_values=sound, attention_mask=mask, labels=labels)  # noqa: E731
    points = first_points(model, solver(radius=1.0, unit="absolute"), closure)
    assert not points[:, mask == 0].any()
    assert points[:, mask == 1].any()


def test_padding_is_known_from_lengths():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(5, 3)

        def forward(self, frames: Tensor, frame_lengths: Tensor) -> Tensor:
            return torch.stack([self.read(x[:n]).mean(0) for x, n in zip(frames, frame_lengths)])  # noqa: B905

    model, frames, lengths = Recurrent(), torch.randn(3, 6, 5), torch.tensor([6, 2, 4])
    closure = lambda: F.cross_entropy(model(frames, lengths), torch.arange(3))  # noqa: E731
    points = first_points(model, mixadv.UniformNoise(), closure)[0]
    for row, length in zip(points, lengths, strict=True):
        assert row[:length].any(-1).all()
        assert not row[length:].any()


def test_lengths_of_what_is_no_input_are_not_taken_for_its_own():
    class Aligned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(5, 3)

        def forward(self, x: Tensor, target_lengths: Tensor, input_lengths: Tensor) -> Tensor:
            real = torch.arange(x.shape[1]) < input_lengths[:, None]
            return self.read((x * real[..., None]).sum(1))

    model, x = Aligned(), torch.randn(3, 6, 5)
    targets, lengths = torch.tensor([1, 2, 2]), torch.tensor([6, 3, 4])
    closure = lambda: F.cross_entropy(model(x, targets, lengths), torch.arange(3))  # noqa: E731
    points = first_points(model, mixadv.UniformNoise(), closure)[0]
    assert points.any(-1).sum(1).tolist() == [6, 3, 4]


def test_padding_that_is_told_and_not_understood_is_warned_of():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(5, 3)

        def forward(self, frames: Tensor, padding: Tensor) -> Tensor:
            return self.read((frames * ~padding[..., None]).mean(1))

    model, frames, padding = Padded(), torch.randn(3, 6, 5), torch.zeros(3, 6, dtype=torch.bool)
    closure = lambda: F.cross_entropy(model(frames, padding), torch.arange(3))  # noqa: E731
    mixadv.Game(model, mixadv.FGM()).backward(closure)  # nothing is padded
    padding[1, 4:] = True
    with pytest.warns(UserWarning, match=r"called with 'padding'.*where=mask"):
        mixadv.Game(model, mixadv.FGM()).backward(closure)
    game = mixadv.Game(model, mixadv.UniformNoise())
    game.backward(closure, where=~padding)
    assert not game.strategy.points[0][0][padding].any()


def test_what_a_model_overwrites_by_an_image_is_not_played():
    image = 7
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    text = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(10, 50, (3, 10))
    ids[:, 2:6] = image
    pixels, labels = torch.randn(3, 3, 8, 8), ids.masked_fill(ids == image, -100)
    mask = torch.ones_like(ids)

    def closure() -> Any:
        return model(input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels)

    points = first_points(model, mixadv.UniformNoise(radius=1.0, unit="absolute"), closure)[0]
    assert not points[ids == image].any()
    assert points[ids != image].any(-1).all()


def test_a_gradient_of_padding_that_is_not_finite_costs_no_row_its_adversary():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
            ctx.save_for_backward(mask)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            [mask] = ctx.saved_tensors
            return gradient.masked_fill(mask[..., None] == 0, torch.nan), None

    one = player("bert", rows=4)
    mask = one.batch["attention_mask"]
    inner = one.model.bert.embeddings
    inner.LayerNorm.register_forward_pre_hook(lambda module, args: (Root.apply(args[0], mask),))
    for name in PLAYERS[1:4]:
        game = mixadv.Game(one.model, mixadv.make_solver(name, radius=0.1))
        outcome = game.backward(one.closure())
        assert int(outcome.nonfinite) == 0
        assert (game.strategy.points[0][0].flatten(1).norm(dim=1) > 0).all()


# The batch in the second dimension --------------------------------------------------------------


@settings(max_examples=5)
@given(st.sampled_from([(6, 12), (6, 6), (2, 5), (5, 2)]), st.sampled_from(PLAYERS[1:6]))
def test_rows_of_a_model_that_goes_along_a_sequence_play_their_own_game(
    sizes: tuple[int, int], name: str
):
    rows, length = sizes
    torch.manual_seed(rows)
    config = transformers.XLNetConfig(
        vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24, pad_token_id=1, num_labels=3
    )
    model = transformers.XLNetForSequenceClassification(config).eval()
    ids = torch.randint(5, 50, (rows, length))
    mask = torch.ones_like(ids)
    ids[::2, :1], mask[::2, :1] = 1, 0  # padded on the left
    labels = torch.arange(rows) % 3

    def points(number: int) -> Tensor:
        def closure() -> Any:
            args = {"input_ids": ids[:number], "attention_mask": mask[:number]}
            return model(**args, labels=labels[:number])

        start = {"start": "zero", "steps": 1, "step_size": 0.1} if name == "pgd" else {}
        solver = mixadv.make_solver(name, radius=0.1, unit="absolute", **start)
        return first_points(model, solver, closure)[0]

    found = points(rows)
    assert found.shape == (rows, length, 16)
    assert not found[mask == 0].any()
    if name in ("fgm", "pgd"):
        norms = found.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.full((rows,), 0.1))
        torch.testing.assert_close(found[:1], points(1), rtol=1e-4, atol=1e-6)


def test_delta_is_added_to_the_row_that_it_was_found_for():
    config = transformers.XLNetConfig(
        vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24, pad_token_id=1, num_labels=3
    )
    model = transformers.XLNetForSequenceClassification(config).eval()
    ids, labels = torch.randint(5, 50, (3, 7)), torch.arange(3)
    args = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    game = mixadv.Game(model, mixadv.FGM(radius=0.5, unit="absolute"))
    outcome = game.backward(lambda: model(**args))
    with moved(game.site.targets[0][1], game.strategy.points[0][0].transpose(0, 1)):
        assert float(model(**args).loss.detach()) == pytest.approx(float(outcome.payoff), rel=1e-5)


# Which input -------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A model of two inputs, the first of which is a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, gates: Tensor, frames: Tensor) -> Tensor:
        return self.out(torch.tanh(self.read(frames) * gates[..., None]).mean(1))


def test_of_several_inputs_one_is_asked_for():
    model, gates, frames = Gated(), torch.rand(5, 7), torch.randn(5, 7, 6)
    closure = lambda: F.cross_entropy(model(gates, frames), torch.arange(5) % 3)  # noqa: E731
    with pytest.raises(mixadv.GameError, match=r"\['gates', 'frames'\]: say .*'input:gates'"):
        first_points(model, mixadv.FGM(), closure)
    assert first_points(model, mixadv.FGM(), closure, site="input:frames").shape == (1, 5, 7, 6)
    game = mixadv.Game(model, mixadv.FGM(), "input:frames")
    assert "the model's own input, frames" in str(game.explain())
    with pytest.raises(mixadv.GameError, match=r"of which .* are floating-point tensors"):
        first_points(model, mixadv.FGM(), closure, site="input:pixels")


def test_a_call_under_no_grad_gets_no_delta_and_counts_in_nothing():
    one = player("bert", rows=4)

    def twice() -> Any:
        with torch.no_grad():
            kept = one.closure()().logits
        output = one.closure()()
        return output.loss + F.mse_loss(output.logits, kept), output.logits

    for solver in (mixadv.FGM(), mixadv.PGD(), mixadv.VAT(), mixadv.FreeLB()):
        game = mixadv.Game(one.model, solver)
        outcome = game.backward(twice)
        assert len(game.strategy.points) == 1
        own = game.strategy.points[0].flatten(2).norm(dim=2).mean()
        assert float(outcome.radius) == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("orders", [("tg", "gt"), ("tg", "g"), ("g", "tg"), ("tgt", "gtt")])
@pytest.mark.parametrize("recompute", [False, True])
def test_calls_under_no_grad_may_change_from_round_to_round_or_it_is_said(
    orders: tuple[str, str], recompute: bool
):
    """A pass without gradients goes by the round before: as it does, or the round is refused."""
    one = player("bert", rows=4)

    def ordered(calls: str) -> Callable[[], Any]:
        def run() -> Any:
            total, logits = torch.zeros(()), None
            for call in calls:
                with torch.set_grad_enabled(call == "g" and torch.is_grad_enabled()):
                    output = one.closure()()
                if call == "g":
                    logits, total = output.logits, total + output.loss
            return total, logits

        return run

    game = mixadv.Game(one.model, mixadv.ALUM(recompute=recompute))
    for _ in range(2):
        game.backward(ordered(orders[0]))
        assert len(game.strategy.points) == 1
    if recompute:
        with pytest.raises(mixadv.GameError, match=r"under no_grad.*or set recompute=False"):
            game.backward(ordered(orders[1]))
    else:
        game.backward(ordered(orders[1]))
        assert len(game.strategy.points) == 1


def test_calls_in_reentrant_checkpoints_are_not_taken_for_such():
    one = player("bert", rows=4)
    keywords = {"use_reentrant": True}
    one.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    game = mixadv.Game(one.model.train(), mixadv.FGM(), "bert.encoder.layer.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        game.backward(one.closure())
    assert game.strategy.points[0].any()


def test_a_named_tuple_at_the_site_is_made_anew():
    from typing import NamedTuple

    class Encoded(NamedTuple):
        hidden: Tensor
        padding: Tensor

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 8)

        def forward(self, ids: Tensor) -> Encoded:
            return Encoded(self.words(ids), ids == 0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Encoder(), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            out = self.encoder(ids)
            return self.head((out.hidden * ~out.padding[..., None]).mean(1))

    model, ids = Model(), torch.randint(1, 30, (4, 5))
    closure = lambda: F.cross_entropy(model(ids), torch.arange(4) % 3)  # noqa: E731
    assert first_points(model, mixadv.FGM(), closure, site="encoder").any()


def test_a_model_of_texts_and_images_lists_its_embeddings():
    text = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 24, "max_position_embeddings": 32, "eos_token_id": 2}
    text |= {"bos_token_id": 1}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 24, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    with pytest.raises(ValueError, match=r"text_model.embeddings.token_embedding.*site="):
        mixadv.Game(model, mixadv.FGM())


def test_images_that_are_left_as_they_are_are_told_where_no_site_is_named():
    one = FAMILIES["Siglip"].build(), FAMILIES["Siglip"].batch()
    for model, batch in (one, (FAMILIES["Llava"].build(), FAMILIES["Llava"].batch())):
        game = mixadv.Game(model.eval(), mixadv.FGM())
        [site] = game.site.names
        if model is one[0]:
            with pytest.warns(UserWarning, match=r"pixel_values'\] too.*site='input:pixel_values'"):
                game.backward(lambda: model(**batch))  # noqa: B023
        game.backward(lambda: model(**batch))  # noqa: B023
        for named in (site, "input:pixel_values", [site, "input:pixel_values"]):
            mixadv.Game(model, mixadv.FGM(), named).backward(lambda: model(**batch))  # noqa: B023


def test_speech_encoders_that_train_say_the_cure():
    model = transformers.Wav2Vec2ForSequenceClassification(SPEECH)
    sound, labels = torch.randn(4, 400), torch.arange(4) % 3
    with pytest.raises(mixadv.GameError, match="freeze_feature_encoder"):
        first_points(model, mixadv.FGM(), lambda: model(input_values=sound, labels=labels))
    site = "wav2vec2.feature_projection"
    closure = lambda: model(input_values=sound, labels=labels)  # noqa: E731
    assert first_points(model.eval(), mixadv.FGM(), closure, site=site).any()


class Recurrent(nn.Module):
    """A model that goes along a sequence `[n, B, d]`, and reads one step of it or all."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.along, self.out, self.read = nn.GRU(5, 8), nn.Linear(8, 3), read

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.along(frames)[0]
        return self.out(hidden.mean(0) if self.read is None else hidden[self.read])


@given(
    st.integers(2, 6),
    st.integers(2, 6),
    st.sampled_from([None, 0, -1]),
    st.sampled_from(["each", "logits", "alone"]),
)
@settings(max_examples=20)
def test_the_batch_is_found_in_what_samples_read(length: int, rows: int, read: Any, how: str):
    torch.manual_seed(length)
    model, frames, labels = Recurrent(read), torch.randn(length, rows, 5), torch.arange(rows) % 3

    def points(number: int) -> Tensor:
        def closure() -> Any:
            logits = model(frames[:, :number])
            loss = F.cross_entropy(logits, labels[:number], reduction="none")
            return {"each": loss, "logits": (loss.mean(), logits), "alone": loss.mean()}[how]

        return first_points(model, mixadv.FGM(radius=1.0, unit="absolute"), closure)[0]

    found = points(rows)
    assert found.shape == (rows, length, 5)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(rows))
    for number in (1, 2):
        torch.testing.assert_close(found[:number], points(number), rtol=1e-3, atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_the_batch_comes_first_where_a_loss_alone_shows_it(
    rows: int, length: int, pooled: bool, summed: bool
):
    torch.manual_seed(rows)
    reads = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model = (lambda x: reads(x.mean(1))) if pooled else (lambda x: reads(x).max(1).values)
    x, labels = torch.randn(rows, length, 5), torch.arange(rows) % 3
    reduction = "sum" if summed else "mean"
    closure = lambda: F.cross_entropy(model(reads[0].extra(x)), labels, reduction=reduction)  # noqa: E731
    reads[0].extra = nn.Identity()
    solver = mixadv.FGM(radius=1.0, unit="absolute")
    found = first_points(reads, solver, closure, site="0.extra")[0]
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(rows))


def test_a_batch_that_nothing_shows_is_warned_of():
    """Samples see each other, and there is one loss: nothing tells them from steps."""

    class Whitened(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / x.std(0)

    model = nn.Sequential(nn.Identity(), nn.Flatten(), Whitened(), nn.Linear(15, 3))
    x, labels = torch.randn(4, 3, 5), torch.arange(4) % 3
    closure = lambda: F.cross_entropy(model(x), labels)  # noqa: E731
    with pytest.warns(UserWarning, match=r"\[4, 3, 5\], and .* which .* with the loss"):
        first_points(model, mixadv.FGM(), closure, site="0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_points(model, mixadv.FGM(), lambda: (closure(), model(x)), site="0")
        first_points(model, mixadv.FGM(per="token"), closure, site="0")


def test_ids_that_read_alike_both_ways_do_not_tell_the_batch():
    class Along(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.words(input_ids.T)).sum(0))

    model, ids = Along(), torch.tensor([[1, 2], [2, 5]])

    def closure() -> Any:
        logits = model(ids)
        return F.cross_entropy(logits, torch.arange(2)), logits

    found = first_points(model, mixadv.FGM(radius=1.0, unit="absolute"), closure, site="words")[0]
    embedded = model.words(ids).detach().requires_grad_()
    loss = F.cross_entropy(model.out(torch.tanh(embedded).sum(1)), torch.arange(2))
    [slope] = torch.autograd.grad(loss, embedded)
    lengths = slope.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(found, slope / lengths)


# Which row is whose ------------------------------------------------------------------------------


class Graphs(nn.Module):
    """A model of graphs whose nodes lie in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.out = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        hidden = torch.tanh(self.node(x))
        pooled = hidden.new_zeros(int(batch.max()) + 1, 8).index_add(0, batch, hidden)
        return self.out(pooled)


def test_rows_that_predict_by_themselves_are_samples_whatever_map_there_is():
    """As of cells that were measured in batches."""

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.shift = nn.Linear(5, 3), nn.Embedding(3, 3)

        def forward(self, x: Tensor, batch: Tensor) -> Tensor:
            return self.cell(x) + self.shift(batch)

    model, x, batch = Cells(), torch.randn(6, 5), torch.tensor([0, 2, 1, 0, 2, 2])

    def closure() -> Any:
        logits = model(x, batch)
        return F.cross_entropy(logits, torch.arange(6) % 3), logits

    solver = mixadv.FGM(radius=0.5, unit="absolute")
    norms = first_points(model, solver, closure, site="input:x")[0].norm(dim=1)
    torch.testing.assert_close(norms, torch.full((6,), 0.5))
    with pytest.raises(mixadv.GameError, match="not those of samples in order"):
        first_points(model, solver, lambda: closure()[0], site="input:x")


def test_a_sample_of_several_rows_draws_falls_and_counts_as_one():
    owners, points = torch.tensor([0, 1, 0, 1, 1]), torch.randn(3, 5, 2)
    q = Strategy([points], log_weights=torch.randn(3, 2).log_softmax(0), owners=[owners])
    drawn = q.sample(torch.Generator().manual_seed(0)).points[0][0]
    for sample in (0, 1):
        rows = owners == sample
        assert any(drawn[rows].equal(point[rows]) for point in points)
    lengths = [points[:, owners == sample].flatten(1).norm(dim=1) for sample in (0, 1)]
    torch.testing.assert_close(q.length(), torch.stack(lengths).mean())
    gradient = torch.ones_like(points)
    gradient[1, 3, 0] = torch.nan
    rule = mixadv.PGD(radius=None, unit="absolute").move
    moved, [fallen] = q.move([gradient], lambda i, *move: rule(*move), torch.rand)
    assert int(fallen.sum()) == 1
    assert not moved.points[0][1, owners == 1].any()
    assert moved.points[0][1, owners == 0].any()


def test_a_map_that_is_none_of_samples_is_refused():
    model, x = Graphs(), torch.randn(4, 5)
    which = torch.tensor([7, 9, 7, 9])
    closure = lambda: (  # noqa: E731
        lambda z: (F.cross_entropy(z, torch.arange(2)), z)
    )(model(x, which)[[7, 9]])
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = mixadv.wrap(base, model, mixadv.MAT(particles=2), site="input:x")
    with pytest.raises(mixadv.GameError, match="map of 4 rows to samples"):
        optimizer.step(closure)


class Counted(Graphs):
    """Predicts for graphs without a node too."""

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        hidden = torch.tanh(self.node(x))
        return self.out(hidden.new_zeros(4, 8).index_add(0, batch, hidden))


@pytest.mark.parametrize("which", [[0, 0, 1, 1, 2], [0, 1, 1, 3, 3], [1, 2, 3, 3, 3]])
def test_graphs_without_a_node_are_named(which: list[int]):
    model = Counted()

    def closure() -> Any:
        logits = model(torch.ones(5, 5), torch.tensor(which))
        return F.cross_entropy(logits, torch.arange(4) % 2), logits

    empty = min(set(range(4)) - set(which))
    with pytest.raises(mixadv.GameError, match=f"of sample {empty}, .*empty graphs"):
        first_points(model, mixadv.FGM(), closure, site="input:x")


@pytest.mark.parametrize("solver", [mixadv.FGM(), mixadv.MAT(play_as="mean"), mixadv.SMART()])
@pytest.mark.parametrize("nodes", [[0, 3], [0, 0, 1, 1, 1]])
def test_in_a_later_round_graphs_without_a_node_play_or_are_named(nodes: Any, solver: Any):
    """Of more graphs than nodes torch would tell which index is out of bounds."""
    model = Counted()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = mixadv.wrap(base, model, solver, site="input:x")

    def closure(which: list[int]) -> Any:
        logits = model(torch.ones(len(which), 5), torch.tensor(which))
        return F.cross_entropy(logits, torch.arange(4) % 2, reduction="none"), logits

    optimizer.step(lambda: closure([0, 1, 2, 2, 3]))
    if nodes == [0, 3]:
        with pytest.raises(mixadv.GameError, match=r"belongs to sample [35].*empty graphs"):
            optimizer.step(lambda: closure(nodes))
    else:
        optimizer.step(lambda: closure(nodes))


def test_a_row_of_a_sample_that_is_not_predicted_is_named():
    with pytest.raises(mixadv.GameError, match=r"sample 2.*room for 2"):
        by_row(torch.ones(1, 2), torch.ones(1, 4, 3), torch.tensor([0, 1, 1, 2]))


def test_whose_a_row_is_is_asked_for_where_it_is_not_told():
    class Unnamed(Graphs):
        def forward(self, x: Tensor, which: Tensor) -> Tensor:
            return super().forward(x, which)

    model, x, which = Unnamed(), torch.randn(4, 5), torch.tensor([0, 0, 1, 1])
    closure = lambda: (lambda z: (F.cross_entropy(z, torch.arange(2)), z))(model(x, which))  # noqa: E731
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = mixadv.wrap(base, model, mixadv.MAT(particles=2), site="input:x")
    with pytest.raises(
        mixadv.GameError, match=r"2 predictions and 4 rows.*named batch or segments"
    ):
        optimizer.step(closure)
