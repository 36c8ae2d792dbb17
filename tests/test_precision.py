"""Number formats, and what a round puts back: random state, dropout masks, statistics."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from tests.test_game import SOLVERS, masked
from tests.zoo import (
    USUAL,
    WAYS,
    Player,
    assert_same,
    copies,
    or_refused,
    overflow,
    player,
    stepwise,
    without_dropout,
    wrapped,
)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Bag(nn.Module):
    """Remembers what its first layer read, and the dropout mask of each pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(20, 8)
        self.layer = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)
        nn.init.normal_(self.words.weight)
        self.read: list[Tensor] = []
        self.masks: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        self.read.append(x.detach())
        mask = self.dropout(torch.ones_like(x))
        self.masks.append(mask.detach())
        return self.head((self.layer(x) * mask).tanh().mean(1))


def classify(model: nn.Module, scale: float = 1.0) -> Callable[[], tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (4, 5), generator=draw)
    labels = torch.arange(4) % 3

    def closure() -> tuple[Tensor, Tensor]:
        logits = model(ids)
        return scale * F.cross_entropy(logits, labels), logits

    return closure


# Autocast ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*noise floor")  # of a tiny model in bf16
@pytest.mark.parametrize(
    ("family", "name"), [("bert", n) for n in mixadv.SOLVERS] + [("vision", n) for n in USUAL]
)
@or_refused()
def test_autocast_around_the_rounds_keeps_no_stale_weights(family: str, name: str) -> None:
    """Autocast caches low-precision copies of the weights until its outermost context ends."""
    weights = []
    for by_hand in (False, True):
        p = player(family, rows=4)
        optimizer = wrapped(p.model, name)
        if by_hand:
            optimizer.base.register_step_post_hook(lambda *_: torch.clear_autocast_cache())
        with bf16():
            for _ in range(3):
                optimizer.step(p.closure())
        assert all(q.grad is None for q in p.model.parameters())
        weights.append(copies(p.model.parameters()))
    assert_same(*weights)


# `game.backward` plays the passes of `step` up to the first that is followed by a step.
WITHIN = [(n, w) for n in mixadv.SOLVERS for w in WAYS if w != "backward" or n in USUAL]


@pytest.mark.filterwarnings("ignore:.*noise floor")  # of a tiny model in bf16
@pytest.mark.parametrize(("name", "way"), WITHIN)
@or_refused()
def test_autocast_within_the_closure_is_autocast_around_the_rounds(name: str, way: str) -> None:
    weights = []
    for around in (False, True):
        p = player("bert", rows=4)
        optimizer = wrapped(p.model, name)

        def closure(p: Player = p, around: bool = around) -> Any:
            with nullcontext() if around else bf16():
                return p.closure()()

        for _ in range(2):
            with bf16() if around else nullcontext():
                if way == "loss":
                    loss = optimizer.game.loss(closure)
                elif way == "backward":
                    optimizer.game.backward(closure)
                else:
                    optimizer.step(closure)
            if way == "loss":
                loss.backward()
            if way != "step":
                optimizer.step()
            optimizer.zero_grad()
        weights.append(copies(p.model.parameters()))
    assert_same(*weights)


@pytest.mark.filterwarnings("ignore:.*moves the weights by less")  # in bf16
@pytest.mark.filterwarnings("ignore:.*noise floor")
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_weights_in_bf16_are_trained_like_those_of_full_precision_within_rounding(
    name: str,
) -> None:
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Bag()
        model.dropout.p = 0.0
        model.to(torch.bfloat16).to(dtype)  # the same weights
        before = [q.float() for q in copies(model.parameters())]
        optimizer = wrapped(model, name)
        optimizer.param_groups[0]["lr"] = 5.0  # bf16 rounds smaller steps away
        optimizer.step(classify(model))
        assert all(q.dtype == dtype for q in model.parameters())
        after = [q.detach().float() for q in model.parameters()]
        moved.append(torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]))
    assert F.cosine_similarity(*moved, dim=0) > 0.98


