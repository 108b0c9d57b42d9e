"""What does a round of averaging cost, what of it is hidden, what memory does it take?

    python benchmarks/bench_rounds.py
    python benchmarks/bench_rounds.py --out benchmarks/results/rounds.json \\
        --plots docs/images
    OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,tcp python benchmarks/bench_rounds.py \\
        --parts overlap round        through the kernel, more like a network

overlap  steps of `delay_by_one` and `adpsgd` against steps of `local`, with learners
         that sleep; goal: 1.05 where communication takes no longer than computing
round    one round of averaging, the learner doing nothing, against mpi4py's own call
         of the same bytes on the same ranks, in turns; goal: 1.15
memory   copies of the model beyond the learner's own, by tracemalloc: what numpy holds
         at its peak (MPI's own buffers are not in it); goal: 2, and 3 for the BMUFs
"""

from __future__ import annotations

import argparse
import gc
import os
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from fleets import VARIANTS, Run, answer, figure, legend, mpirun, run, sleeper
from harness import measure, parser, report

from mpilm.learner.quadratic import ProtocolLearner, layers
from mpilm.strategies import strategy
from mpilm.world.base import World

PARTS = ("overlap", "round", "memory")
BTL = "OMPI_MCA_btl"  # how Open MPI moves messages; stands in the title if set
HIDING = [name for name in VARIANTS if name.startswith(("delay_by", "adpsgd"))]
GOAL_OVERLAP, GOAL_ROUND = 1.05, 1.15
COPIES = {"bmuf": 3, "gossip_bmuf": 3}  # goals; 2 for all others
DELAYED = {"period": 10, "delay": 5}
EVERY = {"period": 1}
AVERAGING: dict[str, tuple[str, dict[str, Any]]] = {
    "model_averaging": ("model_averaging", EVERY),
    "bmuf": ("bmuf", EVERY),
    "gossip_bmuf": ("gossip_bmuf", EVERY),
    "dpsgd": ("dpsgd", {}),
}


class Idle(ProtocolLearner):
    """A learner that does nothing: what is left of a step is the strategy."""

    def gradient(
        self, ready: Callable[[slice], None] | None = None, *, scale: float = 1.0
    ) -> float:
        return 0.0

    def update(self) -> None:
        pass


class Frugal(ProtocolLearner):
    """A learner that makes no temporary vectors: what is counted is the strategy's."""

    def gradient(
        self, ready: Callable[[slice], None] | None = None, *, scale: float = 1.0
    ) -> float:
        def work(notify: Callable[[slice], None]) -> float:
            np.subtract(self.theta, self.target, out=self.grad)
            self.grad *= np.float32(scale)
            for segment in reversed(self.layout.segments):
                notify(segment.slice)
            return 0.0

        return self.compute(work, ready)

    def update(self) -> None:
        self.grad *= np.float32(self.lr)
        self.theta -= self.grad


