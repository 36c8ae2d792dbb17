"""An attack by word substitution is real, keeps its constraints, and leaves the model alone."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from mixadv.tokens import Attack, Similarity, SimilarWords, Typos, WordSubstitution, attack_summary
from mixadv.tokens.reading.words import Words
from mixadv.tokens.substitution.attacks import wilson
from mixadv.tokens.substitution.constraints import FUNCTION_WORDS, budget
from mixadv.tokens.substitution.reader import Reader
from tests.substitution_zoo import (
    TABLE,
    VOCABULARY,
    bag_of_words,
    combinations,
    mean_state,
    piece_tokenizer,
    predicted,
    tiny,
    word_tokenizer,
)
from tests.zoo import assert_same, fingerprint

SENTENCES = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=12)
SEPARATORS = st.sampled_from([" ", ", ", " -- ", "! ", "  "])
CASES = st.sampled_from([str.lower, str.upper, str.title])


@st.composite
def texts(draw: Any) -> str:
    """Return a text in several cases, with punctuation."""
    pieces = [[draw(CASES)(word), draw(SEPARATORS)] for word in draw(SENTENCES)]
    return "".join(itertools.chain(*pieces)).strip()


def classifier(tokenizer: Any, labels: int = 2, seed: int = 0) -> Any:
    return tiny(transformers.BertForSequenceClassification, tokenizer, seed, num_labels=labels)


# A check that uses nothing of the library --------------------------------------------------------

WORD = re.compile(r"[A-Za-z0-9]+(?:['-][A-Za-z0-9]+)*")


def check(
    attack: Attack,
    model: Any,
    tokenizer: Any,
    table: Mapping[str, Sequence[str]],
    share: float = 0.1,
    least_words: int = 4,
    column: int | None = None,
    cosine: Callable[[str, str], float] | None = None,
) -> None:
    """Assert all that an attack promises of one text."""
    old, new = attack.original, attack.perturbed
    assert predicted(model, tokenizer, old) == attack.before
    assert predicted(model, tokenizer, new) == attack.after
    assert attack.skipped == (attack.before != attack.label)
    assert attack.succeeded == (attack.before == attack.label != attack.after)
    if column is not None:
        assert old[1 - column] == new[1 - column]
        old, new = old[column], new[column]
    assert WORD.split(old) == WORD.split(new)
    before, after = WORD.findall(old), WORD.findall(new)
    changed = {i: (a, b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
    assert changed == attack.swaps
    assert len(before) == attack.words
    assert len(changed) <= max(math.ceil(round(share * len(before), 6)), least_words)
    for a, b in changed.values():
        assert b.lower() in table[a.lower()]
        assert (b.isupper(), b[0].isupper()) == (a.isupper(), a[0].isupper())
        assert a.lower() not in FUNCTION_WORDS
    if attack.skipped or not changed:
        assert old == new
    if cosine is not None and changed:
        assert cosine(old, new) >= -1e-5


# Attacks -----------------------------------------------------------------------------------------


@given(
    st.lists(texts(), min_size=1, max_size=5),
    st.integers(0, 50),
    st.sampled_from([(0.0, 1), (0.1, 4), (0.3, 0), (1.0, 0)]),
    st.data(),
)
def test_an_attack_keeps_what_it_promises(
    given_texts: list[str], seed: int, allowed: tuple[float, int], data: Any
):
    model, tokenizer = bag_of_words(seed, labels=3), word_tokenizer()
    labels = data.draw(st.lists(st.integers(0, 2), min_size=5, max_size=5))[: len(given_texts)]
    attack = WordSubstitution(SimilarWords(TABLE), max_share=allowed[0], min_words=allowed[1])
    found = attack.attack(model, tokenizer, given_texts, labels)
    assert [(a.original, a.label) for a in found] == list(zip(given_texts, labels, strict=True))
    assert sum(a.queries for a in found) == model.texts
    for attacked_text in found:
        check(attacked_text, model, tokenizer, TABLE, *allowed)


def losses(model: Any, tokenizer: Any, candidates: list[str], label: int) -> torch.Tensor:
    """Return the loss of each text, read alone."""
    model.eval()
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits for text in candidates]
    return F.cross_entropy(torch.cat(logits), torch.full((len(logits),), label), reduction="none")


@given(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=5), st.integers(0, 200))
def test_where_words_add_up_the_attack_succeeds_if_any_text_of_the_table_does(
    words: list[str], seed: int
):
    model, tokenizer = bag_of_words(seed), word_tokenizer()
    label = predicted(model, tokenizer, " ".join(words))
    attack = WordSubstitution(SimilarWords(TABLE), max_share=1.0, protected=frozenset())
    [found] = attack.attack(model, tokenizer, [" ".join(words)], [label])
    reachable = [" ".join(choice) for choice in combinations(words, TABLE)]
    worst = losses(model, tokenizer, reachable, label).max()
    assert found.succeeded == bool(worst > math.log(2))  # two labels: wrong above this
    if not found.succeeded:
        own = losses(model, tokenizer, [str(found.perturbed)], label)
        torch.testing.assert_close(own[0], worst)


@given(st.sampled_from(list(TABLE)), st.integers(0, 500), st.integers(2, 4))
def test_one_word_that_may_change_takes_the_best_of_its_candidates(
    word: str, seed: int, labels: int
):
    model, tokenizer = bag_of_words(seed, labels), word_tokenizer()
    text = f"really {word} end"
    label = predicted(model, tokenizer, text)
    attack = WordSubstitution(SimilarWords(TABLE), max_share=0, min_words=1)
    [found] = attack.attack(model, tokenizer, [text], [label])
    ways = [text, *(f"really {new} end" for new in TABLE[word])]
    wrong = [predicted(model, tokenizer, way) != label for way in ways]
    worth = list(zip(wrong, losses(model, tokenizer, ways, label).tolist(), strict=True))
    assert found.perturbed == ways[worth.index(max(worth))]
    assert found.queries == 1 + len(TABLE[word])


def test_texts_do_not_depend_on_their_company_nor_on_the_batch():
    tokenizer = piece_tokenizer()
    model = classifier(tokenizer, seed=2)
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(VOCABULARY), (n,), generator=draw) for n in range(1, 13)]
    rows = [" ".join(VOCABULARY[i] for i in chosen.tolist()) for chosen in drawn]
    labels = [predicted(model, tokenizer, text) for text in rows]
    together = WordSubstitution(SimilarWords(TABLE)).attack(model, tokenizer, rows, labels)
    assert {a.succeeded for a in together if a.swaps} == {True, False}
    small = WordSubstitution(SimilarWords(TABLE), batch_size=1)
    alone = [small.attack(model, tokenizer, [t], [y])[0] for t, y in zip(rows, labels, strict=True)]
    assert alone == together


@pytest.mark.parametrize("column", [0, 1])
def test_one_text_of_a_pair_is_attacked(column: int):
    tokenizer = piece_tokenizer()
    model = classifier(tokenizer, 3)
    pairs = [("the film was good", "Bad plot, slow actor"), ("good film", "good end"), ("the", "a")]
    labels = [predicted(model, tokenizer, pair) for pair in pairs]
    attack = WordSubstitution(SimilarWords(TABLE), column=column)
    found = attack.attack(model, tokenizer, pairs, labels)
    assert found[0].swaps
    for attacked_text in found:
        check(attacked_text, model, tokenizer, TABLE, column=column)


@given(st.lists(texts(), min_size=1, max_size=3), st.sampled_from([0.5, 0.9, 0.97]))
def test_perturbed_texts_stay_similar_to_the_original(given_texts: list[str], least: float):
    model, tokenizer = bag_of_words(3), word_tokenizer()
    encoder = tiny(transformers.BertModel, tokenizer, seed=1)
    similarity = Similarity(encoder, tokenizer, least, batch_size=7)
    labels = [predicted(model, tokenizer, text) for text in given_texts]
    attack = WordSubstitution(SimilarWords(TABLE), max_share=1.0, similarity=similarity)
    found = attack.attack(model, tokenizer, given_texts, labels)

    def cosine(old: str, new: str) -> float:
        pair = [mean_state(encoder, tokenizer, text) for text in (old, new)]
        return float(F.cosine_similarity(*pair, dim=0)) - least

    for attacked_text in found:
        check(attacked_text, model, tokenizer, TABLE, share=1.0, cosine=cosine)


def test_similarity_is_the_cosine_of_mean_states():
    tokenizer = piece_tokenizer()
    encoder = tiny(transformers.BertModel, tokenizer)
    ones = ["a good film", "bad", "wonderful actor and plot"]
    others = ["a fine film", "bad", "slow"]
    found = Similarity(encoder, tokenizer, batch_size=3)(ones, others)
    own = [
        F.cosine_similarity(*[mean_state(encoder, tokenizer, t) for t in pair], dim=0)
        for pair in zip(ones, others, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(own), rtol=0, atol=1e-5)
    assert found[1] == pytest.approx(1)


# Which words -----------------------------------------------------------------------------------


PAIRS = [("Wonderful actor, don't!", "the end"), ("bad", "thunder-plot")]


@pytest.mark.parametrize("column", [None, 0, 1])
def test_words_are_weighed_by_the_gradients_of_their_tokens(column: int | None):
    tokenizer = piece_tokenizer()
    model = classifier(tokenizer, 3).eval()
    read: Any = PAIRS if column is not None else [*PAIRS[0], "the slow thunder-plot was 1990"]
    own = [text if column is None else text[column] for text in read]
    reader = Reader(model, tokenizer, None, 2, 1 if column is None else column)
    found = reader.read(read, [2, 1, 0][: len(read)], [Words(text) for text in own])
    for label, text, part, result in zip([2, 1, 0], read, own, found, strict=False):
        columns = (text,) if column is None else text
        encoding = tokenizer(*columns, return_tensors="pt", return_offsets_mapping=True)
        spans = encoding.pop("offset_mapping")[0].tolist()
        belongs = [segment == (column or 0) for segment in encoding.sequence_ids()]
        embedded = model.get_input_embeddings()(encoding.pop("input_ids")).detach()
        embedded.requires_grad_()
        model(inputs_embeds=embedded, **encoding).logits.log_softmax(-1)[0, label].backward()
        expected = {}
        for at, match in enumerate(WORD.finditer(part)):
            inside = [
                i
                for i, (a, b) in enumerate(spans)
                if belongs[i] and match.start() <= a < b <= match.end()
            ]
            expected[at] = float(embedded.grad[0, inside].norm())
        assert result.importances == pytest.approx(expected, rel=1e-4)


def test_the_words_that_weigh_most_are_tried_first():
    tokenizer = piece_tokenizer()
    model = classifier(tokenizer)
    text = "good film bad plot slow actor"
    label = predicted(model, tokenizer, text)
    tried: list[int] = []

    def watch(words: Sequence[Words], indices: Sequence[int]) -> list[list[str]]:
        tried.extend(indices)
        return [[] for _ in indices]

    WordSubstitution(watch).attack(model, tokenizer, [text], [label])
    model.eval()
    [found] = Reader(model, tokenizer, None, 2, 1).read([text], [label], [Words(text)])
    weights = found.importances
    assert tried == sorted(weights, key=weights.__getitem__, reverse=True)


def test_function_words_and_words_that_are_cut_stay():
    model, tokenizer = bag_of_words(0), word_tokenizer()
    everything = {word: [new for new in VOCABULARY if new != word] for word in VOCABULARY}
    text = " ".join(["the", "good", "and", "film", "was", "bad"] * 4)
    attack = WordSubstitution(SimilarWords(everything), max_share=1, max_length=9)
    for label in (0, 1):
        [found] = attack.attack(model, tokenizer, [text], [label])
        assert set(found.swaps) <= {1, 3, 5}  # [CLS], seven words, [SEP]
    own = WordSubstitution(SimilarWords(everything), protected=frozenset({"good", "film", "bad"}))
    label = predicted(model, tokenizer, text)
    [found] = own.attack(model, tokenizer, [text], [label])
    assert {old for old, _ in found.swaps.values()} <= {"the", "and", "was"}
    assert found.swaps


@given(st.integers(0, 300), st.floats(0, 1), st.integers(0, 6))
def test_the_share_is_rounded_up_and_never_below_the_least(words: int, share: float, least: int):
    allowed = budget(words, share, least)
    assert min(words, least) <= allowed <= words
    assert share * words - 1e-8 <= allowed or allowed == words
    assert allowed <= max(least, share * words + 1)


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_share_of_a_hundred_words_is_exact(percent: int):
    assert budget(100, percent / 100, 0) == percent


@pytest.mark.parametrize(("share", "least"), [(0.25, 0), (0.1, 3), (0.0, 1), (0.5, 2), (0.0, 0)])
def test_a_sure_model_that_holds_out_loses_as_many_words_as_are_allowed(share: float, least: int):
    model, tokenizer = bag_of_words(0), word_tokenizer()
    weights = torch.zeros_like(model.table.weight)
    for word in TABLE:
        weights[tokenizer.convert_tokens_to_ids(word), 0] = 1.0
    model.table.weight.data = weights
    text = "good bad film plot actor slow good bad film plot actor slow"
    [found] = WordSubstitution(SimilarWords(TABLE), max_share=share, min_words=least).attack(
        model, tokenizer, [text + " film" * 12], [0]
    )
    assert not found.succeeded
    assert len(found.swaps) == max(round(share * 24), least)
    check(found, model, tokenizer, TABLE, share, least)


def test_a_wrong_prediction_goes_before_a_larger_loss():
    model, tokenizer = bag_of_words(0, labels=3), word_tokenizer()
    says = {"good": (1, 0, 0), "fine": (0.1, 0.05, 0.05), "great": (3, 3.2, 0), "nice": (2, 0, 0)}
    for word, logits in says.items():
        row = tokenizer.convert_tokens_to_ids(word)
        model.table.weight.data[row] = torch.tensor(logits)
    ways = ["good", "fine", "great"]
    original, fine, great = losses(model, tokenizer, ways, 0).tolist()
    assert original < great < fine
    [found] = WordSubstitution(SimilarWords(TABLE)).attack(model, tokenizer, ["good"], [0])
    assert (found.perturbed, found.after) == ("great", 1)


# What is left ----------------------------------------------------------------------------------


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, None])
def test_the_model_is_left_as_it_was_after_errors_too(at: int | None):
    tokenizer = word_tokenizer()
    model = classifier(tokenizer)
    model.bert.embeddings.eval()  # a mode of its own
    model.classifier.bias.requires_grad_(False)
    text = "the good film was bad and the plot really slow"
    label = predicted(model, tokenizer, text)
    model(**tokenizer(text, return_tensors="pt"), labels=torch.tensor([label])).loss.backward()
    encoder = tiny(transformers.BertModel, tokenizer)
    attack = WordSubstitution(SimilarWords(TABLE), similarity=Similarity(encoder, tokenizer, 0.0))
    calls = []

    def count(*_: Any) -> None:
        calls.append(0)
        if len(calls) == at:
            raise BrokenError

    hook = model.bert.encoder.register_forward_hook(count)
    before = fingerprint(model), fingerprint(encoder)
    with torch.no_grad():  # as where a loop evaluates
        if at is None:
            assert attack.attack(model, tokenizer, [text], [label])[0].swaps
        else:
            with pytest.raises(BrokenError):
                attack.attack(model, tokenizer, [text], [label])
    assert_same((fingerprint(model), fingerprint(encoder)), before)
    hook.remove()
    assert len(calls) >= (at or 3)


def test_an_attack_works_in_inference_mode():
    tokenizer = word_tokenizer()
    model = classifier(tokenizer)
    text = "the good film was bad"
    label = predicted(model, tokenizer, text)
    attack = WordSubstitution(SimilarWords(TABLE))
    expected = attack.attack(model, tokenizer, [text], [label])
    with torch.inference_mode():
        assert attack.attack(model, tokenizer, [text], [label]) == expected


# Mistakes --------------------------------------------------------------------------------------


def attacked(given_texts: Any, labels: Any, **settings: Any) -> list[Attack]:
    attack = WordSubstitution(SimilarWords(TABLE), **settings)
    return attack.attack(bag_of_words(0), word_tokenizer(), given_texts, labels)


def test_nothing_to_attack_is_no_error():
    assert attacked([], []) == []
    for found in attacked(["", " ... ", "was the", "unknown words"], [0, 1, 0, 1]):
        assert found.perturbed == found.original
        assert found.queries == 1
        assert not found.swaps
        assert not found.succeeded


@pytest.mark.parametrize(
    ("given_texts", "labels", "error", "message"),
    [
        ("good film", [0], TypeError, "one string"),
        (["good"], [0, 1], ValueError, "1 texts and 2 labels"),
        (["good", None], [0, 1], TypeError, "Text 1 is None"),
        (["good", ("film", "plot")], [0, 1], TypeError, "mixed"),
        (["good"], ["bad"], TypeError, "Label 0 is 'bad'"),
        (["good", "film"], [0, 2], ValueError, "from 0 to 1, the model's classes; got 0 to 2"),
        (["good", "film"], [-1, 1], ValueError, "got -1 to 1"),
    ],
)
def test_wrong_texts_and_labels_are_refused(
    given_texts: Any, labels: Any, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        attacked(given_texts, labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_share": 1.5}, "max_share must be finite and between 0 and 1, got 1.5"),
        ({"min_words": -1}, "min_words must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"column": 2}, "column is 0 or 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        WordSubstitution(SimilarWords(TABLE), **settings)


class SlowTokenizer:
    is_fast = False


def test_models_and_tokenizers_that_cannot_be_attacked_are_refused():
    attack, tokenizer = WordSubstitution(Typos()), word_tokenizer()
    with pytest.raises(TypeError, match="SlowTokenizer does not tell which characters"):
        attack.attack(bag_of_words(0), SlowTokenizer(), ["good"], [0])
    with pytest.raises(TypeError, match="Linear has no get_input_embeddings"):
        attack.attack(torch.nn.Linear(1, 1), tokenizer, ["good"], [0])
    number = classifier(tokenizer, 1)
    with pytest.raises(ValueError, match=r"at least two labels, got \(1, 1\)"):
        attack.attack(number, tokenizer, ["good"], [0])
    headed = Similarity(tiny(transformers.BertForMaskedLM, tokenizer), tokenizer)
    with pytest.raises(TypeError, match="BertForMaskedLM returns no last_hidden_state"):
        headed(["good"], ["bad"])
    with pytest.raises(ValueError, match=r"between -1 and 1, got 1\.2"):
        Similarity(number, tokenizer, min_cosine=1.2)


# Summary ---------------------------------------------------------------------------------------


@given(st.integers(1, 80), st.data())
def test_wilson_intervals_are_those_of_scipy(trials: int, data: Any):
    successes = data.draw(st.integers(0, trials))
    own = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert wilson(successes, trials) == pytest.approx((own.low, own.high), abs=1e-6)


def attack_of(before: int, after: int, swaps: int, queries: int) -> Attack:
    swapped = dict.fromkeys(range(swaps), ("a", "b"))
    return Attack("a", "b", 0, before, after, swapped, 10, queries)


def test_the_summary_counts_what_was_attacked():
    attacks = [
        attack_of(0, 1, 2, 10),
        attack_of(0, 2, 1, 6),
        attack_of(0, 0, 4, 41),
        attack_of(1, 1, 0, 1),
    ]
    assert attack_summary(attacks) == {
        "rows": 4,
        "clean_accuracy": 3 / 4,
        "accuracy_under_attack": 1 / 4,
        "success_rate": 2 / 3,
        "success_interval": wilson(2, 3),
        "words_changed": 1.5,
        "share_changed": pytest.approx(0.15),
        "queries": 19,
    }
    none = attack_summary([attack_of(1, 1, 0, 1)])
    assert none["success_rate"] is none["success_interval"] is none["queries"] is None
    with pytest.raises(ValueError, match="no attacks to sum up"):
        attack_summary([])


def test_logits_that_are_not_numbers_are_no_class():
    """The argmax of NaN is class 0, and the classifier would be found robust."""
    tokenizer = word_tokenizer()
    model = classifier(tokenizer)
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN for 2 of 2 texts, which are of no class"):
        WordSubstitution(Typos()).attack(model, tokenizer, ["good film", "bad film"], [0, 0])


def alike(kind: str) -> Any:
    """Return a model whose embeddings are the sequence's first, or are scaled in place."""
    tokenizer = word_tokenizer()
    if kind == "XLNet":
        size = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    else:
        size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16, "n_positions": 32}
    words = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**size, **words, num_labels=2)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    return model, tokenizer


@pytest.mark.parametrize("kind", ["XLNet", "CTRL"])
def test_words_matter_as_they_do_alone_wherever_the_batch_lies(kind: str):
    """Also where there are as many rows as tokens, by whose number the batch cannot be told."""
    model, tokenizer = alike(kind)
    text = "good film bad movie"
    reader = Reader(model, tokenizer, None, 64, 1)
    size = len(tokenizer(text)["input_ids"])
    [alone] = reader.read([text], [0], [Words(text)])
    assert len({*alone.importances.values()}) == len(alone.importances) == 4
    for rows in (2, size):
        for found in reader.read([text] * rows, [0] * rows, [Words(text)] * rows):
            assert found.importances == pytest.approx(alone.importances, rel=1e-9)
