"""Does anybody wait for one slow rank, or for one slow link, who need not?

    python benchmarks/bench_slow.py
    python benchmarks/bench_slow.py --out benchmarks/results/slow.json

measured   real MPI, 4 to 32 ranks that sleep 100 ms a step, messages are real
simulated  the virtual world, 128 ranks, 4 MB of model, 5 GB/s and 10 us

The last rank computes 2, 10 or 100 times as long, or the link between ranks 0 and 1 is
ten times slower than the others. Measured, that link's rate and latency are declared:
a tenth of what a message of this size takes here. Share of the ideal as in
bench_straggler.py: each rank's own rate, summed. `local` sends nothing: what it lacks
to 1 is the sleep. `CPU of a step` is what a rank's process uses in a step, its threads
together; `cores` is what all ranks together keep busy: near the number that the machine
has, the machine is measured. A strategy that waits for its slow rank falls to about
K / (K - 1 + 1/factor) / factor of it; `allreduce` beside them shows that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleets import Run, answer, mpirun, run, simulate, sleeper
from harness import parser, report

from mpilm.world.faults import Faults
from mpilm.world.machine import Machine

CASES: dict[str, float] = {"none": 1.0, "2x": 2.0, "10x": 10.0, "100x": 100.0}
LINK = "link 10x"
CHOSEN = ("local", "allreduce", "adpsgd, random_ring", "async_sgd")
MOST_ASYNC = 16  # real ranks on 2 cores: three messages for each server and rank
TENFOLD = 10.0


def faults(case: str, ranks: int, link: tuple[float, float]) -> Faults:
    """Return what is slow.

    Args:
        link: latency and bandwidth of the other links.
    """
    if case == LINK:
        latency_s, bandwidth_Bps = link
        slow = {"kind": "slow_link", "ranks": [0], "peers": [1]}
        slow["latency_s"] = (TENFOLD - 1.0) * latency_s
        slow["bandwidth_Bps"] = bandwidth_Bps / TENFOLD
        return Faults(profile=(slow,))
    factor = CASES[case]
    return Faults(slow={str(ranks - 1): factor} if factor > 1.0 else {})


def row(variant: str, case: str, runs: Sequence[Run], step_s: float) -> dict[str, Any]:
    """Return a row of either table."""
    ideal = (len(runs) - 1 + 1.0 / CASES.get(case, 1.0)) / step_s
    return {
        "strategy": variant,
        "slow": case,
        "ranks": len(runs),
        "of the ideal": sum(1.0 / done.step_s for done in runs) / ideal,
        "steps, fastest": max(done.steps for done in runs),
        "steps, slow rank": runs[-1].steps,
    }


def under_mpi(args: argparse.Namespace) -> None:
    """Run every variant in every case on these MPI ranks."""
    from mpilm.world.mpi import MpiWorld, abort_on_error

    rows = []
    link = (args.latency_s, args.bandwidth_Bps)
    with MpiWorld(step_s=args.step_s) as world, abort_on_error(world):
        for case in args.cases:
            world.configure(faults=faults(case, world.size, link))
            for variant in args.strategies:
                many = variant.startswith("async_sgd") and world.size > MOST_ASYNC
                if many or (variant == "allreduce" and CASES.get(case, 1.0) > TENFOLD):
                    continue
                seconds = max(args.seconds, 2 * CASES.get(case, 1.0) * args.step_s)
                learner = sleeper(world, args.parameters)
                mine = run(world, variant, learner, seconds=seconds, warmup=1)
                runs = world.comm.allgather(mine)
                cpu_s = sum(done.cpu_s for done in runs)
                rows.append(
                    {
                        **row(variant, case, runs, args.step_s),
                        "CPU of a step (ms)": 1e3 * cpu_s / sum(r.steps for r in runs),
                        "cores": cpu_s / max(done.seconds for done in runs),
                    }
                )
        answer(world, args.result, rows)


def simulated(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every variant in every case on virtual ranks."""
    machine = Machine(step_s=0.1, jitter=0.1)
    link = (machine.latency_s, machine.bandwidth_Bps)
    rows = []
    for case in args.cases:
        for variant in args.strategies:
            steps = args.virtual_steps
            steps = max(2, steps // 4) if variant.startswith("async_sgd") else steps
            runs = simulate(
                variant,
                args.virtual_ranks,
                machine=machine,
                parameters=1000,
                model_parameters=1_000_000,
                faults=faults(case, args.virtual_ranks, link),
                seconds=steps * machine.step_s,
            )
            rows.append(row(variant, case, runs, machine.step_s))
    return rows


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16, 32])
    arguments.add_argument("--step-s", type=float, default=0.1, help="sleep of a step")
    arguments.add_argument("--seconds", type=float, default=5.0, help="of a real run")
    arguments.add_argument("--parameters", type=int, default=100_000, help="real ranks")
    arguments.add_argument(
        "--latency-s", type=float, default=1e-4, help="of a link that is not slow"
    )
    arguments.add_argument(
        "--bandwidth-Bps", type=float, default=1e9, help="of a link that is not slow"
    )
    arguments.add_argument("--cases", nargs="+", default=[*CASES, LINK])
    arguments.add_argument("--strategies", nargs="+", default=list(CHOSEN))
    arguments.add_argument("--virtual-ranks", type=int, default=128)
    arguments.add_argument("--virtual-steps", type=int, default=100)
    arguments.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.smoke:
        args.ranks, args.step_s, args.seconds, args.parameters = [2], 0.005, 0.1, 1000
        args.virtual_ranks, args.virtual_steps = 4, 10
    if args.result:
        under_mpi(args)
        return
    if args.virtual_ranks:
        rows = simulated(args)
        report("slow", f"Simulated: {args.virtual_ranks} virtual ranks", rows, args)
    for ranks in args.ranks:
        settings = ["--step-s", args.step_s, "--seconds", args.seconds]
        settings += ["--parameters", args.parameters]
        settings += ["--latency-s", args.latency_s]
        settings += ["--bandwidth-Bps", args.bandwidth_Bps]
        settings += ["--cases", *args.cases, "--strategies", *args.strategies]
        rows = mpirun(ranks, __file__, settings, limit_s=600)
        report("slow", f"Measured: {ranks} MPI ranks that sleep", rows, args)


if __name__ == "__main__":
    main()
