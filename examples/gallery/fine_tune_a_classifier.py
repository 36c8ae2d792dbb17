"""Fine-tune a text classifier plainly and with FreeLB; compare both under attack."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import mixadv
from mixadv.equilibrium import best_response


def texts(count: int) -> dict[str, torch.Tensor]:
    """Return texts of 8 words out of 30; the label says whether words below 10 are the majority."""
    words = torch.randint(20, (count, 8)) + torch.randint(2, (count, 1)) * 10
    return {"input_ids": words, "labels": (words < 15).sum(1).gt(4).long()}


def accuracy(model: torch.nn.Module, radius: float) -> float:
    """Return the accuracy under PGD in the embedding space."""
    attacker = mixadv.Game(model, mixadv.PGD(steps=5, radius=radius, step_size=radius / 2))
    predictions = best_response(attacker, lambda: model(**test)).predictions
    return (predictions.argmax(1) == test["labels"]).float().mean().item()


torch.manual_seed(0)
train, test = texts(256), texts(256)
size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
config = BertConfig(vocab_size=30, num_hidden_layers=2, **size)
for name, solver in {"plain": mixadv.PGD(radius=0), "FreeLB": mixadv.FreeLB(radius=0.4)}.items():
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    optimizer = mixadv.wrap(optimizer, model, solver)
    for step in range(60):
        batch = {key: values[32 * step % 256 :][:32] for key, values in train.items()}
        optimizer.step(lambda: model(**batch))
    model.eval()
    found = ", ".join(f"{accuracy(model, radius):.2f} at {radius}" for radius in (0.01, 0.4, 0.8))
    print(f"{name:6} accuracy under attack: {found}")
