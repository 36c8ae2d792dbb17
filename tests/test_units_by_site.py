"""Of a site of several modules each has a unit of its own: lengths there are in that one."""

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mixadv
from mixadv.errors import GameError
from mixadv.model import parallel
from mixadv.model.site import first_of, with_first
from mixadv.players.strategy import Strategy
from mixadv.round.unit import mean_lengths
from tests.worlds import added, assert_resumes
from tests.zoo import Player, assert_same, fingerprint, player, wrapped

SITES = {
    "bert": ["bert.embeddings.word_embeddings", "bert.encoder.layer.1"],
    "llama": ["model.embed_tokens", "model.layers.1"],
}
BEHIND = {"bert": "bert.pooler", "llama": "model.norm"}  # what reads the last layer, and alone
families = pytest.mark.parametrize("family", SITES)


def world(family: str) -> Player:
    """A model without dropout in float64, whose embedding is small beside its layers."""
    one = player(family, rows=4)
    one.model.double().eval()
    with torch.no_grad():
        one.model.get_input_embeddings().weight.mul_(0.1)
    return one


def losses_and_logits(one: Player) -> tuple[Tensor, Tensor]:
    inputs = {name: value for name, value in one.batch.items() if name != "labels"}
    logits = one.model(**inputs).logits
    return F.cross_entropy(logits, one.batch["labels"], reduction="none"), logits


def real(one: Player) -> Tensor:
    return one.batch["attention_mask"] > 0


def clean(one: Player, site: list[str]) -> dict[str, Tensor]:
    """Return what each module of the site returns without δ."""
    kept: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in site:
            hook = one.model.get_submodule(name).register_forward_hook(
                lambda *call, n=name: kept.update({n: first_of(call[2])})
            )
            hooks.callback(hook.remove)
        with torch.no_grad():
            losses_and_logits(one)
    return kept


def units_of(one: Player, site: list[str]) -> dict[str, float]:
    """Return the mean length of a real token's output at each module."""
    found = clean(one, site)
    return {name: float(found[name][real(one)].norm(dim=-1).mean()) for name in site}


def deltas_of(game: mixadv.Game) -> list[Tensor]:
    """Return what was added to the output of each module."""
    q = game.strategy
    return [unit * points[0] for unit, points in zip(q.units, q.points, strict=True)]


def attack(one: Player, site: Any, **words: Any) -> mixadv.Game:
    """Return a game after a round of projected ascent per token from zero."""
    solver = mixadv.PGD(**{"per": "token", "start": "zero", "steps": 2, **words})
    game = mixadv.Game(one.model, solver, site)
    game.backward(lambda: losses_and_logits(one))
    return game


def ascended(
    one: Player, site: list[str], radius: float, rate: float, steps: int, normalize: str
) -> list[Tensor]:
    """Return δ at each module after an ascent written out, in balls of each token."""
    units, found = units_of(one, site), clean(one, site)
    modules = [one.model.get_submodule(name) for name in site]
    points = [torch.zeros_like(found[name], requires_grad=True) for name in site]
    adam = torch.optim.Adam(points, lr=rate, maximize=True)
    for _ in range(steps):
        deltas = [unit * point for unit, point in zip(units.values(), points, strict=True)]
        with added(*zip(modules, deltas, strict=True)):
            losses, _ = losses_and_logits(one)
        slopes = torch.autograd.grad(losses.sum(), points)
        with torch.no_grad():
            for point, slope in zip(points, slopes, strict=True):
                point.grad = slope * real(one)[..., None]
                if normalize == "steepest":
                    length = point.grad.norm(dim=-1, keepdim=True)
                    point += rate * torch.where(length > 0, point.grad / length, 0.0)
            if normalize == "adam":
                adam.step()
            for point in points:
                length = point.norm(dim=-1, keepdim=True)
                point *= torch.where(length > radius, radius / length, 1.0)
    return [unit * point.detach() for unit, point in zip(units.values(), points, strict=True)]


# What is played -----------------------------------------------------------------------------------


@families
def test_each_token_is_moved_by_the_radius_in_the_unit_of_its_site(family: str) -> None:
    """So each module has a ball of its own, and the length of one does not tell on the other's."""
    one, site = world(family), SITES[family]
    units = units_of(one, site)
    assert max(units.values()) > 2 * min(units.values())  # else one unit for both would do
    game = attack(one, site, radius=0.3, step_size=9.0)
    assert game.unit == pytest.approx(units)
    for delta, unit in zip(deltas_of(game), units.values(), strict=True):
        lengths, moves = delta.norm(dim=-1), delta.any(-1)
        torch.testing.assert_close(lengths[moves], torch.full_like(lengths[moves], 0.3 * unit))
        assert moves.any()
        assert not moves[~real(one)].any()


