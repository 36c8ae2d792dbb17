"""How near to its bound each method of `mixadv.games` comes: worst gap ÷ bound over many games.

    python -m theory.worst --games 10000

plays random and awkward games of many shapes, scales and degeneracies and prints a table in
Markdown, in a few minutes. A ratio above 1 would be a bug, in the code or in the proof.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from mixadv.games import MatrixGame, solve
from theory import bounds, oracles

Array = NDArray[np.floating]
HORIZON = 400
TIMES = np.arange(1, HORIZON + 1)[:, None]  # broadcasts against the games
HORIZONS = (1, 2, 5, 10, 30, 100, HORIZON)  # where the step size depends on T


class Games(NamedTuple):
    """Games of one shape, `[g, m, n]`, and what draws their step sizes."""

    payoff: Array
    draw: np.random.Generator

    @property
    def size(self) -> tuple[int, int]:
        """Numbers of rows and of columns."""
        return self.payoff.shape[1], self.payoff.shape[2]

    @property
    def range_(self) -> Array:
        """Range of each game, `[g]`."""
        return np.ptp(self.payoff, axis=(1, 2))

    def unit(self) -> "Games":
        """Return the games in units of their range, so that one step size suits them all."""
        range_ = np.where(self.range_ > 0, self.range_, 1.0)
        return self._replace(payoff=self.payoff / range_[:, None, None])

    def between(self, low: float, high: float) -> float:
        """Draw a number, log-uniformly."""
        return float(np.exp(self.draw.uniform(np.log(low), np.log(high))))

    def gaps(self, method: str, steps: int = HORIZON, **parameters: Any) -> Array:
        """Return the gaps of the method's strategies after every step, `[steps, g]`."""
        game = MatrixGame(torch.tensor(self.payoff))
        return solve(game, method, steps, progress=False, **parameters).gaps.numpy()

    def ratios(self, gaps: Array, bound: Array) -> Array:
        """Return gap ÷ bound; a gap within rounding of 0 is 0."""
        rounding = 64 * np.finfo(float).eps * abs(self.payoff).max((1, 2))
        gaps = np.maximum(gaps - rounding, 0)
        with np.errstate(divide="ignore"):
            return np.divide(gaps, bound, where=gaps > 0, out=np.zeros_like(gaps))


Compared = Iterator[tuple[Array, Array]]  # gaps, and bounds that broadcast against them


def _hedge_best_pair(games: Games) -> Compared:
    for steps in HORIZONS:
        bound = bounds.hedge_optimal_steps(games.range_, *games.size, steps)
        yield games.gaps("hedge", steps)[-1], bound


def _hedge_best_step(games: Games) -> Compared:
    for steps in HORIZONS:
        step_size = float(bounds.hedge_step(1.0, *games.size, steps))
        bound = bounds.hedge_optimal_step(games.range_, *games.size, steps)
        yield games.gaps("hedge", steps, step_size=step_size)[-1], bound


def _hedge_any_pair(games: Games) -> Compared:
    pair = games.between(0.01, 10), games.between(0.01, 10)
    bound = bounds.hedge(games.range_, *games.size, TIMES, pair)
    yield games.gaps("hedge", step_size=pair), bound


def _hedge_any_step(games: Games) -> Compared:
    step_size = games.between(0.01, 10)
    bound = bounds.hedge(games.range_, *games.size, TIMES, step_size)
    yield games.gaps("hedge", step_size=step_size), bound


def _anytime_hedge(games: Games) -> Compared:
    yield games.gaps("anytime_hedge"), bounds.anytime_hedge(games.range_, *games.size, TIMES)


def _optimistic_hedge_best_step(games: Games) -> Compared:
    bound = bounds.optimistic_hedge(1.0, *games.size, TIMES, 1.0)
    yield games.gaps("optimistic_hedge"), games.range_ * bound


def _optimistic_hedge_any_step(games: Games) -> Compared:
    step_size = games.between(0.01, 1)
    bound = bounds.optimistic_hedge(games.range_, *games.size, TIMES, step_size)
    yield games.gaps("optimistic_hedge", step_size=step_size), bound


def _mirror_prox_best_step(games: Games) -> Compared:
    bound = bounds.mirror_prox(*games.size, TIMES, 2.0)
    yield games.gaps("mirror_prox"), games.range_ * bound


