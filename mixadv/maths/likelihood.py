"""The loss of a label in a form whose gradient does not vanish where a model is sure.

    −log p_y = log(1 + exp(r)),     r = log Σ_{c≠y} exp z_c − z_y

The usual form has the gradient p_y − 1 at the label, which is 0 in fp32 from a margin of 17 on: an
ascent from there has no direction, and what it leaves right only seems robust. That of this form is
p_y − 1 too, and rounds to 0 where the number format ends: at margins of 90 in fp32, of 700 in fp64,
and of 17 where a model in fp16 carries it on. r itself grows with the loss, and its gradient is of
order 1 whatever the margin.
"""

import torch.nn.functional as F
from torch import Tensor

from mixadv.maths.divergence import NEVER


def label_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return r, by how much the other classes together lie above the label, `[B]`.

    Args:
        logits: `[B, C]` of at least two classes, in at least fp32.
        labels: `[B]`, integers from 0 to C − 1.

    Example:
        >>> import torch
        >>> label_margins(torch.tensor([[30.0, 0.0]]), torch.tensor([0]))
        tensor([-30.])
    """
    own = labels[:, None]
    others = logits.scatter(1, own, NEVER).logsumexp(1)
    return others - logits.gather(1, own)[:, 0]


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `−log p` of the label of each row, `[B]`; arguments are those of `label_margins`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[30.0, 0.0]], requires_grad=True)
        >>> for loss in (F.cross_entropy, label_losses):
        ...     (slope,) = torch.autograd.grad(loss(logits, torch.tensor([0])).sum(), logits)
        ...     print(f"{-float(slope[0, 0]):.1e}")
        -0.0e+00
        9.4e-14
    """
    return F.softplus(label_margins(logits, labels))
