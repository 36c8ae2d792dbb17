"""An evaluation measures what its parts measure, once, and goes on after a kill."""

import cmath
import collections
import copy
import dataclasses
import functools
import json
import logging
import math
import os
import random
import re
import string
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import transformers

import evaluate as script
import mixadv
from common.model import load_classifier
from mixadv.equilibrium import exploitability
from mixadv.mixtures import Mixture
from mixadv.model.replay import evaluating
from mixadv.reports.kept import digest, write
from mixadv.robustness import (
    DataError,
    Report,
    accuracy_at_radii,
    bootstrap_difference,
    compare,
    evaluate,
    loss_increase,
    pictures,
    predict,
    read_rows,
    text_batches,
)
from mixadv.tokens import SimilarWords, Typos, WordSubstitution, attack_summary
from tests.substitution_zoo import TABLE, VOCABULARY, tiny, word_tokenizer
from tests.zoo import assert_same, fingerprint

ROWS = 40  # two parts of an attack
LABELS = {"negative": 0, "neutral": 1, "positive": 2}


def rows_of(seed, count=ROWS):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=draw).tolist()
    words = [torch.randint(len(VOCABULARY), (n,), generator=draw).tolist() for n in lengths]
    labels = torch.randint(3, (count,), generator=draw).tolist()
    return {"text": [" ".join(VOCABULARY[i] for i in row) for row in words], "label": labels}


DATA, TWINS = rows_of(0), rows_of(1, 25)
ATTACK = WordSubstitution(SimilarWords(TABLE), min_words=2)


def classifier(seed=0):
    names = {number: name for name, number in LABELS.items()}
    config = {"num_labels": 3, "id2label": names, "label2id": LABELS}
    kind = transformers.BertForSequenceClassification
    return tiny(kind, word_tokenizer(), seed, hidden_dropout_prob=0.2, **config)


def trained(seed=0):
    """Return a model in training mode, and the game that trained it for a few rounds."""
    model = classifier(seed)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    solver = mixadv.MAT(steps=2, learner_steps=2, particles=2, average="uniform", samples=2)
    optimizer = mixadv.wrap(base, model, solver)
    batch = word_tokenizer()(DATA["text"][:8], padding=True, return_tensors="pt")
    labels = torch.tensor(DATA["label"][:8])
    for _ in range(2):
        optimizer.step(lambda: model(**batch, labels=labels))
    return model, optimizer.game


def measured(model, game=None, **changes):
    settings = {
        "shifted": {"twins": TWINS},
        "attacks": {"similar": ATTACK},
        "radii": (0.1, 0.5),
        "steps": 2,
        "restarts": 2,
        "game": game,
        "progress": False,
    }
    return evaluate(model, word_tokenizer(), DATA, **{**settings, **changes})


class Killed(BaseException):
    """What ends an evaluation at any pass."""


class Passes:
    """Counts a model's forward passes, and breaks the one after `left`."""

    def __init__(self, model, left=None):
        self.count, self.left = 0, left
        self.handle = model.register_forward_pre_hook(self.note)

    def note(self, *_):
        if self.count == self.left:
            raise Killed
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.fixture(scope="module")
def whole():
    """Return the report of a game that plays mixtures, uninterrupted, and its forward passes."""
    torch.manual_seed(0)
    model, game = trained()
    with Passes(model) as passes:
        return measured(model, game), passes.count


# What is measured ------------------------------------------------------------------------------


