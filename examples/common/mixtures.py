"""Mixtures of fine-tuned classifiers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.model import load_classifier
from mixadv.mixtures import Mixture
from mixadv.mixtures.saved import INDEX
from mixadv.reports.kept import digest


def load(folders: Sequence[str]) -> tuple[Mixture, Any]:
    """Return a mixture on the device, and its tokenizer.

    Args:
        folders: of models, the members, all alike; or one of a saved mixture, which holds the model
            that its members change too.

    Raises:
        ValueError: if there is no such model, or the members differ in their classes or tokenizers.
    """
    if len(folders) == 1 and (Path(folders[0]) / INDEX).is_file():
        try:
            model, tokenizer = load_classifier(folders[0])
        except ValueError as error:
            raise ValueError(
                f"{error} The model that the members of a mixture change is saved with them, and "
                "its tokenizer: model.save_pretrained, tokenizer.save_pretrained."
            ) from error
        return Mixture.from_pretrained(folders[0], model), tokenizer
    loaded = [load_classifier(folder) for folder in folders]
    models, tokenizers = zip(*loaded, strict=True)
    for folder, (model, tokenizer) in zip(folders, loaded, strict=True):
        if model.config.id2label != models[0].config.id2label:
            raise ValueError(f"{folder} has other classes than {folders[0]}: they make no mixture.")
        if digest(tokenizer) != digest(tokenizers[0]):
            raise ValueError(
                f"{folder} has another tokenizer than {folders[0]}: the members of a mixture read "
                "the same tokens."
            )
    return Mixture(models), tokenizers[0]
