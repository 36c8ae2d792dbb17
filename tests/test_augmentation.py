"""Training on perturbed copies of rows: which rows, what is attacked, and going on after a kill."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import attack as script
import glue
from common import results
from common.loop import Training
from common.results import Run
from common.substitution import BUILTIN, Source, candidates
from mixadv.tokens import Attack, SimilarWords, WordSubstitution, adversarial_rows
from mixadv.tokens.substitution.constraints import portion
from tests.scripts import own_start, weights_of  # noqa: F401
from tests.substitution_zoo import TABLE, VOCABULARY, bag_of_words, tiny, word_tokenizer
from tests.zoo import assert_same, slow_but

EXAMPLES = Path(__file__).parent.parent / "examples"
ATTACK = WordSubstitution(SimilarWords(TABLE), max_share=1.0)


def sentences(count: int, seed: int) -> list[str]:
    """Return texts of a few words of the vocabulary, of many lengths."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(2, 9, (), generator=draw))
        chosen = torch.randint(len(VOCABULARY), (length,), generator=draw).tolist()
        found.append(" ".join(VOCABULARY[i] for i in chosen))
    return found


# Rows ------------------------------------------------------------------------------------------


def drawn(part: slice = slice(None), fraction: float = 0.3, seed: int = 0) -> Any:
    """Return the copies of a fraction of 23 rows."""
    rows = sentences(23, seed=5)
    generator = torch.Generator().manual_seed(seed)
    data = bag_of_words(1), word_tokenizer(), rows, [0, 1] * 11 + [0]
    return adversarial_rows(*data, ATTACK, fraction, generator, part)


@given(st.sampled_from([0.0, 0.01, 0.2, 0.5, 1.0]), st.integers(0, 5), st.integers(1, 4))
def test_processes_share_the_rows_drawn(fraction: float, seed: int, processes: int):
    numbers, texts = drawn(fraction=fraction, seed=seed)
    assert len(numbers) == len(set(numbers)) == math.ceil(fraction * 23) == portion(23, fraction)
    assert set(numbers) <= set(range(23))
    parts = [drawn(slice(rank, None, processes), fraction, seed) for rank in range(processes)]
    shared = list(itertools.chain(*(zip(*part, strict=True) for part in parts)))
    assert sorted(shared) == sorted(zip(numbers, texts, strict=True))


def test_copies_are_what_the_attack_leaves():
    numbers, texts = drawn(fraction=1.0)
    rows, labels = sentences(23, seed=5), [0, 1] * 11 + [0]
    found = ATTACK.attack(bag_of_words(1), word_tokenizer(), rows, labels)
    copied = dict(zip(numbers, texts, strict=True))
    assert copied == {i: attack.perturbed for i, attack in enumerate(found)}
    assert {attack.perturbed != attack.original for attack in found} == {True, False}
    assert drawn(seed=1)[0] != drawn(seed=2)[0]


def test_a_fraction_is_a_share():
    with pytest.raises(ValueError, match="fraction must be finite and between 0 and 1, got 20"):
        drawn(fraction=20)


# Training --------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a table of neighbours, and two tasks of GLUE."""
    root = tmp_path_factory.mktemp("substitution")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(root / "model")
    tiny(transformers.BertModel, tokenizer).save_pretrained(root / "model")
    table = [{"word": word, "neighbors": similar} for word, similar in TABLE.items()]
    write(root / "table.jsonl", table)
    for seed, (split, count) in enumerate({"train": 21, "dev": 8, "test": 40}.items()):
        rows = [{"sentence": t, "label": i % 2} for i, t in enumerate(sentences(count, seed))]
        write(root / "sst2" / f"{split}.jsonl", rows)
        first, second = sentences(count, seed), sentences(count, seed + 10)
        pairs = [
            {"sentence1": a, "sentence2": b, "label": i % 2}
            for i, (a, b) in enumerate(zip(first, second, strict=True))
        ]
        write(root / "mrpc" / f"{split}.jsonl", pairs)
        write(root / "stsb" / f"{split}.jsonl", [{**row, "label": 2.5} for row in pairs])
    return root


