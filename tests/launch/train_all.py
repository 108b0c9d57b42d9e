"""Train by each lockstep strategy in one world: python train_all.py CONFIG FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from mpilm.config import read_config
from mpilm.strategies import STRATEGIES
from mpilm.train.loop import Trainer
from mpilm.world.base import World
from mpilm.world.mpi import MpiWorld

# those whose ranks take the same steps: out of lockstep, timing decides the result
LOCKSTEP = [name for name, strategy in STRATEGIES.items() if strategy.lockstep]
STEPS = 60


def train_all(world: World, config: Path, folder: Path) -> None:
    """Write the model of this rank after training by each of them."""
    for name in LOCKSTEP:
        settings = [f"strategy.name={name}", f"train.samples={STEPS * 40 * world.size}"]
        if name == "hierarchical":  # one that is in lockstep
            node_size = 2 if world.size == 4 else 1
            settings += ["strategy.inner=bmuf", f"strategy.node_size={node_size}"]
        resolved = read_config(config, settings)
        trainer = Trainer(resolved, world, folder / name)
        trainer.train()
        theta = trainer.learner.theta.numpy()
        np.save(folder / f"{name}-{world.rank}.npy", theta)


if __name__ == "__main__":
    with MpiWorld() as world:
        train_all(world, Path(sys.argv[1]), Path(sys.argv[2]))
