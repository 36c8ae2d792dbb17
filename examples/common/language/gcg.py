"""Suffixes that are searched for on the attacked model, by the package nanogcg."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mixadv.model.replay import evaluating
from mixadv.robustness.generation import Speaker

TOKENS = 12  # of a suffix


@dataclass(frozen=True)
class SearchedSuffix:
    """A suffix for each prompt by greedy coordinate gradients (Zou et al. 2023, arXiv:2307.15043).

    The search knows the weights and makes a beginning of the answer likely. Unlike a perturbation
    of embeddings what it finds is text. Each prompt costs steps × width forwards.

    Attributes:
        target: how the answer is to begin.
        steps: of the search.
        width: candidates in each.
        seed: of their draws.
    """

    target: str
    steps: int
    width: int = 32
    seed: int = 0

    def answers(self, speaker: Speaker, prompts: Sequence[str]) -> list[list[str]]:
        """Return the answer to each prompt with its suffix."""
        with evaluating(speaker.model):
            torch.manual_seed(self.seed)
            asked = [f"{prompt} {self.suffix(speaker, prompt)}" for prompt in prompts]
        return [[answer] for answer in speaker.answers(asked)]

    def suffix(self, speaker: Speaker, prompt: str) -> str:
        """Return the suffix that the search ends with."""
        gcg = nanogcg()
        front = [] if speaker.system is None else [{"role": "system", "content": speaker.system}]
        messages = [*front, {"role": "user", "content": prompt + " {optim_str}"}]
        config = gcg.GCGConfig(
            num_steps=self.steps,
            search_width=self.width,
            optim_str_init=" ".join("x" * TOKENS),
            use_prefix_cache=False,  # it indexes caches as transformers had them before 5
            verbosity="ERROR",
        )
        found = gcg.run(speaker.model, speaker.tokenizer, messages, self.target, config)
        return found.best_string.strip()


def nanogcg() -> Any:
    """Return the package.

    Raises:
        ImportError: where it is not installed.
    """
    try:
        return importlib.import_module("nanogcg")
    except ImportError as error:
        raise ImportError(
            "--gcg searches suffixes with nanogcg: pip install --no-deps nanogcg==0.3.0 (what it "
            "says it needs of transformers is older than what it runs with)."
        ) from error
