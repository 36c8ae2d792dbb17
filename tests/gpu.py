"""Everything that needs a GPU, in slices that go on where they stopped: `make gpu`.

    python -m tests.gpu               # nine minutes of it; call it again until it says that all ran
    python -m tests.gpu --list        # the pieces, and what came of those that have run

First come the tests marked gpu, then the benchmark on the GPU, whose rows land beside the CPU's,
rounds of a compiled model, and a study of an encoder of base size. A piece that a slice has no time
left for is stopped, and goes on in the next one from what it has kept. Where torch finds no GPU
each piece is skipped, and said to be.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
KEPT = Path("runs/gpu")
MINUTES = 9.0
LEAST = 20.0
"""Seconds that must be left for a piece to begin."""
TRIES = 5
"""Slices that a piece may be stopped in, of those that keep nothing: then it is given up."""
PATIENCE = 60
"""The same of those that go on from what they have kept: nine hours."""
TESTS = ("test_game", "test_fp16", "test_trainer")
COSTS = ("16x128", "64x24", "4x24", "2x16")
BATCHES = ("2x128", "4x128", "8x128", "16x128", "32x128", "64x128")
PARTICLES = ("mat, M=8", "mat, M=8, vmap", "mat, M=8, stack")
GLUE = "examples/research/study/glue/study.toml"
ROWS = ("noise", "pgd, K=3", "smart, no teacher", "smart-pytorch", "mat, 3 and 2")


class Piece(NamedTuple):
    """Something to run, by the arguments of Python."""

    name: str
    command: list[str]
    resumes: bool = False  # from what it has kept itself


def pieces(device: str, study: str, data: str = "") -> list[Piece]:
    """Return all that is to run on a device, in its order; GLUE's study needs its data."""
    pytest = ["-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-rs"]
    found = [Piece(f"tests of {name}", [*pytest, f"tests/{name}.py"]) for name in TESTS]
    script = ["examples/research/benchmark.py", "--device", device, "--resume"]
    for size in COSTS:
        name = f"costs of all solvers at {size}"
        found.append(Piece(name, [*script, "--sizes", size], resumes=True))
    for size in BATCHES:
        command = [*script, "--sizes", size, "--rows", *ROWS]
        found.append(Piece(f"costs by batch at {size}", command, resumes=True))
    for size in COSTS:
        command = [*script, "--sizes", size, "--rows", *PARTICLES]
        found.append(Piece(f"particles by route at {size}", command, resumes=True))
    command = ["examples/research/compiled.py", "--device", device]
    found.append(Piece("compiled rounds", command, resumes=True))
    if study:
        found.append(Piece("encoder of base size", ["examples/mpnet.py"], resumes=True))
        command = ["examples/research/study.py", study]
        found.append(Piece("study", command, resumes=True))
    if study and data:
        command = ["examples/research/study.py", GLUE, "--data", data]
        found.append(Piece("study of GLUE and ANLI", command, resumes=True))
    return found


def ended(command: list[str], seconds: float) -> int | None:
    """Run Python on a command; return its exit status, None where it was stopped in time."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # its workers with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(found: list[Piece], kept: Path, seconds: float) -> dict[str, str]:
    """Run pieces that have not run yet for so long; return what came of all that have."""
    until = time.monotonic() + seconds
    known: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    kept.parent.mkdir(parents=True, exist_ok=True)
    for piece in found:
        word, _, tries = known.get(piece.name, "stopped 0").partition(" ")
        left = until - time.monotonic()
        if word != "stopped":
            continue
        if left < min(LEAST, seconds / 10):
            break
        print(f"--- {piece.name}: {' '.join(piece.command)}", flush=True)
        status = ended(piece.command, left)
        if status is None:
            often = int(tries) + 1
            lost = often >= (PATIENCE if piece.resumes else TRIES)
            known[piece.name] = "given up" if lost else f"stopped {often}"
        else:
            known[piece.name] = "ran" if status == 0 else f"failed with {status}"
        kept.write_text(json.dumps(known, indent=1) + "\n")
    return known


def main(argv: list[str] | None = None) -> int:
    """Run one slice; return 1 where a piece has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=MINUTES, help="of a slice (default: %(default)g)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the pieces out")
    text = "a TOML file with results of its own beside it; '' leaves it out (default: %(default)s)"
    add("--study", default="examples/research/study/base/study.toml", help=text)
    text = "a folder of GLUE, AdvGLUE, SNLI and ANLI, as for examples/anli.py: their study follows"
    add("--data", default="", metavar="FOLDER", help=text)
    text = f"a file with what has run (default: {KEPT}/DEVICE.json)"
    add("--kept", type=Path, help=text)
    add("--retry", action="store_true", help="run what failed or was given up once more")
    add("--list", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    found = pieces(options.device, options.study, options.data)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here. Skipped:")
        print("\n".join(f"  {piece.name}" for piece in found))
        return 0
    seconds = 0.0 if options.list else 60 * options.minutes
    kept = options.kept or KEPT / f"{options.device}.json"
    if options.retry and seconds and kept.exists():
        known = json.loads(kept.read_text())
        known = {name: of for name, of in known.items() if of.startswith(("ran", "stopped"))}
        kept.write_text(json.dumps(known, indent=1) + "\n")
    known = run(found if seconds else [], kept, seconds)
    return told(found, known)


def told(found: list[Piece], known: dict[str, str]) -> int:
    """Print what came of each piece; return 1 where one has failed."""
    print("\n".join(f"  {piece.name}: {known.get(piece.name, 'to come')}" for piece in found))
    states = [known.get(piece.name, "to come") for piece in found]
    waiting = sum(state == "to come" or state.startswith("stopped") for state in states)
    lost = sum(state.startswith(("failed", "given up")) for state in states)
    print(f"{waiting} pieces are left: run it again." if waiting else "None is left.")
    if lost:
        print(f"{lost} failed or were given up: --retry runs them once more.")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
