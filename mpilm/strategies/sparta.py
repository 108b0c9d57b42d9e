"""Sparse parameter averaging (SPARTA): in every step the mean of a few parameters.

Source      M. Beton et al., "Improving the Efficiency of Distributed Training using
            Sparse Parameter Averaging", ICLR 2025 workshop MCDC.
Notation    p -> share of the parameters that are averaged in a step
            S -> index set of the step, (m,) int64, m = max(1, round(p P))
Update      theta_i    <- theta_i - lr * P(g_i)                                (1)
            theta_i[S] <- (1/K) sum_j theta_j[S]                               (2)
            S is drawn anew in every step, from seed and step: the same on all ranks,
            and no index is sent.
Messages    one Allreduce of 4m bytes every step, blocking.
Invariants  p = 1 is `model_averaging` with period 1, to the bit.
            (2) preserves the mean of all models. Of the squared distance to the mean it
            leaves 1 - m/P, in expectation.
Departs     from memory, as no text could be had: one set over the flat vector, not one
            of each tensor; the values are those of this step, not of some steps ago;
            not beside DiLoCo.
Cost        the m indices and m values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy, WireConfig
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class SpartaConfig(WireConfig):
    """Section [strategy] of `sparta`."""

    share: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.005
    """of the parameters that are averaged in a step"""
    seed: Annotated[int, Meta(ge=0)] = 0
    """of the index sets"""


class Sparta(Strategy):
    """The mean of a random index set in every step.

    steps  minibatches so far: the index sets depend on it
    moved  bytes sent so far, and as many received
    mixed  sum over steps of m/P
    """

    name = "sparta"
    Config = SpartaConfig
    saves = ("mixed", "moved", "steps")
    lasting = ("steps",)

    def __init__(self, world: World, config: SpartaConfig) -> None:
        super().__init__(world, config)
        self.steps = self.moved = 0
        self.mixed = 0.0

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()  # (1)
        self.steps += 1
        if self.comm.size > 1:
            self.average_some_(learner.theta)
        return loss

    def average_some_(self, theta: Any) -> None:
        """Apply (2).

        Communicates: collective, one Allreduce of 4m bytes, blocking.
        """
        config = self.config
        where = index_set(len(theta), config.share, config.seed, self.steps)
        some = theta[where]
        self.mean_(some)
        theta[where] = some
        self.moved += self.allreduced_bytes(len(where))
        self.mixed += len(where) / len(theta)

    def metrics(self) -> dict[str, Any]:
        """Return the counts; a step's weights are those of the mean parameter."""
        counts = self.averages(self.steps)
        counts["weights"] = (counts["partners"] > 0) * self.mixed / self.comm.size
        return counts

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        return self.moved, self.moved


@lru_cache(maxsize=2)  # the virtual ranks of a process draw the same
def index_set(size: int, share: float, seed: int, step: int) -> Any:
    """Return S of a step, ascending, (m,) int64.

    >>> len(index_set(1000, 0.01, 0, 1)), len(index_set(3, 0.01, 0, 1))
    (10, 1)
    """
    count = max(1, round(share * size))
    drawn = np.random.default_rng([seed, step]).choice(
        size, count, replace=False, shuffle=False
    )
    return np.sort(drawn)
