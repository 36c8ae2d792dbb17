"""Two models with the same embedding tables, and their checkpoints."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import Tensor, nn

from mixadv.checks import check_number


def share_embeddings(borrower: nn.Module, owner: nn.Module) -> None:
    """Let one model use the embedding tables of another one.

    Tables are those of tokens, and those beside them that have the same name in both models:
    positions and token types. Where the borrower holds one a second time, as a tied output layer
    does, it holds the owner's there too. Raise ValueError if two tables differ in size.
    """
    theirs = _tables(owner)
    pairs = {n: (own, theirs[n]) for n, own in _tables(borrower).items() if n in theirs}
    for name, (old, new) in pairs.items():
        if old.shape != new.shape:
            raise ValueError(
                f"The models cannot share their {name}: sizes are {list(old.shape)} and "
                f"{list(new.shape)}. Give both configs the same vocab_size, embedding_size, "
                "max_position_embeddings and type_vocab_size, or share nothing with tie=None."
            )
    swaps = dict(pairs.values())
    for module in borrower.modules():
        for place, held in module._parameters.items():
            if held is not None and held in swaps:
                setattr(module, place, swaps[held])


def _tables(model: nn.Module) -> dict[str, Tensor]:
    tokens = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    beside = next(m for m in model.modules() if any(child is tokens for child in m.children()))
    tables = {n: m.weight for n, m in beside.named_children() if isinstance(m, nn.Embedding)}
    return {"token embeddings": tokens.weight, **tables}


def generator_config(config: Any, fraction: float = 0.25) -> Any:
    """Return the config of a generator that is narrower than its discriminator.

    The embeddings keep their size, so that both can share them. The paper takes a quarter of the
    width for small models, a third for base ones.

    Args:
        config: the discriminator's, of transformers, with an `embedding_size`; left as it is.
        fraction: of hidden and intermediate sizes and of attention heads, in (0, 1].

    Raises:
        ValueError: if the config has no `embedding_size`, or for another fraction.

    Example:
        >>> from transformers import ElectraConfig
        >>> narrow = generator_config(ElectraConfig(hidden_size=256, num_attention_heads=4))
        >>> narrow.hidden_size, narrow.num_attention_heads, narrow.embedding_size
        (64, 1, 128)
    """
    check_number("generator_config", "fraction", fraction, least=1e-3, most=1.0)
    if not hasattr(config, "embedding_size"):
        raise ValueError(
            f"{type(config).__name__} has no embedding_size: its embeddings are as wide as the "
            "model, and a narrower generator could not share them. Take an ElectraConfig."
        )
    narrow = copy.deepcopy(config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        setattr(narrow, name, max(1, round(getattr(config, name) * fraction)))
    narrow.num_attention_heads = math.gcd(narrow.num_attention_heads, narrow.hidden_size)
    return narrow


def save_once(model: nn.Module) -> None:
    """Let the model's checkpoints hold each shared parameter once, under its first name.

    Formats that refuse tensors which share memory, safetensors with it, can then write
    `model.state_dict()`. Loading gives all places what the checkpoint has, and ties stay ties.
    The model is changed in place; copies, wrappers and pickles of it behave in the same way.
    """
    model.register_state_dict_post_hook(_drop_repeated)
    model.register_load_state_dict_pre_hook(_repeat)
    model.register_load_state_dict_post_hook(_tie_again)


def _ties(model: nn.Module) -> dict[str, str]:
    """Return the further names of shared parameters, each with the first one."""
    first: dict[Tensor, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


def _drop_repeated(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _ties(model):
        state.pop(prefix + name, None)


def _repeat(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    model._loading_ties = _ties(model)  # pyright: ignore[reportArgumentType]
    for name, first in model._loading_ties.items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


def _tie_again(model: nn.Module, _: Any) -> None:
    """Tie what `assign=True` made a parameter of its own at each place."""
    for name, first in model.__dict__.pop("_loading_ties").items():
        path, _, place = name.rpartition(".")
        model.get_submodule(path)._parameters[place] = model.get_parameter(first)
