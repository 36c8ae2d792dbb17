"""mixadv: adversarial training as a game between the learner and an adversary."""

from mixadv.errors import GameError
from mixadv.game import Game
from mixadv.optimizer import GameOptimizer, wrap
from mixadv.players.ascent import Ascent
from mixadv.players.strategy import Strategy
from mixadv.round.outcome import Outcome
from mixadv.round.schedule import Schedule
from mixadv.round.stage import Stage
from mixadv.solvers import (
    ALUM,
    CAT,
    FGM,
    MAT,
    PGD,
    R3F,
    SMART,
    SOLVERS,
    VAT,
    CreAT,
    FreeAT,
    FreeLB,
    TextAT,
    UniformNoise,
    make_solver,
)
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Step

__version__ = "0.1.0"

__all__ = [
    "ALUM",
    "CAT",
    "FGM",
    "MAT",
    "PGD",
    "R3F",
    "SMART",
    "SOLVERS",
    "VAT",
    "Ascent",
    "CreAT",
    "FreeAT",
    "FreeLB",
    "Game",
    "GameError",
    "GameOptimizer",
    "Outcome",
    "Schedule",
    "Solver",
    "Stage",
    "Step",
    "Strategy",
    "TextAT",
    "UniformNoise",
    "make_solver",
    "wrap",
]
