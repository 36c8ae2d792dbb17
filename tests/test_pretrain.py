"""pretrain.py: every objective learns, resumes, scales and hands its checkpoint on."""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

import glue
import masked_loss
import pretrain
from common.pretraining import corpus, models, tasks
from common.pretraining.objectives import Masked, guess
from common.pretraining.trainer import PretrainingTrainer, Repeatable
from mixadv.robustness.data import DataError
from tests.scripts import own_start  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"
NOUNS = ["cat", "dog", "bird", "house", "river", "mountain", "teacher", "garden"]
VERBS = ["sees", "likes", "finds", "follows", "paints"]
TINY = ["--vocabulary", "120", "--length", "24", "--batch-size", "8", "--evaluate-rows", "12"]
TABLE = {"cat": ["dog", "bird"], "dog": ["cat"], "house": ["garden"], "sees": ["finds"]}


def sentence(draw: random.Random) -> str:
    return f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)} ."


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Return a text file of paragraphs."""
    draw = random.Random(0)
    paragraphs = [" ".join(sentence(draw) for _ in range(6)) for _ in range(120)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    return str(path)


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Return a file of similar words."""
    path = tmp_path / "neighbours.jsonl"
    path.write_text("\n".join(json.dumps({"word": w, "neighbors": n}) for w, n in TABLE.items()))
    return str(path)


