"""Zero-sum games with known answers, played by the very steps that train models.

    solve(MatrixGame([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]), "mirror_prox").gap

`mixadv.maths.mirror` moves the weights of strategies and `mixadv.maths.langevin` their points, as
in `MAT`; `theory/statements.md` says what must be true of them, and the tests confront the two.
"""

from mixadv.games.continuous import ContinuousGame
from mixadv.games.growth import Grown, double_oracle
from mixadv.games.matrix import MatrixGame
from mixadv.games.method import Method
from mixadv.games.methods import (
    METHODS,
    AnytimeHedge,
    BestResponseDynamics,
    Hedge,
    Magnetic,
    MirrorProx,
    OptimisticHedge,
    Restarted,
)
from mixadv.games.particles import (
    PARTICLE_METHODS,
    GradientDescentAscent,
    Langevin,
    ParticleMethod,
    WassersteinFisherRao,
)
from mixadv.games.solution import Solution, duality_gap
from mixadv.games.solve import solve
from mixadv.games.spaces import Ball, Box, Gaussian, Space, Torus
from mixadv.games.strategies import Gap, Pair, Particles

__all__ = [
    "METHODS",
    "PARTICLE_METHODS",
    "AnytimeHedge",
    "Ball",
    "BestResponseDynamics",
    "Box",
    "ContinuousGame",
    "Gap",
    "Gaussian",
    "GradientDescentAscent",
    "Grown",
    "Hedge",
    "Langevin",
    "Magnetic",
    "MatrixGame",
    "Method",
    "MirrorProx",
    "OptimisticHedge",
    "Pair",
    "ParticleMethod",
    "Particles",
    "Restarted",
    "Solution",
    "Space",
    "Torus",
    "WassersteinFisherRao",
    "double_oracle",
    "duality_gap",
    "solve",
]