def _mirror_prox_any_step(games: Games) -> Compared:
    step_size = games.between(0.02, 2)
    bound = bounds.mirror_prox(*games.size, TIMES, step_size)
    yield games.gaps("mirror_prox", step_size=step_size), bound


def _magnetic_best_temperature(games: Games) -> Compared:
    """Against the least bound of all temperatures; the T-th strategy has seen T − 1 updates."""
    for steps in HORIZONS:
        tau = bounds.magnetic_temperature(1.0, *games.size, steps - 1)
        step_size = bounds.magnetic_step(1.0, tau)
        bound = bounds.magnetic(1.0, *games.size, steps - 1, tau, step_size)
        yield games.gaps("magnetic", steps)[-1], games.range_ * bound


def _magnetic_any_step(games: Games) -> Compared:
    tau = games.between(0.003, 3)
    step_size = float(bounds.magnetic_step(1.0, tau)) * games.between(0.1, 1)
    bound = bounds.magnetic(games.range_, *games.size, TIMES - 1, tau, step_size)
    yield games.gaps("magnetic", temperature=tau, step_size=step_size), bound


class Trial(NamedTuple):
    """A method, how its step is chosen, the statement with its bound, and what compares them.

    Trials in units of the range give one step size to all games of a batch.
    """

    method: str
    step_size: str
    statement: str
    compare: Callable[[Games], Compared]
    unit: bool = False

    def worst(self, games: Games) -> float:
        """Return the largest gap ÷ bound over the games and all T tried.

        Example:
            >>> games = Games(oracles.games(30, 3, 4, seed=0), np.random.default_rng(0))
            >>> 0 < TRIALS[4].worst(games) <= 1
            True
        """
        games = games.unit() if self.unit else games
        return max(float(games.ratios(*pair).max()) for pair in self.compare(games))


TRIALS = (
    Trial("hedge", "best pair for T", "H3", _hedge_best_pair),
    Trial("hedge", "best for T", "H2", _hedge_best_step, unit=True),
    Trial("hedge", "random", "H1", _hedge_any_step, unit=True),
    Trial("hedge", "random pair", "H3", _hedge_any_pair, unit=True),
    Trial("anytime_hedge", "√(8·log k / t) / r", "H4", _anytime_hedge),
    Trial("optimistic_hedge", "1/r", "O2", _optimistic_hedge_best_step),
    Trial("optimistic_hedge", "random ≤ 1/r", "O2", _optimistic_hedge_any_step, unit=True),
    Trial("mirror_prox", "2/r", "P1", _mirror_prox_best_step),
    Trial("mirror_prox", "random ≤ 2/r", "P1", _mirror_prox_any_step, unit=True),
    Trial("magnetic", "4τ/r², best τ for T", "R2", _magnetic_best_temperature),
    Trial("magnetic", "random ≤ 4τ/r², random τ", "R2", _magnetic_any_step, unit=True),
)


def survey(count: int, seed: int, *, progress: bool = False) -> list[float]:
    """Return the worst ratio of each trial over `count` games, the same games for all."""
    draw = np.random.default_rng(seed)
    worst = [0.0] * len(TRIALS)
    batches = oracles.batches(count, seed, shapes=8 + count // 500)
    with tqdm(total=len(batches) * len(TRIALS), disable=not progress) as bar:
        for payoff in batches:
            for k, trial in enumerate(TRIALS):
                worst[k] = max(worst[k], trial.worst(Games(payoff, draw)))
                bar.update()
    return worst


def table(count: int, seed: int) -> str:
    """Return the survey as a table in Markdown."""
    rows = ["| method | step size η | statement | worst gap ÷ bound |", "|---|---|---|---|"]
    for trial, ratio in zip(TRIALS, survey(count, seed, progress=True), strict=True):
        rows.append(f"| {trial.method} | {trial.step_size} | {trial.statement} | {ratio:.3f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Worst gap ÷ bound of each method.")
    parser.add_argument("--games", type=int, default=10_000, help="number of games")
    parser.add_argument("--seed", type=int, default=0, help="of games and step sizes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(table(chosen.games, chosen.seed))
    print(f"\n{chosen.games} games up to 12×12, T ≤ {HORIZON}, seed {chosen.seed}.")
