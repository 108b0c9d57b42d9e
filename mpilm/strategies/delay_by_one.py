"""Delay-by-one: the average of all models, hidden behind the gradient.

Source      X. Cui et al., "Asynchronous Decentralized Distributed Training of Acoustic
            Models", arXiv 2110.11199, 2021 (D1D).
Notation    w_i^k -> theta of rank i after k steps, (P,)
            g_i   -> grad, taken at w_i^k: the local model, not yet averaged
            L     -> comm.size
Update      w_i^{k+1} <- (1/L) sum_j w_j^k - lr * P(g_i(w_i^k))                (1)
Messages    one Iallreduce of 4P bytes every step, started before the gradient; of row
            tables only the rows that somebody updated in the last (shared_rows.py).

            rank 0: | gradient ............ | mean, update | gradient ...
                      |== sum of models ==|
            rank 1: | gradient ............ | mean, update | gradient ...
Invariants  equal data on all ranks: plain SGD of one rank, to rounding.
            The mean over ranks moves by -lr * mean_i P(g_i), as for `allreduce`.
            `dpsgd` on the complete graph with overlap, to rounding.
Departs     nowhere that the abstract tells; that the gradient is taken at the local
            model before averaging is our reading of "delay by one".
Cost        one extra copy of the model. The pace is common: a slow rank slows all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy, WireConfig
from mpilm.strategies.shared_rows import SharedRows, require_resting_rows
from mpilm.world.base import IN_PLACE, Request, World


@dataclass(frozen=True, kw_only=True)
class DelayByOneConfig(WireConfig):
    """Section [strategy] of `delay_by_one`: it has no settings of its own."""


class DelayByOne(Strategy):
    """Synchronous SGD on models, with the average one step late.

    part   what of a model is on its way: with row tables not all
    sum    (P,) or fewer, the models on their way
    moved  bytes of the averages so far, each way
    """

    name = "delay_by_one"
    Config = DelayByOneConfig
    survives = True
    synchronises = True
    takes_rows = True
    saves = ("moved", "rounds", "rows.moved", "rows.touched")
    lasting = ("rounds",)

    def __init__(self, world: World, config: DelayByOneConfig) -> None:
        super().__init__(world, config)
        self.sum: Any = None
        self.part: Any = None
        self.rounds = self.moved = 0

    def start(self, learner: Learner) -> None:
        super().start(learner)
        self.rows = SharedRows(self.comm, learner.layout)

    def require(self, learner: Learner) -> None:
        super().require(learner)
        require_resting_rows(self.name, learner)

    def step(self, learner: Learner) -> Any:
        if self.comm.size == 1:
            loss = learner.gradient()
        else:
            average = self.start_average(learner)
            loss = learner.gradient()  # at the local model
            average.Wait()
            self.sum /= self.comm.size
            if average.left is not None:
                self.sum += average.left
            self.part.set_(learner.theta, self.sum)
        self.synchronised(slice(0, learner.layout.size), learner.theta)
        learner.update()  # (1)
        self.rows.touch(learner)
        self.rounds += 1
        return loss

    def metrics(self) -> dict[str, Any]:
        return self.averages(self.rounds)

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        moved = self.moved + self.rows.moved
        return moved, moved

    def start_average(self, learner: Learner) -> Request:
        """Start summing a copy of every rank's model.

        Communicates: collective, one Iallreduce of 4P bytes, not blocking.
        """
        self.part = self.rows.agree(slice(0, learner.layout.size))
        if self.sum is None or learner.layout.tables:
            self.sum = self.part.of(learner.theta)
        else:
            self.sum[:] = learner.theta
        self.moved += self.allreduced_bytes(len(self.sum))
        return self.comm.Iallreduce(IN_PLACE, self.sum)
