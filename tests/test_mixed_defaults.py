"""What is mixed at the defaults, and how well it plays through `mixadv.wrap`.

Matrix games as models: the learner is a point of the simplex, moved by SGD and projected, and δ
picks a column. MAT differs from its defaults in three words. `divergence` is what δ gains in the
game, not a symmetric KL. `temperature` is 0.1: with two or three columns all chains climb to the
same one unless noise parts them, and in each of a few coordinates Langevin noise √(2·η·τ) is as
long as the step at 0.1, where an encoder has thousands. `learner_temperature` is 0, since its noise
would leave the simplex. With more particles, the second row, the strategy in play is nearer to the
equilibrium; η is smaller then, or the best of eight would take all the weight.
"""

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mixadv
from tests.games_zoo import Table, gain
from tests.zoo import player, wrapped
from theory import oracles

PENNIES = np.array([[1.0, -1.0], [-1.0, 1.0]])
ROCK = np.array([[0.0, 3.0, -1.0], [-3.0, 0.0, 2.0], [1.0, -2.0, 0.0]]) / 3
GAMES = {"pennies": PENNIES, "weighted rock, paper, scissors": ROCK}
# More particles, and of PGD's exploitability the share that is left.
MORE: dict[str, tuple[dict[str, Any], float]] = {
    "two": ({}, 0.9),
    "eight": ({"particles": 8, "mirror_step": 0.25}, 0.75),
}
# Each game and each number of particles once; all of them with other seeds are slow.
PLAYED = [(name, more, 0) for name, more in zip(GAMES, MORE, strict=True)]
PLAYED += [
    pytest.param(name, more, seed, marks=pytest.mark.slow)
    for name, more, seed in itertools.product(GAMES, MORE, (1, 2))
]
WORDS = {"divergence": gain, "temperature": 0.1, "learner_temperature": 0.0}
PURE = {"steps": 1, "step_size": 0.2, "start": "normal", "start_size": 0.05}


def trained(gains: np.ndarray, solver: mixadv.Solver, seed: int) -> tuple[Tensor, Tensor]:
    """Both players' mixed strategies in each of 400 rounds, `[400, B, ·]`."""
    rows, rate = 16, 0.05
    theta = torch.rand(rows, len(gains), generator=torch.Generator().manual_seed(seed))
    table = Table(gains, theta / theta.sum(1, keepdim=True))
    base = torch.optim.SGD(table.parameters(), lr=rate * rows)
    base.register_step_post_hook(lambda *_: table.project())
    optimizer = mixadv.wrap(base, table, solver, site="input", seed=seed)
    x, y = [], []
    for _ in range(400):
        x.append(table.theta.detach().clone())
        optimizer.step(table.closure)
        q = optimizer.game.strategy
        y.append((q.weights[..., None] * table.columns(q.points[0] * q.unit)).sum(0))
    return torch.stack(x), torch.stack(y)


def left_to_learner(gains: np.ndarray, y: Tensor) -> Tensor:
    """What a learner who knows the adversary's strategy gains, below the value."""
    return oracles.equilibrium(gains).value - (y @ torch.tensor(gains).T).amin(-1)


@functools.cache
def left_by_pgd(name: str, seed: int) -> Tensor:
    _, pure = trained(GAMES[name], mixadv.PGD(payoff=gain, **PURE), seed)
    return left_to_learner(GAMES[name], pure)[200:].mean()


@pytest.mark.parametrize(("name", "more", "seed"), PLAYED)
def test_means_over_time_are_an_equilibrium_and_play_is_less_exploitable_than_pgds(
    name, more, seed
):
    """Sixteen replicates, each with draws and a start of its own, for each seed."""
    gains, (words, share) = GAMES[name], MORE[more]
    solver = mixadv.MAT(**WORDS, **words, particle_batching="stack")  # the same, in less time
    x, y = trained(gains, solver, seed)
    means = left_to_learner(gains, y.mean(0)), left_to_learner(-gains.T, x.mean(0))
    for reached in means:
        assert reached.mean() < 0.05
        assert reached.max() < 0.12
    assert left_to_learner(gains, y)[200:].mean() < share * left_by_pgd(name, seed)


# At the defaults ---------------------------------------------------------------------------------


def test_mat_mixes_at_its_defaults_and_says_so():
    bert = player("bert", rows=8)
    optimizer = wrapped(bert.model, mixadv.MAT())
    game = optimizer.game
    assert "adversary mixed, 2 particles\n" in str(game.explain())
    optimizer.step(bert.closure())
    outcome, q = optimizer.outcome, game.strategy
    assert q.size == 2
    one, other = q.points[0]
    apart = (one - other).flatten(1).norm(dim=1)
    assert (apart > 0.05).all()  # of a radius of 0.2: in any direction but the same one
    eta = game.solver.mirror_step
    w = 1 / (1 + np.exp(-2 * eta))  # two payoffs that differ are 2η apart, whatever they are
    expected = np.exp(-w * np.log(w) - (1 - w) * np.log(1 - w))
    assert float(outcome.effective_particles) == pytest.approx(expected, rel=1e-5)
    told = str(game.explain())
    assert f"adversary mixed, {expected:.1f} effective of 2 particles\n" in told
    assert "learner   mixed, 2 Langevin samples per round, temperature 1e-05\n" in told


PURE_ONES = {
    "fgm": mixadv.FGM(),
    "smart": mixadv.SMART(),
    "the mean": mixadv.MAT(play_as="mean", learner_temperature=0.0),
    "one particle": mixadv.MAT(particles=1, learner_temperature=0.0),
}


@pytest.mark.parametrize("solver", PURE_ONES.values(), ids=PURE_ONES)
def test_pure_play_is_called_pure(solver):
    bert = player("bert", rows=4)
    optimizer = wrapped(bert.model, solver)
    optimizer.step(bert.closure())
    told = str(optimizer.game.explain())
    assert "adversary pure\n" in told
    assert "learner   pure\n" in told
    assert float(optimizer.outcome.effective_particles) == 1.0
    assert optimizer.outcome.entropy == 0.0


def test_a_path_is_called_as_many_particles_as_it_has_points():
    bert = player("bert", rows=4)
    optimizer = wrapped(bert.model, mixadv.MAT(particles=1, steps=2, points="path"))
    optimizer.step(bert.closure())
    effective = float(optimizer.outcome.effective_particles)
    assert 1.5 < effective <= 3
    assert f"adversary mixed, {effective:.1f} effective of 3 particles" in str(
        optimizer.game.explain()
    )
