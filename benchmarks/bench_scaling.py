"""How do the strategies scale with the number of ranks?

    python benchmarks/bench_scaling.py
    python benchmarks/bench_scaling.py --out benchmarks/results/scaling.json \\
        --plots docs/images

learners   real MPI, real learners: a small LSTM with torch, on the cores there are
sleeping   real MPI and messages, learners that sleep: no torch, up to 128 ranks; what
           all ranks and their messages take of memory (PSS) stands beside the rates
simulated  the virtual world: as many ranks as wanted, on a declared machine

Efficiency is the rate of all ranks over that of as many ranks that never wait: `local`
at the same number of ranks (measured), the declared step (simulated). So a lack of
cores does not count as communication. waiting: share of a rank's time in which its
learner waits for communication, mean over ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from fleets import (
    VARIANTS,
    Run,
    answer,
    figure,
    legend,
    lines,
    mpirun,
    pss_bytes,
    run,
    simulate,
    sleeper,
)
from harness import parser, report

from mpilm.world.base import World
from mpilm.world.machine import Machine

PARTS = ("learners", "sleeping", "simulated")
# In an all-to-all every step of every rank is K messages there, K back and K to push:
# 128 processes on 2 cores would measure the cores, 1,024 virtual ranks take an hour.
MOST_SLEEPING, MOST_SIMULATED = 16, 64  # ranks of async_sgd
# Declared, not measured: a good network and a slow one.
MACHINES = {
    "5 GB/s, 10 us": Machine(step_s=0.1, jitter=0.1),
    "1 GB/s, 50 us": Machine(
        step_s=0.1, jitter=0.1, latency_s=50e-6, bandwidth_Bps=1e9
    ),
}
ALIKE = ("adpsgd, fixed_ring", "adpsgd, random_pairs")  # cost what random_ring costs
CHOSEN = [name for name in VARIANTS if name not in ALIKE]
VOCAB, EMBED, HIDDEN, BATCH, UNROLL = 1000, 64, 64, 8, 20  # of the learners


def network(world: World) -> Any:
    """Return a learner with a small LSTM."""
    import numpy as np
    import torch

    from mpilm.data.streams import Streams
    from mpilm.learner.learner import Learner
    from mpilm.models.lstm_lm import LstmLm

    torch.set_num_threads(1)
    torch.manual_seed(1)
    text = np.random.default_rng(0).integers(0, VOCAB, 50_000).astype(np.uint32)
    return Learner(
        LstmLm(VOCAB, embed=EMBED, hidden=HIDDEN),
        Streams(text, BATCH, UNROLL, world.rank, world.size),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        compute=world.compute,
        seed=world.rank,
    )


def under_mpi(args: argparse.Namespace) -> None:
    """Run the variants in turns on these ranks; hand the rows to the parent."""
    from mpilm.world.mpi import MpiWorld, abort_on_error

    sleeping = args.child == "sleeping"
    step_s = args.step_s if sleeping else 0.0
    with MpiWorld(step_s=step_s) as world, abort_on_error(world):
        chosen = [
            name
            for name in CHOSEN
            if not (sleeping and name == "async_sgd" and world.size > MOST_SLEEPING)
        ]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
        memory_bytes = 0
        for _ in range(args.loops):
            for name in chosen:
                learner = (
                    sleeper(world, args.parameters) if sleeping else network(world)
                )
                mine = run(world, name, learner, steps=args.steps, warmup=args.warmup)
                runs = world.comm.allgather(mine)
                found[name].append((speed(runs), waiting(runs)))
                held = sum(world.comm.allgather(pss_bytes()))
                memory_bytes = max(memory_bytes, held)
        rows = []
        alone = median(rate for rate, _ in found["local"])
        for name in chosen:
            rate = median(rate for rate, _ in found[name])
            rows.append(
                {
                    "strategy": name,
                    "ranks": world.size,
                    "steps/s": rate,
                    "efficiency": rate / alone,
                    "waiting": median(share for _, share in found[name]),
                    "memory (GiB)": memory_bytes / 2**30,
                }
            )
        answer(world, args.result, rows)


def speed(runs: Sequence[Run]) -> float:
    """Return the steps per second of all ranks together."""
    return sum(1.0 / done.step_s for done in runs)


def waiting(runs: Sequence[Run]) -> float:
    """Return the mean share of waiting."""
    return sum(done.waiting for done in runs) / len(runs)


def measured(part: str, sizes: list[int], args: argparse.Namespace) -> list[dict]:
    """Return the rows of a part, from an mpirun for each size."""
    settings: list[object] = ["--child", part, "--loops", args.loops]
    settings += ["--warmup", args.warmup, "--step-s", args.step_s]
    settings += ["--steps", args.steps if part == "learners" else args.sleeps]
    settings += ["--parameters", args.parameters]
    rows = []
    for ranks in sizes:
        start_s = time.perf_counter()
        found = mpirun(ranks, __file__, settings, limit_s=args.limit_s)
        rows += found
        print(f"{part}, {ranks} ranks: {time.perf_counter() - start_s:.0f} s")
    for row in rows:
        if part == "learners":
            row["samples/s"] = row.pop("steps/s") * BATCH * UNROLL
    return rows


def simulated(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the virtual world."""
    rows = []
    for (network, machine), ranks in product(MACHINES.items(), args.virtual_ranks):
        for name in CHOSEN:
            if name == "async_sgd" and ranks > MOST_SIMULATED:
                continue
            runs = simulate(
                name,
                ranks,
                machine=machine,
                parameters=2000,
                model_parameters=args.model_parameters,
                steps=args.virtual_steps,
            )
            rows.append(
                {
                    "strategy": name,
                    "network": network,
                    "ranks": ranks,
                    "simulated samples/s": speed(runs) * args.samples,
                    "simulated efficiency": speed(runs) * machine.step_s / ranks,
                    "simulated waiting": waiting(runs),
                    "MB sent, rank and step": sum(r.bytes_sent / r.steps for r in runs)
                    / ranks
                    * (args.model_parameters / 2000)
                    / 1e6,
                }
            )
    return rows