def test_sections_agree_with_their_parts_computed_by_hand(whole):
    found, (model, game) = whole[0].sections, trained()
    rows, twins = read_rows(DATA, model), read_rows(TWINS, model)
    batches = text_batches(model, word_tokenizer(), rows)
    places = found["about"]["attacked"]
    assert sorted(places) == list(range(ROWS))

    clean = predict(model, batches)
    shifted = predict(model, text_batches(model, word_tokenizer(), twins))
    assert found["clean"]["per row"]["correct"] == clean.correct.tolist()
    assert found["clean"]["accuracy"] == clean.accuracy._asdict()
    assert found["clean"]["ece"] == clean.ece
    assert found["shifted"]["twins"]["loss"] == shifted.loss._asdict()
    drop = bootstrap_difference(clean.correct, shifted.correct)
    assert found["shifted"]["twins"]["drop"] == drop._asdict()

    unit = found["about"]["unit"]
    right = accuracy_at_radii(model, batches, [0.0, 0.1, 0.5], steps=2, unit=unit)
    assert found["radii"]["radii"] == [0, 0.1, 0.5]
    assert found["radii"]["per row"]["correct"] == right[:, places].tolist()
    assert [a["value"] for a in found["radii"]["accuracy"]] == right.mean(1).tolist()

    by_hand = loss_increase(model, batches, radius=0.1, steps=2, restarts=2, unit=unit)
    section = found["loss increase"]
    for name in ("clean_loss", "from_zero", "from_random"):
        values = getattr(by_hand, name)[places]
        np.testing.assert_allclose(section["per row"][name], values, rtol=1e-4, atol=1e-6)
    sums = by_hand.summary(by_hand.correct)
    assert section["n"] == sums["n"] == clean.correct.sum()
    assert section["increase"] == pytest.approx(sums["increase"], rel=1e-4)

    attacks = ATTACK.attack(model, word_tokenizer(), rows.texts, rows.labels)
    by_hand = attack_summary(attacks)
    by_hand["success_interval"] = list(by_hand["success_interval"])
    assert {k: v for k, v in found["attacks"]["similar"].items() if k != "per row"} == by_hand

    with evaluating(model):
        bound = exploitability(game, [b.closure for b in batches], steps=2, restarts=3)
    section = found["exploitability"]
    assert section["gain"]["value"] == pytest.approx(float(bound.gain), rel=1e-3)
    assert bound.interval is not None
    assert section["gain"]["high"] == pytest.approx(float(bound.interval[1]), rel=1e-3)


def test_the_last_weights_their_mean_and_the_mixture_are_told_apart(whole):
    learners, (model, game) = whole[0].sections["learners"], trained()
    batches = text_batches(model, word_tokenizer(), read_rows(DATA, model))
    with game.averaged():
        mean = predict(model, batches)
    mixture = predict(model, batches, mixture=game)
    last = predict(model, batches)
    for who, by_hand in {"last": last, "mean": mean, "mixture": mixture}.items():
        assert learners[who]["clean"]["loss"] == by_hand.loss._asdict()
    assert len({of["clean"]["loss"]["value"] for of in learners.values()}) == 3
    assert all(of.keys() == {"clean", "twins"} for of in learners.values())


def test_rows_are_drawn_by_the_seed_the_same_for_all_models():
    first, other = (
        measured(classifier(seed), rows=7, radii=(0.1,), increase_radius=None, attacks={})
        for seed in (0, 1)
    )
    again = measured(classifier(), rows=7, seed=1, radii=(), increase_radius=None, attacks={})
    places = first.sections["about"]["attacked"]
    assert len(set(places)) == 7
    assert places == other.sections["about"]["attacked"]
    assert places != again.sections["about"]["attacked"]
    assert first.sections["radii"]["per row"] != other.sections["radii"]["per row"]
    assert first.sections["clean"]["rows"] == ROWS
    assert "radii" not in again.sections
    assert "loss increase" not in again.sections


def test_a_unit_given_is_the_ball_of_the_unit_measured(whole):
    model, game = trained()
    unit = whole[0].sections["about"]["unit"]
    given = measured(model, game, unit=unit).sections
    assert given["loss increase"] == whole[0].sections["loss increase"]
    assert not given["about"]["measured"]


# Kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.7, 0.85, 0.98])
def test_a_killed_evaluation_goes_on_to_the_numbers_of_a_whole_one(tmp_path, whole, share):
    report, forwards = whole
    model, game = trained()
    left = int(share * forwards)
    before = fingerprint(model)
    with Passes(model, left), pytest.raises(Killed):
        measured(model, game, folder=tmp_path)
    assert_same(fingerprint(model), before)
    for path in tmp_path.iterdir():
        assert path.suffix == ".json"
        json.loads(path.read_text())
    with Passes(model) as passes:
        assert measured(model, game, folder=tmp_path) == report
    assert passes.count <= forwards
    if share > 0.1:
        assert passes.count < forwards
    with Passes(model, 0):
        assert measured(model, game, folder=tmp_path) == report
    assert_same(fingerprint(model), before)


def test_what_changes_a_number_is_computed_anew(tmp_path):
    settings = {"radii": (0.1,), "increase_radius": None, "folder": tmp_path, "rows": 8}
    model = classifier()

    def passes(model=model, **changes):
        with Passes(model) as counted:
            measured(model, **{**settings, **changes})
        return counted.count

    assert passes() > 0
    assert passes() == 0
    assert passes(name="another") == passes(batch_size=5) == 0
    assert passes(radii=(0.1, 0.2)) > 0
    assert passes(steps=3) > 0
    assert passes(seed=1) > 0
    assert passes(max_length=4) > 0
    assert passes(shifted={"twins": rows_of(2)}) > 0
    for attack in (
        dataclasses.replace(ATTACK, min_words=1),
        dataclasses.replace(ATTACK, protected=frozenset({"film"})),
        WordSubstitution(SimilarWords({"film": ["movie"]})),
        WordSubstitution(SimilarWords(lambda word: ["movie"])),
        WordSubstitution(SimilarWords(lambda word: ["story"])),
        WordSubstitution(Typos()),
    ):
        assert passes(attacks={"similar": attack}) > 0
        assert passes(attacks={"similar": attack}) == 0
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    assert passes() > 0


def test_keys_do_not_depend_on_the_order_of_sets_nor_on_the_last_call():
    first, other = frozenset([0, 8]), frozenset([8, 0])
    assert list(first) != list(other)
    assert digest(first) == digest(other) != digest(frozenset([0]))
    tokenizer = word_tokenizer()
    before = digest(tokenizer)
    tokenizer(["film", "a bad film"], padding=True, truncation=True, max_length=3)
    assert digest(tokenizer) == before


def test_keys_tell_apart_what_does_different_things():
    cyclic = [1]
    cyclic.append(cyclic)
    values = [1, 1.0, "1", True, None, [1], (1,), [[1]], {1: 2}, {2: 1}, torch.ones(1), cyclic]
    values += [torch.ones(1, 1), torch.ones(1, dtype=torch.int32), np.ones(1), frozenset([1])]
    values += [ATTACK, ATTACK.attack, WordSubstitution, Typos(), Typos(seed=1)]
    values += [[(lambda by: lambda: by)(i)] for i in range(2)]
    values += [make(i) for make in ALIKE for i in range(2)]
    values += [math.log, cmath.log, logging.Formatter, string.Formatter]
    assert len({digest(value) for value in values}) == len(values)
    assert [digest(make(0)) for make in ALIKE] == [digest(make(0)) for make in ALIKE]