def run(*arguments: str) -> tuple[int, str, str]:
    """Run the script in this process; return its status and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = pretrain.main([*TINY, *arguments])
    return status, out.getvalue(), err.getvalue()


def refused(*arguments: str) -> str:
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("pretrain: ")
    assert err.count("\n") == 1
    return err


def held_out(folder: Path) -> list[dict[str, Any]]:
    log = json.loads((folder / "log.json").read_text())
    return [entry for entry in log if "eval_loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with models.quiet():
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    return model.base_model.state_dict()


# Learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", tasks.TASKS)
def test_every_objective_learns_and_its_checkpoint_is_fine_tuned(
    objective: str, text: str, table: str, tmp_path: Path
):
    folder = tmp_path / "out"
    status, out, err = run(
        "--objective", objective, "--data", text, "--steps", "40", "--neighbours", table,
        "--output", str(folder), "--lr", "3e-3",
    )  # fmt: skip
    assert status == 0, err
    first, *_, last = held_out(folder)
    assert last["eval_loss"] < 0.9 * first["eval_loss"]
    assert out.startswith("| step | loss |")
    assert "| chance |" in out
    assert (folder / "curves.png").stat().st_size > 5000

    rows = [
        {"sentence": s, "label": i % 2, "idx": i} for i, s in enumerate(["ab", "cd", "ef", "gh"])
    ]
    (tmp_path / "cola").mkdir()
    for split in ("train", "dev"):
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / "cola" / f"{split}.jsonl").write_text(lines)
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--task", "cola", "--data", str(tmp_path), "--model", str(folder / "model")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert glue.main([*arguments, "--updates", "1", "--output", str(tmp_path / "glue")]) == 0
    assert "Matthews" in printed.getvalue() or "dev" in printed.getvalue()


def test_the_first_steps_of_a_curriculum_are_plain(text: str, tmp_path: Path):
    found = {}
    for name, more in {
        "mlm": ["--objective", "mlm"],
        "later": ["--objective", "alum", "--curriculum", "4"],
        "now": ["--objective", "alum"],
    }.items():
        arguments = ["--data", text, "--steps", "4", "--output", str(tmp_path / name)]
        assert run(*more, *arguments)[0] == 0
        found[name] = weights(tmp_path / name)
    same = [torch.equal(found["mlm"][n], found["later"][n]) for n in found["mlm"]]
    assert all(same)
    assert not all(torch.equal(found["mlm"][n], found["now"][n]) for n in found["mlm"])


def test_text_is_augmented_by_copies_with_similar_words(text: str, table: str, tmp_path: Path):
    options = pretrain.arguments(
        [*TINY, "--data", text, "--substitute", "1", "--neighbours", table,
         "--output", str(tmp_path / "out")]
    )  # fmt: skip
    task = tasks.masked(options, corpus.read(text))
    decoded = task.tokenizer.batch_decode(task.train["input_ids"][:])
    half = len(decoded) // 2
    assert any("house" in row.split() for row in decoded[:half])
    assert not any({"house", "sees"} & {*row.split()} for row in decoded[half + 1 :])
    assert len(task.held_out) == 12


def test_similar_words_that_come_with_the_project_have_a_name(text: str):
    pretrain.arguments([*TINY, "--data", text, "--neighbours", "builtin"])  # refuses no such file
    assert tasks.similar_words("builtin").of("good")


def test_only_new_trains_the_head_and_continual_training_goes_on_from_it(text: str, tmp_path: Path):
    base = tmp_path / "base"
    assert run("--data", text, "--steps", "3", "--output", str(base))[0] == 0
    encoder = AutoModelForSequenceClassification.from_pretrained(base / "model").base_model
    encoder.save_pretrained(tmp_path / "encoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "encoder" / name).write_bytes((base / "model" / name).read_bytes())
    model, more = ["--model", str(tmp_path / "encoder")], ["--data", text, "--steps", "3"]
    assert run(*model, *more, "--only-new", "--output", str(tmp_path / "head"))[0] == 0
    for name, value in weights(tmp_path / "head").items():
        if "pooler" not in name:
            torch.testing.assert_close(value, encoder.state_dict()[name], msg=name)
    head = AutoModelForMaskedLM.from_pretrained(tmp_path / "head" / "model").cls.state_dict()
    fresh = AutoModelForMaskedLM.from_pretrained(base / "model").cls.state_dict()
    assert any(not torch.equal(head[n], fresh[n]) for n in head)
    model = ["--model", str(tmp_path / "head" / "model")]
    arguments = [*model, *more, "--output", str(tmp_path / "on")]
    assert run(*arguments)[0] == 0
    assert held_out(tmp_path / "on")[0]["eval_loss"] == pytest.approx(
        held_out(tmp_path / "head")[-1]["eval_loss"], rel=1e-4
    )
    assert "only_new=False" in refused(
        *model, *more, "--only-new", "--output", str(tmp_path / "on")
    )
    assert "lacks nothing" in refused(*model, *more, "--only-new", "--output", str(tmp_path / "x"))


# Going on after a kill -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [*(pytest.param(o, marks=pytest.mark.slow) for o in ("alum", "macbert")), "electra"],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    objective: str, text: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--objective", objective, "--data", text, "--neighbours", table]
    arguments += ["--steps", "6", "--checkpoint-every", "2"]
    whole = tmp_path / "whole"
    assert run(*arguments, "--output", str(whole))[0] == 0

    class KilledError(Exception):
        pass

    plain, calls = PretrainingTrainer.compute_loss, []

    def killed(self: Any, *given: Any, **more: Any) -> Any:
        calls.append(self.state.global_step)
        if self.state.global_step == 3:
            raise KilledError
        return plain(self, *given, **more)

    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "compute_loss", killed)
        with pytest.raises(KilledError):
            run(*arguments, "--output", str(cut))
    assert [p.name for p in (cut / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert run(*arguments, "--output", str(cut))[0] == 0
    for name, value in weights(whole).items():
        if "pooler" not in name or objective == "macbert":
            assert torch.equal(value, weights(cut)[name]), name
    assert held_out(whole)[-1]["eval_loss"] == held_out(cut)[-1]["eval_loss"]


def test_a_run_killed_after_its_last_step_takes_no_step_more(text: str, tmp_path: Path):
    folder = tmp_path / "out"
    arguments = ["--data", text, "--steps", "4", "--checkpoint-every", "2", "--output", str(folder)]
    assert run(*arguments, "--solver", "mat")[0] == 0
    log, before = (folder / "log.json").read_text(), weights(folder)
    (folder / "log.json").unlink()
    shutil.rmtree(folder / "model")
    assert run(*arguments, "--solver", "mat")[0] == 0
    assert [e for e in json.loads(log) if "eval_loss" in e] == held_out(folder)
    for name, value in before.items():
        assert "pooler" in name or torch.equal(value, weights(folder)[name])


def test_a_batch_draws_anew_in_each_epoch_and_the_same_where_a_run_goes_on():
    def drawn(_: list[dict[str, Any]]) -> float:
        return float(torch.rand(()))

    collator, rows = Repeatable(drawn, 0), [{"input_ids": [1, 2, 3]}]
    state = torch.get_rng_state()
    first = [collator(rows), collator(rows)]
    collator.epoch = 1
    second = collator(rows)
    assert first[0] == first[1] != second
    assert second != Repeatable(drawn, 1)(rows)
    assert torch.equal(state, torch.get_rng_state())


def test_with_one_row_in_a_batch_masks_differ_from_epoch_to_epoch(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    plain = Masked.__call__

    def noting(self: Any, model: Any, batch: dict[str, Any]) -> Any:
        seen.setdefault(batch["attention_mask"].shape, set()).add(
            tuple(batch["labels"][0].tolist())
        )
        return plain(self, model, batch)

    monkeypatch.setattr(Masked, "__call__", noting)
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(["the cat sees the dog"] * 11))
    arguments = ["--data", str(short), "--steps", "30", "--output", str(tmp_path / "out")]
    assert run(*arguments, "--batch-size", "1", "--evaluate-every", "30")[0] == 0
    rows = len(tasks.corpus.read(str(short)).train)
    assert sum(map(len, seen.values())) > 2 * rows


def test_electra_goes_on_with_its_generator(text: str, tmp_path: Path):
    arguments = ["--objective", "electra", "--data", text, "--steps", "30", "--lr", "3e-3"]
    assert run(*arguments, "--output", str(tmp_path / "one"))[0] == 0
    model = ["--model", str(tmp_path / "one" / "model")]
    assert run(*arguments, *model, "--output", str(tmp_path / "two"))[0] == 0
    last, first = held_out(tmp_path / "one")[-1], held_out(tmp_path / "two")[0]
    assert first["eval_generator loss"] == pytest.approx(last["eval_generator loss"], rel=1e-4)
    where = ["--output", str(tmp_path / "x")]
    assert "lacks nothing" in refused(*arguments, *model, "--only-new", *where)


def test_a_finished_run_is_not_repeated_and_another_needs_its_own_folder(text: str, tmp_path: Path):
    arguments = ["--data", text, "--steps", "2", "--output", str(tmp_path / "out")]
    assert run(*arguments)[0] == 0
    made = (tmp_path / "out" / "log.json").stat().st_mtime_ns
    status, out, _ = run(*arguments)
    assert status == 0
    assert "| chance |" in out
    assert (tmp_path / "out" / "log.json").stat().st_mtime_ns == made
    assert "with seed=0, not 1: choose another --output" in refused(*arguments, "--seed", "1")


def launch(script: str, *arguments: str) -> str:
    """Run a script on two processes; return what it printed."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1",
        "--multi_gpu", "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no",
        script, *arguments,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{EXAMPLES.parent}:{EXAMPLES}",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["alum", "electra"])
