"""The ranks of averaging_speedup: what averaging costs MPI ranks that sleep.

mpirun -n 4 python benchmarks/claims/speedup_ranks.py --result answer.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fleets import answer, run, sleeper

from mpilm.world.mpi import MpiWorld, abort_on_error

STEPS = 40  # four averages


def main() -> None:
    """Run it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--parameters", type=int, default=10_000)
    arguments.add_argument("--step-s", type=float, default=0.05)
    arguments.add_argument("--result", type=Path, required=True)
    args = arguments.parse_args()
    with MpiWorld(step_s=args.step_s) as world, abort_on_error(world):
        step_s = {}
        for name in ("local", "model_averaging"):
            learner = sleeper(world, args.parameters)
            mine = run(world, name, learner, steps=STEPS, warmup=10)
            step_s[name] = max(world.comm.allgather(mine.step_s))
        found = {**step_s, "efficiency": step_s["local"] / step_s["model_averaging"]}
        answer(world, args.result, found)


if __name__ == "__main__":
    main()
