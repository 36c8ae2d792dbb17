"""MAT written from its formulas as research code is: the baseline that `mixadv.MAT` is timed with.

The ascent's backwards go through all weights, its clean forward is one of its own, noise and means
loop over parameters and rebind `.data`, θ_t and θ̄ are copies of the state dict. One particle;
formulas as in `mixadv/solvers/mat.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[str, Tensor], Tensor]


def normal(kind: str, like: Tensor) -> Tensor:
    """Return a normal draw shaped like a tensor."""
    return torch.randn_like(like)


def symmetric_kl(logits: Tensor, target: Tensor) -> Tensor:
    """Return the divergence of two predictions, averaged over the batch."""
    log_p, log_q = F.log_softmax(target, -1), F.log_softmax(logits, -1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean()


def normalised(x: Tensor) -> Tensor:
    """Return each sample divided by its L2 norm."""
    return x / x.flatten(1).norm(dim=1).view(-1, 1, 1)


def projected(delta: Tensor, radius: float) -> Tensor:
    """Return each sample scaled back into the L2 ball."""
    norm = delta.flatten(1).norm(dim=1).view(-1, 1, 1)
    return delta * (radius / norm).clamp(max=1)


def perturbed_logits(model: Any, batch: dict[str, Tensor], delta: Tensor) -> Tensor:
    """Return the predictions with δ added to the embedded words."""
    embed = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    return model(inputs_embeds=embed + delta, attention_mask=mask).logits


def adversary(model: Any, batch: dict[str, Tensor], solver: Any, unit: float, draw: Draw) -> Tensor:
    """Return the damped δ̄ after K_δ Langevin steps, in units of the embedding."""
    clean = model(**batch).logits.detach()
    like = model.get_input_embeddings()(batch["input_ids"]).detach()
    delta = solver.initial_size * draw("normal", like) / like[0].numel() ** 0.5
    delta = mean = projected(delta, solver.radius)
    for _ in range(solver.steps):
        delta = delta.detach().requires_grad_()
        symmetric_kl(perturbed_logits(model, batch, unit * delta), clean).backward()
        delta = delta.detach() + solver.step_size * normalised(delta.grad)
        noise = draw("normal", delta)
        delta = delta + (2 * solver.step_size * solver.temperature) ** 0.5 * noise
        delta = projected(delta, solver.radius)
        mean = solver.damping * mean + (1 - solver.damping) * delta
    return mean


def play(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    solver: Any,
    unit: float,
    draw: Draw = normal,
) -> Tensor:
    """Play a round; return δ̄ `[B, n, D]`, in units of the embedding."""
    delta = adversary(model, batch, solver, unit, draw)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    mean = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(solver.learner_steps):
        optimizer.zero_grad()
        output = model(**batch)
        divergence = symmetric_kl(perturbed_logits(model, batch, unit * delta), output.logits)
        (output.loss + solver.smoothness_weight * divergence).backward()
        optimizer.step()
        scale = (2 * optimizer.param_groups[0]["lr"] * solver.learner_temperature) ** 0.5
        for parameter in model.parameters():
            parameter.data = parameter.data + scale * draw("normal", parameter.data)
        for name, value in model.state_dict().items():
            mean[name] = solver.damping * mean[name] + (1 - solver.damping) * value
    keep = solver.round_damping
    model.load_state_dict({n: keep * start[n] + (1 - keep) * mean[n] for n in mean})
    optimizer.zero_grad()
    return delta
