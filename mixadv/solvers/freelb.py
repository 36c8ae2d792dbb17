"""FreeLB: the gradient averaged along the ascent. Zhu et al. 2020, arXiv:1909.11764, Alg. 1.

    g ← (1/K) Σ_{t=1..K} ∇θ ℓ(f(X + δ_{t−1}), y),     δ_t = Π( δ_{t−1} + α·∇δℓ/‖∇δℓ‖₂ )

Both gradients come from one backward per step, so K steps cost K plain ones. Every step sees the
same dropout mask. `steps` counts passes, as in the paper; the released fairseq code makes one more.

Published: the launch scripts of github.com/zhuchen03/FreeLB, fairseq-RoBERTa/launch/FreeLB/*.sh
(adv_steps + 1 passes; the script for RTE ships zeros, so it has no row) and, for ALBERT,
huggingface-transformers/launch/run_glue.sh (adv_steps passes; a norm of 0 there is no ball). That
code does not project δ_0. Trained with Adam (weight decay 0.1, no clipping; ALBERT: AdamW, 0.01,
gradients clipped to a norm of 1, attention dropout 0, for QQP and RTE 0.1) and linear decay; ALBERT
and "-fp16" in fp16:

    model              task        lr   batch  updates  warm-up
    roberta-large      mnli      1e-5      33   123873     7432
    roberta-large      qnli      1e-5      32    33112     1986
    roberta-large      qnli-fp16 1e-5      32    33112     1986
    roberta-large      qqp       1e-5      32   113272    28318
    roberta-large      qqp-fp16  1e-5      32   113272    28318
    roberta-large      sst2      1e-5      32    20935     1256
    roberta-large      cola      1e-5      16     5536      320
    roberta-large      mrpc      5e-6      16     2296      137
    roberta-large      stsb      2e-5      16     3598      214
    albert-xxlarge-v2  mnli      3e-5     128    10000     1000
    albert-xxlarge-v2  qnli      1e-5      32    33112     1986
    albert-xxlarge-v2  qqp       5e-5     128    14000     1000
    albert-xxlarge-v2  sst2      1e-5      32    20935     1256
    albert-xxlarge-v2  cola      1e-5      16     5336      320
    albert-xxlarge-v2  mrpc      2e-5      16      800      200
    albert-xxlarge-v2  stsb      2e-5      16     3598      214
    albert-xxlarge-v2  rte       3e-5      32      800      200
"""

from dataclasses import dataclass
from typing import ClassVar

from mixadv.checks import check_integer
from mixadv.solvers.base import Presets, Solver, row
from mixadv.solvers.play import Moves, Play, Step


@dataclass(frozen=True, kw_only=True)
class FreeLB(Solver):
    """Minimise the loss averaged over the points δ_0 … δ_{K−1} of an ascent.

    Use it for accuracy within a ball around the embeddings, with published settings for GLUE
    (`FreeLB.published`). Each pass gives both gradients. Passes: K forwards, K backwards.
    """

    name: ClassVar[str] = "freelb"
    paper: ClassVar[str] = "Zhu et al. 2020, arXiv:1909.11764"
    summary: ClassVar[str] = "the loss averaged along the ascent, δ's gradient for free"
    presets: ClassVar[Presets] = {  # step size, passes, start, radius
        "roberta-large": {
            "mnli": row(1e-1, 3, 1e-1, 3e-1),
            "qnli": row(7.5e-2, 3, 1.5e-1, 1.5e-1),
            "qnli-fp16": row(1e-1, 3, 2e-1, 2e-1),
            "qqp": row(2e-1, 3, 3.2e-1, 7e-1),
            "qqp-fp16": row(1.5e-1, 3, 3.2e-1, 6.2e-1),
            "sst2": row(1e-1, 3, 1.0, 6e-1),
            "cola": row(2.5e-2, 4, 4e-1, 3e-1),
            "mrpc": row(4e-2, 4, 6.4e-1, 4e-1),
            "stsb": row(1e-1, 4, 1.6e-1, 2.8e-1),
        },
        "albert-xxlarge-v2": {
            "mnli": row(4e-2, 3, 8e-2, None),
            "qnli": row(5e-2, 3, 1e-1, None),
            "qqp": row(2e-1, 3, 3.2e-1, 7e-1),
            "sst2": row(1e-1, 2, 6e-1, None),
            "cola": row(4e-2, 3, 5e-2, None),
            "mrpc": row(3e-2, 4, 0.0, None),
            "stsb": row(1e-1, 3, 2e-1, None),
            "rte": row(1e-1, 3, 0.0, None),
        },
    }

    steps: int = 3
    step_size: float = 0.05
    radius: float | None = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("FreeLB", "steps (the number of passes)", self.steps, 1)

    def play(self, stage: Moves) -> Play:
        """Play `(1/K) Σ ∇θ ℓ(X + δ_t)`."""
        delta = stage.start(self)
        for _ in range(self.steps - 1):
            yield stage.loss(delta, last=False) / self.steps
            delta = stage.move(delta, self)
        yield Step(stage.loss(delta.detach()) / self.steps)
