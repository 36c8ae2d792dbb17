"""The example scripts do what they say: train, write results, resume, and answer mistakes."""

import gzip
import itertools
import json
import os
import random
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import demo
import finetune
import mixadv
import training
from tests.zoo import assert_same
from training import DataError, Run

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = {"red": ["rose", "cherry", "brick"], "green": ["grass", "leaf"], "blue": ["sea", "sky"]}
FILLER = ["the", "this", "that", "one", "some", "very", "quite", "so", "like", "seems", "is"]
SIZE = {"train": 12, "dev": 4, "test": 5}


def sentences(each: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of every label, of three to twelve words, no two the same."""
    draw = random.Random(seed)
    made = []
    for label, words in WORDS.items():
        for number in range(each):
            text = [*draw.choices(FILLER, k=draw.randint(1, 10)), draw.choice(words)]
            made.append({"text": f"{' '.join(text)} {seed}{number}", "label": label})
    draw.shuffle(made)
    return made


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    """Write rows as JSON lines, packed if the name says so; strings are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    plain = text.encode(errors="surrogateescape")
    path.write_bytes(gzip.compress(plain) if path.suffix == ".gz" else plain)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with the three splits, one of them packed."""
    folder = tmp_path / "data"
    for seed, (split, each) in enumerate(SIZE.items()):
        write(folder, f"{split}.jsonl" + ".gz" * (split == "test"), sentences(each, seed))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny BERT, with dropout, and of its tokenizer."""
    folder = str(tmp_path_factory.mktemp("models") / "tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *itertools.chain(*WORDS.values())]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=80,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def command(data: Path, encoder: str, output: Path, *more: str) -> list[str]:
    """Return arguments of a short run; those in `more` come last and win."""
    short = ["--updates", "4", "--batch-size", "8", "--lr", "0.01", "--output", str(output)]
    return ["--data", str(data), "--model", encoder, *short, *more]


def written(output: Path) -> list[dict[str, Any]]:
    """Return the results written, less what the clock says."""
    results = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds_per_step"} for r in results]


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
    monkeypatch.setattr(training, "model_path", lambda name: encoder)
    argv = ["--updates", "2", "--attack-rows", "8", "--output", str(tmp_path)]
    assert demo.main(argv) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    names = ["test", "adversarial", *[f"PGD {radius:g}" for radius in demo.RADII]]
    assert [cell.strip() for cell in lines[0].split("|")][3:-4] == names
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines[2:6]]
    assert rows == [[name, str(2 * factor)] for name, factor in demo.METHODS]
    picture = tmp_path / "accuracy_against_radius.png"
    assert lines[-1] == f"picture: {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(written(tmp_path)) == len(demo.METHODS)
    assert demo.main(argv) == 0
    assert capsys.readouterr().out == printed
    assert demo.main(["--updates", "0"]) == 2
    assert capsys.readouterr().err == "demo: updates must be at least 1, got 0.\n"


def test_the_embedded_encoder_learns_a_few_sentences_of_the_embedded_data(tmp_path: Path):
    rows = training.load_rows(training.EMBEDDED_DATA)
    labels = {"set_alarm", "find_recipe"}
    for split in ("train", "dev"):
        chosen = [r for r in rows[split] if r["label"] in labels]
        write(tmp_path / "data", f"{split}.jsonl", chosen)
    argv = ["--data", str(tmp_path / "data"), "--output", str(tmp_path), "--batch-size", "8"]
    assert finetune.main([*argv, "--updates", "6", "--solver", "fgm"]) == 0
    [result] = written(tmp_path)
    assert result["dev"] > 0.8
    assert result["forwards_per_step"] == 2


def test_each_run_writes_one_line_and_is_not_repeated(
    data: Path, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    argv = command(data, encoder, tmp_path, "--solver", "plain", "mat", "--seeds", "0", "1", "1")
    assert finetune.main([*argv, "--radii", "0", "0.1", "--attack-rows", "6"]) == 0
    results = written(tmp_path)
    runs = [("plain", 0), ("plain", 1), ("mat", 0), ("mat", 1)]
    assert [(r["solver"], r["seed"]) for r in results] == runs
    for result in results:
        assert {"dev", "test", "attacked", "model", "updates"} <= set(result)
        assert set(result["attacked"]) == {"0", "0.1"}
    assert [r["steps_per_batch"] for r in results] == [1, 1, 2, 2]
    assert not list(tmp_path.glob("*.pt"))

    monkeypatch.setattr(training, "load_model", lambda *_: pytest.fail("trains again"))
    assert finetune.main([*argv, "--radii", "0", "0.1", "--attack-rows", "6"]) == 0
    assert written(tmp_path) == results


def test_the_report_has_a_row_per_setting_and_tells_seeds_apart_from_settings(
    data: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = command(data, encoder, tmp_path, "--solver", "plain", "--seeds", "0", "1", "--updates")
    assert finetune.main([*argv, "1"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split("|")[-2].strip() == "2"
    assert finetune.main([*argv, "2"]) == 0
    capsys.readouterr()
    assert finetune.main(["--report", "--output", str(tmp_path)]) == 0
    table = [
        [c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    assert table[0] == ["solver", "updates", "dev", "test", "passes", "s/step", "seeds"]
    assert [(row[0], row[1], row[-1]) for row in table[2:]] == [
        ("plain", "1", "2"),
        ("plain", "2", "2"),
    ]
    mean = sum(r["dev"] for r in written(tmp_path)[:2]) / 2
    assert table[2][2].startswith(f"{100 * mean:.1f} ± ")


def chosen(*argv: str) -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters of each run that a command line asks for."""
    return {run.solver: run.parameters for run in finetune.runs(finetune.arguments(list(argv)))}


def test_set_gives_hyper_parameters_to_all_solvers_or_to_one():
    assert chosen("--solver", "plain", "freelb", "mat", "--set", "radius=0.5", "mat.steps=3") == {
        "plain": {},
        "freelb": {"radius": 0.5},
        "mat": {"radius": 0.5, "steps": 3},
    }
    assert chosen("--solver", "pgd", "--set", "norm=linf", "radius=null", "fresh_dropout=true") == {
        "pgd": {"norm": "linf", "radius": None, "fresh_dropout": True}
    }


def test_what_is_set_reaches_the_game(data: Path, encoder: str, tmp_path: Path):
    argv = command(data, encoder, tmp_path, "--solver", "freelb", "--set", "freelb.steps=5")
    assert finetune.main(argv) == 0
    assert written(tmp_path)[0]["forwards_per_step"] == 5
    assert written(tmp_path)[0]["parameters"] == {"steps": 5}


def test_runs_that_differ_have_different_names_and_equal_runs_the_same():
    changes: list[dict[str, Any]] = [
        {"solver": "mat"},
        {"parameters": {"steps": 1}},
        {"data": "elsewhere"},
        {"model": "other"},
        {"seed": 1},
        {"updates": 7},
        {"shots": 3},
        {"radii": (0.1,)},
    ]
    keys = [Run(**change).key for change in [{}, *changes]]
    assert len(set(keys)) == len(keys)
    assert [Run(**change).key for change in [{}, *changes]] == keys


# Interruptions ---------------------------------------------------------------------------------

MOMENTS = ["between checkpoints", "while a checkpoint is written", "in the evaluation"]
SETTINGS = {
    "plain": ["plain"],
    "freelb": ["freelb"],
    "smart": ["smart"],
    "mat": ["mat", "--set", "particles=2", "temperature=1e-3", "learner_temperature=1e-6"],
}


def interrupt(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next training be interrupted after its first checkpoint."""
    calls: Counter[str] = Counter()

    def broken(name: str, at: int, module: Any, before: Any = lambda *_: None) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            if calls[name] == at:
                before(*arguments)
                raise KeyboardInterrupt
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, call)

    if moment == "between checkpoints":
        broken("step", 4, training)
    elif moment == "in the evaluation":
        broken("evaluate", 1, training)
    else:
        broken("save", 2, torch, lambda state, path: Path(path).write_bytes(b"half of it"))


def trained(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Run a command line to its end; return the weights that it evaluated."""
    evaluate, weights = training.evaluate, {}

    def watched(model: Any, *rest: Any) -> Any:
        weights.update(model.state_dict())
        return evaluate(model, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "evaluate", watched)
        assert finetune.main(argv) == 0
    return weights


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("solver", SETTINGS)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    solver: str,
    moment: str,
    data: Path,
    encoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    more = ["--checkpoint-every", "2", "--radii", "0.1", "--solver", *SETTINGS[solver]]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = trained(command(data, encoder, whole, *more), monkeypatch)

    argv = command(data, encoder, broken, *more)
    with monkeypatch.context() as patched:
        interrupt(moment, patched)
        with pytest.raises(KeyboardInterrupt):
            finetune.main(argv)
    assert len(list(broken.glob("*.pt"))) == 1
    assert not (broken / "results.jsonl").exists()

    steps = []
    monkeypatch.setattr(training, "step", lambda *a, s=training.step: steps.append(0) or s(*a))
    assert_same(trained(argv, monkeypatch), expected)
    assert len(steps) == {"in the evaluation": 0}.get(moment, 2)
    assert written(broken) == written(whole)
    assert not list(broken.glob("*.pt"))


KILLED = """
import os, signal, sys
import finetune, training

save = training.save

def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

training.save = save_and_die
finetune.main(sys.argv[1:])
"""


def test_a_killed_process_is_continued(data: Path, encoder: str, tmp_path: Path):
    more = ["--checkpoint-every", "3", "--solver", "freelb"]
    argv = command(data, encoder, tmp_path / "broken", *more)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)])
    killed = subprocess.run([sys.executable, "-c", KILLED, *argv], env=environment, check=False)
    assert killed.returncode == -9
    assert len(list((tmp_path / "broken").glob("*.pt"))) == 1
    assert finetune.main(argv) == 0
    assert finetune.main(command(data, encoder, tmp_path / "whole", *more)) == 0
    assert written(tmp_path / "broken") == written(tmp_path / "whole")


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
        ("--set matt.steps=3", "'matt'", "Did you mean 'mat'?"),
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
    "no updates": (["--updates", "0"], ("updates", "at least 1", "0")),
    "no batch": (["--batch-size", "0"], ("batch_size", "at least 1", "0")),
    "negative shots": (["--shots", "-1"], ("shots", "at least 0", "-1")),
    "negative radius": (["--radii", "0.1", "-0.2"], ("radii", "at least 0", "-0.2")),
    "learning rate": (["--lr", "-0.1"], ("learning_rate", "positive", "-0.1")),
    "no checkpoints": (["--checkpoint-every", "0"], ("--checkpoint-every", "at least 1", "0")),
    "too many shots": (["--shots", "13"], ("13 shots", "12", "'")),
    "too long": (["--max-length", "81"], ("max_length is 81", "80 tokens")),
    "no such model": (["--model", "./nowhere"], ("model ./nowhere", "cannot be loaded")),
    "no such folder": (["--data", "./nowhere"], ("no folder ./nowhere",)),
    "no such data set": (["--data", "nowhere"], ("nowhere is no folder", "hub")),
}

LINES: dict[str, tuple[dict[str, list[Any]], tuple[str, ...]]] = {
    "empty folder": ({}, ("train.jsonl", "no JSON lines")),
    "no train": ({"test.jsonl": [ROW]}, ("needs train.jsonl", "it holds test")),
    "no evaluation": ({"train.jsonl": TWO}, ("nothing to evaluate on", "test.jsonl", "dev.jsonl")),
    "no rows": ({"train.jsonl": TWO, "test.jsonl": []}, ("test holds no rows",)),
    "not JSON": (
        {"train.jsonl": [ROW, "", '{"text": the sea}']},
        ("train.jsonl, line 3 is not JSON", "the sea"),
    ),
    "not an object": ({"train.jsonl": [ROW, ["the sea", "blue"]]}, ("train.jsonl, line 2", "sea")),
    "no text": (
        {"train.jsonl": [ROW, {"words": "the sea", "label": "blue"}]},
        ("train.jsonl, line 2", "'text'", "'sentence'", "words"),
    ),
    "no label": ({"train.jsonl": [{"text": "the sea"}]}, ("line 1", "'label'", "['text']")),
    "null label": ({"train.jsonl": [{"text": "a", "label": None}]}, ("line 1", "'label'")),
    "text is a number": ({"train.jsonl": [{"text": 3, "label": "a"}]}, ("line 1", "text is 3")),
    "label is a list": (
        {"train.jsonl": [{"text": "a", "label": ["b"]}]},
        ("line 1", "label is ['b']"),
    ),
    "one label": ({"train.jsonl": [ROW], "test.jsonl": [ROW]}, ("one label", "blue")),
    "labels of two kinds": (
        {"train.jsonl": [ROW, {"text": "a", "label": 1}], "test.jsonl": [ROW]},
        ("mixes strings and numbers", "[1, 'blue']"),
    ),
    "unknown label": (
        {"train.jsonl": TWO, "test.jsonl": [ROW, {"text": "a", "label": "grey"}]},
        ("test has labels that train lacks", "['grey']"),
    ),
    "not UTF-8": ({"train.jsonl": TWO, "test.jsonl": ["\udcff"]}, ("test.jsonl", "decode")),
    "two files": (
        {"train.jsonl": TWO, "dev.jsonl": TWO, "validation.jsonl": TWO},
        ("two files for dev", "remove validation.jsonl"),
    ),
}


def refused(argv: list[str], capsys: Any) -> str:
    """Run a command line that cannot be run; return the one line that it answers."""
    assert finetune.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("finetune: ")
    return line


@pytest.mark.parametrize("why", ARGUMENTS)
def test_wrong_arguments_are_answered_with_one_line(
    why: str, data: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv, words = ARGUMENTS[why]
    line = refused(command(data, encoder, tmp_path / "out", *argv), capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("why", LINES)
def test_wrong_data_are_answered_with_one_line(
    why: str, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    files, words = LINES[why]
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in files.items():
        write(folder, name, rows)
    line = refused(command(folder, encoder, tmp_path / "out"), capsys)
    assert all(word in line for word in words), line


def test_a_broken_archive_is_answered_with_one_line(
    data: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    packed = data / "test.jsonl.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    line = refused(command(data, encoder, tmp_path / "out"), capsys)
    assert f"{packed} cannot be read" in line


def test_a_game_that_cannot_be_played_is_answered_with_one_line(
    data: Path, encoder: str, tmp_path: Path, monkeypatch: Any, capsys: Any
):
    def impossible(*_: Any) -> None:
        raise mixadv.GameError("The closure is not repeatable:\nfix the data order.")

    monkeypatch.setattr(training, "step", impossible)
    assert finetune.main(command(data, encoder, tmp_path)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "finetune: The closure is not repeatable: fix the data order."


def test_a_report_without_results_says_where_it_looked(tmp_path: Path, capsys: Any):
    line = refused(["--report", "--output", str(tmp_path / "nowhere")], capsys)
    assert str(tmp_path / "nowhere" / "results.jsonl") in line
    path = write(tmp_path, "results.jsonl", ['{"key": "a"', '{"solver": "plain"}'])
    assert f"{path}, line 1 is not JSON" in refused(["--report", "--output", str(tmp_path)], capsys)
    path.write_text('{"solver": "plain"}\n')
    line = refused(["--report", "--output", str(tmp_path)], capsys)
    assert f"{path}, line 1 is not a result" in line


# Data ------------------------------------------------------------------------------------------


def test_a_folder_gives_its_splits_packed_or_not(data: Path):
    splits = training.load_rows(str(data))
    assert {name: len(rows) for name, rows in splits.items()} == {
        name: 3 * each for name, each in SIZE.items()
    }
    assert splits["test"] == sentences(SIZE["test"], 2)


def test_other_fields_stay_and_other_names_are_understood(tmp_path: Path):
    row = {"sentence": "2024-01-01", "label": 1, "domain": "dates"}
    write(tmp_path, "train.jsonl", [row])
    write(tmp_path, "validation.jsonl.gz", [row])
    (tmp_path / "notes.txt").write_text("not a split")
    assert training.load_rows(str(tmp_path)) == {
        name: [{**row, "text": "2024-01-01"}] for name in ("train", "dev")
    }


@pytest.mark.parametrize(
    ("labels", "order"), [([10, 9, 2], [2, 9, 10]), (["b", "a", "B"], ["B", "a", "b"])]
)
def test_labels_are_numbered_in_their_order_whatever_that_of_the_rows(labels: Any, order: Any):
    rows = [{"text": "", "label": label} for label in labels]
    for arranged in itertools.permutations(rows):
        numbered = training.label_ids({"train": list(arranged), "test": rows[:1]})
        assert numbered == {label: i for i, label in enumerate(order)}


@pytest.mark.parametrize("seed", range(5))
def test_few_shots_are_balanced_and_their_dev_rows_are_others(seed: int):
    rows = sentences(9, 0)
    rows += rows[:5]  # a text that comes twice is not in both
    run = Run(shots=3, seed=seed)
    chosen, splits = training.selected({"train": rows, "test": rows}, run)
    assert Counter(r["label"] for r in chosen) == dict.fromkeys(WORDS, 3)
    assert Counter(r["label"] for r in splits["dev"]) == dict.fromkeys(WORDS, 3)
    assert not {r["text"] for r in chosen} & {r["text"] for r in splits["dev"]}
    assert training.selected({"train": rows, "test": rows}, run)[0] == chosen
    other = training.selected({"train": rows, "test": rows}, Run(shots=3, seed=seed + 1))[0]
    assert other != chosen


def test_few_shots_keep_a_dev_split_that_there_is():
    rows, dev = sentences(5, 0), sentences(2, 1)
    assert training.selected({"train": rows, "dev": dev}, Run(shots=2))[1]["dev"] == dev


def test_shots_that_take_all_leave_no_dev():
    rows = sentences(5, 0)
    chosen, splits = training.selected({"train": rows, "test": rows}, Run(shots=5))
    assert len(chosen) == len(rows)
    assert set(splits) == {"train", "test"}
    with pytest.raises(DataError, match="nothing to evaluate on"):
        training.selected({"train": rows}, Run(shots=5))


@pytest.mark.parametrize("size", [4, 7, 15, 100])
def test_batches_are_full_and_every_epoch_has_every_row(size: int):
    rows = sentences(5, 0)
    each = -(-len(rows) // size)
    source = training.batches(rows, size, seed=0)
    epochs = [list(itertools.islice(source, each)) for _ in range(3)]
    for epoch in epochs:
        assert {len(batch) for batch in epoch} == {min(size, len(rows))}
        assert {r["text"] for batch in epoch for r in batch} == {r["text"] for r in rows}
    if size < len(rows):
        assert epochs[0] != epochs[1]
    again = training.batches(rows, size, seed=0)
    assert list(itertools.islice(again, 3 * each)) == [b for epoch in epochs for b in epoch]


def test_rows_are_padded_to_the_longest_and_cut_at_the_limit(encoder: str):
    model, tokenizer = training.load_model(encoder, labels=2)
    rows = [
        {"text": "rose", "label": "red"},
        {"text": "the very very sky", "label": "blue"},
        {"text": "so " * 50 + "sky", "label": "blue"},
    ]
    encode = training.Encoder(tokenizer, {"blue": 0, "red": 1}, Run(max_length=8), "cpu")
    batch = encode(rows)
    assert batch["attention_mask"].sum(1).tolist() == [3, 6, 8]
    assert batch["input_ids"].shape == (3, 8)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert batch["labels"].tolist() == [1, 0, 0]
    assert encode(rows[:2])["input_ids"].shape == (2, 6)
    assert training.accuracy(model.eval(), rows, encode) in (0, 1 / 3, 2 / 3, 1)


def test_accuracy_counts_each_row_once_whatever_the_order(encoder: str):
    model, tokenizer = training.load_model(encoder, labels=3)
    rows = sentences(20, 3)
    encode = training.Encoder(tokenizer, {"red": 0, "green": 1, "blue": 2}, Run(), "cpu")
    model.eval()
    right = [training.accuracy(model, [row], encode) for row in rows]
    assert training.accuracy(model, rows, encode) == sum(right) / len(rows)
    assert training.accuracy_under_attack(model, rows, encode, 0.0) == sum(right) / len(rows)
    assert training.accuracy_under_attack(model, rows, encode, 50.0) < sum(right) / len(rows)
