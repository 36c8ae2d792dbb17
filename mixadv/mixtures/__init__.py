"""The learner's mixed strategies: several models, one of which is drawn for each prediction."""

from mixadv.mixtures.adapters import Adapter
from mixadv.mixtures.mean import Mean
from mixadv.mixtures.members import Dropout, Member, Weights
from mixadv.mixtures.mixture import Mixture, mixture_of
from mixadv.mixtures.weighing import Weighing, weigh, weigh_under

__all__ = [
    "Adapter",
    "Dropout",
    "Mean",
    "Member",
    "Mixture",
    "Weighing",
    "Weights",
    "mixture_of",
    "weigh",
    "weigh_under",
]
