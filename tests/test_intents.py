"""The embedded data are balanced, free of copies across splits, and paired with their twins."""

import json
import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "data" / "intents"


def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def words(text):
    return re.sub(r"[^a-z0-9' ]", " ", text.lower()).split()


def overlap(a, b):
    """Jaccard similarity of two sets of words."""
    return len(a & b) / len(a | b)


SPLITS = {name: rows(name) for name in ("train", "dev", "test")}
TWINS = rows("adversarial")


@pytest.mark.parametrize(("name", "each"), [("train", 24), ("dev", 8), ("test", 18)])
def test_every_intent_has_as_many_sentences(name, each):
    assert set(Counter(r["label"] for r in SPLITS[name]).values()) == {each}


def test_sixteen_intents_in_four_domains():
    pairs = {(r["domain"], r["label"]) for split in SPLITS.values() for r in split}
    assert len(pairs) == 16
    assert Counter(domain for domain, _ in pairs) == dict.fromkeys(
        ["travel", "money", "time", "kitchen"], 4
    )


def test_sentences_are_short_and_of_varied_length():
    lengths = [len(r["text"].split()) for split in SPLITS.values() for r in split]
    assert min(lengths) == 3
    assert max(lengths) <= 25
    assert sum(n <= 6 for n in lengths) > 150
    assert sum(n >= 15 for n in lengths) > 150


def test_no_near_copy_of_any_sentence_in_any_split():
    everything = [(r["text"], frozenset(words(r["text"]))) for s in SPLITS.values() for r in s]
    for (text, one), (other_text, other) in combinations(everything, 2):
        assert overlap(one, other) < 0.6, f"{text!r} and {other_text!r}"


def test_openings_are_varied_within_an_intent():
    openings = Counter(
        (r["label"], *words(r["text"])[:2]) for split in SPLITS.values() for r in split
    )
    assert max(openings.values()) <= 3


def test_each_test_sentence_has_a_twin_of_the_same_label():
    for row, twin in zip(SPLITS["test"], TWINS, strict=True):
        assert twin["source"] == row["text"]
        assert (twin["label"], twin["domain"]) == (row["label"], row["domain"])
        assert twin["text"] != row["text"]
    kinds = Counter(twin["kind"] for twin in TWINS)
    assert kinds == {"paraphrase": 80, "typo": 64, "substitution": 80, "distraction": 64}


def test_twins_are_of_their_kind():
    for twin in TWINS:
        source, text = words(twin["source"]), words(twin["text"])
        if twin["kind"] == "typo":
            ratio = SequenceMatcher(None, twin["source"], twin["text"]).ratio()
            assert ratio > 0.8, twin
        elif twin["kind"] == "paraphrase":
            assert overlap(set(source), set(text)) < 0.5, twin
        elif twin["kind"] == "substitution":
            blocks = SequenceMatcher(None, source, text).get_matching_blocks()
            changed = len(source) - sum(block.size for block in blocks)
            assert 1 <= changed <= 6, twin
        else:
            assert len(source) < len(text) <= 40, twin


def test_no_twin_copies_a_sentence_that_is_not_its_source():
    everything = [(r["text"], frozenset(words(r["text"]))) for s in SPLITS.values() for r in s]
    for twin in TWINS:
        mine = frozenset(words(twin["text"]))
        for text, other in everything:
            assert text == twin["source"] or overlap(mine, other) < 0.6, (twin["text"], text)