def test_keys_do_not_depend_on_where_a_model_was_saved(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    assert digest(type(model).from_pretrained(tmp_path)) == digest(model)


def test_what_cannot_be_told_apart_is_measured_where_nothing_is_kept(tmp_path):
    attacks = {"similar": WordSubstitution(SimilarWords(locked(threading.Lock())))}
    few = {"attacks": attacks, "radii": (), "increase_radius": None, "rows": 2, "shifted": {}}
    assert measured(classifier(), **few).sections["attacks"]
    with pytest.raises(TypeError, match=r"lock.* cannot be told apart .*leave folder out"):
        measured(classifier(), folder=tmp_path, **few)


def locked(lock):
    def source(word):
        with lock:
            return ["movie"]

    return source


def precise(epsilon):
    model = classifier()
    model.config.layer_norm_eps = epsilon
    return model


def cut(side):
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.truncation_side = side
    return tokenizer


ALIKE = (
    lambda i: functools.partial(pow, i),
    lambda i: collections.deque([i]),
    lambda i: re.compile("ab"[i]),
    lambda i: np.array([str(i)], object),
    lambda i: random.Random(i),
    lambda i: Path("ab"[i]),
    lambda i: torch.nn.Sequential((torch.nn.ReLU, torch.nn.Tanh)[i]()),
    lambda i: precise((1e-12, 1e-3)[i]),
    lambda i: cut(("left", "right")[i]),
    lambda i: [b"a", b"b"] if i else [b"a<builtins.bytes>b"],
)
"""Makers of two objects of a kind that differ."""


@pytest.mark.slow
def test_keys_are_those_of_another_process():
    program = """
from mixadv.reports.kept import digest, write
from mixadv.tokens import SimilarWords, WordSubstitution
from tests.substitution_zoo import TABLE, word_tokenizer
from tests.test_evaluate import ALIKE, classifier
made = [make(0) for make in ALIKE]
print(digest([WordSubstitution(SimilarWords(TABLE)), word_tokenizer(), classifier(), made]))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    own = [WordSubstitution(SimilarWords(TABLE)), word_tokenizer(), classifier()]
    assert run.stdout.strip() == digest([*own, [make(0) for make in ALIKE]])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}, "found": 1}', "\x00"])
def test_a_file_that_no_evaluation_wrote_is_named(tmp_path, text):
    model = classifier()
    few = {"radii": (), "increase_radius": None, "attacks": {}, "folder": tmp_path}
    report = measured(model, **few)
    [path] = tmp_path.glob("twins-*.json")
    path.write_text(text)
    with Passes(model, 0), pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        measured(model, **few)
    assert "remove it" in str(caught.value)
    path.unlink()
    assert measured(model, **few) == report


def test_a_write_that_breaks_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write(path, "before")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(path, "after")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_it_can_be_asked_in_inference_mode():
    model, mixture = classifier(), Mixture([classifier()])
    with torch.inference_mode():
        found = measured(model, mixture=mixture)
    assert found.sections == measured(model, mixture=mixture).sections


# Refusals --------------------------------------------------------------------------------------

REFUSED = {
    "attack": ({"attacks": {"a": "textfooler"}}, TypeError, "'a' is 'textfooler'"),
    "radius": ({"radii": (0.1, -0.2)}, ValueError, "radius must be finite and at least 0, .* -0.2"),
    "ball": ({"increase_radius": float("nan")}, ValueError, "radius must be finite"),
    "rows": ({"rows": 0}, ValueError, "rows must be at least 1, got 0"),
    "steps": ({"steps": 0}, ValueError, "steps must be at least 1"),
    "seed": ({"seed": "one"}, TypeError, "seed"),
    "unit": ({"unit": -1.0}, ValueError, "unit must be"),
    "no unit": ({"unit": 0}, ValueError, "unit=0 makes every radius 0"),
    "empty": ({"shifted": {"twins": []}}, DataError, "twins holds no rows"),
    "label": (
        {"shifted": {"twins": [{"text": "a", "label": "unheard"}]}},
        DataError,
        "twins, row 1: label is 'unheard'.*0 negative",
    ),
    "column": ({"text": "sentence"}, DataError, "no column 'sentence'"),
    "name": ({"shifted": {"clean": TWINS}}, ValueError, "named 'clean'"),
    "pairs": (
        {"shifted": {"twins": [{"premise": "a", "hypothesis": "b", "label": 0}]}},
        DataError,
        "twins has two texts in a row, and the data have one text",
    ),
    "tokens": ({"max_length": 1000}, ValueError, "max_length is 1000, and the model reads 48"),
    "no game": ({"game": "mat"}, TypeError, "got 'mat'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_before_any_pass(tmp_path, case):
    changes, kind, said = REFUSED[case]
    model = classifier()
    with Passes(model, 0), pytest.raises(kind, match=said):
        measured(model, folder=tmp_path / "kept", **changes)
    assert not (tmp_path / "kept").exists()


def test_a_model_that_has_diverged_is_refused_in_words_and_keeps_its_mode():
    model = classifier().train()
    with torch.no_grad():
        model.classifier.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"not finite on [0-9]+ of .* has diverged"):
        measured(model)
    assert model.training


def test_a_game_of_another_model_is_refused():
    game = mixadv.Game(classifier(), mixadv.PGD())
    with pytest.raises(ValueError, match="another model than the one evaluated"):
        measured(classifier(), game)


def test_a_game_without_a_ball_is_evaluated_without_a_bound():
    model = classifier()
    game = mixadv.Game(model, mixadv.PGD(radius=None))
    found = measured(model, game, radii=(), increase_radius=None, attacks={}, rows=4).sections
    assert "exploitability" not in found
    assert found["learners"].keys() == {"last"}


@pytest.mark.filterwarnings("error")
def test_many_models_with_any_names_have_pictures_with_a_legend_that_hides_nothing(tmp_path):
    """A layout that collapses, and an empty legend, are warned of; $ would be mathematics."""
    settings = {"attacks": {}, "shifted": {}, "rows": 8}
    one = measured(classifier(), **settings).sections
    names = [r"c$\foo$", "_hidden", *(f"intents-plain-{i}-1a1135079e/last" for i in range(10))]
    for reports in ({"one": one}, dict.fromkeys(names, one)):
        assert len(pictures.save(reports, tmp_path)) == 3
    heights = {path.name: plt.imread(path).shape[0] for path in tmp_path.glob("*.png")}
    assert min(heights.values()) > 3.3 * 150 + 12 * 0.19 * 150 - 2
    without = measured(classifier(), **settings | {"radii": (), "increase_radius": None})
    (tmp_path / "none").mkdir()
    [path] = pictures.save({"one": without.sections}, tmp_path / "none")
    assert path.name == "reliability.png"


def test_a_folder_that_cannot_be_made_is_refused_before_any_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, how: False)
    model = classifier()
    with Passes(model, 0), pytest.raises(PermissionError, match="cannot be written in"):
        measured(model, folder=tmp_path / "none" / "kept")


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a file"):
        measured(classifier(), folder=tmp_path / "file")


# Reports ---------------------------------------------------------------------------------------


def markdown_tables(text):
    """Return the cells of each table, by line."""
    blocks = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            blocks[-1].append(re.split(r"(?<!\\)\|", line)[1:-1])
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def test_markdown_is_well_formed_whatever_the_names(whole):
    names = {"shifted": {"a|b\nc": TWINS}, "attacks": {"|": ATTACK}, "name": "x | y"}
    plain = measured(classifier(), increase_radius=None, rows=5, **names)
    for text in (whole[0].markdown(), plain.markdown(), compare({"a|": plain, "b": plain})):
        tables = markdown_tables(text)
        assert tables
        for lines in tables:
            assert len({len(line) for line in lines}) == 1
            assert all(set(cell.strip()) == {"-"} for cell in lines[1])
    assert len(markdown_tables(whole[0].markdown())) == 6
    assert str(whole[0]) == whole[0].table()
    assert "exploitability" in whole[0].table().lower()


def test_a_report_is_read_back_as_it_was(tmp_path, whole):
    report = whole[0]
    paths = report.save(tmp_path / "new" / "folder")
    names = ["report.json", "report.md", "accuracy_at_radii.png", "reliability.png"]
    assert [path.name for path in paths] == [*names, "loss_increase.png"]
    for path in paths[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert Report.load(paths[0]) == Report.load(paths[0].parent) == report
    assert paths[1].read_text() == report.markdown()
    assert json.loads(report.json()) == report.sections


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"about": 1}'])
def test_a_file_that_is_no_report_is_named(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"report\.json is no report of an evaluation"):
        Report.load(tmp_path)


def test_models_are_compared_on_rows_that_all_classify_correctly():
    reports = {str(seed): measured(classifier(seed), unit=3.0) for seed in (0, 1)}
    each = [r.sections["loss increase"]["per row"] for r in reports.values()]
    rights = np.logical_and(*(e["correct"] for e in each))
    assert 0 < rights.sum() < min(sum(e["correct"]) for e in each)
    text = compare(reports)
    [lines] = markdown_tables(text)
    column = [cell.strip() for cell in lines[0]].index("loss increase 0.1")
    for line, one in zip(lines[2:], each, strict=True):
        increase = np.maximum(one["from_zero"], one["from_random"])[rights]
        assert line[column].strip().startswith(f"{np.median(increase):.3g} (")
    assert f"of {rights.sum()} rows" in text
    assert "different size" not in text


def test_models_of_other_rows_or_radii_are_not_compared():
    model = classifier()
    few = {"radii": (), "attacks": {}, "rows": 5}
    first = measured(model, **few)
    with pytest.raises(ValueError, match="other was evaluated with other rows attacked"):
        compare({"first": first, "other": measured(model, **few, seed=1)})
    with pytest.raises(ValueError, match="different radii"):
        compare({"first": first, "other": measured(model, **few, increase_radius=0.3)})
    with pytest.raises(ValueError, match="other was evaluated with other restarts than first"):
        compare({"first": first, "other": measured(model, **{**few, "restarts": 3})})
    shorter = {"twins": {name: column[:4] for name, column in TWINS.items()}}
    with pytest.raises(ValueError, match="other has other rows in twins than first"):
        compare({"first": first, "other": measured(model, **{**few, "shifted": shorter})})
    with pytest.raises(ValueError, match="no reports"):
        compare({})
    wider = measured(classifier(1), **few)
    assert "balls of different size" in compare({"first": first, "wider": wider})


def test_where_no_row_is_right_there_is_no_loss_increase():
    model = classifier()
    with torch.no_grad():
        model.classifier.weight.mul_(0.01)
        model.classifier.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    wrong = {**DATA, "label": [1] * ROWS}
    report = evaluate(model, word_tokenizer(), wrong, radii=(), steps=1, restarts=1, rows=4)
    assert report.sections["loss increase"]["n"] == 0
    assert "(1 random starts, 0 rows that are classified correctly)" in report.markdown()
    assert "no loss increase" in compare({"a": report})


# The script ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two models and the files of both sets, labels by name."""
    root = tmp_path_factory.mktemp("evaluate")
    for seed in (0, 1):
        classifier(seed).save_pretrained(root / f"run-{seed}" / "last")
        word_tokenizer().save_pretrained(root / f"run-{seed}" / "last")
    for name, rows in {"test": DATA, "twins": TWINS}.items():
        labels = [list(LABELS)[label] for label in rows["label"]]
        pairs = zip(rows["text"], labels, strict=True)
        lines = [json.dumps({"utterance": text, "label": label}) + "\n" for text, label in pairs]
        (root / f"{name}.jsonl").write_text("".join(lines))
    return root


def command(folder, output, *more):
    models = [str(folder / f"run-{seed}" / "last") for seed in (0, 1)]
    argv = ["--model", *models, "--data", str(folder / "test.jsonl"), "--output", str(output)]
    argv += ["--shifted", f"twins={folder / 'twins.jsonl'}", "--text", "utterance"]
    return script.main([*argv, "--rows", "6", "--steps", "1", "--restarts", "1", *more])


def test_the_script_compares_saved_models_in_one_ball(folder, tmp_path, capsys):
    assert command(folder, tmp_path, "--attack", "builtin", "--radii", "0.1") == 0
    printed = capsys.readouterr().out
    [lines] = markdown_tables(printed)
    assert [line[0].strip() for line in lines[2:]] == ["run-0/last", "run-1/last"]
    assert {"twins drop", "PGD 0.1 %", "under builtin %"} <= {cell.strip() for cell in lines[0]}
    assert "different size" not in printed
    first, other = (Report.load(tmp_path / f"run-{seed}-last").sections for seed in (0, 1))
    assert first["about"]["unit"] == other["about"]["unit"]
    assert first["about"]["measured"]
    assert not other["about"]["measured"]
    assert (tmp_path / "compared.md").read_text().strip() == printed.strip()
    assert (tmp_path / "accuracy_at_radii.png").is_file()

    again = command(folder, tmp_path, "--radii", "0.1", "--unit-of", str(folder / "run-1" / "last"))
    assert again == 0
    lengths = {Report.load(tmp_path / f"run-{i}-last").sections["about"]["unit"] for i in (0, 1)}
    assert lengths != {first["about"]["unit"]}
    words = {"radii": (), "increase_radius": None, "rows": 6}
    alone = evaluate(classifier(1), word_tokenizer(), DATA, batch_size=2, **words)
    assert list(lengths) == [pytest.approx(alone.sections["about"]["unit"], rel=1e-6)]


def test_a_mixture_and_a_model_under_the_same_attacks_stand_in_one_table(folder, tmp_path, capsys):
    """A mixture that is saved in one folder with its base is that of the models it was made of."""
    models = [classifier(seed) for seed in (0, 1)]
    together = tmp_path / "saved"
    Mixture(models).save_pretrained(together)
    models[0].save_pretrained(together)
    word_tokenizer().save_pretrained(together)
    more = ["--mixture", f"both={folder / 'run-*' / 'last'}", f"saved={together}"]
    assert command(folder, tmp_path, *more, "--radii", "1", "--increase-radius", "0.1") == 0
    printed = capsys.readouterr().out
    [lines] = markdown_tables(printed)
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines[2:]}
    assert list(rows) == ["run-0/last", "run-1/last", "both", "saved"]
    assert rows["both"] == rows["saved"]
    head = [cell.strip() for cell in lines[0][1:]]
    for way in ("a member drawn", "mean", "vote"):
        assert {f"{way} within 0 %", f"{way} within 1 %"} <= set(head)
    assert rows["both"][head.index("PGD 1 %")] == "–"
    alone = dict(zip(head, rows["run-0/last"], strict=True))
    assert alone["a member drawn within 1 %"] == alone["vote within 1 %"]
    assert "that are made for mixtures" in printed
    members = Report.load(tmp_path / "both").sections["mixture"]
    drawn = np.array(members["per row"][0]["right"])[:, 0].mean()
    assert members["accuracy"][0]["none"][0]["value"] == pytest.approx(drawn)


