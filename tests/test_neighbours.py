"""Tables of similar words, where they come from, and texts with words replaced by them."""

import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from mixadv.tokens import Neighbours, substitute_words
from mixadv.tokens.reading.words import Words
from tests.tokenizers_zoo import texts, word_pieces

TABLE = Neighbours(
    {"film": ["movie", "Picture"], "фильм": ["кино"], "电": ["影"], "फिल्म": ["चलचित्र"]}
)

some_words = st.sampled_from(["film", "Film", "FILM", "movie", "кино", "Кино", "影", "été"])


@given(st.dictionaries(some_words, st.lists(some_words), min_size=1))
def test_lookup_knows_no_case_and_no_word_is_its_own_neighbour(table):
    found = {(w.lower(), n.lower()) for w, row in table.items() for n in row} - {
        (w.lower(), w.lower()) for w in table
    }
    if not found:
        with pytest.raises(ValueError, match="No word has a neighbour"):
            Neighbours(table)
        return
    neighbours = Neighbours(table)
    for word in table:
        row = [n.lower() for n in neighbours.of(word.upper())]
        assert len(row) == len(set(row))
        assert {(word.lower(), n) for n in row} == {p for p in found if p[0] == word.lower()}
        assert (word in neighbours) == bool(row)
    assert list(neighbours) == [w.lower() for w in neighbours]
    assert neighbours.of("unheard") == ()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_each_kind_of_file_gives_its_table(tmp_path, suffix):
    def written(name, *lines):
        path = tmp_path / (name + suffix)
        opened = gzip.open if suffix else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return Neighbours.read(path)

    rows = {"word": "Film", "neighbors": ["movie", "film"]}, {"word": "br", "neighbours": []}
    assert dict(written("rows.jsonl", *rows, "")) == {"film": ("movie",)}
    pairs = [
        {"word1": "film", "word2": "movie", "relation": "synonym", "source": "x"},
        {"word1": "film", "word2": "picture", "relation": "synonym"},
        {"word1": "film", "word2": "book", "relation": "antonym"},
    ]
    expected = {"film": ("movie", "picture"), "movie": ("film",), "picture": ("film",)}
    assert dict(written("pairs.jsonl", *pairs)) == expected
    assert dict(written("spaces.txt", "film movie кино", "", "tree wood")) == {
        "film": ("movie", "кино"),
        "tree": ("wood",),
    }
    tabs = written("tabs.txt", "film\tmotion picture\tmovie")
    assert tabs.of("film") == ("motion picture", "movie")


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("a.jsonl", ['{"word": "a", "neighbors": ["b"]}', "{no"], "line 2, '{no'"),
        ("a.jsonl", ['{"word": "a", "neighbors": "b"}'], "line 1.*must be a list of strings"),
        ("a.jsonl", ['{"word": "a", "neighbors": [3]}'], "line 1.*a string that is not empty"),
        ("a.jsonl", ['{"word": 7, "neighbors": ["b"]}'], "line 1.*a string that is not empty"),
        ("a.jsonl", ['{"word": "a"}'], "line 1.*has word and neighbors"),
        ("a.jsonl", ["[1]"], "line 1.*must be an object"),
        ("a.txt", ["film\t\tmovie"], "line 1.*not empty"),
        ("a.txt", ["", "film"], "No word has a neighbour"),
        ("a.txt", [], "No word has a neighbour"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, name, lines, said):
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        Neighbours.read(tmp_path / name)


def test_a_file_that_is_not_there_is_said():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere\.jsonl"):
        Neighbours.read("nowhere.jsonl")


