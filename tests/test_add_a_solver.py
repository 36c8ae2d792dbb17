"""CONTRIBUTING's new solver is one file of at most 40 lines, and one line in the registry."""

import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import mixadv
from mixadv.round.explain import solver_table

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILE = re.search(r"## Add a solver\n.*?```python\n(.*?)```", TEXT, re.DOTALL)[1]


def test_a_solver_is_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch):
    assert len(FILE.splitlines()) <= 40
    module = types.ModuleType("half")
    monkeypatch.setitem(sys.modules, "half", module)
    exec(FILE, module.__dict__)
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
    assert "| `half` | `Half` | half clean, half perturbed | 3 | 1 | 1 | 1 |" in solver_table(
        mixadv.SOLVERS.values()
    )
    text = inspect.getdoc(module.Half)
    assert text.startswith(
        "Half the clean loss, half the loss at the end of an ascent.\n\n    min_θ"
    )
    assert "    radius (default 0.2):\n" in text
