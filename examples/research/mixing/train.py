"""Models and mixtures, each trained for as many passes as the others."""

import copy
from collections.abc import Callable
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

import mixadv
from common import data, model
from common.data import Task
from common.results import Run
from common.substitution import Source
from mixadv.mixtures import Adapter, Mixture

SMART = mixadv.SMART(
    steps=1, step_size=0.2, radius=0.2, start_size=0.05, smoothness_weight=1.0, ema_decay=0.99
)
MAT = mixadv.MAT()
PGD = mixadv.PGD(steps=1, step_size=0.2, radius=0.2)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"]}
COST = {"smart": 3.0, "mat": 8 / 3}
"""Of an optimizer step, in plain ones: a forward is a third of it, a backward two, of δ one."""
HALF = 0.5  # of the passes go into the model that members grow from
LENGTH = 64  # tokens


class Bench:
    """One seed of the comparison: its rows, its untrained model, and how long training lasts.

    Args:
        task: with train and test rows.
        name: of the untrained encoder.
        seed: of rows, head, order and players.
        shots: training rows of each label.
        epochs: that SMART trains for.
        rate: the learning rate of AdamW, and
        adapter_rate: that of adapters.
        folder: keeps the models that members grow from.
    """

    def __init__(
        self,
        task: Task,
        name: str,
        seed: int,
        shots: int,
        epochs: float,
        rate: float,
        adapter_rate: float,
        folder: Path,
    ) -> None:
        self.task, self.seed, self.rate, self.adapter_rate = task, seed, rate, adapter_rate
        self.folder = folder
        settings = {"shots": shots, "epochs": epochs, "seed": seed, "max_length": LENGTH}
        self.run = Run(task.name, model=name, learning_rate=rate, **settings)
        self.rows, _ = data.choose(task, seed, shots=shots)
        self.budget = COST["smart"] * epochs * len(self.rows) / self.run.batch_size

    @cached_property
    def untrained(self) -> tuple[nn.Module, Any]:
        """The encoder with a new head, and its tokenizer."""
        set_seed(self.seed)
        network, tokenizer = model.load(self.run, self.task)
        return network.to(model.device()), tokenizer

    def smart(self) -> Mixture:
        """Return one model by SMART."""
        network = copy.deepcopy(self.untrained[0])
        self._fit(network, self.budget / COST["smart"], self.rate, SMART)
        return Mixture([network])

    def mat(self, count: int = 1) -> Mixture:
        """Return one model by MAT, or what it is at the end of each cycle of the rate."""
        if count == 1:
            network = copy.deepcopy(self.untrained[0])
            self._fit(network, self.budget / COST["mat"], self.rate, MAT)
            return Mixture([network])
        network = self._half("mat", MAT)
        members = [_weights(network)]
        steps = (1 - HALF) * self.budget / COST["mat"] / (count - 1)
        for number in range(1, count):
            self._fit(network, steps, self.rate, MAT, order=number)
            members.append(_weights(network))
        return Mixture(members, model=network)

    def lora(self, count: int) -> Mixture:
        """Return adapters to one model."""
        base, names = self._half("smart", SMART), [f"member-{number}" for number in range(count)]
        set_seed(self.seed)
        network: Any = get_peft_model(base, LoraConfig(**LORA), names[0])
        for name in names[1:]:
            network.add_adapter(name, LoraConfig(**LORA))
        steps = (1 - HALF) * self.budget / COST["smart"] / count
        for number, name in enumerate(names):
            network.set_adapter(name)
            self._fit(network, steps, self.adapter_rate, SMART, order=number + 1)
        return Mixture([Adapter(name) for name in names], model=network)

    def boosted(self, count: int) -> Mixture:
        """Return members, each trained against attacks of itself and of those before.

        The adversary maximises the sum of the members' losses, of which the new one's learner has
        its own alone, at that δ and at δ = 0.
        """
        network = self._half("smart", SMART)
        members = [_weights(network)]
        spent = sum(map(_boosting, range(2, count + 1)))
        steps = (1 - HALF) * self.budget / spent
        for number in range(2, count + 1):
            attack = partial(_attack, network, list(members))
            retain = partial(partial, _output, network)
            self._fit(network, steps, self.rate, PGD, number, adversary=attack, retain=retain)
            members.append(_weights(network))
        return Mixture(members, model=network)

    def _half(self, name: str, solver: mixadv.Solver) -> nn.Module:
        """Return the model that members grow from, by the solver of a name."""
        path = self.folder / f"{self.run.key}-{name}.pt"
        network = copy.deepcopy(self.untrained[0])
        if not path.exists():
            self._fit(network, HALF * self.budget / COST[name], self.rate, solver)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(network.state_dict(), path)
        network.load_state_dict(torch.load(path, map_location=model.device()))
        return network

    def _fit(
        self,
        network: nn.Module,
        steps: float,
        rate: float,
        solver: mixadv.Solver,
        order: int = 0,
        **others: Callable[[Any], Callable[[], Any]],
    ) -> Any:
        """Train a network for so many steps of the base optimizer; return the wrapped one.

        Args:
            network: on the device.
            steps: of which the first tenth warms up; then the rate falls linearly to 0.
            rate: at the end of the warm-up.
            solver: that is played.
            order: another one of rows, for each number.
            others: what makes, of a batch, other closures of a step.
        """
        own = [p for p in network.parameters() if p.requires_grad]
        base = torch.optim.AdamW(own, lr=rate, weight_decay=self.run.weight_decay, fused=True)
        optimizer = mixadv.wrap(base, network, solver, seed=self.seed + 1000 * order)
        each = getattr(solver, "learner_steps", 1)
        rounds = max(1, round(steps / each))
        warm = max(1, rounds // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda done: min((done + 1) / warm, (rounds - done) / (rounds - warm + 1)),
        )
        tokenizer = self.untrained[1]
        encode = model.Encoder(tokenizer, LENGTH, False, model.device())
        run = Run(**{**vars(self.run), "seed": self.seed + 1000 * order})
        source = Source(run, self.rows, run.batch_size, slice(None), network.train(), tokenizer)
        batches = islice(source.batches(0, []), rounds)
        for batch in tqdm(map(encode, batches), total=rounds, leave=False, disable=None):
            closures = {name: make(batch) for name, make in others.items()}
            optimizer.step(partial(_output, network, batch), **closures)
            schedule.step()
        return optimizer


def _boosting(members: int) -> float:
    """Return the cost of a step of a new member: an attack of all, two passes of its learner."""
    return (2 * members + 6) / 3


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _attack(network: nn.Module, others: list[dict[str, Tensor]], batch: Any) -> Callable[[], Any]:
    """Return what an adversary maximises: the loss of each row, summed over members."""
    playing = [partial(_called, network, weights) for weights in others]
    return lambda: torch.stack([_losses(call, batch) for call in [network, *playing]]).sum(0)


def _called(network: nn.Module, weights: dict[str, Tensor], **inputs: Any) -> Any:
    return functional_call(network, weights, (), inputs)


def _losses(network: Callable[..., Any], batch: Any) -> Tensor:
    """Return the loss of each row."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = network(**inputs).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def _output(network: Callable[..., Any], batch: Any) -> Any:
    return network(**batch)
