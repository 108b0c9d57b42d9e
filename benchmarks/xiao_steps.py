"""How long are the steps of Xiao et al.'s systems? What bench_xiao.py starts by mpirun.

All systems are made once and then trained in turns for some seconds each, so that what
disturbs the machine hits all of them. Those of one rank run on rank 0, while the others
wait. Steps are counted from the third on, by each rank until its own time is over.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fleets import answer

from mpilm.config import read_config
from mpilm.data.hdf5 import Corpus
from mpilm.data.streams import Streams
from mpilm.strategies import STRATEGIES
from mpilm.train.run import make_learner
from mpilm.world.mpi import MpiWorld, abort_on_error

WARMUP = 2  # steps that are not counted


class Trained:
    """A system: its learner on this rank, and its strategy; None: rank 0 alone."""

    def __init__(self, world: MpiWorld, corpus: Corpus, system: dict[str, Any]) -> None:
        config = read_config(system["config"], system["sets"])
        self.world, self.alone = world, system["ranks"] == 1
        train = config.train
        self.minibatch = train.batch * train.unroll
        place = (0, 1) if self.alone else (world.rank, world.size)
        batches = Streams(corpus.split("train"), train.batch, train.unroll, *place)
        words = len(corpus.counts)
        self.learner = make_learner(
            config, words, words, batches,
            device="cpu", seed=world.rank, compute=world.compute,
        )  # fmt: skip
        kind = STRATEGIES[config.strategy.name]
        self.make = partial(kind, world, config.strategy.settings)

    def step_alone(self, learner: Any) -> None:
        """Take a step of plain training."""
        learner.gradient()
        learner.update()

    def train(self, seconds: float) -> tuple[float, int, int]:
        """Return this rank's samples per second, its steps, and bytes sent for all."""
        world, learner = self.world, self.learner
        if self.alone and world.rank:
            return 0.0, 0, 0
        chosen = None if self.alone else self.make()
        step = self.step_alone if chosen is None else chosen.step
        if chosen is not None:
            chosen.require(learner)
            chosen.start(learner)
        for _ in range(WARMUP):
            step(learner)
        if chosen is not None:
            world.comm.Barrier()  # all have had the answers of their warm-up
        began_s, before = world.now_s(), replace(world.traffic)
        done = 0
        while world.now_s() - began_s < seconds:
            step(learner)
            done += 1
        took_s = world.now_s() - began_s
        if chosen is not None:
            chosen.retire(learner)
            world.comm.Barrier()  # all questions are answered: whose steps they are of
        sent = world.traffic.bytes_sent - before.bytes_sent
        if chosen is not None:
            chosen.finish(learner)
        return done * self.minibatch / took_s, done, sent


def main() -> None:
    """Measure, and hand (seconds of a sample, bytes) of each round to who asked."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--corpus", type=Path, required=True)
    arguments.add_argument("--systems", required=True, help="JSON")
    arguments.add_argument("--seconds", type=float, required=True)
    arguments.add_argument("--rounds", type=int, required=True)
    arguments.add_argument("--result", type=Path, required=True)
    args = arguments.parse_args()
    systems = json.loads(args.systems)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    with (
        MpiWorld() as world,
        abort_on_error(world),
        Corpus.open(args.corpus) as corpus,
    ):
        trained = {n: Trained(world, corpus, s) for n, s in systems.items()}
        for _ in range(args.rounds):
            for name, system in trained.items():
                each = world.comm.allgather(system.train(args.seconds))
                rate, steps, sent = (sum(part) for part in zip(*each, strict=True))
                found[name].append((1.0 / rate, sent / steps))
        answer(world, args.result, found)


if __name__ == "__main__":
    main()
