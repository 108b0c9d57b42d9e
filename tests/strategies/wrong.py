"""Strategies that break one law each, to see that `check_strategy` names it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpilm.strategies import Strategy
from mpilm.vectors import copy_of


@dataclass(frozen=True, kw_only=True)
class WrongConfig:
    """No settings."""


class PairAveraging(Strategy):
    """Right: every step, average with the neighbour of this round, by Sendrecv.

    theta_i <- (theta_i + theta_j) / 2,  j = i xor 1, or the other neighbour in turn
    """

    name = "pair_averaging"
    Config = WrongConfig
    saves = ("num_exchanges", "round")

    def __init__(self, world, config):
        super().__init__(world, config)
        self.round = self.num_exchanges = 0

    def start(self, learner):
        super().start(learner)
        self.received = copy_of(learner.theta)

    def peer(self):
        """Return whom to average with in this round; None: nobody."""
        rank, size = self.comm.rank, self.comm.size
        peer = rank ^ 1 if self.round % 2 == 0 else ((rank + 1) ^ 1) - 1
        return peer if 0 <= peer < size else None

    def step(self, learner):
        loss = learner.gradient()
        learner.update()
        peer = self.peer()
        if peer is not None:
            self.exchange(learner.theta, peer)
            self.num_exchanges += 1
        self.round += 1
        return loss

    def exchange(self, theta, peer):
        """Replace theta by the mean of both."""
        self.comm.Sendrecv(theta, peer, 0, self.received, peer, 0)
        theta += self.received
        theta *= 0.5

    def moved_bytes(self, layout):
        return (self.num_exchanges * 4 * layout.size,) * 2


class LosesMass(PairAveraging):
    """The higher rank of a pair takes a step too short."""

    def exchange(self, theta, peer):
        before = theta.copy()
        super().exchange(theta, peer)
        if self.comm.rank > peer:
            theta += 0.1 * (before - theta)


class AsymmetricPeers(PairAveraging):
    """Rank 0 takes another's model in without giving its own any weight there."""

    def exchange(self, theta, peer):
        before = theta.copy()
        super().exchange(theta, peer)
        if peer == 0:
            theta[:] = before


class Deadlocks(PairAveraging):
    """Both wait for the other's model before they send their own."""

    def exchange(self, theta, peer):
        self.comm.Recv(self.received, peer)
        self.comm.Send(theta, peer)


class ForgetsItsRound(PairAveraging):
    """A resumed run begins with the first pairs again."""

    saves = ("num_exchanges",)


class MiscountsBytes(PairAveraging):
    """It declares what it sends, and forgets that it receives."""

    def moved_bytes(self, layout):
        sent, _ = super().moved_bytes(layout)
        return sent, 0


class RollsDice(PairAveraging):
    """The learning rate depends on the runs before."""

    num_steps = 0

    def step(self, learner):
        RollsDice.num_steps += self.comm.size > 1
        learner.lr = 0.125 - 1e-3 * (RollsDice.num_steps % 97)
        return super().step(learner)


class LeavesAMessage(PairAveraging):
    """Rank 0 sends something at the end that nobody receives."""

    def finish(self, learner):
        if self.comm.rank == 0 and self.comm.size > 1:
            self.comm.Isend(np.zeros(1, np.float32), 1, 99)


class MovesAlone(PairAveraging):
    """On one rank it does something else than plain training."""

    def step(self, learner):
        loss = super().step(learner)
        if self.comm.size == 1:
            learner.theta *= 0.5
        return loss


class ManyFinalModels(PairAveraging):
    """Every rank keeps its own."""

    def final_model_(self, learner, out):
        out[:] = learner.theta


class SkipsData(PairAveraging):
    """Every fifth minibatch is drawn twice."""

    def step(self, learner):
        if self.round % 5 == 4 and self.comm.size > 1:
            learner.gradient()
        return super().step(learner)
