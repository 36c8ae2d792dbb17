"""Published hyper-parameters: rows of the tables in our words, and what they make a round do."""

import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mixadv
from mixadv import FGM, MAT, PGD, R3F, SOLVERS, FreeAT, FreeLB, Game, Solver, TextAT
from mixadv.maths.langevin import noise_scale
from tests.worlds import gradients
from tests.zoo import player, without_dropout, wrapped

ROWS = [
    (cls, task, model)
    for cls in SOLVERS.values()
    for model, tasks in cls.presets.items()
    for task, words in tasks.items()
    if "box" not in words  # of images: test_images.py
]
IN_L2 = [row for row in ROWS if row[0] not in (MAT, R3F)]
LOGGED = [row for row in ROWS if row[0] is MAT]
every_row = pytest.mark.parametrize(("cls", "task", "model"), ROWS)


# What a row is -------------------------------------------------------------------------------

ROBERTA, ALBERT, BERT = "roberta-large", "albert-xxlarge-v2", "bert-base-uncased"
ASCENT = ("steps", "step_size", "start_size", "radius")
FRESH = {"fresh_dropout": True}
PURE = {"particles": 1, "points": "last", "play_as": "mean"}  # in released code
PURE |= {"mirror_step": 1.0, "mirror_unit": "absolute"}
TINY_BALL = {"norm": "linf", "normalize": "norm", "projection": "sphere", "temperature": 0.0}
LEARNER = {"learner_steps": 5, "learner_temperature": 0.0, "damping": 0.5, "round_damping": 0.5}
NO_START = {"norm": "linf", "radius": 1e-5, "smoothness_weight": 0.7}
# A solver's row of a task and a model: what `ASCENT` names, and what else is not the default.
BY_HAND = {
    "fairseq makes adv_steps + 1 passes": (FreeLB, "cola", ROBERTA, (4, 0.025, 0.4, 0.3), {}),
    "a start larger than the radius": (FreeLB, "sst2", ROBERTA, (3, 0.1, 1.0, 0.6), {}),
    "fp32": (FreeLB, "qqp", ROBERTA, (3, 0.2, 0.32, 0.7), {}),
    "fp16": (FreeLB, "qqp-fp16", ROBERTA, (3, 0.15, 0.32, 0.62), {}),
    "a norm of 0 is no ball": (FreeLB, "mrpc", ALBERT, (4, 0.03, 0.0, None), {}),
    "a ball for ALBERT": (FreeLB, "qqp", ALBERT, (3, 0.2, 0.32, 0.7), {}),
    "replays": (FreeAT, "cola", ROBERTA, (3, 0.05, 0.4, 0.2), {"carry": False}),
    "steps before the last pass": (PGD, "mnli", ROBERTA, (2, 0.1, 0.2, 0.2), {}),
    "tokens": (TextAT, "rte", BERT, (2, 0.02, 0.16, 0.14), FRESH),
    "noise": (R3F, "rte", ROBERTA, (), {**NO_START, **FRESH}),
    "mixed": (
        MAT,
        "sst2",
        ROBERTA,
        (5, 1e-3, 1e-5, 1e-5),
        {**TINY_BALL, **PURE, **LEARNER, **FRESH, "smoothness_weight": 1.0, "average": None},
    ),
}


@pytest.mark.parametrize("why", BY_HAND)
def test_a_row_is_that_of_the_table(why: str):
    cls, task, model, numbers, words = BY_HAND[why]
    published = cls.published(task, model=model)
    if cls is MAT:  # whose temperatures are derived
        published = replace(published, temperature=0.0, learner_temperature=0.0)
    assert published == cls(unit="absolute", **dict(zip(ASCENT, numbers, strict=False)), **words)


@every_row
def test_lengths_are_those_of_papers(cls: type[Solver], task: str, model: str):
    solver = cls.published(task, model=model)
    assert type(solver) is cls
    assert solver.unit == "absolute"


@every_row
def test_learning_rate_and_schedule_of_a_row_are_listed(cls: type[Solver], task: str, model: str):
    """By the docstring of the solver's file; two baselines of FreeLB are trained as it is."""
    documented = {PGD: FreeLB, FreeAT: FreeLB}.get(cls, cls)
    text = sys.modules[documented.__module__].__doc__
    numbers = r"+([\d.]+e-\d) +(\d+) +(\d+) +([\d.]+)\n"
    (listed,) = re.findall(f"^ +{model} +{task} {numbers}", text, re.MULTILINE)
    rate, batch, *_ = map(float, listed)
    assert 5e-6 <= rate <= 5e-5
    assert 8 <= batch <= 128
    assert documented is cls or "help(mixadv.solvers.freelb)" in inspect.getmodule(cls).__doc__


