"""Adversarial training of language models as goals of both players: arguments of `step`.

    δ* ∈ argmax_{‖δ_i‖ ≤ ε} u(x + δ),     min_θ  ℓ(x + δ*) + r(x')

x is a prompt, δ_i acts at the i-th token of what the user wrote, u wants the rejected answer, ℓ the
chosen one, and r keeps what the model says to other prompts, at δ = 0:

    optimizer = mixadv.wrap(adamw, model, mixadv.PGD(steps=10, radius=0.05, per="token",
                                                     start="zero", step_size=0.01))
    optimizer.step(**continuous_at(model, chosen, rejected, others))

**ContinuousAT** (Xhonneux et al. 2024, arXiv:2405.15589, "CAT" there; `mixadv.CAT` is another
method, contrastive adversarial training). With y⁻ rejected, y⁺ chosen, CE a mean over an answer's
tokens, and [·]_c the floor c below which the slope is 0.001:

    u = −CE(y⁻),     ℓ = ½[−CE(y⁻)]_{−5} + ½[CE(y⁺)]_{0.5},     r = CE(x')

Released (github.com/sophie-xhonneux/Continuous-AdvTrain, config/adv_train_ul.yaml): 10 sign steps
of 1e-4 in each coordinate from δ = 0, ε = 0.05 mean norms of all rows of the embedding matrix;
fp16, 5 epochs, batches of 8 × 8, 12.5 % of rows with an adversary. δ acts there on the template's
tokens too, and the floors are of a batch's mean and jump (c + 0.001·loss). Its ball is relative and
its step absolute, and so no `published` row: divide 1e-4 by `game.unit` for `step_size`, with
`normalize="sign"`.

**LAT, targeted** (Sheshadri et al. 2024, arXiv:2407.15549; untargeted is Casper et al. 2024,
arXiv:2403.05030, which is `PGD` at a layer with `where=` and no goals of its own):

    u = −½CE(y⁻) + ½L(y⁺),     ℓ = ½CE(y⁺) − ½L(y⁻),     L(y) = mean of log(1 − p(y_i))

and r = 1.5·CE(x'). Released (github.com/aengusl/latent-adversarial-training,
notebooks/jailbreaks.ipynb): 16 steps of AdamW at the embedding and layers 8, 16, 24 and 30 at once,
per-token balls of radius 6 whatever the site, 4 steps of the learner a round, r of weight 1.5 or 2
by version. Here `site=["model.embed_tokens", "model.layers.8"]` and `normalize="adam"`: each module
has a ball of its own, in units of its own token norm, or with `unit="absolute"` of 1.

**MixAT** (github.com/insait-institute/MixAT): ContinuousAT where half of the prompts were first
rephrased, or given a suffix (`rewritten`), by whatever makes such texts; ε = 0.075, 2 epochs.
Released code draws once for a batch; here each row is drawn.

Goals that compare with a model as it was are in `mixadv.tokens.chat_references`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.checks import check_number
from mixadv.tokens.chat import ChatBatch, Reader, answer_losses, mean_over_answers

Goals = dict[str, Any]
"""What `step`, `backward` and `loss` take: closure, adversary, retain, where."""

SLOPE = 1e-3  # past a floor
HOPELESS = -5.0  # below this log-probability a token is unlikely enough


def continuous_at(
    model: nn.Module,
    chosen: ChatBatch,
    rejected: ChatBatch,
    others: ChatBatch | None = None,
    *,
    away: float = 0.5,
    toward: float = 0.5,
    utility: float = 1.0,
    away_floor: float = -5.0,
    toward_floor: float = 0.5,
) -> Goals:
    """Return the goals of ContinuousAT on a batch; see the file's docstring.

    Args:
        model: a causal language model that returns logits.
        chosen: prompts with the answers that the learner wants.
        rejected: the same prompts with those that the adversary wants.
        others: prompts and answers on which nothing is to change; None leaves r out.
        away: weight of the rejected answers, and
        toward: of the chosen ones in the learner's loss.
        utility: weight of `others`.
        away_floor: of −CE.
        toward_floor: of CE.

    Example:
        >>> optimizer.step(**continuous_at(model, chosen, rejected, others))  # doctest: +SKIP
    """
    check_batches("continuous_at", chosen, rejected, others)
    reader = Reader(model)
    cross_entropy = reader.losses(answer_losses)

    def learner() -> Tensor:
        off = floored(-cross_entropy(rejected), away_floor)
        on = floored(cross_entropy(chosen), toward_floor)
        return away * off + toward * on

    return goals_of(reader, learner, lambda: -cross_entropy(rejected), others, utility)


def latent_at(
    model: nn.Module,
    chosen: ChatBatch,
    rejected: ChatBatch,
    others: ChatBatch | None = None,
    *,
    away: float = 0.5,
    toward: float = 0.5,
    utility: float = 1.5,
) -> Goals:
    """Return the goals of targeted latent adversarial training on a batch; see the docstring.

    Arguments are those of `continuous_at`, without floors. The site says where δ acts: a layer, or
    the embedding.

    Example:
        >>> optimizer.step(**latent_at(model, chosen, rejected, others))  # doctest: +SKIP
    """
    check_batches("latent_at", chosen, rejected, others)
    reader = Reader(model)
    cross_entropy, odds = reader.losses(answer_losses), reader.losses(unlikelihood)

    def learner() -> Tensor:
        return toward * cross_entropy(chosen) + away * odds(rejected)

    def adversary() -> Tensor:
        return -0.5 * cross_entropy(rejected) - 0.5 * odds(chosen)

    return goals_of(reader, learner, adversary, others, utility)


def rewritten(
    rows: Sequence[Mapping[str, Any]],
    rewrites: Callable[[str], Sequence[str]],
    share: float = 0.5,
    generator: torch.Generator | None = None,
) -> list[dict[str, Any]]:
    """Return rows of which a share has another prompt that asks the same: the first move of MixAT.

    Args:
        rows: with a `prompt` that is a text.
        rewrites: gives texts that ask what a prompt asks, such as paraphrases of a model's, or the
            prompt with a suffix; where it gives none the prompt stays.
        share: the probability that a row's prompt is replaced, by one of them, all alike.
        generator: of the draws; None is torch's own.

    Example:
        >>> shout = lambda prompt: [prompt.upper()]
        >>> rewritten([{"prompt": "why?", "chosen": "So."}], shout, share=1.0)
        [{'prompt': 'WHY?', 'chosen': 'So.'}]
    """
    check_number("rewritten", "share", share, 0.0, 1.0)
    found = []
    for number, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str):
            raise ValueError(
                f"Row {number} has the prompt {row.get('prompt')!r:.60}, which is not a text: "
                "rewrite messages before, or leave the row out."
            )
        texts = rewrites(row["prompt"]) if torch.rand((), generator=generator) < share else []
        if isinstance(texts, str):
            raise ValueError(f"rewrites must return a list of texts, and returned {texts!r:.60}.")
        place = int(torch.randint(len(texts), (), generator=generator)) if texts else 0
        found.append({**row, "prompt": texts[place] if texts else row["prompt"]})
    return found


def floored(losses: Tensor, floor: float) -> Tensor:
    """Return losses that fall 1000 times more slowly once they are below a floor.

    Example:
        >>> floored(torch.tensor([1.0, 0.0]), 0.5)
        tensor([1.0000, 0.4995])
    """
    return torch.where(losses > floor, losses, floor + SLOPE * (losses - floor))


def unlikelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of −log(1 − p) of each row's answer over its tokens, `[B]`.

    Tokens that are unlikely already, log p < −5, count as 0.

    Args:
        logits: `[B, n, V]`, of which those before a token predict it.
        labels: `[B, n]`, −100 at what is not part of the answer.

    Example:
        >>> unlikelihood(torch.zeros(1, 2, 2), torch.tensor([[-100, 1]])).exp()
        tensor([2.])
    """

    def losses_of(logits: Tensor, ids: Tensor) -> Tensor:
        logs, ids = logits.log_softmax(-1), ids[:, None]
        others = logs.scatter(-1, ids, -torch.inf).logsumexp(-1)  # 1 − p, exact where p is near 1
        return torch.where(logs.gather(-1, ids)[:, 0] < HOPELESS, 0.0, -others)

    return mean_over_answers(logits, labels, losses_of)


def check_batches(who: str, chosen: Any, rejected: Any, others: Any) -> None:
    """Raise TypeError for rows that nobody has made a batch of."""
    batches = {"chosen": chosen, "rejected": rejected}
    if others is not None:
        batches["others"] = others
    for name, batch in batches.items():
        if not isinstance(batch, ChatBatch):
            raise TypeError(
                f"{who}: {name} must be a ChatBatch, got {batch!r:.60}: write chosen, rejected = "
                "preference_batches(tokenizer, rows), and others = chat_batch(tokenizer, prompts, "
                "answers)."
            )


def goals_of(
    reader: Reader,
    learner: Callable[[], Tensor],
    adversary: Callable[[], Tensor],
    others: ChatBatch | None,
    utility: float,
) -> Goals:
    """Return the goals of both players, and r = utility·CE on other rows where there are some."""
    where = dict.fromkeys(("closure", "adversary"), reader.where)  # not at other rows
    goals: Goals = {"closure": learner, "adversary": adversary, "where": where}
    if others is not None:
        cross_entropy = reader.losses(answer_losses)
        goals["retain"] = lambda: utility * cross_entropy(others)
    return goals