def plot(name: str, rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Draw rate, efficiency and waiting over ranks."""
    word = "simulated " if "simulated waiting" in rows[0] else ""
    rate = next(key for key in rows[0] if key.endswith("/s"))
    title = "simulated, " + rows[0]["network"] if word else f"measured, {name}"
    with figure(folder, name, 3) as axes:
        for place, column in zip(
            axes, (rate, f"{word}efficiency", f"{word}waiting"), strict=True
        ):
            lines(place, rows, "ranks", column)
            sizes = sorted({row["ranks"] for row in rows})
            place.set_xscale("log")
            place.set_xticks(sizes, sizes)
            place.minorticks_off()
            if column == rate:
                place.set_yscale("log")
            else:
                place.set_ylim(bottom=0)
        legend(axes[1], columns=5)
        axes[1].set_title(title, fontsize=9)


def main() -> None:
    arguments = parser(__doc__, warmup=3, loops=3)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="with learners"
    )
    arguments.add_argument("--steps", type=int, default=30, help="of a learner")
    arguments.add_argument(
        "--sleeping-ranks", type=int, nargs="+", default=[4, 16, 64, 128]
    )
    arguments.add_argument("--sleeps", type=int, default=10, help="steps that sleep")
    arguments.add_argument("--step-s", type=float, default=0.25, help="of a sleep")
    arguments.add_argument(
        "--parameters", type=int, default=25_000, help="of learners that sleep"
    )
    arguments.add_argument(
        "--virtual-ranks", type=int, nargs="+", default=[4, 16, 64, 256, 1024]
    )
    arguments.add_argument("--virtual-steps", type=int, default=20)
    arguments.add_argument(
        "--model-parameters", type=int, default=2_700_000, help="simulated"
    )
    arguments.add_argument(
        "--samples", type=int, default=700, help="of a simulated step of a rank"
    )
    arguments.add_argument("--limit-s", type=float, default=300, help="of an mpirun")
    arguments.add_argument("--plots", type=Path, help="folder for the plots")
    arguments.add_argument("--child", choices=PARTS[:2], help=argparse.SUPPRESS)
    arguments.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.smoke:
        args.loops, args.warmup, args.steps, args.sleeps = 1, 0, 10, 10
        args.ranks, args.sleeping_ranks, args.virtual_ranks = [2], [3], [4, 16]
        args.parameters, args.step_s, args.virtual_steps = 1000, 0.002, 10
    if args.child:
        under_mpi(args)
        return
    for part in args.parts:
        if part == "simulated":
            rows, title = simulated(args), "Simulated: the virtual world"
        else:
            sizes = args.ranks if part == "learners" else args.sleeping_ranks
            args.loops = args.loops if part == "learners" else 1
            rows, title = measured(part, sizes, args), f"Measured: {part}"
        report("scaling", title, rows, args)
        if part == "simulated":
            for index, network in enumerate(MACHINES):
                some = [row for row in rows if row["network"] == network]
                plot(f"scaling-{part}-{index + 1}", some, args.plots)
        else:
            plot(f"scaling-{part}", rows, args.plots)


if __name__ == "__main__":
    main()
