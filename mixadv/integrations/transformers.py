"""Adversarial training inside `transformers.Trainer`: the game takes the place of the loss.

    class MyTrainer(Adversarial, SomeTrainer): ...

`compute_loss` returns `game.loss`, whose backward delivers the round's whole gradient, so Trainer's
own accumulation, loss scaling, clipping, logging and distribution act on it as on any loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixadv.errors import GameError
from mixadv.game import Game
from mixadv.model.private_torch import original
from mixadv.model.visits import Call
from mixadv.optimizer import STATE_KEY, wrap
from mixadv.round import validate
from mixadv.round.schedule import Schedule
from mixadv.solvers.base import Solver

try:
    from transformers import Trainer
    from transformers.trainer import OPTIMIZER_NAME

    from mixadv.integrations.deepspeed import GameAlone, check_deepspeed
    from mixadv.integrations.fsdp import check_fsdp, play
    from mixadv.integrations.states import OwnStates
    from mixadv.integrations.trainer import (
        Base,
        OwnColumns,
        Rounds,
        Share,
        check_columns,
        check_playable,
        column_missing,
        logged,
        wrapped,
    )
except ImportError as error:
    raise ImportError(
        "mixadv.integrations.transformers needs transformers and accelerate: "
        "pip install 'mixadv[transformers]'."
    ) from error


class Adversarial(OwnColumns, OwnStates, GameAlone, Base):
    """Mixin that makes any subclass of `Trainer` play a game; name it before the Trainer.

    A round is played per batch and one optimizer step follows: a MAT round closes every
    `learner_steps` optimizer steps, over successive batches. Micro-batches that are accumulated are
    one batch: what a solver adds to the loss is weighted as the loss is. At radius 0 training is
    Trainer's own, scale of the loss included.

    Trainer's log gets what the last round came to, read from the device only then: `clean_loss` at
    δ = 0; `payoff`, the loss or the divergence that the adversary was paid, in nats; `radius`, the
    mean length of the δ played in the units of the solver's own radius; `strategy_entropy` in nats,
    `effective_particles` and `nonfinite` rows; and of rows that are weighed the `worst_group`,
    `worst_group_weight` and `effective_rows`. Its `loss` is the objective.

    Evaluation and prediction run at the average of the learner where the solver keeps one, and
    `load_best_model_at_end` loads the weights that were evaluated. Checkpoints hold the live
    weights, which a resumed run goes on from; to export the average:

        with trainer.game.averaged():
            trainer.save_model("exported")

    A loss of one's own goes into `forward_pass`, not into `compute_loss`, or into a Trainer that
    the mixin is named before. NEFTune's noise counts into the unit of the radius. A reference model
    that is the model itself with its adapters off, as DPO's, would be perturbed too: have its
    log-probabilities computed beforehand.

    Args:
        arguments, keywords: of the Trainer. An optimizer among them is wrapped; one that is wrapped
            already brings its own solver, site and schedule.
        solver: how a round is played; not FreeAT, whose steps within a batch Trainer cannot take.
        site: where δ acts; None finds the input embedding that the encoder calls.
        schedule: when the adversary plays; None is always.
        where: where δ may act: the name of a column of the batch, 1 there, that the model does not
            get; or a function of the call. None is at real tokens. The collator has to keep the
            column and to pad it as it pads the ids.
        groups: for a solver that weighs groups: likewise the name of a column, that numbers them.
        evaluate_average: evaluate the learner's average, where there is one.

    Raises:
        TypeError, ValueError: for arguments that cannot be played with, and why.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(Adversarial):
            raise TypeError(f"Name Adversarial before the Trainer in the bases of {cls.__name__}.")

    def __init__(
        self,
        *arguments: Any,
        solver: Solver | str | None = None,
        site: Any = None,
        schedule: Schedule | None = None,
        where: str | Callable[[Call], Tensor] | None = None,
        groups: str | None = None,
        evaluate_average: bool = True,
        **keywords: Any,
    ) -> None:
        if solver is not None:
            solver = validate.solver_of(solver)
        self.where, self.groups = where, groups
        super().__init__(*arguments, **keywords)
        made = wrapped(self.optimizer)
        if made is None:
            validate.check_solver(solver)
        elif not (solver is None and site is None and schedule is None):
            raise ValueError(
                "The optimizer is wrapped already and brings its own solver, site and schedule: "
                "leave out solver=, site= and schedule=, or give Trainer the bare optimizer."
            )
        own = {*cast(nn.Module, self.model).parameters()}
        if made and own.isdisjoint(made.game.model.parameters()):
            raise ValueError(
                "The optimizer is wrapped for another model than Trainer's: wrap it with that one."
            )
        self.solver: Solver = made.game.solver if made else solver  # pyright: ignore
        self.site, self.schedule, self.evaluate_average = site, schedule, evaluate_average
        self._share = Share()
        check_playable(self, self.solver, self.averages)
        check_fsdp(self, self.solver, self.averages)
        check_deepspeed(self, self.solver, schedule)
        check_columns(where, groups, cast(nn.Module, self.model))
        self._besides = {m: copy.deepcopy(m.state_dict()) for m in self.solver.modules().values()}
        self._rounds = Rounds(type(self).__name__, self._besides)
        self.add_callback(self._rounds)
        if self.optimizer is not None:
            self.create_optimizer()

    @property
    def averages(self) -> bool:
        """Whether evaluation runs at an average of the weights, once there is one."""
        learner = self.solver.learner()
        return self.evaluate_average and learner is not None and learner.average_decay is not None

    @property
    def game(self) -> Game:
        """The game, once training has begun."""
        return self._rounds.game_of(self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Create the Trainer's optimizer and wrap it, unless it is."""
        made = super().create_optimizer() if model is None else super().create_optimizer(model)
        made = self.optimizer if made is None else made
        played: Any = self.model if model is None else model
        how: Any = {"site": self.site, "schedule": self.schedule, "seed": self.args.seed}
        if self.is_deepspeed_enabled:
            self._play_alone(made, played, self.solver, **how)
        elif wrapped(made) is None:
            for module, untrained in self._besides.items():  # of a model made anew, too
                module.load_state_dict(untrained)
                module.to(self.args.device)
            self.optimizer = made = wrap(made, played, self.solver, **how)
        return made

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Play a round in training; the Trainer's own loss elsewhere."""
        items, where, given = num_items_in_batch, self.where, inputs
        inputs = self._for_model(inputs)
        if not torch.is_grad_enabled():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=items)
        for name, column in {"where": where, "groups": self.groups}.items():
            if isinstance(column, str) and column not in given:
                raise GameError(column_missing(name, column, inputs))
        where = given[where] if isinstance(where, str) else where
        groups = None if self.groups is None else given[self.groups]
        model = self._follow(model)
        stock = getattr(super().compute_loss, "__func__", None) is Trainer.compute_loss
        wanted = stock or return_outputs or self.solver.compares is not None  # elsewhere not free
        outputs = None

        def loss_of(count: Any) -> Tensor:
            return self.forward_pass(cast(nn.Module, self.model), dict(inputs), count, False)[0]

        def closure() -> Any:
            nonlocal outputs
            loss, outputs = self.forward_pass(model, dict(inputs), items, wanted)
            if not isinstance(outputs, Mapping):
                return loss / share, outputs
            # Trainer takes labels away from the model where it computes the loss itself.
            return {"labels": inputs.get("labels"), **outputs, "loss": loss / share}

        share = self._share.of_mean(self, inputs, items, loss_of)
        # Its own mean within the round, where divergences are means too; its share outside.
        loss = play(self, closure, share * self._share.of_rows, items, where=where, groups=groups)
        return (loss, outputs) if return_outputs else loss

    def forward_pass(
        self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, outputs: bool
    ) -> tuple[Tensor, Any]:
        """Run one pass of a round; override where the Trainer's own loss does not give logits.

        Args:
            model: as for `compute_loss`.
            inputs: likewise; they may be changed.
            items: likewise, the `num_items_in_batch`.
            outputs: whether the model's outputs are wanted, whose logits the solver compares.

        Returns:
            The Trainer's loss, and the outputs or None.
        """
        # By its name, as Trainer passes it: a Trainer may take it as one of **keywords.
        found: Any = super().compute_loss(model, inputs, outputs, num_items_in_batch=items)
        return found if outputs else (found, None)

    def _follow(self, model: nn.Module) -> nn.Module:
        """Return what is played on: a model that may be compiled by now, or within its engine."""
        if self.is_deepspeed_enabled:
            return cast(nn.Module, self.model)
        if original(model) is not None and model is not self.game.model:
            self.game.rounds.arena.follow(model)
            torch.compiler.reset()  # graphs of an evaluation before lack the hooks
        return model

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Log what the last round came to beside the training loss."""
        made = self._rounds.alone or wrapped(self.optimizer)
        if "loss" in logs and made is not None and made.outcome is not None:
            logs |= logged(made.outcome)
        super().log(logs, *arguments, **keywords)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients of what is trained, a projection head's too, by their joint norm."""
        if not self._besides:
            return super()._clip_grad_norm(model)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        return self.accelerator.clip_grad_norm_(trained, self.args.max_grad_norm)

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """Evaluate, at the learner's average where there is one."""
        if not self.averages or wrapped(self.optimizer) is None:
            return super().evaluation_loop(*arguments, **keywords)
        with self.game.averaged():
            return super().evaluation_loop(*arguments, **keywords)

    def _load_best_model(self) -> None:
        """Load the best weights as they were evaluated: at their average, where there was one."""
        super()._load_best_model()
        learner, best = self.game.learner, self.state.best_model_checkpoint
        if learner is None or best is None:
            return
        learner.position = 0  # an open round is of the weights there were
        if not self.averages:
            return
        saved = torch.load(
            Path(best) / OPTIMIZER_NAME, map_location=self.args.device.type, weights_only=True
        )
        learner.load_average(saved.get(STATE_KEY, {}).get("learner"))  # none, where it was plain


class AdversarialTrainer(Adversarial, Trainer):
    """`transformers.Trainer` that plays a game; see `Adversarial`.

    Example:
        >>> import mixadv, tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=9, **size))
        >>> rows = [{"input_ids": torch.tensor([i, 1]), "labels": i % 2} for i in range(8)]
        >>> arguments = TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=2, use_cpu=True, disable_tqdm=True
        ... )
        >>> trainer = AdversarialTrainer(
        ...     model, arguments, train_dataset=rows, solver=mixadv.FreeLB()
        ... )
        >>> trainer.train().global_step, trainer.game.outcome.forwards  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        (2, 3)
    """
