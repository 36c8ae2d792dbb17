"""A solver is one file of at most 40 lines, and one line in the registry."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

import mixadv

FILE = '''
"""Half: the mean of the clean loss and the loss after one ascent.

    min_θ  ½·ℓ(f(X), y) + ½·ℓ(f(X + δ), y),     δ = Π( δ_0 + η·g/‖g‖ )
"""

from dataclasses import dataclass
from typing import ClassVar

from mixadv.solvers.base import Solver
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class Half(Solver):
    """Half the clean loss, half the loss at the end of an ascent."""

    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "none"
    summary: ClassVar[str] = "half clean, half perturbed"

    def play(self, stage: Moves) -> Play:
        """Play `∇θ ½·[ ℓ(X) + ℓ(X + δ) ]`."""
        delta = stage.ascend("loss", self)
        yield Step((stage.loss() + stage.loss(delta)) / 2)
'''


def test_a_solver_is_one_file_and_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch):
    assert len(FILE.strip().splitlines()) <= 40
    path = tmp_path / "half.py"
    path.write_text(FILE.strip() + "\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("half", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "half", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(mixadv.SOLVERS, "half", module.Half)  # the registry's line

    solver = mixadv.make_solver("half", radius=0.3)
    assert repr(solver) == "Half(radius=0.3)"
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, solver, site="0")
    ids, labels = torch.randint(9, (5, 3)), torch.randint(2, (5,))
    before = model[2].weight.detach().clone()
    loss = optimizer.step(lambda: nn.functional.cross_entropy(model(ids), labels))
    assert loss.isfinite()
    assert not model[2].weight.equal(before)
    assert "Half" in str(optimizer.game.explain())
