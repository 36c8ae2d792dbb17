"""Whether what the passes of a first round gave can be played on."""

import warnings
from typing import Any

import torch
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.box import within
from mixadv.maths.divergence import divergence
from mixadv.model import parallel
from mixadv.model.closure import Reading
from mixadv.model.compiled_site import CompiledSite
from mixadv.model.contexts import compute_dtype
from mixadv.model.heads import kind_of
from mixadv.model.masks import placeholders
from mixadv.model.modules import is_input, unwrap
from mixadv.model.visits import positions
from mixadv.round.arena import Arena
from mixadv.round.stage import Stage
from mixadv.solvers.base import Solver


def check_owners(stage: Stage, zero: Reading) -> None:
    """Check that a map of rows to samples is one; rows that predict by themselves are samples.

    Of a loss alone, of which there is one for the batch, only a map in order is taken for one.
    """
    counted = zero.loss.dim() > 0 or zero.predictions is not None
    for visit in stage.passes.kept[-1].visits:
        call, rows = visit.call, visit.call.shape[0]
        if call.owners is None or call.owners.dim() == 2:  # of texts, which are numbered here
            continue
        numbers = call.owners.unique().tolist()
        if counted and zero.samples == rows and len(numbers) < rows:
            stage.arena.site.apart.add(visit.module)
            continue
        samples = zero.samples if counted else len(numbers)
        ordered = counted or bool((call.owners.diff() >= 0).all())
        if numbers != [*range(samples)] or not ordered:
            if (
                counted
                and (empty := sorted({*range(samples)} - {*numbers}))
                and numbers[-1] < samples
            ):
                raise GameError(
                    f"There are {samples} predictions, and of sample {empty[0]}, counted from 0, "
                    "no row at the site: a map of rows to samples, as batch or segments, leaves it "
                    "out. Leave samples without a row, such as empty graphs, out of the batch; if "
                    "it is no such map, give it another name."
                )
            said = f"{samples} predictions" if counted else "samples in order"
            raise GameError(
                f"The model is called with a map of {rows} rows to samples, as batch or segments, "
                f"whose numbers are not those of {said}, 0 to {samples - 1}: give it another name "
                "if it is none, and return (loss, logits) or one loss per sample from the closure."
            )


def check_where(stage: Stage) -> None:
    """Check that δ may act somewhere, on any process, where it was said where it may."""
    if stage.arena.site.where is None:
        return
    calls = stage.passes.kept[-1].calls
    nowhere = not any(int(positions(call.mask, call.shape)) for call in calls)
    if parallel.agreed(nowhere, stage.passes.parameters[0]):
        raise GameError(
            "where= is empty: δ may act at no position of this batch, so there is no adversary. "
            "Give a mask that is 1 where δ may act; later batches may lack such a position."
        )


def check_box(stage: Stage) -> None:
    """Check that what the site returns lies in the box, on every process."""
    arena, box = stage.arena, stage.arena.solver.box
    if box is None:
        return
    if isinstance(arena.site, CompiledSite) and not all(map(is_input, arena.site.names)):
        raise GameError(
            f"The site {arena.site.names} lies in a compiled model, so box= cannot be compared "
            "with what it returns: name the model's own input, site='input', or do not compile."
        )
    inside = all(within(x, box) for _, x in stage.passes.seen)
    if not parallel.agreed(inside, stage.passes.parameters[0]):
        least = min(float(x.min()) for _, x in stage.passes.seen)
        most = max(float(x.max()) for _, x in stage.passes.seen)
        raise GameError(
            f"The site {arena.site.names} returns values from {least:.3g} to {most:.3g}, and "
            f"box={box}: δ would move them from outside of it. Normalise inside of the model, so "
            "that it is called with pixels; or give the box of what the site returns."
        )


def check_masks(stage: Stage) -> None:
    """Warn of an argument that tells of padding, where the site's padding is not known."""
    current = stage.passes.kept[-1]
    for visit in current.visits:
        sizes = visit.call.shape[:2]
        if visit.call.mask is not None or len(visit.call.shape) < 2:
            continue
        for name, value in current.context.items():
            tells = ("padding" in name or "length" in name) and isinstance(value, Tensor)
            if tells and value.shape in (sizes, sizes[:1]) and bool((value != value.max()).any()):
                warnings.warn(
                    f"The model is called with {name!r}, but it is not known which positions at "
                    f"the site {stage.arena.site.names} are padding: δ acts on all of them. Say "
                    "where it may act, as in optimizer.step(closure, where=mask).",
                    stacklevel=8,
                )
                return


_BESIDES = ("pixel", "image", "video", "audio", "input_features", "input_values")


