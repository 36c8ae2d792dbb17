"""What the experiments with a language model share: settings, rows, training, measures."""

from dataclasses import asdict, dataclass

from common.results import digest

EXPERIMENTS = ("trigger", "policy")
OWN = ("experiment", "arm", "seed")
"""Settings that each run has of its own; the others are those of a command."""
LATER = {"gcg": 0, "dtype": "bfloat16"}
"""Settings that came later, as they were before: such a run has the key that it had then."""


@dataclass(frozen=True)
class Setting:
    """One run: all that its result depends on.

    Attributes:
        experiment: "trigger" or "policy".
        arm: how it is trained.
        seed: of adapters, order of rows and draws.
        model: a name of `common.model`, or a folder.
        updates: optimizer steps.
        batch_size: rows of each.
        learning_rate: of AdamW on the adapters.
        rank: of the adapters, on all linear layers.
        measure_every: updates.
        steps: of the adversary's ascent.
        radius: of the ball of each token, in mean token norms.
        dtype: float32 or bfloat16, of the weights and of all passes.
        gcg: steps of the search for suffixes that attack the policy; 0 searches none.
    """

    experiment: str
    arm: str
    seed: int
    model: str = "smollm2"
    updates: int = 32
    batch_size: int = 4
    learning_rate: float = 1e-3
    rank: int = 16
    measure_every: int = 16
    steps: int = 3
    radius: float = 0.2
    dtype: str = "float32"
    gcg: int = 0

    @property
    def key(self) -> str:
        """A name that is the same for the same run."""
        told = {k: v for k, v in asdict(self).items() if k not in LATER or v != LATER[k]}
        return f"{self.experiment}-{self.arm}-{self.seed}-{digest(told)}"
