"""The mean of a mixture as one classifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.mixtures.mixture import Mixture
from mixadv.model.contexts import no_grad
from mixadv.model.logits import logits_in
from mixadv.tokens.substitution.reader import Several


class Mean(nn.Module, Several):
    """What a mixture predicts by the mean of its members' probabilities, as a module.

    Called as the model is, it returns the logarithms of the mean probabilities, log Σ_m π_m p_m,
    `[B, C]` or `[B, n, C]`, without gradients: logits whose cross-entropy is finite where no member
    overflows.

    Args:
        mixture: of classifiers.

    Example:
        >>> mixture = Mixture([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> x = torch.eye(2)
        >>> means = mixture.predict(lambda: mixture(x))
        >>> torch.allclose(Mean(mixture)(x).exp(), means)
        True
    """

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture

    @property
    def config(self) -> Any:
        """The configuration of the model, of transformers."""
        return self.mixture.config

    def parts(self) -> Iterator[tuple[float, nn.Module]]:
        """Yield the probability of each member, and the member while it plays."""
        for number, weight in enumerate(self.mixture.probabilities.tolist()):
            with self.mixture.member(number) as module:
                yield weight, module

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call each member."""
        found = []
        for _, module in self.parts():
            with no_grad():
                output = module(*args, **kwargs)
            logits = logits_in(output)
            found.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        each = torch.stack(found).log_softmax(-1)
        weights = self.mixture.probabilities.to(each).log()
        return (each + weights.view(-1, *[1] * (each.dim() - 1))).logsumexp(0)
