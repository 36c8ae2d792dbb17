"""Word substitution in training: sources of candidates by name, and rows with perturbed copies."""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets

from common import data, model
from common.places import check_words
from common.results import Run
from mixadv.tokens import (
    Candidates,
    MaskedCandidates,
    Neighbours,
    SimilarWords,
    Typos,
    WordSubstitution,
    adversarial_rows,
)
from mixadv.tokens.substitution.constraints import portion

BUILTIN = Path(__file__).parent.parent / "data" / "neighbours" / "neighbours.jsonl"


def candidates(name: str) -> Candidates:
    """Return the source of candidates of a name, see `common.places.SOURCES`."""
    if name == "typos":
        return Typos()
    if name.startswith("mlm:"):
        return MaskedCandidates(*model.load_masked(name.removeprefix("mlm:")))
    check_words(name)
    return SimilarWords(table_of(name))


def table_of(name: str) -> Neighbours:
    """Return the table of similar words in a file, "builtin" that of the project."""
    return Neighbours.read(BUILTIN if name == "builtin" else name)


def attack(source: str, **limits: Any) -> WordSubstitution:
    """Return what all scripts mean by an attack of a name, a source of candidates.

    Args:
        source: see `common.places.SOURCES`.
        limits: of `WordSubstitution`, where they are not its defaults.
    """
    return WordSubstitution(candidates(source), **limits)


def described(name: str, attack: WordSubstitution) -> str:
    """Return in a line what an attack may do, to stand below its results."""
    alike = "no bound on the similarity of the sentences"
    if attack.similarity is not None:
        alike = f"sentences of a cosine of at least {attack.similarity.min_cosine:g}"
    most = f"{100 * attack.max_share:g} % of the words of a row, or {attack.min_words} if more"
    return f"Attack {name}: at most {most}; {alike}."


class Source:
    """Batches of the training rows; after the first epoch also of perturbed copies of some.

    A2T (Yoo and Qi, 2021): each later epoch begins with an attack on the model as it stands, on
    rows drawn anew, and goes over clean and perturbed rows alike. Each process attacks its part.

    Args:
        run: what is trained.
        rows: to train on.
        size: rows of a batch, over all processes.
        part: of a batch, and of the rows attacked, for this process.
        model: in training.
        tokenizer: of the model.
    """

    def __init__(
        self, run: Run, rows: Dataset, size: int, part: slice, model: Any, tokenizer: Any
    ) -> None:
        self.run = run
        self.rows = rows
        self.size = size
        self.part = part
        self.model = model
        self.tokenizer = tokenizer
        self.attack: WordSubstitution | None = None
        if run.substitute:
            self.attack = WordSubstitution(candidates(run.neighbours), max_length=run.max_length)
        self.later = len(rows) + portion(len(rows), run.substitute)
        """Rows of an epoch after the first."""

    def updates(self, epochs: float) -> float:
        """Return how many updates so many epochs are."""
        rows = len(self.rows) * min(epochs, 1.0) + self.later * max(epochs - 1.0, 0.0)
        return rows / (self.size * self.run.accumulate)

    def batches(self, done: int, copied: list[list[Any]]) -> Iterator[dict[str, list[Any]]]:
        """Yield this process's part of each batch, without end.

        Args:
            done: batches that come no more.
            copied: number and texts of the rows perturbed for the epoch that is under way; filled
                anew when an epoch begins, and to be kept in checkpoints: the model that they were
                made against is gone.
        """
        first, each = (-(-rows // self.size) for rows in (len(self.rows), self.later))
        epoch, offset = (0, done) if done < first else divmod(done - first + each, each)
        for number in itertools.count(epoch):
            if number and self.attack is not None and not offset:
                copied[:] = self._perturbed(self.attack, number)
            rows = self._with(copied)
            made = data.epoch(data.lengths(rows), self.size, self.run.seed, number)
            for batch in made[offset:]:
                yield rows[batch[self.part]]
            offset = 0

    def _perturbed(self, attack: WordSubstitution, epoch: int) -> list[list[Any]]:
        """Attack the rows of an epoch, each process its part; return the copies of all."""
        seed = random.Random(f"{self.run.seed}/{epoch}/substitute").getrandbits(63)
        texts = [pair if len(pair) == 2 else pair[0] for pair in data.texts(self.rows)]
        drawn, perturbed = adversarial_rows(
            self.model,
            self.tokenizer,
            texts,
            self.rows["label"][:],
            attack,
            self.run.substitute,
            torch.Generator().manual_seed(seed),
            self.part,
        )
        pairs = [[text] if isinstance(text, str) else list(text) for text in perturbed]
        found = [[row, *columns] for row, columns in zip(drawn, pairs, strict=True)]
        return sorted(gather_object(found))

    def _with(self, copied: Sequence[Sequence[Any]]) -> Dataset:
        """Return the rows and their perturbed copies."""
        if not copied:
            return self.rows
        labels = self.rows["label"][:]
        columns: dict[str, list[Any]] = {"label": [labels[row] for row, *_ in copied]}
        for at, name in enumerate(("text", "pair"), 1):
            if name in self.rows.column_names:
                columns[name] = [copy[at] for copy in copied]
        return concatenate_datasets([self.rows, Dataset.from_dict(columns, self.rows.features)])
