"""The example scripts do what they say: train, write results, resume, and answer mistakes."""

import contextlib
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import sklearn.metrics
import tokenizers
import torch
import transformers

import anli
import demo
import equilibrium
import glue
import intent
import mixadv
from common import data, evaluation, model, results
from common.data import Task
from common.loop import Keeping, Training
from common.results import Run
from mixadv.games import METHODS, PARTICLE_METHODS, Particles
from mixadv.robustness.data import DataError
from tests.scripts import own_start, weights_of  # noqa: F401
from tests.zoo import assert_same, slow_but, tiny_bert

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS: dict[str, Any] = {"glue": glue, "anli": anli, "intent": intent}
WORDS = {"red": ["rose", "cherry", "brick"], "green": ["grass", "leaf"], "blue": ["sea", "sky"]}
FILLER = ["the", "this", "that", "one", "some", "very", "quite", "so", "like", "seems", "is"]
SIZE = {"train": 12, "dev": 4, "test": 5}
CLOCK = "seconds_per_update"


# Data and models -------------------------------------------------------------------------------


def phrase(draw: random.Random, word: str) -> str:
    """Return two to eleven words that end in a given one."""
    return " ".join([*draw.choices(FILLER, k=draw.randint(1, 10)), word])


def sentences(each: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of every label, no two the same."""
    draw = random.Random(seed)
    made = []
    for label, words in WORDS.items():
        for number in range(each):
            text = f"{phrase(draw, draw.choice(words))} {seed}{number}"
            made.append({"text": text, "label": label})
    draw.shuffle(made)
    return made


def rows(texts: tuple[str, ...], labels: list[Any], count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows with one or two texts and a label that the words of the first tell."""
    draw, made = random.Random(seed), []
    words = list(itertools.chain(*WORDS.values()))
    for _ in range(count):
        number = draw.randrange(len(labels))
        row = {name: phrase(draw, words[number]) for name in texts}
        made.append({**row, "label": labels[number]})
    return made


def write(folder: Path, name: str, content: list[Any]) -> Path:
    """Write rows as JSON lines, packed if the name says so; strings are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in content)
    plain = text.encode(errors="surrogateescape")
    path.write_bytes(gzip.compress(plain) if path.suffix == ".gz" else plain)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the three splits of a set of sentences, one of them packed."""
    for seed, (split, each) in enumerate(SIZE.items()):
        write(
            tmp_path / "data", f"{split}.jsonl" + ".gz" * (split == "test"), sentences(each, seed)
        )
    return tmp_path / "data"


def build_tokenizer() -> Any:
    """Return a tokenizer of the few words that the tests use."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *itertools.chain(*WORDS.values())]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny BERT, with dropout, and of its tokenizer."""
    path = str(tmp_path_factory.mktemp("models") / "tiny")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = tiny_bert(len(tokenizer), max_position_embeddings=80)
    transformers.BertModel(config).save_pretrained(path)
    return path


def command(source: Path | str, encoder: str, output: Path, *more: str) -> list[str]:
    """Return arguments of a short run; those in `more` come last and win."""
    short = ["--batch-size", "8", "--lr", "0.01", "--max-length", "64", "--output", str(output)]
    length = [] if "--epochs" in more else ["--updates", "4"]
    return ["--data", str(source), "--model", encoder, *short, *length, *more]


def written(output: Path) -> list[dict[str, Any]]:
    """Return the results written, less what the clock says."""
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != CLOCK} for line in lines]


