"""What must hold before anything is timed: those who are compared compute the same.

In float64, without dropout, on a small model, with the same noise.
"""

from collections.abc import Callable
from typing import Any

import torch
from smart_pytorch import SMARTLoss, kl_loss
from torch import Tensor

import mixadv
from benchmark_parts import straightforward_mat
from benchmark_parts.work import Setting, Work

TOLERANCE = 1e-9
"""Relative; rounding is 1e-16, of a few hundred operations."""

SEED = 0
SMALL = Setting("tiny", 6, 8)


class Drawn:
    """Noise that is the same for all who begin with the same seed."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def begin(self, player: str, round: int, rank: int | None = None) -> None:
        """Begin anew with the adversary, who draws first."""
        if player == "adversary":
            self.generator.manual_seed(SEED)

    def __call__(self, kind: str, like: Tensor) -> Tensor:
        """Return a normal draw shaped like a tensor."""
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


def small() -> Work:
    """Return a small piece of work in float64."""
    work = Work(SMALL)
    work.model.double()
    work.initial = [p.detach().double() for p in work.initial]
    work.parameters = list(work.model.parameters())
    work.reset()
    return work


def smart_error(work: Work, steps: int) -> float:
    """Return how far SMART's gradients and objective are from those by `smart-pytorch`.

    Played as the package plays: raw gradients, and each token rescaled to 1 in L∞.
    """
    start, step = 1e-2, 1000.0

    def peer() -> Tensor:
        output, embed = work.model(**work.batch), work.embed()
        logits = lambda embed: work.model(inputs_embeds=embed).logits  # noqa: E731
        words: dict[str, Any] = {"num_steps": steps, "step_size": step, "noise_var": start}
        regulariser = SMARTLoss(logits, loss_fn=kl_loss, epsilon=0.0, **words)
        torch.manual_seed(SEED)
        return output.loss + regulariser(embed, output.logits)

    solver = mixadv.SMART(
        steps=steps,
        step_size=step / work.setting.batch,  # ours climbs each sample's own payoff
        radius=1.0,
        start_size=start,
        divergence="kl",
        proximal_weight=0.0,
        normalize="none",
        projection="sphere",
        norm="linf",
        per="token",
        unit="absolute",
    )
    work.reset()
    game = mixadv.Game(work.model, solver)
    game.rounds.arena.noise = Drawn()  # pyright: ignore
    objective = game.backward(work.closure()).objective
    game.close()
    mine = [objective, *_gradients(work)]
    work.reset()
    objective = peer()
    objective.backward()
    return _error(mine, [objective.detach(), *_gradients(work)])


def mat_error(work: Work) -> float:
    """Return how far MAT's weights and δ are from the straightforward ones, after a round.

    The learner steps by plain gradient descent: Adam turns the sign of a zero into a whole step.
    """
    words: dict[str, Any] = {"steps": 3, "learner_steps": 2, "learner_temperature": 1e-4}
    pure: dict[str, Any] = {"particles": 1, "play_as": "mean", "step_size": 0.1}
    solver = mixadv.MAT(temperature=1e-4, **pure, **words)

    def weights(play: Callable[[torch.optim.Optimizer], Tensor]) -> list[Tensor]:
        work.reset()
        delta = play(torch.optim.SGD(work.parameters, lr=0.1))
        moves = zip(work.model.parameters(), work.initial, strict=True)
        return [delta, *[p.detach() - start for p, start in moves]]

    def ours(base: torch.optim.Optimizer) -> Tensor:
        optimizer = mixadv.wrap(base, work.model, solver)
        game, arena = optimizer.game, optimizer.game.rounds.arena
        arena.calibrate(unit=work.unit)
        arena.noise = noise = Drawn()  # pyright: ignore
        assert game.learner is not None
        game.learner.noise = noise  # pyright: ignore
        optimizer.step(work.closure())
        game.close()
        assert game.strategy is not None
        return game.strategy.points[0][0]

    def peer(base: torch.optim.Optimizer) -> Tensor:
        draw = Drawn()
        draw.begin("adversary", 0)
        return straightforward_mat.play(work.model, base, work.batch, solver, work.unit, draw)

    return _error(weights(ours), weights(peer))


def errors() -> dict[str, float]:
    """Return the relative errors of all comparisons."""
    work = small()
    found = {f"smart, K={k}, against smart-pytorch": smart_error(work, k) for k in (1, 3)}
    return {**found, "mat against straightforward mat": mat_error(work)}


def assert_equivalent() -> dict[str, float]:
    """Return the errors; raise if one is more than rounding.

    Raises:
        AssertionError: naming the comparison and its error.
    """
    found = errors()
    for name, error in found.items():
        if not error <= TOLERANCE:
            raise AssertionError(
                f"{name}: they differ by {error:.1e}, relative, in float64; a comparison of their "
                "times would mean nothing."
            )
    return found


def _gradients(work: Work) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in work.parameters]


def _error(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference over the largest entry of each; that of zeros counts as is."""
    largest = max(x.abs().max().item() for x in theirs[1:])
    errors = [(a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True)]
    return max(errors[0] / theirs[0].abs().max().item(), max(errors[1:]) / largest)
