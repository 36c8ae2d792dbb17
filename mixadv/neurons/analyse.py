"""Linguistic correlation analysis: which neurons know the tags of words, and how few are enough.

Dalvi et al., "What is one grain of sand in the desert? Analyzing individual neurons in deep NLP
models", AAAI 2019 (arXiv 1812.09355), as used on adversarially trained models in "Impact of
adversarial training on robustness and generalizability of language models", Findings of ACL 2023
(arXiv 2211.05523): a linear probe predicts tags from the activations of a frozen model, its weights
rank the neurons, and probes trained anew on the first of them say how many are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mixadv.neurons.activations import Activations
from mixadv.neurons.analysis import NeuronAnalysis
from mixadv.neurons.probe import Probe, claims, rank

PENALTIES = (1e-2, 3e-3, 1e-3)
"""What the penalty of the probe is chosen from."""


def analyse_neurons(
    train: Activations,
    held_out: Activations,
    *,
    penalty: float | None = None,
    l1_ratio: float = 0.5,
    tolerance: float = 0.01,
    draws: int = 3,
    seed: int = 0,
    progress: bool = False,
) -> NeuronAnalysis:
    """Find the fewest neurons that predict tags nearly as well as all do.

    The smallest set is found by trying the first 1, 2, 4, ... neurons of the ranking until a probe
    trained anew on them is within `tolerance`, and by bisection between the last two sizes. Two
    checks come along. In the control task of Hewitt and Liang (2019, arXiv 1909.03368) each word
    type has a random tag, here drawn by the tags' frequencies in training, that a probe can only
    memorise. Where tags are shuffled among words, only chance lets a probe do better than the most
    frequent tag.

    Args:
        train: activations to train the probes on; without a penalty given, the last fifth of
            them also chooses it, among `PENALTIES`, before the probe is trained on all.
        held_out: activations of other sentences, on which accuracies are measured. That the set
            is the smallest holds for these.
        penalty: λ of the probes, see `Probe`.
        l1_ratio: ρ of the probes.
        tolerance: accuracy that the smallest set may lack, a share.
        draws: of random neurons.
        seed: of random neurons and control tasks.
        progress: show a bar over the probes.

    Raises:
        ValueError: if the models differ, held-out words have a tag that training lacks, there is
            one tag only, or an argument is out of its range.
    """
    held_out = _checked(train, held_out, tolerance, draws)
    draw = np.random.default_rng(seed)
    with tqdm(disable=not progress, unit=" probes", leave=False) as bar:
        if penalty is None:
            penalty = _best_penalty(train, l1_ratio, bar)
        probing = _Probing(train, held_out, penalty, l1_ratio, bar)
        return probing.analyse(tolerance, draws, draw)


@dataclass
class _Probing:
    """Probes of one kind on one model."""

    train: Activations
    held_out: Activations
    penalty: float
    l1_ratio: float
    bar: Any
    converged: bool = True

    def probe(self, neurons: np.ndarray, tags: np.ndarray) -> Probe:
        values, classes = self.train.values[:, neurons], len(self.train.names)
        found = Probe.fit(values, tags, classes, penalty=self.penalty, l1_ratio=self.l1_ratio)
        self.converged &= found.converged
        self.bar.update()
        return found

    def accuracy(
        self, neurons: np.ndarray, task: tuple[np.ndarray, np.ndarray] | None = None
    ) -> float:
        """Return the held-out accuracy of a probe on some neurons."""
        own, others = task or (self.train.tags, self.held_out.tags)
        return self.probe(neurons, own).accuracy(self.held_out.values[:, neurons], others)

    def analyse(self, tolerance: float, draws: int, draw: np.random.Generator) -> NeuronAnalysis:
        """Return the analysis."""
        train, held_out = self.train, self.held_out
        every = np.arange(train.values.shape[1])
        full = self.probe(every, train.tags)
        ranking, best = rank(full.weights), full.accuracy(held_out.values, held_out.tags)
        sizes = [2**i for i in range(len(every).bit_length()) if 2**i < len(every)]
        score = cache(lambda k: self.accuracy(ranking[:k]))
        curve = [score(k) for k in sizes]
        neurons = smallest(score, sizes, len(every), best - tolerance)
        top = ranking[:neurons]
        orders = [draw.permutation(every) for _ in range(draws)]
        return NeuronAnalysis(
            layers=train.layers,
            hidden=train.hidden,
            tags=list(train.names),
            words=[len(train), len(held_out)],
            penalty=self.penalty,
            ranking=ranking.tolist(),
            neurons=neurons,
            accuracy={
                "all": best,
                "top": score(neurons) if neurons < len(every) else best,
                "last": self.accuracy(ranking[-neurons:]),
                **self.controls(top, draw),
            },
            random=[self.accuracy(order[:neurons]) for order in orders],
            per_layer=np.bincount(top // train.hidden, minlength=train.layers).tolist(),
            per_tag=dict(zip(train.names, claims(full.weights, top).sum(1).tolist(), strict=True)),
            sizes=[*sizes, len(every)],
            top_curve=[*curve, best],
            random_curves=[[*(self.accuracy(o[:k]) for k in sizes), best] for o in orders],
            converged=self.converged,  # last: all probes are trained by now
        )

    def controls(self, top: np.ndarray, draw: np.random.Generator) -> dict[str, float]:
        """Return accuracies where there is nothing to know of tags, or nothing is known."""
        every = np.arange(self.train.values.shape[1])
        control = _control(self.train, self.held_out, draw)
        shuffled = draw.permutation(self.train.tags), draw.permutation(self.held_out.tags)
        majority = np.bincount(self.train.tags).argmax()
        return {
            "control": self.accuracy(every, control),
            "control top": self.accuracy(top, control),
            "shuffled": self.accuracy(every, shuffled),
            "majority": float((self.held_out.tags == majority).mean()),
        }


def smallest(score: Callable[[int], float], sizes: list[int], most: int, enough: float) -> int:
    """Return the fewest neurons with a score that is enough; `most` are taken to have one."""
    high = next((k for k in sizes if score(k) >= enough), most)
    low = max((k for k in sizes if k < high), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if score(middle) >= enough else (middle, high)
    return high


def _best_penalty(train: Activations, l1_ratio: float, bar: Any) -> float:
    """Return the penalty with the best accuracy on the last fifth of the words."""
    cut = max(1, len(train) * 4 // 5)

    def score(penalty: float) -> float:
        own = train.values[:cut], train.tags[:cut], len(train.names)
        probe = Probe.fit(*own, penalty=penalty, l1_ratio=l1_ratio)
        bar.update()
        return probe.accuracy(train.values[cut:], train.tags[cut:])

    return max(PENALTIES, key=score)


def _control(
    train: Activations, held_out: Activations, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tags of a control task: each word type has a random one."""
    types = sorted({*train.words, *held_out.words})
    shares = np.bincount(train.tags, minlength=len(train.names)) / len(train)
    tag = dict(zip(types, draw.choice(len(shares), len(types), p=shares), strict=True))
    own, others = (np.array([tag[word] for word in part.words]) for part in (train, held_out))
    return own, others


def _checked(
    train: Activations, held_out: Activations, tolerance: float, draws: int
) -> Activations:
    """Return the held-out words with tags numbered as in training."""
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a share of the words, in [0, 1), got {tolerance}.")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}.")
    if (train.layers, train.hidden) != (held_out.layers, held_out.hidden):
        raise ValueError(
            f"train has {train.layers} × {train.hidden} neurons and held_out {held_out.layers} × "
            f"{held_out.hidden}: take both from one model."
        )
    for name, part in (("train", train), ("held_out", held_out)):
        if not len(part):
            raise ValueError(f"{name} has no words.")
    seen = [train.names[i] for i in np.unique(train.tags)]
    if len(seen) < 2:
        raise ValueError(f"All training words have the tag {seen[0]!r}: there is nothing to tell.")
    unseen = {held_out.names[i] for i in np.unique(held_out.tags)} - set(seen)
    if unseen:
        raise ValueError(
            f"Held-out words have tags that training lacks: {', '.join(sorted(unseen))}. Train on "
            "more words, or leave these out by held_out.with_tags(train.names)."
        )
    return held_out.with_tags(train.names)
