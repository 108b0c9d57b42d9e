"""What does one slow rank cost the others, under each strategy?

    python benchmarks/bench_straggler.py
    python benchmarks/bench_straggler.py --out benchmarks/results/straggler.json \\
        --plots docs/images

measured   real MPI, learners that sleep: 2 cores are enough for 4 ranks that do
simulated  the virtual world: more ranks, and a small network trained for its loss

A run lasts a given time, not a given number of steps. Throughput is the sum over ranks
of steps / seconds; the ideal is the sum of the ranks' own rates, 1 / (factor x step),
as declared for the steps that it took. `local`, which sends nothing, shows what
sleeping itself costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleets import (
    VARIANTS,
    Run,
    answer,
    figure,
    legend,
    lines,
    mpirun,
    run,
    simulate,
    sleeper,
)
from harness import parser, report

from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

PARTS = ("measured", "simulated", "loss")
# profile -> factor by which the last rank is slow
PROFILES = {"none": 1.0, "one rank 10x": 10.0, "one rank 100x": 100.0}
SPIKES = "spikes"  # simulated only: any step of any rank
SPIKE = {"kind": "spikes", "probability": 0.05, "factor": 10.0}
# Real runs in lockstep take long beside a slow rank. `allreduce` shows it; the virtual
# world has them all.
LOCKSTEP = ("model_averaging", "bmuf", "gossip_bmuf", "dpsgd", "delay_by_one")
LEARNED = ("allreduce", "model_averaging", "gossip_bmuf", "adpsgd, random_ring")
NETWORK = {"embed": 24, "hidden": 32}
VOCAB, BATCH, UNROLL = 64, 8, 20  # of the synthetic language and its minibatches


def faults(profile: str, ranks: int) -> Faults:
    """Return what is wrong with the ranks."""
    if profile == SPIKES:
        return Faults(profile=(SPIKE,))
    factor = PROFILES[profile]
    return Faults(slow={str(ranks - 1): factor} if factor > 1.0 else {})


def share(runs: Sequence[Run], found: Faults, step_s: float) -> float:
    """Return the throughput as a share of the ideal: the same steps without waiting."""
    ideal = 0.0
    for rank, done in enumerate(runs):
        factors = [found.slowdown(rank, 0.0, step) for step in range(done.steps)]
        ideal += done.steps / (sum(factors) * step_s)
    return sum(1.0 / done.step_s for done in runs) / ideal


def row(variant: str, profile: str, runs: Sequence[Run], step_s: float) -> dict:
    """Return a row of either table."""
    return {
        "strategy": variant,
        "profile": profile,
        "ranks": len(runs),
        "of the ideal": share(runs, faults(profile, len(runs)), step_s),
        "steps, fastest": max(done.steps for done in runs),
        "steps, slow rank": runs[-1].steps,
        "waiting, fastest": min(done.waiting for done in runs),
    }


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every variant under every profile on these MPI ranks."""
    from mpilm.world.mpi import MpiWorld, abort_on_error

    rows = []
    with MpiWorld(step_s=args.step_s) as world, abort_on_error(world):
        for profile, factor in PROFILES.items():
            world.configure(faults=faults(profile, world.size))
            for variant in VARIANTS:
                if variant in LOCKSTEP and factor > 10.0:
                    continue
                learner = sleeper(world, args.parameters)
                seconds = max(args.seconds, 2 * factor * args.step_s)
                mine = run(world, variant, learner, seconds=seconds, warmup=1)
                runs = world.comm.allgather(mine)
                rows.append(row(variant, profile, runs, args.step_s))
        answer(world, args.result, rows)
    return rows


