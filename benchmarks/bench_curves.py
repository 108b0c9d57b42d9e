"""What `mpilm plan --curves` says of a network that no run has seen, and what was so.

    python benchmarks/bench_curves.py --out benchmarks/results/curves.json

Runs of bench_network.py over one network are the stored curves; how long the same
strategies take to its perplexity over another network is computed as plan does it:
samples that the curves take, over samples/s of the virtual world on the other network's
machine (bench_fidelity.py's, as probe found it). Beside it: what was measured there.

    steps    of a rank, by the curves of the known network / measured on the other
    step     simulated / measured on the other network (ms)
    seconds  predicted / measured
    cost     measured seconds of the strategy that the prediction puts first, over those
             of the one that was first; with curves out of lockstep, which plan leaves
             out, and without
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from statistics import mean, median
from typing import Any

import numpy as np
from harness import HERE, parser, report
from network_ranks import PERIOD, STRATEGIES

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.simulate.curves import Stored, StoredCurve
from mpilm.simulate.scaled import scaled_settings
from mpilm.simulate.simulation import PROTOCOL_PARAMETERS
from mpilm.strategies import find_strategy
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld

PERPLEXITY, PARAMETERS, NODES = 10.0, 247_873, 4  # of bench_network.py
STEP_S = 0.017  # of `local` there: nobody sends anything
NETWORKS = ("1gbit", "100mbit", "10mbit")
STEPS, WARM_UP = 40, 20
Points = list[dict[str, Any]]


def stored() -> dict[tuple[str, str], Points]:
    """Return the points of mpilm's strategies, by network and series."""
    document = json.loads((HERE / "results/network.json").read_text())
    (every,) = (t for t in document["tables"] if t["title"] == "Every point")
    found: dict[tuple[str, str], Points] = defaultdict(list)
    for row in every["rows"]:
        is_mine = row["series"] in STRATEGIES and row["series"] != "local"
        if is_mine and row["nodes"] == NODES and row["seconds"]:
            found[row["network"], row["series"]].append(row)
    return found


def steps_to_goal(points: Points) -> float:
    """Return the steps of a rank after which the curves reach PERPLEXITY."""
    curve = StoredCurve(Stored("", 0, 0, 0.0))
    for point in points:
        seconds, perplexity = map(np.asarray, zip(*point["curve"], strict=True))
        curve.samples.append(1e3 * seconds / point["step (ms)"])
        curve.log_ppl.append(np.log(perplexity))
    grid = np.geomspace(curve.first, max(each[-1] for each in curve.samples), 2000)
    return next((s for s in grid if curve.perplexity(s) <= PERPLEXITY), grid[-1])


def machine_of(network: str) -> Machine:
    """Return the machine that probe found over a network."""
    document = json.loads((HERE / "results/fidelity.json").read_text())
    (probed,) = (
        table["rows"]
        for table in document["tables"]
        if table["title"] == "What probe measures, sleeping learners"
    )
    (row,) = (r for r in probed if (r["network"], r["ranks"]) == (network, NODES))
    known = {key: value for key, value in row.items() if key in Machine.__annotations__}
    known = {key: value for key, value in known.items() if value != "-"}
    return Machine(step_s=STEP_S, **known)


def step_s(series: str, network: str) -> float:
    """Return the seconds of a step in the virtual world, the mean over ranks."""
    name, given = STRATEGIES[series]
    kind = find_strategy(name)
    own = {"period": PERIOD} if "period" in kind.Config.__dataclass_fields__ else {}
    scale = PARAMETERS / PROTOCOL_PARAMETERS
    settings = scaled_settings(kind.Config(**{**own, **given}), max(1.0, scale))

    def main(world: VirtualWorld) -> float:
        learner = ProtocolLearner(
            round(PARAMETERS / max(1.0, scale)), compute=world.compute, seed=world.rank
        )
        chosen = kind(world, settings)
        chosen.require(learner)
        chosen.start(learner)
        for _ in range(WARM_UP):
            chosen.step(learner)
        began_s = world.now_s()
        for _ in range(STEPS):
            chosen.step(learner)
        took_s = (world.now_s() - began_s) / STEPS
        chosen.retire(learner)
        chosen.finish(learner)
        return took_s

    machine = machine_of(network).scaled(max(1.0, scale))
    return mean(Simulation(NODES, machine=machine).run(main))


def rows_of(known: str, other: str) -> list[dict[str, Any]]:
    """Return a row for each series that was measured over both networks."""
    points, rows = stored(), []
    for series in STRATEGIES:
        here, there = points.get((known, series)), points.get((other, series))
        if not here or not there:
            continue
        steps, took_s = steps_to_goal(here), step_s(series, other)
        was_s = mean(p["seconds"] - p["mean (s)"] for p in there)
        was_step_s = mean(p["step (ms)"] for p in there) / 1e3
        rows.append(
            {
                "known": known,
                "asked": other,
                "series": series,
                "lockstep": find_strategy(STRATEGIES[series][0]).lockstep,
                "steps": steps,
                "steps, measured": was_s / was_step_s,
                "step (ms)": took_s * 1e3,
                "step, measured (ms)": was_step_s * 1e3,
                "seconds": steps * took_s,
                "seconds, measured": was_s,
                "off by": steps * took_s / was_s - 1.0,
            }
        )
    return rows


def choice(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the prediction would choose, what was first, and what that costs."""
    taken = [row for row in rows if row["lockstep"]]
    first = min(rows, key=lambda row: row["seconds, measured"])
    chosen, any_curve = (
        min(some, key=lambda row: row["seconds"]) for some in (taken, rows)
    )
    return {
        "known": chosen["known"],
        "asked": chosen["asked"],
        "series": len(taken),
        "off by, median": median(abs(row["off by"]) for row in taken),
        "off by, worst": max((row["off by"] for row in taken), key=abs),
        "chosen": chosen["series"],
        "first": first["series"],
        "cost": chosen["seconds, measured"] / first["seconds, measured"],
        "cost, all curves": any_curve["seconds, measured"] / first["seconds, measured"],
    }


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    args: argparse.Namespace = arguments.parse_args()
    pairs = [(a, b) for a in NETWORKS for b in NETWORKS if a != b]
    tables = [rows_of(a, b) for a, b in (pairs[:1] if args.smoke else pairs)]
    tables = [rows for rows in tables if rows]
    report("curves", "Every prediction", [row for rows in tables for row in rows], args)
    report("curves", "The choice", [choice(rows) for rows in tables], args)


if __name__ == "__main__":
    main()
