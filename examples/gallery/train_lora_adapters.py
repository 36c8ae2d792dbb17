"""Train LoRA adapters against an adversary: the base stays frozen, and may be quantised."""

import peft
import torch
from transformers import BertConfig, BertForSequenceClassification

import mixadv

torch.manual_seed(0)
size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
base = BertForSequenceClassification(BertConfig(vocab_size=30, num_hidden_layers=2, **size))
lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
model = peft.get_peft_model(base, lora)

words = torch.randint(30, (64, 8))
batch = {"input_ids": words, "labels": (words < 15).sum(1).gt(4).long()}
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = mixadv.wrap(torch.optim.AdamW(trained, lr=1e-2), model, mixadv.SMART())
print(optimizer.game.explain(lambda: model(**batch)))

first = optimizer.step(lambda: model(**batch))
for _ in range(40):
    last = optimizer.step(lambda: model(**batch))
share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
print(f"{100 * share:.0f} % of the parameters are trained; loss {first:.2f}, then {last:.2f}")
model.save_pretrained("adapter")  # a few kilobytes: the adapters alone
