"""Stochastic gradient push (SGP): gossip on a directed graph, corrected by push-sum.

Source      M. Assran et al., "Stochastic Gradient Push for Distributed Deep Learning",
            ICML 2019, arXiv 1811.10792; push-sum: D. Kempe et al., FOCS 2003.
Notation    z_i -> theta, the model at which the gradient is taken, (P,)
            w_i -> weight, push-sum weight, number; x_i = w_i z_i
            P   column stochastic matrix of the step, (K, K): 1/2 for i itself and 1/2
                for the one rank that it sends to
Update      x_i <- w_i z_i - lr * P(g_i),  g_i at z_i                          (1)
            x_i <- sum_j P_ij x_j                                              (2)
            w_i <- sum_j P_ij w_j                                              (3)
            z_i <- x_i / w_i                                                   (4)
Messages    every step 4P bytes and a weight of 8 bytes to one rank; as many from each
            rank that has this one for its destination: it need not be one.

            rank i: | gradient, (1) | x_i/2, w_i/2 ====> j |
                                      x_k/2, w_k/2 <==== k   (2), (3), (4) |
Invariants  (2) and (3) preserve the sums of all x and of all w, which is K.
            w_i = 1 on the exponential graph, where each rank has one sender: there (2)
            to (4) are one round of `dpsgd`'s, after the update.
            w_i is a sum of powers of 1/2: exact, until K rounds without a sender.
Departs     no overlap (the paper's OSGP), one destination in a step, and beside the
            paper's graph a random one: only there the weights differ from 1. From
            memory and code of others.
Cost        two extra copies of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.storage.merged import Merged
from mpilm.strategies.base import Learner, Strategy, WireConfig
from mpilm.strategies.topology import destinations
from mpilm.vectors import SparseVector, copy_of, fill_
from mpilm.world.base import World

WEIGHT_BYTES = 8  # of float64


@dataclass(frozen=True, kw_only=True)
class SgpConfig(WireConfig):
    """Section [strategy] of `sgp`."""

    graph: Literal["exponential", "random"] = "exponential"
    """to whom a rank sends in a step: 1, 2, 4, ... ranks ahead in turn, or anybody"""
    seed: Annotated[int, Meta(ge=0)] = 0
    """of the random graph"""


class Sgp(Strategy):
    """Stochastic gradient push.

    weight    w of this rank
    round     steps so far: the graph depends on it
    total     (P,) what has come in a step
    received  (P,) what comes from the second sender on
    partners  (K,) int64, rounds in which each rank's model was received
    weights   (K,) float64, sum over rounds of each rank's share in the own new z
    """

    name = "sgp"
    Config = SgpConfig
    saves = ("partners", "round", "weight", "weights")

    def __init__(self, world: World, config: SgpConfig) -> None:
        super().__init__(world, config)
        self.weight, self.round = 1.0, 0
        self.total: Any = None
        self.received: Any = None
        self.partners = SparseVector(self.comm.size, np.int64)
        self.weights = SparseVector(self.comm.size, np.float64)

    def start(self, learner: Learner) -> None:
        super().start(learner)
        if self.comm.size > 1:
            self.total, self.received = copy_of(learner.theta), copy_of(learner.theta)

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        if self.comm.size == 1:
            learner.update()
            return loss
        theta = learner.theta
        self.total[:] = theta
        self.total *= self.weight - 1.0
        learner.update()
        theta += self.total  # (1): what was added to z is now added to x
        self.push_(theta)
        theta /= self.weight  # (4)
        return loss

    def push_(self, x: Any) -> None:
        """Send half of `x` and of the weight; add what comes: (2) and (3).

        Communicates: pairwise, 4P + 8 bytes to one rank and from each sender. Blocking;
            every rank sends before it waits, so no graph can deadlock.
        """
        comm, goals = self.comm, self.goals()
        x *= 0.5
        left = comm.left_of(x)
        half, came = np.array([0.5 * self.weight]), np.zeros(1)
        goal = goals[comm.rank]
        sends = [comm.Isend(x, goal, 0), comm.Isend(half, goal, 1)]
        senders = [rank for rank, to in enumerate(goals) if to == comm.rank]
        shares, self.weight = [], float(half[0])
        for place, sender in enumerate(senders):
            buffer = self.received if place else self.total
            comm.Recv(buffer, sender, 0)
            comm.Recv(came, sender, 1)
            if place:
                self.total += buffer
            shares.append(float(came[0]))
            self.weight += shares[-1]  # (3)
        for send in sends:
            send.Wait()
        if left is not None:
            x += left
        if senders:
            x += self.total  # (2)
            self.partners[senders] += 1
            self.weights[senders] += np.array(shares) / self.weight
        self.round += 1

    def goals(self) -> list[int]:
        """Return to whom each rank sends in this round, the same list on all ranks."""
        return goals_of(self.config.graph, self.comm.size, self.config.seed, self.round)

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the mean of all x into `out`: what the ranks agree on.

        Communicates: collective, one Allreduce of 4P bytes, blocking.
        """
        out[:] = learner.theta
        out *= self.weight
        self.mean_(out)

    def take_over(self, learner: Learner, merged: Merged) -> None:
        """Go on from the mean of all x, not of all z = x / w."""
        fill_(learner.theta, merged.final)

    def metrics(self) -> dict[str, Any]:
        return {
            "mixes": int(self.partners.sum()),
            "partners": self.partners.copy(),
            "rounds": self.round,
            "weights": self.weights.copy(),
        }

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        pushed = self.comm.item_bytes * layout.size + WEIGHT_BYTES
        return self.round * pushed, int(self.partners.sum()) * pushed

    def conserved(self, learner: Learner) -> Any:
        return super().conserved(learner) * self.weight


def goals_of(graph: str, num_ranks: int, seed: int, round_: int) -> list[int]:
    """Return the destination of each rank in a round; never the rank itself.

    >>> goals_of("exponential", 4, 0, round_=1), len(goals_of("random", 5, 0, 0))
    ([2, 3, 0, 1], 5)
    """
    ranks = range(num_ranks)
    if graph == "exponential":
        return [
            destinations(graph, rank, num_ranks, round_=round_)[0] for rank in ranks
        ]
    draws = np.random.default_rng([seed, round_]).integers(
        num_ranks - 1, size=num_ranks
    )
    return [(rank + 1 + int(draw)) % num_ranks for rank, draw in enumerate(draws)]
