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
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mixadv.checks import check_integer
from mixadv.game import Game
from mixadv.games.solve import mixtures, pure_where_no_worse
from mixadv.model.modules import unwrap
from mixadv.model.replay import evaluating
from mixadv.tokens.reading.encoding import Text, longest, segment, tokens, with_segment
from mixadv.tokens.reading.words import Words
from mixadv.tokens.substitution.candidates import Candidates
from mixadv.tokens.substitution.constraints import FUNCTION_WORDS, Similarity
from mixadv.tokens.substitution.reader import class_logits

Classifier = Callable[..., Any]
"""Reads an encoding as a classifier does, by keyword: returns logits, or an output with them."""


class Equilibrium(NamedTuple):
    """Mixtures of both players, and what they and the best pure strategies guarantee.

    Attributes:
        learner: weights x of the learner samples, `[m]`, float64.
        adversary: weights y of the texts, `[n]`, float64.
        value: xᵀAy.
        gap: the duality gap of x and y, exactly: `worst − guaranteed`.
        guaranteed: what the adversary's mixture earns at least, `min_i (Ay)_i`.
        pure_adversary_value: what its best single text earns at least, `max_j min_i A_ij`.
        worst: what the learner's mixture loses at most, `max_j (xᵀA)_j`.
        pure_learner_value: what its best single sample loses at most, `min_i max_j A_ij`.
    """

    learner: Tensor
    adversary: Tensor
    value: float
    gap: float
    guaranteed: float
    pure_adversary_value: float
    worst: float
    pure_learner_value: float


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
        """Return both players' mixtures; see `solve_games`.

        Example:
            >>> game = SubstitutionGame(("a", "b"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            >>> found = game.solve()
            >>> round(found.guaranteed, 4), found.pure_adversary_value
            (0.5, 0.0)
            >>> round(found.worst, 4), found.pure_learner_value
            (0.5, 1.0)
        """
        return solve_games([self], steps, tolerance)[0]


def solve_games(
    games: Sequence[SubstitutionGame], steps: int = 20_000, tolerance: float = 1e-7
) -> list[Equilibrium]:
    """Return both players' mixtures in each game; all are solved at once.

    By restarted mirror prox, which stops where the gap of every game is within the tolerance. A
    player whose mixture guarantees no more than its best pure strategy plays the pure one.

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
            f"solve_games takes games with the same learners, got {len(games)} games with "
            f"{sorted(learners)} learners."
        )
    payoffs = [game.payoff.double() for game in games]
    columns = torch.arange(max(payoff.shape[1] for payoff in payoffs))
    # A column that is there twice changes no guarantee; its weights are added up.
    padded = torch.stack([p[:, columns.where(columns < p.shape[1], 0)] for p in payoffs])
    result = []
    for payoff, x, y in zip(payoffs, *mixtures(padded, steps, tolerance), strict=True):
        own = y[: payoff.shape[1]].clone()
        own[0] += y[payoff.shape[1] :].sum()
        result.append(_certified(payoff, x, own))
    return result


def _certified(payoff: Tensor, x: Tensor, y: Tensor) -> Equilibrium:
    x, y = pure_where_no_worse(payoff, x, y)
    rows, columns = payoff.amax(1), payoff.amin(0)  # what pure strategies lose, earn
    worst, guaranteed = (x @ payoff).amax().item(), (payoff @ y).amin().item()
    return Equilibrium(
        learner=x,
        adversary=y,
        value=(x @ payoff @ y).item(),
        gap=worst - guaranteed,
        guaranteed=guaranteed,
        pure_adversary_value=columns.amax().item(),
        worst=worst,
        pure_learner_value=rows.amin().item(),
    )


def single_substitutions(
    text: Text,
    candidates: Candidates,
    *,
    max_texts: int = 32,
    protected: frozenset[str] = FUNCTION_WORDS,
    similarity: Similarity | None = None,
    column: int = 1,
    seed: int = 0,
) -> tuple[Text, ...]:
    """Return the text, and every text that replaces one of its words.

    Args:
        text: a string, or a pair of them.
        candidates: where replacements come from.
        max_texts: the number of texts returned, the original included. If there are more, they are
            drawn by the seed.
        protected: lower-case words that are never replaced.
        similarity: a bound on the similarity with the original, or `None` for no bound.
        column: of a pair, the text whose words are replaced.
        seed: of the draw.

    Example:
        >>> from mixadv.tokens import SimilarWords
        >>> single_substitutions("a fine film", SimilarWords({"film": ["movie"], "fine": ["good"]}))
        ('a fine film', 'a good film', 'a fine movie')
    """
    check_integer("single_substitutions", "max_texts", max_texts, 1)
    words = Words(segment(text, column))
    options = replacements(words, candidates, protected)
    found = [words.replaced({at: new}) for at, own in options.items() for new in own]
    if similarity is not None:
        found = list(compress(found, similarity.keeps([words.text] * len(found), found)))
    if len(found) > max_texts - 1:
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(found), generator=draw)[: max_texts - 1].sort().values
        found = [found[i] for i in chosen.tolist()]
    return (text, *(with_segment(text, column, new) for new in found))


def replacements(
    words: Words, candidates: Candidates, protected: frozenset[str]
) -> dict[int, Sequence[str]]:
    """Return what may stand in the place of each word, by its number."""
    at = [i for i in range(len(words)) if words[i].lower() not in protected]
    return dict(zip(at, candidates([words] * len(at), at), strict=True))


def dropout_masks(model: nn.Module, seeds: Sequence[int]) -> list[Classifier]:
    """Return the model with dropout on, once for each seed: a sample of thinned networks.

    The masks are drawn anew from the seed for each text, which is read by itself, so that an entry
    of the game depends on its row and its column alone.
    """

    def read(seed: int, /, **encoding: Tensor) -> Tensor:
        logits = []
        with evaluating(model):
            model.train()
            for row, real in enumerate(encoding["attention_mask"].bool()):
                torch.manual_seed(seed)
                text = {n: v[row : row + 1, real] for n, v in encoding.items()}
                logits.append(class_logits(model(**text)))
        return torch.cat(logits)

    return [_Sample(model, partial(read, seed)) for seed in seeds]


def learner_samples(game: Game) -> list[Classifier]:
    """Return the model with each of the last samples of θ that the game keeps.

    Raises:
        GameError: if the game keeps none; MAT does with `samples=R`.
    """
    model = unwrap(game.model)

    def read(sample: dict[str, Tensor], /, **encoding: Tensor) -> Tensor:
        with evaluating(model):
            return class_logits(functional_call(model, sample, (), encoding))

    return [_Sample(model, partial(read, sample)) for sample in game.learner_samples]


def substitution_game(
    learners: Sequence[Classifier],
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
        texts: the columns, as `single_substitutions` returns them; right-padded together.
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
    read: Classifier

    def __call__(self, **encoding: Tensor) -> Any:
        return self.read(**encoding)


def _model(learner: Classifier) -> nn.Module | None:
    """Return the model that a learner reads with, where that is known."""
    found = learner.model if isinstance(learner, _Sample) else learner
    return found if isinstance(found, nn.Module) else None


def _errors(learner: Classifier, encoding: Any, label: int) -> Tensor:
    model = _model(learner)
    device = encoding["input_ids"].device if model is None else next(model.parameters()).device
    logits = class_logits(learner(**{name: values.to(device) for name, values in encoding.items()}))
    if not 0 <= label < logits.shape[-1]:
        raise ValueError(f"label must be 0 to {logits.shape[-1] - 1}, a learner's, got {label}.")
    return 1 - logits.double().softmax(-1)[:, label].cpu()
