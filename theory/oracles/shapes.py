"""Random and awkward finite games: what solvers must survive, in batches of one shape."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def _gaussian(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    return draw.standard_normal(size)


def _uniform(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    return draw.uniform(-1, 1, size)


def _heavy_tailed(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    return draw.standard_cauchy(size)


def _signs(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    return draw.choice([-1.0, 1.0], size)


def _integers_with_ties(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    return draw.integers(-2, 3, size).astype(float)


def _sparse(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    return (draw.random(size) < 0.2).astype(float)


def _constant(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    return np.broadcast_to(draw.standard_normal((size[0], 1, 1)), size).copy()


def _one_entry(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    games = np.zeros(size)
    games[:, 0, -1] = draw.choice([-1.0, 1.0], size[0])
    return games


def _rank_one(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    g, m, n = size
    return draw.standard_normal((g, m, 1)) * draw.standard_normal((g, 1, n))


def _rows_and_columns(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    """Payoff of the row plus payoff of the column: both players have dominant strategies."""
    g, m, n = size
    return draw.standard_normal((g, m, 1)) + draw.standard_normal((g, 1, n))


def _duplicated(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    """Few distinct rows and columns, repeated."""
    _, m, n = size
    games = draw.standard_normal(size)
    rows, columns = draw.integers(0, (m + 1) // 2, m), draw.integers(0, (n + 1) // 2, n)
    return games[:, rows][:, :, columns]


def _dominated(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    """Each row is worse than the one above it by a little."""
    games = np.repeat(draw.standard_normal((size[0], 1, size[2])), size[1], axis=1)
    return games + np.cumsum(draw.exponential(0.1, size), axis=1)


def _cyclic(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    """Skew-symmetric on the common square, as rock, paper, scissors is."""
    games = draw.standard_normal(size)
    k = min(size[1:])
    square = games[:, :k, :k]
    games[:, :k, :k] = square - square.transpose(0, 2, 1)
    return games


def _matching(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    """A positive diagonal: the equilibrium is interior, the last iterates cycle."""
    return draw.exponential(1.0, (size[0], 1, 1)) * np.eye(*size[1:])


def _nearly_constant(draw: np.random.Generator, size: tuple[int, int, int]) -> Array:
    """An offset a thousand times the range."""
    return 1e3 + draw.uniform(-1, 1, size)


SHAPES = {
    shape.__name__.removeprefix("_").replace("_", " "): shape
    for shape in (
        *(_gaussian, _uniform, _heavy_tailed, _signs, _integers_with_ties, _sparse, _constant),
        *(_one_entry, _rank_one, _rows_and_columns, _duplicated, _dominated, _cyclic, _matching),
        _nearly_constant,
    )
}
SCALES = (1.0, 1e-12, 1e12)


def games(count: int, m: int, n: int, seed: int) -> Array:
    """Return `[count, m, n]` games of one shape in all the kinds above, mostly of scale 1.

    One game in five is multiplied by 1e-12, another by 1e12.

    Example:
        >>> games(30, 2, 5, seed=0).shape
        (30, 2, 5)
    """
    draw = np.random.default_rng((seed, m, n))
    per_kind = -(-count // len(SHAPES))
    stack = np.concatenate([shape(draw, (per_kind, m, n)) for shape in SHAPES.values()])
    stack = stack[draw.permutation(len(stack))[:count]]
    return stack * draw.choice(SCALES, count, p=[0.6, 0.2, 0.2])[:, None, None]


def batches(count: int, seed: int, *, largest: int = 12, shapes: int = 24) -> list[Array]:
    """Return `count` games in all, in batches that each have one random shape up to `largest`.

    The first four shapes are 1×1, 1×n, m×1 and the largest square.
    """
    draw = np.random.default_rng(seed)
    sizes = [(1, 1), (1, largest // 2), (largest // 2, 1), (largest, largest)]
    sizes += [tuple(draw.integers(1, largest + 1, 2)) for _ in range(shapes - len(sizes))]
    per_shape = -(-count // shapes)
    return [
        games(min(per_shape, count - done), int(m), int(n), seed + k)
        for k, ((m, n), done) in enumerate(zip(sizes, range(0, count, per_shape), strict=False))
    ]
