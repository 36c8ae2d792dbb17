"""The benchmark measures what it says: floors, equal work, memory; it keeps and prints results."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import benchmark
import mixadv
from benchmark_parts import checks, contenders, measure, picture, results, scaling
from benchmark_parts.contenders import CONTENDERS
from benchmark_parts.picture import Point
from benchmark_parts.work import PARTS, Setting, Work
from mixadv.round.cost import count_passes

SECONDS = st.floats(0.1, 10)
COUNTS = ["forwards", "delta_backwards", "theta_backwards", "branches", "steps", "draws"]
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap on a CPU
ROWS = ["r3f", "smart, no teacher", "smart-pytorch", "mat, 3 and 2", "straightforward mat"]


@pytest.fixture(scope="module")
def work() -> Work:
    return Work(Setting("tiny", 2, 6))


def options(output: Path, *more: str) -> list[str]:
    return ["--quick", "--sizes", "2x16", "--rounds", "1", "--output", str(output), *more]


# Floors ------------------------------------------------------------------------------------------


def units(f: float, bx: float, bw: float, o: float, n: float) -> dict[str, float]:
    return {"F": f, "A": f + bx, "S": f + bx + bw + o, "O": o, "N": n}


@given(*[SECONDS] * 5)
def test_floors_are_those_of_the_cost_model(f, bx, bw, o, n):
    one = units(f, bx, bw, o, n)
    full, ascent = bx + bw, f + bx
    expected = {
        "noise": f + full + o,
        "fgm": 2 * (f + full) + o,
        "pgd, K=3": 3 * ascent + f + full + o,
        "freelb, K=3": 3 * (f + full) + o,
        "freeat, m=3": 3 * (f + full + o),
        "smart, no teacher": ascent + 2 * (f + full) + o,
        "smart, no teacher, K=3": 3 * ascent + 2 * (f + full) + o,
        "smart": ascent + 3 * f + 2 * full + o,
        "mat, 3 and 2": 3 * ascent + 4 * (f + full) + 2 * (o + n),
        "mat, path": 3 * ascent + 4 * (f + full) + 2 * (o + n),
        "mat, defaults": 2 * ascent + 4 * (f + full) + 2 * (o + n),
    }
    for name, seconds in expected.items():
        counts = measure.counted(name, coordinates=12)
        assert measure.floor(one, counts) == pytest.approx(seconds), name


@given(st.lists(st.integers(0, 9), min_size=len(COUNTS), max_size=len(COUNTS)), *[SECONDS] * 5)
def test_floors_add_up_over_rounds(counts, f, bx, bw, o, n):
    one, once = units(f, bx, bw, o, n), dict(zip(COUNTS, counts, strict=True))
    twice = {name: 2 * count for name, count in once.items()}
    assert measure.floor(one, twice) == pytest.approx(2 * measure.floor(one, once))


def test_an_ordinary_step_is_its_own_floor():
    one = units(1.0, 2.0, 3.0, 0.5, 9.0)
    assert measure.floor(one, measure.counted("noise", 12)) == one["S"]


@pytest.mark.parametrize("name", [n for n, c in CONTENDERS.items() if c.enter is contenders.ours])
def test_rounds_have_the_passes_that_their_floor_counts(name):
    piece = Work(Setting("tiny", 2, 6))
    solver = CONTENDERS[name].solver(piece.coordinates)
    optimizer = mixadv.wrap(piece.adamw(), piece.model, solver)
    contenders.step(piece, optimizer)
    outcome, counted = optimizer.outcome, count_passes(solver)
    assert outcome is not None
    for passes in ("forwards", "delta_backwards", "theta_backwards", "steps"):
        assert getattr(outcome, passes) == getattr(counted, passes), passes


# Equal work --------------------------------------------------------------------------------------


def test_those_who_are_compared_compute_the_same():
    assert all(error <= checks.TOLERANCE for error in checks.assert_equivalent().values())


def test_what_differs_is_not_timed(monkeypatch, tmp_path, capsys):
    right = checks.straightforward_mat.normalised
    monkeypatch.setattr(checks.straightforward_mat, "normalised", lambda x: 1.001 * right(x))
    assert benchmark.main(options(tmp_path)) == 2
    assert "mat against straightforward mat: they differ by" in capsys.readouterr().err
    assert not (tmp_path / "benchmark.jsonl").exists()


def test_every_row_plays_in_the_same_ball(work):
    for name, contender in CONTENDERS.items():
        work.reset()
        player = contender.enter(work, contender.solver(work.coordinates))
        work.reset()
        player.play(None)
        work.reset()
        points, weights = player.strategy()
        lengths = points.flatten(2).norm(dim=2) / work.unit
        assert lengths.max() <= contenders.RADIUS * (1 + 1e-4), name
        torch.testing.assert_close(weights.sum(0), torch.ones_like(weights.sum(0)))


def test_every_round_starts_from_the_same_weights(work):
    work.step()
    assert any(not torch.equal(p, q) for p, q in zip(work.parameters, work.initial, strict=True))
    work.reset()
    assert all(torch.equal(p, q) for p, q in zip(work.parameters, work.initial, strict=True))
    assert all(p.grad is None and p.requires_grad for p in work.parameters)


def test_gradient_of_an_ascent_is_that_of_delta(work):
    work.reset()
    delta = torch.zeros_like(work.embed()).requires_grad_()
    expected = torch.autograd.grad(work.perturbed(delta).loss, delta)[0]
    torch.testing.assert_close(work.ascent(), expected)


# Measuring ---------------------------------------------------------------------------------------


def test_peak_is_what_is_held_at_once():
    kept = [torch.empty(1000, dtype=torch.uint8)]

    def replace() -> None:
        kept[0] = torch.empty(4_000_000, dtype=torch.uint8)

    def play() -> None:
        first = torch.empty(8_000_000, dtype=torch.uint8)
        del first
        second = torch.empty(5_000_000, dtype=torch.uint8)
        kept[0] = second[:0]  # frees the 4 MB of the warm-up
        third = torch.empty(6_000_000, dtype=torch.uint8)
        del third

    assert measure.peak("cpu", replace, play) == 8_000_000


@given(st.integers(1, 9), st.integers(0, 3))
def test_parts_surround_the_rows_and_every_second_round_is_reversed(many, number):
    rows = [f"row {i}" for i in range(many)]
    order = measure.turns(rows, list(PARTS), number)
    assert sorted(order) == sorted([*rows, *PARTS * measure.BLOCKS])
    assert order == measure.turns(rows, list(PARTS), number + 1)[::-1]
    assert {*order[: len(PARTS)], *order[-len(PARTS) :]} == {*PARTS}


@given(st.floats(-2, 2), st.floats(0.1, 10))
def test_exponents_are_those_of_power_laws(exponent, factor):
    values = [1.0, 2.0, 4.0, 8.0]
    found = scaling.fitted(values, [factor * v**exponent for v in values])
    assert found == pytest.approx((exponent, factor), abs=1e-9)


def test_scaling_prints_an_exponent_for_each_axis(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "VALUES", {"batch": (2, 4), "particles": (1, 2)})
    monkeypatch.setattr(scaling, "WIDTH", 32)
    assert benchmark.main(["--scaling", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == [
        *scaling.played("batch"),
        *scaling.played("particles"),
    ]
    assert all(math.isfinite(float(line.split(" | ")[-1].strip(" |"))) for line in lines)


def test_a_row_that_cannot_be_played_is_told_of_and_left_out(tmp_path, capsys):
    names = ["--rows", "noise", "mat, M=8, stack"]
    assert benchmark.main(options(tmp_path, "--dropout", "0.1", *names)) == 0
    assert [r["row"] for r in results.load(tmp_path / "benchmark.jsonl")] == ["noise"]
    assert "mat, M=8, stack is left out" in capsys.readouterr().err


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Return the folder of a quick run of few rows on the tiny model."""
    folder = tmp_path_factory.mktemp("benchmark")
    assert benchmark.main(options(folder, "--rows", *ROWS)) == 0
    return folder


