"""The registry of solvers: one file each, one line here."""

from typing import Any

from mixadv.errors import build
from mixadv.solvers.alum import ALUM
from mixadv.solvers.awp import AWP
from mixadv.solvers.base import Solver
from mixadv.solvers.cat import CAT
from mixadv.solvers.chi_square import ChiSquare
from mixadv.solvers.creat import CreAT
from mixadv.solvers.cvar import CVaR
from mixadv.solvers.fgm import FGM
from mixadv.solvers.freeat import FreeAT
from mixadv.solvers.freelb import FreeLB
from mixadv.solvers.group_dro import GroupDRO
from mixadv.solvers.mart import MART
from mixadv.solvers.mat import MAT
from mixadv.solvers.noise import UniformNoise
from mixadv.solvers.pgd import PGD
from mixadv.solvers.r3f import R3F
from mixadv.solvers.sam import ASAM, SAM
from mixadv.solvers.smart import SMART
from mixadv.solvers.textat import TextAT
from mixadv.solvers.trades import TRADES
from mixadv.solvers.vat import VAT

SOLVERS: dict[str, type[Solver]] = {
    cls.name: cls
    for cls in (
        UniformNoise,
        FGM,
        PGD,
        FreeAT,
        FreeLB,
        TextAT,
        CreAT,
        CAT,
        VAT,
        R3F,
        ALUM,
        SMART,
        TRADES,
        MART,
        MAT,
        GroupDRO,
        CVaR,
        ChiSquare,
        SAM,
        ASAM,
        AWP,
    )
}


def make_solver(name: str, **parameters: Any) -> Solver:
    """Build a solver by its registered name.

    Args:
        name: a key of `SOLVERS`.
        parameters: its hyper-parameters.

    Raises:
        ValueError: for an unknown name or hyper-parameter, with the nearest one.

    Example:
        >>> make_solver("freelb", steps=2).steps
        2
    """
    words = SOLVERS[name].words if name in SOLVERS else None
    return build("solver", SOLVERS, name, parameters, words)
