"""R3F and R4F: better fine-tuning by reducing representational collapse.
Aghajanyan et al. 2021, arXiv:2008.03156, eq. 4–6.

    min_θ  ℓ(f(X;θ), y) + λ·E_z KL_S( f(X;θ) ‖ f(X+z;θ) ),     z ~ U(−σ, σ) or N(0, σ²)

Nature plays noise, no adversary: the baseline of every smoothness game. R4F also makes the head
1-Lipschitz: call `spectral_normalize` on it. The released code detaches the embedding in the noisy
branch, draws noise on padding too, and dropout anew in each pass, which moves the predictions far
more than its σ = 1e-5 per coordinate (`norm="linf", radius=1e-5, unit="absolute"`) does. In bf16
that σ is below the noise floor.

Published: the command for RTE in github.com/facebookresearch/fairseq, examples/rxf/README.md.
Trained with Adam (β 0.9 and 0.98, weight decay 0.1, no clipping) and linear decay, in fp16:

    model              task        lr   batch  updates  warm-up
    roberta-large      rte       1e-5       8     3120      187
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn
from torch.nn.utils import parametrizations, parametrize

from mixadv.players.ascent import Direction, Sign
from mixadv.solvers.base import DivergenceSolver, Presets
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class R3F(DivergenceSolver):
    """Minimise the task loss plus the divergence that noise of size `radius` causes.

    Use it as the control of SMART, ALUM and VAT: the same loss without an adversary. With
    `radius=0, fresh_dropout=True` it is R-Drop. Passes: 2 forwards, 1 backward.
    """

    name: ClassVar[str] = "r3f"
    paper: ClassVar[str] = "Aghajanyan et al. 2021, arXiv:2008.03156"
    summary: ClassVar[str] = "task loss plus divergence under noise"
    presets: ClassVar[Presets] = {
        "roberta-large": {
            "rte": {
                "norm": "linf",
                "radius": 1e-5,
                "unit": "absolute",
                "smoothness_weight": 0.7,
                "fresh_dropout": True,
            }
        }
    }

    steps: int = field(default=0, init=False)
    direction: Direction = field(default="gradient", init=False)
    sign: Sign | None = field(default=None, init=False)
    radius: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "zero":
            raise ValueError("R3F: start='zero' draws no noise. Choose 'uniform' or 'normal'.")

    def play(self, stage: Moves) -> Play:
        """Play `∇θ [ ℓ(X) + λ·KL_S(X, X+z) ]`."""
        noise = stage.start(self).detach()
        yield Step(stage.loss() + self.smoothness(stage, noise))


def spectral_normalize(head: nn.Module) -> nn.Module:
    """Divide the weight of each linear layer of a head by its largest singular value (R4F).

    In place, by torch's parametrization: one power iteration per forward in training mode. Call it
    before the optimizer is built. A layer that is normalised already stays as it is.

    Args:
        head: a module with at least one `nn.Linear` (`model.classifier`), or one itself.

    Raises:
        ValueError: if there is none.

    Example:
        >>> import torch
        >>> head = spectral_normalize(nn.Linear(4, 3)).eval()
        >>> round(float(torch.linalg.svdvals(head.weight.detach()).max()), 1)
        1.0
    """
    layers = [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise ValueError(
            f"spectral_normalize: this {type(head).__name__} holds no nn.Linear. Give it the "
            "classification head, such as model.classifier."
        )
    for layer in layers:
        if not _normalised(layer):
            parametrizations.spectral_norm(layer)
    return head


def _normalised(layer: nn.Linear) -> bool:
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    kinds = [type(p) for p in layer.parametrizations["weight"]]  # pyright: ignore
    return parametrizations._SpectralNorm in kinds
