"""How fast does the virtual world run?

    python benchmarks/bench_virtual.py --out benchmarks/results/virtual.json

Protocol-only steps: real strategy code, a quadratic in numpy in the place of the
network. Every row does about the same number of rank-steps (ranks x steps), so that
"us per rank-step" tells how the engine scales. It is taken from the seconds of CPU, the
best round: others on the machine disturb these less than the wall clock. The last
column is simulated: the virtual seconds of one step, with computing declared as 100 ms.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

from harness import measure, parser, report

from mpilm.learner.quadratic import ProtocolLearner, layers
from mpilm.strategies import strategy
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {}),
    "model_averaging, period 10": ("model_averaging", {"period": 10}),
    "allreduce, one bucket": ("allreduce", {}),
    "allreduce, bucket per layer": ("allreduce", {"bucket_bytes": 1}),
    "gossip_bmuf, period 10": ("gossip_bmuf", {"period": 10}),
    "adpsgd": ("adpsgd", {}),
}


def simulate(
    name: str,
    ranks: int,
    steps: int,
    args: argparse.Namespace,
    done: dict[str, list[tuple[float, int, float]]],
) -> None:
    """Run a variant on virtual ranks; note CPU seconds, events, virtual seconds."""
    kind, settings = VARIANTS[name]
    size, machine = args.parameters, Machine(step_s=0.1, jitter=0.1)
    layout = layers(size, args.layers)

    def main(world: VirtualWorld) -> None:
        learner = ProtocolLearner(
            size, compute=world.compute, seed=world.rank, layout=layout
        )
        chosen = strategy(kind, world, **settings)
        chosen.start(learner)
        for _ in range(steps):
            chosen.step(learner)
        chosen.finish(learner)

    start_s = time.process_time()
    simulation = Simulation(ranks, machine=machine)
    simulation.run(main)
    cpu_s = time.process_time() - start_s
    done.setdefault(name, []).append((cpu_s, simulation.num_events, simulation.now_s))


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=3)
    arguments.add_argument(
        "--ranks", type=int, nargs="+", default=[8, 128, 1024], help="virtual ranks"
    )
    arguments.add_argument(
        "--rank-steps", type=int, default=128_000, help="ranks x steps of each row"
    )
    arguments.add_argument(
        "--parameters", type=int, default=1000, help="in the vector of a rank"
    )
    arguments.add_argument(
        "--layers", type=int, default=2, help="in that vector; two parts each"
    )
    args = arguments.parse_args()
    if args.smoke:
        args.loops, args.ranks, args.rank_steps = 1, [2, 16], 64
    rows = []
    for ranks in args.ranks:
        steps = max(1, args.rank_steps // ranks)
        done: dict[str, list[tuple[float, int, float]]] = {}
        variants = {
            name: partial(simulate, name, ranks, steps, args, done) for name in VARIANTS
        }
        timings = measure(variants, warmup=args.warmup, loops=args.loops)
        for name, timing in timings.items():
            cpu_s, num_events, end_s = min(done[name])
            rows.append(
                {
                    "strategy": name,
                    "ranks": ranks,
                    "steps": steps,
                    "wall, median (s)": timing.median_s,
                    "wall, min (s)": timing.min_s,
                    "CPU, min (s)": cpu_s,
                    "us per rank-step": cpu_s / (ranks * steps) * 1e6,
                    "events": num_events,
                    "us per event": cpu_s / num_events * 1e6,
                    "simulated step (ms)": end_s / steps * 1e3,
                }
            )
    report("virtual", "Speed of the virtual world, one core", rows, args)


if __name__ == "__main__":
    main()
