"""Train with transformers' Trainer: one more argument, and the adversary in its log."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

import mixadv
from mixadv.integrations.transformers import AdversarialTrainer

set_seed(0)
size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
model = BertForSequenceClassification(BertConfig(vocab_size=30, num_hidden_layers=2, **size))
words = torch.randint(1, 30, (256, 8))  # 0 is padding
rows = [{"input_ids": row, "labels": int((row < 15).sum() > 4)} for row in words]
arguments = TrainingArguments(
    "trained",
    max_steps=40,
    learning_rate=3e-3,
    per_device_train_batch_size=32,
    logging_steps=20,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
trainer = AdversarialTrainer(model, arguments, train_dataset=rows, solver=mixadv.SMART())
trainer.remove_callback(PrinterCallback)  # its log is printed below
trainer.train()
for entry in trainer.state.log_history[:2]:
    names = ("step", "loss", "clean_loss", "payoff", "radius")
    print(", ".join(f"{name} {entry[name]:.3g}" for name in names))
