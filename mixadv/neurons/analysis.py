"""What an analysis of neurons has found, as data and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mixadv.reports.tables import DASH, Table


@dataclass(frozen=True)
class NeuronAnalysis:
    """What the neurons of a model know of tags. Accuracies are shares of the held-out words.

    Attributes:
        layers: the embedding layer and those above it.
        hidden: neurons of a layer; neuron `i` is in layer `i // hidden`.
        tags: their names.
        words: to train the probes on, and held out.
        penalty: of the probes.
        converged: whether all probes did.
        ranking: all neurons, the most important first.
        neurons: the size of the smallest set.
        accuracy: of probes on `all` neurons, on the smallest set (`top`), and on as many of the
            `last` ones; `control` and `control top`, of the control task on all neurons and on the
            smallest set; `shuffled`, where tags are shuffled among words; `majority`, of always
            saying the tag that is the most frequent in training.
        random: accuracies on as many neurons as the smallest set has, one for each draw.
        per_layer: neurons of the smallest set in each layer.
        per_tag: neurons of the smallest set that each tag has brought in; tags may share one.
        sizes: numbers of neurons, for the curves.
        top_curve: accuracies of that many of the first neurons.
        random_curves: accuracies of that many random neurons, for each draw.
    """

    layers: int
    hidden: int
    tags: list[str]
    words: list[int]
    penalty: float
    converged: bool
    ranking: list[int]
    neurons: int
    accuracy: dict[str, float]
    random: list[float]
    per_layer: list[int]
    per_tag: dict[str, int]
    sizes: list[int]
    top_curve: list[float]
    random_curves: list[list[float]]

    @property
    def smallest_set(self) -> list[int]:
        """The fewest neurons that were found to be enough, the most important first."""
        return self.ranking[: self.neurons]

    @property
    def selectivity(self) -> float:
        """Accuracy on the tags minus accuracy on the control task, of all neurons."""
        return self.accuracy["all"] - self.accuracy["control"]

    def as_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` can write; `NeuronAnalysis(**found)` reads it again."""
        return asdict(self)

    def table(self) -> str:
        """Return a Markdown table of one row, see `table`."""
        return table({"model": self})


def table(analyses: Mapping[str, NeuronAnalysis]) -> str:
    """Return a Markdown table with a row for each model; accuracies in per cent."""
    kinds = ("all", "top", "random", "last", "control", "selectivity", "shuffled", "majority")
    rows = []
    for name, found in analyses.items():
        numbers = found.accuracy | {
            "random": sum(found.random) / len(found.random),
            "selectivity": found.selectivity,
        }
        stopped = "" if found.converged else ", not converged"
        size = [f"{found.neurons} of {len(found.ranking)}{stopped}"]
        rows.append([name, *size, *(f"{100 * numbers[kind]:.1f}" for kind in kinds)])
    return Table("", ["model", "neurons", *kinds], rows).markdown()


def counts(analyses: Mapping[str, NeuronAnalysis]) -> str:
    """Return a Markdown table of the smallest sets: a row for each layer and each tag."""
    layers = max((found.layers for found in analyses.values()), default=0)
    tags = sorted({tag for found in analyses.values() for tag in found.tags})
    rows = [
        [f"layer {i}", *(str(dict(enumerate(a.per_layer)).get(i, DASH)) for a in analyses.values())]
        for i in range(layers)
    ]
    rows += [[tag, *(str(a.per_tag.get(tag, DASH)) for a in analyses.values())] for tag in tags]
    return Table("", ["neurons", *analyses], rows).markdown()
