"""`make gpu` where there is none, and slices that go on where they stopped."""

import re
from pathlib import Path

import pytest
import torch

import benchmark
import compiled
from studying.reading import read
from tests import gpu
from tests.gpu import Piece, pieces, run

STUDY = "examples/research/study/base/study.toml"
PIECES = pieces("cpu", STUDY, "folder")


def test_without_a_gpu_all_is_skipped_and_said_to_be(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--kept", str(tmp_path / "done")]) == 0
    said = capsys.readouterr().out
    assert "torch finds no GPU here" in said
    assert all(piece.name in said for piece in pieces("cuda", STUDY))
    assert gpu.main(["--kept", str(tmp_path / "done"), "--data", "folder"]) == 0
    assert PIECES[-1].name not in said
    assert PIECES[-1].name in capsys.readouterr().out


def test_a_slice_goes_on_where_the_last_one_stopped(tmp_path: Path):
    """A piece that is out of time is stopped, one that failed is not run again."""
    trace, half, kept = tmp_path / "trace", tmp_path / "half", tmp_path / "kept" / "done.json"

    def note(name: str, then: str = "") -> list[str]:
        return ["-c", f"open({str(trace)!r}, 'a').write({name!r} + ' '){then}"]

    once = f"; import os, time; p = {str(half)!r}; n = os.path.exists(p); open(p, 'w').close()"
    found = [
        Piece("first", note("first")),
        Piece("wrong", note("wrong", "; raise SystemExit(3)")),
        Piece("long", note("long", once + "; time.sleep(0 if n else 60)"), resumes=True),
        Piece("last", note("last")),
    ]
    known = run(found, kept, 4)
    assert known == {"first": "ran", "wrong": "failed with 3", "long": "stopped 1"}
    known = run(found, kept, 60)
    assert known == {"first": "ran", "wrong": "failed with 3", "long": "ran", "last": "ran"}
    assert trace.read_text().split() == ["first", "wrong", "long", "long", "last"]


def test_a_piece_that_keeps_nothing_and_never_ends_is_given_up(tmp_path: Path):
    endless = [Piece("endless", ["-c", "import time; time.sleep(60)"])]
    for _ in range(gpu.TRIES):
        known = run(endless, tmp_path / "done", 0.2)
    assert known == {"endless": "given up"}
    assert gpu.told(endless, known) == 1


def test_what_failed_is_run_again_where_it_is_asked_for(monkeypatch, capsys, tmp_path: Path):
    mended = tmp_path / "mended"
    code = f"import os; raise SystemExit(0 if os.path.exists({str(mended)!r}) else 3)"
    monkeypatch.setattr(gpu, "pieces", lambda *_: [Piece("wrong", ["-c", code])])
    monkeypatch.setattr(gpu, "KEPT", tmp_path)
    words = ["--device", "cpu"]
    assert gpu.main(words) == 1
    assert "--retry runs them once more" in capsys.readouterr().out
    mended.touch()
    assert gpu.main(words) == 1
    assert gpu.main([*words, "--retry"]) == 0
    assert (tmp_path / "cpu.json").exists()  # another device has run nothing


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.name)
def test_every_piece_is_a_command_that_there_is(piece: Piece):
    script, *words = piece.command
    if script == "-m":
        assert (gpu.ROOT / words[-1]).exists()
    elif script.endswith("benchmark.py"):
        benchmark.arguments(words)
    elif script.endswith("compiled.py"):
        compiled.arguments(words)
    elif script.endswith("study.py"):
        assert read(gpu.ROOT / words[0]).model == "mpnet"
    else:
        assert (gpu.ROOT / script).exists()


def test_all_tests_marked_gpu_are_pieces():
    files = [f for f in (gpu.ROOT / "tests").glob("test_*.py") if f.name != Path(__file__).name]
    marked = {f.stem for f in files if re.search(r"mark\.gpu\b", f.read_text())}
    assert marked == {*gpu.TESTS}


@pytest.mark.slow
def test_the_pieces_run_on_a_cpu_as_they_would_on_a_gpu(tmp_path: Path):
    """Stand-ins: the same scripts, on tiny sizes."""
    rows = ["--sizes", "2x16", "--rounds", "1", "--output", str(tmp_path), "--rows"]
    tests = ["-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests/test_game.py"]
    found = [
        Piece("tests", tests),
        Piece("costs", ["examples/research/benchmark.py", "--resume", *rows, "noise"]),
        Piece("compiled rounds", ["examples/research/compiled.py", *rows, "fgm"]),
    ]
    assert run(found, tmp_path / "done.json", 400) == dict.fromkeys([p.name for p in found], "ran")
    for name in ("benchmark", "compiled"):
        assert len((tmp_path / f"{name}.jsonl").read_text().splitlines()) == 1
