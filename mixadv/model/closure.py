"""What a closure returns, read into a loss and predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.divergence import Divergence

Closure = Callable[[], Any]

_EXPECTED = (
    "A closure runs the forward pass and returns a scalar loss, one loss per sample [B], a tuple "
    "that starts with the loss and then logits or an output, or an output with .loss and .logits "
    "(or .start_logits and .end_logits)"
)


class Reading(NamedTuple):
    """Loss and predictions of one pass.

    Attributes:
        loss: 0-d, or one per sample `[B]`.
        predictions: `[B, C]` or `[B, n, C]`, None where the closure returned a loss alone.
        mask: `[B, n]`, 1 at tokens that count, where predictions are per token and it is known.
        hidden: the representation `[B, d]`, where the solver reads one from the model.
        samples: B, counted by losses, else predictions, else rows at the site.
    """

    loss: Tensor
    predictions: Tensor | None
    mask: Tensor | None = None
    hidden: Tensor | None = None
    samples: int = 1

    @property
    def objective(self) -> Tensor:
        """The loss as a scalar: its mean, where there is one per sample."""
        return self.loss.mean()

    @property
    def compared(self) -> Tensor:
        """The predictions, of a solver that compares them.

        Raises:
            GameError: if the closure returned none.
        """
        if self.predictions is None:
            raise GameError(
                "This solver compares predictions, and the closure returned a loss alone. Return "
                "(loss, logits), or the model's whole output, from the closure; of several heads "
                "with as many classes (loss, torch.stack([one, other], 1)). In a Trainer: outputs "
                "with logits, from forward_pass."
            )
        return self.predictions

    @property
    def representation(self) -> Tensor:
        """The representation `[B, d]`, of a solver that reads one."""
        assert self.hidden is not None
        return self.hidden

    def widened(self) -> "Reading":
        """Return the reading with predictions in at least fp32."""
        if self.predictions is None:
            return self
        wide = torch.promote_types(self.predictions.dtype, torch.float32)
        return self._replace(predictions=self.predictions.to(wide))

    def diverge(self, clean: Tensor, divergence: Divergence) -> Tensor:
        """Return the divergence of these predictions from clean ones, one value per sample `[B]`.

        Predictions per token are averaged over those that count. Computed outside autocast.
        """
        assert self.predictions is not None
        with torch.autocast(self.predictions.device.type, enabled=False):
            values = divergence(self.predictions, clean)
            if values.dim() < 2:
                return values
            real = torch.ones_like(values) if self.mask is None else self.mask.to(values.dtype)
            return (values * real).sum(-1) / real.sum(-1).clamp(min=1)


def parse_output(
    result: Any, contexts: Sequence[Mapping[str, Any]] = (), model: Any = None
) -> Reading:
    """Return the loss and predictions in a closure's result.

    Args:
        result: what the closure returned.
        contexts: arguments of the model's call, and of modules within, whose masks and labels
            tell the tokens that count; labels in the result itself come first.
        model: which was called; its kind tells to which token a prediction belongs.

    Raises:
        GameError: if it holds no loss, with what was returned instead.
    """
    loss, predictions = _split(result)
    if not isinstance(loss, Tensor):
        raise GameError(f"{_EXPECTED}; this one returned {_describe(result)}.")
    if loss.dim() > 1 or not loss.is_floating_point():
        raise GameError(f"{_EXPECTED}; this one returned {_describe(loss)} as loss.")
    if predictions is not None and not isinstance(predictions, Tensor):
        raise GameError(
            f"Predictions must be a tensor, got {_describe(predictions)}. Return (loss, logits) "
            "from the closure, or the loss alone."
        )
    if predictions is not None and predictions.dim() == 1:
        predictions = predictions.unsqueeze(-1)
    if predictions is not None and predictions.dim() not in (2, 3):
        raise GameError(
            f"Predictions must be [B, C] or [B, n, C], got {_describe(predictions)}. Return "
            "(loss, logits) with logits of that shape from the closure: those of pixels "
            "[B, C, H, W] as logits.flatten(2).mT, and the loss alone where none are compared."
        )
    own = [result] if isinstance(result, Mapping) else []
    return Reading(loss, predictions, _counting(predictions, [*own, *contexts], model))


def _split(result: Any) -> tuple[Any, Any]:
    if isinstance(result, Tensor):
        return result, None
    if isinstance(result, Mapping):
        return result.get("loss"), _logits(result.get)
    if isinstance(result, (tuple, list)) and len(result) > 0:
        second = result[1] if len(result) > 1 else None
        if second is not None and not isinstance(second, Tensor):
            second = _split(second)[1]
        return result[0], second if isinstance(second, Tensor) else None
    return getattr(result, "loss", None), _logits(lambda name: getattr(result, name, None))


def _logits(get: Callable[[str], Any]) -> Tensor | None:
    start, end = get("start_logits"), get("end_logits")
    if get("logits") is None and isinstance(start, Tensor) and isinstance(end, Tensor):
        return torch.stack([start, end], 1)  # two predictions [B, n], of where an answer lies
    return get("logits")


def _counting(
    predictions: Tensor | None, contexts: Sequence[Mapping[str, Any]], model: Any
) -> Tensor | None:
    """Return the mask of the predictions `[B, n, C]` that count, if one is known.

    They belong to real tokens, and to such as the loss is computed at, in samples that have any.
    """
    if predictions is None or predictions.dim() != 3:
        return None
    decoded = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    mask = _fitting(
        contexts, "decoder_attention_mask" if decoded else "attention_mask", predictions
    )
    real = None if mask is None else mask > 0
    labels = _fitting(contexts, "labels", predictions)
    if labels is None or labels.is_floating_point():
        return real
    labelled = labels >= 0  # others are -100
    if not decoded and _causal(model):
        labelled = F.pad(labelled[:, 1:], (0, 1))  # it foretells the next token
    if real is None:
        real = labelled if decoded else torch.ones_like(labelled)  # decoders are padded with -100
    labelled = labelled & real
    return torch.where(labelled.any(1, keepdim=True), labelled, real)


def _fitting(contexts: Sequence[Mapping[str, Any]], name: str, like: Tensor) -> Tensor | None:
    """Return the first of this name with an entry for each token of the predictions."""
    found = (context.get(name) for context in contexts)
    return next((x for x in found if isinstance(x, Tensor) and x.shape == like.shape[:2]), None)


def _causal(model: Any) -> bool:
    """Return whether a model of the transformers library predicts the next token."""
    kind = getattr(model, "loss_type", "")
    if kind is None:  # of classes with other names, among them GPT2LMHeadModel, which generates
        generates = getattr(model, "can_generate", None)
        return generates is not None and bool(generates())
    return kind in ("ForCausalLM", "ForConditionalGeneration")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)}"
    if value is None:
        return "nothing (None)"
    return type(value).__name__
