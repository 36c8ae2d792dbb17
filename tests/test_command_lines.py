"""Command lines of the examples: mistakes are answered at once, before what takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attack
import evaluate
import masked_loss
import mixadv
from common import parameters

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path
    for folder in ("examples", "examples/research")
    for path in (ROOT / folder).glob("*.py")
    if "--help" in path.read_text() or '__name__ == "__main__"' in path.read_text()
)
HEAVY = ("torch", "transformers", "datasets", "accelerate", "scipy", "sklearn", "pydantic")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python at the root of the repository."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *arguments], check=False, **how)


def refused(path: Path, *arguments: str) -> str:
    """Return what a script answers to a mistake, before it imports what takes seconds."""
    done = python("-X", "importtime", str(path), *arguments)
    *imported, last = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr[-2000:]
    named = {line.rpartition("|")[2].strip() for line in imported if "import time" in line}
    assert "argparse" in named
    assert not named & {*HEAVY, "mixadv"}
    return last


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_mistake_is_refused_before_libraries_are_imported(path: Path):
    last = refused(path, "--no-such-option")
    assert "no-such-option" in last or "required" in last, last


NAME = "there is none of this name. "
MISTAKES = {
    "glue.py --task nope": f"--task nope: {NAME}",
    "glue.py --solver frelb": f"--solver frelb: {NAME}Did you mean 'freelb'?",
    "glue.py --solver mat --set matt.steps=3": f"matt: {NAME}Did you mean 'mat'?",
    "glue.py --solver mat --config nope.toml": "--config nope.toml: there is no such file.",
    "glue.py --solver mat --lr 0": "learning_rate must be positive, got 0.0.",
    "glue.py --data nope": "There is no folder nope; . holds ",
    "glue.py --data examples/data": "no folder cola or cola_subset.",
    "intent.py --task nope": f"--task nope: {NAME}",
    "intent.py --solver nope": f"--solver nope: {NAME}",
    "intent.py --data ./nope": "There is no folder ./nope; . holds ",
    "anli.py --train snil": f"--train snil: {NAME}Did you mean 'snli'?",
    "anli.py --solver nope": f"--solver nope: {NAME}",
    "anli.py --data nope": "There is no folder nope; . holds ",
    "trainer.py --solver nope": f"--solver nope: {NAME}Did you mean 'noise'? There are plain, ",
    "trainer.py --solver plain freeat": "choose another solver, such as freelb.",
    "pretrain.py --objective nope": f"--objective nope: {NAME}",
    "pretrain.py --solver nope": f"--solver nope: {NAME}",
    "pretrain.py --solver freeat": "choose another solver, such as freelb.",
    "pretrain.py --solver freelb --set steps": "--set steps: write NAME=VALUE",
    "pretrain.py --data nope.txt": "There is no file nope.txt; . holds ",
    "pretrain.py --data examples/nope": "There is no file examples/nope; examples holds ",
    "pretrain.py --substitute 0.1 --neighbours nope": "There is no file nope; . holds ",
    "neurons.py --model a=minilm --data nope": "There is no folder nope; a hub data set is given",
    "attack.py --model minilm --task nope": f"--task nope: {NAME}",
    "attack.py --model minilm --task sst2 --data nope": "There is no folder nope; . holds ",
    "attack.py --model minilm --attack nope": "--attack nope: there is no such file. There are ",
    "evaluate.py --model minilm --data nope": "There is no file nope; . holds ",
    "evaluate.py --model minilm --data README.md --shifted a=b": "There is no file b; . holds ",
    "evaluate.py --model minilm --data README.md --attack b": "--attack b: there is no such file.",
    "research/directions.py --task nope": f"--task nope: {NAME}",
    "research/ascents_tried.py --data ./nope": "There is no folder ./nope; . holds ",
    "research/attack_game.py --mat 2 --task nope": f"--task nope: {NAME}",
    "research/attack_game.py --mat 2 --neighbours nope": "--neighbours nope: there is no such file",
    "research/attack_game.py": "Name the learners: --model FOLDER ..., or --mat N.",
    "research/masked_loss.py minilm --data nope.txt": "There is no file nope.txt; . holds ",
    "research/mixtures.py --task nope": f"--task nope: {NAME}",
    "research/study.py nope.toml": "There is no study nope.toml.",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_name_that_is_not_there_is_refused_before_libraries_are_imported(line: str):
    script, *arguments = line.split()
    last = refused(ROOT / "examples" / script, *arguments)
    assert last.startswith(f"{Path(script).stem}: ")
    assert MISTAKES[line] in last


def test_the_solvers_that_are_known_before_the_library_are_those_of_the_library():
    assert sorted(parameters.SOLVERS) == sorted(mixadv.SOLVERS)
    replaying = [name for name, solver in mixadv.SOLVERS.items() if solver.replays_batch]
    assert replaying == parameters.REPLAYING


MODELS = {
    "runs/*/lats": "nothing matches the pattern runs/*/lats; runs holds glue.",
    "runs/glue/plain/lats": "there is no runs/glue/plain/lats; runs/glue/plain holds best, last.",
    "runs/gleu": "there is no runs/gleu; runs holds glue.",
    "./last": "there is no ./last; . holds runs.",
}


@pytest.mark.parametrize("name", MODELS)
def test_a_mistyped_path_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It was answered with "Repo id must be in the form ..."."""
    for folder in ("best", "last"):
        (tmp_path / "runs" / "glue" / "plain" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = ["--data", "rows.jsonl"]
    for arguments, given in (
        (attack.arguments, ["--model", name]),
        (evaluate.arguments, ["--model", name, *data]),
        (evaluate.arguments, ["--model", "runs/glue/plain/last", *data, "--mixture", f"m={name}"]),
        (masked_loss.arguments, [name]),
    ):
        with pytest.raises(SystemExit, match="2"):
            arguments(given)
        [line] = capsys.readouterr().err.splitlines()
        assert MODELS[name] in line
    for fine in ("runs/glue/plain/last", "minilm", "roberta-base", "textattack/bert-base-sst2"):
        assert attack.arguments(["--model", fine]).model == [fine]
