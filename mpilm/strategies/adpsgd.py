"""Asynchronous decentralised SGD: average with others in the background, wait-free.

Source      X. Lian et al., "Asynchronous Decentralized Parallel Stochastic Gradient
            Descent", ICML 2018; X. Cui et al., arXiv 2110.11199, 2021 (random ring).
Notation    x_i      -> service.x, the model of rank i, shared by two activities, (P,)
            w_hat_i  -> theta, the copy that the gradient is taken at, (P,)
            g        -> grad at w_hat
            a        -> weight of an exchange of i and j: T_ij = T_ji = a, T_ii = 1 - a
Update      learner   g at w_hat                             (not locked)       (1)
                      x <- x - lr * P(g); w_hat <- x         (under the lock)   (2)
            exchange  x_i <- (1 - a) x_i + a x_j             (pairwise.py)      (3)
                      x_j <- (1 - a) x_j + a x_i             both from the old
Messages    those of pairwise.py: an exchange is a snapshot of 4P bytes there and a
            delta of 4P bytes back.

            rank i learner  | gradient ......... |(2)| gradient ......... |(2)|
                   service  ==s==> ...... <==d==  (3)
            rank j service        (3) ==d==>
                   learner  | gradient ....................................... |(2)|
Invariants  the sum of x over ranks and of the deltas under way changes by (2) only,
            whatever the delays. Nobody waits for anybody.
Departs     from the papers in: a ring averages with one neighbour at a time, in turns.
            a is 1/3 where Lian's pairs have 1/2: nobody stops the other exchanges while
            a snapshot is under way. Two ranks that ask each other at the same time make
            two exchanges at once: T has 1 - 2a on its diagonal, which at a = 1/2 only
            swaps the models. With a = 1/3 a ring in step is the papers' 1/3, 1/3, 1/3.
            Of row tables an exchange has the rows that the asking rank has touched
            since it last asked: row_pairwise.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import NUM_BINS, Learner, Strategy, WireConfig
from mpilm.strategies.pairwise import Pairwise
from mpilm.strategies.row_pairwise import PairwiseRows
from mpilm.strategies.shared_rows import require_resting_rows
from mpilm.strategies.topology import permutation, places
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class AdpsgdConfig(WireConfig):
    """Section [strategy] of `adpsgd`."""

    mixing: Literal["fixed_ring", "random_ring", "random_pairs"] = "random_ring"
    """whom a rank asks: its neighbours on a ring in turns, or anybody"""
    mixes_per_step: Annotated[float, Meta(gt=0)] = 1.0
    """exchanges that a rank begins in each of its steps, at most"""
    weight: Annotated[float, Meta(gt=0, le=0.5)] = 1 / 3
    """share of the difference of two models that an exchange moves to each"""
    ring_rounds: Annotated[int, Meta(ge=1)] = 10
    """exchanges that a rank begins on one random ring, before the next is drawn"""
    pieces: Annotated[int, Meta(ge=1)] = 2
    """parts that a model is sent in; 1: faster by a latency, one more copy in memory"""
    seed: Annotated[int, Meta(ge=0)] = 1
    """of the random rings and partners; the same on all ranks"""


ROW_SAVES = ("service.rows.touched", "service.sent", "service.received")


class Adpsgd(Strategy):
    """Wait-free SGD; a background activity exchanges the models.

    staleness  int64 (17,): exchanges between the reading of w_hat and its update
    """

    name = "adpsgd"
    Config = AdpsgdConfig
    survives = True
    lockstep = False
    takes_rows = True
    saves: tuple[str, ...] = ("service.partners", "service.round", "staleness")
    service: Pairwise

    def __init__(self, world: World, config: AdpsgdConfig) -> None:
        super().__init__(world, config)
        self.staleness = np.zeros(NUM_BINS, np.int64)

    def start(self, learner: Learner) -> None:
        super().start(learner)
        kind: type[Pairwise] = Pairwise
        options: dict[str, Any] = {}
        if learner.layout.tables:
            kind, self.saves = PairwiseRows, (*self.saves, *ROW_SAVES)
            options = {"layout": learner.layout}
        self.service = kind(
            self.world,
            self.comm,
            learner.theta,
            partner=self.partner,
            weight=self.config.weight,
            pieces=self.config.pieces,
            **options,
        )

    def require(self, learner: Learner) -> None:
        super().require(learner)
        require_resting_rows(self.name, learner)

    def step(self, learner: Learner) -> Any:
        if self.comm.size == 1:
            loss = learner.gradient()
            learner.update()
            return loss
        service = self.service
        service.begin()
        loss = learner.gradient()  # (1)
        with service.lock:
            service.read_(learner.theta)
            learner.update()
            service.write_(learner)  # (2)
            self.count_step()
        return loss

    def count_step(self) -> None:
        """Note that the learner has read x; give credit for (3). Under the lock."""
        service, more = self.service, self.config.mixes_per_step
        service.credit = min(max(1.0, more), service.credit + more)
        late = -(-service.num_unread // self.config.pieces)
        self.staleness[min(late, NUM_BINS - 1)] += 1
        service.num_unread = 0

    def partner(self, round_: int) -> int:
        """Return whom to ask in a round."""
        config, rank, size = self.config, self.comm.rank, self.comm.size
        if config.mixing == "random_pairs":
            order = permutation(config.seed, round_, size, salt=rank + 1)
            return order[0] if order[0] != rank else order[1]
        step = 1 if round_ % 2 == 0 else -1
        if config.mixing == "fixed_ring":
            return (rank + step) % size
        ring = (config.seed, round_ // config.ring_rounds, size)
        return permutation(*ring)[(places(*ring)[rank] + step) % size]

    def finish(self, learner: Learner) -> None:
        """Exchange no more, but answer until nobody asks; theta is x.

        Communicates: collective, one barrier, blocking.
        """
        super().finish(learner)
        if self.comm.size > 1:
            learner.theta[:] = self.service.x

    def survive(self, learner: Learner) -> None:
        """Let theta be x, if an exchange has moved it; deltas under way are lost."""
        if self.service.x is not None and self.service.is_running:
            learner.theta[:] = self.service.x

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        return self.service.moved_bytes

    def metrics(self) -> dict[str, Any]:
        partners = self.service.partners.copy()
        return {
            "mixes": int(partners.sum()),
            "partners": partners,
            "rounds": self.service.round,
            "weights": self.config.weight * partners,
            "staleness": self.staleness.copy(),
        }
