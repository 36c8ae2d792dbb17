"""What a closure returns, read into a loss and predictions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixadv.errors import GameError
from mixadv.maths.divergence import Divergence, never
from mixadv.model.heads import counting, known, labels_of, of_transformers, read_besides

Closure = Callable[[], Any]
MeanOver = Literal["samples", "tokens"]
"""What counts the same in a mean of predictions per token."""

_EXPECTED = (
    "A closure runs the forward pass and returns a scalar loss, one loss per sample [B], a tuple "
    "of the loss and logits, an output, or a tuple of the logits of several heads, or an output "
    "with .loss and .logits (or .start_logits and .end_logits)"
)


class Reading(NamedTuple):
    """Loss and predictions of one pass.

    Attributes:
        loss: 0-d, or one per sample `[B]`.
        predictions: `[B, C]` or `[B, n, C]`, None where the closure returned a loss alone.
            Several heads are one tensor, see `_joined`.
        mask: `[B, n]`, 1 at tokens that count, where predictions are per token and it is known.
            Of several heads each has the weight 1, shared by the tokens that count.
        hidden: the representation `[B, d]`, where the solver reads one from the model.
        samples: B, counted by losses, else predictions, else rows at the site.
        heads: how many the predictions are of.
        left_out: tensors behind the predictions in what the closure returned, that may be more.
        labelled: whether labels told which predictions count, so that the loss need not.
        may: in place of the mask where the loss tells which of these count.
        owners: the sample that each row at the site belongs to, where it is known.
        answers: labels of the predictions, where the solver reads them and they are known.
    """

    loss: Tensor
    predictions: Tensor | None
    mask: Tensor | None = None
    hidden: Tensor | None = None
    samples: int = 1
    heads: int = 1
    left_out: int = 0
    labelled: bool = False
    may: Tensor | None = None
    owners: Tensor | None = None
    answers: Tensor | None = None

    @property
    def objective(self) -> Tensor:
        """The loss as a scalar: its mean, where there is one per sample."""
        return self.loss.mean()

    @property
    def compared(self) -> Tensor:
        """The predictions, of a solver that compares them.

        Raises:
            GameError: if the closure returned none, or more than could be told.
        """
        if self.left_out:
            raise GameError(
                f"The closure returned predictions and {self.left_out} more tensors of as many "
                "rows, and this solver compares predictions: return (loss, (one, other)) to have "
                "several heads compared, or (loss, logits) for one."
            )
        if self.predictions is None:
            raise GameError(
                "This solver compares predictions, and the closure returned a loss alone. Return "
                "(loss, logits), of several heads (loss, (one, other)), or the model's whole "
                "output, from the closure. In a Trainer: outputs with logits, from forward_pass."
            )
        return self.predictions

    @property
    def labels(self) -> Tensor:
        """The label of each prediction, of a solver that reads them; below 0 where none counts.

        Raises:
            GameError: if they are not known.
        """
        if self.answers is None:
            raise GameError(
                "This solver reads labels of classes. The closure did not return them, and the "
                "loss does not show them, as the cross entropy of logits of three classes or more "
                "would: return (loss, logits [B, C], labels [B])."
            )
        return self.answers

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

    def diverge(self, clean: Tensor, divergence: Divergence, over: MeanOver = "samples") -> Tensor:
        """Return the divergence of these predictions from clean ones, one value per sample `[B]`.

        Predictions per token are averaged over those that count, those of several heads added up;
        over `"tokens"` a sample has the share of its tokens, so that the mean of the values is that
        over all tokens of the batch. Computed outside autocast.
        """
        assert self.predictions is not None
        with torch.autocast(self.predictions.device.type, enabled=False):
            values = divergence(self.predictions, clean)
            if values.dim() < 2:
                return values
            real = torch.ones_like(values) if self.mask is None else self.mask.to(values.dtype)
            own, all_tokens = real.sum(-1).clamp(min=1), real.sum().clamp(min=1)
            count = own if over == "samples" else all_tokens / len(real)
            return self.heads * (values * real).sum(-1) / count


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
    loss, found = _split(result)
    if not isinstance(loss, Tensor):
        raise GameError(f"{_EXPECTED}; this one returned {_describe(result)}.")
    if loss.dim() > 1 or not loss.is_floating_point():
        raise GameError(f"{_EXPECTED}; this one returned {_describe(loss)} as loss.")
    own = [result] if isinstance(result, Mapping) else []
    if of_transformers(model) and isinstance(result, (tuple, list)):
        found = found[:1]  # behind the logits come hidden states
    # Whole numbers and Booleans are answers or hits, and no predictions.
    heads = [_checked(x) for x in found if not isinstance(x, Tensor) or x.is_floating_point()]
    if len({len(head) for head in heads}) > 1:
        sizes = ", ".join(str([*head.shape]) for head in heads)
        raise GameError(f"The heads that the closure returned differ in their rows: {sizes}.")
    told = [*own, *contexts]
    masks = [counting(head, told, model) for head in heads]
    labelled = any(labels_of(head, told) is not None for head in heads)
    left_out = _left_out(result, heads, model)
    if len(heads) > 1:
        return Reading(loss, *_joined(heads, masks), heads=len(heads), labelled=True)
    only, mask, may = (heads[0], masks[0], None) if heads else (None, None, None)
    if only is not None and labelled and not known(model):
        labelled, may = False, counting(only, told, model, either=True)
    return Reading(loss, only, mask, left_out=left_out, labelled=labelled, may=may)


def _checked(predictions: Any) -> Tensor:
    """Return the predictions of a head, `[B, C]` or `[B, n, C]`."""
    if not isinstance(predictions, Tensor):
        raise GameError(
            f"Predictions must be a tensor, got {_describe(predictions)}. Return (loss, logits) "
            "from the closure, or the loss alone."
        )
    if predictions.dim() == 1:
        predictions = predictions.unsqueeze(-1)
    if predictions.dim() not in (2, 3):
        raise GameError(
            f"Predictions must be [B, C] or [B, n, C], got {_describe(predictions)}. Return "
            "(loss, logits) with logits of that shape from the closure: those of pixels "
            "[B, C, H, W] as logits.flatten(2).mT, and the loss alone where none are compared."
        )
    return predictions


def _joined(heads: list[Tensor], masks: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Return several heads as one, `[B, Σ n, max C]`, and the weights of its predictions.

    A class that a head lacks has a logit at which its probability, and every divergence, is 0.
    """
    classes = max(head.shape[-1] for head in heads)
    joined, weights = [], []
    for head, mask in zip(heads, masks, strict=True):
        tokens = head if head.dim() == 3 else head[:, None]
        joined.append(F.pad(tokens, (0, classes - head.shape[-1]), value=never(head.dtype)))
        real = torch.ones(tokens.shape[:2], device=head.device) if mask is None else mask.float()
        weights.append(real / real.sum(1, keepdim=True).clamp(min=1))
    return torch.cat(joined, 1), torch.cat(weights, 1)


