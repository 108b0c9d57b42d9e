"""What runs on the nodes: every strategy trains a quadratic; rank 0 prints a line each.

python over_tcp.py [STRATEGY ...] [STEPS]: name, seconds, distances from the minimum of
all (in that of the first model) of the final model and of the farthest rank's own, node
of every rank.
"""

from __future__ import annotations

import sys

import numpy as np

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import STRATEGIES, strategy
from mpilm.world.mpi import MpiWorld

SIZE = 20_000  # 80 KB a model: several packets
STEPS, STEP_S = 60, 0.01
SETTINGS = {
    "model_averaging": {"period": 5},
    "bmuf": {"period": 5},
    "gossip_bmuf": {"period": 5},
    "noloco": {"period": 5},
    "sparta": {"share": 0.1},
    "des_loc": {"period": 5},
    "sparse_loco": {"period": 5, "share": 0.25},
    "eager_diloco": {"period": 5, "eta": 0.5},
    "divshare": {"period": 2},
    "hierarchical": {"inner": "bmuf", "settings": {"period": 5}},
}


def train(world: MpiWorld, name: str, steps: int) -> str:
    """Train by a strategy; return the line."""
    learner = ProtocolLearner(SIZE, compute=world.compute, seed=world.rank, lr=0.05)
    chosen = strategy(name, world, **SETTINGS.get(name, {}))
    with world.all_or_none():
        chosen.require(learner)
    chosen.start(learner)
    minimum = learner.target.copy()
    chosen.mean_(minimum)
    first = float(np.linalg.norm(learner.theta - minimum))
    began_s = world.now_s()
    for _ in range(steps):
        chosen.step(learner)
    chosen.retire(learner)
    chosen.finish(learner)
    seconds = world.now_s() - began_s
    own = float(np.linalg.norm(learner.theta - minimum)) / first
    worst = max(world.comm.allgather(own))
    final = np.empty_like(learner.theta)
    chosen.final_model_(learner, final)
    left = float(np.linalg.norm(final - minimum)) / first
    nodes = getattr(chosen, "nodes", None)
    where = ",".join(map(str, nodes.node_of)) if nodes else "-"
    return f"{name} {seconds:.2f} {left:.4f} {worst:.4f} {where}"


if __name__ == "__main__":
    names = [word for word in sys.argv[1:] if not word.isdecimal()]
    num_steps = next((int(word) for word in sys.argv[1:] if word.isdecimal()), STEPS)
    with MpiWorld(step_s=STEP_S) as world:
        for name in names or STRATEGIES:
            line = train(world, name, num_steps)
            if world.rank == 0:
                print(line, flush=True)