@pytest.mark.filterwarnings("ignore:.*noise floor")  # of a tiny model in bf16
@pytest.mark.parametrize("checkpoints", ["no", "reentrant"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused()
def test_an_ascent_under_autocast_reaches_no_weight(name: str, checkpoints: str) -> None:
    p = player("bert", rows=4)
    optimizer = wrapped(p.model, name)
    game = optimizer.game
    reached: list[int] = []
    with bf16():
        optimizer.step(p.closure())
        # As the first round finds it out.
        arena, leaf = game.rounds.arena, checkpoints == "reentrant"
        arena.calibration = replace(arena.calibration, leaf_backward=leaf)
        p.model.bert.encoder.layer[0].intermediate.dense.weight.register_hook(
            lambda _: reached.append(torch._C._current_graph_task_id())
        )
        optimizer.step(p.closure())
    assert len(set(reached)) == game.outcome.theta_backwards
    if game.solver.compares is not None and game.solver.steps:
        assert game.outcome.payoff.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:CAT starts below the noise floor")
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_gradients_under_autocast_are_those_of_full_precision_within_rounding(name: str) -> None:
    seen = []
    for low in (False, True):
        model = Bag()
        optimizer = wrapped(model, name)
        taken = stepwise(optimizer)
        with bf16() if low else nullcontext():
            optimizer.step(classify(model))
        seen.append(torch.cat([g.flatten() for g in taken[0].values()]))
        assert seen[-1].dtype == torch.float32
    assert F.cosine_similarity(*seen, dim=0) > 0.99


@pytest.mark.parametrize("name", ["pgd", "vat", "r3f", "alum", "smart", "mat"])
def test_a_divergence_of_ones_own_is_computed_in_fp32(name: str) -> None:
    modes: list[bool] = []

    def distance(perturbed: Tensor, clean: Tensor) -> Tensor:
        modes.append(torch.is_autocast_enabled("cpu"))
        return ((perturbed - clean) @ torch.eye(3, dtype=clean.dtype)).square().sum(-1)

    model = Bag()
    key = "payoff" if name == "pgd" else "divergence"
    with bf16():
        outcome = wrapped(model, name, **{key: distance}).game.backward(classify(model))
    assert modes
    assert not any(modes)
    assert name == "r3f" or outcome.payoff.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*noise floor")
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_gradient_that_overflows_under_autocast_costs_its_own_sample(name: str) -> None:
    model = Bag()
    model.dropout.p = 0.0

    model.layer.register_forward_pre_hook(overflow)
    # FreeAT's weights have the gradient too; MAT's mean remembers its start.
    settings = {"freeat": {"steps": 1}, "mat": {"damping": 0.0}}.get(name, {})
    optimizer = wrapped(model, name, **settings)
    with bf16():
        optimizer.step(classify(model))
    carried = optimizer.game.rounds.memory.get("delta")
    delta = carried[0] if carried else optimizer.game.strategy.points[0][0]
    if name in ("noise", "r3f"):
        assert optimizer.outcome.nonfinite is None
        return
    assert int(optimizer.outcome.nonfinite) == 1
    assert not delta[1].any()
    assert delta.isfinite().all()
    assert delta[[0, 2, 3]].flatten(1).any(1).all()


# Low-precision models ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*moves the weights by less")  # in bf16
@pytest.mark.filterwarnings("ignore:.*noise floor")  # of CAT's small radius in bf16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_delta_and_its_sum_with_the_embedding_are_at_least_fp32(
    name: str, dtype: torch.dtype
) -> None:
    model = Bag().to(dtype)
    model.dropout.p = 0.0
    one = {"particles": 1} if name == "mat" else {}
    optimizer = wrapped(model, name, start_size=0.2, **one)
    wide = torch.promote_types(dtype, torch.float32)
    optimizer.param_groups[0]["lr"] = 0.0
    closure, game = classify(model), optimizer.game
    optimizer.step(closure)
    model.read.clear()
    optimizer.step(closure)
    points, table = game.strategy.points[0], model.words.weight.detach()
    assert points.dtype == game.strategy.log_weights.dtype == wide
    clean = table[torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(0))]
    expected = (clean.to(wide) + game.unit * points[0]).to(dtype)
    assert any(torch.equal(read, expected) for read in model.read)
    if dtype == torch.bfloat16:  # the test tells the two sums apart
        assert not torch.equal(expected, clean + (game.unit * points[0]).to(dtype))
    if game.solver.gain != "loss" and game.solver.steps:
        assert game.outcome.payoff.dtype == wide


