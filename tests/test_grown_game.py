"""Texts added by double oracle: on neighbourhoods small enough to list, the whole game's value."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixadv.tokens import SimilarWords, WordSubstitution, grown_game, substitution_game
from mixadv.tokens.reading.words import Words
from tests.substitution_zoo import TABLE, BagOfWords, word_tokenizer
from tests.test_substitution_game import classifier
from theory.oracles.finite import equilibrium

TEXT = "The good film and the plot"
TOLERANCE = 1e-3


def allowed(most: int, **changes: Any) -> WordSubstitution:
    return WordSubstitution(SimilarWords(TABLE), max_share=0.0, min_words=most, **changes)


def grown(*given: Any) -> Any:
    return grown_game(*given, tolerance=TOLERANCE)


def listed(most: int, text: str = TEXT) -> list[str]:
    """Return all texts with at most so many words replaced."""
    words = Words(text)
    options = [[word, *TABLE.get(word.lower(), ())] for word in words]
    found = [
        words.replaced({i: new for i, new in enumerate(chosen) if new != words[i]})
        for chosen in itertools.product(*options)
        if sum(new != words[i] for i, new in enumerate(chosen)) <= most
    ]
    return sorted(found, key=lambda other: other != text)


def whole(learners: Any, most: int) -> tuple[list[str], torch.Tensor]:
    texts = listed(most)
    return texts, substitution_game(learners, word_tokenizer(), texts, 1).payoff


@pytest.mark.parametrize("seed", range(6))
def test_where_one_word_may_change_it_ends_at_the_value_of_all_texts(seed: int):
    learners = [classifier(3 * seed + i) for i in range(3)]
    texts, payoff = whole(learners, 1)
    found = grown(learners, word_tokenizer(), TEXT, 1, allowed(1))
    exact = equilibrium(payoff).value
    assert found.gap <= TOLERANCE
    assert found.lower - 1e-6 <= exact <= found.upper + 1e-6
    assert found.upper == pytest.approx((found.learner @ payoff).max().item(), abs=1e-6)
    assert found.lower == pytest.approx(
        (payoff[:, [texts.index(text) for text in found.columns]] @ found.adversary).min().item(),
        abs=1e-6,
    )


@pytest.mark.parametrize("most", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_where_more_words_may_change_it_promises_no_more_than_the_value(seed: int, most: int):
    learners = [classifier(3 * seed + i) for i in range(3)]
    texts, payoff = whole(learners, most)
    found = grown(learners, word_tokenizer(), TEXT, 1, allowed(most))
    places = [texts.index(text) for text in found.columns]
    torch.testing.assert_close(found.payoff, payoff[:, places], rtol=0, atol=1e-6)
    exact = equilibrium(payoff).value
    assert found.lower <= exact + 1e-6
    assert (found.learner @ payoff).max() >= exact - 1e-6


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_of_one_learner_that_adds_words_up_the_worst_text_is_found(seed: int, most: int):
    """Each word moves the margin by itself, so that the best changes together are best alone."""
    source = torch.Generator().manual_seed(seed)
    learner = BagOfWords(0.3 * torch.randn(len(word_tokenizer()), 2, generator=source))
    texts, payoff = whole([learner], most)
    found = grown([learner], word_tokenizer(), TEXT, 1, allowed(most))
    assert found.lower == pytest.approx(payoff.max().item(), abs=1e-6)
    best = found.columns[int(found.adversary.argmax())]
    assert payoff[0, texts.index(best)] == pytest.approx(payoff.max().item(), abs=1e-6)


def test_few_of_the_texts_are_read():
    text = "The good film and the bad actor was slow"
    learner = [BagOfWords(torch.randn(len(word_tokenizer()), 2)) for _ in range(2)]
    found = grown(learner, word_tokenizer(), text, 1, allowed(9))
    assert learner[0].texts < len(listed(9, text)) / 4
    assert found.columns[0] == text


def test_what_is_not_similar_or_protected_is_never_played():
    seen: list[str] = []

    def keeps(originals: list[str], changed: list[str]) -> list[bool]:
        assert set(originals) <= {TEXT}
        seen.extend(changed)
        return ["movie" not in text for text in changed]

    learners: Any = [classifier(i) for i in range(2)]
    similar: Any = SimpleNamespace(keeps=keeps)
    how = allowed(3, similarity=similar, protected=frozenset({"plot"}))
    found = grown(learners, word_tokenizer(), TEXT, 1, how)
    assert len(seen) == len(set(seen)) > 0
    for text in found.columns:
        assert "movie" not in text
        assert text.endswith("plot")


@pytest.mark.parametrize("column", [0, 1])
def test_of_a_pair_one_text_changes(column: int):
    pair = ("the good plot", "a good film")
    learners = [classifier(i) for i in range(2)]
    found = grown_game(learners, word_tokenizer(), pair, 0, allowed(2, column=column))
    assert found.columns[0] == pair
    assert all(text[1 - column] == pair[1 - column] for text in found.columns)


def test_without_learners_there_is_no_game():
    with pytest.raises(ValueError, match="needs rows and columns"):
        grown_game([], word_tokenizer(), TEXT, 1, allowed(1))
