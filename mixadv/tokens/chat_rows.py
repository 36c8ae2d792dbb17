"""One chat as ids: where its prompt ends, and which tokens the user wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Prompt = str | Sequence[Mapping[str, str]]
"""What the user asks, or the messages so far, of which a user's is among."""
Answer = str | Sequence[Mapping[str, str]]
"""What the assistant says, or its message in a list."""

_MARK = "\ue000\ue001\ue000"  # of the private use area: no template writes it


class Row(NamedTuple):
    """One chat.

    Attributes:
        ids: of template, prompt and answer.
        prompt: how many of them are the prompt's, the template's too.
        where: True at the tokens of what the user wrote last.
    """

    ids: list[int]
    prompt: int
    where: list[bool]


def messages_of(prompt: Prompt, system: str | None, number: int) -> list[dict[str, str]]:
    """Return the messages of a prompt; the last of a user is not empty."""
    if isinstance(prompt, str):
        front = [] if system is None else [{"role": "system", "content": system}]
        messages = [*front, {"role": "user", "content": prompt}]
    elif isinstance(prompt, Sequence):
        messages = [dict(message) for message in prompt]
    else:
        raise ValueError(f"Prompt {number} must be a text or a list of messages, got {prompt!r}.")
    users = [message for message in messages if message.get("role") == "user"]
    if not users or not str(users[-1].get("content") or "").strip():
        raise ValueError(f"Prompt {number} is empty: the user asks nothing.")
    return messages


def said(answer: Answer, complete: bool, prompt: Prompt) -> Answer:
    """Return an answer that a row can be made of."""
    if not isinstance(answer, str) and not (complete and isinstance(answer, Sequence)):
        allowed = "or its message in a list" if complete else "where complete=False"
        raise ValueError(
            f"The answer to {str(prompt)[:60]!r} must be a text, {allowed}, got {answer!r:.60}."
        )
    roles = ["assistant"] if isinstance(answer, str) else [_role(m) for m in answer]
    if roles != ["assistant"]:
        cure = 'give a text, or [{"role": "assistant", "content": …}].'
        if roles[-1:] == ["assistant"]:
            cure = "what came before belongs to the prompt, and the answer is answer[-1:]."
        raise ValueError(
            f"The answer to {str(prompt)[:60]!r} must be one message of the assistant, not of "
            f"{roles}: {cure}"
        )
    text = answer if isinstance(answer, str) else answer[0].get("content")
    if complete and not str(text or "").strip():
        raise ValueError(f"The answer to {str(prompt)[:60]!r} is empty: nothing is to be learned.")
    return answer


def _role(message: Any) -> str | None:
    return message.get("role") if isinstance(message, Mapping) else type(message).__name__


def row_of(tokenizer: Any, messages: list[Any], answer: Answer | None, complete: bool) -> Row:
    """Return one chat as ids, with the length of its prompt and the user's tokens."""
    prompt, (start, end) = _prompt(tokenizer, messages)
    if answer is None:
        whole = prompt
    elif complete:
        turn = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        whole = _render(tokenizer, [*messages, *turn], False)
    else:
        whole = f"{prompt}{answer}"
    if not whole.startswith(prompt):
        raise ValueError(
            "The chat template has no prompt boundary: what it writes for a prompt ends in "
            f"{prompt[-30:]!r}, and prompt and answer begin with {whole[: len(prompt)][-30:]!r}. "
            "Set tokenizer.chat_template to one whose generation prompt is how the assistant's "
            "turn begins."
        )
    before = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    asked, ids = before["input_ids"], tokenizer(whole, add_special_tokens=False)["input_ids"]
    if ids[: len(asked)] != asked:
        ids = _apart(tokenizer, asked, whole[len(prompt) :], ids)
    acted = [start < b and a < end and a < b for a, b in before["offset_mapping"]]
    return Row(ids, len(asked), acted + [False] * (len(ids) - len(asked)))


def _apart(tokenizer: Any, asked: list[int], rest: str, together: list[int]) -> list[int]:
    """Return the ids of a prompt and of what follows it, as the model would have written it.

    Read together, a token would reach across: the template's line break and the answer's.
    """
    ids = [*asked, *tokenizer(rest, add_special_tokens=False)["input_ids"]]
    if tokenizer.decode(ids) != tokenizer.decode(together):
        raise ValueError(
            f"The tokenizer merges the end of the prompt with the beginning of {rest[:30]!r}, so "
            "there is no prompt boundary: strip the answer, answer.strip()."
        )
    return ids


def _prompt(tokenizer: Any, messages: list[Any]) -> tuple[str, tuple[int, int]]:
    """Return the text up to the assistant's turn, and where what the user wrote last lies in it.

    The place is that of a mark which is written instead: the user's words may be the template's.
    """
    text = _render(tokenizer, messages, True)
    last = max(i for i, message in enumerate(messages) if message.get("role") == "user")
    marked = [*messages[:last], {**messages[last], "content": _MARK}, *messages[last + 1 :]]
    before, found, after = _render(tokenizer, marked, True).partition(_MARK)
    if not found or not text.startswith(before) or not text.endswith(after):
        raise ValueError(
            "The chat template has no prompt boundary: the user's text cannot be told from what "
            f"the template writes, {text[:60]!r}. Set tokenizer.chat_template to one that writes "
            "messages as they are."
        )
    return text, (len(before), len(text) - len(after))


def _render(tokenizer: Any, messages: list[Any], begin: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin)
    except Exception as error:  # jinja2's, which is no dependency
        raise ValueError(f"The chat template refuses these messages: {error}") from error
