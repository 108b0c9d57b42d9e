"""Synchronous decentralised SGD: every step, average with a few neighbours.

Source      X. Lian et al., "Can Decentralized Algorithms Outperform Centralized
            Algorithms?", NeurIPS 2017; topologies: mpilm/strategies/topology.py.
Notation    T   mixing matrix of the round, (K, K), doubly stochastic; the elements of
                a row are equal, or 0: (1) is the mean over some ranks (mixing.py)
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
            rounds (MPI's messages do not overtake), and every round receives one from
            each neighbour: so each is averaged in the round that it belongs to.
Invariants  complete graph, plain SGD, no overlap: `allreduce`, to rounding.
            complete graph, overlap: `delay_by_one`, to rounding.
            (1) preserves the mean of all models.
Departs     nowhere; random and exponential graphs are options beside the fixed one.
            Of row tables two neighbours average the rows that one of them has touched
            since its last round, on graphs with T_ij = T_ji: row_mixing.py.
Cost        one extra copy of the model for one neighbour, two for more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy, WireConfig
from mpilm.strategies.mixing import Mean
from mpilm.strategies.row_mixing import RowMean, agree_in_pairs
from mpilm.strategies.shared_rows import SharedRows, require_resting_rows
from mpilm.strategies.topology import TOPOLOGIES, destinations, mixing_matrix
from mpilm.vectors import SparseVector, copy_of
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class DpsgdConfig(WireConfig):
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
    partners  (K,) int64, rounds in which each rank's model was received
    weight    of a model that is received: the same on all ranks, in all rounds
    """

    name = "dpsgd"
    Config: ClassVar[type] = DpsgdConfig
    takes_rows = True
    survives = True
    saves: tuple[str, ...] = ("num_sent", "partners", "round")

    def __init__(self, world: World, config: Any) -> None:
        super().__init__(world, config)
        self.pace.moves_first = not getattr(config, "overlap", True)
        self.round = self.num_sent = 0
        self.rows = SharedRows(self.comm, Layout(()))  # until `start` knows them
        self.received: list[Any] = []
        self.partners = SparseVector(self.comm.size, np.int64)
        matrix = mixing_matrix(config.topology, self.comm.size, config.seed)
        self.weight = float(matrix.diagonal().min())  # 1 on a rank without partner

    def start(self, learner: Learner) -> None:
        super().start(learner)
        self.rows = SharedRows(self.comm, learner.layout)
        if learner.layout.tables:
            self.saves += ("rows.moved", "rows.touched")

    def require(self, learner: Learner) -> None:
        super().require(learner)
        require_resting_rows(self.name, learner)
        if learner.layout.tables and self.config.topology == "exponential":
            raise ConfigError(
                "strategy.topology = exponential: a rank gets nothing from whom it"
                " sends to; with model.sparse = true take fixed_ring, random_ring,"
                " random_pairs or complete"
            )

    def step(self, learner: Learner) -> Any:
        mean = self.start_mean(learner.theta)
        if self.config.overlap:
            loss = learner.gradient()
            self.finish_mean(mean)  # (1)
        else:
            self.finish_mean(mean)  # (1)
            loss = learner.gradient()
        learner.update()  # (2)
        self.rows.touch(learner)
        return loss

    def start_mean(self, theta: Any) -> Mean | RowMean:
        """Start the mean over this rank and those it receives from: T is uniform.

        Communicates: pairwise, 4P bytes to and from each neighbour; not blocking. With
            row tables it waits for the neighbours' bits.
        """
        config, comm = self.config, self.comm
        here = (comm.rank, comm.size, config.seed, self.round)
        members = TOPOLOGIES[config.topology](*here)
        mean: Mean | RowMean
        if self.rows.touched is not None:
            pairs = agree_in_pairs(self.rows, slice(0, len(theta)), members)
            mean = RowMean(comm, theta, pairs)
            self.rows.moved += mean.num_bytes
        else:
            to = destinations(config.topology, *here)
            mean = Mean(comm, theta, members, destinations=to)
            while len(self.received) < min(2, len(mean.sources)):
                self.received.append(copy_of(theta))
            mean.receive(self.received)
        self.round += 1
        self.num_sent += len(mean.sends)
        return mean

    def finish_mean(self, mean: Mean | RowMean) -> None:
        """Let theta be the mean (1): the models of its sources have come."""
        mean.finish_()
        self.partners[mean.sources] += 1

    @property
    def exchanged(self) -> Any:
        if self.config.topology != "exponential":
            return super().exchanged
        return self.averages(self.round)["partners"]  # sources are not destinations

    def metrics(self) -> dict[str, Any]:
        return {
            "mixes": int(self.partners.sum()),
            "partners": self.partners.copy(),
            "rounds": self.round,
            "weights": self.weight * self.partners.copy(),
        }

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        if layout.tables:
            return self.rows.moved, self.rows.moved
        model = self.comm.item_bytes * layout.size
        return self.num_sent * model, int(self.partners.sum()) * model
