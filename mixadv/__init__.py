"""mixadv: adversarial training as a game between the learner and an adversary."""

from mixadv.ascent import Ascent
from mixadv.errors import GameError
from mixadv.game import Game
from mixadv.optimizer import GameOptimizer, wrap
from mixadv.outcome import Outcome
from mixadv.solvers import FGM, MAT, PGD, SMART, SOLVERS, FreeLB, UniformNoise, solver
from mixadv.solvers.base import Solver
from mixadv.stage import Stage, Step
from mixadv.strategy import Strategy

__version__ = "0.1.0"

__all__ = [
    "FGM",
    "MAT",
    "PGD",
    "SMART",
    "SOLVERS",
    "Ascent",
    "FreeLB",
    "Game",
    "GameError",
    "GameOptimizer",
    "Outcome",
    "Solver",
    "Stage",
    "Step",
    "Strategy",
    "UniformNoise",
    "solver",
    "wrap",
]
