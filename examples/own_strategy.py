"""A strategy of one's own: elastic averaging SGD, in both worlds.

    mpirun -n 4 python examples/own_strategy.py
    mpilm train jobs/configs/demo.toml --set strategy.name=own_strategy:Easgd ...

Source      S. Zhang, A. Choromanska, Y. LeCun, "Deep learning with Elastic Averaging
            SGD", NeurIPS 2015 (the synchronous form).
Update      every `period` steps, on every rank i of K:
            d_i  = alpha (theta_i - center)
            theta_i <- theta_i - d_i                                              (1)
            center  <- center + sum_i d_i                                         (2)
Messages    one Allreduce of 4P bytes every `period` steps, blocking.
Invariants  sum_i theta_i + center changes by the learners' steps only.

docs/own_strategy.md explains each line.
"""

from dataclasses import dataclass

import numpy as np

from mpilm import run_mpi
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import Strategy
from mpilm.vectors import copy_of, to_array
from mpilm.world.base import IN_PLACE


@dataclass(frozen=True, kw_only=True)
class EasgdConfig:
    period: int = 10
    """minibatches between two exchanges"""
    alpha: float = 0.1
    """how far theta and the center move towards each other; below 1 / ranks"""


class Easgd(Strategy):
    name = "easgd"
    Config = EasgdConfig
    saves = ("center", "rounds", "steps")

    def start(self, learner):
        super().start(learner)  # the model of rank 0, on all ranks
        self.center, self.elastic = copy_of(learner.theta), copy_of(learner.theta)
        self.steps = self.rounds = 0

    def step(self, learner):
        loss = learner.gradient()
        learner.update()
        self.steps += 1
        if self.comm.size > 1 and self.steps % self.config.period == 0:
            self.exchange(learner.theta)
        return loss

    def exchange(self, theta):
        self.elastic[:] = theta
        self.elastic -= self.center
        self.elastic *= self.config.alpha
        theta -= self.elastic  # (1)
        self.comm.Allreduce(IN_PLACE, self.elastic)
        self.center += self.elastic  # (2)
        self.rounds += 1

    def final_model_(self, learner, out):
        out[:] = self.center if self.comm.size > 1 else learner.theta

    def moved_bytes(self, layout):
        moved = self.rounds * self.allreduced_bytes(layout.size)
        return moved, moved

    def conserved(self, learner):
        own = np.asarray(to_array(learner.theta), np.float64)
        return own + to_array(self.center) / self.comm.size


def train(world):
    learner = ProtocolLearner(1000, compute=world.compute, seed=world.rank)
    chosen = Easgd(world, EasgdConfig(period=5))
    chosen.start(learner)
    for _ in range(200):
        chosen.step(learner)
    chosen.finish(learner)
    chosen.final_model_(learner, learner.theta)
    target = learner.target.copy()
    chosen.mean_(target)  # the minimum of the mean loss
    if world.rank == 0:
        distance = float(np.linalg.norm(learner.theta - target))
        print(f"distance to the minimum {distance:.3f}, ranks: {world.size}")


if __name__ == "__main__":
    run_mpi(train)
