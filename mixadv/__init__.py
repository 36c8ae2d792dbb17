"""mixadv: adversarial training as a game between the learner and an adversary."""

from mixadv.ascent import Ascent
from mixadv.errors import GameError
from mixadv.game import Game
from mixadv.optimizer import GameOptimizer, wrap
from mixadv.outcome import Outcome
from mixadv.schedule import Schedule
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
    solver,
)
from mixadv.solvers.base import Solver
from mixadv.stage import Stage, Step
from mixadv.strategy import Strategy

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
    "solver",
    "wrap",
]
