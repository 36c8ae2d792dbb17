"""What a closure returns, read into a loss and predictions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixadv.divergence import Divergence
from mixadv.errors import GameError

Closure = Callable[[], Any]

_EXPECTED = (
    "A closure runs the forward pass and returns a scalar loss, one loss per sample [B], a tuple "
    "that starts with the loss and then logits or an output, or an output with .loss and .logits"
)


class Reading(NamedTuple):
    """Loss and predictions of one pass.

    Attributes:
        loss: 0-d, or one per sample `[B]`.
        predictions: `[B, C]` or `[B, n, C]`, None where the closure returned a loss alone.
        mask: `[B, n]`, 1 at real tokens, where predictions are per token and a mask is known.
        hidden: the representation `[B, d]`, where the solver reads one from the model.
    """

    loss: Tensor
    predictions: Tensor | None
    mask: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def objective(self) -> Tensor:
        """The loss as a scalar: its mean, where there is one per sample."""
        return self.loss.mean()

    @property
    def representation(self) -> Tensor:
        """The representation `[B, d]`, of a solver that reads one."""
        assert self.hidden is not None
        return self.hidden

    def diverge(self, clean: Tensor, divergence: Divergence) -> Tensor:
        """Return the divergence of these predictions from clean ones, one value per sample `[B]`.

        Predictions per token are averaged over the real ones. Computed outside autocast.
        """
        assert self.predictions is not None
        with torch.autocast(self.predictions.device.type, enabled=False):
            values = divergence(self.predictions, clean)
            if values.dim() < 2:
                return values
            real = torch.ones_like(values) if self.mask is None else self.mask.to(values.dtype)
            return (values * real).sum(-1) / real.sum(-1).clamp(min=1)


def read(
    result: Any, context: Mapping[str, Any] | None = None, *, encoder_decoder: bool = False
) -> Reading:
    """Return the loss and predictions in a closure's result.

    Args:
        result: what the closure returned.
        context: arguments of the model's call; its masks tell the real tokens of `[B, n, C]`.
        encoder_decoder: whether predictions belong to the tokens of a decoder.

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
            "(loss, logits) with logits of that shape from the closure."
        )
    return Reading(loss, predictions, _token_mask(predictions, context or {}, encoder_decoder))


def _split(result: Any) -> tuple[Any, Any]:
    if isinstance(result, Tensor):
        return result, None
    if isinstance(result, Mapping):
        return result.get("loss"), result.get("logits")
    if isinstance(result, (tuple, list)) and len(result) > 0:
        second = result[1] if len(result) > 1 else None
        if second is not None and not isinstance(second, Tensor):
            second = _split(second)[1]
        return result[0], second if isinstance(second, Tensor) else None
    return getattr(result, "loss", None), getattr(result, "logits", None)


def _token_mask(
    predictions: Tensor | None, context: Mapping[str, Any], encoder_decoder: bool
) -> Tensor | None:
    """Return the mask of the tokens that predictions `[B, n, C]` belong to, if one is known."""
    if predictions is None or predictions.dim() != 3:
        return None
    mask = context.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    labels = context.get("labels")
    if mask is None and encoder_decoder and isinstance(labels, Tensor):
        mask = labels >= 0  # decoders are padded with labels of -100
    if isinstance(mask, Tensor) and mask.shape == predictions.shape[:2]:
        return mask > 0
    return None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)}"
    if value is None:
        return "nothing (None)"
    return type(value).__name__
