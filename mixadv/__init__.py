"""mixadv: adversarial training as a game between the learner and an adversary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    MART,
    MAT,
    PGD,
    R3F,
    SMART,
    SOLVERS,
    TRADES,
    VAT,
    ChiSquare,
    CreAT,
    CVaR,
    FreeAT,
    FreeLB,
    GroupDRO,
    TextAT,
    UniformNoise,
    make_solver,
)
from mixadv.solvers.awp import AWP
from mixadv.solvers.base import Solver
from mixadv.solvers.play import Step
from mixadv.solvers.sam import ASAM, SAM

if TYPE_CHECKING:
    from mixadv.equilibrium import attack

__version__ = "0.1.0"

__all__ = [
    "ALUM",
    "ASAM",
    "AWP",
    "CAT",
    "FGM",
    "MART",
    "MAT",
    "PGD",
    "R3F",
    "SAM",
    "SMART",
    "SOLVERS",
    "TRADES",
    "VAT",
    "Ascent",
    "CVaR",
    "ChiSquare",
    "CreAT",
    "FreeAT",
    "FreeLB",
    "Game",
    "GameError",
    "GameOptimizer",
    "GroupDRO",
    "Outcome",
    "Schedule",
    "Solver",
    "Stage",
    "Step",
    "Strategy",
    "TextAT",
    "UniformNoise",
    "attack",
    "make_solver",
    "wrap",
]

_SUBPACKAGES = (
    "anchors",
    "equilibrium",
    "games",
    "integrations",
    "learner_response",
    "mixtures",
    "neurons",
    "robustness",
    "tokens",
)


def __getattr__(name: str) -> Any:
    """Import a subpackage when it is first asked for: some need an extra."""
    if name == "attack":
        return import_module("mixadv.equilibrium").attack
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES, "__version__"])