@pytest.mark.parametrize("normalize", ["steepest", "adam"])
@families
@settings(max_examples=6)
@given(radius=st.floats(0.05, 0.6), rate=st.floats(0.02, 0.3), steps=st.integers(1, 3))
def test_an_ascent_at_several_layers_is_the_one_written_out(
    family: str, normalize: str, radius: float, rate: float, steps: int
) -> None:
    one, site = world(family), SITES[family]
    words = {"radius": radius, "step_size": rate, "steps": steps, "normalize": normalize}
    game = attack(one, site, **words)
    expected = ascended(one, site, radius, rate, steps, normalize)
    for found, wanted, unit in zip(deltas_of(game), expected, game.strategy.units, strict=True):
        slack = 1e-4 if family == "llama" else 1e-7  # whose norms compute in fp32
        torch.testing.assert_close(found, wanted, rtol=slack, atol=slack * unit)
        assert found.any()


@contextmanager
def scaled(one: Player, layer: str, behind: str, factor: float):
    """Let a layer return a multiple of what it does, which is undone where it is read."""
    up = one.model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: with_first(output, factor * first_of(output))
    )
    down = one.model.get_submodule(behind).register_forward_pre_hook(
        lambda module, args: (args[0] / factor, *args[1:])
    )
    yield
    up.remove()
    down.remove()


@families
@settings(max_examples=6)
@given(factor=st.floats(0.01, 100.0))
def test_scaling_one_layer_scales_its_delta_and_leaves_that_of_the_other(
    family: str, factor: float
) -> None:
    one, site = world(family), SITES[family]
    before = attack(one, site, radius=0.3)
    with scaled(one, site[1], BEHIND[family], factor):
        after = attack(one, site, radius=0.3)
    slack = {"rtol": 1e-4, "atol": 1e-6} if family == "llama" else {"rtol": 1e-7, "atol": 1e-9}
    for first, then in zip(before.strategy.points, after.strategy.points, strict=True):
        torch.testing.assert_close(then, first, **slack)
    ratio = {name: after.unit[name] / before.unit[name] for name in site}
    assert ratio == pytest.approx({site[0]: 1.0, site[1]: factor}, rel=1e-6)


def test_the_radius_of_the_outcome_is_in_the_unit_of_each_site() -> None:
    one = world("bert")
    outcome = attack(one, SITES["bert"], radius=0.3, step_size=9.0).outcome
    moved = clean(one, SITES["bert"])
    with torch.no_grad():  # the pooler reads the first token of the last layer alone
        first, rest = 1, int(real(one).sum()) / len(moved[SITES["bert"][0]])
    assert float(outcome.radius) == pytest.approx(0.3 * (1 + first / rest) / 2)
    assert int(outcome.positions) == 2 * int(real(one).sum())


def test_particles_of_a_mixed_strategy_lie_in_the_ball_of_each_site() -> None:
    one, site = world("bert"), SITES["bert"]
    solver = mixadv.MAT(per="token", radius=0.3, play_as="ensemble", learner_steps=1)
    optimizer = wrapped(one, solver, site=site)
    optimizer.step(lambda: losses_and_logits(one))
    q, units = optimizer.game.strategy, units_of(world("bert"), site)
    assert q.size > 1
    assert [*q.units] == pytest.approx([*units.values()])
    assert all(float(p.norm(dim=-1).max()) <= 0.3 * (1 + 1e-6) for p in q.points)


# One number, as before ----------------------------------------------------------------------------

SOLVERS = ("pgd", "freelb", "smart", "mat")


def after_rounds(family: str, name: str, site: Any, unit: Any = None) -> dict[str, Any]:
    one = player(family, rows=4)
    optimizer = wrapped(one, name, site=site)
    optimizer.game.rounds.arena.calibrate(unit=unit)
    for _ in range(2):
        optimizer.step(one.closure())
    return {**fingerprint(one.model), "identities": None, "unit": optimizer.game.unit}


@pytest.mark.parametrize("name", SOLVERS)
@families
def test_one_module_in_a_list_is_one_module(family: str, name: str) -> None:
    for site in SITES[family]:
        alone, listed = (after_rounds(family, name, s) for s in (site, [site]))
        assert isinstance(alone["unit"], float)
        assert_same(alone, listed)


@pytest.mark.parametrize("name", SOLVERS)
@families
def test_equal_units_are_one_unit_bit_for_bit(family: str, name: str) -> None:
    site = SITES[family]
    one, each = (after_rounds(family, name, site, u) for u in (0.37, dict.fromkeys(site, 0.37)))
    assert (one.pop("unit"), each.pop("unit")) == (0.37, dict.fromkeys(site, 0.37))
    assert_same(one, each)


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pgd", "freeat", "mat"])
def test_a_run_with_two_units_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    def build(seed: int) -> tuple[Player, mixadv.GameOptimizer]:
        one = player("bert", rows=4, seed=seed)
        return one, wrapped(one, name, site=SITES["bert"])

    assert_resumes(build, tmp_path, 2, 2)


