"""The example that tries cheaper ascents runs, and its ways end where they say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ascents_tried as tried
import directions
import mixadv
from tests import zoo

KEPT = torch.empty(0)
INTENTS = Path(tried.__file__).parent.parent / "data" / "intents"


@contextmanager
def rehearsed(dropout: bool = True) -> Iterator[mixadv.Stage]:
    """Open a round on a tiny encoder, in float64; its clean pass is run."""
    model, batch, forward = zoo.player("bert", rows=4)
    model.double().train(dropout)
    game = mixadv.Game(model, mixadv.ALUM(radius=0.3, step_size=0.2, start_size=0.1))
    with game.rounds.rehearse(lambda: forward(model, batch)) as stage:
        stage.clean()
        yield stage


def ends(way: tried.Way, kept: Tensor = KEPT, dropout: bool = True) -> Tensor:
    """Return where a way ends, `[B, n, d]`."""
    with rehearsed(dropout) as stage:
        return way(stage, kept).points[0][0]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_an_inner_step_where_p_was_found_is_the_ordinary_step(family: str):
    model, batch, forward = zoo.player(family, rows=4)
    model.double()
    game = mixadv.Game(model, mixadv.ALUM(radius=0.3, step_size=0.2))
    layers = len(tried.layers_of(model))
    with game.rounds.rehearse(lambda: forward(model, batch)) as stage:
        q, pulls = stage.start(game.solver), []
        with tried.listening(model, lambda output: output.register_hook(pulls.append)):
            _, _, expected = stage.payoffs(q, tried.PAYOFF, game.solver)
        later = []
        tried.layers_of(model)[1].register_forward_hook(lambda *_: later.append(1))
        found = tried.inner_gradients(stage, q, pulls[0])
        assert not later
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert found[0].abs().max() > 0
        steps = [stage.move(q, game.solver, g).points[0] for g in (found, expected)]
        torch.testing.assert_close(*steps)
    assert len(tried.layers_of(model)) == layers
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_without_inner_steps_it_is_the_ordinary_ascent():
    plain = ends(tried.gradient(2))
    torch.testing.assert_close(ends(tried.first_layer(2, 0)), plain)
    assert not torch.allclose(ends(tried.first_layer(2, 1)), plain)


def test_a_stride_is_the_length_of_a_step():
    starts = ends(tried.gradient(0))
    lengths = [(ends(tried.gradient(1, s)) - starts).flatten(1).norm(dim=1) for s in (0, 0.5, 1)]
    for stride, length in zip((0, 0.5, 1), lengths, strict=True):  # none meets the ball
        torch.testing.assert_close(length, torch.full_like(length, 0.2 * stride))


def test_a_warm_start_goes_on_from_where_the_ascent_ended():
    one = ends(tried.gradient(1))
    torch.testing.assert_close(ends(tried.warm(0), one), one)
    torch.testing.assert_close(ends(tried.warm(1), one), ends(tried.gradient(2)))
    torch.testing.assert_close(ends(tried.warm(0, 0.5), one), 0.5 * one)


def test_without_dropout_the_ascent_is_that_of_evaluation_mode():
    quiet = ends(tried.gradient(2), dropout=False)
    torch.testing.assert_close(ends(tried.elsewhere(2, training=False)), quiet)
    others = [ends(tried.gradient(2)), ends(tried.elsewhere(2, training=True))]
    assert not any(torch.allclose(quiet, other) for other in others)
    assert not torch.allclose(*others)
    with rehearsed() as stage:
        tried.elsewhere(1, training=False)(stage, KEPT)
        assert all(module.training for module in stage.arena.model.modules())


@pytest.mark.slow
def test_it_trains_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    few = {name: tried.WAYS[name] for name in (tried.BASELINE, "warm start, K=1")}
    monkeypatch.setattr(tried, "WAYS", few)
    monkeypatch.setattr(tried, "RADII", (0.1,))
    for split in ("train", "test"):  # and no dev rows, as some tasks have none
        rows = (INTENTS / "train.jsonl").read_text().splitlines()[:32]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    given = ["--task", "few", "--data", str(tmp_path), "--updates", "1", "--rows", "16"]
    given += ["--output", str(tmp_path / "runs")]
    assert tried.main(given) == 0
    head, _, first, second = capsys.readouterr().out.strip().splitlines()
    assert head == "| way | 0.1 | time | KiB kept per row |"
    assert first == f"| {tried.BASELINE} | 1.00 | 1.00 | 0 |"
    assert float(second.split("|")[-2]) > 0
    assert len((tmp_path / "runs" / "few.jsonl").read_text().splitlines()) == 2


def test_the_rows_go_to_a_folder_of_their_own():
    assert directions.arguments([]).output == Path("runs/directions")
    assert tried.arguments([]).output == Path("runs/ascents_tried")
