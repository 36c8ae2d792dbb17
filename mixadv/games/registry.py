"""The methods by name: a new one is a class and a line here."""

from mixadv.games.method import Method
from mixadv.games.methods import (
    AnytimeHedge,
    BestResponseDynamics,
    Hedge,
    Magnetic,
    MirrorProx,
    OptimisticHedge,
)
from mixadv.games.particles import (
    GradientDescentAscent,
    Langevin,
    ParticleMethod,
    WassersteinFisherRao,
)
from mixadv.games.restarted import Restarted

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Hedge,
        AnytimeHedge,
        OptimisticHedge,
        MirrorProx,
        Magnetic,
        Restarted,
        BestResponseDynamics,
    )
}

PARTICLE_METHODS: dict[str, type[ParticleMethod]] = {
    method.name: method for method in (Langevin, WassersteinFisherRao, GradientDescentAscent)
}
