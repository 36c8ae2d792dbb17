"""The site of a game that moves no inputs."""

from torch import nn

from mixadv.model.modules import INPUT
from mixadv.model.site import Site


class NoSite(Site):
    """No module: δ acts nowhere, and no hook is placed on the model.

    So any model will do: with several embeddings or none, of any inputs, compiled in place.

    Example:
        >>> NoSite(nn.Linear(2, 2)).names
        []
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, INPUT)
        self.targets = []

    def attach(self) -> None:
        """Place no hook."""