def check_inputs(stage: Stage) -> None:
    """Warn of images or sounds that are read beside ids, where nobody said which δ is added to.

    Not of a language model that reads them in the places of some of its ids.
    """
    site, current = stage.arena.site, stage.passes.kept[-1]
    if site.named or placeholders(unwrap(stage.arena.model)):
        return
    if all(visit.call.ids is None for visit in current.visits):
        return
    besides = [
        name
        for name, value in current.context.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
        if any(word in name for word in _BESIDES) and "mask" not in name
    ]
    if besides:
        warnings.warn(
            f"The model is called with {besides} too, which stay as they are: δ acts at "
            f"{site.names} alone. Say so with site={site.names[0]!r}, or choose "
            f"site='input:{besides[0]}', or a list of both.",
            stacklevel=8,
        )


def check_replay(plain: Reading, zero: Reading) -> None:
    """Check that two passes on one batch give the same, at δ = 0."""
    low = torch.finfo(compute_dtype(plain.loss)).eps > 1e-5
    a, b = float(plain.objective.detach()), float(zero.objective.detach())
    apart = abs(a - b) > (1e-2 if low else 1e-4) * (1 + abs(a))
    what = f"losses {a:.6g} and {b:.6g}"
    if not apart and plain.predictions is not None and zero.predictions is not None:
        one, two = plain.predictions.detach(), zero.predictions.detach()
        apart = one.shape != two.shape
        what = f"predictions of shape {list(one.shape)} and {list(two.shape)}"
        if not apart:
            most = float(difference(one, two).abs().max())
            size = float(one.masked_fill(one.isinf(), 0).abs().max())
            apart = most > (3e-2 if low else 1e-4) * (1e-3 + size)
            what = f"predictions that differ by up to {most:.2g}"
    if apart:
        raise GameError(
            f"Two passes of the closure with the same random state gave {what}. A round runs the "
            "closure several times: draw batches, augmentation and other randomness outside of it, "
            "or with the global generators of torch, numpy or Python; and make what a pass "
            "changes, such as a cache (past_key_values), anew within it."
        )


def difference(one: Tensor, other: Tensor) -> Tensor:
    """Return one − other, 0 where both are the same infinity, as of classes that are ruled out."""
    return torch.where(one == other, torch.zeros_like(one), one - other)


def _check_head(arena: Arena, reading: Reading, labels: Any) -> None:
    """Check that a divergence of softmaxes compares softmaxes."""
    solver, predictions = arena.solver, reading.compared
    if solver.compares not in ("kl", "symmetric_kl", "js") or reading.heads > 1:
        return
    kind = kind_of(unwrap(arena.model), labels, reading.loss, predictions)
    if kind is None:
        return
    said = (
        f"{solver.compares!r} compares softmaxes, and {kind.why}: build {type(solver).__name__} "
        f"with divergence={kind.divergence!r} (payoff= for PGD)."
    )
    if kind.certain:
        raise GameError(said)
    warnings.warn(said, stacklevel=7)


def check_reading(arena: Arena, reading: Reading, labels: Any) -> None:
    """Check that a pass gave what the solver reads; `labels` are those of the model's call."""
    solver = arena.solver
    if solver.compares is not None:
        predictions = reading.compared
        if not predictions.requires_grad:
            raise GameError(
                f"The predictions do not depend on δ at {arena.site.names}: return the logits that "
                "the loss was computed from, not detached."
            )
        if solver.reads_labels:
            assert reading.labels.shape == predictions.shape[:-1]
        if predictions.shape[-1] == 1 and solver.compares in ("kl", "symmetric_kl", "js"):
            raise GameError(
                f"The predictions have one column, of which {solver.compares!r} is always 0. "
                "Choose divergence='squared_error' (payoff= for PGD) for regression."
            )
        _check_head(arena, reading, labels)
        values = reading.diverge(predictions.detach(), divergence(solver.compares))
        if values.shape != predictions.shape[:1]:
            raise GameError(
                f"The divergence returned shape {list(values.shape)} for predictions of shape "
                f"{list(predictions.shape)}; it must give one value per prediction."
            )
    if reading.hidden is not None and not reading.hidden.requires_grad:
        raise GameError(
            f"The representation read from the model does not depend on δ at {arena.site.names}: "
            "name another module with source=, or another representation=."
        )


def check_payoff(solver: Solver, reading: Reading) -> None:
    """Check that the payoff of a pass is one for each sample, where the ascent needs that."""
    scalar = reading.loss.dim() == 0
    if solver.gain == "loss" and solver.normalize == "none" and solver.steps and scalar:
        raise GameError(
            f"{type(solver).__name__} moves by the raw gradient of each sample's loss, and the "
            "closure returned one number for the batch. Return one loss per sample [B] "
            "(reduction='none'), or set normalize='steepest'."
        )


def check_slopes(arena: Arena, moves: bool) -> None:
    """Warn if no gradient moves δ.

    Not an error: heads and adapters often start at zero, and move in a step or two.
    """
    if moves:
        return
    warnings.warn(
        f"The gradient with respect to δ at {arena.site.names} is exactly zero in the first round. "
        "Weights between site and loss may start at zero, or a function such as round() may have "
        "no gradient. δ does not move until that changes.",
        stacklevel=7,
    )
