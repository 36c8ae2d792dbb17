"""What a language model answers, and whether a judge finds in it what an attacker wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from mixadv.checks import check_integer
from mixadv.model.contexts import no_grad
from mixadv.model.replay import evaluating
from mixadv.tokens.chat import ChatBatch, answer_losses, chat_batch

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
    "use_cache": True,
}
"""The likeliest token each time, whatever beams, penalties or lengths a checkpoint asks for. A
penalty of repetitions would count the padding too, and the answer depend on the prompts beside it.
Tokens that it suppresses or forces stay so."""

Judge = Callable[[str, str], bool]
"""Whether the answer to a prompt is what is looked for: `judge(prompt, answer)`."""


def says(*phrases: str) -> Judge:
    """Return the judge that looks for one of the phrases in an answer, whatever their case.

    Example:
        >>> says("I can't", "I cannot")("How?", "Sorry, i can't say.")
        True
    """
    sought = [phrase.casefold() for phrase in _phrases(phrases)]
    return lambda prompt, answer: any(phrase in answer.casefold() for phrase in sought)


def lacks(*phrases: str) -> Judge:
    """Return the judge that wants none of the phrases in an answer, which is not empty.

    With the words of a refusal it says whether an attack got an answer.

    Example:
        >>> lacks("I can't")("How?", "Sure."), lacks("I can't")("How?", " ")
        (True, False)
    """
    found = says(*_phrases(phrases))
    return lambda prompt, answer: bool(answer.strip()) and not found(prompt, answer)


def judged(judge: Judge, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Return what a judge says of each answer.

    Raises:
        ValueError: if it returns anything but True or False.
    """
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        verdict = judge(prompt, answer)
        if not isinstance(verdict, bool | np.bool_):
            said = "nothing" if verdict is None else f"{verdict!r:.40}"
            raise ValueError(
                f"The judge returned {said} for the prompt {prompt[:60]!r}: it must return True "
                "where the answer is what is looked for, and False elsewhere."
            )
        found.append(bool(verdict))
    return found


@dataclass(frozen=True)
class Speaker:
    """A causal language model with its tokenizer, and how it is made to answer: greedily.

    Attributes:
        model: of transformers, with adapters or without.
        tokenizer: fast, with a chat template.
        system: a system message in front of each prompt.
        max_new_tokens: of an answer.
        batch_size: prompts side by side.
    """

    model: nn.Module
    tokenizer: Any
    system: str | None = None
    max_new_tokens: int = 32
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_integer("Speaker", "max_new_tokens", self.max_new_tokens, 1)
        check_integer("Speaker", "batch_size", self.batch_size, 1)

    def answers(self, prompts: Sequence[str], begin: str = "") -> list[str]:
        """Return the answer to each prompt; each begins as given, and with that."""
        found: list[str] = []
        for part in self.parts(prompts):
            asked = prompts[part]
            batch = self.read(asked, [begin] * len(asked), complete=False, padding_side="left")
            ids = self._ids(batch, None)
            texts = self._after(ids, batch) if begin else self._new(ids, batch)
            found += [begin + text for text in texts]
        return found

    def losses(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return the mean negative log-likelihood of each answer, in nats a token."""
        found: list[float] = []
        with evaluating(self.model), no_grad():
            for part in self.parts(prompts):
                batch = self.read(prompts[part], answers[part], padding_side="right")
                logits: Any = self.model(**batch.inputs).logits
                found += answer_losses(logits, batch.labels).tolist()
        return found

    def read(self, prompts: Sequence[str], answers: Sequence[str] | None, **how: Any) -> ChatBatch:
        """Return prompts and answers as a batch on the model's device; see `chat_batch`."""
        batch = chat_batch(self.tokenizer, prompts, answers, system=self.system, **how)
        return batch.to(next(self.model.parameters()).device)

    def generate(self, batch: ChatBatch, delta: Tensor | None = None) -> list[str]:
        """Return how the model goes on with rows that are padded on the left.

        Args:
            batch: of rows that end where the model begins.
            delta: `[B, n, d]`, added to their embeddings.
        """
        return self._new(self._ids(batch, delta), batch)

    def _ids(self, batch: ChatBatch, delta: Tensor | None) -> Tensor:
        """Return the ids of rows with those that the model goes on with."""
        model: Any = self.model
        pad = self.tokenizer.pad_token_id
        with evaluating(model), no_grad(), added(model, delta):
            return model.generate(
                **batch.inputs,
                **GREEDY,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                tokenizer=self.tokenizer,  # for strings that a checkpoint stops at
            )

    def _new(self, ids: Tensor, batch: ChatBatch) -> list[str]:
        """Return the texts of new ids alone."""
        new = ids[:, batch.input_ids.shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def _after(self, ids: Tensor, batch: ChatBatch) -> list[str]:
        """Return the texts of new ids with the space that they begin with.

        SentencePiece's decoders strip it from what they read alone. Read with the token before, it
        is kept.
        """
        last = ids[:, batch.input_ids.shape[1] - 1 :]
        both, before = (
            self.tokenizer.batch_decode(x, skip_special_tokens=True) for x in (last, last[:, :1])
        )
        read = zip(both, before, self._new(ids, batch), strict=True)
        return [x[len(one) :] if x.startswith(one) else alone for x, one, alone in read]

    def parts(self, rows: Sequence[Any]) -> Iterator[slice]:
        """Yield slices of as many rows as are read side by side."""
        if isinstance(rows, str) or not len(rows):
            raise ValueError(f"prompts must be a list of at least one prompt, got {rows!r}.")
        for start in range(0, len(rows), self.batch_size):
            yield slice(start, start + self.batch_size)


@contextmanager
def added(model: Any, delta: Tensor | None) -> Iterator[None]:
    """Add δ to the embeddings of the next call alone, which reads the prompts.

    Later calls read one new token each and find the prompts in their cache.

    Raises:
        ValueError: if a later call reads more, which would be without δ.
    """
    waiting = [] if delta is None else [delta]

    def add(module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
        if waiting:
            return output + waiting.pop().to(output)
        if delta is not None and output.shape[1] > 1:
            raise ValueError(
                f"{type(model).__name__} reads the prompt again for each new token, and would read "
                "it without δ: an attack on embeddings needs a model with a cache of what it read."
            )
        return None

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _phrases(phrases: Sequence[str]) -> Sequence[str]:
    if not phrases or not all(isinstance(phrase, str) and phrase for phrase in phrases):
        raise ValueError(f"A string rule needs at least one phrase, got {list(phrases)!r}.")
    return phrases
