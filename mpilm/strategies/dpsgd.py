"""Synchronous decentralised SGD: every step, average with a few neighbours.

Source      X. Lian et al., "Can Decentralized Algorithms Outperform Centralized
            Algorithms?", NeurIPS 2017; topologies: mpilm/strategies/topology.py.
Notation    T   mixing matrix of the round, (K, K), doubly stochastic
            g_i -> grad, gradient of rank i's minibatch, (P,)
Update      theta_i <- sum_j T_ij theta_j                                      (1)
            theta_i <- theta_i - lr * P(g_i)                                   (2)
            With `overlap`, g_i is taken at theta_i before (1), while the models
            travel: W <- W T - lr g(W). Without it, after (1): W <- W T - lr g(W T).
Messages    every step, one model of 4P bytes to and from each neighbour.

            rank i: | gradient ........ | mix, update | gradient ........
                      theta_i ==> j
                      theta_j ==> i

            A rank may run ahead of a neighbour. Its models arrive in the order of its
            rounds (MPI's messages do not overtake), and every round asks a neighbour
            for one: so a model always meets the round it belongs to.
Invariants  complete graph, plain SGD, no overlap: `allreduce`, to rounding.
            complete graph, overlap: `delay_by_one`, to rounding.
            (1) preserves the mean of all models.
Departs     nowhere; random and exponential graphs are options beside the fixed one.
Cost        one extra copy of the model for one neighbour, two for more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import ITEM_BYTES, Learner, Strategy
from mpilm.strategies.topology import TOPOLOGIES, listeners, mixing_matrix
from mpilm.vectors import copy_of
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class DpsgdConfig:
    """Section [strategy] of `dpsgd`."""

    topology: Literal[
        "fixed_ring", "random_ring", "exponential", "complete", "random_pairs"
    ] = "fixed_ring"
    """who averages with whom in a step"""
    overlap: bool = True
    """take the gradient while the models travel, at the model before mixing"""
    seed: Annotated[int, Meta(ge=0)] = 0
    """of the random topologies"""


class Dpsgd(Strategy):
    """Synchronous decentralised SGD.

    round     rounds of mixing so far: the random topologies depend on it
    num_sent  models sent so far
    received  at most two vectors (P,) for the models of neighbours
    partners  (K,) int64, rounds in which each rank's model was heard
    weight    of a model that is heard: the same on all ranks, in all rounds
    """

    name = "dpsgd"
    Config = DpsgdConfig
    saves = ("num_sent", "partners", "round")

    def __init__(self, world: World, config: DpsgdConfig) -> None:
        super().__init__(world, config)
        self.pace.moves_first = not config.overlap
        self.round = self.num_sent = 0
        self.received: list[Any] = []
        self.partners = np.zeros(self.comm.size, np.int64)
        matrix = mixing_matrix(config.topology, self.comm.size, config.seed)
        self.weight = float(matrix.diagonal().min())  # 1 on a rank without partner

    def step(self, learner: Learner) -> Any:
        mixing = Mixing(self, learner.theta)
        if self.config.overlap:
            loss = learner.gradient()
            mixing.finish_()  # (1)
        else:
            mixing.finish_()  # (1)
            loss = learner.gradient()
        learner.update()  # (2)
        self.round += 1
        self.num_sent += len(mixing.sends)
        self.partners[mixing.peers] += 1
        return loss

    def metrics(self) -> dict[str, Any]:
        return {
            "mixes": int(self.partners.sum()),
            "partners": self.partners.copy(),
            "rounds": self.round,
            "weights": self.weight * self.partners,
        }

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        model = ITEM_BYTES * layout.size
        return self.num_sent * model, int(self.partners.sum()) * model


class Mixing:
    """One round of (1) on its way: models sent and received.

    The first two neighbours' models travel at once, those of further ones (complete
    graph) one after the other into the second vector, when `finish_` is called.

    Communicates: pairwise, 4P bytes to each listener and from each neighbour.
    """

    def __init__(self, strategy: Dpsgd, theta: Any) -> None:
        comm, config = strategy.comm, strategy.config
        where = (comm.rank, comm.size, config.seed, strategy.round)
        self.comm, self.theta = comm, theta
        self.weights = TOPOLOGIES[config.topology](*where)
        self.peers = [peer for peer in self.weights if peer != comm.rank]
        self.received = strategy.received
        while len(self.received) < min(2, len(self.peers)):
            self.received.append(copy_of(theta))
        self.receives = [
            comm.Irecv(model, peer)
            for model, peer in zip(self.received, self.peers, strict=False)
        ]
        told = listeners(config.topology, *where)
        self.sends = [comm.Isend(theta, peer) for peer in told]

    def finish_(self) -> None:
        """Wait for the models; replace theta by the weighted sum (1). Blocking."""
        for place, peer in enumerate(self.peers):
            model = self.received[min(place, 1)]
            if place < 2:
                self.receives[place].Wait()
            else:
                self.comm.Recv(model, peer)
            model *= self.weights[peer]
            if place > 0:
                self.received[0] += model
        for send in self.sends:
            send.Wait()
        self.theta *= self.weights[self.comm.rank]
        if self.peers:
            self.theta += self.received[0]
