"""Strategies with one fault each, to see that the random schedules find it."""

from __future__ import annotations

from itertools import count

from mpilm.strategies.adpsgd import Adpsgd
from mpilm.strategies.async_sgd import AsyncSgd
from mpilm.strategies.dpsgd import Dpsgd
from mpilm.strategies.local import Local
from mpilm.strategies.model_averaging import ModelAveraging


class LosesMass(Adpsgd):
    """Every fifth delta that comes back is not added."""

    def start(self, learner):
        super().start(learner)
        service, numbers = self.service, count()
        take_delta = service.take_delta

        def sometimes():
            if next(numbers) % 5 == 4:
                service.asking[:] = 0.0
            take_delta()

        service.take_delta = sometimes


class WaitsForEver(ModelAveraging):
    """Rank 1 leaves out the third average."""

    def is_due(self, before, samples):
        leaves_out = (self.world.rank, self.steps) == (1, 3)
        return super().is_due(before, samples) and not leaves_out


class ForgetsAMessage(Dpsgd):
    """Rank 0 says something at the end that nobody expects."""

    def final_model_(self, learner, out):
        if self.comm.rank == 0:
            self.comm.Isend(learner.theta[:1], 1, 99)
        super().final_model_(learner, out)


class RunsAhead(AsyncSgd):
    """The parameter server takes each rank to be a step further than it is."""

    def start(self, learner):
        super().start(learner)
        self.service.bound += self.service.bound >= 0


class RollsDice(Local):
    """The learning rate depends on the runs before: the same seed, other bits."""

    num_steps = 0

    def step(self, learner):
        RollsDice.num_steps += 1
        learner.lr = 1e-3 * RollsDice.num_steps
        return super().step(learner)