def test_two_processes_train_and_measure_as_one(objective: str, text: str, tmp_path: Path):
    folder = tmp_path / "out"
    arguments = ["--objective", objective, "--data", text, "--steps", "3", "--output", str(folder)]
    printed = launch(str(EXAMPLES / "pretrain.py"), *TINY, *arguments)
    assert printed.count("| chance |") == 1
    assert json.loads((folder / "log.json").read_text())[0]["processes"] == 2
    assert all(np.isfinite(entry["eval_loss"]) for entry in held_out(folder))
    assert weights(folder)


VOCABULARY = """
import sys, zlib
from pathlib import Path
from common.pretraining import models
texts = Path(sys.argv[1]).read_text().split(chr(10) * 2)
found = models.find("tiny", False, 120, texts).tokenizer
print(len(found), zlib.crc32(repr(sorted(found.get_vocab().items())).encode()))
"""


def test_a_text_gives_one_tokenizer_in_every_process(text: str):
    """Ties between pieces were broken by a hash table's order: two runs could not be compared."""
    where = {"PYTHONPATH": f"{EXAMPLES.parent}:{EXAMPLES}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", VOCABULARY, text]
    elsewhere = subprocess.run(command, env=os.environ | where, stdout=-1, check=True).stdout
    texts = Path(text).read_text().split("\n\n")
    here = models.find("tiny", False, 120, texts).tokenizer
    told = f"{len(here)} {zlib.crc32(repr(sorted(here.get_vocab().items())).encode())}"
    assert told == elsewhere.decode().strip()
    assert 20 < len(here) <= 120


