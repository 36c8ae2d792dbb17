"""What `help` says of a class of hyper-parameters: all that it takes, wherever that is declared.

A class says what it adds. What it does stands in its docstring, the formula in that of its file,
and each parameter where it is declared; here they are put together, once for each class.
"""

import inspect
import re
import sys
from dataclasses import Field, fields
from typing import Any

_EXAMPLE = """\
Example:
    >>> import torch, mixadv
    >>> layers = torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    >>> model = torch.nn.Sequential(*layers)
    >>> ids, labels = torch.arange(24).view(8, 3) % 9, torch.arange(8) % 2
    >>> def closure():
    ...     logits = model(ids)
    ...     return torch.nn.functional.cross_entropy(logits, labels), logits
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> optimizer = mixadv.wrap(optimizer, model, mixadv.{}({}))
    >>> optimizer.step(closure).shape
    torch.Size([])
"""


def compose(cls: type[Any], parent: type[Any], registered: bool) -> tuple[str, dict[str, str]]:
    """Return the docstring of a class that extends a dataclass, and what it says of parameters.

    The common example is true of the library's own solvers, which are `registered`.
    """
    doc = cls.__dict__.get("__doc__") or ""
    known = {**parent.described, **described(doc)}
    head, _ = _cut(inspect.cleandoc(doc), "Attributes:\n")
    text, example = _cut(head, "Example:\n")
    defaults = _parameters(cls, parent)
    if not example and registered:
        example = _EXAMPLE.format(cls.__name__, 'source="1"' if "source" in defaults else "")
    lines = [
        f"    {name} (default {value!r}):\n        {known.get(name, 'see above.')}"
        for name, value in defaults.items()
    ]
    parts = [text, _formula(cls), example, "Attributes:\n" + "\n".join(lines)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n", known


def _cut(text: str, at: str) -> tuple[str, str]:
    """Return what stands before a section, and the section."""
    before, title, after = text.partition(at)
    return before.rstrip(), title + after


def described(doc: str) -> dict[str, str]:
    """Return what a docstring says of each parameter, the lines indented as they stand there."""
    _, section = _cut(inspect.cleandoc(doc), "Attributes:\n")
    return dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE))


def _formula(cls: type[Any]) -> str:
    """Return what the file's docstring sets as formulas, up to the published settings."""
    doc = getattr(sys.modules.get(cls.__module__), "__doc__", None) or ""
    paragraphs = doc.partition("\nPublished:")[0].split("\n\n")
    return "\n\n".join(p for p in paragraphs if re.search("^    ", p, re.MULTILINE))


def _parameters(cls: type[Any], parent: type[Any]) -> dict[str, Any]:
    """Return the defaults of the parameters that the class takes, in their order."""
    taken = {f.name: f.default for f in fields(parent) if f.init}
    for name, kind in inspect.get_annotations(cls).items():
        value = cls.__dict__.get(name)
        if isinstance(value, Field) and not value.init:
            taken.pop(name, None)
        elif "ClassVar" not in str(kind):
            taken[name] = value.default if isinstance(value, Field) else value
    return taken
