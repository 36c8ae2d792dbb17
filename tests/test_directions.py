"""The example that compares ascents of a divergence runs, and its table says what it measured."""

import json
from pathlib import Path

import pytest

import directions


@pytest.mark.slow
def test_it_trains_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    few = {name: directions.ASCENTS[name] for name in list(directions.ASCENTS)[::5]}
    monkeypatch.setattr(directions, "ASCENTS", few)
    monkeypatch.setattr(directions, "RADII", (0.1,))
    given = ["--updates", "1", "--rows", "16", "--output", str(tmp_path)]
    assert directions.main(given) == 0
    head, _, first, *rest = capsys.readouterr().out.strip().splitlines()
    assert head.startswith("| ascent, sign | 0.1 | towards |")
    assert first.startswith("| gradient, K=1, any | 1.00 |")
    assert len(rest) == len(few) - 1
    assert (tmp_path / "intents.jsonl").exists()


def test_kept_tasks_are_reported_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for task, gain in [("one", 2.0), ("two", 3.0)]:
        rows = [
            {"ascent": name, "radius": r, "divergence": gain if number else 1.0, "time": 0.5}
            for r in directions.RADII
            for number, name in enumerate(directions.ASCENTS)
        ]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert directions.main(["--report", "--output", str(tmp_path)]) == 0
    head, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert head == "| ascent, sign | one, 0.1 | one, 0.2 | two, 0.1 | two, 0.2 | time |"
    assert first.endswith("| 1.00 | 1.00 | 1.00 | 1.00 | 0.50 |")
    assert second.endswith("| 2.00 | 2.00 | 3.00 | 3.00 | 0.50 |")


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert directions.main(["--report", "--output", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_the_table_is_relative_to_one_step():
    rows = [
        {"ascent": name, "radius": r, "divergence": d, "towards": 0.5, "changed": 0.25, "time": 2.0}
        for r in (0.1, 0.2)
        for name, d in zip(directions.ASCENTS, range(1, 99), strict=False)
    ]
    lines = directions.table(rows).splitlines()
    assert lines[2] == "| gradient, K=1, any | 1.00 | 1.00 | 50 % | 25 % | 2.00 |"
    assert lines[3].split("|")[2:4] == [" 2.00 ", " 2.00 "]
