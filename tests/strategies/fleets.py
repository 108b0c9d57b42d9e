"""Fleets of quadratic learners in the virtual world, for tests of the strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpilm.learner.flat import Layout
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import STRATEGIES, strategy
from mpilm.world.virtual import Simulation

P = 40
# "words" has two slices that do not touch, as tied weights with a bias elsewhere have
LAYOUT = Layout.of(
    [
        ("embed.weight", (3, 4), "words"),
        ("lstm.weight", (9,), "lstm"),
        ("head.weight", (12,), "head"),
        ("softmax.bias", (7,), "words"),
    ]
)


class Witness(ProtocolLearner):
    """A quadratic that remembers what its own steps have moved.

    moved  (P,) float64: the sum of all that `update` or a push added to the model
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.moved = np.zeros(len(self.theta))

    def update(self):
        before = self.theta.astype(np.float64)
        super().update()
        self.moved += self.theta - before

    def watch(self, chosen):
        """Count pushes to a parameter server as well, if there is one."""
        chosen = getattr(chosen, "inner", chosen)  # of `hierarchical`
        if not hasattr(chosen, "pushed"):
            return
        pushed = chosen.pushed

        def noted(learner):
            moved = self.moved.copy()  # without the local optimiser's step: it is u
            step = pushed(learner)
            self.moved = moved - step
            return step

        chosen.pushed = noted


@dataclass
class Rank:
    """What one rank came to."""

    world: Any
    learner: Witness
    strategy: Any
    first: Any  # model before the first step
    final: Any
    seconds: float  # of its steps
    leads: list[int]  # steps ahead of the slowest rank, at the beginning of each
    saved: dict[str, Any]
    bytes_sent: int
    bytes_received: int
    simulation: Simulation
    ema: Any = None


@dataclass
class Training:
    """How the ranks of a fleet train; arguments as of `fleet`."""

    steps: list[int]
    parts: int = 1
    retire: bool = False
    save_at: int | None = None
    until_s: float | None = None

    def __post_init__(self):
        self.done = [0] * len(self.steps)
        self.met = [0] * len(self.steps)
        self.leads = [[] for _ in self.steps]

    def note_lead(self, rank):
        """Keep how many steps a rank is ahead of those that are still to come here."""
        busy = [
            n for n, m in zip(self.done, self.met, strict=True) if m <= self.met[rank]
        ]
        self.leads[rank].append(self.done[rank] - min(busy))

    def run(self, chosen, learner, save):
        """Take one rank's steps; return the seconds that they took."""
        world = chosen.world
        rank, seconds = world.rank, 0.0
        for part in range(1, self.parts + 1):
            began_s = world.now_s()
            while self.done[rank] < self.steps[rank] * part // self.parts:
                if self.until_s is not None and world.now_s() >= self.until_s:
                    break
                chosen.step(learner)
                self.done[rank] += 1
                if self.done[rank] == self.save_at:
                    save()
            seconds += world.now_s() - began_s
            self.met[rank] += 1
            if self.retire:
                chosen.retire(learner)
                world.comm.Barrier()  # as a vote: others may still take steps
            chosen.finish(learner)
        return seconds


def fleet(
    name,
    size,
    *,
    steps=30,
    parts=1,
    retire=False,
    save_at=None,
    until_s=None,
    resume=None,
    scatter=False,
    machine=None,
    faults=None,
    world_seed=0,
    learner=None,
    watch=None,
    kinds=STRATEGIES,
    **settings,
):
    """Train by a strategy and return every rank; nothing may stay in flight.

    Args:
        steps: of every rank; a list: one number each.
        parts: the ranks meet so often, after equal shares of their steps.
        retire: retire and wait for the others before `finish`, as the trainer does.
        save_at: step after which the states are kept; out of lockstep they meet then.
        until_s: virtual time after which no step begins.
        resume: ranks of an earlier fleet, to go on from what they kept.
        scatter: give every rank another first model, as no strategy would; or (K, P).
        world_seed: of the machine's jitter; rank i's learner has this seed + i.
        learner: options of every rank's learner; or a function of the rank.
        watch: called with (strategy, learner) before the first step; may return an ema.
        kinds: the strategies by name.
    """
    steps = [steps] * size if isinstance(steps, int) else steps
    training = Training(steps, parts, retire, save_at, until_s)
    simulation = Simulation(size, machine=machine, faults=faults, seed=world_seed)

    def main(world):
        rank = world.rank
        options = {"lr": 0.125, "seed": world_seed + rank, "layout": LAYOUT}
        options |= (learner(rank) if callable(learner) else learner) or {}
        mine = Witness(options["layout"].size, compute=world.compute, **options)
        own = mine.theta.copy() if scatter is True else scatter
        if kinds is STRATEGIES:
            chosen = strategy(name, world, **settings)
        else:
            chosen = kinds[name](world, kinds[name].Config(**settings))
        chosen.require(mine)
        chosen.start(mine)
        mine.watch(chosen)
        if scatter is not False:
            mine.theta[:] = own if scatter is True else scatter[rank]
        ema = watch(chosen, mine) if watch else None
        saved = {}
        if resume:
            kept = resume[rank].saved
            training.done[rank] = kept["step"]
            mine.load_state(kept["learner"])
            chosen.load_state(kept["strategy"])
            if ema:
                ema.load_state(kept["ema"])
        gradient = mine.gradient

        def noted(ready=None, **options):
            training.note_lead(rank)
            return gradient(ready, **options)

        mine.gradient = noted
        first = mine.theta.copy()
        world.comm.Barrier()
        sent, received = world.traffic.bytes_sent, world.traffic.bytes_received

        def save():
            if not chosen.lockstep:
                chosen.retire(mine)
                chosen.finish(mine)
            saved.update(step=save_at, learner=mine.state(), strategy=chosen.state())
            saved["ema"] = ema.state() if ema else None

        seconds = training.run(chosen, mine, save)
        sent = world.traffic.bytes_sent - sent
        received = world.traffic.bytes_received - received
        final = np.empty_like(mine.theta)
        chosen.final_model_(mine, final)
        return Rank(
            world, mine, chosen, first, final, seconds, training.leads[rank], saved,
            sent, received, simulation, ema,
        )  # fmt: skip

    ranks = simulation.run(main)
    assert_quiet(simulation)
    return ranks


def assert_quiet(simulation):
    """Raise unless nothing is under way: no message, no receive, no collective."""
    assert simulation.undelivered == [], "messages that nobody received"
    for communicator in simulation.network.communicators:
        assert not communicator.open, "collectives that some rank never entered"
        for comm in communicator.comms:
            assert not comm.receives, "receives without a message"


def thetas(ranks):
    """Return all models, (K, P)."""
    return np.stack([rank.learner.theta for rank in ranks])


def targets(ranks):
    """Return the minima of all ranks, (K, P) float64."""
    return np.stack([rank.learner.target for rank in ranks]).astype(np.float64)