def test_a_learned_tokenizer_reads_as_the_one_that_it_is_like(text: str, tmp_path: Path):
    texts = Path(text).read_text().split("\n\n")
    found = models.find("tiny", False, 120, texts).tokenizer
    assert found.all_special_tokens == ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
    assert all(text.replace("##", "") != "" for text in found.get_vocab())
    read = found("The [MASK] sees", "##a")
    assert found.decode(read["input_ids"][:3]).startswith("[CLS]")
    assert found.mask_token_id in read["input_ids"]
    assert found.tokenize("##a")[0] != "##a"  # pieces are no special tokens
    found.save_pretrained(tmp_path)
    again = models.find("tiny", False, 99, ["other text"], str(tmp_path)).tokenizer
    assert again.get_vocab() == found.get_vocab()
    assert again.tokenize(texts[0]) == found.tokenize(texts[0])


# Text ------------------------------------------------------------------------------------------


def test_the_manual_of_python_is_a_corpus():
    found = corpus.read("pydoc")
    assert sum(map(len, found.train)) > 300_000
    assert found.held_out
    assert not set(found.train) & set(found.held_out)


def test_folders_and_json_lines_are_read(tmp_path: Path):
    for name, count in (("train", 30), ("dev", 3), ("test", 2)):
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    assert corpus.read(str(tmp_path)).held_out == ["dev 0", "dev 1", "dev 2"]
    assert corpus.read(str(tmp_path), "test").held_out == ["test 0", "test 1"]
    alone = corpus.read(str(tmp_path / "train.jsonl"))
    assert alone.held_out == ["train 9", "train 19", "train 29"]
    assert len(alone.train) == 27


def test_a_set_of_the_hub_is_read_by_its_name_and_configuration(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load(*name: str, **_: Any) -> Any:
        asked.append(name)
        rows = {"train": ["one"] * 30, "validation": ["two"]}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in rows.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert corpus.read("Salesforce/wikitext:wikitext-2-raw-v1").held_out == ["two"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1")]


@given(st.text(max_size=200), st.integers(1, 9))
def test_pieces_hold_the_text_from_its_first_word_on(text: str, words: int):
    pieces = corpus.pieces(text, words)
    assert text.endswith("".join(pieces))
    assert all(len(list(corpus.Words(piece))) <= words for piece in pieces)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1), min_size=1))
def test_what_frequencies_foretell_is_their_cross_entropy(rows: list[list[int]]):
    tokens = [token for row in rows for token in row]
    known = {t: (tokens.count(t) + 1) / (len(tokens) + 6) for t in range(6)}
    found = guess(rows, rows, 6)
    assert found.loss == pytest.approx(-np.mean([np.log(known[t]) for t in tokens]))
    assert found.accuracy == pytest.approx(max(map(tokens.count, range(6))) / len(tokens))


# Checkpoints compared --------------------------------------------------------------------------


def test_checkpoints_are_compared_on_the_same_masks(text: str, tmp_path: Path):
    for name, steps in (("few", "2"), ("more", "40")):
        arguments = ["--data", text, "--steps", steps, "--lr", "3e-3"]
        assert run(*arguments, "--output", str(tmp_path / name))[0] == 0
    options = masked_loss.arguments(
        [str(tmp_path / "few" / "model"), str(tmp_path / "more" / "model"), "--data", text,
         "--rows", "12", "--length", "24", "--radii", "0", "1",
         "--output", str(tmp_path / "found.jsonl")]
    )  # fmt: skip
    printed = masked_loss.compare(options)
    assert printed.count("\n") == 5
    lines = (tmp_path / "found.jsonl").read_text().splitlines()
    few, attacked, more, _ = map(json.loads, lines)
    assert attacked["loss"][0] > few["loss"][0]  # the attack gains
    assert few["difference"] == [0, 0]
    assert more["difference"][0] == pytest.approx(more["loss"][0] - few["loss"][0])
    assert more["difference"][0] + more["difference"][1] < 0  # and what learned more loses less
    assert masked_loss.main(["none"]) == 2


def test_a_sentence_encoder_is_not_measured_as_a_language_model(capsys: Any):
    assert masked_loss.main(["minilm", "--rows", "4"]) == 2
    assert "no language-model head" in capsys.readouterr().err


