"""Where adpsgd's learners are late: a diagnosis, not a benchmark of speed.

    mpirun -n 4 python benchmarks/late_steps.py --seconds 10

Learners that sleep 10 ms a step (rank 1 ten times as long), real messages of 400 kB. A
step is late if it takes LATE_S longer than it should; the columns tell where that time
went. Beside it stands, for each late step, who else was late at that moment: threads
that only sleep, one in each rank and one in a process of its own that knows no MPI.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies.adpsgd import Adpsgd, AdpsgdConfig
from mpilm.world.faults import Faults
from mpilm.world.mpi import MpiWorld, abort_on_error

STEP_S, LATE_S = 0.01, 0.05
SLOW, FACTOR = 1, 10.0


class Sleeper:
    """Sleeps 10 ms again and again; keeps when it was late, and how much."""

    def __init__(self) -> None:
        self.late: list[tuple[float, float]] = []
        self.ended = False

    def run(self) -> None:
        """Sleep until `ended`."""
        last = time.time()
        while not self.ended:
            time.sleep(STEP_S)
            now = time.time()
            if now - last > STEP_S + LATE_S:
                self.late.append((last, now))
            last = now


class Stopwatch:
    """Adds up where the learner's thread spends a step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.learner = threading.get_ident()

    def timed(self, name: str, call: Any) -> Any:
        """Return `call`, timed."""

        def run(*args: Any, **options: Any) -> Any:
            began = time.time()
            try:
                return call(*args, **options)
            finally:
                if threading.get_ident() == self.learner:
                    passed = time.time() - began
                    self.spent[name] = self.spent.get(name, 0.0) + passed

        return run


class TimedLock:
    """The strategy's lock, with a stopwatch on the wait for it."""

    def __init__(self, lock: Any, watch: Stopwatch) -> None:
        self.lock, self.enter = lock, watch.timed("the lock", lock.__enter__)

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *error: object) -> None:
        self.lock.__exit__(*error)


def control(seconds: float) -> None:
    """Sleep for so long; print when it was late."""
    sleeper = Sleeper()
    thread = threading.Thread(target=sleeper.run)
    thread.start()
    time.sleep(seconds)
    sleeper.ended = True
    thread.join()
    for began, ended in sleeper.late:
        print(began, ended)


def train(world: MpiWorld, seconds: float) -> dict[str, Any]:
    """Train for so long; return the late steps: begin, end, where the time went."""
    learner = ProtocolLearner(100_000, compute=world.compute, seed=world.rank, lr=0.0)
    method = Adpsgd(world, AdpsgdConfig())
    method.start(learner)
    watch, sleeper, late = Stopwatch(), Sleeper(), []
    service: Any = method.service
    service.lock = TimedLock(service.lock, watch)
    service.begin = watch.timed("begin", service.begin)
    learner.gradient = watch.timed("the sleep", learner.gradient)  # type: ignore
    thread = threading.Thread(target=sleeper.run)
    should_s = STEP_S * (FACTOR if world.rank == SLOW else 1.0)
    world.comm.Barrier()
    thread.start()
    start_s = last = time.time()
    num_steps = 0
    while last - start_s < seconds:
        watch.spent.clear()
        method.step(learner)
        num_steps += 1
        now = time.time()
        if now - last > should_s + LATE_S:
            where = max(watch.spent, key=lambda name: watch.spent[name])
            late.append((last, now, where))
        last = now
    sleeper.ended = True
    thread.join()
    method.finish(learner)
    rate = num_steps / (last - start_s)
    return {"rank": world.rank, "rate": rate, "late": late, "sleeper": sleeper.late}


def main() -> None:
    """Train beside a control process; print the late steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.control:
        control(options.seconds)
        return
    with MpiWorld(step_s=STEP_S) as world, abort_on_error(world):
        world.configure(faults=Faults(slow={str(SLOW): FACTOR}))
        beside = None
        if world.rank == 0:
            seconds = str(options.seconds + 2.0)
            command = (str(Path(__file__)), "--control", "--seconds", seconds)
            beside = subprocess.Popen(
                (sys.executable, *command), stdout=subprocess.PIPE, text=True
            )
        ranks = world.comm.allgather(train(world, options.seconds))
        if beside is not None:
            lines = beside.communicate()[0].splitlines()
            report(ranks, [tuple(map(float, line.split())) for line in lines])


def report(ranks: list[dict[str, Any]], control_late: list[Any]) -> None:
    """Print a line for each rank and each late step."""
    for own in ranks:
        print(f"rank {own['rank']}: {own['rate']:.1f} steps/s, {len(own['late'])} late")
    for own in ranks:
        for began, ended, where in own["late"]:
            others = [
                f"sleeper of {other['rank']}"
                for other in ranks
                if overlaps(other["sleeper"], began, ended)
            ]
            others += ["control"] * overlaps(control_late, began, ended)
            print(
                f"{began % 1000:8.3f} rank {own['rank']} {ended - began:.3f} s"
                f" in {where}; late too: {', '.join(others) or 'nobody'}"
            )


def overlaps(spans: list[Any], began: float, ended: float) -> bool:
    """Return whether one of the spans overlaps with this one."""
    return any(first < ended and began < last for first, last in spans)


if __name__ == "__main__":
    main()
