"""Tiny language models that chat, built in code: families, templates, a tokenizer."""

import copy
from typing import Any

import torch
import transformers
from torch import nn

from tests.tokenizers_zoo import byte_level

LENGTH = 200
SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, SIZE),
    "SmolLM2": (  # a Llama that predicts by its embedding
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {**SIZE, "tie_word_embeddings": True},
    ),
    "Qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, SIZE),
    "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, SIZE),
    "Mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {
            **SIZE,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",  # grouped products are not of fp64
        },
    ),
    "Mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, SIZE),
    "Gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, SIZE),
    "GPT2": (
        transformers.GPT2Config,
        transformers.GPT2LMHeadModel,
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": LENGTH},
    ),
}
TEMPLATES = {  # as families write them, with the tokens that are one of the vocabulary
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "llama": (
        "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}"
        "<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}",
        ["<|begin|>", "<|head|>", "<|tail|>", "<|eot|>"],
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
    ),
    "gemma": (
        "<bos>{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    ),
}


def chatting(template: str = "chatml") -> Any:
    """Return a tokenizer of bytes with a template, by name or as it stands."""
    tokenizer = copy.deepcopy(byte_level())
    text, special = TEMPLATES.get(template, (template, []))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = text
    return tokenizer


def speaking(family: str, tokenizer: Any, seed: int = 2) -> nn.Module:
    """Return a tiny model in float64, whose answers differ from prompt to prompt."""
    config, kind, size = FAMILIES[family]
    torch.manual_seed(seed)
    names = ("eos_token_id", "pad_token_id", "bos_token_id")
    words = {"vocab_size": len(tokenizer), "tie_word_embeddings": False, **dict.fromkeys(names)}
    model = kind(config(**{**words, **size})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model.eval()
