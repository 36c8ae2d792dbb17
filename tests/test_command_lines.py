"""Command lines of the examples: mistakes are answered at once, before what takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attack
import evaluate
import masked_loss

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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_mistake_is_refused_before_libraries_are_imported(path: Path):
    done = python("-X", "importtime", str(path), "--no-such-option")
    *imported, last = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr[-2000:]
    assert "no-such-option" in last or "required" in last, last
    named = {line.rpartition("|")[2].strip() for line in imported if "import time" in line}
    assert "argparse" in named
    assert not named & {*HEAVY, "mixadv"}


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
