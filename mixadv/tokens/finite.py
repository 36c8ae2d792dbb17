"""Word substitution as a finite zero-sum game, solved for mixtures of both players.

    min_{x ∈ Δ_m} max_{y ∈ Δ_n} Σ_ij x_i y_j A_ij,    A_ij = 1 − p_i(label | text_j)

Rows are samples of the learner: checkpoints, MAT's samples of θ, or dropout masks. Columns are a
text and what substitutions make of it. A_ij is how often learner i, drawing its answer from its
probabilities, is wrong about text j: a mixture of learners errs as the mean of their probabilities
does. Against a learner that mixes, the best single substitution is a best response; against one
that can look at the strategy and pick a sample, the adversary has to mix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mixadv.game import Game
from mixadv.games import MatrixGame, solve
from mixadv.model.modules import unwrap
from mixadv.tokens.candidates import Candidates, check_most
from mixadv.tokens.constraints import FUNCTION_WORDS, Similarity
from mixadv.tokens.reader import Text, evaluating, longest, tokens
from mixadv.tokens.words import Words

Learner = Callable[..., Any]
"""Reads an encoding as a classifier does, by keyword: returns logits, or an output with them."""


class Equilibrium(NamedTuple):
    """Mixtures of both players, and what they and the best pure strategies guarantee.

    Attributes:
        learner: weights x of the learner samples, `[m]`, float64.
        adversary: weights y of the texts, `[n]`, float64.
        value: xᵀAy.
        gap: the duality gap of x and y, exactly: `worst − guaranteed`.
        guaranteed: what the adversary's mixture earns at least, `min_i (Ay)_i`.
        best_single: what its best single text earns at least, `max_j min_i A_ij`.
        worst: what the learner's mixture loses at most, `max_j (xᵀA)_j`.
        best_row: what its best single sample loses at most, `min_i max_j A_ij`.
    """

    learner: Tensor
    adversary: Tensor
    value: float
    gap: float
    guaranteed: float
    best_single: float
    worst: float
    best_row: float


@dataclass(frozen=True)
class SubstitutionGame:
    """A game about one text.

    Attributes:
        texts: the columns; the first is the text itself.
        payoff: `[m, n]`, the error of each learner at each text, in [0, 1].
    """

    texts: tuple[Text, ...]
    payoff: Tensor

    def __post_init__(self) -> None:
        if self.payoff.dim() != 2 or self.payoff.shape[1] != len(self.texts):
            raise ValueError(
                f"payoff must have a column for each of the {len(self.texts)} texts, got shape "
                f"{list(self.payoff.shape)}."
            )

    def solve(self, steps: int = 20_000, tolerance: float = 1e-7) -> Equilibrium:
        """Return both players' mixtures; see `solve_all`.

        Example:
            >>> game = SubstitutionGame(("a", "b"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            >>> found = game.solve()
            >>> round(found.guaranteed, 4), found.best_single, round(found.worst, 4), found.best_row
            (0.5, 0.0, 0.5, 1.0)
        """
        return solve_all([self], steps, tolerance)[0]


def solve_all(
    games: Sequence[SubstitutionGame], steps: int = 20_000, tolerance: float = 1e-7
) -> list[Equilibrium]:
    """Return both players' mixtures in each game; all are solved at once.

    By restarted mirror prox, which stops where the gap of every game is within the tolerance. A
    player whose mixture guarantees less than its best pure strategy, by what is left of the gap,
    plays the pure one: no mixture returned is worse than a pure strategy.

    Args:
        games: with the same learners.
        steps: at most.
        tolerance: of the duality gap.

    Raises:
        ValueError: without games, or where they differ in the number of learners.
    """
    learners = {len(game.payoff) for game in games}
    if len(learners) != 1:
        raise ValueError(
            f"solve_all takes games with the same learners, got {len(games)} games with "
            f"{sorted(learners)} learners."
        )
    widest = max(len(game.texts) for game in games)
    # A column that is there twice changes no guarantee; its weights are added up.
    padded = torch.stack([_widened(game.payoff.double(), widest) for game in games])
    found = solve(MatrixGame(padded), "restarted", steps, tolerance=tolerance, progress=False)
    assert isinstance(found.learner, Tensor)
    assert isinstance(found.adversary, Tensor)
    result = []
    for game, x, y in zip(games, found.learner, found.adversary, strict=True):
        width = len(game.texts)
        own = y[:width].clone()
        own[0] += y[width:].sum()
        result.append(_certified(game.payoff.double(), x, own))
    return result


def _widened(payoff: Tensor, width: int) -> Tensor:
    first = payoff[:, :1].expand(-1, width - payoff.shape[1])
    return torch.cat([payoff, first], 1)


def _certified(payoff: Tensor, x: Tensor, y: Tensor) -> Equilibrium:
    rows, columns = payoff.amax(1), payoff.amin(0)  # what pure strategies lose, earn
    if (x @ payoff).amax() > rows.amin():
        x = torch.eye(len(rows), dtype=payoff.dtype)[rows.argmin()]
    if (payoff @ y).amin() < columns.amax():
        y = torch.eye(len(columns), dtype=payoff.dtype)[columns.argmax()]
    worst, guaranteed = (x @ payoff).amax().item(), (payoff @ y).amin().item()
    return Equilibrium(
        learner=x,
        adversary=y,
        value=(x @ payoff @ y).item(),
        gap=worst - guaranteed,
        guaranteed=guaranteed,
        best_single=columns.amax().item(),
        worst=worst,
        best_row=rows.amin().item(),
    )


# Columns ---------------------------------------------------------------------------------------


def substitutions(
    text: Text,
    candidates: Candidates,
    *,
    most: int = 32,
    protected: frozenset[str] = FUNCTION_WORDS,
    similarity: Similarity | None = None,
    column: int = 1,
    seed: int = 0,
) -> tuple[Text, ...]:
    """Return the text and what replacing one of its words makes of it.

    Args:
        text: a string, or a pair of them.
        candidates: where replacements come from.
        most: texts returned, the original among them; drawn by the seed where there are more.
        protected: lower-case words that stay.
        similarity: with the original, or `None` for any.
        column: of a pair, the text whose words are replaced.
        seed: of the draw.

    Example:
        >>> from mixadv.tokens import SimilarWords
        >>> substitutions("a fine film", SimilarWords({"film": ["movie"], "fine": ["good"]}))
        ('a fine film', 'a good film', 'a fine movie')
    """
    check_most(most)
    words = Words(text if isinstance(text, str) else text[column])
    at = [i for i in range(len(words)) if words[i].lower() not in protected]
    found = [
        words.replaced({i: new})
        for i, replacements in zip(at, candidates([words] * len(at), at), strict=True)
        for new in replacements
    ]
    if similarity is not None:
        near = similarity([words.text] * len(found), found)
        found = [new for new, cosine in zip(found, near, strict=True) if cosine >= similarity.least]
    if len(found) > most - 1:
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(found), generator=draw)[: most - 1].sort().values
        found = [found[i] for i in chosen.tolist()]
    if isinstance(text, str):
        return (text, *found)
    return (text, *((text[0], new) if column else (new, text[1]) for new in found))


# Rows ------------------------------------------------------------------------------------------


def dropout_masks(model: nn.Module, seeds: Sequence[int]) -> list[Learner]:
    """Return the model with dropout on, once for each seed: a sample of thinned networks.

    The masks are drawn anew from the seed for each text, which is read by itself, so that an entry
    of the game depends on its row and its column alone.
    """

    def learner(seed: int) -> Learner:
        def read(**encoding: Tensor) -> Tensor:
            logits = []
            with evaluating(model):
                model.train()
                for row, real in enumerate(encoding["attention_mask"].bool()):
                    torch.manual_seed(seed)
                    one = {n: v[row : row + 1, real] for n, v in encoding.items()}
                    logits.append(_logits(model(**one)))
            return torch.cat(logits)

        return _Sample(model, read)

    return [learner(seed) for seed in seeds]


def learner_samples(game: Game) -> list[Learner]:
    """Return the model with each of the last samples of θ that the game keeps.

    Raises:
        GameError: if the game keeps none; MAT does with `samples=R`.
    """
    model = unwrap(game.model)

    def learner(sample: dict[str, Tensor]) -> Learner:
        def read(**encoding: Tensor) -> Tensor:
            with evaluating(model):
                return _logits(functional_call(model, sample, (), encoding))

        return _Sample(model, read)

    return [learner(sample) for sample in game.learner_samples]


def substitution_game(
    learners: Sequence[Learner],
    tokenizer: Any,
    texts: Sequence[Text],
    label: int,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
) -> SubstitutionGame:
    """Return the game of learners about a text: each reads all texts.

    Models among the learners are read in evaluation mode; modes and random state are left as they
    were.

    Args:
        learners: the rows; classifiers, or functions that read encodings as they do.
        tokenizer: of them all.
        texts: the columns, as `substitutions` returns them; right-padded together.
        label: the right one of the first text.
        max_length: tokens; the rest of a text is cut. None asks the tokenizer and the model.
        batch_size: texts that are read at a time.

    Raises:
        ValueError: without learners or texts, or for a label that a learner does not know.
    """
    if not learners or not texts:
        raise ValueError(f"A game needs rows and columns, got {len(learners)} and {len(texts)}.")
    models = [model for learner in learners if (model := _model(learner)) is not None]
    like = models[0] if models else nn.Identity()
    limit = max_length or longest(like, tokenizer)
    errors: list[Tensor] = []
    with evaluating(*models), torch.no_grad():
        for start in range(0, len(texts), batch_size):
            encoding = tokens(like, tokenizer, texts[start : start + batch_size], limit)
            errors.append(torch.stack([_errors(learner, encoding, label) for learner in learners]))
    return SubstitutionGame(tuple(texts), torch.cat(errors, 1))


@dataclass(frozen=True)
class _Sample:
    """A learner that reads with a model in another state."""

    model: nn.Module
    read: Learner

    def __call__(self, **encoding: Tensor) -> Any:
        return self.read(**encoding)


def _model(learner: Learner) -> nn.Module | None:
    """Return the model that a learner reads with, where that is known."""
    found = learner.model if isinstance(learner, _Sample) else learner
    return found if isinstance(found, nn.Module) else None


def _errors(learner: Learner, encoding: Any, label: int) -> Tensor:
    model = _model(learner)
    device = encoding["input_ids"].device if model is None else next(model.parameters()).device
    logits = _logits(learner(**{name: values.to(device) for name, values in encoding.items()}))
    if not 0 <= label < logits.shape[-1]:
        raise ValueError(f"label must be 0 to {logits.shape[-1] - 1}, a learner's, got {label}.")
    return 1 - logits.double().softmax(-1)[:, label].cpu()


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
