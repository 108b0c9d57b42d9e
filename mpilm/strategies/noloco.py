"""NoLoCo: blocks of local steps, then an outer step of random pairs, no global average.

Source      J. Kolehmainen et al., "NoLoCo: No-all-reduce Low Communication Training
            Method for Large Models", arXiv 2506.10911, 2025.
Notation    theta_i  model of rank i at the end of a block, (P,)
            phi_i    -> phi, where rank i began the block, (P,)
            delta_i  -> delta, outer momentum of rank i, (P,)
            alpha, beta, gamma   momentum, rate, and pull towards the pair
            <x>      mean over the two ranks of a random pair, drawn for each block
Update      theta_i <- theta_i - lr * P(g_i)              every minibatch      (1)
            delta_i <- alpha delta_i + beta <theta - phi>
                       - gamma (phi_i - <phi>)            at a block's end     (2)
            phi_i   <- phi_i + delta_i;  theta_i <- phi_i                      (3)
Messages    at a block's end two vectors of 4P bytes to the partner, theta and phi, and
            two from it; both are under way at once. With odd K one rank is its own
            partner.
Invariants  the mean over ranks follows classical momentum on the mean of theta - phi:
            (2) takes nothing from it for gamma.
            gamma = 1, alpha = 0, beta = 1: the mean of random pairs every block.
            (1 - alpha) phi + alpha delta = (1 - alpha) phi(0) + beta D in the mean over
            ranks, D: what was learned in all blocks.
Departs     from the abstract and from memory, as no text could be had: that gamma lies
            between alpha and 2 + alpha for pairs is from memory too; the default is
            chosen, not tuned. No random routing through a pipeline. One rank has no
            outer step: it is `local`.
Cost        four extra copies of the model: phi, delta and what comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy, WireConfig
from mpilm.strategies.mixing import Mean
from mpilm.strategies.topology import random_pairs
from mpilm.vectors import SparseVector, chunked, copy_of, to_array
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class NolocoConfig(WireConfig):
    """Section [strategy] of `noloco`."""

    period: Annotated[int, Meta(ge=1)] = 50
    """minibatches in a block"""
    alpha: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5
    """outer momentum"""
    beta: Annotated[float, Meta(gt=0.0)] = 0.7
    """outer learning rate"""
    gamma: Annotated[float, Meta(ge=0.0)] = 0.9
    """pull towards the partner"""
    seed: Annotated[int, Meta(ge=0)] = 0
    """of the pairs"""


class Noloco(Strategy):
    """Local steps in blocks, and an outer step in pairs.

    steps     minibatches so far
    phi       (P,) model at the begin of the block
    delta     (P,) outer momentum
    received  two vectors (P,), for theta and phi of the partner
    partners  (K,) int64, blocks with each rank
    """

    name = "noloco"
    Config = NolocoConfig
    saves = ("delta", "partners", "phi", "steps")
    lasting = ("delta", "phi")

    def __init__(self, world: World, config: NolocoConfig) -> None:
        super().__init__(world, config)
        self.steps = 0
        self.phi: Any = None
        self.delta: Any = None
        self.received: list[Any] = []
        self.partners = SparseVector(self.comm.size, np.int64)

    def start(self, learner: Learner) -> None:
        super().start(learner)
        if self.comm.size > 1:
            self.phi, self.delta = copy_of(learner.theta), copy_of(learner.theta)
            self.delta[:] = 0.0
            self.received = [copy_of(learner.theta), copy_of(learner.theta)]

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()  # (1)
        self.steps += 1
        if self.comm.size > 1 and self.steps % self.config.period == 0:
            self.end_block_(learner.theta)
        return loss

    def end_block_(self, theta: Any) -> None:
        """Apply (2) and (3).

        Communicates: pairwise, 8P bytes to and from the partner, blocking.
        """
        config, comm = self.config, self.comm
        block = self.steps // config.period
        pair = random_pairs(comm.rank, comm.size, config.seed, block)
        means = [Mean(comm, theta, pair, tag=0), Mean(comm, self.phi, pair, tag=1)]
        for mean, buffer in zip(means, self.received, strict=True):
            mean.receive([buffer])
        for mean, out in zip(means, self.received, strict=True):
            mean.finish_(out)
        self.partners[means[0].sources] += 1
        parts = chunked(theta, self.phi, self.delta, *self.received)
        for model, phi, delta, theta_mean, phi_mean in parts:
            theta_mean -= phi_mean
            theta_mean *= config.beta
            phi_mean -= phi
            phi_mean *= config.gamma
            delta *= config.alpha
            delta += theta_mean
            delta += phi_mean  # (2)
            phi += delta
            model[:] = phi  # (3)

    def metrics(self) -> dict[str, Any]:
        return {
            "mixes": int(self.partners.sum()),
            "partners": self.partners.copy(),
            "rounds": self.steps // self.config.period,
            "weights": 0.5 * self.partners.copy(),
        }

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        moved = 2 * self.comm.item_bytes * layout.size * int(self.partners.sum())
        return moved, moved

    def conserved(self, learner: Learner) -> Any:
        """Return the last invariant over beta, with what was learned since."""
        if self.phi is None:
            return super().conserved(learner)
        alpha, beta = self.config.alpha, self.config.beta
        phi, delta, theta = (
            np.asarray(to_array(vector), np.float64)
            for vector in (self.phi, self.delta, learner.theta)
        )
        return ((1.0 - alpha) * phi + alpha * delta) / beta + (theta - phi)
