"""Local steps; models and moments are averaged at periods of their own (DES-LOC).

Source      A. Iacob et al., "DES-LOC: Desynced Low Communication Adaptive Optimizers
            for Training Foundation Models", arXiv 2505.22549, 2025.
Notation    K_x -> period, steps between two averages of the model
            K_u -> period_first, the same of the first moments
            K_v -> period_second, the same of the second moments
            u_i, v_i   moments of rank i's optimiser, (P,) each
Update      theta_i, u_i, v_i <- a step of the optimiser                       (1)
            theta_i <- (1/K) sum_j theta_j      every K_x steps                (2)
            u_i     <- (1/K) sum_j u_j          every K_u steps                (3)
            v_i     <- (1/K) sum_j v_j          every K_v steps                (4)
Messages    an Allreduce of 4P bytes for each of (2) to (4) that is due, blocking: for
            AdamW 8P (K-1)/K (1/K_x + 1/K_u + 1/K_v) bytes in a step and rank.
Invariants  K_x = K_u = K_v is `model_averaging` with momentum = "average" (Local Adam),
            to the bit. Without moments it is `model_averaging`.
            (2) preserves the mean of all models.
Departs     (3) and (4) come after the K-th step, not before it; all gradients are
            clipped as [optim] says. Known from the abstract and from summaries of
            others. A second moment is one with "sq" in its name: exp_avg_sq.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy, WireConfig
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class DesLocConfig(WireConfig):
    """Section [strategy] of `des_loc`."""

    period: Annotated[int, Meta(ge=1)] = 10
    """steps between two averages of the model"""
    period_first: Annotated[int, Meta(ge=0)] = 0
    """steps between two averages of the first moments; 0: three periods"""
    period_second: Annotated[int, Meta(ge=0)] = 0
    """steps between two averages of the second moments; 0: six periods"""


class DesLoc(Strategy):
    """Local steps, and averages of models and moments.

    steps  minibatches so far
    moved  bytes of all averages so far, each way
    num_means  averages of models so far
    """

    name = "des_loc"
    Config = DesLocConfig
    survives = True
    synchronises = True
    saves = ("moved", "steps")
    lasting = ("steps",)

    def __init__(self, world: World, config: DesLocConfig) -> None:
        super().__init__(world, config)
        self.steps = self.moved = self.num_means = 0

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()  # (1)
        self.steps += 1
        if self.steps % self.config.period == 0:
            self.average_(learner.theta)  # (2)
            self.num_means += 1
            self.synchronised(slice(0, learner.layout.size), learner.theta)
        if self.comm.size > 1:
            for name, moment in learner.moments().items():
                if self.steps % self.period_of(name) == 0:
                    self.average_(moment)  # (3), (4)
        return loss

    def period_of(self, moment: str) -> int:
        """Return the steps between two averages of a moment."""
        config = self.config
        if "sq" in moment.partition("/")[0]:
            return int(config.period_second or 6 * config.period)
        return int(config.period_first or 3 * config.period)

    def average_(self, vector: Any) -> None:
        """Replace `vector` by its mean over ranks; count its bytes.

        Communicates: collective, one Allreduce of the vector, blocking.
        """
        self.mean_(vector)
        self.moved += self.allreduced_bytes(len(vector))

    def metrics(self) -> dict[str, Any]:
        return self.averages(self.steps // self.config.period)

    @property
    def exchanged(self) -> Any:
        return self.averages(self.num_means)["partners"]

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        return self.moved, self.moved
