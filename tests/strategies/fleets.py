"""Fleets of quadratic learners in the virtual world, for tests of one strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpilm.flat import Layout
from mpilm.protocol import ProtocolLearner
from mpilm.strategies import strategy
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


@dataclass
class Rank:
    """What one rank came to."""

    world: Any
    learner: ProtocolLearner
    strategy: Any
    seconds: float
    final: Any
    saved: dict[str, Any]
    bytes_sent: int
    bytes_received: int
    ema: Any = None


def fleet(
    name,
    size,
    *,
    steps=30,
    save_at=None,
    resume=None,
    machine=None,
    faults=None,
    learner=None,
    watch=None,
    **settings,
):
    """Train by a strategy and return every rank; nothing may be left undelivered.

    Args:
        save_at: step after which the states are kept.
        resume: ranks of an earlier fleet, to go on from what they kept.
        watch: called with (strategy, learner) before the first step; may return an ema.
    """

    def main(world):
        options = {"lr": 0.125, "seed": world.rank, "layout": LAYOUT, **(learner or {})}
        mine = ProtocolLearner(P, compute=world.compute, **options)
        chosen = strategy(name, world, **settings)
        chosen.require(mine)
        chosen.start(mine)
        ema = watch(chosen, mine) if watch else None
        first, saved = 0, {}
        if resume:
            kept = resume[world.rank].saved
            first = kept["step"]
            mine.load_state(kept["learner"])
            chosen.load_state(kept["strategy"])
            if ema:
                ema.load_state(kept["ema"])
        began = world.now_s()
        sent, received = world.traffic.bytes_sent, world.traffic.bytes_received
        for step in range(first, steps):
            chosen.step(mine)
            if step + 1 == save_at:
                saved = {"step": save_at, "learner": mine.state()}
                saved["strategy"] = chosen.state()
                saved["ema"] = ema.state() if ema else None
        seconds = world.now_s() - began
        chosen.finish(mine)
        sent = world.traffic.bytes_sent - sent
        received = world.traffic.bytes_received - received
        final = np.empty_like(mine.theta)
        chosen.final_model_(mine, final)
        return Rank(world, mine, chosen, seconds, final, saved, sent, received, ema)

    simulation = Simulation(size, machine=machine, faults=faults)
    ranks = simulation.run(main)
    assert simulation.undelivered == []
    return ranks


def thetas(ranks):
    """Return all models, (K, P)."""
    return np.stack([rank.learner.theta for rank in ranks])
