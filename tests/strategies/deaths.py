"""Random deaths in training in the virtual world, by seed: the trainer itself.

    python -m tests.strategies.deaths bmuf 17       # replay a seed
    python -m tests.strategies.deaths all 0 2000    # seeds 0..1999 of each

A seed decides everything: ranks, the machine, who is how slow, the strategy's settings,
who dies before which of its steps. Whatever it is, the ranks that are left train to the
end, alike and finite, and every sample is counted once. The same seed gives the same
bits.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.config import resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.errors import MpilmError
from mpilm.learner.learner import Learner
from mpilm.strategies import STRATEGIES
from mpilm.testing.schedules import draw_faults, draw_machine
from mpilm.train.evaluate import swapped
from mpilm.train.loop import Trainer
from mpilm.train.resume_point import ResumePoint
from mpilm.vectors import to_array
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.profiles import FailAt, JoinAt
from mpilm.world.virtual import run_virtual
from mpilm.world.virtual.engine import Died
from mpilm.world.virtual.rare import drawn_rare
from tests.strategies.schedules import SETTINGS

SURVIVING = [name for name, kind in STRATEGIES.items() if kind.survives]
SHORT = {  # settings for runs of a few dozen steps
    "model_averaging": {"period": 3},
    "bmuf": {"period": 4, "delay": 2},
    "gossip_bmuf": {"period": 3, "delay": 1},
    "async_sgd": {"momentum": 0.5},
    "des_loc": {"period": 3},
}
BATCH, UNROLL = 2, 5
TWICE = 20  # every so many seeds are run twice
LONGER = 25  # steps more where ranks join: that takes some


@dataclass(frozen=True)
class Plan:
    """All that a seed decides.

    deaths      rank -> the step before which it dies
    joins       ranks more that are asked for
    on_death    the others go on, or a new rank is asked for
    dies        who dies as all start anew, and when; None: nobody
    peer_every  steps between two copies of each rank's state; 0: there are none
    """

    name: str
    size: int
    steps: int
    settings: dict[str, Any]
    source: str
    machine: Machine
    faults: Faults
    deaths: dict[int, int]
    joins: int
    on_death: str
    peer_every: int
    dies: tuple[int, str] | None
    seed: int


class Dying(Trainer):
    """A trainer that may end its rank as all go on after a death, or with a new rank.

    dies  the rank, and when: "before", "in" or "after" it has started anew
    """

    dies: tuple[int, str] | None = None

    def rebuild(self, place: ResumePoint) -> None:
        """Start anew, or die before, in or after that."""
        world: Any = self.world
        rank, when = self.dies or (-1, "")
        is_end = world.state.rank == rank and world.size > 1
        if is_end and when == "in":  # its part is there, and the others wait for it
            world.comm.Dup()
        if not is_end or when == "after":
            super().rebuild(place)
        if is_end:
            world.simulation.die(world.state)
            raise Died


class Unsaved(Dying):
    """A trainer that writes no checkpoint: the disk is not what is tried here."""

    def save(self, *, beside: bool = False) -> None:
        """Do nothing, but mark it."""
        self.is_saved = True

    def make_learner(self, *, is_new: bool) -> Learner:
        """Return a learner whose gradients are not finite where the seed says so."""
        learner = super().make_learner(is_new=is_new)
        rare, rank = self.world.engine.rare, self.world.state.rank
        if rare is not None and rare.are_bad:
            objective = learner._objective
            plain = objective._loss

            def loss(model, batch):
                step = learner.samples // (BATCH * UNROLL)
                spoils = model.training and rare.spoils(rank, step)
                return plain(model, batch) * (math.nan if spoils else 1.0)

            objective._loss = loss
        return learner


@cache
def place() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="mpilm-deaths-")


@cache
def corpus() -> Path:
    """Return the path of a small corpus, made once in a process."""
    path = Path(place().name) / "corpus.h5"
    prepare_synthetic(path, vocab=12, tokens=4000, seed=3, branching=3)
    return path


def plan(name: str, seed: int) -> Plan:
    """Return what a seed decides."""
    draw = random.Random(f"deaths {name} {seed}")
    size, steps = draw.randint(2, 5), draw.randint(4, 14)
    machine, faults = draw_machine(draw), draw_faults(draw, size)
    dead = draw.sample(range(size), draw.choice([1, 1, 1, min(2, size - 1)]))
    deaths = {rank: draw.randint(1, steps) for rank in dead}
    failing = [FailAt(rank=rank, step=step) for rank, step in deaths.items()]
    other = random.Random(f"joins {name} {seed}")
    joining = [JoinAt(step=other.randint(1, steps))] if other.random() < 0.3 else []
    on_death = "replace" if other.random() < 0.2 else "go_on"
    again, dies = random.Random(f"again {name} {seed}"), None
    if size > 2 and again.random() < 0.3:
        dies = again.randrange(size + 1), again.choice(["before", "in", "after"])
        if {*deaths, dies[0]} >= {*range(size)}:  # somebody is left
            dies = None
    if joining or on_death == "replace":
        steps += LONGER
    return Plan(
        name,
        size,
        steps,
        SETTINGS[name](draw, size),
        draw.choice(["shards", "shards", "pool"]),
        machine,
        Faults(slow=faults.slow, profile=(*faults.profile, *failing, *joining)),
        deaths,
        len(joining),
        on_death,
        random.Random(f"copies {name} {seed}").choice([0, 1, 2, 5]),
        dies,
        seed,
    )


def train(chosen: Plan, folder: Path) -> list[Any]:
    """Train; return for each rank what it came to, None where it died."""
    samples = chosen.steps * chosen.size * BATCH * UNROLL
    config = resolve(
        {
            "data": {"corpus": str(corpus()), "source": chosen.source},
            "model": {"embed": 3, "hidden": 4},
            "optim": {"name": "sgd", "lr": 0.1},
            "train": {
                "batch": BATCH,
                "unroll": UNROLL,
                "samples": samples,
                "test": False,
                "worst_rank": False,
                "max_bad_steps": 1_000_000,
            },
            "strategy": {"name": chosen.name, **chosen.settings},
            "world": {"on_death": chosen.on_death},
            "checkpoint": {
                "agree_every": 5 if chosen.steps < LONGER else 1,
                "peer_every": chosen.peer_every,
            },
        }
    )

    def main(world):
        trainer = Unsaved(config, world, folder)
        trainer.dies = chosen.dies
        trainer.train()
        learner, counts = trainer.learner, trainer.batches.counts
        total = trainer.samples
        own = sum(world.comm.allgather(learner.samples))
        with swapped(learner, trainer.strategy):
            final = to_array(learner.theta).copy()
        return world.size, total, own + counts.rest, final

    how = {"machine": chosen.machine, "faults": chosen.faults}
    how["rare"] = drawn_rare(chosen.seed)
    return run_virtual(main, chosen.size, **how, can_shrink=True)


def run(name: str, seed: int) -> str:
    """Run the plan of a seed and check it; return how it went."""
    chosen = plan(name, seed)
    results = []
    for _ in range(2 if seed % TWICE == 0 else 1):
        with tempfile.TemporaryDirectory() as folder:
            try:
                results.append(train(chosen, Path(folder) / "run"))
            except MpilmError as error:
                assert "cannot be made of" in str(error), error
                return "too few were left for a group"
    check(chosen, results[0])
    if len(results) > 1:
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None), "another one died"
            if one is not None:
                assert one[:3] == other[:3], "other counts"
                assert np.array_equal(one[3], other[3]), "other bits"
    what = "the others went on" if None in results[0] else "nobody died"
    joined = len(results[0]) - chosen.size
    return f"{what}, {joined} joined" if joined else what


def check(chosen: Plan, found: list[Any]) -> None:
    """Raise unless the ranks that are left, or joined, kept the promises."""
    alive = {rank for rank, result in enumerate(found) if result is not None}
    doomed = {*chosen.deaths, *(chosen.dies or ())[:1]}
    assert {*range(chosen.size)} - alive <= doomed, "others died too"
    assert alive, "nobody is left"
    most = chosen.joins + (len(doomed) if chosen.on_death == "replace" else 0)
    assert len(found) <= chosen.size + most, "more joined than were asked for"
    asked = chosen.steps * chosen.size * BATCH * UNROLL
    first = found[min(alive)]
    for rank in alive:
        size, total, counted, final = found[rank]
        assert size == len(alive), f"{size} ranks, {len(alive)} are left"
        assert total == first[1], "ranks count apart"
        assert total == counted, f"{total} samples, {counted} were taken"
        assert total >= asked, f"{total} samples of {asked}"
        assert np.isfinite(final).all(), "not finite"
        assert np.array_equal(final, first[3]), "ranks end apart"


def sweep(name: str, seeds: range) -> Counter[str]:
    """Run the plans of `seeds`; say how to replay the first one that fails."""
    outcomes: Counter[str] = Counter()
    for seed in seeds:
        try:
            outcomes[run(name, seed)] += 1
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            command = f"python -m tests.strategies.deaths {name} {seed}"
            raise AssertionError(f"{reason}\nreplay: {command}") from error
    return outcomes


def main(name: str, first: str, stop: str | None = None) -> None:
    """Run one seed, or a range of seeds."""
    seeds = range(int(first), int(stop) if stop else int(first) + 1)
    for each in SURVIVING if name == "all" else [name]:
        print(f"{each}: {len(seeds)} plans, {dict(sweep(each, seeds))}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