def overlap(world: World, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of delay_by_one and adpsgd, in turns with local."""
    comm = world.control  # type: ignore[attr-defined]
    rows = []
    for parameters in args.parameters:
        x = np.zeros(parameters, np.float32)
        bare = partial(comm.Allreduce, _in_place(), x)
        names = ("local", *HIDING)
        steps_s: dict[str, list[float]] = {name: [] for name in names}
        blocked_s: dict[str, list[float]] = {name: [] for name in names}
        bare_s = []
        for _ in range(args.loops):
            timing = measure({"bare": bare}, warmup=1, loops=5, comm=comm)["bare"]
            bare_s.append(timing.median_s)
            for name in names:
                learner = sleeper(world, parameters)
                mine = run(world, name, learner, steps=args.steps, warmup=args.warmup)
                runs: list[Run] = world.comm.allgather(mine)
                steps_s[name].append(max(done.step_s for done in runs))
                blocked_s[name].append(max(d.blocked_s / d.steps for d in runs))
        alone_s = median(steps_s["local"])
        for name in HIDING:
            rows.append(
                {
                    "strategy": name,
                    "ranks": world.size,
                    "model (MB)": 4 * parameters / 1e6,
                    "bare Allreduce (ms)": median(bare_s) * 1e3,
                    "computing alone (ms)": alone_s * 1e3,
                    "step (ms)": median(steps_s[name]) * 1e3,
                    "waiting (ms)": median(blocked_s[name]) * 1e3,
                    "step / alone": median(steps_s[name]) / alone_s,
                    "goal": GOAL_OVERLAP,
                }
            )
    return rows


def rounds(world: World, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cost of a round of averaging, in turns with the bare call."""
    comm = world.control.Dup()  # type: ignore[attr-defined]
    rank, size = world.rank, world.size
    parameters = args.model_bytes // 4
    x, y = np.zeros(parameters, np.float32), np.zeros(parameters, np.float32)
    # the same partners as the strategies have: pairs of gossip, neighbours on a ring
    ring = sorted({(rank - 1) % size, (rank + 1) % size} - {rank})

    def exchange(peers: list[int], vectors: int) -> None:
        requests = [comm.Isend(x, peer) for peer in peers for _ in range(vectors)]
        requests += [comm.Irecv(y, peer) for peer in peers for _ in range(vectors)]
        for request in requests:
            request.Wait()

    bare: dict[str, Callable[[], Any]] = {
        "model_averaging": partial(comm.Allreduce, _in_place(), x),
        "bmuf": partial(comm.Allreduce, _in_place(), x),
        "gossip_bmuf": partial(exchange, [rank ^ 1], 2),
        "dpsgd": partial(exchange, ring, 1),
    }
    rows = []
    for name, (kind, settings) in AVERAGING.items():
        layout = layers(parameters)
        learner = Idle(parameters, compute=world.compute, seed=rank, layout=layout)
        chosen = strategy(kind, world, **settings)
        chosen.start(learner)
        calls = {"bare": bare[name], "round": partial(chosen.step, learner)}
        took = measure(calls, warmup=3, loops=args.calls, comm=comm)
        chosen.finish(learner)
        rows.append(
            {
                "strategy": name,
                "ranks": size,
                "bare call (ms)": took["bare"].median_s * 1e3,
                "round (ms)": took["round"].median_s * 1e3,
                "ratio": took["round"].median_s / took["bare"].median_s,
                "ratio of minima": took["round"].min_s / took["bare"].min_s,
                "goal": GOAL_ROUND,
            }
        )
    comm.Free()
    return rows


def memory(world: World, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return how many vectors like theta each strategy holds at its peak."""
    parameters = args.memory_parameters
    rows = []
    cases = [(name, *VARIANTS[name]) for name in VARIANTS if name != "local"]
    cases.append(("adpsgd, pieces = 1", "adpsgd", {"pieces": 1}))
    cases.append(("async_sgd, momentum", "async_sgd", {"momentum": 0.9}))
    cases.append(("bmuf, delay", "bmuf", DELAYED))
    cases.append(("gossip_bmuf, delay", "gossip_bmuf", DELAYED))
    for name, kind, settings in cases:
        layout = layers(parameters)
        learner = Frugal(
            parameters, compute=world.compute, seed=world.rank, lr=1e-3, layout=layout
        )
        gc.collect()
        tracemalloc.start()
        chosen = strategy(kind, world, **settings)
        chosen.start(learner)
        for _ in range(args.memory_steps):
            chosen.step(learner)
        chosen.retire(learner)
        chosen.finish(learner)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        found = world.comm.allgather((held, peak))
        rows.append(
            {
                "strategy": name,
                "ranks": world.size,
                "copies at the peak": max(p for _, p in found) / (4 * parameters),
                "copies at the end": max(h for h, _ in found) / (4 * parameters),
                "goal": COPIES.get(kind, 2),
            }
        )
        del chosen, learner
    return rows


def _in_place() -> Any:
    from mpi4py import MPI

    return MPI.IN_PLACE


def under_mpi(args: argparse.Namespace) -> None:
    """Do one part on these ranks; hand its rows to the parent."""
    from mpilm.world.mpi import MpiWorld, abort_on_error

    step_s = args.step_s if args.child == "overlap" else 0.0
    with MpiWorld(step_s=step_s) as world, abort_on_error(world):
        part = {"overlap": overlap, "round": rounds, "memory": memory}[args.child]
        answer(world, args.result, part(world, args))


def plot(part: str, rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Draw the ratios or copies beside their goals."""
    column = {"overlap": "step / alone", "round": "ratio"}.get(
        part, "copies at the peak"
    )
    with figure(folder, f"rounds-{part}") as (axes,):
        names = [row["strategy"] for row in rows]
        if part != "memory":
            sizes = [row.get("model (MB)") for row in rows]
            names = [
                f"{row['strategy']}, {row['ranks']} ranks"
                + (f", {mb:g} MB" if mb else "")
                for row, mb in zip(rows, sizes, strict=True)
            ]
        places = range(len(rows))
        axes.barh(places, [row[column] for row in rows])
        axes.plot(
            [row["goal"] for row in rows], places, "k|", markersize=9, label="goal"
        )
        axes.set_yticks(places, names, fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel(column)
        legend(axes)


def main() -> None:
    arguments = parser(__doc__, warmup=3, loops=3)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    arguments.add_argument("--memory-ranks", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=10, help="of a run")
    arguments.add_argument("--step-s", type=float, default=0.1, help="sleep of a step")
    arguments.add_argument(
        "--parameters", type=int, nargs="+", default=[1_000_000, 2_700_000]
    )
    arguments.add_argument("--model-bytes", type=int, default=10_800_000, help="round")
    arguments.add_argument("--calls", type=int, default=40, help="rounds timed")
    arguments.add_argument("--memory-parameters", type=int, default=1_000_000)
    arguments.add_argument("--memory-steps", type=int, default=25)
    arguments.add_argument("--limit-s", type=float, default=300, help="of an mpirun")
    arguments.add_argument("--plots", type=Path, help="folder for the plots")
    arguments.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    arguments.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.smoke:
        args.loops, args.warmup, args.ranks, args.steps = 1, 0, [2], 3
        args.step_s, args.parameters, args.calls = 0.005, [10_000], 2
        args.model_bytes, args.memory_parameters, args.memory_ranks = 40_000, 100_000, 2
    if args.child:
        under_mpi(args)
        return
    over = os.environ.get(BTL)
    titles = {
        "overlap": "Overlap: steps with communication behind them, measured",
        "round": f"A round of averaging, {args.model_bytes / 1e6:g} MB, measured",
        "memory": "Copies of the model beyond theta and grad, measured",
    }
    settings: list[object] = ["--loops", args.loops, "--warmup", args.warmup]
    settings += ["--steps", args.steps, "--step-s", args.step_s]
    settings += ["--parameters", *args.parameters, "--model-bytes", args.model_bytes]
    settings += ["--calls", args.calls, "--memory-steps", args.memory_steps]
    settings += ["--memory-parameters", args.memory_parameters]
    for part in args.parts:
        rows: list[dict[str, Any]] = []
        for ranks in [args.memory_ranks] if part == "memory" else args.ranks:
            child = ["--child", part, *settings]
            rows += mpirun(ranks, __file__, child, limit_s=args.limit_s)
        title = titles[part] + (f", btl {over}" if over else "")
        report("rounds", title, rows, args)
        plot(part, rows, None if over else args.plots)


if __name__ == "__main__":
    main()
