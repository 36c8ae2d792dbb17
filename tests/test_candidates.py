"""Candidates fit where they stand, and come from where they say."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mixadv.tokens import MaskedCandidates, SimilarWords, Typos
from mixadv.tokens.reading.words import Words
from mixadv.tokens.substitution.candidates import usable
from tests.substitution_zoo import TABLE, piece_tokenizer, tiny, word_tokenizer
from tests.tokenizers_zoo import word_pieces
from tests.zoo import assert_same, fingerprint

TEXTS = st.text(alphabet="abXY'’-. ,9é我们 \n", min_size=1, max_size=25)
WORDS = st.text(alphabet="abcXY'- é我", max_size=6)


# Any source ------------------------------------------------------------------------------------


@given(text=TEXTS, found=st.lists(WORDS, max_size=12), data=st.data())
def test_what_is_usable_leaves_all_other_words_where_they_are(
    text: str, found: list[str], data: Any
):
    words = Words(text)
    if not len(words):
        return
    index = data.draw(st.integers(0, len(words) - 1))
    kept = usable(words, index, found, most=20)
    assert len(kept) == len(set(kept))
    for new in kept:
        changed = Words(words.replaced({index: new}))
        assert list(changed) == [*list(words)[:index], new, *list(words)[index + 1 :]]
        assert new.lower() != words[index].lower()
        assert new.lower() in {word.lower() for word in found}


@given(st.lists(st.sampled_from(["fine", "nice", "Good", "great", "good"]), max_size=8))
def test_candidates_keep_their_order_and_the_case_of_the_word(found: list[str]):
    expected = [word for word in dict.fromkeys(found) if word.lower() != "good"]
    for old, cased in (("good", str), ("Good", str.title), ("GOOD", str.upper)):
        assert usable(Words(f"a {old} film"), 1, found, 20) == [cased(word) for word in expected]
        assert len(usable(Words(f"a {old} film"), 1, found, 2)) == min(2, len(expected))


def test_what_is_not_one_word_is_no_candidate():
    assert usable(Words("a film"), 1, ["motion picture", "", "!", "movie-", "movie"], 20) == [
        "movie"
    ]
    assert usable(Words("我a"), 0, ["b", "你"], 20) == ["你"]  # "ba" would be one word


# Tables ----------------------------------------------------------------------------------------


def test_similar_words_are_those_of_the_table_or_the_function():
    texts = [Words("the Film"), Words("plot"), Words("end")]
    expected = [["Movie", "Picture"], ["story"], []]
    assert SimilarWords(TABLE)(texts, [1, 0, 0]) == expected
    assert SimilarWords(lambda word: tuple(TABLE.get(word, ())))(texts, [1, 0, 0]) == expected
    assert SimilarWords(TABLE, max_candidates=1)(texts[:1], [1]) == [["Movie"]]


def test_a_table_without_similar_words_is_refused():
    for table in ({}, {"film": []}):
        with pytest.raises(ValueError, match=f"names {len(table)} words"):
            SimilarWords(table)
    with pytest.raises(ValueError, match="max_candidates must be at least 1, got 0"):
        SimilarWords(TABLE, max_candidates=0)


# Typos -----------------------------------------------------------------------------------------


def distance(old: str, new: str) -> int:
    """Return how many slips apart two words are: letters in, out, changed, or two swapped."""
    costs = {(i, 0): i for i in range(len(old) + 1)}
    costs |= {(0, j): j for j in range(len(new) + 1)}
    for i, j in itertools.product(range(1, len(old) + 1), range(1, len(new) + 1)):
        change = costs[i - 1, j - 1] + (old[i - 1] != new[j - 1])
        costs[i, j] = min(costs[i - 1, j] + 1, costs[i, j - 1] + 1, change)
        if i > 1 and j > 1 and old[i - 2 : i] == new[j - 2 : j][::-1]:
            costs[i, j] = min(costs[i, j], costs[i - 2, j - 2] + 1)
    return costs[len(old), len(new)]


@given(
    word=st.text(alphabet="abcdefghijklmnopqrstuvwxyzé", min_size=1, max_size=9),
    cased=st.sampled_from([str.lower, str.upper, str.title]),
    most=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_a_typo_is_one_slip_inside_a_word(word: str, cased: Any, most: int, seed: int):
    word = cased(word)
    [found] = Typos(most, seed)([Words(word)], [0])
    assert len(found) <= most
    if len(word) < 4:
        assert found == []
    for typo in found:
        assert distance(word, typo) == 1
        assert (typo[0], typo[-1]) == (word[0], word[-1])
    assert Typos(most, seed)([Words(f"one more {word}")], [2]) == [found]


def test_typos_are_of_every_kind_and_differ_by_seed():
    [found] = Typos(max_candidates=1000)([Words("tower")], [0])
    # "tower": swaps and losses of the three letters inside; o has the keys i, p, l beside it,
    # w has q, e, s and e has w, r, d.
    keys = {"o": "ipl", "w": "qes", "e": "wrd"}
    expected = {"twoer", "toewr", "twer", "toer", "towr"}
    for at, letter in enumerate("owe", 1):
        for key in keys[letter]:
            expected |= {"tower"[:at] + letter + key + "tower"[at + 1 :]}
            expected |= {"tower"[:at] + key + "tower"[at + 1 :]}
    assert set(found) == expected
    draws = {
        tuple(Typos(max_candidates=3, seed=seed)([Words("tower")], [0])[0]) for seed in range(5)
    }
    assert len(draws) > 1


# Masked language models ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked() -> MaskedCandidates:
    tokenizer = piece_tokenizer()
    return MaskedCandidates(
        tiny(transformers.BertForMaskedLM, tokenizer), tokenizer, max_candidates=4
    )


def expected_words(source: MaskedCandidates, before: str, after: str, old: str) -> list[str]:
    """Return the likeliest whole words between two halves of a text, read alone."""
    model, tokenizer = source.model.eval(), source.tokenizer
    ids = tokenizer(f"{before}[MASK]{after}", return_tensors="pt")
    with torch.no_grad():
        [logits] = model(**ids).logits[ids["input_ids"] == tokenizer.mask_token_id]
    tokens = tokenizer.convert_ids_to_tokens(logits.argsort(descending=True).tolist())
    return [t for t in tokens if t.isalpha() and t != old][: source.max_candidates]


def test_masked_candidates_are_the_likeliest_whole_words_in_the_context(masked: MaskedCandidates):
    texts = ["the film was good", "really wonderful plot, and the end!", "bad"]
    indices = [3, 1, 0]
    found = masked([Words(text) for text in texts], indices)
    assert found == [
        expected_words(masked, "the film was ", "", "good"),
        expected_words(masked, "really ", " plot, and the end!", "wonderful"),
        expected_words(masked, "", "", "bad"),
    ]
    assert len({tuple(words) for words in found}) == 3  # the context matters
    assert {len(words) for words in found} == {4}
    few = MaskedCandidates(masked.model, masked.tokenizer, max_candidates=4, batch_size=1)
    assert few([Words(text) for text in texts], indices) == found


def test_a_word_beyond_what_the_model_reads_has_no_candidates(masked: MaskedCandidates):
    assert masked([Words("the " * 60)], [55]) == [[]]


def test_a_mask_in_the_text_is_not_taken_for_the_word(masked: MaskedCandidates):
    ids = masked.tokenizer("the [MASK] [MASK] end", return_tensors="pt")
    with torch.no_grad():
        logits = masked.model.eval()(**ids).logits[0, 3]
    tokens = masked.tokenizer.convert_ids_to_tokens(logits.argsort(descending=True).tolist())
    expected = [t for t in tokens if t.isalpha() and t != "film"][:4]
    assert masked([Words("the [MASK] film end")], [2]) == [expected]


def test_candidates_are_whole_words_of_letters(masked: MaskedCandidates):
    every = MaskedCandidates(masked.model, masked.tokenizer, max_candidates=10_000)
    [found] = every([Words("the film")], [1])
    vocabulary = set(masked.tokenizer.get_vocab())
    assert set(found) == {token for token in vocabulary if token.isalpha()} - {"film"}
    assert {"1", "##der", "."} <= vocabulary


def test_a_sign_that_another_family_marks_words_with_hides_no_words():
    tokenizer = word_pieces("film", "movie", "##s", "▁")
    source = MaskedCandidates(tiny(transformers.BertForMaskedLM, tokenizer), tokenizer)
    assert source([Words("film")], [0]) == [["movie"]]


def test_a_masked_model_is_left_as_it_was(masked: MaskedCandidates):
    masked.model.train()
    before = fingerprint(masked.model)
    masked([Words("the film")], [1])
    assert_same(fingerprint(masked.model), before)


class Slow:
    is_fast = False
    mask_token = "[MASK]"


def test_what_is_no_masked_language_model_is_refused():
    tokenizer = word_tokenizer()
    model = tiny(transformers.BertForMaskedLM, tokenizer)
    with pytest.raises(TypeError, match="Slow does not tell which characters"):
        MaskedCandidates(model, Slow())
    for kind in (transformers.BertModel, transformers.BertForSequenceClassification):
        with pytest.raises(TypeError, match=f"{kind.__name__} has no language-model head"):
            MaskedCandidates(tiny(kind, tokenizer), tokenizer)
    none = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no mask token"):
        MaskedCandidates(model, none)


@pytest.mark.parametrize("similar", [{"film": "movie"}, lambda word: "movie", {"film": [None]}])
def test_similar_words_are_a_list(similar: Any):
    """A string would be read letter by letter."""
    with pytest.raises(ValueError, match=r"a list of strings, \[\] for none|got None"):
        SimilarWords(similar)([Words("a film")], [1])