# Wrong input -----------------------------------------------------------------------------------


def test_wrong_text_is_answered_with_one_line(tmp_path: Path):
    empty, short, binary = (tmp_path / n for n in ("empty.txt", "short.txt", "binary.txt"))
    empty.write_text(" \n\n" * 40)
    short.write_text("one\n\ntwo")
    binary.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "rows.jsonl").write_text('{"words": "x"}\n' * 40)
    assert "holds no text" in refused("--data", str(empty))
    assert "holds 2 paragraphs, and every 10th" in refused("--data", str(short))
    short.write_text("\n\n".join(["one two"] * 12))
    assert "too short for a row" in refused("--data", str(short), "--objective", "macbert")
    short.write_text("\n\n".join(["one two"] * 9 + ["  "] * 9))
    assert "holds 9 paragraphs" in refused("--data", str(short), "--objective", "electra")
    assert "no text in UTF-8" in refused("--data", str(binary))
    assert "There is no file" in refused("--data", str(tmp_path / "none.txt"))
    assert "no column 'text', it has words" in refused("--data", str(tmp_path / "rows.jsonl"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"text": "x"}\n' * 40)
    (tmp_path / "folder" / "other.jsonl").write_text('{"text": "x"}\n' * 40)
    assert "has the splits other, train: train and dev" in refused(
        "--data", str(tmp_path / "folder")
    )
    with pytest.raises(DataError):
        corpus.read(str(empty))


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--objective", "electro"], "Did you mean 'electra'?"),
        (["--objective", "electra", "--solver", "freelb"], "the adversary of electra"),
        (["--objective", "electra", "--model", "minilm"], "minilm is a bert"),
        (["--solver", "freeat"], "Trainer steps once"),
        (["--solver", "frelb"], "Did you mean 'freelb'?"),
        (["--curriculum", "3"], "for an adversary: choose a --solver"),
        (["--curriculum", "-3", "--objective", "alum"], "at least 0, got -3"),
        (["--lr", "0"], "--lr must be positive, got 0"),
        (["--length", "600"], "--length must be 5 to 512 for tiny, got 600"),
        (["--length", "2"], "--length must be 5 to 512 for tiny, got 2"),
        (["--warmup", "1"], "[0, 1), got 1"),
        (["--only-new"], "for a checkpoint"),
        (["--substitute", "2"], "a share in [0, 1], got 2"),
        (
            ["--objective", "alum", "--set", "smoothness_wieght=1"],
            "Did you mean 'smoothness_weight'?",
        ),
        (["--model", "nowhere"], "cannot be loaded"),
        (["--model", "minilm", "--tokenizer", "roberta-base"], "--tokenizer is for tiny"),
        (["--objective", "macbert", "--neighbours", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_wrong_arguments_are_answered_with_one_line(
    arguments: list[str], answer: str, text: str, tmp_path: Path
):
    assert answer in refused("--data", text, "--output", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_mask_token_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = models.find("tiny", False, 120, Path(text).read_text().split("\n\n"))
    found.tokenizer.mask_token = None
    monkeypatch.setattr(models, "find", lambda *_: found)
    where = ["--data", text, "--output", str(tmp_path / "out")]
    assert "has no mask token" in refused(*where)
    assert "has no mask token" in refused(*where, "--objective", "electra")


def test_a_model_without_a_language_model_head_is_refused(text: str, tmp_path: Path):
    AutoConfig.for_model("vit").save_pretrained(tmp_path / "vit")
    source = models.find("tiny", False, 120, Path(text).read_text().split("\n\n"))
    source.tokenizer.save_pretrained(tmp_path / "vit")
    where = ["--data", text, "--output", str(tmp_path / "out"), "--model", str(tmp_path / "vit")]
    assert "ViTConfig has no model for AutoModelForMaskedLM" in refused(*where, "--from-scratch")


def test_a_table_that_the_tokenizer_cannot_write_is_refused(text: str, tmp_path: Path):
    (tmp_path / "bad.txt").write_text("猫 犬\n")
    answer = refused(
        "--objective", "macbert", "--data", text, "--neighbours", str(tmp_path / "bad.txt"),
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert "neighbour" in answer