def simulated(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every variant under every profile on virtual ranks."""
    machine = Machine(step_s=0.1, jitter=0.1)
    rows = []
    for ranks in args.virtual_ranks:
        for profile in (*PROFILES, SPIKES):
            for variant in VARIANTS:
                # a step of the parameter server is K messages for every rank
                steps = args.virtual_steps
                steps = max(2, steps // 4) if variant == "async_sgd" else steps
                runs = simulate(
                    variant,
                    ranks,
                    machine=machine,
                    parameters=1000,
                    model_parameters=args.model_parameters,
                    faults=faults(profile, ranks),
                    seconds=steps * machine.step_s,
                )
                rows.append(row(variant, profile, runs, machine.step_s))
    return rows


def learned(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train a small LSTM on virtual ranks; return held-out losses over virtual time."""
    import numpy as np
    import torch

    from mpilm.data.streams import EvaluationStreams, Streams
    from mpilm.data.synthetic import SyntheticLanguage
    from mpilm.learner.learner import Learner
    from mpilm.models.lstm_lm import LstmLm

    torch.set_num_threads(1)
    language = SyntheticLanguage(VOCAB, seed=1)
    text = np.zeros(args.tokens + 2000, np.uint32)
    for start, words, _ in language.generate(len(text), np.random.default_rng(2)):
        text[start : start + len(words)] = words
    train, held_out = text[:-2000], text[-2000:]
    ranks = args.loss_ranks
    machine = Machine(step_s=0.1, jitter=0.1).scaled(args.network_scale)
    rows: list[dict[str, Any]] = []

    def train_one(world: VirtualWorld, variant: str, profile: str) -> Run:
        torch.manual_seed(1)
        # the server adds up what the others average: K gradients in the time of one
        lr = args.lr / world.size if variant == "async_sgd" else args.lr
        learner = Learner(
            LstmLm(VOCAB, **NETWORK),
            Streams(train, BATCH, UNROLL, world.rank, world.size),
            lambda parameters: torch.optim.SGD(parameters, lr=lr),
            compute=world.compute,
            seed=world.rank,
        )
        next_s = 0.0

        def evaluate() -> None:
            nonlocal next_s
            if world.rank == 0 and world.now_s() >= next_s:
                found = learner.evaluate(EvaluationStreams(held_out, 10, UNROLL))
                loss = found.nll / found.num_targets
                line = {"strategy": variant, "profile": profile, "ranks": ranks}
                line |= {"time (s)": world.now_s(), "held-out loss (nats)": loss}
                rows.append(line)
                next_s = (world.now_s() // args.every_s + 1) * args.every_s

        return run(
            world,
            variant,
            learner,
            seconds=args.loss_seconds,
            after_step=evaluate,
        )

    for profile in ("none", "one rank 10x"):
        for variant in (*LEARNED, "async_sgd"):
            world = Simulation(ranks, machine=machine, faults=faults(profile, ranks))
            world.run(lambda w, v=variant, p=profile: train_one(w, v, p))
    print(f"entropy of the language: {language.entropy:.4f} nats")
    return rows


def bars(axes: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Draw the shares of the ideal: a group for each strategy."""
    names = list(dict.fromkeys(line["strategy"] for line in rows))
    for index, profile in enumerate(dict.fromkeys(r["profile"] for r in rows)):
        found = {
            r["strategy"]: r["of the ideal"] for r in rows if r["profile"] == profile
        }
        places = [names.index(name) + 0.2 * (index - 1.5) for name in found]
        axes.barh(places, list(found.values()), height=0.19, label=profile)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05)
    axes.set_xlabel("throughput, share of the ideal")
    axes.set_title(title, fontsize=9)
    legend(axes)


def rows_of(rows: list[dict[str, Any]], profile: str) -> list[dict[str, Any]]:
    """Return the rows of a profile."""
    return [line for line in rows if line["profile"] == profile]


def plot_loss(rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Draw held-out loss over virtual time."""
    profiles = list(dict.fromkeys(line["profile"] for line in rows))
    with figure(folder, "straggler-loss", len(profiles)) as axes:
        for place, profile in zip(axes, profiles, strict=True):
            chosen = rows_of(rows, profile)
            lines(place, chosen, "time (s)", "held-out loss (nats)")
            place.set_title(f"simulated, slow: {profile}", fontsize=9)
            place.set_xlim(0, max(line["time (s)"] for line in rows_of(rows, "none")))
            legend(place)


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--ranks", type=int, default=4, help="MPI ranks")
    arguments.add_argument("--step-s", type=float, default=0.04, help="sleep of a step")
    arguments.add_argument("--seconds", type=float, default=4.0, help="of a real run")
    arguments.add_argument("--parameters", type=int, default=100_000, help="real ranks")
    arguments.add_argument("--virtual-ranks", type=int, nargs="+", default=[16, 128])
    arguments.add_argument(
        "--virtual-steps", type=int, default=100, help="of a fast virtual rank"
    )
    arguments.add_argument(
        "--model-parameters", type=int, default=1_000_000, help="virtual ranks"
    )
    arguments.add_argument("--loss-ranks", type=int, default=8)
    arguments.add_argument("--loss-seconds", type=float, default=30.0, help="virtual")
    arguments.add_argument("--every-s", type=float, default=2.0, help="evaluations")
    arguments.add_argument("--tokens", type=int, default=200_000, help="to train on")
    arguments.add_argument("--lr", type=float, default=2.0)
    arguments.add_argument(
        "--network-scale", type=float, default=100.0, help="model stood for / trained"
    )
    arguments.add_argument("--plots", type=Path, help="folder for the plots")
    arguments.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.smoke:
        args.ranks, args.step_s, args.seconds, args.parameters = 2, 0.005, 0.1, 1000
        args.virtual_ranks, args.virtual_steps = [4], 10
        args.loss_ranks, args.loss_seconds, args.tokens = 2, 1.0, 20_000
    if args.result:
        measured(args)
        return
    ranks = args.ranks
    if "measured" in args.parts:
        settings = ["--step-s", args.step_s, "--seconds", args.seconds]
        settings += ["--parameters", args.parameters]
        rows = mpirun(ranks, __file__, settings, limit_s=600)
        report("straggler", f"Measured: {ranks} MPI ranks that sleep", rows, args)
        with figure(args.plots, "straggler-measured") as axes:
            bars(axes[0], rows, f"measured, {ranks} MPI ranks")
    if "simulated" in args.parts:
        rows = simulated(args)
        report("straggler", "Simulated: the virtual world", rows, args)
        with figure(args.plots, "straggler-simulated", len(args.virtual_ranks)) as axes:
            for place, size in zip(axes, args.virtual_ranks, strict=True):
                chosen = [line for line in rows if line["ranks"] == size]
                bars(place, chosen, f"simulated, {size} ranks")
    if "loss" in args.parts:
        rows = learned(args)
        report("straggler", "Simulated: loss against time", rows, args)
        plot_loss(rows, args.plots)


if __name__ == "__main__":
    main()