def _split(result: Any) -> tuple[Any, list[Any]]:
    """Return the loss in a closure's result, and the predictions of each head."""
    if isinstance(result, Tensor):
        return result, []
    if isinstance(result, Mapping):
        named = [v for k, v in result.items() if k.endswith("_logits") and isinstance(v, Tensor)]
        return result.get("loss"), _logits(result.get) or named
    if isinstance(result, (tuple, list)) and len(result) > 0:
        second = result[1] if len(result) > 1 else None
        if isinstance(second, (tuple, list)):
            tensors = [x for x in second if isinstance(x, Tensor)]
            if len(tensors) == len(second) and all(x.dim() > 1 for x in second):
                return result[0], tensors
            starts = isinstance(second[0], Tensor) and second[0].dim() < 2  # with a loss
            second = next((x for x in second[int(starts) :][:1] if isinstance(x, Tensor)), None)
        elif second is not None and not isinstance(second, Tensor):
            return result[0], _split(second)[1]
        return result[0], [] if second is None else [second]
    get = lambda name: getattr(result, name, None)  # noqa: E731
    return get("loss"), _logits(get)


def _logits(get: Callable[[str], Any]) -> list[Any]:
    """Return the predictions in an output, as a head or none."""
    start, end = get("start_logits"), get("end_logits")
    if get("logits") is None and isinstance(start, Tensor) and isinstance(end, Tensor):
        return [torch.stack([start, end], 1)]  # two predictions [B, n], of where an answer lies
    return [] if get("logits") is None else [get("logits")]


def _left_out(result: Any, heads: list[Tensor], model: Any) -> int:
    """Return how many tensors `(loss, one, other, …)` has that may be heads as well.

    Such as the loss reads by themselves: hidden states are read through the logits. What the models
    of the transformers library return behind the logits is known to be none.
    """
    if not heads or not isinstance(result, (tuple, list)) or of_transformers(model):
        return 0
    more = [x for x in result[2:] if isinstance(x, Tensor) and x.dim() > 1 and x.requires_grad]
    more = [x for x in more if len(x) == len(heads[0])]
    return read_besides(result[0], heads[0], more) if more else 0


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)}"
    if value is None:
        return "nothing (None)"
    return type(value).__name__
