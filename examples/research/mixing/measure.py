"""How accurate a mixture is: a member drawn for each row, the mean of probabilities, the vote."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.substitution import candidates
from mixadv.mixtures import Mixture
from mixadv.mixtures.mixture import combine
from mixadv.robustness import Rows, mixture_accuracy, text_batches
from mixadv.tokens import WordSubstitution

WAYS = ("a member drawn", "mean", "vote")
TYPOS = "typos"


@dataclass(frozen=True)
class Measure:
    """What is measured, the same for all that are compared.

    Attributes:
        tokenizer: of the models.
        trained: the rows trained on.
        clean: rows to classify.
        attacked: rows to attack.
        radius: of attacks in embedding space, in
        unit: token norms.
        steps: of each ascent.
        seed: of random starts.
    """

    tokenizer: Any
    trained: Rows
    clean: Rows
    attacked: Rows
    radius: float
    unit: float
    steps: int
    seed: int

    def __call__(self, mixture: Mixture) -> dict[str, Any]:
        """Return the accuracy of each way of classifying, by the attack; that of members alone."""
        ways = {"trained": self._read(mixture, self.trained).mean(0)}
        ways["clean"] = self._read(mixture, self.clean).mean(0)
        batches = text_batches(mixture, self.tokenizer, self.attacked)
        how: dict[str, Any] = {"radius": self.radius, "unit": self.unit, "steps": self.steps}
        found = mixture_accuracy(mixture, batches, restarts=1, seed=self.seed, **how)
        ways |= {name: rows.mean(0) for name, rows in found.under().items()}
        ways[TYPOS] = self._under_typos(mixture)
        alone = found.alone().mean(0)[:, 1].tolist()
        return {"ways": {name: list(map(float, v)) for name, v in ways.items()}, "alone": alone}

    def _read(self, mixture: Mixture, rows: Rows) -> np.ndarray:
        """Return how often each row is classified right, `[N, 3]`, in their order."""
        batches = text_batches(mixture, self.tokenizer, rows)
        found = [_right(mixture, batch.closure, batch.labels) for batch in batches]
        places = np.concatenate([batch.rows for batch in batches])
        return np.concatenate(found)[np.argsort(places)]

    def _under_typos(self, mixture: Mixture) -> np.ndarray:
        """Return the accuracy at the worst, for each way, of texts found against any member."""
        typos, rows, worst = WordSubstitution(candidates("typos")), self.attacked, None
        for number in range(len(mixture)):
            with mixture.member(number) as module:
                found = typos.attack(module, self.tokenizer, rows.texts, rows.labels)
            perturbed: Any = [attack.perturbed for attack in found]
            texts = Rows(perturbed, rows.labels, rows.name)
            right = self._read(mixture, texts)
            worst = right if worst is None else np.minimum(worst, right)
        assert worst is not None
        return worst.mean(0)


def _right(mixture: Mixture, closure: Any, labels: Tensor) -> np.ndarray:
    each = mixture.each(lambda: closure()[1])
    return right(each, mixture.probabilities, labels).cpu().numpy()


def right(each: Tensor, probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return how often each way classifies each row right, `[N, 3]`, by what members give."""
    mean, vote = (combine(each, probabilities, how) for how in ("mean", "vote"))
    drawn = (probabilities.to(each)[:, None] * (each.argmax(-1) == labels)).sum(0)
    certain = [(found.argmax(-1) == labels).to(drawn) for found in (mean, vote)]
    return torch.stack([drawn, *certain], 1)