# What there is not ---------------------------------------------------------------------------

UNKNOWN: dict[str, tuple[Callable[[], Solver], tuple[str, ...]]] = {
    "a task by another spelling": (
        lambda: FreeLB.published("sst-2", model=ROBERTA),
        ("FreeLB", "'sst-2'", "Did you mean 'sst2'?", "mrpc"),
    ),
    "a row that ships zeros": (
        lambda: FreeLB.published("rte", model=ROBERTA),
        ("'rte'", ROBERTA, f"{ALBERT}: mnli"),
    ),
    "a precision": (
        lambda: PGD.published("qqp", model=ROBERTA),
        ("PGD", "Did you mean 'qqp-fp16'?"),
    ),
    "a model by another name": (
        lambda: MAT.published("cola", model="bert-base"),
        ("MAT", "'bert-base'", f"Did you mean '{BERT}'?", f"{BERT}: qnli, qqp"),
    ),
    "another model": (lambda: R3F.published("rte", model="gpt2"), ("'gpt2'", f"{ROBERTA}: rte")),
    "another solver": (
        lambda: FGM.published("rte", model=BERT),
        ("FGM", "no published hyper-parameters", "none"),
    ),
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_what_is_not_published_is_told_with_what_is(why: str):
    ask, expected = UNKNOWN[why]
    with pytest.raises(ValueError, match="published") as caught:
        ask()
    for word in expected:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", [n for n, cls in SOLVERS.items() if not cls.presets])
def test_a_solver_without_rows_says_so(name: str):
    with pytest.raises(ValueError, match="There are none"):
        SOLVERS[name].published("cola", model=ROBERTA)


# The start -----------------------------------------------------------------------------------


def formula(uniform: Tensor, lengths: list[int], init_mag: float, max_norm: float | None) -> Tensor:
    """The released code's δ_0, sample by sample: ±init_mag/√(length·D); then into the ball."""
    delta = torch.zeros_like(uniform)
    for i, length in enumerate(lengths):
        delta[i, :length] = uniform[i, :length] * init_mag / math.sqrt(length * uniform.shape[-1])
        norm = math.sqrt(sum(float(x) ** 2 for x in delta[i].flatten()))
        if max_norm is not None and norm > max_norm:
            delta[i] *= max_norm / norm
    return delta


@given(
    st.sampled_from(IN_L2),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_the_start_is_the_released_formula(row, lengths: list[int], width: int, seed: int):
    cls, task, model = row
    solver, columns = cls.published(task, model=model), cls.presets[model][task]
    draw = torch.Generator().manual_seed(seed)
    uniform = 2 * torch.rand(len(lengths), 6, width, generator=draw, dtype=torch.float64) - 1
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).double()[..., None]
    start = solver.begin(uniform, mask, lambda kind, like: uniform)
    assert solver.start == "uniform"
    expected = formula(uniform, lengths, columns["start_size"], columns["radius"])
    torch.testing.assert_close(start, expected)


@pytest.mark.parametrize(("cls", "task", "model"), IN_L2)
def test_the_start_has_the_published_size_over_the_root_of_three(cls, task, model):
    """√E‖δ_0‖² for uniform draws: those of N equal cells have the mean square (1 − 1/N²)/3."""
    count = 5 * 8
    cells = (2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1
    size = cls.presets[model][task]["start_size"]
    free = replace(cls.published(task, model=model), radius=None)
    start = free.begin(cells.view(1, 5, 8), None, lambda kind, like: cells.view(1, 5, 8))
    expected = size * math.sqrt((1 - 1 / count**2) / 3)
    assert float(start.norm()) == pytest.approx(expected, rel=1e-12)


def test_only_two_starts_are_larger_than_their_ball():
    """Where our projection of the start differs from released code, as the files say."""
    outside = {
        (cls.name, task)
        for cls, task, model in IN_L2
        for row in [cls.presets[model][task]]
        if row["radius"] is not None and row["start_size"] / math.sqrt(3) > row["radius"]
    }
    assert outside == {("freeat", "cola"), ("pgd", "cola")}


def test_noise_of_r3f_is_uniform_per_coordinate():
    noise = 2 * torch.rand(2, 3, 4, dtype=torch.float64) - 1
    start = R3F.published("rte", model=ROBERTA).begin(noise, None, lambda kind, like: noise)
    torch.testing.assert_close(start, 1e-5 * noise)


# The step of MAT -----------------------------------------------------------------------------


@given(st.sampled_from(LOGGED), st.integers(0, 20), st.floats(-8, 0))
def test_a_step_of_mat_is_rescaled_as_in_released_code(row, seed: int, scale: float):
    cls, task, model = row
    solver = replace(cls.published(task, model=model), temperature=0.0)
    torch.manual_seed(seed)
    gradient = 10**scale * torch.randn(3, 4, 5, dtype=torch.float64)
    delta = solver.begin(gradient, None, lambda kind, like: torch.randn_like(like))
    moved = solver.move(delta, gradient, None, lambda kind, like: torch.randn_like(like))
    for old, g, new in zip(delta, gradient, moved, strict=True):
        free = old + 1e-3 * g / g.abs().max()
        assert free.abs().max() > 1e-5
        torch.testing.assert_close(new, free * (1e-5 / free.abs().max()), atol=0.0, rtol=1e-12)


@pytest.mark.parametrize(("cls", "task", "model"), LOGGED)
def test_temperatures_of_mat_give_the_logged_noise(cls, task, model):
    solver = cls.published(task, model=model)
    ratio = 0.1 if (task, model) in {("qqp", BERT), ("sst2", BERT), ("qqp", ROBERTA)} else 0.2
    logged = math.sqrt(2 * 1e-3) * 1e-3 * ratio
    assert noise_scale(solver.step_size, solver.temperature) == pytest.approx(logged)
    for lr_now in (1e-5, 3e-6):
        logged = math.sqrt(2 * lr_now) * 1e-5 * ratio
        assert noise_scale(lr_now, solver.learner_temperature) == pytest.approx(logged)


# A round -------------------------------------------------------------------------------------


def play(solver: Solver) -> tuple[Game, mixadv.Outcome]:
    model, batch, _ = player("bert", rows=4)
    optimizer = wrapped(model, solver, torch.optim.AdamW, lr=1e-5)
    optimizer.step(lambda: model(**batch))
    assert all(p.isfinite().all() for p in model.parameters())
    return optimizer.game, optimizer.game.outcome


@every_row
def test_every_row_plays(cls: type[Solver], task: str, model: str):
    solver = cls.published(task, model=model)
    game, outcome = play(solver)
    assert outcome.objective.isfinite()
    assert not outcome.nonfinite
    assert float(outcome.radius) > 0
    if solver.radius is not None:
        (lengths,) = game.strategy.norms(solver.norm, solver.per)
        assert float(lengths.max()) <= solver.radius * (1 + 1e-5)


TINY = [(cls, task, model) for cls, task, model in ROWS if cls in (MAT, R3F)]


@pytest.mark.parametrize(("cls", "task", "model"), TINY)
def test_in_bf16_a_ball_of_1e_5_is_below_the_noise_floor(cls, task, model):
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="noise floor"):
        play(cls.published(task, model=model))


@pytest.mark.parametrize("solver", [MAT.published("qqp", model=ROBERTA), R3F(radius=1e-5)])
def test_with_so_small_a_ball_fresh_dropout_is_what_a_divergence_measures(solver: Solver):
    def regulariser(fresh: bool) -> float:
        learner = {"learner_steps": 1} if isinstance(solver, MAT) else {}
        _, outcome = play(replace(solver, unit="absolute", fresh_dropout=fresh, **learner))
        return float(outcome.objective - outcome.clean_loss)

    assert regulariser(fresh=True) > 1e3 * abs(regulariser(fresh=False))


def test_a_row_of_freelb_is_the_released_loop():
    """adv_steps + 1 passes, each over adv_steps + 1: columns of the script, loop by hand."""
    adv_lr, adv_steps, init_mag, max_norm = 2.5e-2, 3, 4e-1, 3e-1
    bert = player("bert", rows=4)
    model, batch = without_dropout(bert.model.double()), bert.batch
    game = Game(model, FreeLB.published("cola", model=ROBERTA))
    game.rounds.arena.noise.begin("adversary", 0, 0)
    uniform = game.rounds.arena.noise("uniform", torch.zeros(4, 9, 16, dtype=torch.float64))

    ids, mask = batch["input_ids"], batch["attention_mask"]
    delta = formula(uniform, mask.sum(1).tolist(), init_mag, None)
    embedding = model.get_input_embeddings()
    for _ in range(adv_steps + 1):
        delta.requires_grad_()
        inputs = embedding(ids) + delta
        loss = model(inputs_embeds=inputs, attention_mask=mask, labels=batch["labels"]).loss
        (loss / (adv_steps + 1)).backward()
        with torch.no_grad():
            for i in range(len(delta)):
                moved = delta[i] + adv_lr * delta.grad[i] / delta.grad[i].norm()
                delta[i] = moved * min(1.0, max_norm / float(moved.norm()))
        delta = delta.detach()
    expected = gradients(model)
    game.backward(bert.closure())
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)
