"""An adversary that weighs rows or groups: its best weights, its games, and what it is told."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize_scalar
from torch import Tensor, nn

import mixadv
from mixadv.maths import row_weights
from mixadv.mixtures import Mixture
from mixadv.robustness import DataError, Report, accuracy_by_group, bootstrap, compare, evaluate
from tests.test_evaluate import ATTACK, classifier, rows_of, word_tokenizer
from tests.test_game import no_reads
from tests.worlds import gradients
from tests.zoo import WAYS, Player, assert_same, fingerprint, small, wrapped

KEY = "group log-weights"
LEVEL, BALL = st.floats(0.01, 1.0), st.floats(0.01, 8.0)
LOSSES = st.lists(st.floats(-5, 5) | st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=9)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# The best weights --------------------------------------------------------------------------------


@given(LOSSES, LEVEL)
def test_cvar_plays_the_optimum_of_its_linear_program(values: list[float], level: float):
    losses, most = tensor(values), 1 / (level * len(values))
    weights = row_weights.cvar(losses, level)
    assert weights.min() >= 0
    assert weights.max() <= max(most, 1.0) * (1 + 1e-12)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    bounds = (0, min(most, 1.0) if most * len(values) >= 1 else 1.0)
    found = linprog(-losses.numpy(), A_eq=np.ones((1, len(values))), b_eq=[1], bounds=bounds)
    assert float(weights @ losses) == pytest.approx(-found.fun, abs=1e-7)


@given(LOSSES, BALL)
def test_chi_square_weights_lie_in_the_ball_and_reach_its_dual(values: list[float], ball: float):
    """Any feasible weights pay at most min_η η + √((1 + 2ρ)/B)·‖(ℓ − η)₊‖; the best pay as much."""
    losses, count = tensor(values), len(values)
    weights = row_weights.chi_square(losses, ball)
    assert weights.min() >= 0
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float((count * weights - 1).square().mean() / 2) <= ball + 1e-9

    def dual(eta: float) -> float:
        excess = np.clip(losses.numpy() - eta, 0, None)
        return eta + math.sqrt((1 + 2 * ball) / count) * float(np.linalg.norm(excess))

    ends = (-100, max(values))  # η is at most 10/√(2ρ) below the mean
    bound = minimize_scalar(dual, bounds=ends, method="bounded", options={"xatol": 1e-9})
    assert float(weights @ losses) == pytest.approx(min(bound.fun, dual(ends[1])), abs=1e-6)


@given(LOSSES, BALL, LEVEL)
def test_weights_are_those_of_a_solver_of_convex_programs(values: list[float], ball: float, level):
    cvxpy = pytest.importorskip("cvxpy")
    losses, count = tensor(values), len(values)
    w = cvxpy.Variable(count, nonneg=True)
    gain, whole = cvxpy.Maximize(losses.numpy() @ w), cvxpy.sum(w) == 1
    inside = cvxpy.sum_squares(count * w - 1) <= 2 * count * ball
    found = cvxpy.Problem(gain, [whole, inside]).solve(solver=cvxpy.CLARABEL)
    assert float(row_weights.chi_square(losses, ball) @ losses) == pytest.approx(found, abs=1e-4)
    few = cvxpy.Problem(gain, [whole, w <= max(1 / (level * count), 1 / count)])
    found = few.solve(solver=cvxpy.CLARABEL)
    assert float(row_weights.cvar(losses, level) @ losses) == pytest.approx(found, abs=1e-4)


BEST = {
    "cvar": lambda losses: row_weights.cvar(losses, 0.4),
    "chi_square": lambda losses: row_weights.chi_square(losses, 0.3),
}


@pytest.mark.parametrize("best", BEST.values(), ids=BEST)
@given(LOSSES, st.randoms(use_true_random=False))
def test_weights_follow_their_rows_and_equal_losses_weigh_the_same(best: Any, values, random):
    order = [*range(len(values))]
    random.shuffle(order)
    weights = best(tensor(values))
    torch.testing.assert_close(best(tensor(values)[order]), weights[order], rtol=0, atol=1e-12)
    for value in set(values):
        same = weights[tensor(values) == value]
        assert float(same.max() - same.min()) <= 1e-12


@pytest.mark.parametrize("best", BEST.values(), ids=BEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_ignore_the_scale_of_the_losses(best: Any, scale: float, dtype: torch.dtype):
    losses = torch.tensor([3.0, 1.0, 0.5, 2.0, 2.5], dtype=dtype)
    torch.testing.assert_close(best(scale * losses), best(losses))
    assert best(losses).dtype == dtype


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9), st.floats(0, 0.01))
def test_a_small_ball_adds_a_multiple_of_the_spread(values: list[float], ball: float):
    losses = tensor(values)
    spread = losses.std(unbiased=False)
    away = (losses.mean() - losses.min()) * math.sqrt(2 * ball)
    if away < spread:  # no weight comes to 0
        found = row_weights.chi_square(losses, ball) @ losses
        assert float(found) == pytest.approx(float(losses.mean() + math.sqrt(2 * ball) * spread))


def test_sets_of_weights_end_at_the_mean_and_at_the_worst_row():
    losses = tensor([1.0, 4.0, 2.0, 4.0])
    uniform, worst = tensor([0.25] * 4), tensor([0, 0.5, 0, 0.5])
    for least, most in (
        (row_weights.cvar(losses, 1.0), row_weights.cvar(losses, 0.01)),
        (row_weights.chi_square(losses, 0.0), row_weights.chi_square(losses, 99.0)),
    ):
        torch.testing.assert_close(least, uniform)
        torch.testing.assert_close(most, worst)
    for same in (row_weights.cvar(losses[:1], 0.5), row_weights.chi_square(losses[:1], 0.5)):
        torch.testing.assert_close(same, tensor([1.0]))


# Groups ------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """The learner's mixed strategy x in a matrix game: a row of group g loses (Ax)_g."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.shares = nn.Parameter(torch.full(matrix.shape[1:], 1 / matrix.shape[1]).to(matrix))

    def forward(self, groups: Tensor) -> Tensor:
        return groups @ self.matrix @ self.shares


