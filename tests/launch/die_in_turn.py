"""Train by one strategy after the other; in each a rank is killed, for good.

    python die_in_turn.py CONFIG FOLDER STRATEGY:RANK...

The rank is one of those that are left. It is killed (SIGKILL, by a thread of its own,
so anywhere in a step) when it has taken 30 steps. A line on stdout says how each went.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mpilm.config import read_config
from mpilm.errors import LeftBehindError
from mpilm.train.loop import Trainer
from mpilm.world.base import World
from mpilm.world.mpi import MpiWorld, abort_on_error

STEPS = 30
SETTINGS = {
    "bmuf": ["delay=2"],
    "gossip_bmuf": ["delay=1"],
    "model_averaging": ["period=1000"],  # no mean comes after a peer's copy
}


def kill_soon(trainer: Trainer, seed: int) -> None:
    """Kill this process within 20 ms after it has taken its steps."""
    while trainer.totals.step < STEPS:
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0.0, 0.02))
    os.kill(os.getpid(), signal.SIGKILL)


def train(world: World, config: Path, folder: Path, name: str, dead: int) -> None:
    """Train to the end without the rank that is killed on the way."""
    size = world.size
    chosen = SETTINGS.get(name, [])
    settings = [f"strategy.name={name}", *(f"strategy.{text}" for text in chosen)]
    settings += ['world.on_death="go_on"', f"train.samples={150 * 40 * size}"]
    settings += ["checkpoint.peer_every=5"]
    trainer = Trainer(read_config(config, settings), world, folder / name)
    if world.rank == dead:
        killer = threading.Thread(target=kill_soon, args=(trainer, size), daemon=True)
        killer.start()
    with_the_dead = trainer.strategy.comm
    trainer.train()
    with pytest.raises(LeftBehindError):  # which must not end today's communicators
        with_the_dead.Improbe()
    samples = trainer.batches.synchronise(trainer.learner.samples)
    is_good = np.isfinite(trainer.learner.theta.numpy()).all()
    found = world.comm.allgather((trainer.learner.samples, bool(is_good)))
    own, good = zip(*found, strict=True)
    counted = sum(own) + trainer.batches.counts.rest
    if world.rank == 0:
        print("went on:", name, size, world.size, samples, counted, all(good))
        sys.stdout.flush()


if __name__ == "__main__":
    _, config, folder, *turns = sys.argv
    with MpiWorld() as world, abort_on_error(world, folder):
        for turn in turns:
            name, _, dead = turn.partition(":")
            train(world, Path(config), Path(folder), name, int(dead))
