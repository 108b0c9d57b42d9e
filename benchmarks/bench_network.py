"""How long to a given perplexity over a slow network, beside torch's own ways?

    python benchmarks/bench_network.py --out benchmarks/results/network.json \\
        --plots docs/images

Real TCP between the nodes of an emulated cluster (tools/emulated_cluster.py: root,
Debian's iproute2), one rank a node, each link of the declared rate. Trained is an LSTM
language model of characters (247,873 parameters, 0.99 MB) on tinyshakespeare;
MPILM_DATA says where it is. Without root or data the benchmark is skipped; --smoke
takes random characters, and no cluster. Every point is written to --out as soon as it
is over and is not measured again: a stopped benchmark goes on where it was. --minutes
says when to stop. A seed is measured in all series before the next one is; the tables
hold all seeds of a point that are in the file. --tables measures nothing: it makes the
tables of what the file holds.

Fixed before the table was measured, the same in every row:

    model      E = 32, H = 224, one layer, 65 characters
    minibatch  8 windows of 20 characters a rank and step, each from a state of 0
    optimiser  torch's AdamW, gradients clipped at 1, the rate constant
    settings   of each strategy its defaults; averages every 10 steps, torch's too;
               40: every 40 steps
    rate       the one rule, for each row: 100 steps on 4 virtual ranks, 100 Mbit/s,
               seed 1; begin with FIRST_RATE, double it, else halve it, while the
               perplexity falls; that rate at every network, number of nodes and seed.
               Torch's ways have that of the strategy that computes the same (LIKE)
    DDP        the quicker of two buckets, the default and 0.25 MB, in each network;
               gradient_as_bucket_view. fp16: with torch's own hook beside it
    seeds      of the first model and of what a strategy draws

seconds   from the first step on, until the mean of the models of all ranks has the
          perplexity. Ranks write copies of theirs as they train (network_ranks.py);
          they are judged outside of the ranks. Where ranks have unlike models the time
          of one Allreduce at the declared rate is added, for a mean that one can have.
share     of a step that is not there in `local`, which sends nothing: communication
busy      CPU seconds of all ranks / (seconds x cores): near 1, the cores are measured
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from fleets import figure, launch, lines
from harness import commit, environment, parser, report
from network_judge import TEXT, Judge, at, busy, characters
from network_ranks import ALIKE, STRATEGIES, TORCH, begun
from points import best_rate
from torch import nn

from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.emulated_cluster import why_not

RATES = {"10mbit": 1e7, "100mbit": 1e8, "1gbit": 1e9}  # bits/s
# Some 100 steps of DDP on four nodes: 2 minutes at 10 Mbit/s. Uniform: 65.
PERPLEXITY = 10.0
CAPS_S = {"10mbit": 200.0, "100mbit": 45.0, "1gbit": 30.0}
FIRST_RATE = 0.01
TUNED = {"ranks": 4, "steps": 100, "step_s": 0.02}
LIKE = {  # whose rate a series has: it computes the same
    "allreduce, 0.05 MB": "allreduce",
    "ddp": "allreduce",
    "ddp, 0.25 MB": "allreduce",
    "ddp, fp16": "allreduce",
    "torch averager": "model_averaging",
    "torch averager, 40": "model_averaging, 40",
}
START_S = 120.0  # at most, of a run
# Open MPI 5.0.11 says so in one of some hundred starts over several nodes
NOT_STARTED = "PMIx server's listener thread failed to start"
LEAST_S = 30.0  # left of the benchmark's own time, to begin another point
GOALS = {"100mbit": 3.0, "10mbit": 10.0}  # issue F, "Measured"
TITLE, RATES_TITLE = "Every point", "Every rate"
DDP = "ddp"
Point = dict[str, Any]


class Table:
    """Every point so far, in the file; measures what is not there.

    Args:
        args: the parsed arguments.
        folder: for the corpus and the snapshots.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.ends = time.monotonic() + 60 * args.minutes
        self.points: list[Point] = []
        self.tunings: list[Point] = []
        self.others: list[Any] = []
        self.load()
        train, self.valid = characters(args.smoke)
        np.save(folder / "tokens.npy", train)

    def point(self, **key: Any) -> Point:
        """Return a point: series, network, nodes, lr and seed say which.

        Raises:
            TimeoutError: it is not there, and there is no more time.
        """
        for point in self.points:
            if all(point[name] == value for name, value in key.items()):
                return point
        limit_s = self.args.limit_s or CAPS_S[key["network"]]
        if time.monotonic() + LEAST_S > self.ends:
            raise TimeoutError
        try:
            run = self.run(limit_s=limit_s, **key)
        except RuntimeError as error:
            if NOT_STARTED not in str(error):
                raise
            run = self.run(limit_s=limit_s, **key)
        found = {**key, **run, "commit": commit()}
        shown = {k: v for k, v in found.items() if k != "curve"}
        print(shown, flush=True)
        self.points.append(found)
        self.save()
        return found

    def run(
        self,
        *,
        series: str,
        network: str,
        nodes: int,
        lr: float,
        seed: int,
        limit_s: float,
    ) -> Point:
        """Train until the perplexity is reached or the time is over."""
        snapshots = self.folder / "snapshots"
        snapshots.mkdir()
        judge = Judge(self.valid, snapshots, nodes)
        bits = 32 * sum(p.numel() for p in judge.model.parameters())
        mean_s = 2 * (nodes - 1) / nodes * bits / RATES[network]
        mean_s *= series.partition(",")[0] not in ALIKE
        script = [sys.executable, Path(__file__).with_name("network_ranks.py")]
        script += ["--series", series, "--lr", lr, "--seed", seed]
        script += ["--tokens", self.folder / "tokens.npy", "--folder", snapshots]
        script += ["--interface", "lo" if self.args.smoke else "eth0"]
        rate = "" if self.args.smoke else network
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, snapshots)
            launched = launch(["-n", nodes, *script], nodes, rate)
            command, settings = stack.enter_context(launched)
            errors = stack.enter_context((self.folder / "errors").open("w+"))
            process = subprocess.Popen(
                command, env=settings, start_new_session=True, stderr=errors
            )
            stack.callback(end, process)
            return self.watch(process, judge, series, mean_s, limit_s)

    def watch(
        self,
        process: subprocess.Popen,
        judge: Judge,
        series: str,
        mean_s: float,
        limit_s: float,
    ) -> Point:
        """Judge what the ranks leave, until it is good enough or too late.

        Raises:
            RuntimeError: they ended by themselves.
            TimeoutError: the benchmark's own time is over.
        """
        curve: list[tuple[float, float]] = []
        began_s = time.monotonic()
        seen_s, lines = 0.0, []

        def judged(seconds: float) -> bool:
            curve.append((seconds, judge.perplexity(at(lines, seconds))))
            return curve[-1][1] <= PERPLEXITY

        def snapshots() -> Iterator[float]:
            yield from (line["s"] for line in lines[0] if at(lines, line["s"]))

        is_reached = False
        while seen_s + mean_s < limit_s and not is_reached:
            time.sleep(0.5)
            if time.monotonic() > self.ends:
                raise TimeoutError
            if time.monotonic() > began_s + START_S and not seen_s:
                raise RuntimeError(f"{series}: no model within {START_S:g} s")
            if process.poll() is not None:
                errors = (self.folder / "errors").read_text()
                raise RuntimeError(f"{series} ended by itself:\n{errors[-2000:]}")
            lines = [judge.lines(rank) for rank in range(judge.ranks)]
            newest_s = max(snapshots(), default=0.0)
            if newest_s >= max(1.1 * seen_s, seen_s + 0.5):
                is_reached, before_s, seen_s = judged(newest_s), seen_s, newest_s
        end(process)
        if is_reached:  # the first one since the last that was not good enough
            for seconds in snapshots():
                if before_s < seconds < seen_s and judged(seconds):
                    seen_s = seconds
                    break
        last = at(lines, seen_s)
        steps = fmean(line["step"] for line in last)
        reached_s = seen_s + mean_s
        found: Point = {
            "seconds": reached_s if is_reached and reached_s <= limit_s else None,
            "limit (s)": limit_s,
            "mean (s)": mean_s,
            "perplexity": min(curve, key=lambda point: abs(point[0] - seen_s))[1],
            "steps": steps,
            "step (ms)": seen_s / steps * 1e3,
            "busy": busy(last) / (os.cpu_count() or 1),
            "load": os.getloadavg()[0],
            "curve": [[round(s, 2), round(p, 2)] for s, p in sorted(curve)],
        }
        if "bytes" in last[0]:
            found["waiting"] = fmean(line["blocked_s"] for line in last) / seen_s
            found["MB/step"] = fmean(line["bytes"] for line in last) / steps / 1e6
        return found

    def load(self) -> None:
        """Take up what is in the file; another process may add to it."""
        if self.args.out is None or not self.args.out.exists():
            return
        self.others = json.loads(self.args.out.read_text())["tables"]
        for table in self.others:
            for title, mine in ((TITLE, self.points), (RATES_TITLE, self.tunings)):
                if table["title"] == title:
                    mine += [row for row in table["rows"] if row not in mine]

    def save(self) -> None:
        """Write all points to the file."""
        if self.args.out is None:
            return
        self.load()
        config = {k: v for k, v in vars(self.args).items() if k != "out"}
        kept = [t for t in self.others if t["title"] not in {TITLE, RATES_TITLE}]
        for title, rows in ((RATES_TITLE, self.tunings), (TITLE, self.points)):
            about = {"environment": environment(), "config": config}
            kept.append({"title": title, **about, "rows": rows})
        document = {"benchmark": "network", "tables": kept}
        scratch = self.args.out.with_suffix(".part")
        scratch.write_text(json.dumps(document, indent=1, default=str) + "\n")
        scratch.replace(self.args.out)

    def lr(self, series: str) -> float:
        """Return the rate that the rule comes to."""
        like = LIKE.get(series, series)
        if self.args.smoke or like == "local":
            return FIRST_RATE
        return best_rate(FIRST_RATE, lambda lr: self.tuning(like, lr)["perplexity"])

    def tuning(self, series: str, lr: float) -> Point:
        """Return a run in the virtual world at this rate."""
        for point in self.tunings:
            if (point["series"], point["lr"]) == (series, lr):
                return point
        tokens = np.load(self.folder / "tokens.npy")

        def main(world: VirtualWorld) -> Any:
            given = argparse.Namespace(lr=lr, seed=1)
            chosen, learner = begun(world, series, tokens, given)
            for _ in range(TUNED["steps"]):
                chosen.step(learner)
            theta_P = nn.utils.parameters_to_vector(learner.model.parameters())
            theta_P = theta_P.detach().numpy()
            chosen.retire(learner)
            chosen.finish(learner)
            return theta_P

        machine = Machine(step_s=TUNED["step_s"], bandwidth_Bps=RATES["100mbit"] / 8)
        models = Simulation(TUNED["ranks"], machine=machine).run(main)
        perplexity = Judge(self.valid, self.folder).of(np.mean(models, axis=0))
        found = {"series": series, "lr": lr, "perplexity": perplexity}
        print(found, flush=True)
        self.tunings.append(found)
        self.save()
        return found


