"""CAT: contrastive adversarial training. Pan et al. 2022, arXiv:2107.10137, §3.

    r = ε·sign( ∂ℓ(f(X), y)/∂V ),     V the word embedding matrix: one r_v for all occurrences of v
    min_θ  (1−λ)/2·[ ℓ(f(X), y) + ℓ(f(X + r), y) ] + λ·NT-Xent( z(X), z(X + r) )

with z the first token of the last hidden state, after a projection (`head`) if one is given. The
clean pass gives the gradient for r too. The contrastive loss compares the samples of a batch with
each other: unlike other solvers' it depends on how a batch is split, over processes too.

Not the continuous adversarial training of language models that Xhonneux et al. 2024 call CAT: that
is `mixadv.tokens.continuous_at`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mixadv.checks import check_flag, check_number
from mixadv.errors import GameError
from mixadv.maths.contrastive import Negatives, check_nt_xent, nt_xent
from mixadv.maths.geometry import Norm
from mixadv.model.representation import Source, check_source, first_token
from mixadv.model.visits import Call
from mixadv.players.ascent import Projection, Start
from mixadv.solvers.base import Solver, refuse_memory
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class CAT(Solver):
    """Minimise the clean and the adversarial loss, and a contrastive loss between the two views.

    Use it where representations should be alike for clean and perturbed text. It compares the
    samples of a batch with each other, so it depends on the size of the batch. δ has the size
    `radius`, whatever `step_size` is, unless `projection="ball"`. Passes: 2 forwards, 1 backward
    for δ, 1 backward.

    Attributes:
        contrast_weight: λ, the weight of the contrastive loss, from 0 to 1.
        contrast_temperature: τ, by which its similarities are divided.
        negatives: what a view is contrasted with: `"all"` other 2N − 2 views of the batch, or
            `"cross"`, the N − 1 of the other kind.
        shared: one perturbation for all occurrences of a token in the batch (the paper), at sites
            that are embeddings; False perturbs each occurrence by itself.
        source: name of the submodule whose output is read; None for the model's `base_model`.
        representation: called with that output, returns `[B, d]`; None is `first_token`.
        head: a module `[B, d] -> [B, d']`, trained with the model and dropped after training. Its
            parameters are added to the optimizer as a group, its weights saved with the game.
    """

    name: ClassVar[str] = "cat"
    paper: ClassVar[str] = "Pan et al. 2022, arXiv:2107.10137"
    summary: ClassVar[str] = "clean, adversarial and contrastive loss, δ shared by a token's places"
    differentiates_twice: ClassVar[bool] = True

    steps: int = field(default=1, init=False)
    radius: float | None = 0.003
    norm: Norm = "linf"
    start: Start = field(default="zero", init=False)
    projection: Projection = "sphere"
    contrast_weight: float = 0.1
    contrast_temperature: float = 0.1
    negatives: Negatives = "all"
    shared: bool = True
    source: str | None = None
    representation: Callable[[Any], Tensor] | None = None
    head: nn.Module | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_memory(self)
        if self.step_size == 0:
            raise ValueError("CAT: step_size=0 never leaves δ = 0; its size is the radius.")
        check_flag("CAT", "shared", self.shared)
        alike = self.per == "token" or (self.norm == "linf" and self.normalize == "steepest")
        if self.shared and (self.temperature or not alike):
            raise ValueError(
                f"CAT: norm={self.norm!r}, per={self.per!r}, normalize={self.normalize!r}, "
                f"temperature={self.temperature} would give a token another δ in every sample. Set "
                "per='token', or norm='linf' with normalize='steepest', at temperature 0; or "
                "shared=False."
            )
        check_number("CAT", "contrast_weight", self.contrast_weight, 0.0, 1.0)
        check_nt_xent(self.contrast_temperature, self.negatives, "CAT", name="contrast_temperature")
        check_source(self)
        if self.head is not None and not isinstance(self.head, nn.Module):
            raise TypeError(f"CAT: head must be a torch.nn.Module or None, got {self.head!r}.")

    @property
    def reads(self) -> Source | None:
        """Where the representation is read."""
        return Source(self.source, self.representation or first_token)

    def modules(self) -> dict[str, nn.Module]:
        """Return the projection head, if there is one."""
        return {} if self.head is None else {"head": self.head}

    def play(self, stage: Moves) -> Play:
        """Play `∇θ [ (1−λ)/2·(ℓ(X) + ℓ(X+r)) + λ·NT-Xent ]`."""
        zero, gradients = stage.clean_gradients(self)
        if self.shared:
            gradients = share(gradients, stage.calls)
        perturbed = stage.run_at(stage.move(zero, self, gradients).detach())
        views = self.project_views(stage.clean().representation, perturbed.representation)
        contrast = nt_xent(*views, self.contrast_temperature, self.negatives)
        losses = (stage.loss() + perturbed.objective) / 2
        yield Step((1 - self.contrast_weight) * losses + self.contrast_weight * contrast)

    def project_views(self, clean: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Return both representations after the head, in one call of it."""
        if self.head is None:
            return clean, perturbed
        views = torch.cat([clean, perturbed])
        dtypes = [p.dtype for p in self.head.parameters()]
        try:
            projected = self.head(views.to(dtypes[0]) if dtypes else views)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise GameError(
                f"CAT: head= cannot take the representations, {list(clean.shape)} on "
                f"{clean.device}: {error}. Give it as many inputs, on the model's device."
            ) from error
        return projected[: len(clean)], projected[len(clean) :]


def share(gradients: list[Tensor], calls: list[Call]) -> list[Tensor]:
    """Return at each place the sum of the gradient over all places of its token.

    Args:
        gradients: per call at the site `[1, B, ..., D]`.
        calls: the calls; where one is no embedding's, its gradient stays as it is.
    """
    gradients = [  # what is not played may have no gradient
        g if call.mask is None else torch.where(call.mask > 0, g, torch.zeros_like(g))
        for g, call in zip(gradients, calls, strict=True)
    ]
    shapes = [(1, g.shape[1], *[1] * (g.dim() - 2)) for g in gradients]
    finite = [
        g.isfinite().flatten(2).all(2).view(s) for g, s in zip(gradients, shapes, strict=True)
    ]
    rows: dict[nn.Module, Tensor] = {}
    for g, call, kept in zip(gradients, calls, finite, strict=True):
        if call.ids is None or call.embedding is None:
            continue
        if call.embedding not in rows:
            rows[call.embedding] = g.new_zeros(call.vocabulary, g.shape[-1])
        real = torch.where(kept, g, torch.zeros_like(g))  # others fall back alone
        rows[call.embedding].index_add_(0, call.ids.flatten(), real.flatten(0, -2))
    return [
        g if call.embedding is None else torch.where(kept, rows[call.embedding][call.ids], g)
        for g, call, kept in zip(gradients, calls, finite, strict=True)
    ]
