"""Does the virtual world predict how long a step takes under real MPI?

    python benchmarks/bench_fidelity.py
    python benchmarks/bench_fidelity.py --out benchmarks/results/fidelity.json \\
        --plots docs/images

For each number of ranks, in one mpirun and in turns: what the machine is calibrated
from, then the strategies with learners that sleep. The virtual world then plays the
calibrated machine. None of the compared runs, nor a message of their sizes, is used in
calibration:

    step_s         a step of `local`: the sleep and the learner's own arithmetic
    latency_s      a small Sendrecv in a ring, all ranks at once
    bandwidth_Bps  one figure for a number of ranks: what an Allreduce of the longer
                   of CALIBRATED_BYTES takes more than one of the shorter

Ranks that share 2 cores share their memory's speed as well: hence a bandwidth for each
number of ranks, taken while all of them communicate. What a strategy itself computes
(adds, copies) has no cost in the virtual world; it is part of what is compared.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from fleets import VARIANTS, Run, answer, figure, mpirun, run, sleeper
from harness import measure, parser, report

from mpilm.world.base import IN_PLACE, World
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

GOALS = {"median": 0.10, "worst": 0.25}
# `local` sends nothing: it is what step_s comes from. In the mean over all ranks
# bmuf does what model_averaging does, and the mixings of adpsgd send alike.
ALIKE = ("local", "bmuf", "adpsgd, fixed_ring", "adpsgd, random_pairs")
COMPARED = [name for name in VARIANTS if name not in ALIKE]
CALIBRATED_BYTES = (200_000, 1_000_000)
SMALL_BYTES = 8


def calibrate(world: World, args: argparse.Namespace) -> dict[str, Any]:
    """Return latency and bandwidths of this machine with all ranks at work."""
    rank, size = world.rank, world.size
    small, other = np.zeros(SMALL_BYTES, np.uint8), np.zeros(SMALL_BYTES, np.uint8)
    before, after = (rank - 1) % size, (rank + 1) % size
    calls: dict[str, Any] = {
        "small": partial(world.comm.Sendrecv, small, after, 0, other, before, 0)
    }
    for nbytes in CALIBRATED_BYTES:
        x = np.zeros(nbytes // 4, np.float32)
        calls[str(nbytes)] = partial(world.comm.Allreduce, IN_PLACE, x)
    comm = world.control  # type: ignore[attr-defined]
    took = measure(calls, warmup=3, loops=args.calls, comm=comm)
    (few, few_s), (many, many_s) = (
        (nbytes, took[str(nbytes)].median_s) for nbytes in CALIBRATED_BYTES
    )
    moved = 2 * (size - 1) / size * (many - few)  # the ring's transfer, machine.py (5)
    return {
        "latency_s": took["small"].median_s,
        "bandwidth_Bps": moved / max(many_s - few_s, 1e-9),
    }


def under_mpi(args: argparse.Namespace) -> None:
    """Calibrate and measure here, in turns; hand the medians to the parent."""
    from mpilm.world.mpi import MpiWorld, abort_on_error

    with MpiWorld(step_s=args.step_s) as world, abort_on_error(world):
        calibrations: list[dict[str, Any]] = []
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(args.loops):
            calibrations.append(calibrate(world, args))
            for nbytes in args.bytes:
                for name in ("local", *COMPARED):
                    learner = sleeper(world, nbytes // 4)
                    settings = {"steps": args.steps, "warmup": args.warmup}
                    mine = run(world, name, learner, **settings)
                    found.setdefault((name, nbytes), []).append(
                        mean_step_s(world, mine)
                    )
        steps_s = [[*key, median(values)] for key, values in found.items()]
        machine = {
            key: median(entry[key] for entry in calibrations) for key in calibrations[0]
        }
        answer(world, args.result, {"machine": machine, "steps": steps_s})


def mean_step_s(world: World, mine: Run) -> float:
    """Return the mean over ranks of the seconds of a step."""
    return sum(world.comm.allgather(mine.step_s)) / world.size


def predicted_s(
    name: str, ranks: int, nbytes: int, machine: Machine, **until: int
) -> float:
    """Return the same of the virtual world.

    Args:
        until: steps and warmup, as of `run`.
    """

    def main(world: VirtualWorld) -> float:
        learner = sleeper(world, nbytes // 4)
        return mean_step_s(world, run(world, name, learner, **until))

    return Simulation(ranks, machine=machine).run(main)[0]


def compare(ranks: int, found: dict, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a number of ranks."""
    alone = {nbytes: s for name, nbytes, s in found["steps"] if name == "local"}
    rows = []
    for name, nbytes, measured_s in found["steps"]:
        if name == "local":
            continue
        machine = Machine(step_s=alone[nbytes], **found["machine"])
        virtual_s = predicted_s(
            name, ranks, nbytes, machine, steps=args.steps, warmup=args.warmup
        )
        rows.append(
            {
                "strategy": name,
                "ranks": ranks,
                "size (B)": nbytes,
                "measured, computing alone (ms)": alone[nbytes] * 1e3,
                "measured step (ms)": measured_s * 1e3,
                "simulated step (ms)": virtual_s * 1e3,
                "error": virtual_s / measured_s - 1.0,
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Draw simulated over measured steps, a mark for each number of ranks."""
    with figure(folder, "fidelity") as (axes,):
        longest = max(row["measured step (ms)"] for row in rows)
        for ranks in dict.fromkeys(row["ranks"] for row in rows):
            some = [row for row in rows if row["ranks"] == ranks]
            x = [row["measured step (ms)"] for row in some]
            y = [row["simulated step (ms)"] for row in some]
            axes.plot(x, y, "o", markersize=4, alpha=0.7, label=f"{ranks} ranks")
        ends = [0, longest]
        axes.plot(ends, ends, color="gray", linewidth=0.8)
        for factor in (1 - GOALS["worst"], 1 + GOALS["worst"]):
            axes.plot(ends, [0, longest * factor], ":", color="gray", linewidth=0.8)
        axes.set_xlabel("measured step (ms)")
        axes.set_ylabel("simulated step (ms)")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)


def main() -> None:
    arguments = parser(__doc__, warmup=2, loops=2)
    arguments.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8])
    arguments.add_argument(
        "--bytes", type=int, nargs="+", default=[40_000, 400_000, 2_000_000]
    )
    arguments.add_argument("--steps", type=int, default=10, help="of a run")
    arguments.add_argument("--step-s", type=float, default=0.05, help="sleep of a step")
    arguments.add_argument("--calls", type=int, default=20, help="timed to calibrate")
    arguments.add_argument("--limit-s", type=float, default=300, help="of an mpirun")
    arguments.add_argument("--plots", type=Path, help="folder for the plots")
    arguments.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.smoke:
        args.loops, args.ranks, args.bytes, args.steps = 1, [2], [4000, 40_000], 10
        args.calls, args.warmup, args.step_s = 2, 0, 0.002
    if args.result:
        under_mpi(args)
        return
    settings: list[object] = ["--loops", args.loops, "--warmup", args.warmup]
    settings += ["--bytes", *args.bytes, "--steps", args.steps]
    settings += ["--step-s", args.step_s, "--calls", args.calls]
    rows, machines = [], []
    for ranks in args.ranks:
        found = mpirun(ranks, __file__, settings, limit_s=args.limit_s)
        rows += compare(ranks, found, args)
        machines.append(
            {
                "ranks": ranks,
                "latency (us)": found["machine"]["latency_s"] * 1e6,
                "bandwidth (GB/s)": found["machine"]["bandwidth_Bps"] / 1e9,
            }
        )
    errors = sorted(abs(row["error"]) for row in rows)
    verdict = [
        {
            "rows": len(errors),
            "median error": median(errors),
            "worst error": errors[-1],
            "goal, median": GOALS["median"],
            "goal, worst": GOALS["worst"],
        }
    ]
    report("fidelity", "Calibrated machine", machines, args)
    report("fidelity", "Step: simulated against measured", rows, args)
    report("fidelity", "Verdict", verdict, args)
    plot(rows, args.plots)


if __name__ == "__main__":
    main()
