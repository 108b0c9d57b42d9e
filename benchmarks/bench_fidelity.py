"""Does the virtual world predict a step, and what of it is communication?

    python benchmarks/bench_fidelity.py
    python benchmarks/bench_fidelity.py \\
        --out benchmarks/results/fidelity.json --plots docs/images

Over an emulated network (tools/emulated_cluster.py: root, Debian's iproute2) at each
rate, and through shared memory: in one mpirun and in turns what `mpilm probe` measures,
then every strategy. The virtual world plays the machine that probe has found.

    step_s         a step of `local` in the same run: nobody sends anything
    mix_s          what a strategy's step takes longer without what the learner waits,
                   from a run of its own before those that are compared
    communication  how long the learner waits for it in a step, measured and simulated:
                   the step less what is computed in it
    counted        rows in which communication is LEAST of the measured step or more

Ranks have the priority of this script, and Linux does not share the cores among
sessions meanwhile (harness.one_group): each node of an emulated cluster is one, and
reductions stood still for seconds (docs/log.md).

Learners sleep or compute (`--learner`). Strategies exchange often (SETTINGS), and a
model takes about a step's time to send, so that most rows count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from fleets import answer, figure, launch, sleeper
from harness import parser, report

from mpilm.simulate.calibrate import calibrate, spread, step_times
from mpilm.simulate.scaled import scaled_settings
from mpilm.simulate.simulation import PROTOCOL_PARAMETERS
from mpilm.strategies import STRATEGIES, find_strategy
from mpilm.world.base import World
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.emulated_cluster import why_not

# issue F, "Measured"
GOALS = {
    "communication, median": 0.2,
    "communication, worst": 0.5,
    "step, median": 0.05,
}
LEAST = 0.3
SHARED = "shared memory"
# bytes of a model that takes some 30 to 80 ms to send, and seconds that a step sleeps
SIZES = {"10mbit": 80_000, "100mbit": 500_000, "1gbit": 4_000_000, SHARED: 8_000_000}
SLEEPS = {SHARED: 0.005}
SETTINGS: dict[str, dict[str, Any]] = {
    "model_averaging": {"period": 2},
    "bmuf": {"period": 2},
    "gossip_bmuf": {"period": 2},
    "gossip_pga": {"period": 2},
    "noloco": {"period": 2},
    "sparta": {"share": 0.5},
    "des_loc": {"period": 2},
    "sparse_loco": {"period": 2, "share": 0.25},
    "eager_diloco": {"period": 2, "eta": 0.5},
    "hierarchical": {"inner": "bmuf", "settings": {"period": 2}},
}
LINK = ("latency_s", "bandwidth_Bps", "rendezvous_s", "burst_bytes")
LINK += ("enter_s", "reduce_latency_s", "reduce_Bps")
INNER = [key for key in LINK if key != "burst_bytes"]
MEASURED = (*LINK, *(prefix + key for prefix in ("node_", "leader_") for key in INNER))
Found = dict[str, Any]


class NotMeasuredError(Exception):
    """There is no measurement to predict."""


def one_run(
    world: World, name: str, learner: Any, args: argparse.Namespace, scale: float = 1.0
) -> tuple[float, float]:
    """Return seconds of a step of a strategy, and of waiting in it: means over ranks.

    Args:
        scale: how many times smaller the learner is than the model it stands for.

    Communicates: collective.
    """
    kind = find_strategy(name)
    settings = kind.Config(**SETTINGS.get(name, {}))
    chosen = kind(world, scaled_settings(settings, scale))
    chosen.require(learner)
    chosen.start(learner)
    world.comm.Barrier()
    for _ in range(args.warmup):
        chosen.step(learner)
    began_s, blocked_s = world.now_s(), world.traffic.blocked_s
    for _ in range(args.steps):
        chosen.step(learner)
    took = world.now_s() - began_s, world.traffic.blocked_s - blocked_s
    chosen.retire(learner)
    chosen.finish(learner)
    everyone = world.comm.allgather(took)
    step_s, wait_s = (
        sum(x) / world.size / args.steps for x in zip(*everyone, strict=True)
    )
    return step_s, wait_s


def names(args: argparse.Namespace) -> list[str]:
    """Return the strategies, `local` first."""
    return [name for name in STRATEGIES if name == "local" or name in args.strategies]


def under_mpi(args: argparse.Namespace) -> None:
    """Calibrate and measure here, in turns; hand the medians to the parent."""
    from mpilm.world.mpi import MpiWorld, abort_on_error

    sleeps = 0.0 if args.learner == "computing" else args.step_s
    with MpiWorld(step_s=sleeps) as world, abort_on_error(world):
        hosts = world.comm.allgather(socket.gethostname())
        machines: list[dict[str, float]] = []
        spreads: list[float] = []
        updates: list[float] = []
        model_bytes = 4 * make_learner(world, args).layout.size
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in names(args)}
        together: list[list[float]] = []
        pause: Any = {"model_bytes": model_bytes, "step_s": args.step_s}
        for _ in range(1 + args.loops):
            machines.append(calibrate(world, hosts, **pause))
            for name, runs in took.items():
                runs.append(one_run(world, name, make_learner(world, args), args))
            times = step_times(make_learner(world, args), args.steps)
            spreads.append(spread(world.comm.allgather(times[0]))[1])
            updates.append(spread(world.comm.allgather(times[1]))[0])
            together += world.comm.allgather(steps_together(world, args))
        machine = {key: median(m[key] for m in machines) for key in machines[0]}
        machine |= {"jitter": median(spreads), "update_s": median(updates)}
        machine["burst_bytes"] = round(machine.get("burst_bytes", 0))
        machine["ranks_per_node"] = max(hosts.count(host) for host in hosts)
        found = {"machine": machine, "runs": took, "bytes": model_bytes}
        found |= {"machines": machines, "together": together}
        answer(world, args.result, found)


def steps_together(world: World, args: argparse.Namespace) -> list[float]:
    """Return the seconds of each gradient and update, all ranks at once.

    Communicates: collective.
    """
    learner, took = make_learner(world, args), []
    for _ in range(2 + args.steps):
        world.comm.Barrier()
        began_s = time.perf_counter()
        learner.gradient()
        learner.update()
        took.append(time.perf_counter() - began_s)
    return took[2:]


def make_learner(world: World, args: argparse.Namespace) -> Any:
    """Return a learner of about args.bytes, which sleeps or computes: an LSTM LM."""
    if args.learner == "sleeping":
        return sleeper(world, args.bytes // 4)
    import torch

    from mpilm.data.streams import Streams
    from mpilm.learner.learner import Learner
    from mpilm.models.lstm_lm import LstmLm

    torch.manual_seed(0)
    hidden = round(math.sqrt(args.bytes / 4 / 16))  # the LSTM's half: 8 hidden^2
    vocab = round(args.bytes / 4 / 2 / (2 * hidden + 1))
    tokens = np.random.default_rng(1).integers(vocab, size=100_000)
    return Learner(
        LstmLm(vocab, embed=hidden, hidden=hidden),
        Streams(tokens, args.batch, 20, world.rank, world.size),
        torch.optim.SGD,
        compute=world.compute,
    )


def measured(network: str, ranks: int, args: argparse.Namespace) -> Found:
    """Return what `under_mpi` found over a network, or has found before."""
    kept = None
    if args.keep is not None:
        kept = args.keep / f"{network}-{ranks}-{args.learner}.json"
        if kept.exists():
            return json.loads(kept.read_text())  # type: ignore[no-any-return]
        if args.replay:
            raise NotMeasuredError(f"{kept} does not exist")
    nodes = min(ranks, args.nodes)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        result = Path(folder) / "answer.json"
        script: list[object] = [sys.executable, __file__, "--loops", args.loops]
        script += ["--warmup", args.warmup, "--steps", args.steps]
        script += [
            "--step-s",
            SLEEPS.get(network, args.step_s),
            "--bytes",
            size_of(network, args),
        ]
        script += ["--learner", args.learner, "--batch", args.batch]
        script += ["--result", result]
        script += ["--strategies", *args.strategies]
        rate, slots = "" if network == SHARED else network, -(-ranks // nodes)
        launched = launch(["-n", ranks, *script], nodes, rate, slots=slots)
        command, environment = stack.enter_context(launched)
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stderr=subprocess.PIPE
        )
        try:
            _, errors = process.communicate(timeout=args.limit_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)
            raise
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{errors.decode()}")
        found: Found = json.loads(result.read_text())
        if kept is not None:
            kept.write_text(json.dumps(found))
        return found


def size_of(network: str, args: argparse.Namespace) -> int:
    """Return the bytes of a model."""
    return args.bytes or SIZES.get(network, SIZES["100mbit"])


def predicted(
    name: str, ranks: int, machine: Machine, args: argparse.Namespace, size: int
) -> tuple[float, float]:
    """Return the same of the virtual world."""
    scale = max(1.0, size / 4 / PROTOCOL_PARAMETERS)

    def main(world: VirtualWorld) -> tuple[float, float]:
        return one_run(
            world, name, sleeper(world, round(size / 4 / scale)), args, scale
        )

    return Simulation(ranks, machine=machine.scaled(scale)).run(main)[0]


def compare(
    network: str, ranks: int, found: Found, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows of a network and a number of ranks."""
    runs = found["runs"]
    alone_s = median(step_s for step_s, _ in runs["local"])
    size = found["bytes"]
    rows = []
    for name, ((first_s, first_wait_s), *counted) in runs.items():
        if name == "local":
            continue
        mix_s = max(0.0, first_s - first_wait_s - runs["local"][0][0])
        gradient_s = max(0.0, alone_s - found["machine"]["update_s"])
        machine = Machine(step_s=gradient_s, mix_s=mix_s, **found["machine"])
        step_s, wait_s = (median(values) for values in zip(*counted, strict=True))
        virtual_s, virtual_wait_s = predicted(name, ranks, machine, args, size)
        rows.append(
            {
                "network": network,
                "ranks": ranks,
                "learner": args.learner,
                "strategy": name,
                "alone (ms)": alone_s * 1e3,
                "mixing (ms)": mix_s * 1e3,
                "measured step (ms)": step_s * 1e3,
                "simulated step (ms)": virtual_s * 1e3,
                "measured wait (ms)": wait_s * 1e3,
                "simulated wait (ms)": virtual_wait_s * 1e3,
                "communication": wait_s / step_s,
                "counted": wait_s / step_s >= LEAST,
                "error of communication": virtual_wait_s / max(1e-9, wait_s) - 1.0,
                "error of step": virtual_s / step_s - 1.0,
            }
        )
    return rows


