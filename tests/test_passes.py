"""What a round costs, counted by hooks that know nothing of the library's own counts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mixadv
from mixadv.solvers.weights import WeightsSolver
from tests.zoo import AROUND, ROWS, or_refused, player


class Cost(NamedTuple):
    """Forwards, backwards for δ alone, backwards that reach θ, optimizer steps."""

    forwards: int
    delta: int
    theta: int
    steps: int


def comparison(s: mixadv.ALUM | mixadv.VAT) -> Cost:
    return Cost(2 + s.steps, s.steps, 1, 1)


def pgd(s: mixadv.PGD) -> Cost:
    target = int(s.payoff != "loss" and s.steps > 0)
    return Cost(s.steps + 1 + target, s.steps, 1, 1)


def pgd_of_the_loss(s: mixadv.Solver) -> Cost:
    return Cost(s.steps + 1, s.steps, 1, 1)


def mat(s: mixadv.MAT, samples: int | None = None) -> Cost:
    """`samples` optimizer steps of a round: all K_θ, or 1 where the loop owns the step."""
    k_theta = samples or s.learner_steps
    points = s.steps + 1 if s.points == "path" else 1
    played = s.particles * points if s.play_as == "ensemble" else 1
    ascent = s.particles * s.steps
    return Cost(1 + ascent + played * k_theta + (k_theta - 1), ascent, k_theta, k_theta)


def twice(s: WeightsSolver) -> Cost:
    """Return the learner's passes of the inner solver twice, and its ascent once."""
    if s.solver is None:
        return Cost(2, 0, 2, 1)
    inner = TABLE[s.solver.name](s.solver)
    return Cost(inner.forwards + 1, inner.delta, 2 * inner.theta, inner.steps)


TABLE: dict[str, Callable[..., Cost]] = {
    "noise": lambda s: Cost(1, 0, 1, 1),
    "fgm": lambda s: Cost(2, 0, 2, 1),
    "pgd": pgd,
    "freeat": lambda s: Cost(s.steps, 0, s.steps, s.steps),
    "freelb": lambda s: Cost(s.steps, 0, s.steps, 1),
    "textat": lambda s: Cost(s.steps, 0, s.steps, 1),
    "creat": lambda s: Cost(2 + s.steps, s.steps, 1, 1),
    "cat": lambda s: Cost(2, 1, 1, 1),
    "vat": comparison,
    "r3f": lambda s: Cost(2, 0, 1, 1),
    "alum": comparison,
    "smart": lambda s: Cost(2 + s.steps + int(s.proximal_weight > 0), s.steps, 1, 1),
    "trades": comparison,
    "mart": comparison,
    "mat": mat,
    **dict.fromkeys(ROWS, pgd_of_the_loss),
    **dict.fromkeys(AROUND, twice),
}
FEW = st.integers(0, 3)
SHARE = st.sampled_from([0.0, 0.5, 1.0])
SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "noise": {"radius": st.sampled_from([0.1, None])},
    "fgm": {"norm": st.sampled_from(["l1", "l2", "linf"])},
    "pgd": {"steps": FEW, "payoff": st.sampled_from(["loss", "kl", "js"])},
    "freeat": {"steps": st.integers(1, 4), "carry": st.booleans()},
    "freelb": {"steps": st.integers(1, 4)},
    "textat": {"steps": st.integers(1, 4), "write": st.sampled_from(["mean", "accumulate"])},
    "creat": {
        "steps": FEW,
        "deviation_weight": SHARE,
        "representation": st.just(lambda out: out[1]),
    },
    "cat": {"contrast_weight": SHARE, "representation": st.just(lambda out: out[1])},
    "vat": {"steps": st.integers(1, 3)},
    "r3f": {"start": st.sampled_from(["uniform", "normal"])},
    "alum": {"steps": FEW},
    "trades": {"steps": FEW},
    "mart": {"steps": FEW},
    "smart": {"steps": FEW, "proximal_weight": st.sampled_from([0.0, 1.0])},
    "mat": {
        "steps": FEW,
        "particles": st.integers(1, 3),
        "learner_steps": st.integers(1, 3),
        "play_as": st.sampled_from(["mean", "ensemble", "sample"]),
        "points": st.sampled_from(["last", "path"]),
    },
    **{name: {"steps": FEW} for name in ROWS},
    **{name: {"solver": st.none() | st.builds(mixadv.PGD, steps=FEW)} for name in AROUND},
}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.embedding(input_ids).mean(1).tanh())
        return F.cross_entropy(logits, labels), logits