@given(st.integers(2, 12), st.integers(1, 4), st.floats(-0.5, 0.9), st.integers(0, 99))
def test_neighbours_by_embeddings_are_the_nearest_by_cosine(count, most, least, seed):
    vectors = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    words = [f"w{i}" for i in range(count)]
    expected = {}
    for i, word in enumerate(words):
        near = [(float(cosine_similarity(vectors[i], vectors[j], dim=0)), words[j])
                for j in range(count) if j != i]  # fmt: skip
        row = [w for c, w in sorted(near, reverse=True)[:most] if c >= least]
        expected |= {word: tuple(row)} if row else {}
    if not expected:
        with pytest.raises(ValueError, match="No word has a neighbour"):
            Neighbours.from_embeddings(words, vectors, max_neighbours=most, min_cosine=least)
        return
    with pytest.MonkeyPatch.context() as patch:
        for at_once in (1, 2**24):  # a row at a time, and all
            patch.setattr("mixadv.tokens.reading.neighbours.AT_ONCE", at_once)
            found = Neighbours.from_embeddings(
                words, vectors, max_neighbours=most, min_cosine=least
            )
            assert dict(found) == expected


def test_bad_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"2 words need vectors \[2, d\].*\[3, 2\]"):
        Neighbours.from_embeddings(["a", "b"], torch.ones(3, 2))
    with pytest.raises(ValueError, match="not finite"):
        Neighbours.from_embeddings(["a", "b"], torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(ValueError, match="max_neighbours must be at least 1"):
        Neighbours.from_embeddings(["a", "b"], torch.ones(2, 2), max_neighbours=0)


def test_an_encoder_gives_its_whole_words_alone():
    tokenizer = word_pieces("film", "movie", "tree", "##s", ".", "42", "[unused1]")
    embeddings = torch.nn.Embedding(len(tokenizer), 4)
    torch.nn.init.ones_(embeddings.weight)
    model = SimpleNamespace(get_input_embeddings=lambda: embeddings)
    neighbours = Neighbours.from_encoder(model, tokenizer)
    assert {w: set(row) for w, row in neighbours.items()} == {
        "film": {"movie", "tree"},
        "movie": {"film", "tree"},
        "tree": {"film", "movie"},
    }


def test_a_table_that_the_tokenizer_cannot_write_is_refused_with_examples():
    tokenizer = word_pieces("film", "movie")
    Neighbours({"film": ["кино", "movie"]}).check(tokenizer)
    with pytest.raises(ValueError, match="none of the table's 2 neighbours, such as 'кино', '影'"):
        Neighbours({"film": ["кино", "影"]}).check(tokenizer)


@given(texts, st.integers(0, 99))
def test_substitution_changes_words_that_have_neighbours_and_nothing_else(text, seed):
    generator = torch.Generator().manual_seed(seed)
    assert substitute_words([text], TABLE, 0.0, generator=generator) == [text]
    (new,) = substitute_words([text], TABLE, 1.0, generator=generator)
    expected, end = "", 0
    words = Words(text)
    for word, (begin, after) in zip(words, words.spans, strict=True):
        expected += text[end:begin]
        options = [n.lower() for n in TABLE.of(word)] or [word.lower()]
        option = next(o for o in options if new[len(expected) :].lower().startswith(o))
        expected += new[len(expected) :][: len(option)] if TABLE.of(word) else word
        end = after
    assert new == expected + text[end:]


def test_substitution_follows_the_case_and_its_probability():
    generator = torch.Generator().manual_seed(0)
    row = " ".join(["Film"] * 5000 + ["tree"] * 100)
    new = substitute_words([row, "FILM film"], TABLE, 0.3, generator=generator)
    count = sum(word in ("Movie", "Picture") for word in Words(new[0]))
    assert abs(count - 1500) < 4 * math.sqrt(5000 * 0.3 * 0.7)
    movies = sum(word == "Movie" for word in Words(new[0]))
    assert abs(movies - count / 2) < 4 * math.sqrt(count / 4)
    assert list(Words(new[0]))[5000:] == ["tree"] * 100
    assert substitute_words(["FILM film"], Neighbours({"film": ["movie"]}), 1.0) == ["MOVIE movie"]


def test_one_text_and_a_fraction_that_is_none_are_refused():
    with pytest.raises(TypeError, match="a list of texts, got the text 'film'"):
        substitute_words("film", TABLE)
    with pytest.raises(ValueError, match="between 0 and 1, got 15"):
        substitute_words(["film"], TABLE, 15)