def test_a_mixture_is_read_by_the_mean_of_its_members():
    """Weights of members are not among the mixture's own: what is kept must tell them apart."""
    model, other = classifier(0), classifier(1)
    mixture = Mixture([{}, other.state_dict()], [3, 1], model=model)
    rows = read_rows(DATA, model)
    [batch] = text_batches(mixture, word_tokenizer(), rows, batch_size=ROWS)
    each = mixture.each(lambda: batch.closure()[1])
    means = (0.75 * each[0] + 0.25 * each[1]).double().numpy()
    order = np.argsort(batch.rows)
    settings = {"radii": (), "progress": False, "shifted": {"twins": TWINS}}
    found = evaluate(mixture, word_tokenizer(), DATA, **settings).sections
    assert (
        found["clean"]["per row"]["correct"]
        == (means.argmax(-1)[order] == np.array(DATA["label"])).tolist()
    )
    assert found["clean"]["per row"]["confidence"] == pytest.approx(means.max(-1)[order], rel=1e-5)
    assert {"radii", "loss increase"}.isdisjoint(found)
    assert found["about"]["unit"] == pytest.approx(
        measured(model, radii=(), attacks={}).sections["about"]["unit"]
    )


def test_another_mixture_of_one_model_is_not_read_from_what_is_kept(tmp_path):
    model, other = classifier(0), classifier(1).state_dict()
    settings = {"radii": (), "progress": False, "folder": tmp_path, "rows": 4}
    losses = [
        evaluate(Mixture(members, model=model), word_tokenizer(), DATA, **settings).sections
        for members in ([{}], [{}, other], [other])
    ]
    assert len({found["clean"]["loss"]["value"] for found in losses}) == 3


