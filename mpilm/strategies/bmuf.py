"""Blockwise model-update filtering (BMUF): model averaging with a block momentum.

Source      K. Chen and Q. Huo, "Scalable Training of Deep Learning Machines by
            Incremental Block Training with Intra-Block Parallel Optimization and
            Blockwise Model-Update Filtering", ICASSP 2016.
Notation    W(t)    -> model, the filtered model after block t, (P,)
            W_g(t)  start point of the next block: what theta is set to, (P,)
            Delta   -> delta, filtered update of a block, (P,)
            eta     block momentum, 0 <= eta < 1; zeta: block learning rate, > 0
            tau     -> period, minibatches in a block;  K -> comm.size
Update      Wbar(t)  = (1/K) sum_i theta_i                                     (1)
            G(t)     = Wbar(t) - W_g(t-1)                                      (2)
            Delta(t) = eta Delta(t-1) + zeta G(t)                              (3)
            W(t)     = W(t-1) + Delta(t)             CBM                       (4)
                     = W_g(t-1) + zeta G(t)          NBM, the same             (5)
            W_g(t)   = W(t)                  classical block momentum, CBM     (6)
                     = W(t) + eta Delta(t)   Nesterov block momentum, NBM      (7)
Messages    one Allreduce of 4P bytes every block, blocking; with `stagger` one for each
            slice of the C components, spread over the block, together as many bytes.

            all at once   step step step step |====P====|
            staggered     step |=c1=| step |=c2=| step |=c3=| step |=c0=|
Invariants  eta = 0, zeta = 1: `model_averaging`, to the bit; so is every warm-up.
            CBM on a constant drift v per block: Delta -> zeta v / (1 - eta).
            NBM: W_g follows torch's Nesterov SGD with momentum eta and rate zeta on -G
            (so AdamW inside and NBM outside is DiLoCo, arXiv 2311.08105).
Departs     the implementations disagree on (2) under NBM; here G is measured from the
            start point W_g, as the paper writes it. The final model is W(t), never the
            look-ahead. The warm-up of plain averages and the staggering are additions.
Cost        two extra copies of the model: W and Delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy
from mpilm.vectors import chunked, copy_of
from mpilm.world.base import World

AUTOMATIC = -1.0


@dataclass(frozen=True, kw_only=True)
class BmufConfig:
    """Section [strategy] of `bmuf`."""

    period: Annotated[int, Meta(ge=1)] = 10
    """minibatches in a block"""
    eta: Annotated[float, Meta(ge=-1.0, lt=1.0)] = AUTOMATIC
    """block momentum; -1: 1 - 1/ranks, which suits the learning rate of one rank"""
    zeta: Annotated[float, Meta(gt=0.0)] = 1.0
    """block learning rate"""
    momentum: Literal["classical", "nesterov"] = "nesterov"
    """where the next block starts: at the filtered model, or ahead of it"""
    warmup: Annotated[int, Meta(ge=0)] = 0
    """blocks of plain averaging before the filter begins"""
    stagger: bool = False
    """synchronise one component after another over the block, not all at its end"""

    def __post_init__(self) -> None:
        check_eta(self.eta)


def check_eta(eta: float) -> None:
    """Raise ValueError unless `eta` is a momentum or says: automatic."""
    if eta != AUTOMATIC and not 0.0 <= eta < 1.0:
        raise ValueError(f"eta: {eta} is neither in [0, 1) nor -1 (automatic)")


def filter_(
    model: Any, delta: Any, mean: Any, *, eta: float, zeta: float, nesterov: bool
) -> None:
    """Apply (2) to (7) in place, without temporaries.

    Args:
        model: W(t-1), becomes W(t).
        delta: Delta(t-1), becomes Delta(t).
        mean: Wbar(t), becomes the start point W_g(t).
        eta, zeta: block momentum and block learning rate.
        nesterov: whether W_g is the look-ahead, (7); so it was after block t-1.

    >>> import numpy as np
    >>> model, delta, mean = np.zeros(1), np.zeros(1), np.ones(1)
    >>> filter_(model, delta, mean, eta=0.5, zeta=1.0, nesterov=True)
    >>> float(model[0]), float(delta[0]), float(mean[0])
    (1.0, 1.0, 1.5)
    """
    delta *= eta
    mean -= model
    if nesterov:
        mean -= delta  # W_g(t-1) = W(t-1) + eta Delta(t-1)
    mean *= zeta  # zeta G, (2)
    delta += mean  # (3)
    model += delta  # (4)
    if nesterov:
        mean[:] = delta
        mean *= eta
        mean += model  # (7)
    else:
        mean[:] = model  # (6)


def due(steps: int, period: int, num_components: int, stagger: bool) -> list[int]:
    """Return the components whose block ends after `steps` minibatches.

    Staggered, their blocks are as long but end evenly spread over the period; the first
    block of each is shorter.

    >>> [due(steps, 4, 2, stagger=True) for steps in (1, 2, 3, 4, 5, 6)]
    [[], [1], [], [0], [], [1]]
    """
    if not stagger:
        return list(range(num_components)) if steps % period == 0 else []
    return [
        component
        for component in range(num_components)
        if (steps - component * period // num_components) % period == 0
    ]


class Bmuf(Strategy):
    """Model averaging with block momentum.

    model  W(t), (P,)
    delta  Delta(t), (P,); zero until the filter begins
    """

    name = "bmuf"
    Config = BmufConfig
    synchronises = True
    saves = ("delta", "model", "steps")

    def __init__(self, world: World, config: BmufConfig) -> None:
        super().__init__(world, config)
        self.steps = 0
        self.eta = 1.0 - 1.0 / world.size if config.eta == AUTOMATIC else config.eta
        self.model: Any = None
        self.delta: Any = None

    def start(self, learner: Learner) -> None:
        super().start(learner)
        self.model = copy_of(learner.theta)
        self.delta = copy_of(learner.theta)
        self.delta *= 0.0

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()
        self.steps += 1
        for where in self.parts_due(learner):
            self.synchronise(learner, where)
        return loss

    def parts_due(self, learner: Learner) -> list[slice]:
        """Return the parts of the model whose block ends now, the same on all ranks."""
        period, stagger = self.config.period, self.config.stagger
        parts: list[tuple[slice, ...]] = [(slice(0, learner.layout.size),)]
        if stagger:
            parts = list(learner.layout.components.values())
        ending = due(self.steps, period, len(parts), stagger)
        return [where for component in ending for where in parts[component]]

    def synchronise(self, learner: Learner, where: slice) -> None:
        """End the block of a part of the model.

        Communicates: collective, one Allreduce of the part, blocking.
        """
        config = self.config
        theta, model = learner.theta[where], self.model[where]
        self.mean_(theta)  # (1)
        if self.steps <= config.warmup * config.period or self.is_plain:
            model[:] = theta
        else:
            settings = {"eta": self.eta, "zeta": config.zeta}
            nesterov = config.momentum == "nesterov"
            for parts in chunked(model, self.delta[where], theta):
                filter_(*parts, **settings, nesterov=nesterov)
        self.synchronised(where, model)

    @property
    def is_plain(self) -> bool:
        """Whether the filter changes nothing: it is left out, with its rounding."""
        return self.eta == 0.0 and self.config.zeta == 1.0

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write W(t) into `out`: what the last whole block came to."""
        out[:] = self.model

    def metrics(self) -> dict[str, Any]:
        return self.averages(self.steps // self.config.period)

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        blocks = self.steps // self.config.period
        sizes = [layout.size]
        if self.config.stagger:
            sizes = [w.stop - w.start for p in layout.components.values() for w in p]
        moved = blocks * sum(map(self.allreduced_bytes, sizes))
        return moved, moved
