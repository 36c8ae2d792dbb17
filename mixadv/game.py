"""The game: model, site and solver, and the state of both players."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.checks import check_backward
from mixadv.errors import GameError
from mixadv.model.closure import Closure, parse_output
from mixadv.model.compiled_site import place
from mixadv.model.contexts import no_grad
from mixadv.model.logits import logits_in
from mixadv.model.masks import Where
from mixadv.model.modules import functional
from mixadv.model.representation import Representation
from mixadv.model.site import Site
from mixadv.players.strategy import Strategy
from mixadv.round import validate
from mixadv.round.arena import Arena, Units, train
from mixadv.round.carried import carried
from mixadv.round.explain import Explanation, explain
from mixadv.round.goals import Goals
from mixadv.round.outcome import Outcome
from mixadv.round.rounds import Rounds
from mixadv.round.schedule import Schedule
from mixadv.solvers.base import Solver
from mixadv.solvers.weights import WeightsSolver


class Game:
    """Plays a solver's rounds on a model.

    **Goals of their own.** `adversary=` of `step`, `backward` and `loss` is a closure whose result
    the adversary maximises in place of the learner's loss; the game is then general-sum. What is
    between them is δ, of which there is one: it lies on the positions of `where` (or at real
    tokens), and every call of the model in both closures meets it there, the i-th of these
    positions in row b with the same δ. So continuations after a prompt may differ, in length and
    padding, and `adversary` may add up the losses of several models that share the site. A call of
    k·B rows, chosen answers followed by rejected ones, meets the δ of B rows k times over. The
    first round checks that the model reads the same there. `adversary=closure` is the zero-sum game
    with one δ for all calls.

    `retain=` is a closure whose loss the learner minimises besides, at δ = 0: its gradient is added
    in each optimizer step. Random state and buffers end as after `closure` alone.

    Args:
        model: the module that closures call.
        solver: how a round is played; a name such as "mat" plays at the defaults.
        site: where δ acts; see `mixadv.model.site.Site`.
        seed: of the players' draws.
        schedule: when the adversary plays; None is always.
        optimizer: needed by solvers with a learner part; `mixadv.wrap` gives it.

    Attributes:
        solver: the solver.
        learner: what happens to θ after a step, None where that is nothing.
        rounds: plays them; for code that extends the library.

    Example:
        >>> import mixadv
        >>> model = nn.Linear(2, 3)
        >>> x, y = torch.eye(2), torch.tensor([0, 2])
        >>> game = mixadv.Game(model, mixadv.FreeLB(steps=2))
        >>> outcome = game.backward(lambda: nn.functional.cross_entropy(model(x), y))
        >>> outcome.forwards, model.weight.grad.shape
        (2, torch.Size([3, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        solver: Solver | str,
        site: Any = None,
        *,
        seed: int = 0,
        schedule: Schedule | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        solver = validate.solver_of(solver)
        validate.check_game_arguments(model, solver, site, optimizer, seed, schedule)
        self.solver = solver
        self.learner = solver.learner()
        weights = solver if isinstance(solver, WeightsSolver) else None
        played = solver.on_inputs
        read = Representation(model, solver.reads) if solver.reads else None
        at, learner = place(model, site, played.perturbs), self.learner
        arena = Arena(model, played, at, seed, optimizer, learner, read, weights)
        for module in solver.modules().values():
            assert optimizer is not None
            train(optimizer, module)
        if self.learner is not None:
            assert optimizer is not None
            self.learner.bind(optimizer, seed)
        self.rounds = Rounds(arena, schedule or Schedule())

    @property
    def model(self) -> nn.Module:
        """The module that closures call."""
        return self.rounds.arena.model

    @property
    def site(self) -> Site:
        """Where δ acts."""
        return self.rounds.arena.site

    @property
    def optimizer(self) -> Optimizer | None:
        """The base optimizer, None where the game knows none."""
        return self.rounds.arena.optimizer

    @property
    def unit(self) -> Units | None:
        """Mean L2 norm of a real token's output at the site, or by name at each of its modules."""
        return self.rounds.arena.calibration.unit

    @property
    def round(self) -> int:
        """How many rounds were played."""
        return self.rounds.round

    @property
    def outcome(self) -> Outcome | None:
        """What the last round came to; None before the first."""
        return self.rounds.outcome

    @property
    def strategy(self) -> Strategy | None:
        """What the adversary played in the last round, without gradients."""
        return None if self.rounds.ending is None else self.rounds.ending.strategy

    def backward(
        self,
        closure: Closure,
        backward: Callable[[Tensor], object] | None = None,
        *,
        check: bool = False,
        where: Where = None,
        adversary: Closure | None = None,
        retain: Closure | None = None,
        groups: Tensor | None = None,
    ) -> Outcome:
        """Play a round up to the optimizer step; gradients are in `.grad` as after a backward.

        Args:
            closure: runs the forward pass and returns the loss, or loss and predictions; or a list,
                one for each micro-batch of an update; see `GameOptimizer.step`.
            backward: called with each objective in place of its `.backward()`
                (`accelerator.backward`, `lambda loss: scaler.scale(loss).backward()`); not one of
                DeepSpeed, which takes a batch for each.
            check: validate this round as the first one is.
            where: where δ may act, for this round: a mask with the leading sizes of what the site
                returns, one for each call, or a function of the call; None is at real tokens.
                With `adversary`, one for each closure too: `{"closure": …, "adversary": …}`.
            adversary: runs forward passes and returns what the adversary maximises: anything that
                `closure` may return. One δ then acts in all calls of both; see the class.
            retain: returns what the learner minimises too, at δ = 0.
            groups: the group of each row, a LongTensor `[B]`, for a solver that weighs groups.

        A loss that the closure divides itself leaves a divergence undivided: where micro-batches
        are accumulated, divide in `backward`, `lambda loss: (loss / 4).backward()`.

        Raises:
            GameError: if the round cannot be played. Weights are as before; gradients that were
                delivered before it broke stay added.
        """
        self._refuse_replays()
        if backward is not None:
            check_backward(backward)
        opened = self.rounds.open(closure, check, where, adversary, retain, groups)
        with torch.enable_grad(), opened as update:
            return self.rounds.finish(update, next(update.turns(backward)), 1).outcome

    def loss(
        self,
        closure: Closure,
        *,
        check: bool = False,
        where: Where = None,
        adversary: Closure | None = None,
        retain: Closure | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Play a round and return a loss whose backward delivers the round's whole gradient.

        Its value is the round's objective. Earlier passes are differentiated here and their
        gradients ride along, so accumulation, loss scaling and DDP act on it as on any loss. With
        gradients disabled this is the plain loss. Arguments are those of `backward`.
        """
        if not torch.is_grad_enabled():
            validate.check_closure(closure)
            return parse_output(closure()).objective
        self._refuse_replays()
        with self.rounds.open(closure, check, where, adversary, retain, groups) as update:
            result = carried(update)
            self.rounds.finish(update, result.detach(), 1)
            return result

    def _refuse_replays(self) -> None:
        solver = self.rounds.arena.solver
        if solver.replays_batch:
            raise GameError(
                f"{type(solver).__name__} takes an optimizer step after each of its passes "
                "over one batch, which a loop that owns the step cannot: call "
                "optimizer.step(closure) of the wrapped optimizer."
            )

    def explain(
        self,
        closure: Closure | None = None,
        *,
        where: Where = None,
        adversary: Closure | None = None,
        retain: Closure | None = None,
    ) -> Explanation:
        """Return what a round will do: site, unit, absolute radius, who mixes, passes and cost.

        Args:
            closure: measures the unit by one forward pass that leaves no trace, of several
                processes on this one; without it the embedding's rows estimate the unit at first.
            where: as in `backward`; with a closure alone.
            adversary: likewise.
            retain: likewise.
        """
        goals = None if closure is None else Goals(closure, adversary, retain, where)
        if goals is not None:
            validate.check_goals(goals, self.rounds.arena.solver)
        return explain(self.rounds.arena, goals, self.outcome)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap in the running average of θ over closed rounds, for evaluation.

        Before a round has closed, evaluation runs at the weights there are.
        """
        learner = self.learner
        if learner is None or learner.average_decay is None:
            raise GameError(
                f"{type(self.solver).__name__} keeps no average of θ: build the solver with "
                "average='uniform', or evaluate the weights as they are."
            )
        if self.rounds.busy:
            raise GameError("averaged() swaps weights: use it between rounds, not within one.")
        with learner.averaged(self.model):
            yield

    @property
    def learner_samples(self) -> list[dict[str, Tensor]]:
        """The last R samples of θ by parameter name, oldest first."""
        return [self.rounds.arena.named(sample) for sample in self._samples()]

    def mixture(self, forward: Callable[[], Any]) -> Tensor:
        """Return the log-probabilities of the mixture of the kept learner samples, `[B, C]`.

        Args:
            forward: runs the model and returns logits, or what holds them, as closures do.
        """
        probabilities = []
        with no_grad():
            for sample in self._samples():
                logits = logits_in(functional(self.model, sample, forward)())
                wide = torch.promote_types(logits.dtype, torch.float32)
                probabilities.append(logits.to(wide).log_softmax(-1))
        return torch.stack(probabilities).logsumexp(0) - math.log(len(probabilities))

    def teacher(self) -> dict[str, Tensor]:
        """Return the teacher's weights by parameter name; GameError where the solver has none."""
        if self.learner is None or self.learner.ema_decay is None:
            who = type(self.solver).__name__
            raise GameError(f"{who} as it was built keeps no teacher; mixadv.SMART() does.")
        return self.rounds.arena.named(self.learner.teacher_weights())

    def _samples(self) -> list[dict[Tensor, Tensor]]:
        kept = [] if self.learner is None else [*self.learner.samples]
        if not kept:
            raise GameError(
                "The game keeps no samples of θ yet: build the solver with samples=8 and play at "
                f"least one round ({type(self.solver).__name__} so far played {self.round})."
            )
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: seed and round of the draws, the unit, what the solver keeps.

        Tensors refer to the live ones, like those of any state dict.
        """
        return self.rounds.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.rounds.load_state_dict(state)

    def close(self) -> None:
        """Remove every hook the game has placed on model and optimizer."""
        self.rounds.close()