def trains(folder: Path, output: Path, *more: str) -> list[str]:
    """Return arguments of a short training on perturbed copies too."""
    argv = ["--data", str(folder), "--model", str(folder / "model"), "--output", str(output)]
    argv += ["--batch-size", "4", "--lr", "0.01", "--max-length", "32", "--epochs", "3"]
    argv += ["--substitute", "0.5", "--neighbours", str(folder / "table.jsonl")]
    return [*argv, *([] if "--task" in more else ["--task", "sst2"]), *more]


def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """Note the rows of every batch trained on, and the copies made."""
    batches, made = [], []
    sources, perturbed = Source.batches, Source._perturbed

    def watched(source: Source, *arguments: Any) -> Iterator[Any]:
        for columns in sources(source, *arguments):
            batches.append(columns)
            yield columns

    def noted(source: Source, *arguments: Any) -> Any:
        made.append(perturbed(source, *arguments))
        return made[-1]

    monkeypatch.setattr(Source, "batches", watched)
    monkeypatch.setattr(Source, "_perturbed", noted)
    return batches, made


@pytest.mark.parametrize("task", ["sst2", "mrpc"])
def test_epochs_after_the_first_go_over_clean_and_perturbed_rows(
    task: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    batches, made = watch(monkeypatch)
    assert glue.main(trains(folder, tmp_path, "--task", task)) == 0
    rows = glue.load(glue.arguments(["--task", task, "--data", str(folder)])).train
    names = [name for name in ("text", "pair") if name in rows.column_names]
    clean = list(zip(*[rows[n][:] for n in names], rows["label"][:], strict=True))
    assert [len(copied) for copied in made] == [11, 11]  # half of 21, rounded up
    assert made[0] != made[1]
    read = [list(zip(*[b[n] for n in (*names, "label")], strict=True)) for b in batches]
    first, *later = [read[:6], read[6:14], read[14:22]]  # 21 rows, then 32, in fours
    assert {row for batch in first for row in batch} == set(clean)
    for epoch, copied in zip(later, made, strict=True):
        own = {(*texts, rows["label"][number]) for number, *texts in copied}
        assert own - set(clean)
        assert {row for batch in epoch for row in batch} <= set(clean) | own
        if len(epoch) == 8:
            assert {row for batch in epoch for row in batch} == set(clean) | own
    [result] = results.finished(tmp_path / "results.jsonl").values()
    assert result["updates"] == math.ceil((21 + 32 + 32) / 4) == len(batches)


MOMENTS = {  # settings, the updates that the last checkpoint has, and the attacks still to come
    "between two epochs": ([], 6, 2),
    "in a perturbed epoch": ([], 8, 1),
    "in a perturbed epoch, accumulated": (["--accumulate", "3"], 3, 2),
    "in a perturbed epoch, mat": (["--solver", "mat"], 8, 1),
}


@pytest.mark.parametrize(
    "moment", slow_but(("between two epochs", "in a perturbed epoch"), MOMENTS)
)
def test_a_run_that_is_killed_ends_as_an_uninterrupted_one(
    moment: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    more, every, attacked = MOMENTS[moment]
    expected = weights_of(glue.main, trains(folder, tmp_path / "whole", *more), monkeypatch)
    argv = trains(folder, tmp_path / "broken", "--checkpoint-every", str(every), *more)
    with monkeypatch.context() as patched:
        ended, calls = Training.on_step_end, []

        def broken(*arguments: Any, **named: Any) -> Any:
            calls.append(0)
            if len(calls) == every + 2:
                raise KeyboardInterrupt
            return ended(*arguments, **named)

        patched.setattr(Training, "on_step_end", broken)
        with pytest.raises(KeyboardInterrupt):
            glue.main(argv)
    assert len(list((tmp_path / "broken").glob("*.checkpoints/*/progress.json"))) == 1
    batches, made = watch(monkeypatch)
    assert_same(weights_of(glue.main, argv, monkeypatch), expected)
    assert len(made) == attacked
    [result] = results.finished(tmp_path / "broken" / "results.jsonl").values()
    assert len(batches) == (result["updates"] - every) * result["accumulate"]


INTERRUPTED = """
import sys
import glue
from common.loop import Training

whole, broken = sys.argv[1].split("|"), sys.argv[2].split("|")
saved = Training.on_save

def save_and_stop(*arguments, **named):
    saved(*arguments, **named)
    raise KeyboardInterrupt

assert glue.main(whole) == 0
Training.on_save = save_and_stop
try:
    glue.main(broken)
except KeyboardInterrupt:
    Training.on_save = saved
assert glue.main(broken) == 0
"""


@pytest.mark.slow
def test_two_processes_share_the_copies(folder: Path, tmp_path: Path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    whole, broken = [
        trains(folder, tmp_path / name, "--checkpoint-every", "5") for name in ("whole", "broken")
    ]
    paths = os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_DATASETS_CACHE": str(tmp_path / "c")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [*launch, str(script), "|".join(whole), "|".join(broken)]
    subprocess.run(argv, env={**os.environ, **own}, check=True, capture_output=True)
    [result], [resumed] = [
        list(results.finished(tmp_path / name / "results.jsonl").values())
        for name in ("whole", "broken")
    ]
    assert result["processes"] == 2
    assert result["updates"] == math.ceil((21 + 32 + 32) / 8)
    assert {**resumed, "seconds_per_update": 0} == {**result, "seconds_per_update": 0}


# Runs ------------------------------------------------------------------------------------------


def test_runs_without_substitution_have_the_keys_they_had():
    names, seen = {f.name for f in fields(Run)}, 0
    for line in (EXAMPLES / "results" / "banking77.jsonl").read_text().splitlines():
        found = json.loads(line)
        settings = {k: v for k, v in found.items() if k in names}
        settings |= {k: tuple(settings[k]) for k in ("train", "radii")}
        assert Run(**settings).key == found["key"]
        seen += 1
    assert seen == 6
    ways: list[dict[str, Any]] = [{}, {"substitute": 0.2, "neighbours": "builtin"}]
    ways += [{**ways[1], "neighbours": "typos"}, {**ways[1], "substitute": 0.3}]
    assert len({Run("sst2", **way).key for way in ways}) == 4
    assert results.table(results.finished(EXAMPLES / "results" / "banking77.jsonl").values())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--substitute", "1.5"], ("substitute", "[0, 1]", "1.5")),
        (["--neighbours", ""], ("substitute", "both or none")),
        (["--substitute", "0"], ("substitute", "both or none")),
        (["--neighbours", "nowhere.jsonl"], ("nowhere.jsonl", "no such file", "builtin")),
        (["--neighbours", "mlm:./nowhere"], ("./nowhere", "cannot be loaded")),
    ],
)
def test_wrong_sources_are_answered_with_one_line(
    argv: list[str], words: tuple[str, ...], folder: Path, tmp_path: Path, capsys: Any
):
    assert glue.main([*trains(folder, tmp_path / "out"), *argv]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_a_line_that_is_no_entry_is_named(tmp_path: Path):
    for line in ("film", '{"word": "film"}', '["film"]', '{"word": "film", "neighbors": 3}'):
        path = tmp_path / "table.jsonl"
        path.write_text('{"word": "Film", "neighbors": ["movie"]}\n' + line)
        with pytest.raises(ValueError, match=r"table\.jsonl, line 2, "):
            candidates(str(path))


def test_the_table_of_the_project_is_of_everyday_words():
    rows = [json.loads(line) for line in BUILTIN.read_text().splitlines()]
    table = {row["word"]: row["neighbors"] for row in rows}
    assert len(table) == len(rows) >= 150
    for word, similar in table.items():
        assert re.fullmatch("[a-z]+", word)
        assert 2 <= len(similar) <= 4
        assert len({word, *similar}) == 1 + len(similar)
        assert set(similar) <= set(table)


# The script ------------------------------------------------------------------------------------


def cells(table: str) -> list[list[str]]:
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    return [lines[0], *lines[2:]]


@pytest.fixture(scope="module")
def victim(folder: Path) -> str:
    """Return the folder of a fine-tuned classifier."""
    torch.manual_seed(0)
    names = {0: "negative", 1: "positive"}
    net = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / "model", id2label=names, label2id={v: k for k, v in names.items()}
    )
    net.save_pretrained(folder / "victim")
    word_tokenizer().save_pretrained(folder / "victim")
    return str(folder / "victim")


def attacks(folder: Path, victim: str, output: Path, *more: str) -> list[str]:
    argv = ["--model", victim, "--data", str(folder), "--task", "sst2", "--max-length", "32"]
    argv += ["--neighbours", str(folder / "table.jsonl"), "--encoder", str(folder / "model")]
    return [*argv, "--similarity", "0.5", "--output", str(output), *more]


def attacked(file: Path) -> list[Attack]:
    """Return what the script keeps of each row."""
    return [Attack(**record["attack"]) for record in json.loads(file.read_text())["found"]]


def test_the_script_attacks_and_goes_on_where_it_was(
    folder: Path, victim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    argv = attacks(folder, victim, tmp_path / "whole")
    assert script.main(argv) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("Attack table.jsonl: at most 10 % of the words")
    head, line, *_ = cells(out)
    assert head == list(script.HEAD)
    assert line[:2] == [victim, "40"]
    [file] = (tmp_path / "whole").iterdir()
    found = attacked(file)
    assert len(found) == 40
    assert {one.succeeded for one in found if not one.skipped} == {True, False}
    assert all(one.perturbed == one.original or one.swaps for one in found)

    broken = attacks(folder, victim, tmp_path / "broken")
    attack, texts = WordSubstitution.attack, []

    def watched(self: WordSubstitution, *arguments: Any) -> Any:
        if len(texts) == script.STEP:
            texts.append("killed")
            raise KeyboardInterrupt
        texts.extend(arguments[2])
        return attack(self, *arguments)

    monkeypatch.setattr(WordSubstitution, "attack", watched)
    with pytest.raises(KeyboardInterrupt):
        script.main(broken)
    assert script.main(broken) == 0
    assert len(texts) == 40 + 1
    [again] = (tmp_path / "broken").iterdir()
    assert again.name == file.name
    assert attacked(again) == found
    capsys.readouterr()
    assert script.main(broken) == 0
    assert cells(capsys.readouterr().out)[1][:-1] == line[:-1]
    assert len(texts) == 40 + 1


@pytest.mark.parametrize("source", ["builtin", "typos", "mlm"])
def test_every_source_attacks_pairs_and_intents(
    source: str, folder: Path, victim: str, tmp_path: Path, capsys: Any
):
    if source == "mlm":
        masked = tiny(transformers.BertForMaskedLM, word_tokenizer())
        masked.save_pretrained(tmp_path / "masked")
        word_tokenizer().save_pretrained(tmp_path / "masked")
        source = f"mlm:{tmp_path / 'masked'}"
    net = transformers.AutoModelForSequenceClassification.from_pretrained(victim)
    net.config.id2label = dict(enumerate(("not_equivalent", "equivalent")))
    net.save_pretrained(tmp_path / "pairs")
    word_tokenizer().save_pretrained(tmp_path / "pairs")
    argv = attacks(folder, str(tmp_path / "pairs"), tmp_path / "out", "--task", "mrpc")
    argv += ["--neighbours", source, "--similarity", "0", "--rows", "6", "--split", "dev"]
    assert script.main(argv) == 0
    assert cells(capsys.readouterr().out)[1][1] == "6"
    [file] = (tmp_path / "out").iterdir()
    for one in attacked(file):
        assert one.original[0] == one.perturbed[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "./nowhere"], ("--model", "there is no ./nowhere")),
        (["--task", "stsb"], ("stsb is a regression", "labels")),
        (["--task", "mrpc"], ("['negative', 'positive']", "['not_equivalent', 'equivalent']")),
        (["--split", "trial"], ("--split trial", "dev, test")),
        (["--encoder", "./nowhere"], ("The model ./nowhere", "cannot be loaded")),
        (["--similarity", "2"], ("cosine", "2.0")),
        (["--rows", "0"], ("--rows", "at least 1")),
        (["--neighbours", "nobody"], ("nobody", "no such file", "typos")),
    ],
)
def test_wrong_attacks_are_answered_with_one_line(
    argv: list[str], words: tuple[str, ...], folder: Path, victim: str, tmp_path: Path, capsys: Any
):
    try:
        code = script.main([*attacks(folder, victim, tmp_path / "out"), *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("attack: ")
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()