@given(exponent=st.integers(-8, 12))
def test_gradients_of_half_precision_models_are_normalised_without_overflow(exponent: int) -> None:
    """Their L2 norm overflows in fp16 long before an entry does, and 1e-8 is 0 there."""
    directions = []
    for scale in (1.0, 2.0**exponent):
        model = Bag().half().eval()
        game = mixadv.Game(model, mixadv.FGM())
        game.backward(classify(model, scale), backward=lambda loss: loss.backward())
        assert game.outcome.nonfinite == 0
        assert game.outcome.radius == pytest.approx(game.solver.radius, rel=1e-4)
        directions.append(game.strategy.points[0].flatten(2)[0])
    cosines = F.cosine_similarity(*directions, dim=1)
    assert (cosines > 0.99).all()


# The noise floor ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*moves the weights by less")  # in bf16
@pytest.mark.parametrize("how", ["autocast", "model"])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_a_radius_that_bf16_swallows_is_warned_of(name: str, how: str) -> None:
    p = player("bert", rows=8)
    if how == "model":
        p.model.bfloat16()
    optimizer = wrapped(p.model, name, radius=1e-5, unit="absolute")
    with (
        bf16() if how == "autocast" else nullcontext(),
        pytest.warns(UserWarning, match="noise floor"),
    ):
        optimizer.step(p.closure())


# A radius is the solver's, what fp32 swallows is the site's: the others have the smallest too.
FLOORS = [(n, "bert") for n in mixadv.SOLVERS]
FLOORS += [(n, family) for n in (*USUAL, "cat") for family in ("gpt2", "t5", "vision")]


@pytest.mark.parametrize(("name", "family"), FLOORS)
@or_refused()
def test_default_radii_are_above_the_noise_floor_in_fp32(
    name: str, family: str, recwarn: pytest.WarningsRecorder
) -> None:
    p = player(family, rows=8)
    wrapped(p.model, name).step(p.closure())
    assert not recwarn.list