def onto_simplex(x: Tensor) -> Tensor:
    """Duchi et al. 2008."""
    ordered = x.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    count = int((ordered * torch.arange(1, len(x) + 1) > excess).sum())
    return (x - excess[count - 1] / count).clamp(min=0)


def value_of(matrix: Tensor) -> float:
    """min_x max_g (Ax)_g, by linear programming."""
    rows, columns = matrix.shape
    constraints = np.hstack([matrix.numpy(), -np.ones((rows, 1))])
    whole = np.array([[1.0] * columns + [0.0]])
    bounds = [(0, None)] * columns + [(None, None)]
    found = linprog([0.0] * columns + [1.0], constraints, [0] * rows, whole, [1], bounds)
    return found.fun


@pytest.mark.parametrize("seed", range(2))
def test_averages_of_group_dro_nearly_solve_the_game(seed: int):
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.rand(3, 4, generator=draw, dtype=torch.float64)
    model, groups = Mixed(matrix), torch.arange(3).repeat(2)
    eta = 0.1
    optimizer = wrapped(model, mixadv.GroupDRO(groups=3, mirror_step=eta), lr=eta)

    def project(*_: Any) -> None:
        model.shares.data = onto_simplex(model.shares.data)

    optimizer.base.register_step_post_hook(project)
    played, weighed, rounds = torch.zeros(4).double(), torch.zeros(3).double(), 600
    for _ in range(rounds):
        played += model.shares.detach() / rounds
        optimizer.step(lambda: model(F.one_hot(groups).double()), groups=groups)
        weighed += optimizer.game.state_dict()["memory"][KEY].exp() / rounds
    worst, best = float((matrix @ played).max()), float((weighed @ matrix).min())
    value = value_of(matrix)
    assert best - 1e-9 <= value <= worst + 1e-9
    assert worst - best < 0.03  # the regrets of both players are O(1/(ηT) + η)
    assert 1 - float(weighed.max()) > 0.05, "a pure strategy is no test"


GROUPS = torch.tensor([0, 1, 1, 2, 0, 1])