def test_a_state_with_one_number_for_several_modules_still_loads() -> None:
    one, site = world("bert"), SITES["bert"]
    game = attack(one, site)
    state = {**game.state_dict(), "unit": 0.5}
    game.load_state_dict(state)
    game.backward(lambda: losses_and_logits(one))
    assert game.unit == game.state_dict()["unit"] == 0.5
    assert game.strategy.units == (0.5, 0.5)
    assert game.strategy.unit == 0.5


BROKEN = {
    "another site": (
        {"bert.encoder.layer.0": 1.0},
        r"units at the modules .*layer\.0.* same site=",
    ),
    "one is missing": ({SITES["bert"][0]: 1.0}, r"units at the modules .* same site="),
    "no number": (dict.fromkeys(SITES["bert"], "1"), "load what state_dict"),
    "not a number": (dict.fromkeys(SITES["bert"], float("nan")), "load what state_dict"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_units_of_another_site_are_refused(case: str) -> None:
    unit, said = BROKEN[case]
    game = attack(world("bert"), SITES["bert"])
    before = game.state_dict()
    with pytest.raises(ValueError, match=said):
        game.load_state_dict({**before, "unit": unit})
    assert_same(game.state_dict(), before)


def test_a_strategy_is_saved_with_the_unit_of_each_call() -> None:
    q = attack(world("bert"), SITES["bert"]).strategy
    again = Strategy.from_state_dict(q.state_dict())
    assert again.units == q.units
    assert len({*q.units}) == 2
    for same in (q.mean(), q.detach(), q.reweight(q.log_weights), q.lerp(q, 0.5), q.sample()):
        assert same.units == q.units
    with pytest.raises(GameError, match=r"read strategy\.units"):
        q.unit  # noqa: B018
    old = {**q.state_dict(), "unit": 2.5}
    assert Strategy.from_state_dict(old).units == (2.5, 2.5)


# What is said, and refused ------------------------------------------------------------------------


@families
def test_the_explanation_names_the_unit_of_each_site(family: str) -> None:
    one, site = world(family), SITES[family]
    units = units_of(one, site)
    game = mixadv.Game(one.model, mixadv.PGD(radius=0.3), site)
    assert "at each, measured at the first round" in str(game.explain())
    for _ in range(2):
        told = game.explain(lambda: losses_and_logits(one))
        assert told.unit == pytest.approx(units)
        assert told.radius == pytest.approx({name: 0.3 * unit for name, unit in units.items()})
        for name, unit in units.items():
            assert f"{unit:.4g} at {name}" in str(told)
            assert f"{0.3 * unit:.4g} at {name}" in str(told)
        game.backward(lambda: losses_and_logits(one))


def test_a_module_that_is_never_called_has_no_unit() -> None:
    one = world("bert")
    one.model.unused = torch.nn.Linear(2, 2)
    site = [SITES["bert"][0], "unused"]
    with pytest.raises(GameError, match=r"at the site 'unused' is nan.*is not called"):
        attack(one, site)
    game = attack(one, site, unit="absolute")
    assert [*game.unit] == site[:1]
    game.load_state_dict(game.state_dict())


def test_a_module_that_is_named_twice_is_refused() -> None:
    one = world("bert")
    name = SITES["bert"][0]
    for twice in ([name, name], [name, one.model.get_input_embeddings()], ["input", "input"]):
        with pytest.raises(ValueError, match="twice"):
            mixadv.Game(one.model, mixadv.PGD(), twice)


def test_units_follow_a_model_that_is_wrapped_later() -> None:
    one, site = world("bert"), SITES["bert"]
    game = attack(one, site)
    before = dict(game.unit)
    game.rounds.arena.follow(torch.compile(one.model, backend="eager"))
    assert game.unit == before
    assert game.site.names == site
    game.close()


def test_processes_share_the_mean_at_each_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, of which the other has a length of 9 in each of three tokens."""
    arena = attack(world("bert"), SITES["bert"]).rounds.arena
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "add_up", lambda x: x.add_(torch.tensor([27.0, 3.0])))
    first, second = SITES["bert"]
    noted = [(second, torch.tensor([4.0, 2.0])), (first, torch.tensor([1.0, 1.0]))]
    found = mean_lengths(arena, [*noted, (second, torch.tensor([2.0, 1.0]))])
    assert found == {first: 28 / 4, second: 33 / 6}
