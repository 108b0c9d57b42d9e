"""Where does a step of `async_sgd` spend what its learner does not compute?

    mpirun -n 4 python benchmarks/async_step.py [--ahead]

Learners that sleep 40 ms, 100,000 parameters. Printed for rank 0: mean times of the
parts of a step; `waits` is that of pull in which nothing is left but to wait.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import parameter_server, strategy
from mpilm.world.mpi import MpiWorld

times_s: dict[str, list[float]] = defaultdict(list)


def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `call` with its times kept under `name`."""

    def measured(*arguments: Any, **options: Any) -> Any:
        start_s = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            times_s[name].append(time.perf_counter() - start_s)

    return measured


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=80)
    arguments.add_argument("--ahead", action="store_true", help="strategy.ahead")
    args = arguments.parse_args()
    parameter_server.finish_all = timed("waits", parameter_server.finish_all)
    with MpiWorld() as world:

        def compute(work: Callable[..., Any], ready: Any = None) -> Any:
            def sleeping(notify: Any) -> Any:
                timed("sleep", time.sleep)(0.04)
                return work(notify)

            return world.compute(sleeping, ready)

        learner = ProtocolLearner(100_000, compute=compute, seed=world.rank)
        chosen: Any = strategy("async_sgd", world, ahead=args.ahead)
        chosen.start(learner)
        server = chosen.service
        server.pull = timed("pull", server.pull)
        server.ask, server.take = timed("ask", server.ask), timed("take", server.take)
        server.push = timed("push", server.push)
        world.comm.Barrier()
        step = timed("step", chosen.step)
        for _ in range(args.steps):
            step(learner)
        if world.rank == 0:
            for name, found_s in times_s.items():
                ms = 1e3 * float(np.sum(found_s)) / args.steps
                print(f"{name:<6} {ms:6.2f} ms")
        chosen.retire(learner)
        chosen.finish(learner)


if __name__ == "__main__":
    main()
