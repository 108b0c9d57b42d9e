"""Does `mpilm plan` choose what is best on a real network?

    python benchmarks/bench_plan.py --out benchmarks/results/plan.json

On an emulated cluster (tools/emulated_cluster.py: root, Debian's iproute2), one rank a
node, at each rate: `mpilm probe` measures the machine; `mpilm plan` chooses among the
candidates; then every candidate trains over the real network, for the same seconds.
A point that is in --out is not measured again.

    computing   a step takes at least STEP_S: real gradients, then sleep, so that ranks
                do not wait for each other's core
    measured    perplexity of the valid split, of the mean of the models of all ranks,
                after the last step that each had finished when the time was over
    regret      measured perplexity of the chosen candidate over that of the best, - 1

What plan says is predicted from the probe, never from the runs that it is held against.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import h5py
import numpy as np
import torch
from harness import one_group, parser, report

from mpilm.cli import main as mpilm
from mpilm.config import Config, read_config, resolve
from mpilm.data.streams import EvaluationStreams, Streams
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.optim.build import build_optimizer
from mpilm.simulate.plan import Candidate, candidates
from mpilm.strategies import find_strategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.emulated_cluster import EmulatedCluster, why_not

UNITS, VOCAB = 96, 2000
STEP_S = 0.1
STRATEGIES = ("allreduce", "delay_by_one", "adpsgd", "model_averaging", "bmuf")
STRATEGIES += ("gossip_bmuf", "sparse_loco")
PERIODS = (5, 20)
PROBED = "# "  # what probe says beside the numbers
CONFIG = f"""
[data]
corpus = "CORPUS"
[model]
embed = {UNITS}
hidden = {UNITS}
[optim]
name = "adamw"
lr = 0.01
clip = 1.0
[train]
batch = 8
unroll = 20
"""
Point = dict[str, Any]


def label(candidate: Candidate) -> str:
    """Return the name of a row."""
    return str(candidate).replace(", period ", " ")


def rank_main(args: argparse.Namespace) -> None:
    """Train by a candidate until the process is ended; keep the model of the time."""
    from mpilm.world.mpi import MpiWorld, abort_on_error

    torch.set_num_threads(1)
    config = read_config(args.config)
    with MpiWorld(step_s=STEP_S) as world, abort_on_error(world):
        with h5py.File(config.data.corpus) as corpus:
            tokens = corpus["splits/train"][:]
        model = model_of(config)
        train = config.train
        learner = Learner(
            model,
            Streams(tokens, train.batch, train.unroll, world.rank, world.size),
            build_optimizer(config.optim),
            compute=world.compute,
        )
        chosen = find_strategy(config.strategy.name)(world, config.strategy.settings)
        chosen.require(learner)
        chosen.start(learner)
        world.comm.Barrier()
        began_s, steps, kept = world.now_s(), 0, learner.theta.clone()
        is_written = False
        while True:
            chosen.step(learner)
            if not is_written and world.now_s() - began_s >= args.seconds:
                path = args.folder / f"{world.rank}.npy"
                with open(args.folder / f"{world.rank}.part", "wb") as file:
                    np.savez(file, theta_P=kept.numpy(), steps=steps)
                os.replace(args.folder / f"{world.rank}.part", path)
                is_written = True
            if not is_written:
                steps += 1
                kept.copy_(learner.theta)


def model_of(config: Config) -> LstmLm:
    """Return the first model."""
    torch.manual_seed(config.train.seed)
    with h5py.File(config.data.corpus) as corpus:
        vocab = len(corpus["vocabulary/counts"])
    return LstmLm(vocab, embed=UNITS, hidden=UNITS)


@torch.no_grad()
def perplexity(config: Config, theta_P: Any) -> float:
    """Return that of a model on the valid split."""
    model = model_of(config).eval()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(theta_P), model.parameters())
    with h5py.File(config.data.corpus) as corpus:
        tokens = corpus["splits/valid"][:].astype(np.int64)
    total, count = 0.0, 0
    for batch in EvaluationStreams(tokens, 16, 50):
        inputs, targets = map(torch.from_numpy, (batch.inputs, batch.targets))
        loss = model.loss(batch._replace(inputs=inputs, targets=targets))
        total += float(loss) * batch.num_samples
        count += batch.num_samples
    return math.exp(min(50.0, total / count)) if math.isfinite(total) else math.inf


def trained(cluster: EmulatedCluster, config: Config, args: Any) -> tuple[float, float]:
    """Return the perplexity, and samples/s, of a run over the network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.toml").write_text(config.to_toml())
        script: list[object] = [sys.executable, __file__, "--folder", folder]
        script += ["--config", folder / "config.toml", "--seconds", args.seconds]
        command = cluster.command(["-n", str(args.nodes), *map(str, script)])
        process = subprocess.Popen(
            command,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        ends_s = time.monotonic() + args.limit_s
        files = [folder / f"{rank}.npy" for rank in range(args.nodes)]
        try:
            while not all(file.exists() for file in files):
                if process.poll() is not None or time.monotonic() > ends_s:
                    said = process.stderr.read() if process.poll() is not None else b""
                    raise RuntimeError(f"no model of every rank: {said.decode()}")
                time.sleep(0.1)
        finally:
            process.terminate()  # mpirun ends its ranks
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        found = [np.load(file) for file in files]
        mean_P = np.mean([one["theta_P"] for one in found], axis=0)
        steps = sum(int(one["steps"]) for one in found)
    samples = steps * config.train.batch * config.train.unroll
    return perplexity(config, mean_P), samples / args.seconds


def probe(cluster: EmulatedCluster, config: Path, nodes: int) -> str:
    """Return the [machine] that `mpilm probe` prints, with our step_s."""
    words = ["-n", str(nodes), sys.executable, "-m", "mpilm", "probe", str(config)]
    words += ["--steps", "3"]
    done = subprocess.run(
        cluster.command(words),
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    lines = [line for line in done.stdout.splitlines() if line[:2] != PROBED]
    # a step sleeps until it is STEP_S long, whatever the rest of it took
    own = ("step_s", "jitter", "update_s", "mix_s")
    lines = [line for line in lines if line.split(" ")[0] not in own]
    return "\n".join([*lines, f"step_s = {STEP_S}", ""])


def planned(config: Path, machine: Path, args: Any, folder: Path) -> list[Point]:
    """Return what `mpilm plan` found: its rows, the recommended one first."""
    out = folder / "plan.json"
    words = ["plan", config, "--machine", machine, "--ranks", args.nodes]
    words += ["--strategies", ",".join(args.strategies), "--json", out]
    words += ["--periods", ",".join(map(str, args.periods))]
    words += ["--steps", round(args.seconds / STEP_S), "--finalists", args.finalists]
    if mpilm(list(map(str, words))):
        raise RuntimeError("mpilm plan failed")
    rows: list[Point] = json.loads(out.read_text())["rows"]
    return rows


def one_network(rate: str, config: Path, args: Any, points: list[Point]) -> None:
    """Add the points of a network; those that are there stay."""
    settings = read_config(config)
    mine = [point for point in points if point["network"] == rate]
    with (
        tempfile.TemporaryDirectory() as name,
        one_group(),
        EmulatedCluster(args.nodes, rate=rate) as cluster,
    ):
        if not mine:
            machine = Path(name) / "machine.toml"
            machine.write_text(probe(cluster, config, args.nodes))
            began_s = time.process_time()
            rows = planned(config, machine, args, Path(name))
            took_s = time.process_time() - began_s
            by_promise = max(rows, key=lambda row: row["promise"])
            for number, row in enumerate(rows):
                spoken, co = row["spoken"], row["trained"] or {}
                c = Candidate(**row["candidate"])
                point = {
                    "network": rate,
                    "candidate": label(c),
                    "recommended": number == 0,
                    "by speed and drift alone": row is by_promise,
                    "predicted samples/s": spoken["samples_per_s"],
                    "drift": spoken["drift"],
                    "predicted perplexity": co.get("perplexity"),
                    "measured samples/s": [],
                    "measured perplexity": [],
                    "plan took (CPU s)": took_s,
                }
                mine.append(point)
            points += mine
            keep(points, args)
        batches = {settings.train.batch: 0.0}
        tried = candidates(settings, args.strategies, args.periods, batches)
        by_label = {label(candidate): candidate for candidate in tried}
        for seed in range(args.loops):
            for point in mine:
                if len(point["measured perplexity"]) > seed:
                    continue
                one = by_label[point["candidate"]].applied(settings)
                document = one.to_document()
                document["train"]["seed"] = seed + 1
                found = trained(cluster, resolve(document), args)
                point["measured perplexity"].append(found[0])
                point["measured samples/s"].append(found[1])
                print(rate, point["candidate"], found, flush=True)
                keep(points, args)


def keep(points: list[Point], args: Any) -> None:
    """Write what there is."""
    if args.out is not None:
        args.out.with_suffix(".part").write_text(json.dumps(points))


def verdict(rate: str, points: list[Point]) -> Point:
    """Return how far the choices are from the measured best."""
    mine = [point for point in points if point["network"] == rate]
    mine.sort(key=lambda point: fmean(point["measured perplexity"]))
    best = fmean(mine[0]["measured perplexity"])
    by_name = {point["candidate"]: point for point in mine}
    row: Point = {"network": rate, "best": mine[0]["candidate"], "its perplexity": best}
    for key in ("recommended", "by speed and drift alone"):
        chosen = next(point for point in mine if point[key])
        value = fmean(chosen["measured perplexity"])
        row |= {key: chosen["candidate"], f"{key}: regret": value / best - 1.0}
        row[f"{key}: place"] = mine.index(chosen) + 1
    for name in ("allreduce", "bmuf 20"):  # whoever asks nobody
        if name in by_name:
            other = fmean(by_name[name]["measured perplexity"])
            row[f"always {name}: regret"] = other / best - 1.0
    row["of"] = len(mine)
    errors = [
        abs(p["predicted samples/s"] / fmean(p["measured samples/s"]) - 1.0)
        for p in mine
    ]
    row["error of samples/s, median"] = sorted(errors)[len(errors) // 2]
    return row


def main() -> None:
    arguments = parser(__doc__ or "", warmup=0, loops=1)
    arguments.add_argument(
        "--networks", nargs="+", default=["10mbit", "100mbit", "1gbit"]
    )
    arguments.add_argument("--nodes", type=int, default=4)
    arguments.add_argument("--seconds", type=float, default=20.0, help="of each run")
    arguments.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    arguments.add_argument("--periods", type=int, nargs="+", default=list(PERIODS))
    arguments.add_argument("--finalists", type=int, default=6)
    arguments.add_argument("--corpus", type=Path, default=Path("data/docs-2000.h5"))
    arguments.add_argument("--limit-s", type=float, default=120, help="of an mpirun")
    arguments.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    arguments.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.folder:
        rank_main(args)
        return
    if reason := why_not():
        print(f"skipped: {reason}", file=sys.stderr)
        return
    if args.smoke:
        args.networks, args.nodes, args.seconds = ["100mbit"], 2, 1.0
        args.strategies, args.periods, args.loops = ["allreduce", "bmuf"], [5], 1
    if not args.corpus.exists():
        args.corpus.parent.mkdir(parents=True, exist_ok=True)
        if mpilm(["prepare", "docs", "--out", str(args.corpus), "--vocab", str(VOCAB)]):
            raise RuntimeError("no corpus")
    points: list[Point] = []
    if args.out is not None and args.out.with_suffix(".part").exists():
        points = json.loads(args.out.with_suffix(".part").read_text())
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "train.toml"
        config.write_text(CONFIG.replace("CORPUS", str(args.corpus.resolve())))
        for rate in args.networks:
            one_network(rate, config, args, points)
    report("plan", "Every candidate", points, args)
    report("plan", "Verdict", [verdict(rate, points) for rate in args.networks], args)
    if args.out is not None:
        args.out.with_suffix(".part").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
