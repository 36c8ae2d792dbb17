"""The example that compares ascents of a divergence runs, and its table says what it measured."""

from pathlib import Path

import pytest

import directions


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


def test_the_table_is_relative_to_one_step():
    rows = [
        {"ascent": name, "radius": r, "divergence": d, "towards": 0.5, "changed": 0.25, "time": 2.0}
        for r in (0.1, 0.2)
        for name, d in zip(directions.ASCENTS, range(1, 99), strict=False)
    ]
    lines = directions.table(rows).splitlines()
    assert lines[2] == "| gradient, K=1, any | 1.00 | 1.00 | 50 % | 25 % | 2.00 |"
    assert lines[3].split("|")[2:4] == [" 2.00 ", " 2.00 "]
