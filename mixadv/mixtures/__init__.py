"""The learner's mixed strategies: several models, one of which is drawn for each prediction."""

from mixadv.mixtures.members import Dropout, Member, Weights
from mixadv.mixtures.mixture import Mixture, mixture_of

__all__ = ["Dropout", "Member", "Mixture", "Weights", "mixture_of"]