class Counter:
    """Counts runs of a closure, and backwards by the autograd tasks that its tensors see.

    A task that reaches a parameter builds θ's gradient; one that reaches predictions or losses
    alone serves δ. `branches` are the passes that θ's gradients came through.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        model.register_forward_hook(self._ran)
        for parameter in model.parameters():
            parameter.register_hook(lambda _: self.theta.add(task()))
        self.clear()

    def clear(self) -> None:
        self.forwards, self.passes, self.frozen = 0.0, 0, 0
        self.seen: set[tuple[int, int]] = set()
        self.theta: set[int] = set()

    def _ran(self, model: nn.Module, args: Any, output: Any) -> None:
        logits = output[1]
        self.rows = self.rows or len(logits)
        self.forwards += len(logits) / self.rows
        self.passes += 1
        frozen = not any(p.requires_grad for p in model.parameters())
        self.frozen += frozen and logits.requires_grad  # a teacher records nothing at all
        if logits.requires_grad:
            number = self.passes
            logits.register_hook(lambda _: self.seen.add((task(), number)))

    def cost(self, steps: int) -> Cost:
        tasks = {task for task, _ in self.seen}
        assert self.theta <= tasks
        return Cost(int(self.forwards), len(tasks - self.theta), len(self.theta), steps)

    @property
    def branches(self) -> int:
        return len({number for task, number in self.seen if task in self.theta})


def task() -> int:
    return torch._C._current_graph_task_id()


def tiny(solver: mixadv.Solver) -> tuple[mixadv.GameOptimizer, Counter, Callable[[], Any]]:
    torch.manual_seed(0)
    model = Tiny()
    batch = torch.randint(0, 20, (4, 5)), torch.randint(0, 3, (4,))
    counter = Counter(model)
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, solver)
    return optimizer, counter, lambda: model(*batch)


def reported(outcome: mixadv.Outcome | Any) -> Cost:
    return Cost(outcome.forwards, outcome.delta_backwards, outcome.theta_backwards, outcome.steps)


def test_every_solver_says_what_it_costs() -> None:
    assert TABLE.keys() == SETTINGS.keys() == mixadv.SOLVERS.keys()


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@given(data=st.data())
def test_passes_of_a_step_are_those_of_the_table(name: str, data: st.DataObject) -> None:
    solver = mixadv.make_solver(name, **{k: data.draw(v, k) for k, v in SETTINGS[name].items()})
    optimizer, counter, closure = tiny(solver)
    steps: list[int] = []
    optimizer.base.register_step_post_hook(lambda *_: steps.append(1))
    explained = optimizer.game.explain().passes
    assert counter.passes == 0, "explaining runs the model"
    optimizer.step(closure)
    for _ in range(2):
        counter.clear()
        steps.clear()
        optimizer.step(closure)
        assert counter.cost(len(steps)) == TABLE[name](solver)
        assert reported(optimizer.outcome) == reported(explained) == TABLE[name](solver)
        assert counter.branches == explained.branches
        shared = int(name == "cat")  # whose clean pass serves δ and θ
        assert counter.frozen == explained.delta_backwards - shared, "activations kept in vain"


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@given(data=st.data())
@or_refused("backward")
def test_a_loop_that_owns_the_step_pays_for_one_learner_sample(
    name: str, data: st.DataObject
) -> None:
    settings = {k: data.draw(v, k) for k, v in SETTINGS[name].items()}
    solver = mixadv.make_solver(name, **settings)
    expected = mat(solver, samples=1) if name == "mat" else TABLE[name](solver)
    optimizer, counter, closure = tiny(solver)
    optimizer.game.backward(closure)
    counter.clear()
    outcome = optimizer.game.backward(closure)
    assert counter.cost(1) == reported(outcome) == expected
    counter.clear()
    loss = optimizer.game.loss(closure)
    if name not in AROUND:  # whose gradients are there, and a backward hands them over
        loss.backward()
    assert counter.cost(1) == expected


@pytest.mark.parametrize("name", mixadv.SOLVERS)
@given(data=st.data())
@or_refused("loss")
def test_a_loss_to_differentiate_reports_the_cost_with_its_backward(
    name: str, data: st.DataObject
) -> None:
    settings = {k: data.draw(v, k) for k, v in SETTINGS[name].items()}
    optimizer, _, closure = tiny(mixadv.make_solver(name, **settings))
    expected = reported(optimizer.game.backward(closure))
    optimizer.game.loss(closure).backward()
    assert reported(optimizer.game.outcome) == expected


@pytest.mark.parametrize("name", mixadv.SOLVERS)
def test_passes_of_an_encoder_are_those_of_the_table(name: str) -> None:
    p = player("bert", rows=4)
    counter = Counter(p.model)
    solver = mixadv.make_solver(name)
    optimizer = mixadv.wrap(torch.optim.AdamW(p.model.parameters()), p.model, solver)
    optimizer.step(p.closure())
    for _ in range(2):
        counter.clear()
        optimizer.step(p.closure())
        assert counter.cost(optimizer.outcome.steps) == TABLE[name](solver)


@pytest.mark.parametrize("play_as", ["mean", "ensemble"])
@pytest.mark.parametrize("route", ["loop", "vmap", "stack"])
def test_a_pass_over_many_copies_counts_as_many(route: str, play_as: str) -> None:
    solver = mixadv.MAT(
        particles=3, steps=2, learner_steps=2, particle_batching=route, play_as=play_as
    )
    optimizer, counter, closure = tiny(solver)
    optimizer.step(closure)
    counter.clear()
    optimizer.step(closure)
    assert reported(optimizer.outcome) == mat(solver)
    if route != "vmap":  # a vectorised pass is one call of the model
        assert counter.forwards == mat(solver).forwards
