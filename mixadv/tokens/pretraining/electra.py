"""ELECTRA: replaced token detection, a game in the space of tokens.
Clark et al. 2020, arXiv:2003.10555, section 2 and appendix F; at drawn positions t.

    x̂_i ~ p_G(· | x_masked) for i in t,   x' = x with x̂ at t
    min_G  mean over t of −log p_G(x_i | x_masked)
    min_D  mean over tokens of BCE(D(x')_i, [x'_i ≠ x_i])

The generator is a distribution over finitely many replacements, a mixed strategy; the discriminator
answers it. By default the generator learns the data, and the game is not zero-sum; "reinforce"
makes it an adversary that maximises the discriminator's loss, which the paper found to be worse.
The released code draws positions with replacement, so that fewer differ than are counted, takes
15 % of all tokens, special ones included, and masks 85 % of the drawn ones (`mask_probability`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from mixadv.checks import check_integer, check_number
from mixadv.model.modules import unwrap
from mixadv.tokens.pretraining.ties import save_once, share_embeddings
from mixadv.tokens.reading.masked import output_layer, predictions_at


class Detection(NamedTuple):
    """What a pass of `ReplacedTokenDetection` returns.

    Attributes:
        loss: generator_loss + discriminator_weight · discriminator_loss, 0-d.
        logits: `[B, n]`, the discriminator's; above 0 where it takes a token for a replaced one.
        generator_loss: mean over drawn positions, 0-d: cross-entropy, or REINFORCE's surrogate.
        discriminator_loss: mean cross-entropy over the tokens that are no padding, 0-d.
        generator_accuracy: part of the drawn positions where the sample is the original, 0-d.
        corrupted: `[B, n]`, the token ids that the discriminator read.
        replaced: `[B, n]`, bool, where they differ from the original ones.
    """

    loss: Tensor
    logits: Tensor
    generator_loss: Tensor
    discriminator_loss: Tensor
    generator_accuracy: Tensor
    corrupted: Tensor
    replaced: Tensor


class ReplacedTokenDetection(nn.Module):
    """Pre-train a discriminator on the replacements that a generator samples.

    A module for any training loop. A right guess of the generator counts as original.

    Args:
        generator: a masked-language model of transformers; with `tie`, it takes over the tables of
            the discriminator. The paper's is a quarter to a half as wide, see `generator_config`.
        discriminator: gives one logit per token, `[B, n]` or `[B, n, 1]`: ElectraForPreTraining,
            or a token classification model with `num_labels=1`.
        mask_token_id: what the generator reads at a drawn position.
        special_token_ids: tokens that are never drawn: those for the start, the end and padding.
        rate: part of the ordinary tokens of a row that is drawn, rounded, at least one.
        mask_probability: of a drawn token to be masked; else the generator reads the token itself.
        discriminator_weight: λ, of the discriminator's loss.
        generator_objective: "mle", or "reinforce".
        temperature: T of the generator's distribution, softmax(logits / T).
        tie: "embeddings" shares those of tokens, positions and token types; None shares nothing.
        baseline_decay: of the running mean of rewards that REINFORCE compares a reward with; it
            starts at log 2, the loss of a coin; None compares with 0.

    Raises:
        TypeError: if the generator has no language-model head.
        ValueError: if tables differ in size, or a setting is out of its range.

    Example:
        >>> from mixadv.tokens import generator_config
        >>> from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining
        >>> size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> config = ElectraConfig(vocab_size=30, embedding_size=8, intermediate_size=16, **size)
        >>> generator = ElectraForMaskedLM(generator_config(config))
        >>> discriminator, ids = ElectraForPreTraining(config), {"special_token_ids": range(5)}
        >>> model = ReplacedTokenDetection(generator, discriminator, mask_token_id=4, **ids)
        >>> output = model(torch.randint(5, 30, (2, 20)))
        >>> output.logits.shape, bool((output.replaced.sum(1) <= 3).all())
        (torch.Size([2, 20]), True)
    """

    baseline: Tensor
    special: Tensor

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        mask_token_id: int,
        special_token_ids: Iterable[int],
        rate: float = 0.15,
        mask_probability: float = 1.0,
        discriminator_weight: float = 50.0,
        generator_objective: Literal["mle", "reinforce"] = "mle",
        temperature: float = 1.0,
        tie: Literal["embeddings"] | None = "embeddings",
        baseline_decay: float | None = 0.99,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator  # first, so that checkpoints name tables after it
        self.generator = generator
        self.mask_token_id = mask_token_id
        self.rate = rate
        self.mask_probability = mask_probability
        self.discriminator_weight = discriminator_weight
        self.generator_objective = generator_objective
        self.temperature = temperature
        self.baseline_decay = baseline_decay
        self._check(tie)
        special = torch.tensor(sorted({*special_token_ids, mask_token_id}))
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("baseline", torch.tensor(math.log(2)))
        if tie is not None:
            share_embeddings(generator, discriminator)
        save_once(self)

    @classmethod
    def from_tokenizer(
        cls, generator: nn.Module, discriminator: nn.Module, tokenizer: Any, **settings: Any
    ) -> Self:
        """Return the game with the token ids of a tokenizer of transformers.

        Args:
            generator: as in the class.
            discriminator: as in the class.
            tokenizer: whose special tokens, the unknown one with them, are never drawn.
            settings: the other arguments of the class.

        Raises:
            ValueError: if the tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token for the generator to predict: add "
                'one by add_special_tokens({"mask_token": "[MASK]"}), and resize both embeddings.'
            )
        mask, special = tokenizer.mask_token_id, tokenizer.all_special_ids
        settings = {"mask_token_id": mask, "special_token_ids": special, **settings}
        return cls(generator, discriminator, **settings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_loss: bool = True,
    ) -> Detection:
        """Corrupt a batch, and return the losses of both players.

        Args:
            input_ids: `[B, n]`, of a clean text.
            attention_mask: `[B, n]`, 0 at padding; without it, all tokens count.
            token_type_ids: `[B, n]`, where the models read them.
            return_loss: always so; its default tells Trainer to evaluate without labels.

        Raises:
            ValueError: if the discriminator does not give one logit per token.
        """
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        inputs = {name: value for name, value in given.items() if value is not None}
        present = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        positions = draw_positions(present & ~torch.isin(input_ids, self.special), self.rate)
        guesses, asked = self._guess(input_ids, positions, inputs), input_ids[positions]
        logits = guesses / self.temperature
        samples = sample(logits)
        corrupted = input_ids.masked_scatter(positions, samples)
        replaced = corrupted != input_ids
        detected, errors = self._detect(replaced, input_ids=corrupted, **inputs)
        discriminator_loss = errors.where(present, 0.0).sum() / present.sum().clamp(min=1)
        if self.generator_objective == "mle":
            summed = F.cross_entropy(guesses, asked, reduction="sum")
        else:
            summed = self._reinforce(logits, samples, errors.detach()[positions])
        generator_loss = summed / max(1, len(asked))
        return Detection(
            loss=generator_loss + self.discriminator_weight * discriminator_loss,
            logits=detected,
            generator_loss=generator_loss,
            discriminator_loss=discriminator_loss,
            generator_accuracy=(samples == asked).sum() / max(1, len(samples)),
            corrupted=corrupted,
            replaced=replaced,
        )

    def export(self, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Write the discriminator, which any `from_pretrained` of its architecture reads.

        Args:
            folder: made where it is not there.
            tokenizer: written beside it.
        """
        unwrap(self.discriminator).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _guess(self, ids: Tensor, drawn: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        hidden = torch.rand(ids.shape, device=ids.device) < self.mask_probability
        masked = ids.masked_fill(drawn & hidden, self.mask_token_id)
        return predictions_at(self.generator, drawn, input_ids=masked, **inputs).float()

    def _detect(self, replaced: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and cross-entropies, `[B, n]`."""
        logits, shape = self.discriminator(**inputs).logits, replaced.shape
        if logits.shape not in (shape, (*shape, 1)):
            raise ValueError(
                f"The discriminator gives logits {list(logits.shape)} for tokens {list(shape)}, "
                "not one each: take ElectraForPreTraining, or token classification, num_labels=1."
            )
        logits, truth = logits.reshape(shape), replaced.float()
        errors = F.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
        return logits, errors

    def _reinforce(self, logits: Tensor, samples: Tensor, rewards: Tensor) -> Tensor:
        """Return what has the gradient −Σ (reward − baseline)·∇log p(sample).

        A reward is the discriminator's loss at the sample's own position, as in the paper.
        """
        surprise = F.cross_entropy(logits, samples, reduction="none")
        baseline = 0.0 if self.baseline_decay is None else self.baseline
        summed = ((rewards - baseline) * surprise).sum()
        if self.training and self.baseline_decay is not None and len(samples) > 0:
            # after use: a baseline that knew its sample would bias the gradient
            self.baseline += (1 - self.baseline_decay) * (rewards.mean() - self.baseline)
        return summed

    def _check(self, tie: str | None) -> None:
        who = type(self).__name__
        output_layer(unwrap(self.generator))
        check_integer(who, "mask_token_id", self.mask_token_id, 0)
        check_number(who, "rate", self.rate, least=1e-3, most=1.0)
        check_number(who, "mask_probability", self.mask_probability, most=1.0)
        check_number(who, "discriminator_weight", self.discriminator_weight)
        check_number(who, "temperature", self.temperature, least=1e-3)
        if self.baseline_decay is not None:
            check_number(who, "baseline_decay", self.baseline_decay, most=1.0)
        if (goal := self.generator_objective) not in ("mle", "reinforce"):
            raise ValueError(f"{who}: generator_objective is 'mle' or 'reinforce', got {goal!r}.")
        if tie not in ("embeddings", None):
            raise ValueError(f"{who}: tie must be 'embeddings' or None, got {tie!r}.")


def draw_positions(candidates: Tensor, rate: float) -> Tensor:
    """Draw a rounded part of each row's candidates, at least one; all sets of a size are alike.

    Candidates and what is returned are bool, `[B, n]`.

    Example:
        >>> draw_positions(torch.tensor([[True] * 20, [True, False] * 10]), 0.15).sum(1)
        tensor([3, 2])
    """
    scores = torch.rand(candidates.shape, device=candidates.device).masked_fill(~candidates, 2.0)
    ranks = scores.argsort(1).argsort(1)
    counts = (rate * candidates.sum(1, keepdim=True)).round().clamp(min=1)
    return (ranks < counts) & candidates


def sample(logits: Tensor) -> Tensor:
    """Draw `[N]` from softmax(logits `[N, C]`) by the Gumbel-max trick, in fp32, no gradient.

    Example:
        >>> sample(torch.tensor([[0.0, 100.0], [100.0, 0.0]]))
        tensor([1, 0])
    """
    waiting = torch.empty_like(logits, dtype=torch.float32).exponential_()
    return (logits.detach().float() - waiting.log()).argmax(-1)