# What a round puts back --------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
@or_refused("vision")
def test_running_statistics_end_as_after_one_forward_per_step(name: str, fresh: bool) -> None:
    p = player("vision", rows=8)
    p.model.dropout.p = 0.0
    optimizer = wrapped(p.model, name, fresh_dropout=fresh)
    after: list[list[Tensor]] = []  # of the first forward since the last step
    waiting = [True]

    def closure() -> Any:
        result = p.forward(p.model, p.batch)
        if waiting[0]:
            after.append(copies(p.model.buffers()))
        waiting[0] = False
        return result

    optimizer.step(closure)
    optimizer.base.register_step_post_hook(lambda *_: waiting.__setitem__(0, True))
    for _ in range(2):
        waiting[0], steps = True, p.model.normalise.num_batches_tracked.item()
        optimizer.step(closure)
        assert_same(copies(p.model.buffers()), after[-1])
        assert p.model.normalise.num_batches_tracked == steps + optimizer.outcome.steps


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_the_random_state_ends_where_one_forward_per_step_leaves_it(name: str, fresh: bool) -> None:
    p = player("bert", rows=4)
    optimizer = wrapped(p.model, name, fresh_dropout=fresh)
    for round_ in range(2):
        torch.manual_seed(round_)
        optimizer.step(p.closure())
        state = torch.get_rng_state()
        torch.manual_seed(round_)
        for _ in range(optimizer.outcome.steps):
            p.closure()()
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_passes_between_two_steps_share_a_dropout_mask(name: str, fresh: bool) -> None:
    """A new mask follows each step; on request, each pass."""
    solver = masked(name, fresh)
    if isinstance(solver, mixadv.MAT):
        solver = replace(solver, learner_steps=2)
    model = Bag()
    optimizer = wrapped(model, solver)
    optimizer.step(classify(model))
    model.masks.clear()
    between: list[list[Tensor]] = []

    def close(*_: Any) -> None:
        between.append([*model.masks])
        model.masks.clear()

    optimizer.base.register_step_post_hook(close)
    for _ in range(2):
        optimizer.step(classify(model))
    assert not model.masks
    for group in between:
        same = [torch.equal(mask, group[0]) for mask in group[1:]]
        assert not any(same) if fresh else all(same)
    firsts = {tuple(group[0].flatten().tolist()) for group in between}
    assert len(firsts) == len(between) > 1


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@given(training=st.lists(st.booleans(), min_size=2, max_size=2))
@or_refused("vision")
def test_training_and_evaluation_modes_are_left_alone(name: str, training: list[bool]) -> None:
    """Also a mixture of them, such as a frozen BatchNorm in a model that trains."""
    p = player("vision", rows=8)
    p.model.normalise.train(training[0])
    p.model.dropout.train(training[1])
    found = [m.training for m in p.model.modules()]
    seen: list[list[bool]] = []

    def closure() -> Any:
        seen.append([m.training for m in p.model.modules()])
        return p.forward(p.model, p.batch)

    wrapped(p.model, name).step(closure)
    assert [m.training for m in p.model.modules()] == found
    assert all(modes == found for modes in seen)


# A format of the ascent's own -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pgd", "vat", "alum", "smart", "mat", "creat"])
def test_an_ascent_in_bf16_leaves_the_learners_passes_alone(name: str):
    """Its δ is that of full precision within rounding, and where δ is given, so is all else."""
    p = player("bert", rows=6)
    without_dropout(p.model)
    seen: list[tuple[bool, torch.dtype]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((module.weight.requires_grad, output.dtype))

    p.model.bert.encoder.layer[0].output.dense.register_forward_hook(note)
    points = []
    for dtype in (None, torch.bfloat16):
        words = {"ascent_dtype": dtype, "start_size": 0.2, "radius": 0.2}
        words |= {"proximal_weight": 0.0} if name == "smart" else {}
        optimizer = wrapped(p, name, lr=0.0, **words)
        optimizer.step(p.closure())
        seen.clear()
        optimizer.game.rounds.round = 0
        optimizer.step(p.closure())
        formats = {(frozen, kind) for frozen, kind in seen}
        assert (True, torch.float32) in formats
        assert ((False, torch.bfloat16) in formats) == (dtype is not None)
        assert (True, torch.bfloat16) not in formats
        points.append(optimizer.game.strategy.points[0].flatten(2))
    # A sample whose predictions its start hardly moves follows the rounding.
    assert F.cosine_similarity(*points, dim=2).median() > 0.99


@pytest.mark.parametrize("solver", [mixadv.FreeLB, mixadv.TextAT, mixadv.CAT, mixadv.R3F])
def test_a_format_for_an_ascent_without_passes_of_its_own_is_refused(solver: Any):
    p = player("bert", rows=2)
    with pytest.raises(ValueError, match=r"in the learner's own passes.*autocast around"):
        mixadv.Game(p.model, solver(ascent_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16, 'bfloat16' or None"):
        solver(ascent_dtype=torch.float16)