@pytest.fixture
def run(folder: Path, encoder: str, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Return a function that runs intent.py briefly in a folder and returns what is written."""

    def call(*more: str, output: str = "") -> list[dict[str, Any]]:
        assert intent.main(command(folder, encoder, tmp_path / output, *more)) == 0
        return written(tmp_path / output)

    return call


def cells(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without the line under its head."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    return [lines[0], *lines[2:]]


# Scripts ---------------------------------------------------------------------------------------


def test_quickstart_is_short_and_learns(capsys: pytest.CaptureFixture[str]):
    path = EXAMPLES / "quickstart.py"
    assert len(path.read_text().splitlines()) < 40
    variables = runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "Zhong et al." in printed
    assert "step 60" in printed
    assert variables["accuracy"] > 0.9


def test_demo_prints_the_table_and_saves_the_picture(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(model, "path", lambda name: encoder)
    argv = ["--updates", "2", "--attack-rows", "8", "--output", str(tmp_path)]
    assert demo.main(argv) == 0
    printed = capsys.readouterr().out
    head, *lines = cells(printed.split("\n\n")[0])
    assert head[2:-3] == ["test", "adversarial", *[f"PGD {radius:g}" for radius in demo.RADII]]
    assert [line[:2] for line in lines] == [[n, str(2 * factor)] for n, factor in demo.METHODS]
    picture = tmp_path / "accuracy_against_radius.png"
    assert printed.splitlines()[-1] == f"picture: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(written(tmp_path)) == len(demo.METHODS)
    assert demo.main(argv) == 0
    assert capsys.readouterr().out == printed
    assert demo.main(["--updates", "0"]) == 2
    assert capsys.readouterr().err.startswith("demo: epochs must be positive")


@pytest.mark.slow
def test_the_embedded_encoder_learns_a_few_of_the_embedded_intents(tmp_path: Path):
    labels = {"set_alarm", "find_recipe"}
    for split in ("train", "dev"):
        path = EXAMPLES / "data" / "intents" / f"{split}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        write(tmp_path / "data", f"{split}.jsonl", [r for r in lines if r["label"] in labels])
    argv = ["--data", str(tmp_path / "data"), "--output", str(tmp_path), "--batch-size", "8"]
    assert intent.main([*argv, "--updates", "6", "--solver", "fgm"]) == 0
    [result] = written(tmp_path)
    assert result["last"]["dev"]["accuracy"] > 0.8
    assert result["forwards_per_update"] == 2


# Games with known answers ------------------------------------------------------------------------


def test_a_matrix_game_is_solved_as_by_hand(monkeypatch: Any, capsys: Any):
    path = EXAMPLES / "matrix_game.py"
    assert len(path.read_text().splitlines()) <= 20
    monkeypatch.setattr(sys, "argv", [str(path)])
    solution = runpy.run_path(str(path), run_name="__main__")["solution"]
    exact = {"learner": [3 / 7, 4 / 7], "adversary": [2 / 7, 5 / 7], "value": 1 / 7, "gap": 0.0}
    for line in capsys.readouterr().out.splitlines():
        name, printed = line.split(maxsplit=1)
        number = json.loads(printed.removesuffix("(exact)"))
        assert number == pytest.approx(exact.pop(name), abs=1e-9)
    assert not exact
    assert solution.gap.kind == "exact"


class Solved(NamedTuple):
    """What a quick call of the script returned, printed and wrote."""

    rows: list[equilibrium.Solved]
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def equilibria(tmp_path_factory: pytest.TempPathFactory) -> Solved:
    folder = tmp_path_factory.mktemp("equilibria")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        rows = equilibrium.main(["--quick", "--output", str(folder)])
    return Solved(rows, printed.getvalue(), folder)


def test_every_method_plays_every_game_that_it_can(equilibria: Solved):
    played = {(row.name, row.method) for row in equilibria.rows}
    finite, *continuous = equilibrium.GAMES
    expected = set(itertools.product(equilibrium.GAMES, METHODS))
    assert played == expected | set(itertools.product(continuous, PARTICLE_METHODS))
    assert len(equilibria.rows) == len(played)
    assert finite == "rock–paper–scissors"


def test_gaps_of_the_games_obey_their_bounds_at_every_step(equilibria: Solved):
    proved = [row for row in equilibria.rows if row.bound is not None]
    assert len(proved) == 5 * len(equilibrium.GAMES)
    for row in proved:
        bound = torch.as_tensor(row.bound(torch.tensor(row.solution.steps).double().numpy()))
        assert (row.solution.gaps <= bound + 1e-9).all(), (row.name, row.method)
        assert row.solution.gap.value <= bound[-1] + 1e-9


def test_the_equilibria_that_are_stated_have_no_gap():
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    known = equilibrium.rock_paper_scissors()
    assert known.game.duality_gap(third, third) < 1e-12
    assert known.game.value(third, third) == pytest.approx(known.value, abs=1e-12)
    shares = torch.tensor([0.78, 0.22], dtype=torch.float64)
    mixed = Particles(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), shares.log())
    fifth, opposite = torch.tensor([[0.2]]), torch.tensor([[0.1], [0.6]])
    for known, pair in (
        (equilibrium.parrilo(), (mixed, fifth)),
        (equilibrium.circle(), (opposite, opposite + 0.3)),
    ):
        assert float(known.game.duality_gap(*pair)) < 1e-5
        pair = [known.game.particles(side) for side in pair]
        assert known.game.value(*pair).item() == pytest.approx(known.value, abs=1e-6)


def test_the_exact_value_lies_within_the_gap(equilibria: Solved):
    for row in equilibria.rows:
        gap = row.solution.gap
        away = abs(row.solution.value.item() - row.known.value)
        assert away <= gap.value.item() + gap.error + 1e-9, (row.name, row.method)


def test_pure_play_stays_away_from_the_mixed_equilibria(equilibria: Solved):
    pure = {"best_response_dynamics", "gradient_descent_ascent"}
    assert all(row.solution.gap.value > 1.5 for row in equilibria.rows if row.method in pure)


def test_equilibrium_prints_and_writes_one_table_and_a_picture(equilibria: Solved):
    table, rest = equilibria.printed.split("\n\n")
    assert (equilibria.folder / "equilibrium.md").read_text() == table + "\n"
    assert [line[:2] for line in cells(table)[1:]] == [[r.name, r.method] for r in equilibria.rows]
    picture = equilibria.folder / "equilibrium.png"
    assert rest == f"picture: {picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_measured_gaps_obey_their_bounds():
    head, *lines = cells((EXAMPLES / "results" / "equilibrium.md").read_text())
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    assert len(rows) == 27
    for row in rows:
        gap, *error = re.findall(r"[\d.e-]+(?=[ +(])", row["gap"])
        assert row["bound"] == "–" or float(gap) <= float(row["bound"]), row
        away = abs(float(row["value"]) - float(row["exact value"]))
        assert away <= float(gap) + sum(map(float, error)) + 1e-3, row


GLUE: dict[str, tuple[tuple[str, ...], list[Any], set[str]]] = {
    "cola": (("sentence",), [0, 1], {"Matthews"}),
    "sst2": (("sentence",), [0, 1], {"accuracy"}),
    "mrpc": (("sentence1", "sentence2"), [0, 1], {"F1", "accuracy"}),
    "stsb": (("sentence1", "sentence2"), [0.0, 1.5, 3, 5.0], {"Pearson", "Spearman"}),
    "qqp": (("question1", "question2"), [0, 1], {"F1", "accuracy"}),
    "mnli": (("premise", "hypothesis"), [0, 1, 2], {"accuracy"}),
    "qnli": (("question", "sentence"), [0, 1], {"accuracy"}),
    "rte": (("sentence1", "sentence2"), [0, 1], {"accuracy"}),
    "wnli": (("sentence1", "sentence2"), [0, 1], {"accuracy"}),
}


def glue_folder(root: Path, task: str, name: str = "") -> Path:
    """Write a task of GLUE with the columns of the hub; its test rows have no gold labels."""
    texts, labels, _ = GLUE[task]
    path = root / (name or task)
    write(path, "train.jsonl", rows(texts, labels, 24, 0))
    write(path, "validation.jsonl.gz", rows(texts, labels, 9, 1))
    write(path, "test.jsonl", [{**row, "label": -1} for row in rows(texts, labels, 3, 2)])
    return root


def test_every_task_of_glue_is_there():
    assert list(glue.TASKS) == list(GLUE)


@pytest.mark.parametrize("task", slow_but(("cola", "mnli", "stsb", "wnli"), GLUE))
def test_glue_trains_and_reports_the_official_metrics(task: str, encoder: str, tmp_path: Path):
    argv = command(glue_folder(tmp_path, task), encoder, tmp_path, "--task", task)
    assert glue.main([*argv, "--updates", "2", "--solver", "plain", "mat"]) == 0
    for result in written(tmp_path):
        assert result["task"] == task
        assert {s: set(found) for s, found in result["last"].items()} == {"dev": GLUE[task][2]}
        assert all(-1 <= v <= 1 for found in result["last"].values() for v in found.values())
        assert result["dropped"] == {"test": 3}


def test_mismatched_rows_are_a_split_of_their_own(encoder: str, tmp_path: Path):
    texts, labels, _ = GLUE["mnli"]
    path = tmp_path / "mnli_subset"
    for split in ("train", "validation_matched", "validation_mismatched"):
        write(path, f"{split}.jsonl", rows(texts, labels, 8, 0))
    assert glue.main(command(tmp_path, encoder, tmp_path, "--task", "mnli")) == 0
    assert list(written(tmp_path)[0]["last"]) == ["dev", "mismatched"]


@pytest.mark.parametrize(  # MART is for classes
    "solver", slow_but(("freelb", "smart", "mat"), [n for n in mixadv.SOLVERS if n != "mart"])
)
def test_every_solver_plays_a_regression(solver: str, encoder: str, tmp_path: Path):
    argv = command(glue_folder(tmp_path, "stsb"), encoder, tmp_path, "--task", "stsb")
    assert glue.main([*argv, "--updates", "2", "--solver", solver]) == 0
    [result] = written(tmp_path)
    assert result["played"].get("divergence", "squared_error") == "squared_error"


def anli_folder(root: Path) -> Path:
    """Write two training sets, one with rows without a gold label, and the rounds."""
    columns, labels = anli.TEXTS, [0, 1, 2]
    unknown = [{**row, "label": -1} for row in rows(columns, labels, 5, 9)]
    write(root / "snli_subset", "train.jsonl", [*rows(columns, labels, 16, 0), *unknown])
    write(root / "mine", "train.jsonl", rows(columns, labels, 12, 1))
    for number, r in enumerate(anli.ROUNDS):
        for split in ("dev", "test"):
            write(root / f"anli_{r}", f"{split}.jsonl", rows(columns, labels, 4 + number, number))
    return root


def test_anli_trains_on_a_mix_and_reports_each_round_and_all(encoder: str, tmp_path: Path):
    argv = command(anli_folder(tmp_path), encoder, tmp_path, "--train", "snli", "mine")
    assert anli.main([*argv, "--hold-out", "8", "--evaluate-every", "2"]) == 0
    [result] = written(tmp_path)
    assert result["train"] == ["snli", "mine"]
    assert result["rows"] == 16 + 12 - 8
    assert result["dropped"] == {"snli": 5}
    for split in ("dev", "test"):
        found = result["last"][split]
        assert list(found) == ["all", "r1", "r2", "r3"]
        pooled = (4 * found["r1"] + 5 * found["r2"] + 6 * found["r3"]) / 15
        assert found["all"] == pytest.approx(pooled)
    assert list(result["last"]["held-out"]) == ["all"]


def test_out_of_scope_rows_have_their_own_recall(tmp_path: Path):
    labels = ["red", "blue", "oos"]
    for split in ("train", "test"):
        made = [{"text": f"{split} {i}", "label": i % 3} for i in range(9)]
        made = [{**row, "label_name": labels[row["label"]]} for row in made]
        write(tmp_path, f"{split}.jsonl", made)
    task = intent.load(intent.arguments(["--data", str(tmp_path)]))
    assert list(task.labels) == ["blue", "oos", "red"]
    gold = task.splits["test"]["label"][:]
    assert gold == [2, 0, 1] * 3
    answers = torch.tensor([2, 1, 1] * 3).numpy()
    assert task.measure(answers, task.splits["test"]) == {
        "accuracy": pytest.approx(2 / 3),
        "in scope": pytest.approx(1 / 2),
        "out-of-scope recall": 1.0,
    }
    inside = task.splits["test"].filter(lambda row: row["label"] != 1)
    assert set(task.measure(answers[:6], inside)) == {"accuracy"}


# The hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Return a function that puts splits on a hub, and returns what is asked of it."""

    def put(splits: dict[str, list[dict[str, Any]]], label: Any = None) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []

        def load(*name: str, **_: Any) -> Any:
            asked.append(name)
            made = {s: datasets.Dataset.from_list(content) for s, content in splits.items()}
            if label is not None:
                made = {s: d.cast_column(*label) for s, d in made.items()}
            return datasets.DatasetDict(made)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return put


def test_glue_comes_from_the_hub(hub: Any):
    texts, labels, _ = GLUE["mnli"]
    made = rows(texts, labels, 4, 0)
    none = [{**row, "label": -1} for row in made]
    splits = {"train": made, "validation_matched": made, "validation_mismatched": made}
    asked = hub({**splits, "test_matched": none, "test_mismatched": none})
    task = glue.load(glue.arguments(["--task", "mnli"]))
    assert asked == [("nyu-mll/glue", "mnli")]
    assert list(task.splits) == ["dev", "mismatched"]
    assert task.dropped == {"test_matched": 4, "test_mismatched": 4}


def test_anli_comes_from_the_hub(hub: Any):
    made = rows(anli.TEXTS, [0, 1, 2], 4, 0)
    split = {f"{s}_{r}": made for s in ("train", "dev", "test") for r in anli.ROUNDS}
    asked = hub({"train": made, **split})
    task = anli.load(anli.arguments([]))
    assert asked == [("facebook/anli",), ("stanfordnlp/snli",), ("nyu-mll/multi_nli",)]
    assert len(task.train) == 5 * 4
    assert {name: len(split) for name, split in task.splits.items()} == {"dev": 12, "test": 12}


def test_intents_come_from_the_hub_with_the_names_of_their_labels(hub: Any):
    made = [{"text": f"{i}", "intent": i % 3} for i in range(6)]
    label = ("intent", datasets.ClassLabel(names=["translate", "oos", "balance"]))
    asked = hub({"train": made, "validation": made, "test": made}, label)
    task = intent.load(intent.arguments(["--task", "clinc150"]))
    assert asked == [("clinc/clinc_oos", "plus")]
    assert list(task.labels) == ["balance", "oos", "translate"]
    assert task.train["label"][:] == [2, 1, 0] * 2
    intent.load(intent.arguments(["--data", "some/set"]))
    assert asked[1:] == [("some/set",)]


def test_what_the_hub_has_as_a_script_is_read_from_its_converted_copy(
    monkeypatch: pytest.MonkeyPatch,
):
    def load(*name: str, revision: str | None = None) -> Any:
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found banking77.py")
        assert (name, revision) == (("PolyAI/banking77",), "refs/convert/parquet")
        made = datasets.Dataset.from_list([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
        return datasets.DatasetDict({"train": made, "test": made})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(intent.load(intent.arguments(["--task", "banking77"])).train) == 2


# Results ---------------------------------------------------------------------------------------


def test_each_run_writes_one_line_and_is_not_repeated(
    folder: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    argv = command(folder, encoder, tmp_path, "--solver", "plain", "mat", "--seeds", "0", "1", "1")
    argv += ["--radii", "0", "0.1", "--attack-rows", "6"]
    assert intent.main(argv) == 0
    found = written(tmp_path)
    order = [("plain", 0), ("plain", 1), ("mat", 0), ("mat", 1)]
    assert [(r["solver"], r["seed"]) for r in found] == order
    for result in found:
        assert list(result["last"]) == ["dev", "test", "PGD 0", "PGD 0.1"]
        assert "best" not in result
        assert (result["updates"], result["rows"], result["task"]) == (4, 36, "data")
    assert [r["optimizer_steps"] for r in found] == [4, 4, 8, 8]
    assert [r["forwards_per_update"] for r in found] == [1, 1, 6, 6]
    assert found[2]["played"]["learner_steps"] == 2
    assert not list(tmp_path.glob("*.checkpoints"))

    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("trains again"))
    assert intent.main(argv) == 0
    assert written(tmp_path) == found


def test_epochs_are_as_many_updates_as_they_need(run: Any):
    [result] = run("--epochs", "1.5", "--accumulate", "2")
    assert result["updates"] == math.ceil(1.5 * 36 / 16)


def test_the_best_weights_are_chosen_on_held_out_rows_or_on_dev(run: Any):
    every = ["--evaluate-every", "1", "--updates", "6", "--seeds", "0", "1"]
    run(*every)
    for result, split in zip(
        run(*every, "--hold-out", "9"), ["dev"] * 2 + ["held-out"] * 2, strict=True
    ):
        assert result["chosen_on"] == split
        scores = [score for _, score in result["curve"]]
        assert [update for update, _ in result["curve"]] == [1, 2, 3, 4, 5, 6]
        assert result["best_update"] == 1 + scores.index(max(scores))
        assert result["best"][split]["accuracy"] == max(scores)
        assert result["last"][split]["accuracy"] == scores[-1]
        assert set(result["best"]) == set(result["last"])


def test_evaluation_on_the_way_changes_nothing(run: Any):
    more = ["--hold-out", "9", "--solver", "mat"]
    [without] = run(*more, output="a")
    [evaluated] = run(*more, "--evaluate-every", "1", output="b")
    assert without["last"] == evaluated["last"]


def test_the_report_has_a_row_per_setting_and_an_interval_over_seeds(
    folder: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = command(folder, encoder, tmp_path, "--evaluate-every", "2", "--updates")
    assert intent.main([*argv, "2", "--seeds", "0", "1", "2"]) == 0
    assert intent.main([*argv, "4"]) == 0
    capsys.readouterr()
    assert intent.main(["--report", "--output", str(tmp_path)]) == 0
    head, *lines = cells(capsys.readouterr().out)
    assert head == ["solver", "updates", "at", "dev", "test", "passes", "s/step", "seeds"]
    assert [[*line[:3], line[-1]] for line in lines] == [
        ["plain", "2", "last", "3"],
        ["plain", "2", "best on dev", "3"],
        ["plain", "4", "last", "1"],
        ["plain", "4", "best on dev", "1"],
    ]
    values = [100 * r["last"]["dev"]["accuracy"] for r in written(tmp_path)[:3]]
    # 4.302653: the 97.5 % quantile of Student's t with two degrees of freedom.
    half = 4.302653 * statistics.stdev(values) / math.sqrt(3)
    assert lines[0][3] == f"{statistics.mean(values):.1f} ± {half:.1f}"
    assert "±" not in lines[2][3]


def test_runs_that_differ_have_different_names_and_equal_runs_the_same():
    changes: list[dict[str, Any]] = [
        {"task": "rte"},
        {"train": ("snli",)},
        {"solver": "mat"},
        {"parameters": {"steps": 1}},
        {"data": "elsewhere"},
        {"model": "other"},
        {"seed": 1},
        {"updates": 7},
        {"shots": 3},
        {"bf16": True},
        {"radii": (0.1,)},
    ]
    keys = [Run(**{"task": "cola", **change}).key for change in [{}, *changes]]
    assert len(set(keys)) == len(keys)
    assert [Run(**{"task": "cola", **change}).key for change in [{}, *changes]] == keys


# Options ---------------------------------------------------------------------------------------


def chosen(*argv: str) -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters of each run that a command line asks for."""
    return {run.solver: run.parameters for run in intent.runs(intent.arguments(list(argv)))}


def test_set_gives_hyper_parameters_to_all_solvers_or_to_one():
    assert chosen("--solver", "plain", "freelb", "mat", "--set", "radius=0.5", "mat.steps=3") == {
        "plain": {},
        "freelb": {"radius": 0.5},
        "mat": {"radius": 0.5, "steps": 3},
    }
    assert chosen("--solver", "pgd", "--set", "norm=linf", "radius=null", "fresh_dropout=true") == {
        "pgd": {"norm": "linf", "radius": None, "fresh_dropout": True}
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("solvers.toml", "[freelb]\nradius = 0.3\nsteps = 2\n[mat]\nsteps = 4\n[pgd]\nsteps = 9\n"),
        (
            "solvers.json",
            '{"freelb": {"radius": 0.3, "steps": 2}, "mat": {"steps": 4}, "pgd": {"steps": 9}}',
        ),
    ],
)
def test_a_file_has_a_table_for_each_solver_and_set_goes_before_it(
    name: str, text: str, tmp_path: Path
):
    path = write(tmp_path, name, [text])
    argv = ["--solver", "plain", "freelb", "mat", "--config", str(path), "--set", "mat.steps=5"]
    assert chosen(*argv) == {
        "plain": {},
        "freelb": {"radius": 0.3, "steps": 2},
        "mat": {"steps": 5},
    }


def test_what_is_set_reaches_the_game(run: Any):
    [result] = run("--solver", "freelb", "--set", "freelb.steps=5")
    assert result["forwards_per_update"] == result["played"]["steps"] == 5
    assert result["parameters"] == {"steps": 5}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option_solver_and_unit(script: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ["--hold-out", "plain", *mixadv.SOLVERS, "learner_temperature", "token norms"]:
        assert word in text
    assert f"python examples/{script}.py" in text
    assert max(map(len, text.splitlines())) <= 100


# Weights that are evaluated, and saved -----------------------------------------------------------


def trained(source: Path, encoder: str, output: Path, *more: str) -> tuple[Training, Task]:
    """Return what is left of a run at its end."""
    options = intent.arguments(command(source, encoder, output, *more))
    task = intent.load(options)
    keeping = Keeping(output, save=options.save, tensorboard=options.tensorboard)
    training = Training(intent.runs(options)[0], task, keeping)
    results.append(output / "results.jsonl", training.complete())
    return training, task


def answers(
    logits: Callable[[dict[str, Any]], torch.Tensor], training: Training, split: str
) -> Any:
    """Return the accuracy of what a function predicts, one row after another."""
    labels = training.splits[split]["label"][:]
    found = []
    with torch.no_grad():
        for row in training.splits[split]:
            batch = training.encode({name: [value] for name, value in row.items()})
            found.append(int(logits(batch).argmax(-1)))
    return {"accuracy": sklearn.metrics.accuracy_score(labels, found)}


@pytest.mark.parametrize("evaluate", ["last", "mean", "mixture"])
def test_what_is_evaluated_is_what_the_game_keeps(
    evaluate: str, folder: Path, encoder: str, tmp_path: Path
):
    more = ["--solver", "mat", "--set", "samples=3", "--evaluate", evaluate, "--updates", "8"]
    training, _ = trained(folder, encoder, tmp_path, *more)
    training.model.eval()
    game, net = training.game, training.model
    last = answers(lambda batch: net(**batch).logits, training, "dev")
    with game.averaged():
        mean = answers(lambda batch: net(**batch).logits, training, "dev")
    kept = training.game.learner_samples
    assert len(kept) == 3

    def mixture(batch: dict[str, Any]) -> torch.Tensor:
        members = [torch.func.functional_call(net, sample, (), batch).logits for sample in kept]
        return torch.stack([logits.softmax(-1) for logits in members]).mean(0)

    expected = {"last": last, "mean": mean, "mixture": answers(mixture, training, "dev")}
    assert written(tmp_path)[0]["last"]["dev"] == expected[evaluate]


@pytest.mark.parametrize("evaluate", ["last", "mean"])
def test_models_are_saved_with_their_tokenizer_and_predict_what_was_measured(
    evaluate: str, folder: Path, encoder: str, tmp_path: Path
):
    more = ["--solver", "mat", "--evaluate", evaluate, "--evaluate-every", "1", "--save"]
    training, _ = trained(folder, encoder, tmp_path, *more)
    [result] = written(tmp_path)
    if evaluate == "mean":
        with training.game.averaged():
            weights = {k: v.clone() for k, v in training.model.state_dict().items()}
    else:
        weights = training.model.state_dict()
    for moment in ("last", "best"):
        saved = tmp_path / result["key"] / moment
        tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
        assert tokenizer("rose")["input_ids"] == training.tokenizer("rose")["input_ids"]
        net = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
        assert net.config.id2label == {0: "blue", 1: "green", 2: "red"}
        if moment == "last":
            assert_same(net.state_dict(), weights)
        found = answers(lambda batch, net=net: net(**batch).logits, training, "dev")
        assert result[moment]["dev"] == found


def test_a_finished_run_whose_model_is_missing_is_trained_again(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run()
    first, again = run("--save")
    assert "model shards" not in capsys.readouterr().err  # no bar but the run's own
    assert first == again
    assert (tmp_path / first["key"] / "last" / "config.json").is_file()
    assert len(run("--save")) == 2


def test_tensorboard_has_what_the_bar_shows_and_the_metrics(
    folder: Path, encoder: str, tmp_path: Path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--solver", "mat", "--tensorboard", "--evaluate-every", "2"]
    training, _ = trained(folder, encoder, tmp_path, *more)
    events = EventAccumulator(str(tmp_path / "tensorboard" / training.run.key))
    events.Reload()
    for name in ("loss", "payoff", "radius", "learning rate"):
        assert [e.step for e in events.Scalars(f"train/{name}")] == [1, 2, 3, 4]
    assert events.Scalars("train/radius")[-1].value == pytest.approx(training.game.outcome.radius)
    assert [e.step for e in events.Scalars("dev/accuracy")] == [2, 4]


def test_the_bar_shows_loss_payoff_and_radius(folder: Path, encoder: str, tmp_path: Path):
    training, _ = trained(folder, encoder, tmp_path, "--solver", "pgd")
    assert set(training.numbers(1.0)) == {"loss", "learning rate", "payoff", "radius"}
    plain, _ = trained(folder, encoder, tmp_path)
    assert set(plain.numbers(1.0)) == {"loss", "learning rate"}


# Accumulation and number formats -----------------------------------------------------------------


def updated(training: Training, *chunks: list[int]) -> dict[str, torch.Tensor]:
    """Return the weights after one update on batches of the rows named."""
    training.model.eval()  # no dropout: its masks depend on the batch
    for chunk in chunks:
        training.training_step(training.model, training.encode(training.rows[chunk]))
    training.optimizer.step()
    return {name: weight.clone() for name, weight in training.model.state_dict().items()}


ALIKE = {  # settings under which a round on a batch is the rounds on its parts
    "plain": ["plain"],
    "pgd": ["pgd", "--set", "start=zero", "unit=absolute", "radius=0.5"],
    "mat": ["mat", "--set", "radius=0", "learner_steps=1", "learner_temperature=0"],
}


@pytest.mark.parametrize("solver", ALIKE)
def test_accumulated_batches_make_the_update_of_their_union(
    solver: str, folder: Path, encoder: str, tmp_path: Path
):
    def start(accumulate: str) -> Training:
        more = ["--solver", *ALIKE[solver], "--accumulate", accumulate]
        options = intent.arguments(command(folder, encoder, tmp_path, *more))
        training = Training(intent.runs(options)[0], intent.load(options), Keeping(tmp_path))
        for group in training.optimizer.param_groups:
            group.update(lr=1e-2, eps=1.0)  # AdamW without its sign of small gradients
        return training

    parts = [list(range(8)), list(range(8, 16))]
    whole = updated(start("1"), list(range(16)))
    part = updated(start("1"), parts[0])
    accumulated = updated(start("2"), *parts)
    torch.testing.assert_close(accumulated, whole, atol=1e-6, rtol=0)
    assert max(float((part[name] - whole[name]).abs().max()) for name in whole) > 1e-5


@pytest.mark.parametrize("share", ["0.1", "0.5", "0.75"])
def test_a_solver_that_plays_on_some_rows_trains_on_all(
    share: str, folder: Path, encoder: str, tmp_path: Path
):
    """At radius 0 it is plain training; elsewhere the divergence is of those rows."""

    def start(*more: str) -> Training:
        options = intent.arguments(command(folder, encoder, tmp_path, *more))
        training = Training(intent.runs(options)[0], intent.load(options), Keeping(tmp_path))
        for group in training.optimizer.param_groups:
            group.update(lr=1e-2, eps=1.0)  # AdamW without its sign of small gradients
        return training

    rows = list(range(16))
    plain = updated(start("--solver", "plain"), rows)
    still = start("--solver", "alum", "--set", "radius=0", "--share", share)
    torch.testing.assert_close(updated(still, rows), plain, atol=1e-6, rtol=0)
    played = max(1, int(float(share) * 16))
    assert len(still.game.strategy.points[0][0]) == played
    moved = updated(
        start("--solver", "alum", "--set", "smoothness_weight=1e4", "--share", share), rows
    )
    assert max(float((moved[name] - plain[name]).abs().max()) for name in plain) > 1e-6


@pytest.mark.parametrize("solver", ["plain", "freelb", "mat"])
def test_an_accumulated_update_is_one_step_of_the_optimizer(solver: str, run: Any):
    [result] = run("--solver", solver, "--accumulate", "3")
    assert result["optimizer_steps"] == 4
    # MAT's round is opened for each batch and left after its first step: K_δ + 2 forwards.
    assert result["forwards_per_update"] == 3 * {"plain": 1, "freelb": 3, "mat": 4}[solver]


def test_forward_passes_are_in_bfloat16_if_asked(run: Any, monkeypatch: pytest.MonkeyPatch):
    kinds = set()
    real = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda *a, **k: kinds.add((out := real(*a, **k)).dtype) or out,
    )
    [result] = run("--solver", "plain", "--bf16")
    assert kinds == {torch.bfloat16}
    assert result["bf16"]


# Interruptions ---------------------------------------------------------------------------------

CHECKPOINTS = "*.checkpoints/*/progress.json"
MOMENTS = ["between checkpoints", "while a checkpoint is written", "in the evaluation"]
PARTICLES = ["--set", "particles=2", "temperature=1e-3", "learner_temperature=1e-6", "samples=2"]
SETTINGS = {
    "plain": ["plain"],
    "freelb": ["freelb"],
    "smart": ["smart"],
    "mat": ["mat", *PARTICLES],
    "mat, mean": ["mat", "--evaluate", "mean"],
    "mat, mixture": ["mat", *PARTICLES, "--evaluate", "mixture"],
    "plain, accumulated": ["plain", "--accumulate", "2"],
    "mat, accumulated": ["mat", *PARTICLES, "--accumulate", "2"],
    "mat, bf16": ["mat", "--bf16", "--set", "start_size=1.0", "radius=2"],
}
USUAL = ("plain", "mat")  # the others are slow tests


def interrupt(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next training be interrupted after its first checkpoint."""
    calls: Counter[str] = Counter()

    def broken(name: str, at: int, owner: Any, before: Any = lambda *_: None) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            if calls[name] == at:
                before(*arguments)
                raise KeyboardInterrupt
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    if moment == "between checkpoints":
        broken("on_step_end", 4, Training)
    elif moment == "in the evaluation":
        broken("result", 1, Training)
    else:
        broken("save", 5, torch, lambda state, path: Path(path).write_bytes(b"half of it"))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("setting", slow_but(USUAL, SETTINGS))
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    setting: str,
    moment: str,
    folder: Path,
    encoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    more = ["--checkpoint-every", "2", "--evaluate-every", "1", "--hold-out", "9"]
    more += ["--solver", *SETTINGS[setting]]
    if "mixture" not in setting and "bf16" not in setting:
        more += ["--radii", "0.1", "--attack-rows", "4"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = weights_of(intent.main, command(folder, encoder, whole, *more), monkeypatch)

    argv = command(folder, encoder, broken, *more)
    with monkeypatch.context() as patched:
        interrupt(moment, patched)
        with pytest.raises(KeyboardInterrupt):
            intent.main(argv)
    assert len(list(broken.glob(CHECKPOINTS))) == 1
    assert not (broken / "results.jsonl").exists()

    steps = []
    ended = Training.on_step_end
    monkeypatch.setattr(Training, "on_step_end", lambda *a, **k: steps.append(0) or ended(*a, **k))
    assert_same(weights_of(intent.main, argv, monkeypatch), expected)
    assert len(steps) == {"in the evaluation": 0}.get(moment, 2)
    assert written(broken) == written(whole)
    assert not list(broken.glob("*.checkpoints"))


KILLED = """
import io, os, random, signal, sys
from pathlib import Path
import torch
import intent, mixadv
from common.loop import Keeping, Training

options, save = intent.arguments(sys.argv[2:]), torch.save
task = intent.load(options)
torch.set_num_threads(1)

def train(run, output, fatal=None):
    "Train on from the checkpoint, which each update writes; the process is killed at a file of it."
    files = iter(range(1, 100))

    def killed_while_writing(state, target):
        if next(files) != fatal:
            return save(state, target)
        save(state, whole := io.BytesIO())
        Path(target).write_bytes(whole.getvalue()[: random.randrange(whole.tell())])
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = killed_while_writing
    training = Training(run, task, Keeping(output, checkpoint_every=1))
    result = training.complete()
    assert len(list(training.checkpoints.iterdir())) == 1
    states = [training.model.state_dict(), training.optimizer.state_dict(), torch.get_rng_state()]
    return states, {**result, "seconds_per_update": 0}

folder = Path(sys.argv[1])
for number, run in enumerate(intent.runs(options)):
    states, result = train(run, folder / "whole")
    draw = random.Random(number)
    for fatal in (draw.randint(1, 12), draw.randint(1, 3)):  # of three files in each of 4 updates
        child = os.fork()
        if child == 0:
            random.seed(number)
            train(run, folder / "killed", fatal)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, run.solver
        left = folder.glob(f"killed/{run.key}.checkpoints/*")
        assert any(not (path / "progress.json").exists() for path in left), run.solver
    resumed, again = train(run, folder / "killed")
    torch.testing.assert_close(resumed, states, rtol=0, atol=0)
    assert again == result, run.solver
print("as uninterrupted")
"""


def environment(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a process that runs a script."""
    paths = os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_DATASETS_CACHE": str(tmp_path / "c")}
    return {**os.environ, **own}


KILLS = {
    "usual": ["freelb", "mat"],
    "others": [name for name in ("plain", *mixadv.SOLVERS) if name not in ("freelb", "mat")],
    "accumulated": ["mat", "--accumulate", "2"],
}


@pytest.mark.parametrize("kill", slow_but(("usual",), KILLS))
def test_a_process_killed_as_it_writes_a_checkpoint_goes_on_from_the_one_before(
    kill: str, folder: Path, encoder: str, tmp_path: Path
):
    argv = command(folder, encoder, tmp_path, "--solver", *KILLS[kill])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), *argv],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "as uninterrupted\n", done.stderr


def test_a_full_disk_leaves_the_checkpoint_before(
    folder: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def argv(name: str) -> list[str]:
        return command(
            folder, encoder, tmp_path / name, "--checkpoint-every", "2", "--solver", "mat"
        )

    save, calls = torch.save, []

    def full(state: Any, path: str) -> None:
        calls.append(path)
        if len(calls) < 5:
            return save(state, path)
        Path(path).write_bytes(b"PK")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert intent.main(argv("full")) == 2
    assert "No space left on device" in capsys.readouterr().err
    [left] = (tmp_path / "full").glob(CHECKPOINTS)
    assert json.loads(left.read_text())["updates"] == 2
    assert intent.main(argv("full")) == intent.main(argv("whole")) == 0
    assert written(tmp_path / "full") == written(tmp_path / "whole")


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate launch": [
        "accelerate.commands.launch",
        "--multi_gpu",  # two processes; where there is no GPU, on the CPU
        "--num_processes=2",
        "--num_machines=1",
        "--main_process_port=0",
        "--mixed_precision=no",
        "--dynamo_backend=no",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_evaluate_and_write_as_one(
    launcher: str, folder: Path, encoder: str, tmp_path: Path
):
    more = ["--solver", "plain", "mat", "--evaluate-every", "2", "--hold-out", "9"]
    argv = command(folder, encoder, tmp_path / "out", *more)
    launch = [sys.executable, "-m", *LAUNCHERS[launcher]]
    done = subprocess.run(
        [*launch, str(EXAMPLES / "intent.py"), *argv],
        env=environment(tmp_path),
        check=True,
        capture_output=True,
        text=True,
    )
    assert len(cells(done.stdout)) == 1 + 2 * 2
    found = written(tmp_path / "out")
    assert [(r["solver"], r["processes"]) for r in found] == [("plain", 2), ("mat", 2)]
    assert all(0 <= s["accuracy"] <= 1 for r in found for s in r["last"].values())


# Mistakes --------------------------------------------------------------------------------------

ROW = {"text": "the sea", "label": "blue"}
OTHER = {"text": "the rose", "label": "red"}
TWO = [ROW, OTHER]

ARGUMENTS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown solver": (["--solver", "freebl"], ("--solver freebl", "mean 'freelb'", "plain, ")),
    "almost plain": (["--solver", "plian"], ("--solver plian", "Did you mean 'plain'?")),
    "unknown parameter": (
        ["--solver", "mat", "--set", "step=3"],
        ("--set", "MAT", "'step'", "Did you mean 'steps'?"),
    ),
    "parameter of nobody": (
        ["--solver", "mat", "--set", "matt.steps=3"],
        ("--set matt.steps=3", "matt", "Did you mean 'mat'?"),
    ),
    "parameter of another": (
        ["--solver", "pgd", "--set", "mat.steps=3"],
        ("--set mat.steps=3", "mat is not among --solver"),
    ),
    "parameter of plain": (["--set", "steps=3"], ("--set steps=3", "plain", "--solver")),
    "parameter without value": (
        ["--solver", "mat", "--set", "steps"],
        ("--set steps", "NAME=VALUE"),
    ),
    "wrong kind of value": (
        ["--solver", "mat", "--set", "steps=many"],
        ("--set", "steps must be an integer", "'many'"),
    ),
    "wrong value": (["--solver", "pgd", "--set", "radius=-1"], ("radius", "at least 0", "-1")),
    "second solver": (["--solver", "plain", "nobody"], ("--solver nobody",)),
    "no such file": (["--config", "nowhere.toml"], ("--config nowhere.toml", "no such file")),
    "mean of none": (["--evaluate", "mean"], ("--evaluate mean", "plain", "last")),
    "mean of nothing kept": (
        ["--solver", "mat", "--set", "average=null", "--evaluate", "mean"],
        ("--evaluate mean", "mat"),
    ),
    "mixture of one": (
        ["--solver", "mat", "--evaluate", "mixture"],
        ("--evaluate mixture", "mat", "--set mat.samples=8"),
    ),
    "attack on a mixture": (
        ["--solver", "mat", "--set", "samples=2", "--evaluate", "mixture", "--radii", "0.1"],
        ("radii", "mixture"),
    ),
    "mixture saved": (
        ["--solver", "mat", "--set", "samples=2", "--evaluate", "mixture", "--save"],
        ("--save", "mixture"),
    ),
    "no batch": (["--batch-size", "0"], ("batch_size", "at least 1", "0")),
    "negative radius": (["--radii", "0.1", "-0.2"], ("radii", "at least 0", "-0.2")),
    "learning rate": (["--lr", "-0.1"], ("learning_rate", "positive", "-0.1")),
    "warm-up": (["--warmup", "1"], ("warmup", "[0, 1)", "1")),
    "weight decay": (["--weight-decay", "-1"], ("weight_decay", "at least 0", "-1")),
    "no epochs": (["--epochs", "0"], ("epochs", "positive", "0")),
    "too many shots": (["--shots", "13"], ("13 shots", "12", "label")),
    "too many held out": (["--hold-out", "36"], ("36 held-out rows", "nothing of 36")),
    "too long": (["--max-length", "81"], ("max_length is 81", "80 tokens")),
    "no such model": (["--model", "./nowhere"], ("--model", "there is no ./nowhere")),
    "no such folder": (["--data", "./nowhere"], ("no folder ./nowhere",)),
    "no such data set": (["--data", "nowhere"], ("nowhere", "hub")),
}

PARSED = {
    "no updates": (["--updates", "0"], ("--updates", "at least 1", "0")),
    "negative shots": (["--shots", "-1"], ("--shots", "at least 1", "-1")),
    "no checkpoints": (["--checkpoint-every", "0"], ("--checkpoint-every", "at least 1", "0")),
    "epochs and updates": (["--epochs", "1", "--updates", "2"], ("--epochs", "--updates")),
    "seed": (["--seeds", "one"], ("--seeds", "'one'")),
    "weights": (["--evaluate", "worst"], ("--evaluate", "'worst'", "mixture")),
    "unknown option": (["--sauve"], ("--sauve",)),
}

LINES: dict[str, tuple[dict[str, list[Any]], tuple[str, ...]]] = {
    "empty folder": ({}, ("no JSON lines",)),
    "no train": ({"test.jsonl": [ROW]}, ("no train rows", "it holds test")),
    "no evaluation": ({"train.jsonl": TWO}, ("nothing to evaluate on", "test.jsonl", "dev.jsonl")),
    "no rows": ({"train.jsonl": TWO, "test.jsonl": []}, ("test.jsonl holds no rows",)),
    "not JSON": (
        {"train.jsonl": [ROW, '{"text": the sea}']},
        ("train.jsonl cannot be read", "JSON"),
    ),
    "no text": (
        {"train.jsonl": [{"words": "the sea", "label": "blue"}]},
        ("train", "'text' or 'sentence'", "words"),
    ),
    "a row without text": (
        {"train.jsonl": [*TWO, {"label": "red"}], "test.jsonl": TWO},
        ("train, row 3", "text is None"),
    ),
    "no label": ({"train.jsonl": [{"text": "the sea"}]}, ("train", "'label'", "it has text")),
    "null label": ({"train.jsonl": [ROW, {"text": "a"}]}, ("train, row 2", "label is None")),
    "text is a number": (
        {"train.jsonl": [{"text": 3, "label": 1}, {"text": 4, "label": 0}], "test.jsonl": TWO[:0]},
        ("test.jsonl holds no rows",),
    ),
    "label is a list": (
        {"train.jsonl": [{"text": "a", "label": ["b"]}]},
        ("row 1", "label is ['b'"),
    ),
    "one label": ({"train.jsonl": [ROW], "test.jsonl": [ROW]}, ("one label", "blue")),
    "labels of two kinds": (
        {"train.jsonl": [ROW, {"text": "a", "label": 1}], "test.jsonl": [ROW]},
        ("mixes strings and numbers",),
    ),
    "unknown label": (
        {"train.jsonl": TWO, "test.jsonl": [ROW, {"text": "a", "label": "grey"}]},
        ("test has labels that train lacks", "['grey']"),
    ),
    "not UTF-8": ({"train.jsonl": TWO, "test.jsonl": ["\udcff"]}, ("test.jsonl cannot be read",)),
    "two files": (
        {"train.jsonl": TWO, "dev.jsonl": TWO, "validation.jsonl": TWO},
        ("two files for dev", "remove validation.jsonl"),
    ),
}

FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "a list.json": ("[3]", ("[3]", "not a table")),
    "not TOML": ("[mat", ("cannot be read",)),
    "unknown table": ("[matt]\nsteps = 2", ("matt", "Did you mean 'mat'?")),
    "no table": ("mat = 2", ("mat is 2", "not a table")),
    "unknown parameter": ("[pgd]\nstep = 2", ("'step'", "Did you mean 'steps'?")),
}


def refused(script: str, argv: list[str], capsys: Any) -> str:
    """Run a command line that cannot be run; return the one line that it answers."""
    try:
        code = SCRIPTS[script].main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith(f"{script}: ")
    return line


@pytest.mark.parametrize("why", [*ARGUMENTS, *PARSED])
def test_wrong_arguments_are_answered_with_one_line(
    why: str, folder: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv, words = (ARGUMENTS | PARSED)[why]
    given = [] if {"--epochs", "--updates"} & set(argv) else ["--updates", "4"]
    given += ["--data", str(folder), "--model", encoder, "--output", str(tmp_path / "out"), *argv]
    line = refused("intent", given, capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("why", LINES)
def test_wrong_data_are_answered_with_one_line(
    why: str, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files, words = LINES[why]
    source = tmp_path / "data"
    source.mkdir()
    for name, content in files.items():
        write(source, name, content)
    line = refused("intent", command(source, encoder, tmp_path / "out"), capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("why", FILES)
def test_a_wrong_file_of_parameters_is_answered_with_one_line(
    why: str, folder: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text, words = FILES[why]
    path = write(tmp_path, f"solvers{Path(why).suffix or '.toml'}", [text])
    line = refused("intent", command(folder, encoder, tmp_path, "--config", str(path)), capsys)
    assert all(word in line for word in (f"--config {path}", *words)), line


def test_labels_and_columns_of_a_benchmark_are_checked(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = glue_folder(tmp_path, "cola") / "cola"
    argv = ["--data", str(tmp_path), "--model", encoder, "--output", str(tmp_path / "out")]
    write(path, "train.jsonl", [{"sentence": "a", "label": 0}, {"sentence": "b", "label": 2}])
    line = refused("glue", argv, capsys)
    assert "cola, train, row 2: label is 2, not a whole number from 0 to 1" in line
    write(path, "train.jsonl", [{"sentence": "a", "label": 0.5}])
    assert "label is 0.5, not a whole number" in refused("glue", argv, capsys)
    write(path, "train.jsonl", [{"text": "a", "label": 0}])
    assert "cola, train has no column 'sentence', it has text, label" in refused(
        "glue", argv, capsys
    )
    write(path, "train.jsonl", [{"sentence": "a", "label": -1}])
    assert "cola has no labelled train rows, it holds dev" in refused("glue", argv, capsys)
    line = refused("glue", [*argv, "--task", "mrcp"], capsys)
    assert "--task mrcp: there is none of this name. Did you mean 'mrpc'?" in line
    line = refused("glue", [*argv, "--task", "rte"], capsys)
    assert "rte" in line
    assert "rte_subset" in line


def test_scores_are_checked(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = glue_folder(tmp_path, "stsb") / "stsb"
    write(path, "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 5.5}])
    argv = ["--task", "stsb", "--data", str(tmp_path), "--model", encoder]
    line = refused("glue", argv, capsys)
    assert "stsb, train, row 1: label is 5.5, not a number from 0 to 5" in line
    glue_folder(tmp_path, "stsb")
    argv += ["--solver", "mat", "--set", "samples=2", "--evaluate", "mixture"]
    assert "stsb has none" in refused("glue", argv, capsys)


def test_training_sets_are_checked(encoder: str, tmp_path: Path, capsys: Any):
    argv = command(anli_folder(tmp_path), encoder, tmp_path / "out", "--train")
    assert "no folder snlli or snlli_subset" in refused("anli", [*argv, "snlli"], capsys)
    line = refused("anli", [*argv, "anli_r1"], capsys)
    assert "anli_r1 has no train rows, it holds dev, test" in line
    line = refused("anli", ["--train", "snil"], capsys)
    assert "--train snil: there is none of this name. Did you mean 'snli'?" in line


def test_a_best_needs_rows_to_be_chosen_on(
    encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for split in ("train", "test"):
        write(tmp_path / "data", f"{split}.jsonl", sentences(4, 0))
    argv = command(tmp_path / "data", encoder, tmp_path / "out", "--evaluate-every", "2")
    assert "set hold_out" in refused("intent", argv, capsys)


def test_a_folder_without_a_model_is_named(folder: Path, tmp_path: Path, capsys: Any):
    line = refused("intent", command(folder, str(folder), tmp_path / "out"), capsys)
    assert f"folder {folder} holds no model" in line


def test_a_broken_archive_is_answered_with_one_line(
    folder: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    packed = folder / "test.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    line = refused("intent", command(folder, encoder, tmp_path / "out"), capsys)
    assert f"{packed} cannot be read" in line


def test_a_game_that_cannot_be_played_is_answered_with_one_line(
    folder: Path, encoder: str, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    def impossible(*_: Any) -> None:
        raise mixadv.GameError("The closure is not repeatable:\nfix the data order.")

    monkeypatch.setattr(Training, "training_step", impossible)
    line = refused("intent", command(folder, encoder, tmp_path), capsys)
    assert line == "intent: The closure is not repeatable: fix the data order."


def test_a_report_without_results_says_where_it_looked(tmp_path: Path, capsys: Any):
    argv = ["--report", "--output", str(tmp_path / "nowhere")]
    assert str(tmp_path / "nowhere" / "results.jsonl") in refused("glue", argv, capsys)
    argv = ["--report", "--output", str(tmp_path)]
    for line in ('{"key": "a"', '{"solver": "plain"}', "3"):
        path = write(tmp_path, "results.jsonl", [line])
        assert f"{path}, line 1 is not a result" in refused("glue", argv, capsys)


# Data ------------------------------------------------------------------------------------------


def labelled(each: int, seed: int = 0) -> Task:
    """Return a task of sentences in memory."""
    content = datasets.Dataset.from_list(sentences(each, seed))
    return intent.classification("colours", {"train": content, "test": content})


def test_a_folder_gives_its_splits_packed_or_not(folder: Path):
    splits = data.from_folder(folder)
    assert {name: len(split) for name, split in splits.items()} == {
        name: 3 * each for name, each in SIZE.items()
    }
    assert splits["test"].to_list() == sentences(SIZE["test"], 2)


@pytest.mark.parametrize("place", ["", "cola", "cola_subset"])
def test_a_task_is_found_in_its_folder_or_is_the_folder(place: str, tmp_path: Path):
    write(tmp_path / place, "train.jsonl", [ROW])
    assert data.find(str(tmp_path), "cola") == tmp_path / place
    if place:
        write(tmp_path, "train.jsonl", [ROW])
        assert data.find(str(tmp_path), "cola") == tmp_path / place
    with pytest.raises(DataError, match="no folder rte or rte_subset"):
        data.find(str(tmp_path), "rte", itself=False)


@pytest.mark.parametrize(
    ("labels", "order"),
    [([10, 9, 2], ["2", "9", "10"]), (["b", "a", "B"], ["B", "a", "b"])],
)
def test_labels_are_numbered_in_their_order_whatever_that_of_the_rows(labels: Any, order: Any):
    made = [{"text": "x", "label": label} for label in labels]
    for arranged in itertools.permutations(made):
        content = datasets.Dataset.from_list(list(arranged))
        task = intent.classification("letters", {"train": content, "test": content})
        assert list(task.labels) == order
        assert [order[i] for i in task.train["label"]] == [str(row["label"]) for row in arranged]


@pytest.mark.parametrize("seed", range(3))
def test_chosen_rows_are_as_many_as_asked_and_drawn_by_the_seed(seed: int):
    task = labelled(9)
    few, _ = data.choose(task, seed, shots=3)
    assert Counter(few["label"]) == {0: 3, 1: 3, 2: 3}
    some, _ = data.choose(task, seed, limit=10)
    assert len(some) == 10
    assert data.choose(task, seed, limit=10)[0].to_list() == some.to_list()
    assert data.choose(task, seed + 1, limit=10)[0].to_list() != some.to_list()
    assert data.choose(task, seed)[0].to_list() == task.train.to_list()


def test_held_out_rows_are_not_trained_on():
    task = labelled(9)
    twice = datasets.concatenate_datasets([task.train, task.train])
    task = Task("colours", twice, task.splits, task.labels, task.measure)
    train, splits = data.choose(task, 0, hold_out=10, limit=20)
    assert len(splits["held-out"]) == 10
    assert len(train) == 20
    assert not set(train["text"]) & set(splits["held-out"]["text"])


@pytest.mark.parametrize("size", [4, 7, 15, 100])
def test_batches_are_full_and_every_epoch_has_every_row(size: int):
    lengths = data.lengths(labelled(5).train)
    each = -(-len(lengths) // size)
    source = data.batches(lengths, size, seed=0)
    epochs = [list(itertools.islice(source, each)) for _ in range(3)]
    for epoch in epochs:
        assert {len(batch) for batch in epoch} == {size}
        assert {i for batch in epoch for i in batch} == set(range(15))
    assert each == 1 or epochs[0] != epochs[1]
    again = data.batches(lengths, size, seed=0)
    assert list(itertools.islice(again, 3 * each)) == [b for epoch in epochs for b in epoch]


def test_rows_of_similar_length_are_together():
    lengths = [random.Random(0).randint(1, 1000) for _ in range(80)]
    found = list(itertools.islice(data.batches(lengths, 10, seed=0), 8))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in found]
    assert statistics.mean(spread) < 250


def test_rows_are_padded_to_the_longest_and_cut_at_the_limit(encoder: str):
    task = labelled(3)
    net, tokenizer = model.load(Run(task="colours", model=encoder, max_length=8), task)
    encode = model.Encoder(tokenizer, 8, False, "cpu")
    columns = {"text": ["rose", "the very very sky", "so " * 50 + "sky"], "label": [1, 0, 0]}
    batch = encode(columns)
    assert batch["attention_mask"].sum(1).tolist() == [3, 6, 8]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert batch["labels"].tolist() == [1, 0, 0]
    pair = encode({"text": ["rose"], "pair": ["the sky"], "label": [1]})
    assert tokenizer.decode(pair["input_ids"][0]) == "[CLS] rose [SEP] the sky [SEP]"
    assert net(**pair).logits.shape == (1, 3)


def test_accuracy_counts_each_row_once_and_an_attack_lowers_it(encoder: str):
    task = labelled(20)
    run = Run(task="colours", model=encoder, max_length=32, radii=(0.1,))
    net, tokenizer = model.load(run, task)
    encode = model.Encoder(tokenizer, 32, False, "cpu")
    net.eval()
    split = task.splits["test"]
    judge = evaluation.Evaluator(run, task, net, encode, None, slice(None))
    clean = judge.measure(split, judge.predict)["accuracy"]
    right = [judge.measure(split.select([i]), judge.predict) for i in range(len(split))]
    assert clean == pytest.approx(statistics.mean(r["accuracy"] for r in right))
    assert judge.measure(split, judge.attack(0.0))["accuracy"] == clean
    assert judge.measure(split, judge.attack(50.0))["accuracy"] < clean
