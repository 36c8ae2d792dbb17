"""Goals of chats that compare the model with a reference: what it was before training.

The reference p₀ is read without δ, once for all passes of a round. It is the model with its
adapters off, or another one that is given. With h how much more the model prefers the chosen answer
y⁺ to the rejected one y⁻ than the reference does:

    h = log p(y⁺)/p₀(y⁺) − log p(y⁻)/p₀(y⁻)

**CAPO** (Xhonneux et al. 2024): no data beside the pairs; IPO (Azar et al. 2024, arXiv:2310.12036)
under δ. With log p a mean over an answer's tokens:

    u = −CE(y⁻),     ℓ = ( h − 1/(2β) )²,     β = 0.25

Released (config/adv_train_ipo.yaml): tokens of y⁻ whose log p is below −5 are left out of its mean;
20 epochs, else as ContinuousAT.

**LAT against triggers** (Sheshadri et al. 2024, arXiv:2407.15549): both players play DPO (Rafailov
et al. 2023, arXiv:2305.18290), the adversary with the answers swapped. With log p a sum over an
answer's tokens:

    u = log σ(−βh),     ℓ = −log σ(βh),     β = 0.3

Released (github.com/aengusl/latent-adversarial-training, notebooks/backdoors.ipynb): at the outputs
of the MLPs of layers 4, 12, 20 and 28 at once, per-token balls of radius 1.5, 16 steps of AdamW at
5e-2, 4 steps of the learner a round, LoRA. Nothing is retained: no line reads the weight that
`sft_dpo` has there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixadv.checks import check_number
from mixadv.model.modules import unwrap
from mixadv.model.replay import evaluating
from mixadv.tokens.chat import IGNORED, ChatBatch, Reader, answer_losses
from mixadv.tokens.chat_games import Goals, check_batches, goals_of


def capo(
    model: nn.Module,
    chosen: ChatBatch,
    rejected: ChatBatch,
    others: ChatBatch | None = None,
    *,
    reference: nn.Module | None = None,
    beta: float = 0.25,
    utility: float = 1.0,
) -> Goals:
    """Return the goals of CAPO on a batch; see the file's docstring.

    Args:
        model: a causal language model that returns logits.
        chosen: prompts with the answers that the learner wants.
        rejected: the same prompts with those that the adversary wants.
        others: prompts and answers on which nothing is to change; None leaves them out.
        utility: weight of `others`.
        reference: the model to stay close to; None is the model with its adapters off.
        beta: sets the margin to aim for, which is 1/(2β), in nats per token.

    Raises:
        ValueError: without a reference, for a model without adapters, or with other weights that
            train.

    Example:
        >>> optimizer.step(**capo(peft_model, chosen, rejected))  # doctest: +SKIP
    """
    check_batches("capo", chosen, rejected, others)
    check_number("capo", "beta", beta)
    if beta == 0:
        raise ValueError("capo: beta=0 aims at a margin without end; it must be above 0.")
    reader = Reader(model)
    cross_entropy = reader.losses(answer_losses)
    gained = _preference(reader, chosen, rejected, reference, answer_losses)

    def learner() -> Tensor:
        return (gained() - 1 / (2 * beta)) ** 2

    return goals_of(reader, learner, lambda: -cross_entropy(rejected), others, utility)


def latent_dpo(
    model: nn.Module,
    chosen: ChatBatch,
    rejected: ChatBatch,
    others: ChatBatch | None = None,
    *,
    reference: nn.Module | None = None,
    beta: float = 0.3,
    utility: float = 1.0,
) -> Goals:
    """Return the goals of latent adversarial training by DPO on a batch; see the docstring.

    Arguments, and what is raised, are those of `capo`, but for `beta`, the slope of preference in
    answers' log-odds. The site says where δ acts: layers, or the embedding.

    Example:
        >>> optimizer.step(**latent_dpo(peft_model, chosen, rejected))  # doctest: +SKIP
    """
    check_batches("latent_dpo", chosen, rejected, others)
    check_number("latent_dpo", "beta", beta)
    if beta == 0:
        raise ValueError("latent_dpo: at beta=0 no answer is preferred; it must be above 0.")
    reader = Reader(model)
    gained = _preference(reader, chosen, rejected, reference, whole_losses)

    def learner() -> Tensor:
        return -F.logsigmoid(beta * gained())

    return goals_of(reader, learner, lambda: F.logsigmoid(-beta * gained()), others, utility)


def whole_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each row's answer, in nats, `[B]`.

    Arguments are those of `mixadv.tokens.answer_losses`, whose mean this is the sum of.
    """
    return answer_losses(logits, labels) * (labels[:, 1:] != IGNORED).sum(1)


def _preference(
    reader: Reader,
    chosen: ChatBatch,
    rejected: ChatBatch,
    reference: nn.Module | None,
    losses_of: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[], Tensor]:
    """Return what reads h, of which the reference's part is read now."""
    losses = reader.losses(losses_of)
    with _reference(reader.model, reference) as frozen:
        known = Reader(frozen).losses(losses_of)
        before = known(rejected) - known(chosen)
    return lambda: losses(rejected) - losses(chosen) - before


@contextmanager
def _reference(model: nn.Module, reference: nn.Module | None) -> Iterator[nn.Module]:
    """Give the reference in evaluation mode, without gradients."""
    if reference is None and not hasattr(unwrap(model), "disable_adapter"):
        raise ValueError(
            "These goals compare with a reference: pass a copy of the model as it was before "
            "training, reference=copy.deepcopy(model).eval(), or train adapters, without which it "
            "is one."
        )
    own: Any = unwrap(model)
    with ExitStack() as stack:
        if reference is None:
            _check_adapted(own)
            for weight in own.parameters():  # PEFT trains all of an adapter that it puts on again
                stack.callback(weight.requires_grad_, weight.requires_grad)
            stack.enter_context(own.disable_adapter())
        found = own if reference is None else reference
        stack.enter_context(evaluating(found))
        stack.enter_context(torch.no_grad())
        yield found


_UNLISTED = ("modules_to_save", "prompt_encoder", "adaption_prompt", "adaption_gate")
"""What PEFT calls adapters in modules that do not list theirs."""


def _check_adapted(model: nn.Module) -> None:
    """Raise ValueError where more than adapters trains, which they do not take away with them."""
    adapters: set[nn.Parameter] = set()
    for module in model.modules():
        names: Any = getattr(module, "adapter_layer_names", _UNLISTED)
        for name in (*names, *getattr(module, "other_param_names", ())):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                adapters |= {*part.parameters()}
            elif isinstance(part, nn.Parameter):
                adapters.add(part)
    live = [n for n, p in model.named_parameters() if p.requires_grad and p not in adapters]
    if live:
        raise ValueError(
            f"{len(live)} weights that are no adapter's train too, {live[0]} among them: without "
            "its adapters the model is not what it was before training. Freeze them, or pass a "
            "copy, reference=copy.deepcopy(model).eval()."
        )
