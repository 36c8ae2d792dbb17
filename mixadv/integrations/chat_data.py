"""The rows of a chat game: preference data, other data beside them, and batches of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mixadv.checks import check_integer
from mixadv.tokens.chat import chat_batch, preference_batches
from mixadv.tokens.chat_games import rewritten
from mixadv.tokens.chat_length import shortened

COLUMNS = ("prompt", "chosen", "rejected")
OTHERS, CUT = "others", "cut"


class ChatCollator:
    """Makes of preference rows the batches that a chat game is played on.

    Args:
        tokenizer: fast, with a chat template; its pad token, or the end of text.
        system: a system message in front of prompts that are texts.
        rewrites: gives texts that ask what a prompt asks, by which a share of the prompts is
            replaced anew in each batch of training, as MixAT does; see `mixadv.tokens.rewritten`.
        share: of the prompts.
        max_length: of prompt and answer, in tokens; longer answers are cut. None cuts nothing.
    """

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        rewrites: Callable[[str], Sequence[str]] | None = None,
        share: float = 0.5,
        max_length: int | None = None,
    ) -> None:
        if max_length is not None:
            check_integer(type(self).__name__, "max_length", max_length, 2)
        self.tokenizer, self.system = tokenizer, system
        self.rewrites, self.share, self.max_length = rewrites, share, max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return `chosen` and `rejected`, and `others` where rows bring them, as dicts.

        With a `max_length` also `cut`, `[B]`: in how many of its answers each row was.
        """
        if self.rewrites is not None:
            rows = rewritten(rows, self.rewrites, self.share)
        how: dict[str, Any] = {"system": self.system, "padding_side": "right"}
        chosen, rejected = preference_batches(self.tokenizer, rows, **how)
        batches = {"chosen": chosen, "rejected": rejected}
        others = [row[OTHERS] for row in rows if row.get(OTHERS) is not None]
        if others:
            prompts, answers = ([row[name] for row in others] for name in COLUMNS[:2])
            batches[OTHERS] = chat_batch(self.tokenizer, prompts, answers, **how)
        found: dict[str, Any] = {}
        if self.max_length is not None:
            found[CUT] = torch.zeros(len(rows), dtype=torch.long)
            for name, batch in batches.items():
                batches[name], cut = shortened(batch, self.max_length)
                found[CUT][: len(cut)] += cut
        return {**found, **{name: batch._asdict() for name, batch in batches.items()}}

    def as_written(self) -> ChatCollator:
        """Return the collator that leaves prompts as they are: what is measured is not drawn."""
        plain = copy.copy(self)
        plain.rewrites = None
        return plain


class Beside(torch.utils.data.Dataset[dict[str, Any]]):
    """Preference rows, each beside a row of other data.

    Args:
        rows: of preference data.
        others: in turn, and from epoch to epoch; None leaves them out.
    """

    def __init__(self, rows: Any, others: Any) -> None:
        self.rows, self.others = rows, others
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # with workers that live on
        if not hasattr(rows, "__len__") or not len(rows):
            raise ValueError(
                "There are no rows with an adversary: train_dataset must be a data set of at least "
                f"one row {', '.join(COLUMNS)}, whose length is known, got {rows!r:.80}."
            )
        self._check("train_dataset", rows[0], COLUMNS)
        if others is not None:
            if not hasattr(others, "__len__"):
                raise ValueError(
                    "retain_dataset must be a data set whose length is known, got "
                    f"{others!r:.80}: of a stream give a part, list(stream.take(1000))."
                )
            if not len(others):
                raise ValueError("retain_dataset has no rows: leave it out to retain nothing.")
            self._check("retain_dataset", others[0], COLUMNS[:2])

    def _check(self, name: str, row: Mapping[str, Any], columns: Sequence[str]) -> None:
        lacking = [column for column in columns if not row.get(column)]
        if lacking:
            raise ValueError(
                f"{name} needs the columns {', '.join(columns)}, and its first row has no "
                f"{lacking[0]!r}, it has {', '.join(row)}."
            )

    def __len__(self) -> int:
        """Return the number of preference rows."""
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Return a preference row, with another one under `others`."""
        whole = self.rows[place]
        row = {
            name: whole[name] for name in COLUMNS if name in whole
        }  # the collator says which not
        if self.others is None:
            return row
        turn = int(self.epoch) * len(self.rows) + place
        return {**row, OTHERS: self.others[turn % len(self.others)]}

    def begin(self, epoch: float | None) -> None:
        """Go on with the other rows where the epoch before has ended."""
        self.epoch.fill_(int(epoch or 0))  # that of a run which goes on may be a fraction
