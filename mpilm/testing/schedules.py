"""Random schedules by seed: ranks, machine, faults, steps, sync points.

A seed decides everything, so a failing one is replayed by its number. The models are
the deterministic simulations of FoundationDB and TigerBeetle.
"""

from __future__ import annotations

import random
from typing import Any

from mpilm.learner.quadratic import layers
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine


def draw_size(draw: random.Random) -> int:
    """Return a number of ranks, 2 to 16, mostly few."""
    return draw.randint(2, draw.choice([4, 4, 6, 6, 8, 16]))


def draw_machine(draw: random.Random) -> Machine:
    """Return a machine: slow, fast, even or not, with nodes of 1 to 4 ranks."""
    return Machine(
        latency_s=draw.choice([0.0, 1e-3, 0.5]),
        bandwidth_Bps=draw.choice([50.0, 1e4, float("inf")]),
        ranks_per_node=draw.randint(1, 4),
        node_latency_s=draw.choice([0.0, 0.1]),
        step_s=draw.choice([0.0, 1e-3, 0.25]),
        jitter=draw.choice([0.0, 0.3, 1.0]),
        eager_bytes=draw.choice([0, 64, 65_536]),
    )


def draw_faults(draw: random.Random, size: int) -> Faults:
    """Return up to two slow ranks; some are slow now and then, or have a slow link."""
    slow = {
        str(draw.randrange(size)): draw.choice([1.0, 5.0, 100.0])
        for _ in range(draw.randint(0, 2))
    }
    ranks = [draw.randrange(size)]
    profiles = (
        {"kind": "spikes", "probability": 0.3, "factor": 50.0},
        {"kind": "periodic", "every_steps": 3, "for_steps": 1, "factor": 10.0},
        {"kind": "slow_start", "steps": 2, "factor": 20.0},
        {"kind": "slow_link", "latency_s": 0.3, "bandwidth_Bps": 100.0},
    )
    chosen = draw.sample(profiles, draw.choice([0, 0, 1, 2]))
    return Faults(slow=slow, profile=tuple({**p, "ranks": ranks} for p in chosen))


def draw_plan(draw: random.Random, size: int, *, lockstep: bool) -> dict[str, Any]:
    """Return arguments of `fleet`: steps, parts, machine, faults, learner.

    Out of lockstep every rank has a number of steps of its own.
    """
    machine = draw_machine(draw)
    steps: int | list[int] = draw.randint(0, 12)
    if not lockstep:
        steps = [draw.randint(0, 8) for _ in range(size)]
    return {
        "steps": steps,
        "parts": draw.choice([1, 1, 2, 3]),
        "retire": draw.random() < 0.5,
        "machine": machine,
        "faults": draw_faults(draw, size),
        "learner": {
            "layout": layers(draw.choice([5, 11, 23])),
            "lr": draw.choice([0.0, 0.1, 0.1]),
            "momentum": draw.choice([0.0, 0.9]),
            "noise": draw.choice([0.0, 0.3]),
        },
    }
