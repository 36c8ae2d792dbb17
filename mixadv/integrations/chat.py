"""Adversarial fine-tuning of models that chat, on preference data: prompt, chosen, rejected.

The adversary has a goal of its own (`mixadv.tokens.continuous_at`, `latent_at`, or one of yours):
it wants the rejected answer, by one δ in front of both. Trainer does the rest: adapters, bf16,
accumulation, several processes, checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mixadv.checks import check_function
from mixadv.equilibrium import best_response
from mixadv.integrations.chat_data import CUT, OTHERS, Beside, ChatCollator
from mixadv.integrations.transformers import Adversarial, Trainer
from mixadv.model.replay import evaluating
from mixadv.round.explain import worded
from mixadv.tokens.chat import ChatBatch, answer_losses
from mixadv.tokens.chat_games import Goals, continuous_at

GoalsOf = Callable[..., Goals]
"""Makes `goals(model, chosen, rejected, others)` of batches what `game.loss` takes."""


class AdversarialChatTrainer(Adversarial, Trainer):
    """`transformers.Trainer` that plays a game whose adversary wants the rejected answer.

    Rows are `prompt`, `chosen` and `rejected`, texts or lists of messages, written by the
    tokenizer's own chat template. δ acts at the tokens of what the user wrote. The first step says
    what the adversary does; rows without an adversary are an error. Evaluation reports the loss of
    chosen answers without δ, in nats a token.

    Args:
        arguments, keywords: of the Trainer; `processing_class` is the tokenizer.
        solver: how the adversary ascends, such as `mixadv.PGD(per="token", start="zero")`.
        goals: of both players: `mixadv.tokens.continuous_at`, `capo`, `latent_at`, `latent_dpo`, or
            a function of `(model, chosen, rejected, others)` like them; settings by
            `functools.partial`.
        retain_dataset: rows `prompt` and `chosen` on which nothing is to change, one beside each
            row with an adversary, in turn; an epoch goes on where the one before has ended. None
            retains nothing.
        system: a system message in front of prompts that are texts.
        max_length: of prompt and answer, in tokens: longer answers are cut at their end, which is
            told in the first step and logged as `cut_answers`. None cuts nothing.

    Raises:
        ValueError: without rows, for rows that lack a column, without a tokenizer or for one that
            writes no chats; for a prompt that `max_length` leaves no answer.

    Example:
        >>> trainer = AdversarialChatTrainer(  # doctest: +SKIP
        ...     model, arguments, train_dataset=rows, processing_class=tokenizer,
        ...     solver=mixadv.PGD(steps=10, step_size=0.02, radius=0.05, per="token", start="zero"),
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        *arguments: Any,
        goals: GoalsOf = continuous_at,
        train_dataset: Any = None,
        retain_dataset: Any = None,
        system: str | None = None,
        max_length: int | None = None,
        **keywords: Any,
    ) -> None:
        if keywords.get("where") is not None:
            raise ValueError("δ acts at the tokens of what the user wrote: leave where= out.")
        check_function("goals must be a function of the model and three batches", goals)
        self.goals = goals
        if train_dataset is not None:
            train_dataset = Beside(train_dataset, retain_dataset)
        own = {"system": system, "max_length": max_length}
        if keywords.get("data_collator") is None:
            if (tokenizer := keywords.get("processing_class")) is None:
                raise ValueError("The rows are chats, which a tokenizer writes: processing_class=…")
            keywords["data_collator"] = ChatCollator(tokenizer, **own)
        elif named := [name for name, value in own.items() if value is not None]:
            raise ValueError(
                f"{named[0]} is the collator's: ChatCollator(tokenizer, {named[0]}=…), with "
                "data_collator."
            )
        self._cut: Tensor | None = None  # answers since the last log, on this process
        super().__init__(*arguments, train_dataset=train_dataset, **keywords)
        _check_unpacked(self.args)
        if train_dataset is not None:
            self.add_callback(_Turns(train_dataset))
        for name in ("groups", "compute_loss_func"):
            if getattr(self, name) is not None:
                raise ValueError(f"Losses are those of goals=, without {name}=: leave it out.")
        if self.args.label_smoothing_factor:
            raise ValueError(
                "Losses are those of goals=, without label smoothing: label_smoothing_factor=0."
            )
        self.args.remove_unused_columns = False  # the model gets none of them

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Play a round in training; elsewhere return the loss of chosen answers without δ."""
        if not all(isinstance(inputs.get(name), Mapping) for name in ("chosen", "rejected")):
            raise ValueError(
                f"{type(self).__name__} plays on batches of chosen and rejected answers, as "
                f"ChatCollator makes them, and got {', '.join(inputs)}: leave data_collator out, "
                "or return both. In packed batches it is not known which answers belong to one "
                "prompt."
            )
        batches = {n: ChatBatch(**columns) for n, columns in inputs.items() if n != CUT}
        cut = inputs[CUT].sum() if CUT in inputs else None
        if not torch.is_grad_enabled():
            chosen = batches["chosen"]
            logits: Any = model(**chosen.inputs).logits
            loss = answer_losses(logits, chosen.labels).mean()
            return (loss, {"loss": loss}) if return_outputs else loss
        self._follow(model)
        goals = self.goals(model, batches["chosen"], batches["rejected"], batches.get(OTHERS))
        if not isinstance(goals, Mapping) or not {"closure", "adversary", "where"} <= {*goals}:
            raise TypeError(
                "goals must return what continuous_at does, a dict of closure, adversary, where "
                f"and perhaps retain; it returned {goals!r:.80}."
            )
        first = not self.game.round
        if first:
            self._tell(batches["rejected"], goals, cut)
        if cut is not None:
            self._cut = cut if self._cut is None else self._cut + cut
        return self.game.loss(**goals, check=first)  # what was told is of the adversary's calls

    @contextmanager
    def _as_written(self) -> Iterator[None]:
        """Make batches of prompts as they are: what is evaluated is not drawn."""
        collator: Any = self.data_collator
        self.data_collator = getattr(collator, "as_written", lambda: collator)()
        try:
            yield
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the batches of an evaluation, without rewrites of the prompts."""
        with self._as_written():
            return super().get_eval_dataloader(*arguments, **keywords)

    def get_test_dataloader(self, *arguments: Any, **keywords: Any) -> Any:
        """Return the batches of a prediction, likewise."""
        with self._as_written():
            return super().get_test_dataloader(*arguments, **keywords)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **keywords: Any
    ) -> Any:
        """Return the loss of chosen answers, and no predictions."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return those of the prompts with both answers; a round takes more."""
        model = cast(Any, self.model)
        if not hasattr(model, "floating_point_ops"):
            return 0
        return sum(model.floating_point_ops(inputs[name]) for name in ("chosen", "rejected"))

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Log how many answers were cut since the last time beside what the round came to."""
        if "loss" in logs and self._cut is not None:
            logs["cut_answers"], self._cut = int(self._cut), None
        super().log(logs, *arguments, **keywords)

    def _tell(self, rejected: ChatBatch, goals: Goals, cut: Tensor | None) -> None:
        """Say what the adversary does in the first step, measured without dropout.

        One process says it of the rows of all.
        """
        adversary, where = goals["adversary"], goals["where"]
        with evaluating(self.game.model), self.compute_loss_context_manager():
            with torch.no_grad():
                before = adversary().float().mean()
            reached = best_response(self.game, adversary, where=where, adversary=adversary).loss
        places = rejected.where.sum(1)
        rows = torch.tensor(len(places), device=places.device)
        counts = [rows, (places > 0).sum(), torch.zeros_like(rows) if cut is None else cut]
        ends = [places.min(), places.max()]
        paid = [len(places) * x for x in (before, reached.float().mean().to(before))]
        mine = torch.stack([x.float() for x in (*counts, *ends, *paid)])
        every = self.accelerator.gather(mine).view(-1, len(mine))  # pyright: ignore
        if not self.is_world_process_zero():
            return
        total, played, shorter, _, _, *sums = every.sum(0).tolist()
        least, most = int(every[:, 3].min()), int(every[:, 4].max())
        solver, known, unit = self.solver, self.game.unit, ""
        ball = "no ball" if solver.radius is None else f"radius {solver.radius:g} per {solver.per}"
        if solver.unit == "relative" and known is not None:
            unit = f" in token norms of {worded(known, 3)}"
        first, last = (x / total for x in sums)
        less = "" if cut is None else f" {shorter:.0f} answers were cut at max_length."
        logging.getLogger(__name__).warning(
            f"{type(self).__name__}, first step: an adversary in {played:.0f} of {total:.0f} rows, "
            f"at {least} to {most} tokens of each; {ball}{unit}; its steps take its payoff from "
            f"{first:.4g} to {last:.4g}.{less}"
        )


class _Turns(TrainerCallback):
    """Has each epoch go on with the other rows where the one before has ended."""

    def __init__(self, rows: Beside) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """See TrainerCallback."""
        self.rows.begin(state.epoch)


def _check_unpacked(args: Any) -> None:
    """Raise ValueError for arguments that ask for packed rows, as those of TRL's trainers may."""
    for name in ("packing", "padding_free"):
        if getattr(args, name, False):
            raise ValueError(
                f"{name}=True: the answers to a prompt lie side by side, for one δ to act on both, "
                "and are not packed. Leave it out, and cut what is long with max_length=."
            )
