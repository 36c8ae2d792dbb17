"""The house: layers without circles, small rooms, one protocol that solvers play on."""

import ast
import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import mixadv
from mixadv.round.cost import Rehearsal
from mixadv.round.stage import Stage
from mixadv.round.wrapped import Wrapped
from mixadv.solvers.play import Moves
from tests.zoo import small

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "mixadv").rglob("*.py"))


def test_what_stands_below_never_imports_what_stands_above():
    pytest.importorskip("importlinter")
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_rooms_are_small():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (file, node.name)


@pytest.mark.parametrize("played", [Stage, Rehearsal, Wrapped])
def test_what_solvers_play_on_is_whole(played: type):
    """A protocol's own methods return None: one that is left out would be played in silence."""
    made_of_others = ("ascend", "leap", "origin")
    for name, move in vars(Moves).items():
        kind = callable(move) or isinstance(move, property)
        if kind and not name.startswith("_") and name not in made_of_others:
            own = vars(played)[name]
            if callable(move):
                assert [*inspect.signature(own).parameters] == [*inspect.signature(move).parameters]


@dataclass(frozen=True, kw_only=True)
class Drawn(mixadv.Solver):
    """The clean loss, and the loss at a start that the solver draws itself."""

    name: ClassVar[str] = "drawn"
    paper: ClassVar[str] = "none"

    def play(self, stage: Moves) -> Any:
        yield stage.plain_loss() / 2
        delta = stage.start(self, lambda index, call: stage.draw(self, call))
        yield mixadv.Step(stage.loss(delta.detach()) / 2)


def test_a_solver_that_draws_by_itself_trains_and_is_explained():
    player = small()
    base = torch.optim.SGD(player.model.parameters(), lr=0.1)
    optimizer = mixadv.wrap(base, player.model, Drawn())
    counted = optimizer.game.explain().passes
    optimizer.step(player.closure())
    outcome = optimizer.outcome
    assert (counted.forwards, counted.theta_backwards) == (2, 2)
    assert (outcome.forwards, outcome.theta_backwards) == (2, 2)


def test_a_solver_that_needs_values_is_not_counted_and_told_why():
    class Greedy(Drawn):
        def play(self, stage: Moves) -> Any:
            yield mixadv.Step(stage.loss() / stage.clean().no_such_thing)

    with pytest.raises(
        mixadv.GameError, match=r"passes of Greedy cannot be counted.*no_such_thing"
    ):
        mixadv.Game(small().model, Greedy()).explain()


def test_the_core_imports_torch_and_nothing_else():
    """What is slow to import is imported where it is used."""
    program = (
        "import sys, torch; before = {*sys.modules}; import mixadv; "
        "[getattr(mixadv, name) for name in mixadv.__all__]; "
        "print(*sorted({m.split('.')[0] for m in {*sys.modules} - before}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "mixadv" in done.stdout, done.stderr
    assert {*done.stdout.split()} <= {"mixadv", "torch", "typing_extensions"}
