"""The adversary's move: the words in which every method differs, and the step they all share.

    δ ← Π( δ + η·d(∇u(δ)) + √(2·η·τ)·ξ )

with u the payoff, d the normalisation of its gradient, Π the projection onto the ball (last, so
that noise never leaves it), η `step_size` and τ `temperature`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from mixadv.checks import check_flag, check_integer, check_number
from mixadv.errors import nearest
from mixadv.maths import geometry, langevin
from mixadv.maths.box import Room, project_into
from mixadv.maths.geometry import Norm, Per
from mixadv.players.documented import compose, described

Start = Literal["zero", "uniform", "normal"]
Normalize = Literal["steepest", "norm", "sign", "none", "adam"]
Projection = Literal["ball", "sphere"]
Unit = Literal["relative", "absolute"]
Direction = Literal["gradient", "gauss_newton"]
Sign = Literal["any", "boundary"]
ParticleBatching = Literal["auto", "loop", "vmap", "stack"]

_CHOICES = {
    "norm": get_args(Norm),
    "per": get_args(Per),
    "start": get_args(Start),
    "normalize": get_args(Normalize),
    "projection": get_args(Projection),
    "unit": get_args(Unit),
    "particle_batching": get_args(ParticleBatching),
    "direction": get_args(Direction),
    "sign": (*get_args(Sign), None),
}


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Hyper-parameters of the adversary, the same words for every solver.

    Lengths (`radius`, `start_size`, `step_size` of a normalised step) are in units of the mean L2
    norm of a real token's output at the site (`unit="relative"`, measured in the first round), or
    plain numbers (`unit="absolute"`, as in papers). If the site is called several times, or is
    several modules, each call has a ball of its own, and each module a unit of its own.

    Attributes:
        steps: K, the number of steps of the ascent: 1 to 3 to train, 10 or more to attack. 0 plays
            the start point.
        step_size: η, the length of a step in `unit`: a quarter of the radius or more. With raw
            gradients it multiplies the gradient.
        radius: ε, the largest length of δ in `unit`: 0.05 to 0.4 for embeddings. None means no
            bound, 0 means δ = 0.
        norm: the norm of the ball and of the steps: `"l2"`, `"linf"` or `"l1"`.
        per: what has a ball of its own: each `"sample"` (its real tokens together, in all its rows,
            as in multiple choice) or each `"token"`.
        normalize: how a gradient becomes a step. `"steepest"`: the steepest direction in the norm
            (signs in L∞). `"norm"`: the gradient over its norm (code of FreeLB and MAT; the same in
            L2). `"sign"`: its signs in any norm (code of ContinuousAT). `"none"`: the raw gradient
            of each sample's payoff (Langevin, SMART's Alg. 1). `"adam"`: as `torch.optim.Adam` at
            its defaults, over the steps of one ascent (latent adversarial training).
        projection: `"ball"` projects onto the ball. `"sphere"` rescales δ to the radius after every
            step, as the code of SMART and ALUM does.
        start: where the ascent starts: `"zero"`, or `"uniform"` or `"normal"` noise, scaled so that
            its norm is at most (uniform) or about (normal, in L2) `start_size`.
        start_size: size of the start in `unit`. None is the radius, or the step size without one.
        direction: the first step. `"gradient"`: along the payoff's gradient, from the start.
            `"gauss_newton"`, for divergences: from δ = 0 to the radius, where the likeliest label
            loses most. It saves a forward; see `mixadv.maths.gauss_newton`.
        sign: which of δ and −δ to play, whose divergences are equal to second order: `"boundary"`,
            the one that makes the likeliest label less likely, or `"any"`, as papers do. None is
            `"boundary"` for `direction="gauss_newton"`, else `"any"`.
        ascent_dtype: `torch.bfloat16`, or its name, runs the ascent's own passes under autocast. δ
            and the learner's passes keep their format. None changes nothing.
        temperature: τ of the Langevin noise, in units of the payoff. 0 adds none.
        particles: M, the number of points of a mixed strategy. 1 is a pure one.
        unit: of lengths: `"relative"` to the mean L2 norm of a real token's output at the site,
            or `"absolute"`.
        fresh_dropout: draw a new dropout mask in every pass, as much released code does. By default
            all passes between two optimizer steps use the mask of plain training. With True only
            the first pass of `closure` does.
        box: an interval for the site's output plus δ, in absolute numbers: `(0.0, 1.0)` for pixels
            that the model normalises itself. Every point is projected onto ball and box together.
            None is no box.
        particle_batching: how the payoffs of many particles are computed: `"loop"`, one after
            another; `"vmap"`, by `torch.func.vmap`; `"stack"`, in one batch (without dropout
            only); `"auto"` stacks small batches if the first round finds the same result.
    """

    steps: int = 1
    step_size: float = 0.1
    radius: float | None = 0.2
    norm: Norm = "l2"
    per: Per = "sample"
    normalize: Normalize = "steepest"
    projection: Projection = "ball"
    start: Start = "uniform"
    start_size: float | None = None
    temperature: float = 0.0
    particles: int = 1
    unit: Unit = "relative"
    fresh_dropout: bool = False
    particle_batching: ParticleBatching = "loop"
    direction: Direction = "gradient"
    sign: Sign | None = None
    ascent_dtype: torch.dtype | Literal["bfloat16"] | None = None
    box: tuple[float, float] | None = None

    described: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__repr__ = cls.__repr__  # else `dataclass` writes another into each class
        parent = next(base for base in cls.__bases__ if issubclass(base, Ascent))
        registered = cls.__module__.startswith("mixadv.") and "name" in cls.__dict__
        cls.__doc__, cls.described = compose(cls, parent, registered)

    def __repr__(self) -> str:
        """Name the parameters that differ from their defaults."""
        values = [(f, getattr(self, f.name)) for f in fields(self) if f.init and f.repr]
        shown = [f"{f.name}={v!r}" for f, v in values if v is not f.default and v != f.default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_choices(self, _CHOICES)
        check_integer(who, "steps", self.steps, 0)
        check_integer(who, "particles", self.particles, 1)
        check_flag(who, "fresh_dropout", self.fresh_dropout)
        if self.ascent_dtype not in (None, torch.bfloat16, "bfloat16"):
            raise ValueError(
                f"{who}: ascent_dtype must be torch.bfloat16, 'bfloat16' or None, got "
                f"{self.ascent_dtype!r}: for other formats put autocast around the round."
            )
        check_number(who, "step_size", self.step_size)
        check_number(who, "temperature", self.temperature)
        if self.radius is not None:
            check_number(who, "radius", self.radius)
        if self.start_size is not None:
            check_number(who, "start_size", self.start_size)
        if self.box is not None:
            check_box(who, self.box)
        if self.projection == "sphere" and self.radius is None:
            raise ValueError(f"{who}: projection='sphere' rescales to the radius, which is None.")

    @property
    def remembers(self) -> bool:
        """Whether a move depends on the gradients of the moves before it."""
        return self.normalize == "adam"

    @property
    def leaps(self) -> bool:
        """Whether the first step is found from the clean pass."""
        return self.direction == "gauss_newton"

    @property
    def turns(self) -> bool:
        """Whether δ is turned towards the decision boundary, where there is one."""
        return self.sign == "boundary" or (self.sign is None and self.leaps)

    @property
    def initial_size(self) -> float:
        """Size of the start, in `unit`: `start_size`, else the radius, else the step size."""
        if self.start_size is not None:
            return self.start_size
        return self.step_size if self.radius is None else self.radius

    def ascent(self, **changes: Any) -> "Ascent":
        """Return the words of the ascent alone, without those of a solver; some may be changed."""
        return Ascent(**{f.name: getattr(self, f.name) for f in fields(Ascent)} | changes)

    def project(
        self, delta: Tensor, owners: Tensor | None = None, room: Room | None = None
    ) -> Tensor:
        """Return δ projected onto the set; without a radius that is the room, or the whole space.

        A δ rescaled onto the sphere is cut off where the room ends.
        """
        if self.projection == "ball" or self.radius is None:
            return self._into_ball(delta, owners, room)
        found = geometry.onto_sphere(delta, self.radius, self.norm, self.per, owners)
        return found if room is None else room.clamp(found)

    def _into_ball(self, delta: Tensor, owners: Tensor | None, room: Room | None) -> Tensor:
        if self.radius is None:
            return delta if room is None else room.clamp(delta)
        words = self.radius, self.norm, self.per, owners
        if room is None:
            return geometry.project(delta, *words)
        return project_into(delta, room, *words)

    def begin(
        self,
        like: Tensor,
        mask: Tensor | None,
        draw: "Draw",
        owners: Tensor | None = None,
        room: Room | None = None,
    ) -> Tensor:
        """Return the start point, shaped like `like`, zero where the mask is, inside the set.

        Args:
            like: gives shape `[B, ...]`, dtype (at least fp32) and device of δ.
            mask: broadcastable to `like`, 1 at real coordinates; None means all are real.
            draw: `draw(kind, like)` for a draw of kind "uniform" (in ±1) or "normal".
            owners: the sample of each row, `[B]`; None is one row for each.
            room: how far each coordinate may move; None is no box.
        """
        if self.start == "zero":
            return torch.zeros_like(like)
        noise = draw(self.start, like)
        if mask is None and owners is None:
            sizes = like.shape[1:] if self.per == "sample" else like.shape[-1:]
            count = like.new_full((), sizes.numel())
        else:
            real = torch.ones_like(like) if mask is None else mask.expand_as(like)
            noise = noise * real
            count = geometry.total(real, self.per, owners).clamp(min=1)
        power = {"l1": 1.0, "l2": 0.5, "linf": 0.0}[self.norm]
        start = self.initial_size * noise / count**power
        limit = math.inf if self.radius is None else self.radius
        if self.start == "uniform" and self.initial_size <= limit and room is None:
            return start  # which is inside as it is
        return self._into_ball(start, owners, room)

    def move(
        self,
        delta: Tensor,
        gradient: Tensor,
        mask: Tensor | None,
        draw: "Draw",
        owners: Tensor | None = None,
        room: Room | None = None,
    ) -> Tensor:
        """Return the next δ: step, noise, mask, projection, in this order.

        Args:
            delta: the point, `[B, ...]`.
            gradient: of each sample's payoff, same shape; for `"adam"` the direction itself.
            mask: as in `begin`.
            draw: as in `begin`.
            owners: as in `begin`.
            room: as in `begin`.
        """
        if mask is not None:
            gradient = gradient * mask
        if self.normalize == "steepest":
            gradient = geometry.steepest(gradient, self.norm, self.per, owners)
        elif self.normalize == "norm":
            gradient = geometry.unit(gradient, self.norm, self.per, owners)
        elif self.normalize == "sign":
            gradient = gradient.sign()

        def noise(like: Tensor) -> Tensor:
            drawn = draw("normal", like)
            return drawn if mask is None else drawn * mask

        def project(delta: Tensor) -> Tensor:
            return self.project(delta, owners, room)

        return langevin.step(delta, gradient, self.step_size, self.temperature, noise, project)


def check_box(who: str, box: Any) -> None:
    """Raise ValueError unless a box has a lower and an upper end."""
    ends = box if isinstance(box, tuple) and len(box) == 2 else ()
    for end in ends:
        check_number(who, "an end of box", end, -math.inf)
    if not ends or not ends[0] < ends[1]:
        raise ValueError(
            f"{who}: box={box!r} is no interval: give its lower and its upper end, such as "
            "box=(0.0, 1.0)."
        )


def check_choices(ascent: Ascent, known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ValueError unless each field named has one of the values known for it."""
    for name, choices in known.items():
        value = getattr(ascent, name)
        if value not in choices:
            raise ValueError(
                f"{type(ascent).__name__}: {name}={value!r} is not one of "
                f"{', '.join(map(repr, choices))}.{nearest(value, choices)}"
            )


Ascent.described = described(Ascent.__doc__ or "")

Draw = Callable[[str, Tensor], Tensor]
