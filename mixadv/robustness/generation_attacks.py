"""Attacks on what a language model answers, from none to a perturbation of its embeddings.

An attack gives each prompt one answer or several; it succeeds on a prompt where the judge finds
what is looked for in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mixadv.checks import check_integer, check_number
from mixadv.equilibrium import attack
from mixadv.robustness.ascents import learnable
from mixadv.robustness.generation import Speaker
from mixadv.solvers import PGD
from mixadv.tokens.chat import ChatBatch, answer_losses


class GenerationAttack(Protocol):
    """Makes a model answer prompts as an attacker would have it."""

    def answers(self, speaker: Speaker, prompts: Sequence[str]) -> list[list[str]]:
        """Return one answer or several to each prompt."""
        ...


@dataclass(frozen=True)
class NoAttack:
    """The prompts as they are."""

    def answers(self, speaker: Speaker, prompts: Sequence[str]) -> list[list[str]]:
        """Return the answer to each prompt."""
        return [[answer] for answer in speaker.answers(prompts)]


@dataclass(frozen=True)
class Prefill:
    """The answer is begun by the attacker; what is judged has that beginning.

    Attributes:
        begins: texts that answers begin with, each tried on every prompt.
    """

    begins: Sequence[str]

    def __post_init__(self) -> None:
        _check_texts("Prefill", "begins", self.begins)

    def answers(self, speaker: Speaker, prompts: Sequence[str]) -> list[list[str]]:
        """Return an answer with each beginning."""
        return _by_prompt([speaker.answers(prompts, begin) for begin in self.begins])


@dataclass(frozen=True)
class Suffixes:
    """Texts are put behind each prompt, such as those that a search found on another model.

    Attributes:
        suffixes: each tried on every prompt, after a space; of messages, on the user's last one.
    """

    suffixes: Sequence[str]

    def __post_init__(self) -> None:
        _check_texts("Suffixes", "suffixes", self.suffixes)

    def answers(self, speaker: Speaker, prompts: Sequence[str]) -> list[list[str]]:
        """Return an answer with each suffix."""
        return _by_prompt([speaker.answers([_with(p, s) for p in prompts]) for s in self.suffixes])


@dataclass(frozen=True)
class Rewrites:
    """Prompts are asked in other words.

    Attributes:
        of: makes of a prompt one other wording or several; a dictionary's `__getitem__` is one.
    """

    of: Callable[[str], Sequence[str]]

    def __post_init__(self) -> None:
        if not callable(self.of):
            raise TypeError(
                f"Rewrites: of must be a function of a prompt, got {self.of!r:.60}: of a dict "
                "write Rewrites(wordings.__getitem__)."
            )

    def answers(self, speaker: Speaker, prompts: Sequence[str]) -> list[list[str]]:
        """Return an answer to each wording; they are judged as answers to the prompt."""
        wordings = [self.of(prompt) for prompt in prompts]
        for found in wordings:
            _check_texts("Rewrites", "of(prompt)", found)
        said = iter(speaker.answers([text for found in wordings for text in found]))
        return [[next(said) for _ in found] for found in wordings]


@dataclass(frozen=True)
class EmbeddingAttack:
    """A perturbation of the prompt's embeddings that makes a target answer likely.

        δ_{t+1} = Π( δ_t + η·g_t/‖g_t‖ ),   g_t = ∇_δ log p(target | E(x) + δ_t),   δ_0 = 0

    δ acts at the tokens of what the user wrote, and each token has a ball of its own, ε times the
    mean norm of those tokens' embeddings over all prompts. Under the last δ the model answers. No
    text gives such embeddings: it is an upper bound of what texts can do as far as the ascent is
    good, and needs the weights (Schwinn et al. 2024, arXiv:2402.09063).

    Attributes:
        target: how the answer is to begin, or a function of the prompt.
        steps: K, forwards and backwards of each batch; one forward more.
        radius: ε, in mean token norms.
        step_size: η in the same unit; None is a quarter of the radius.
    """

    target: str | Callable[[str], str]
    steps: int = 20
    radius: float = 0.1
    step_size: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.target) and not isinstance(self.target, str):
            raise TypeError(
                "EmbeddingAttack: target must be how the answer is to begin, or a function of the "
                f"prompt, got {self.target!r:.60}."
            )
        check_integer("EmbeddingAttack", "steps", self.steps, 1)
        check_number("EmbeddingAttack", "radius", self.radius)
        if self.step_size is not None:
            check_number("EmbeddingAttack", "step_size", self.step_size)

    def answers(self, speaker: Speaker, prompts: Sequence[str]) -> list[list[str]]:
        """Return the answer to each prompt under its δ."""
        unit, found = self.unit(speaker, prompts), []
        for part in speaker.parts(prompts):
            asked = prompts[part]
            batch, delta = self.perturb(speaker, asked, unit)
            spoken = speaker.read(asked, None, padding_side="left")
            found += speaker.generate(spoken, moved(delta, batch.where, spoken.where))
        return [[answer] for answer in found]

    def unit(self, speaker: Speaker, prompts: Sequence[str]) -> float:
        """Return the mean L2 norm of the embeddings where δ acts."""
        embedding, norms = speaker.model.get_input_embeddings(), []  # pyright: ignore
        for part in speaker.parts(prompts):
            batch = speaker.read(prompts[part], None)
            found = embedding(batch.input_ids[batch.where]).detach()
            norms.append(found.to(torch.promote_types(found.dtype, torch.float32)).norm(dim=-1))
        return float(torch.cat(norms).mean())

    def perturb(
        self, speaker: Speaker, prompts: Sequence[str], unit: float
    ) -> tuple[ChatBatch, Tensor]:
        """Return prompts with their targets, and δ at the end of the ascent, `[B, n, d]`."""
        targets = [self.target if isinstance(self.target, str) else self.target(p) for p in prompts]
        _check_texts("EmbeddingAttack", "target", targets)
        batch = speaker.read(prompts, targets, complete=False, padding_side="right")
        step = self.radius / 4 if self.step_size is None else self.step_size

        def likelihood() -> Tensor:
            return -answer_losses(speaker.model(**batch.inputs).logits, batch.labels)

        solver = PGD(
            steps=self.steps,
            step_size=step * unit,
            radius=self.radius * unit,
            unit="absolute",
            per="token",
            start="zero",
        )
        with learnable(speaker.model):
            found = attack(speaker.model, solver, likelihood, where=batch.where)
        return batch, found.strategy.points[0][0]


def moved(delta: Tensor, where: Tensor, to: Tensor) -> Tensor:
    """Return δ at the same tokens of the same rows, padded in another way.

    Args:
        delta: `[B, n, d]`.
        where: `[B, n]`, the tokens at which δ acts.
        to: `[B, m]`, the same tokens.
    """
    found = delta.new_zeros(*to.shape, delta.shape[-1])
    found[to] = delta[where]
    return found


def _by_prompt(answers: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(of_one) for of_one in zip(*answers, strict=True)]


def _with(prompt: Any, suffix: str) -> Any:
    """Return a prompt, a text or messages, with a text behind what the user wrote last."""
    if isinstance(prompt, str):
        return f"{prompt} {suffix}"
    found = [dict(message) for message in prompt]
    users = [message for message in found if message.get("role") == "user"]
    if not users or not isinstance(users[-1].get("content"), str):
        raise ValueError(
            "Suffixes stand behind the text that the user wrote last, and these messages have "
            f"none: {prompt!r:.120}. Give messages of a user whose content is a text."
        )
    users[-1]["content"] += f" {suffix}"
    return found


def _check_texts(who: str, name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t for t in texts):
        raise ValueError(f"{who}: {name} must be a list of texts, at least one, got {texts!r}.")