@pytest.mark.parametrize("shares", [[1, 0], [1, 3]])
def test_words_are_replaced_until_the_mean_of_the_members_errs(shares):
    """A member that is never drawn changes nothing; each text found is the mean's own error."""
    models = [classifier(seed) for seed in (0, 1)]
    mixture = Mixture([{}, models[1].state_dict()], shares, model=models[0])
    before = [p.detach().clone() for p in models[0].parameters()]
    settings = {"radii": (), "progress": False, "attacks": {"similar": ATTACK}}
    found, alone = (
        evaluate(model, word_tokenizer(), DATA, **settings).sections["attacks"]["similar"]
        for model in (mixture, models[0])
    )
    assert all(map(torch.equal, models[0].parameters(), before))
    if not shares[1]:
        assert found == alone
        return
    texts = [record["perturbed"] for record in found["per row"]]
    rows = read_rows({"text": texts, "label": DATA["label"]}, models[0])
    means = sum(
        share / 4 * batch.closure()[1].softmax(-1)[torch.tensor(batch.rows).argsort()]
        for share, model in zip(shares, models, strict=True)
        for batch in text_batches(model.eval(), word_tokenizer(), rows, batch_size=len(texts))
    )
    assert means.argmax(-1).tolist() == [record["after"] for record in found["per row"]]
    assert any(record["swaps"] for record in found["per row"])