def dro(**how: Any) -> tuple[mixadv.GameOptimizer, Player]:
    player = small(reduction="none")
    return wrapped(player, mixadv.GroupDRO(groups=3, mirror_step=0.5, **how)), player


def test_weights_of_groups_are_kept_from_batch_to_batch_and_told():
    optimizer, player = dro()
    shares = torch.full((3,), 1 / 3).double()
    for _ in range(4):
        torch.manual_seed(0)
        losses = player.closure()()[0].detach()
        torch.manual_seed(0)
        objective = optimizer.step(player.closure(), groups=GROUPS)
        means = torch.stack([losses[g == GROUPS].mean() for g in range(3)])
        shares = shares * (0.5 * means).exp()
        shares = shares / shares.sum()
        outcome = optimizer.outcome
        torch.testing.assert_close(objective, shares @ means)
        torch.testing.assert_close(outcome.payoff, objective)
        assert int(outcome.worst_group) == int(shares.argmax())
        torch.testing.assert_close(outcome.worst_group_weight, shares.max())
        of_rows = (shares / GROUPS.bincount())[GROUPS]
        entropy = -(of_rows * of_rows.log()).sum()
        torch.testing.assert_close(outcome.effective_rows, entropy.exp())


def test_each_micro_batch_of_an_update_moves_the_weights_of_groups():
    optimizer, player = dro()
    player.model.eval()
    shares, parts = torch.ones(3).double(), ([0, 1, 2], [3, 4, 5])
    for rows in parts:
        batch = {name: value[rows] for name, value in player.batch.items()}
        losses, groups = player.closure(**batch)()[0].detach(), GROUPS[rows]
        optimizer.game.backward(player.closure(**batch), groups=groups)
        sums = torch.zeros(3).double().index_add(0, groups, losses)
        shares = shares * (0.5 * sums / groups.bincount(minlength=3).clamp(min=1)).exp()
    found = optimizer.game.state_dict()["memory"][KEY].exp()
    torch.testing.assert_close(found, shares / shares.sum())


@pytest.mark.parametrize("steps", [0, 2])
def test_three_doors_deliver_the_same_gradients_with_groups(steps: int):
    found = []
    for how in WAYS:
        optimizer, player = dro(steps=steps)
        kept: list[Any] = []
        optimizer.base.register_step_pre_hook(
            lambda *_, k=kept, m=player.model: k.append(gradients(m))
        )
        for _ in range(3):
            if how == "step":
                optimizer.step(player.closure(), groups=GROUPS)
                continue
            played = getattr(optimizer.game, how)(player.closure(), groups=GROUPS)
            if how == "loss":
                played.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([kept, optimizer.game.state_dict()["memory"]])
    assert_same(found[1:], [found[0]] * 2)


