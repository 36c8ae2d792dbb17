r"""The order of neurons by a probe's weights.

For class c the neurons are ordered by falling |W_cd|, and a_cd is the share of the weight of c that
lies before neuron d. To cover a share p of it takes the neurons with a_cd < p. As p rises from 0 to
1 for all classes at once, neuron d enters at

.. math:: a_d = \min_c a_{cd},

which ranks all neurons; of those that enter together the one with the larger share goes first.
The idea of raising the share is that of Dalvi et al. (2019, arXiv 1812.09355); the limit of
infinitely small raises, and the tie-break, are ours.
"""

import numpy as np


def before(weights: np.ndarray) -> np.ndarray:
    """Return the share of each class's weight that lies before each neuron.

    Args:
        weights: of a probe, [classes, neurons].

    Returns:
        a, [classes, neurons], fp64, in [0, 1); 1 where the weight is 0.

    Example:
        >>> before(np.array([[0.0, 2, -5, 3], [1, 0, 0, 1]]))
        array([[1. , 0.8, 0. , 0.5],
               [0. , 1. , 1. , 0.5]])
    """
    share = _shares(weights)
    order = np.argsort(-share, axis=1, kind="stable")
    falling = np.take_along_axis(share, order, 1)
    found = np.empty_like(share)
    np.put_along_axis(found, order, np.cumsum(falling, 1) - falling, 1)
    return np.where(share > 0, found, 1.0)


def rank(weights: np.ndarray) -> np.ndarray:
    """Return the neurons in the order in which they enter, [neurons].

    Args:
        weights: of a probe, [classes, neurons].

    Example:
        >>> rank(np.array([[0.0, 2, -5, 3], [1, 0, 0, 0]]))
        array([0, 2, 3, 1])
    """
    return np.lexsort((-_shares(weights).max(0), before(weights).min(0)))


def claims(weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return which classes have brought in each of the first neurons of the ranking.

    Args:
        weights: of a probe, [classes, neurons].
        chosen: the first neurons of `rank(weights)`.

    Returns:
        [classes, chosen], true where the class covers the neuron at the share at which the last
        of them enters; every neuron has a class, and may have several.

    Example:
        >>> weights = np.array([[0.0, 2, -5, 3], [1, 0, 0, 0]])
        >>> claims(weights, rank(weights)[:3]).sum(1)
        array([2, 1])
    """
    found = before(weights)[:, chosen]
    return (found < 1) & (found <= found.min(0).max())


def _shares(weights: np.ndarray) -> np.ndarray:
    size = np.abs(np.asarray(weights, dtype=np.float64))
    return size / np.maximum(size.sum(1, keepdims=True), np.finfo(np.float64).tiny)