def verdict(rows: list[dict[str, Any]], network: str = "") -> dict[str, Any]:
    """Return what the counted rows come to, of one network or of all."""
    rows = [row for row in rows if network in {"", row["network"]}]
    counted = [row for row in rows if row["counted"]]
    sends = [abs(row["error of communication"]) for row in counted] or [math.nan]
    steps = [abs(row["error of step"]) for row in counted] or [math.nan]
    return {
        "network": network or "all",
        "rows": len(rows),
        "counted": len(counted),
        "communication, median": median(sends),
        "communication, worst": max(sends),
        "within 50%": sum(x <= GOALS["communication, worst"] for x in sends),
        "step, median": median(steps),
        **{f"goal: {name}": value for name, value in GOALS.items()},
    }


def plot(rows: list[dict[str, Any]], folder: Path | None) -> None:
    """Draw simulated over measured communication, a mark for each network."""
    with figure(folder, "fidelity") as (axes,):
        ends = [1.0, 1.0]
        for network in dict.fromkeys(row["network"] for row in rows):
            some = [r for r in rows if r["network"] == network and r["counted"]]
            x = [r["measured wait (ms)"] for r in some]
            y = [r["simulated wait (ms)"] for r in some]
            axes.plot(x, y, "o", markersize=4, alpha=0.7, label=network)
            ends = [min([ends[0], *x]), max([ends[1], *x])]
        axes.plot(ends, ends, color="gray", linewidth=0.8)
        for factor in (0.8, 1.2):
            axes.plot(ends, [factor * e for e in ends], ":", color="gray")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("measured wait for communication in a step (ms)")
        axes.set_ylabel("simulated (ms)")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)


