"""What an analysis of neurons has found, as data, as tables and as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mixadv.reports.shown import COLOURS, DASH, Table, figure

TOP, RANDOM, OTHER = COLOURS[0], COLOURS[1], COLOURS[-1]


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


def draw(analysis: NeuronAnalysis, path: str | Path) -> None:
    """Save accuracy against neurons, and neurons of the smallest set per layer and per tag."""
    with figure(12, 4.2) as drawn:
        curves, layers, tags = drawn.subplots(1, 3, width_ratios=(1.5, 1, 1))
        _curves(curves, analysis)
        layers.bar(range(analysis.layers), analysis.per_layer, color=TOP)
        layers.set(xlabel="layer (0: embeddings)", xticks=range(analysis.layers))
        layers.set_title(f"Layers of the {analysis.neurons}", loc="left")
        names = sorted(analysis.per_tag, key=analysis.per_tag.__getitem__)
        tags.barh(names, [analysis.per_tag[name] for name in names], color=TOP)
        tags.set(xlabel="neurons, some of several tags")
        tags.set_title("Neurons of each tag", loc="left")
        drawn.savefig(path)


def compare(
    analyses: Mapping[str, NeuronAnalysis], by: Literal["layer", "tag"], path: str | Path
) -> None:
    """Save how many neurons of each layer or tag are in the smallest set of each model, by name."""
    bars: dict[str, dict[Any, int]] = {
        name: dict(enumerate(found.per_layer)) if by == "layer" else found.per_tag
        for name, found in analyses.items()
    }
    places = sorted({place for own in bars.values() for place in own})
    with figure(max(6.0, 0.25 * len(places) * (len(bars) + 1)), 3.6) as drawn:
        axes, width = drawn.subplots(), 0.8 / max(1, len(bars))
        for i, (name, own) in enumerate(bars.items()):
            at = np.arange(len(places)) + (i + 0.5) * width - 0.4
            heights, colour = [own.get(place, 0) for place in places], COLOURS[i % len(COLOURS)]
            label = f"{name} ({analyses[name].neurons})"
            axes.bar(at, heights, width, label=label, color=colour)
        axes.set_xticks(range(len(places)), [str(place) for place in places])
        axes.set(xlabel="layer (0: embeddings)" if by == "layer" else by)
        axes.set_title("Neurons of the smallest set", loc="left")
        drawn.legend(loc="outside right upper")
        drawn.savefig(path)


def _curves(axes: Any, analysis: NeuronAnalysis) -> None:
    """Draw accuracies against numbers of neurons."""
    sizes, random = analysis.sizes, 100 * np.array(analysis.random_curves)
    axes.plot(sizes, 100 * np.array(analysis.top_curve), "o-", ms=3, color=TOP, label="first")
    axes.plot(sizes, random.mean(0), "o-", ms=3, color=RANDOM, label="random")
    axes.fill_between(sizes, random.min(0), random.max(0), color=RANDOM, alpha=0.25, lw=0)
    axes.axhline(100 * analysis.accuracy["majority"], color=OTHER, lw=0.8, ls=":")
    axes.axvline(analysis.neurons, color=TOP, lw=0.8, ls="--")
    below, right = axes.get_xaxis_transform(), axes.get_yaxis_transform()
    axes.text(analysis.neurons, 0.02, f" {analysis.neurons}", color=TOP, transform=below)
    high = 100 * analysis.accuracy["majority"]
    axes.text(1, high, "most frequent tag ", color=OTHER, transform=right, ha="right", va="bottom")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="neurons", xlim=(1, sizes[-1]))
    axes.set_title("Accuracy of a probe, %", loc="left")
    axes.legend(loc="upper left")