def test_quick_run_writes_rows_a_table_and_a_picture(measured, capsys):
    found = results.load(measured / "benchmark.jsonl")
    assert [r["row"] for r in found] == ROWS
    assert all(len(r["seconds"]) == 1 and min(r["seconds"]) > 0 and r["peak"] > 0 for r in found)
    assert (measured / "benchmark.png").stat().st_size > 1000
    assert benchmark.main(["--report", "--output", str(measured)]) == 0
    printed = capsys.readouterr().out
    for name in ROWS:
        assert f"| {name} |" in printed
    assert "- mat, 3 and 2 ÷ straightforward mat: time" in printed


def test_a_row_that_is_measured_again_is_replaced(measured, tmp_path):
    path = tmp_path / "benchmark.jsonl"
    results.store(path, results.load(measured / "benchmark.jsonl"))
    again = {**results.load(path)[1], "seconds": [7.0]}
    results.store(path, [again])
    found = results.load(path)
    assert [r["row"] for r in found] == ROWS
    assert found[1]["seconds"] == [7.0]


def test_what_is_measured_already_is_left_out_on_resume(measured, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured again"))
    assert benchmark.main(options(measured, "--resume", "--rows", *ROWS)) == 0


def test_table_divides_by_the_step_and_the_floor_of_the_same_round():
    one = {"F": [1.0, 2.0], "A": [2.0, 4.0], "S": [4.0, 8.0], "O": [0.0, 0.0], "N": [1.0, 1.0]}
    result = {**vars(Setting("tiny", 2, 16)), "row": "noise", "seconds": [6.0, 12.0], "units": one}
    result |= {"passes": measure.counted("noise", 1), "plain_peak": 2**20, "kept": 2**21}
    result |= {"peak": 2**19, "payoff": 0.25}
    expected = "| noise | 9 | 1.50 | 1.50 [1.50, 1.50] | 0.50 | 2 | 0.25 |"
    assert results.table([result]).splitlines()[-1] == expected
    assert json.loads(json.dumps(result)) == result


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=12))
def test_no_row_beats_one_of_the_front(pairs):
    rows = [Point(str(i), *pair) for i, pair in enumerate(pairs)]
    best = picture.front(rows)
    for p, q in itertools.product(best, rows):
        assert p == q or not (q.cost <= p.cost and q.reached >= p.reached) or p[1:] == q[1:]
    for row in rows:
        assert any(p.cost <= row.cost and p.reached >= row.reached for p in best)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sizes", "16by128"], "a size is batch x length, such as 16x128, got 16by128"),
        (["--sizes", "1x8"], "a size has 2 rows or more, of at most 512 tokens, got 1x8"),
        (["--rows", "mad"], "there is no row 'mad'; there are noise"),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--dropout", "1"], "--dropout must be in [0, 1), got 1"),
    ],
)
def test_bad_options_are_refused_with_what_to_change(given, said, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(given)
    assert said in capsys.readouterr().err


def test_a_line_that_is_no_result_is_named(tmp_path, capsys):
    (tmp_path / "benchmark.jsonl").write_text('{"row": "noise"}\n')
    assert benchmark.main(["--report", "--output", str(tmp_path)]) == 2
    assert "line 1 is not a result of this script" in capsys.readouterr().err
