"""mixadv: adversarial training as a game between the learner and an adversary."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixadv.equilibrium import attack
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

_HOMES = {
    "Ascent": "players.ascent",
    "Game": "game",
    "GameError": "errors",
    "GameOptimizer": "optimizer",
    "Outcome": "round.outcome",
    "Schedule": "round.schedule",
    "Solver": "solvers.base",
    "Stage": "round.stage",
    "Step": "solvers.play",
    "Strategy": "players.strategy",
    "attack": "equilibrium",
    "wrap": "optimizer",
}
"""Where names are from that the registry of solvers does not have."""

_MODULES = (
    "anchors",
    "equilibrium",
    "errors",
    "game",
    "games",
    "integrations",
    "learner_response",
    "mixtures",
    "neurons",
    "optimizer",
    "robustness",
    "solvers",
    "tokens",
)


def __getattr__(name: str) -> Any:
    """Import what is asked for: all of it takes longer than a round, and some needs an extra."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'solvers')}"), name)
    globals()[name] = found  # from now on nothing is looked up
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
