"""TextAT (TAVAT): token-aware virtual adversarial training.
Li, Qiu 2020, arXiv:2004.14543, eq. 3–4, Alg. 1.

    δ: of the sample, as in FreeLB;   η^i ← Z[w_i]: of each token, from a table of the vocabulary
    δ ← δ + α·g/‖g‖,   η^i ← n^i·( η^i + α·g^i/‖g^i‖ ),   n^i = ‖η^i‖ / max_j ‖η^j‖
    δ, η ← s·δ, s·η   with s = min(1, ε/‖δ + η‖),         Z[w_i] ← η^i   at the end
    g_θ ← (1/K) Σ_t ∇θ ℓ(f(X + δ_t + η_t), y)

n^i is that of the moved η, so that a token of the table at zero is not stuck there. A token that
occurs several times is written as the mean over its places (`write="mean"`), or each is added to
the row (`"accumulate"`). The released code adds, never bounds Z, writes padding and special tokens
too, sums the K gradients, does not bound δ_0 + η_0, divides η_0 by one norm for the whole batch,
and draws dropout anew in each pass.

Published: the readme of github.com/LinyangLee/Token-Aware-VAT. That code adds to Z since it divides
η_0; without the division the rows keep the paper's `write="mean"`. Trained with AdamW (no weight
decay, clipping at 1) and linear decay, on 4 GPUs:

    model              task        lr   batch   epochs  warm-up
    bert-base-uncased  mnli      3e-5     128        9     5000
    bert-base-uncased  qnli      1e-5      32        9     2000
    bert-base-uncased  qqp       2e-5      32        9     5000
    bert-base-uncased  sst2      1e-5      64        9      500
    bert-base-uncased  cola      3e-5      64       12       30
    bert-base-uncased  mrpc      2e-5      32        9       30
    bert-base-uncased  stsb      2e-5      32        9       30
    bert-base-uncased  rte       2e-5      32        9       30
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mixadv.checks import check_integer
from mixadv.errors import GameError
from mixadv.maths import geometry
from mixadv.model import parallel
from mixadv.model.visits import Call
from mixadv.players.ascent import Draw, Projection
from mixadv.solvers.base import Presets, Solver, refuse_memory, row
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class TextAT(Solver):
    """The loss averaged along an ascent of sample and token perturbations.

    Passes: K forwards, K backwards. Keeps a table of the size of the embedding, in its game's
    `state_dict`; on several processes it is equal on all.

    Attributes:
        write: `"mean"` over the places of a token, or `"accumulate"`.
        exclude: token ids without a perturbation of their own, such as
            `tuple(tokenizer.all_special_ids)`; padding has none anyway.
    """

    name: ClassVar[str] = "textat"
    paper: ClassVar[str] = "Li and Qiu 2020, arXiv:2004.14543"
    summary: ClassVar[str] = "FreeLB with a perturbation kept for each token of the vocabulary"
    presets: ClassVar[Presets] = {
        "bert-base-uncased": {  # step size, passes, start, radius
            "mnli": row(1e-1, 2, 3e-1, 4e-1, fresh_dropout=True),
            "qnli": row(2e-2, 2, 1e-1, 3e-1, fresh_dropout=True),
            "qqp": row(2e-1, 2, 3.2e-1, 7e-1, fresh_dropout=True),
            "sst2": row(5e-2, 2, 2e-1, 5e-1, fresh_dropout=True),
            "cola": row(2e-2, 3, 1e-1, 2e-1, fresh_dropout=True),
            "mrpc": row(5e-2, 2, 1e-1, 2e-1, fresh_dropout=True),
            "stsb": row(1e-1, 2, 1e-1, 2.8e-1, fresh_dropout=True),
            "rte": row(2e-2, 2, 1.6e-1, 1.4e-1, fresh_dropout=True),
        }
    }

    steps: int = 3
    step_size: float = 0.05
    radius: float | None = 0.1
    projection: Projection = field(default="ball", init=False)
    box: tuple[float, float] | None = field(default=None, init=False)
    write: Literal["mean", "accumulate"] = "mean"
    exclude: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_memory(self)
        check_integer("TextAT", "steps (the number of passes)", self.steps, 1)
        if self.write not in ("mean", "accumulate"):
            raise ValueError(f"TextAT: write={self.write!r} is not 'mean' or 'accumulate'.")
        if not isinstance(self.exclude, tuple) or not all(type(i) is int for i in self.exclude):
            raise TypeError(f"TextAT: exclude must be a tuple of token ids, got {self.exclude!r}.")
        if any(i < 0 for i in self.exclude):
            raise ValueError(f"TextAT: exclude holds a negative token id, {self.exclude!r}.")

    def play(self, stage: Moves) -> Play:
        """Play `(1/K) Σ ∇θ ℓ(X + δ_t + η_t)`."""
        tokens = Tokens(self, stage)
        q = stage.start(self, tokens.begin)
        for _ in range(self.steps - 1):
            yield stage.loss(q, last=False) / self.steps
            q = stage.move(q, tokens.move)
        objective = stage.loss(q.detach()) / self.steps
        tokens.write()
        yield Step(objective)


class Tokens:
    """The two perturbations of a round, and the table of the one of tokens."""

    def __init__(self, solver: TextAT, stage: Moves) -> None:
        self.solver = solver
        self.stage = stage
        self.calls: list[Call] = []
        self.deltas: list[Tensor] = []
        self.etas: list[Tensor] = []
        self.standing: list[Tensor] = []  # 0 for samples that fell back to δ = 0

    def begin(self, index: int, call: Call) -> Tensor:
        """Return δ_0 + Z[w] at a call of the site."""
        if call.ids is None or call.ids.dim() != 2:
            raise GameError(
                "TextAT keeps a perturbation for each token, and the site "
                f"{self.stage.site} is not an embedding that is called with token ids "
                "[B, n]. Leave site= out, or choose another solver."
            )
        self.calls.append(call)
        self.deltas.append(self.stage.draw(self.solver, call))
        self.etas.append(self.table(call)[call.ids] * self.real(call))
        self.standing.append(torch.ones_like(self.deltas[index][:, :1, :1]))
        return self.bound(index)

    def move(
        self,
        index: int,
        q: Tensor,
        g: Tensor,
        mask: Tensor | None,
        draw: Draw,
        owners: Tensor | None,
    ) -> Tensor:
        """Return δ + η after one move of both."""
        call, solver = self.calls[index], self.solver
        unbounded = replace(solver, radius=None, start_size=solver.initial_size)
        self.deltas[index] = unbounded.move(self.deltas[index], g, mask, draw, owners)
        step = geometry.steepest(g * self.real(call), solver.norm, "token")
        eta = self.etas[index] + solver.step_size * step
        lengths = geometry.norms(eta, "l2", "token")
        longest = geometry.norms(lengths, "linf", "sample", owners)
        self.etas[index] = eta * lengths / torch.where(longest > 0, longest, 1.0)
        finite = (self.deltas[index] + self.etas[index]).isfinite().flatten(1).all(1)[:, None, None]
        for part in (self.deltas, self.etas):
            part[index] = torch.where(finite, part[index], 0.0)
        self.standing[index] = self.standing[index] * finite
        return torch.where(finite, self.bound(index), torch.nan)  # δ = 0, and counted

    def bound(self, index: int) -> Tensor:
        """Scale both parts so that their sum lies in the ball, and return it."""
        solver, total = self.solver, self.deltas[index] + self.etas[index]
        owners = self.calls[index].owners
        if solver.radius is not None:
            length = geometry.norms(total, solver.norm, solver.per, owners)
            scale = torch.where(length > solver.radius, solver.radius / length, 1.0)
            self.deltas[index] = scale * self.deltas[index]
            self.etas[index] = scale * self.etas[index]
            total = solver.project(scale * total, owners)
        return total

    def real(self, call: Call) -> Tensor:
        """Return 1 at tokens that have a perturbation of their own, `[B, n, 1]`."""
        assert call.ids is not None
        real = torch.ones_like(call.ids, dtype=torch.bool)
        for token in self.solver.exclude:
            real &= call.ids != token
        real = real[..., None].to(call.empty().dtype)
        return real if call.mask is None else real * call.mask

    def table(self, call: Call) -> Tensor:
        """Return Z `[V, D]`; at first uniform, a row at most `start_size` long."""
        like = call.empty()
        size = (call.vocabulary, call.shape[-1])
        if "table" not in self.stage.memory:
            longest = 0.0 if self.solver.start == "zero" else self.solver.initial_size
            rows = self.stage.constant("table", "uniform", like.new_empty(size))
            self.stage.memory["table"] = longest * rows / size[1] ** 0.5
        table = self.stage.memory["table"]
        if table.shape != size:
            raise GameError(
                f"TextAT's table is {list(table.shape)}, and the embedding that is called now "
                f"{list(size)}: play on one embedding, and load a checkpoint of the same model."
            )
        return table.to(like)

    def write(self) -> None:
        """Write η of this round into the table, that of samples whose gradients were finite."""
        if not self.calls:
            return
        table = self.table(self.calls[0])
        change, count = torch.zeros_like(table), table.new_zeros(len(table), 1)
        for call, eta, standing in zip(self.calls, self.etas, self.standing, strict=True):
            assert call.ids is not None
            ids, real = call.ids.flatten(), self.real(call) * standing
            new = eta if self.solver.write == "accumulate" else eta - table[call.ids]
            change.index_add_(0, ids, (new * real).flatten(0, 1))
            count.index_add_(0, ids, real.flatten(0, 1))
        parallel.add_up(change)
        parallel.add_up(count)
        if self.solver.write == "mean":
            change = change / count.clamp(min=1)
        self.stage.memory["table"] = table + change