def end(process: subprocess.Popen) -> None:
    """End what a run has started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, kind)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue


def row(points: list[Point], ddp: list[Point], local: Point | None) -> Point:
    """Return a row of the table: all seeds of a series in a network."""
    first = points[0]
    times = [point["seconds"] for point in points]
    found: Point = {"series": first["series"], "lr": first["lr"], "seeds": len(points)}
    within = None not in times
    found["seconds"] = fmean(times) if within else f"> {first['limit (s)']:g}"
    found["least (s)"] = min((x for x in times if x is not None), default="-")
    found["most (s)"] = max(times) if within else f"> {first['limit (s)']:g}"
    theirs = [point["seconds"] or point["limit (s)"] for point in ddp]
    ratio = fmean(theirs) / fmean(times) if within and ddp else math.nan
    more = ">" if any(point["seconds"] is None for point in ddp) else ""
    found["DDP / it"] = f"{more}{ratio:.3g}" if not math.isnan(ratio) else "-"
    for key in ("steps", "step (ms)", "busy"):
        found[key] = fmean(point[key] for point in points)
    if local is not None:
        found["share"] = max(0.0, 1.0 - local["step (ms)"] / found["step (ms)"])
    return found


def measured(table: Table, network: str, nodes: int) -> None:
    """Measure what is not in the file, a seed after the other.

    Raises:
        TimeoutError: there is no more time.
    """
    for seed in table.args.seeds:
        for series in table.args.series:
            where = {"series": series, "network": network, "nodes": nodes}
            table.point(**where, lr=table.lr(series), seed=seed)


def table_of(table: Table, network: str, nodes: int) -> list[Point]:
    """Return the rows of a network and a number of nodes, the quickest first."""
    found: dict[str, list[Point]] = {}
    for point in table.points:
        if (point["network"], point["nodes"]) == (network, nodes):
            found.setdefault(point["series"], []).append(point)
    buckets = [found[name] for name in (DDP, "ddp, 0.25 MB") if name in found]
    mean_s = [fmean(p["seconds"] or math.inf for p in some) for some in buckets]
    ddp = buckets[int(np.argmin(mean_s))] if buckets else []
    local = found.get("local", [None])[0]
    rows = [row(points, ddp, local) for points in found.values()]
    return sorted(
        rows, key=lambda r: math.inf if isinstance(r["seconds"], str) else r["seconds"]
    )


def plot(tables: dict[tuple[int, str], list[Point]], folder: Path | None) -> None:
    """Draw seconds over the rate of the links, the series that all rates have."""
    columns = sorted({nodes for nodes, _ in tables})
    with figure(folder, "network", len(columns)) as axes:
        for axis, nodes in zip(axes, columns, strict=True):
            some = [
                {**row, "Mbit/s": RATES[network] / 1e6}
                for (here, network), rows in tables.items()
                for row in rows
                if here == nodes and not isinstance(row["seconds"], str)
            ]
            rates = Counter(row["series"] for row in some)
            most = max(rates.values(), default=0)
            some = [row for row in some if rates[row["series"]] == most]
            some.sort(key=lambda row: (row["series"], row["Mbit/s"]))
            lines(axis, some, "Mbit/s", "seconds", by="series")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(f"{nodes} nodes")
            if some:
                axis.legend(fontsize=7)


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1])
    arguments.add_argument(
        "--networks", nargs="+", default=["100mbit", "10mbit", "1gbit"]
    )
    arguments.add_argument("--nodes", type=int, nargs="+", default=[4, 8])
    arguments.add_argument("--series", nargs="+", default=[*TORCH, *STRATEGIES])
    arguments.add_argument("--minutes", type=float, default=28, help="then stop")
    arguments.add_argument(
        "--limit-s", type=float, default=0.0, help="of a run; 0: by its network"
    )
    arguments.add_argument("--plots", type=Path, help="folder for the plots")
    arguments.add_argument("--tables", action="store_true", help="measure nothing")
    args = arguments.parse_args()
    if args.smoke:
        args.networks, args.nodes, args.series = ["1gbit"], [2], [DDP, "bmuf"]
        args.limit_s = 1.0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by the blocks' ends
    reason = "" if TEXT.exists() else f"no {TEXT}; MPILM_DATA says where it is"
    if reason := "" if args.smoke else reason or why_not():
        print(f"skipped: {reason}")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = Table(args, Path(folder))
        drawn = {}
        try:
            for nodes in args.nodes:
                for network in args.networks:
                    if not args.tables:
                        measured(table, network, nodes)
                    if not (rows := table_of(table, network, nodes)):
                        continue
                    drawn[nodes, network] = rows
                    title = (
                        f"Time to perplexity {PERPLEXITY:g}: {nodes} nodes, {network}"
                    )
                    report("network", title, rows, args)
        except TimeoutError:
            print("stopped: the same command goes on")
            return
        plot(drawn, args.plots)


if __name__ == "__main__":
    main()
