"""Robust encoders without labels: each embedding stays where a frozen copy of the encoder puts it.

    min_θ max_{‖δ‖ ≤ ε}  ‖ φ_θ(x + δ) − φ_0(x) ‖²,      φ_0 a frozen copy of φ

FARE (Schlarmann et al. 2024, arXiv:2402.12336, eq. 3): whatever was built on the embeddings (a
language model, retrieval, zero-shot classes) works on as before, and no label is needed. The game
is zero-sum with this distance as its loss, so it is played by `mixadv.PGD`, or any solver that
climbs the loss; accumulation, mixed precision, several processes and checkpoints are those of any
other game. Use it for an encoder whose users you do not know; use labels where the task is known.

TeCoA (Mao et al. 2023, arXiv:2212.07016), its supervised form, needs no code of its own: PGD on the
cross entropy of similarities to frozen embeddings of the classes' names, `class_names` `[C, d]`:

    z = F.normalize(encoder(images), dim=-1)
    logits = 100 * z @ class_names.T
    return F.cross_entropy(logits, labels), logits

`site="input"` of `wrap` puts δ on the pixels of a CLIP, which has several embeddings.

It costs what PGD costs (K + 1 forwards, K backwards for δ, 1 backward), a forward of the copy
without gradients, and the copy's memory. At the start θ = θ_0 and δ = 0 is the one point where the
distance has no slope: the ascent has to start elsewhere, as it does by default.

Published (github.com/chs20/RobustVLM, train/adversarial_training_clip.py): ε of 2/255 and 4/255 in
L∞, 10 steps of 1/255 of PGD with a momentum of 0.9 in its steps, which ours has not, or of APGD;
AdamW at 1e-5, weight decay 1e-4; the ascent in evaluation mode, the embedding not normalised.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.errors import GameError
from mixadv.model.closure import Closure
from mixadv.model.modules import unwrap


class Anchor:
    """A frozen copy of an encoder, and the distance from it as a closure.

    Use it to make an encoder robust without labels, so that its embeddings stay where they were.
    The copy is in evaluation mode, is never trained, and is not part of the encoder. Save it by
    `anchor.state_dict()`, or build it again from the weights that training began with.

    Args:
        encoder: the encoder to copy, with its present weights.
        read: a function that returns embeddings `[B, ...]` from what the encoder returns: those
            that its users read. None takes the tensor itself, or `image_embeds` or `pooler_output`
            of an output; the latter not beside `last_hidden_state`, for a CLIP is read by the one,
            and a BERT mostly by the mean of the other. Of a SentenceTransformer:
            `lambda output: output["sentence_embedding"]`.

    Raises:
        TypeError: for an encoder that is no module.

    Example:
        >>> import mixadv
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        >>> optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
        >>> words = {"norm": "linf", "unit": "absolute", "box": (0.0, 1.0)}
        >>> solver = mixadv.PGD(steps=10, step_size=1 / 255, radius=4 / 255, **words)
        >>> anchor = Anchor(encoder)
        >>> optimizer = mixadv.wrap(optimizer, encoder, solver)
        >>> images = torch.rand(8, 1, 4, 4)
        >>> optimizer.step(anchor(encoder, images)).shape
        torch.Size([])
    """

    def __init__(self, encoder: nn.Module, read: Callable[[Any], Tensor] | None = None) -> None:
        if not isinstance(encoder, nn.Module):
            raise TypeError(
                f"Anchor copies an encoder, a torch.nn.Module, got {encoder!r:.80}: give the "
                "model, and what is done with its output as read=lambda output: …"
            )
        self.encoder = copy.deepcopy(unwrap(encoder)).eval().requires_grad_(False)
        self._read = read or embedding_of

    def __call__(self, encoder: nn.Module, *args: Any, **kwargs: Any) -> Closure:
        """Return a closure of the squared distances `[B]` of an encoder on a batch.

        Args:
            encoder: that is trained.
            args: of the encoder's call.
            kwargs: likewise. With an `attention_mask`, padding does not count where each token has
                an embedding.
        """
        target, real = self.embed(*args, **kwargs), kwargs.get("attention_mask")

        def closure() -> Tensor:
            found = self._read(encoder(*args, **kwargs))
            return distances(found, target, real)

        return closure

    def embed(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings `[B, ...]` of the copy."""
        with torch.no_grad():
            return self._read(self.encoder(*args, **kwargs))

    def state_dict(self) -> dict[str, Any]:
        """Return the copy's weights, for `torch.save`."""
        return self.encoder.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take weights over from a checkpoint."""
        self.encoder.load_state_dict(state)


def distances(found: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """Return squared L2 distances per sample `[B]`, in at least fp32.

    Args:
        found: embeddings `[B, ...]`.
        target: of the same shape.
        real: `[B, n]`, 1 at real tokens; those of others count nothing where embeddings are `[B, n,
            d]`.

    Raises:
        GameError: for embeddings of other shapes.
    """
    if found.shape != target.shape:
        raise GameError(
            f"The encoder returns embeddings {list(found.shape)}, and its frozen copy "
            f"{list(target.shape)}: both must read the same batch, and be copies of one encoder."
        )
    wide = torch.promote_types(found.dtype, torch.float32)
    squares = (found.to(wide) - target.to(wide)).square()
    if isinstance(real, Tensor) and squares.dim() == 3 and squares.shape[:2] == real.shape:
        squares = squares.where(real[..., None] > 0, 0)
    return squares.flatten(1).sum(1)


def embedding_of(output: Any) -> Tensor:
    """Return the embeddings in what an encoder returned.

    Raises:
        GameError: if it is not known where they are.
    """
    if isinstance(output, Tensor) and output.dim() > 1:
        return output
    projected, pooled = (getattr(output, name, None) for name in ("image_embeds", "pooler_output"))
    if isinstance(projected, Tensor):
        return projected
    if isinstance(pooled, Tensor) and getattr(output, "last_hidden_state", None) is None:
        return pooled
    lead = f"The encoder returns {type(output).__name__}, and Anchor does not know "
    if isinstance(pooled, Tensor):
        raise GameError(
            f"{lead}which of its embeddings are used. Say so, of an image tower or a [CLS] token:\n"
            "    Anchor(encoder, read=lambda output: output.pooler_output)\n"
            "of tokens, whose mean is used (give the call its attention_mask):\n"
            "    Anchor(encoder, read=lambda output: output.last_hidden_state)"
        )
    raise GameError(
        f"{lead}where its embeddings are: give it a function that returns them, "
        "read=lambda output: …, of a SentenceTransformer "
        "read=lambda output: output['sentence_embedding']."
    )