def test_a_model_with_parts_of_its_own_is_not_taken_for_several():
    model = classifier(0)
    expected = ATTACK.attack(model, word_tokenizer(), DATA["text"], DATA["label"])
    model.parts = torch.nn.ModuleList()
    assert ATTACK.attack(model, word_tokenizer(), DATA["text"], DATA["label"]) == expected


@pytest.mark.parametrize("name", ["mixture", "game"])
def test_what_is_of_one_model_is_not_measured_of_a_mixture(name):
    mixture = Mixture([classifier(0), classifier(1)])
    given = {"mixture": mixture, "game": trained()[1]}
    with pytest.raises(ValueError, match="itself"):
        evaluate(mixture, word_tokenizer(), DATA, **{name: given[name]})


@pytest.mark.parametrize(("labels", "fits"), [(2, True), (3, False)])
def test_an_adapter_is_loaded_with_its_model_or_refused_in_words(tmp_path, labels, fits):
    """Its head is in its file; how many labels that has is known to the model's config alone."""
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    body = tiny(transformers.BertModel, word_tokenizer(), 0)
    for folder in ("body", "adapter"):
        word_tokenizer().save_pretrained(tmp_path / folder)
    body.save_pretrained(tmp_path / "body")
    kind = transformers.AutoModelForSequenceClassification
    network = kind.from_pretrained(tmp_path / "body", num_labels=labels)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    adapted = peft.get_peft_model(network, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    if fits:
        found, _ = load_classifier(str(tmp_path / "adapter"))
        assert torch.allclose(found.cpu().eval()(ids).logits, adapted(ids).logits)
    else:
        with pytest.raises(ValueError, match="adapter cannot be loaded"):
            load_classifier(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
        (["--model", "nowhere"], "nowhere cannot be loaded"),
        (["--text", "a", "b", "c"], "one column or two"),
        (["--attack", "nowhere"], "there is no such file"),
        (["--radii", "-1"], "radius must be finite"),
        (["--shifted", "a=b", "a=c"], "--shifted a=c: a is the name of b already"),
        (["--model", "minilm"], "minilm has no head for classes"),
        (["--mixture", "both"], "write NAME=FOLDER"),
        (["--mixture", "both=nowhere"], "nowhere cannot be loaded"),
    ],
)
def test_the_script_answers_a_mistake_with_one_line(folder, tmp_path, capsys, more, said):
    try:
        code = command(folder, tmp_path, *more)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
