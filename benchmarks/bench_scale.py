"""How many virtual ranks can one process play: 10,240 of them, 100 steps each.

    python benchmarks/bench_scale.py
    python benchmarks/bench_scale.py --out benchmarks/results/scale.json

Real strategy code, a quadratic of 100 parameters in numpy in the place of the network,
a declared machine with 10% jitter. Each row runs in a process of its own: seconds of
CPU and the most memory are those of the whole process, with imports, the making of the
world, `finish` and the final model, which must be the same on all ranks. CPU seconds,
since others use the machine; on a core of its own the wall clock shows the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
from harness import parser, report

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

PARAMETERS = 100
# row -> strategy, settings, ranks, steps
ROWS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "gossip_bmuf": ("gossip_bmuf", {}, 10_240, 100),
    "adpsgd": ("adpsgd", {}, 10_240, 100),
    "adpsgd, one piece": ("adpsgd", {"pieces": 1}, 10_240, 100),
    "async_sgd": ("async_sgd", {}, 1_024, 20),
}


def play(name: str, scale: int) -> dict[str, Any]:
    """Run a row; return what it took in this process, from its start."""
    kind, settings, ranks, steps = ROWS[name]
    ranks = max(2, ranks // scale)

    lr = 0.1 / ranks if kind == "async_sgd" else 0.1  # its server adds all up

    def main(world: VirtualWorld) -> float:
        learner = ProtocolLearner(
            PARAMETERS, compute=world.compute, seed=world.rank, lr=lr
        )
        chosen = strategy(kind, world, **settings)
        chosen.start(learner)
        for _ in range(steps):
            chosen.step(learner)
        chosen.finish(learner)
        final = np.empty_like(learner.theta)
        chosen.final_model_(learner, final)
        return float(final.sum())

    simulation = Simulation(ranks, machine=Machine(step_s=0.1, jitter=0.1))
    sums = simulation.run(main)
    assert len(set(sums)) == 1, "the final model differs between ranks"
    cpu_s = time.process_time()
    return {
        "strategy": name,
        "ranks": ranks,
        "steps": steps,
        "CPU (s)": cpu_s,
        "us per rank-step": cpu_s / (ranks * steps) * 1e6,
        "events": simulation.num_events,
        "peak memory (MiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "simulated step (ms)": simulation.now_s / steps * 1e3,
    }


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    scale = 512 if args.smoke else 1
    if args.child:
        print(json.dumps(play(args.child, scale)))
        return
    rows = []
    for name in args.rows:
        command = [sys.executable, __file__, "--child", name]
        command += ["--smoke"] if args.smoke else []
        runs = [
            json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            )
            for _ in range(args.loops)
        ]
        rows.append(min(runs, key=lambda run: run["CPU (s)"]))
    report("scale", "Virtual ranks in one process", rows, args)


if __name__ == "__main__":
    main()
