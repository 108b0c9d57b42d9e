"""Xiao et al.'s four systems, to one perplexity: what does sampling save?

    python benchmarks/bench_xiao.py --out benchmarks/results/xiao.json
    python benchmarks/bench_xiao.py --vocab 33278 --rate 1gbit --out ...

    naive                 one rank, all words, dense gradients
    asynchronous          async_sgd on some ranks, the same model
    sampled               one rank: a sample of the words, gradients as rows
    sampled asynchronous  both, and hidden units sampled

They are jobs/configs/xiao_*.toml on one corpus: the WikiText-2 sample with its whole
vocabulary, or, with --vocab, a synthetic language of Zipf's law.

learn  every system once, for the same samples, evaluated by the full softmax as it
       goes. The target is the worst last perplexity of the four: all reach it. How many
       samples each took is interpolated; the load of the machine has no part in it.
time   short runs of all systems in turns, some rounds; seconds of a sample are those of
       steps 3 and on, the median of the rounds. With --rate the asynchronous systems
       also run on emulated nodes, one rank each, with links of that rate.

Seconds to the target = samples to the target x seconds of a sample. The ablation adds
one sampler after the other. Where only exact rows are added (embedding) or the softmax
is full, it is not trained anew to the target. --smoke: tiny, and means nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from harness import parser, report

from mpilm.data.synthetic import prepare_synthetic
from mpilm.data.text import prepare_text
from mpilm.storage.runlog import read_run

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "jobs" / "configs"
DATA = Path(os.environ.get("MPILM_DATA", ROOT.parent / "shared" / "data"))
WIKITEXT = DATA / "wikitext2-sample"
VALID_TOKENS = 20_000  # evaluated: enough to tell 1% apart, little beside the training
BRANCHING = 32  # words that may follow one in the synthetic language

# of the paper's abstract: sampled asynchronous over these
OVER_ASYNCHRONOUS, OVER_NAIVE = 2.1, 4.2
OVER_NETWORK = 10.0  # over asynchronous, 1 Gbit/s: issue E

ALL_UNITS = ("strategy.units=1", "strategy.units_random=0")


@dataclass(frozen=True)
class System:
    """A configuration, its ranks (0: as many as asked for) and other settings."""

    config: str
    ranks: int
    sets: tuple[str, ...] = ()
    learns: bool = True  # whether it is trained to the target


SYSTEMS = {
    "naive": System("xiao_naive", 1),
    "asynchronous": System("xiao_async", 0),
    "sampled": System("xiao_sampled", 1),
    "sampled asynchronous": System("xiao_sampled_async", 0),
}
ABLATION = {
    "hidden units only": System(
        "xiao_async", 0, ("strategy.units=0.25", "strategy.units_random=0.05"), False
    ),
    "rows of the embedding": System(
        "xiao_sampled_async", 0, ("model.softmax=full", *ALL_UNITS), False
    ),
    "+ words of the softmax": System("xiao_sampled_async", 0, ALL_UNITS),
    "+ hidden units, dropped": System(
        "xiao_sampled_async", 0, ("strategy.unsent=dropped",)
    ),
}


def prepare_wikitext(corpus: Path) -> None:
    """Make a corpus of the WikiText-2 sample, all words, few held-out tokens."""
    text = (WIKITEXT / "wiki.test-a.tokens").read_text()
    lines, count = [], 0
    for line in text.splitlines(keepends=True):
        if count >= VALID_TOKENS:
            break
        lines.append(line)
        count += len(line.split())
    held_out = corpus.with_suffix(".tokens")
    held_out.write_text("".join(lines))
    prepare_text([WIKITEXT / "wiki.valid.tokens"], [held_out], [held_out], corpus)


class Bench:
    """The corpus, and runs on it.

    Args:
        folder: of everything that is written.
        args: the parsed arguments.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args, self.number = folder, args, 0
        self.corpus = folder / "corpus.h5"
        if args.vocab:
            tokens = max(args.samples // 4, 10_000)
            prepare_synthetic(
                self.corpus,
                vocab=args.vocab,
                tokens=tokens,
                branching=min(BRANCHING, args.vocab // 2),
            )
        else:
            prepare_wikitext(self.corpus)

    def run(self, system: System, sets: Sequence[str], cluster: Any = None) -> Path:
        """Train; return the folder of the run.

        Raises:
            SystemExit: it failed; its output is in the message.
        """
        self.number += 1
        out = self.folder / f"run-{self.number}"
        settings = [
            f"data.corpus={self.corpus}",
            *("train.test=false", "train.worst_rank=false", "train.log_every=1"),
            *("checkpoint.every=0", *self.args.set, *system.sets, *sets),
        ]
        ranks = system.ranks or self.args.ranks
        command = [
            *("-n", ranks, sys.executable, "-m", "mpilm", "train"),
            *(CONFIGS / f"{system.config}.toml", "--out", out),
            *(word for setting in settings for word in ("--set", setting)),
        ]
        if cluster is None:
            environment = {
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "OMP_NUM_THREADS": "1",
                **os.environ,
            }
            launcher = Path(sys.executable).with_name("mpirun")
            mpirun = [str(launcher), "--oversubscribe", "--bind-to", "none"]
            done = subprocess.run(
                [*mpirun, *map(str, command)],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        else:
            done = cluster.mpirun(list(map(str, command)), limit_s=900.0)
        if done.returncode:
            raise SystemExit(f"{system}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return out

    def learn(self, system: System) -> list[tuple[float, float]]:
        """Return (samples, full valid perplexity) as training goes on."""
        every = self.args.samples // self.args.points
        sets = [f"train.samples={self.args.samples}", f"train.valid_every={every}"]
        out = self.run(system, sets)
        values = read_run(out)[0].rows["valid_perplexity"]
        seen = values[np.isfinite(values)]
        found = seen[np.r_[True, np.diff(seen) != 0.0][: len(seen)]].tolist()
        last = json.loads((out / "summary.json").read_text())["valid_perplexity"]
        if not found or found[-1] != last:
            found.append(last)
        ends = [(n + 1) * every for n in range(len(found) - 1)]
        return list(zip([*ends, self.args.samples], found, strict=True))

    def time(self, system: System, cluster: Any = None) -> tuple[float, float]:
        """Return seconds of a sample, and bytes that a rank sends in a step."""
        ranks = system.ranks or self.args.ranks
        tokens = self.args.steps * ranks * self.args.minibatch
        out = self.run(system, [f"train.samples={tokens}"], cluster)
        rate = 0.0
        for log in read_run(out).values():
            seconds, samples = log.rows["seconds"], log.rows["samples"]
            if len(seconds) > 3:  # the pool gives a rank what it asks for
                rate += (samples[-1] - samples[2]) / (seconds[-1] - seconds[2])
        summary = json.loads((out / "summary.json").read_text())
        steps = summary["samples"] / self.args.minibatch
        return 1.0 / rate if rate else math.nan, summary["bytes_sent"] / steps


def samples_to(target: float, curve: Sequence[tuple[float, float]]) -> float:
    """Return the samples at which a curve reaches a perplexity, in ln perplexity.

    >>> round(samples_to(100.0, [(10, 1000.0), (20, 10.0)]), 6)
    15.0
    """
    before = curve[0]
    for point in curve:
        if point[1] <= target:
            if point is before:
                return float(point[0])
            high, low = math.log(before[1]), math.log(point[1])
            share = (high - math.log(target)) / max(high - low, 1e-12)
            return before[0] + share * (point[0] - before[0])
        before = point
    return math.nan


def in_turns(
    bench: Bench, clusters: Sequence[Any]
) -> Iterator[tuple[str, int, tuple[float, float]]]:
    """Yield (system, number of its network, what `time` found), round by round."""
    for index in range(bench.args.warmup + bench.args.loops):
        for name, system in {**SYSTEMS, **ABLATION}.items():
            for number, cluster in enumerate(clusters):
                if cluster is not None and system.ranks == 1:
                    continue
                found = bench.time(system, cluster)
                if index >= bench.args.warmup:
                    yield name, number, found


def row_of(
    name: str,
    curve: Sequence[tuple[float, float]],
    target: float,
    timings: dict[tuple[str, int], list[tuple[float, float]]],
    networks: Sequence[str],
) -> dict[str, Any]:
    """Return a row of either table, with seconds to the target on each network."""
    samples = samples_to(target, curve)
    row: dict[str, Any] = {"system": name, "last perplexity": curve[-1][1]}
    row["samples to target"] = samples
    for number, network in enumerate(networks):
        found = timings.get((name, number))
        sample_s = median(s for s, _ in found) if found else math.nan
        if number == 0 and found:
            row["MB sent a step"] = median(sent for _, sent in found) / 1e6
        row[f"us a sample{network}"] = 1e6 * sample_s
        row[f"s to target{network}"] = samples * sample_s
    return row


def compare(bench: Bench, clusters: Sequence[Any]) -> list[str]:
    """Report both tables; return the ratios against the goals."""
    args = bench.args
    networks = ["", *([f", {args.rate}"] if len(clusters) > 1 else [])]
    everything = {**SYSTEMS, **ABLATION}
    curves = {n: bench.learn(s) for n, s in everything.items() if s.learns}
    args.curves = curves
    target = max(curves[name][-1][1] for name in SYSTEMS)
    timings: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for name, number, found in in_turns(bench, clusters):
        timings.setdefault((name, number), []).append(found)
    args.rounds = {f"{n}{networks[i]}": found for (n, i), found in timings.items()}
    rows = {
        # a full softmax is trained as the asynchronous system, to rounding
        name: row_of(name, curves.get(name, curves["asynchronous"]), target, timings,
                     networks)
        for name in everything
    }  # fmt: skip
    corpus = f"synthetic, V={args.vocab}" if args.vocab else "WikiText-2 sample"
    title = f"The four systems, {corpus}, {args.ranks} ranks, to {target:.1f}"
    report("xiao", title, [rows[name] for name in SYSTEMS], args)
    added = ("asynchronous", *ABLATION, "sampled asynchronous")
    title = f"One sampler after the other, {corpus}, {args.ranks} ranks"
    report("xiao", title, [rows[name] for name in added], args)
    fast = rows["sampled asynchronous"]
    goals = [
        ("naive", "", OVER_NAIVE),
        ("asynchronous", "", OVER_ASYNCHRONOUS),
        *(("asynchronous", network, OVER_NETWORK) for network in networks[1:]),
    ]
    lines = []
    for name, network, goal in goals:
        key = f"s to target{network}"
        ratio = rows[name][key] / fast[key]
        verdict = "met" if ratio >= goal else "MISSED"
        lines.append(
            f"goal {verdict}: sampled asynchronous {ratio:.1f} x {name}{network},"
            f" >= {goal}"
        )
    return lines


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__ or "", warmup=0, loops=3)
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--samples", type=int, default=210_000, help="to learn from")
    arguments.add_argument("--points", type=int, default=7, help="evaluations of each")
    arguments.add_argument("--steps", type=int, default=30, help="of a timed rank")
    arguments.add_argument("--vocab", type=int, default=0, help="synthetic corpus")
    arguments.add_argument("--rate", default="", help="of emulated links: 1gbit")
    arguments.add_argument("--set", nargs="*", default=[], help="section.key=value")
    args = arguments.parse_args()
    args.minibatch = 10 * 20
    if args.smoke:
        args.vocab, args.loops, args.ranks, args.steps = 2000, 1, 2, 4
        args.samples, args.points, args.minibatch, args.rate = 800, 2, 40, ""
        args.set = ["model.embed=8", "model.hidden=8", "train.batch=4"]
        args.set += ["train.unroll=10", "data.chunk_windows=2"]
    if not args.vocab and not WIKITEXT.is_dir():
        print(f"skipped: no {WIKITEXT} (set MPILM_DATA, or give --vocab)")
        return
    args.load = os.getloadavg()  # of the whole machine, before
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xiao.")))
        clusters: list[Any] = [None]
        if args.rate:
            sys.path.insert(0, str(ROOT / "tools"))
            from emulated_cluster import EmulatedCluster

            clusters.append(EmulatedCluster(args.ranks, rate=args.rate))
            stack.enter_context(clusters[1])
        print("\n".join(compare(Bench(folder, args), clusters)))


if __name__ == "__main__":
    main()
