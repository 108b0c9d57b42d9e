"""Random schedules for strategies whose ranks go at their own pace, by seed.

python -m tests.strategies.asynchronous adpsgd 0 10000    # soak: seeds 0..9999
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpilm.protocol import ProtocolLearner
from mpilm.strategies.adpsgd import Adpsgd
from mpilm.strategies.async_sgd import AsyncSgd
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation

KINDS = {kind.name: kind for kind in (Adpsgd, AsyncSgd)}


@dataclass
class Ranks:
    """What the ranks of a run left behind."""

    learners: list[Any]
    strategies: list[Any]
    simulation: Simulation
    models: list[Any]
    seconds: list[float]  # of its steps, by rank
    begun: list[Any]  # first models
    leads: list[int] = field(default_factory=list)  # steps ahead of the slowest


def train(
    name,
    size,
    steps,
    *,
    settings=None,
    machine=None,
    faults=None,
    seed=0,
    parts=1,
    num_parameters=23,
    until_s=None,
    retire=False,
    **learning,
):
    """Run `steps` steps a rank (a list: one number each; split by `parts` drains)."""
    kind = KINDS[name]
    simulation = Simulation(size, machine=machine, faults=faults, seed=seed)
    steps = [steps] * size if isinstance(steps, int) else steps
    done, drained = [0] * size, [0] * size  # steps and drains of each rank
    leads: list[int] = []
    begun: list[Any] = []

    def main(world):
        learner = ProtocolLearner(
            num_parameters, compute=world.compute, seed=seed + world.rank, **learning
        )
        inner = learner.gradient

        def gradient(ready=None, **options):
            part = drained[world.rank]
            busy = [n for n, ends in zip(done, drained, strict=True) if ends <= part]
            leads.append(done[world.rank] - min(busy))
            return inner(ready, **options)

        learner.gradient = gradient
        strategy = kind(world, kind.Config(**(settings or {})))
        strategy.require(learner)
        own = learner.theta.copy()
        strategy.start(learner)
        if name == "adpsgd":
            learner.theta[:] = own  # from different models
        begun.append(learner.theta.copy())
        world.comm.Barrier()
        seconds = 0.0
        for part in range(parts):
            start_s = world.now_s()
            while done[world.rank] < steps[world.rank] * (part + 1) // parts:
                if until_s is not None and world.now_s() >= until_s:
                    break
                strategy.step(learner)
                done[world.rank] += 1
            seconds += world.now_s() - start_s
            drained[world.rank] += 1
            if retire:
                strategy.retire(learner)
                world.comm.Barrier()  # as a vote: the others may take steps still
            strategy.finish(learner)
        model = np.zeros_like(learner.theta)
        strategy.final_model_(learner, model)
        return learner, strategy, model, seconds

    learners, strategies, models, seconds = zip(*simulation.run(main), strict=True)
    return Ranks(
        list(learners),
        list(strategies),
        simulation,
        list(models),
        list(seconds),
        begun,
        leads,
    )


def schedule(name, seed):
    """Run the schedule of a seed twice and check everything that must always hold."""
    draw = random.Random(f"{name} {seed}")
    size = draw.randint(1, 16 if draw.random() < 0.3 else 6)
    machine = Machine(
        latency_s=draw.choice([0.0, 1e-3, 0.5]),
        bandwidth_Bps=draw.choice([50.0, 1e4, float("inf")]),
        ranks_per_node=draw.randint(1, 4),
        node_latency_s=draw.choice([0.0, 0.1]),
        step_s=draw.choice([1e-3, 0.25]),
        jitter=draw.choice([0.0, 0.3, 1.0]),
        eager_bytes=draw.choice([0, 65_536]),
    )
    slow = {str(draw.randrange(size)): draw.choice([1.0, 5.0, 100.0])}
    if name == "adpsgd":
        settings = {
            "mixing": draw.choice(["fixed_ring", "random_ring", "random_pairs"]),
            "mixes_per_step": draw.choice([0.5, 1.0, 3.0]),
            "weight": draw.choice([1 / 3, 0.5]),
            "pieces": draw.randint(1, 3),
            "seed": seed,
        }
    else:
        settings = {
            "staleness_bound": draw.choice([-1, 0, 1, 3]),
            "momentum": draw.choice([0.0, 0.5]),
            "local_optimizer": draw.random() < 0.3,
        }
    run = {
        "settings": settings,
        "machine": machine,
        "faults": Faults(slow=slow),
        "seed": seed,
        "parts": draw.randint(1, 2),
        "num_parameters": draw.choice([5, 23]),
        "lr": draw.choice([0.0, 0.0, 0.1]),
        "momentum": draw.choice([0.0, 0.9]),
        "retire": draw.random() < 0.5,
    }
    steps = [draw.randint(0, 8) for _ in range(size)]
    ranks = train(name, size, steps, **run)
    check(ranks, name, steps, settings, run["lr"])
    if seed % 10 == 0:
        again = train(name, size, steps, **run)
        for one, other in zip(ranks.models, again.models, strict=True):
            np.testing.assert_array_equal(one, other)
        assert ranks.simulation.num_events == again.simulation.num_events


def check(ranks, name, steps, settings, lr):
    """Raise unless the run kept its promises."""
    size = len(steps)
    assert [learner.samples for learner in ranks.learners] == steps
    assert ranks.simulation.undelivered == []
    accounts = [strategy.accounts() for strategy in ranks.strategies]
    partners = np.array([account["partners"] for account in accounts])
    if size > 1:
        staleness = [int(account["staleness"].sum()) for account in accounts]
        assert staleness == steps
    if lr == 0.0:  # nothing but mixing
        before, after = np.mean(ranks.begun, axis=0), [m.theta for m in ranks.learners]
        np.testing.assert_allclose(np.mean(after, axis=0), before, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ranks.models[0], before, rtol=0, atol=1e-6)
    if name == "adpsgd":
        assert (partners == partners.T).all()
        begun = [strategy.mixer.round for strategy in ranks.strategies]
        assert partners.sum() == 2 * sum(begun)
        for rounds, num in zip(begun, steps, strict=True):
            assert rounds <= num * settings["mixes_per_step"]
    elif size > 1:
        for rank, model in enumerate(ranks.models):
            np.testing.assert_array_equal(model, ranks.models[0])
            np.testing.assert_array_equal(model, ranks.learners[rank].theta)
        if settings["staleness_bound"] >= 0 and ranks.leads:
            assert max(ranks.leads) <= settings["staleness_bound"]


def main(name, first, last):
    """Run the schedules of the seeds; say how to replay one that fails."""
    for seed in range(int(first), int(last)):
        try:
            schedule(name, seed)
        except BaseException:
            replay = f"python -m tests.strategies.asynchronous {name} {seed} {seed + 1}"
            print(f"seed {seed} failed; replay: {replay}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