def main() -> None:
    arguments = parser(__doc__, warmup=4, loops=3)
    arguments.add_argument("--networks", nargs="+", default=list(SIZES))
    arguments.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    arguments.add_argument("--nodes", type=int, default=4, help="at most")
    arguments.add_argument("--bytes", type=int, default=0, help="of the model")
    arguments.add_argument("--steps", type=int, default=8, help="of a run")
    arguments.add_argument("--step-s", type=float, default=0.02, help="sleep of a step")
    arguments.add_argument(
        "--learner", default="sleeping", choices=["sleeping", "computing"]
    )
    arguments.add_argument("--batch", type=int, default=32, help="of one that computes")
    arguments.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    arguments.add_argument("--limit-s", type=float, default=300, help="of an mpirun")
    arguments.add_argument("--keep", type=Path, help="folder of what was measured")
    arguments.add_argument("--replay", action="store_true", help="only what is kept")
    arguments.add_argument("--plots", type=Path, help="folder for the plots")
    arguments.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.smoke:
        args.loops, args.ranks, args.steps = 1, [2], 2
        args.warmup, args.step_s = 2, 0.01
        args.networks, args.strategies = [SHARED, "100mbit"], ["allreduce", "adpsgd"]
    if args.result:
        under_mpi(args)
        return
    if (reason := why_not()) and args.networks != [SHARED]:
        print(f"only through shared memory: {reason}", file=sys.stderr)
        args.networks = [SHARED]
    rows, machines = [], []
    for network in args.networks:
        for ranks in args.ranks:
            try:
                found = measured(network, ranks, args)
            except (NotMeasuredError, subprocess.TimeoutExpired) as error:
                print(f"{network}, {ranks} ranks: {error}", file=sys.stderr)
                continue
            machines.append(
                {"network": network, "ranks": ranks}
                | {key: found["machine"].get(key, "-") for key in MEASURED}
            )
            rows += compare(network, ranks, found, args)
    args.keep = None  # where it lay says nothing
    kind = f"{args.learner} learners"
    report("fidelity", f"What probe measures, {kind}", machines, args)
    report("fidelity", f"Step: simulated against measured, {kind}", rows, args)
    verdicts = [verdict(rows, network) for network in (*args.networks, "")]
    report("fidelity", f"Verdict, {kind}", verdicts, args)
    plot(rows, args.plots)


if __name__ == "__main__":
    main()