def test_groups_resume_bit_for_bit(tmp_path: Path):
    optimizer, player = dro(steps=1)
    for _ in range(3):
        optimizer.step(player.closure(), groups=GROUPS)
    state = [player.model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    torch.save(state, tmp_path / "state")
    whole = optimizer.step(player.closure(), groups=GROUPS)
    again, other = dro(steps=1)
    weights, own, random = torch.load(tmp_path / "state", weights_only=True)
    other.model.load_state_dict(weights)
    again.load_state_dict(own)
    torch.set_rng_state(random)
    assert_same(again.step(other.closure(), groups=GROUPS), whole)
    assert_same([*other.model.parameters()], [*player.model.parameters()])
    assert_same(again.state_dict(), optimizer.state_dict())


def test_a_loss_that_overflows_does_not_spoil_the_weights_of_groups():
    optimizer, player = dro()
    optimizer.step(player.closure(), groups=GROUPS)
    for broken in (math.inf, math.nan):
        factor = torch.ones(6).double()
        factor[3] = broken

        def overflow(by: Tensor = factor) -> Tensor:
            return player.closure()()[0] * by

        optimizer.game.backward(overflow, groups=GROUPS)
        assert optimizer.game.state_dict()["memory"][KEY].isfinite().all()
        player.model.zero_grad()


@pytest.mark.parametrize("steps", [0, 1])
def test_rounds_after_the_first_read_nothing_of_the_groups(
    steps: int, monkeypatch: pytest.MonkeyPatch
):
    optimizer, player = dro(steps=steps, counts=(2, 3, 1), size_adjustment=1.0)
    optimizer.step(player.closure(), groups=GROUPS)
    with no_reads(monkeypatch):
        optimizer.step(player.closure(), groups=GROUPS)
        optimizer.game.backward(player.closure(), groups=GROUPS)


def test_plain_rounds_of_a_schedule_leave_the_weights_of_groups():
    player = small(reduction="none")
    solver = mixadv.GroupDRO(groups=3, mirror_step=0.5)
    optimizer = wrapped(player, solver, schedule=mixadv.Schedule(start=1))
    optimizer.step(player.closure(), groups=GROUPS)
    assert KEY not in optimizer.game.state_dict()["memory"]
    assert optimizer.outcome.worst_group is None
    optimizer.step(player.closure(), groups=GROUPS)
    assert KEY in optimizer.game.state_dict()["memory"]


def test_what_a_delta_is_worth_is_asked_without_groups():
    optimizer, player = dro(steps=1)
    optimizer.step(player.closure(), groups=GROUPS)
    before = copy.deepcopy(optimizer.state_dict())
    found = mixadv.equilibrium.exploitability(optimizer.game, [player.closure()])
    assert found.gain.isfinite()
    assert_same(optimizer.state_dict(), before)


# Both adversaries --------------------------------------------------------------------------------


SOLVERS = [mixadv.CVaR, mixadv.ChiSquare, mixadv.GroupDRO]
each_solver = pytest.mark.parametrize("cls", SOLVERS)


@each_solver
def test_rows_are_weighed_at_the_delta_of_pgd(cls: type[mixadv.Solver]):
    """At δ = 0 nothing moves by default; a step of δ is that of PGD, whatever the weights."""
    solvers = (mixadv.PGD(steps=2, start="zero"), cls(steps=2))
    points = []
    for solver in (*solvers, cls()):
        player = small(reduction="none")
        optimizer = wrapped(player, solver)
        optimizer.step(player.closure())
        points.append(optimizer.game.strategy.points[0])
    assert_same(points[1], points[0])
    assert points[0].any()
    assert not points[2].any()


@pytest.mark.parametrize(
    ("solver", "rows"),
    [
        (mixadv.CVaR(level=1.0), 6),
        (mixadv.CVaR(level=0.5), 3),
        (mixadv.CVaR(level=0.01), 1),
        (mixadv.ChiSquare(ball=0.0), 6),
        (mixadv.ChiSquare(ball=99.0), 1),
    ],
    ids=str,
)
def test_effective_rows_are_those_that_count(solver: mixadv.Solver, rows: float):
    player = small(reduction="none")
    for _ in range(2):
        optimizer = wrapped(player, solver)
        optimizer.step(player.closure())
        assert float(optimizer.outcome.effective_rows) == pytest.approx(rows)
        assert "mixed over the rows" in str(optimizer.game.explain())


# What cannot be ----------------------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("how", WAYS)
def test_one_loss_for_all_rows_is_refused_and_leaves_no_trace(cls: type[mixadv.Solver], how: str):
    player = small()
    optimizer = wrapped(player, cls())
    before = fingerprint(player.model, optimizer)
    with pytest.raises(mixadv.GameError, match=r"one loss for all.*reduction='none'.*Trainer"):
        getattr(optimizer if how == "step" else optimizer.game, how)(player.closure())
    assert_same(fingerprint(player.model, optimizer), before)


WRONG: dict[str, tuple[Any, str]] = {
    "missing": (None, r"3 groups, and which row belongs to which was not said: give groups="),
    "too few": (GROUPS[:4], r"groups= has the shape \[4\] and the closure returned 6 losses"),
    "beyond": (GROUPS + 1, r"numbers from 1 to 3.*weighs 3 groups, 0 to 2.*groups=4"),
    "negative": (GROUPS - 1, r"numbers from -1 to 1"),
    "fractions": (GROUPS.double(), r"must be a LongTensor \[B\].*float64 tensor \[6\]"),
    "Booleans": (GROUPS > 0, r"must be a LongTensor"),
    "a list": ([0, 1, 1, 2, 0, 1], r"must be a LongTensor \[B\].*got \[0, 1, 1"),
    "one hot": (F.one_hot(GROUPS), r"must be a LongTensor \[B\].*\[6, 3\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_groups_that_fit_no_rows_are_refused_and_leave_no_trace(case: str):
    groups, said = WRONG[case]
    optimizer, player = dro()
    before = fingerprint(player.model, optimizer)
    with pytest.raises(mixadv.GameError, match=said):
        optimizer.step(player.closure(), groups=groups)
    assert_same(fingerprint(player.model, optimizer), before)
    optimizer.step(player.closure(), groups=GROUPS)
    check = case in ("beyond", "negative")  # of which later rounds read nothing unless told to
    with pytest.raises(mixadv.GameError, match=said):
        optimizer.step(player.closure(), groups=groups, check=check)


def test_groups_are_refused_where_nobody_weighs_them():
    player = small(reduction="none")
    for solver in (mixadv.PGD(), mixadv.CVaR()):
        with pytest.raises(mixadv.GameError, match=r"weighs no groups: leave groups= out"):
            wrapped(player, solver).step(player.closure(), groups=GROUPS)
    with pytest.raises(mixadv.GameError, match=r"without a closure plays no round of .*groups="):
        dro()[0].step(groups=GROUPS)
    with pytest.raises(mixadv.GameError, match=r"takes no adversary=.*learner's own losses"):
        wrapped(player, mixadv.CVaR()).step(player.closure(), adversary=player.closure())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mixadv.CVaR(level=0), r"level must be above 0"),
        (lambda: mixadv.CVaR(level=1.5), r"level must be finite and between 0 and 1"),
        (lambda: mixadv.ChiSquare(ball=-1), r"ball must be finite and at least 0"),
        (lambda: mixadv.GroupDRO(groups=0), r"groups must be at least 1"),
        (lambda: mixadv.GroupDRO(groups=2, counts=(3,)), r"counts must be 2 numbers of rows"),
        (lambda: mixadv.GroupDRO(groups=1, counts=(0,)), r"each of counts must be at least 1"),
        (lambda: mixadv.GroupDRO(size_adjustment=1.0), r"size_adjustment= divides.*give counts="),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, said: str):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_state_of_other_groups_is_refused():
    optimizer, player = dro()
    optimizer.step(player.closure(), groups=GROUPS)
    other = wrapped(player, mixadv.GroupDRO(groups=4))
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(mixadv.GameError, match=r"weights of 3 groups, and GroupDRO weighs 4"):
        other.step(player.closure(), groups=GROUPS)


# Evaluation --------------------------------------------------------------------------------------


GROUPED = {"correct": [True, True, False, True, False], "groups": ["a", "a", "b", "b", "c"]}


def test_accuracy_by_group_is_that_of_its_rows():
    found = accuracy_by_group(**GROUPED)
    assert {n: x["rows"] for n, x in found["groups"].items()} == {"a": 2, "b": 2, "c": 1}
    values = {n: x["accuracy"]["value"] for n, x in found["groups"].items()}
    assert values == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert found["worst"] == "c"
    for name, own in found["groups"].items():
        right = [c for c, g in zip(*GROUPED.values(), strict=True) if g == name]
        assert own["accuracy"] == bootstrap(right)._asdict()
    with pytest.raises(ValueError, match="of the same rows"):
        accuracy_by_group([True], ["a", "b"])


def test_an_evaluation_has_each_group_and_compares_the_worst():
    data = {**rows_of(0), "team": [i % 3 for i in range(40)]}
    twins = {**rows_of(1, 25), "team": ["even" if i % 2 else "odd" for i in range(25)]}
    how: dict[str, Any] = {"radii": (), "increase_radius": None, "progress": False}
    models = {"one": classifier(0), "other": classifier(1)}
    reports = {
        name: evaluate(
            model, word_tokenizer(), data, groups="team", shifted={"twins": twins}, name=name, **how
        )
        for name, model in models.items()
    }
    sections = reports["one"].sections
    right = np.array(sections["clean"]["per row"]["correct"])
    teams = np.array(data["team"])
    own = {str(t): float(right[teams == t].mean()) for t in range(3)}
    found = sections["clean"]["by group"]
    assert {n: x["accuracy"]["value"] for n, x in found["groups"].items()} == pytest.approx(own)
    assert own[found["worst"]] == min(own.values())
    assert set(sections["shifted"]["twins"]["by group"]["groups"]) == {"even", "odd"}
    for text in (str(reports["one"]), reports["one"].markdown()):
        assert "Accuracy by group, worst first" in text
    table = compare(reports)
    assert "clean worst group %" in table
    assert "twins worst group %" in table
    assert f"{100 * min(own.values()):.1f}" in table
    assert json.loads(reports["one"].json())["clean"]["by group"] == found


def test_worst_groups_are_told_under_each_attack_of_the_rows_attacked():
    """Of a model by PGD and by words, of a mixture by its ways, from the records of each row."""
    team = [f"t{i % 3}" for i in range(40)]
    data = {**rows_of(0), "team": team}
    how: dict[str, Any] = {"radii": (0.3,), "increase_radius": None, "steps": 2, "restarts": 1}
    how |= {"attacks": {"similar": ATTACK}, "rows": 20, "groups": "team", "progress": False}
    one = classifier(0)
    reports = {
        "one": evaluate(one, word_tokenizer(), data, **how),
        "two": evaluate(Mixture([one, classifier(1)]), word_tokenizer(), data, **how),
    }
    for name, report in reports.items():
        sections = report.sections
        own = np.array(team)[sections["about"]["attacked"]]
        words = sections["attacks"]["similar"]
        right = [row["before"] == row["label"] == row["after"] for row in words["per row"]]
        columns = {"under similar": (right, words["by group"])}
        if name == "one":
            pgd = sections["radii"]
            columns["PGD 0.3"] = pgd["per row"]["correct"][1], pgd["by group"][1]
        else:
            [rows], [shares] = (
                sections["mixture"]["per row"],
                [sections["mixture"]["probabilities"]],
            )
            each = [np.array(rows["right"]) @ shares, *np.moveaxis(np.array(rows["settled"]), 2, 0)]
            ways = ("a member drawn", "mean", "vote")
            for way, column in enumerate(each):
                worst = np.array(rows["worst"])[:, way, None]
                there = np.take_along_axis(column, worst, 1)[:, 0]
                found = sections["mixture"]["by group"][0][way]
                columns[f"{ways[way]} within 0.3"] = there, found
        for attack, (column, found) in columns.items():
            means = {str(t): float(np.array(column)[own == t].mean()) for t in set(own)}
            told = {t: x["accuracy"]["value"] for t, x in found["groups"].items()}
            assert told == pytest.approx(means)
            assert means[found["worst"]] == min(means.values())
            assert f"{attack} worst group %" in compare({name: report})
            assert attack in report.table().split("Accuracy of the worst group")[1]
    again = Report(json.loads(reports["two"].json()))
    assert again.markdown() == reports["two"].markdown()


def test_groups_that_the_data_lack_are_refused_before_any_pass():
    how: dict[str, Any] = {"radii": (), "increase_radius": None, "progress": False}
    with pytest.raises(DataError, match=r"has no column 'team'"):
        evaluate(classifier(), word_tokenizer(), rows_of(0), groups="team", **how)
    data = {**rows_of(0), "team": [0.5] * 40}
    with pytest.raises(DataError, match=r"row 1: team is 0.5, and a group has a name or a number"):
        evaluate(classifier(), word_tokenizer(), data, groups="team", **how)


@pytest.mark.parametrize("cls", [mixadv.CVaR, mixadv.ChiSquare])
def test_an_empty_batch_is_said(cls: Any):
    model = nn.Linear(2, 2)
    optimizer = mixadv.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, cls())
    x, y = torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
    with pytest.raises(mixadv.GameError, match="returned no losses: its batch is empty"):
        optimizer.step(lambda: F.cross_entropy(model(x), y, reduction="none"))
