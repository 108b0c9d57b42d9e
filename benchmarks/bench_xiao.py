"""Xiao et al.'s four systems, to one perplexity: what does sampling save?

    python benchmarks/bench_xiao.py --out benchmarks/results/xiao.json
    python benchmarks/bench_xiao.py --fill 33278 --out ...
    python benchmarks/bench_xiao.py --vocab 33278 --samples 60000 --out ...

    naive                 one rank, all words, dense gradients
    asynchronous          async_sgd on some ranks, the same model
    sampled               one rank: a sample of the words, gradients as rows
    sampled asynchronous  both, and hidden units sampled

They are jobs/configs/xiao_*.toml on one corpus: the WikiText-2 sample with its whole
vocabulary, or, with --vocab, a synthetic language of Zipf's law. --fill adds words that
stand nowhere in the sample, up to the size of WikiText-2's own vocabulary: the softmax
and the exchanges are as large as there, the text is real.

learn  every system once, for the same samples, evaluated by the full softmax as it
       goes. The target is the worst last perplexity of the four: all reach it. How many
       samples each took is interpolated; the load of the machine has no part in it.
       --curves FILE keeps what was learned: a later call goes on from there.
time   the four in turns in one run (xiao_steps.py), some rounds of some seconds each;
       the median of the rounds: on a quiet machine, please.
network  the same of the two asynchronous systems on emulated nodes, one rank each, with
       links of --rate; it needs root and iproute2 (tools/emulated_cluster.py).
bytes  one sampler after the other: what a rank sends in a step, samples to the target.
       Rows of the embedding are exact, so they are not trained to the target anew.

Seconds to the target = samples to the target x seconds of a sample; where nothing was
learned, times are of the same number of samples. --smoke: tiny, and
means nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from fleets import ENVIRONMENT
from harness import one_group, parser, report

from mpilm.data.hdf5 import Corpus, CorpusWriter, new_hdf5
from mpilm.data.synthetic import prepare_synthetic
from mpilm.data.text import prepare_text
from mpilm.storage.runlog import read_run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONFIGS = ROOT / "jobs" / "configs"
DATA = Path(os.environ.get("MPILM_DATA", ROOT.parent / "shared" / "data"))
WIKITEXT = DATA / "wikitext2-sample"
VALID_TOKENS = 20_000  # evaluated: enough to tell 1% apart, little beside the training
BRANCHING = 32  # words that may follow one in the synthetic language

# of the paper's abstract: sampled asynchronous over these
OVER_ASYNCHRONOUS, OVER_NAIVE = 2.1, 4.2
OVER_NETWORK = 10.0  # over asynchronous, 1 Gbit/s: issue E
PARTS = ("learn", "time", "network", "bytes")

Curves = dict[str, list[tuple[float, float]]]  # system -> (samples, perplexity)

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


def fill_vocabulary(corpus: Path, vocab: int) -> None:
    """Give a corpus more words, up to `vocab`, that its text does not have."""
    with Corpus.open(corpus) as old, new_hdf5(corpus.with_suffix(".filled")) as file:
        words = list(old.vocabulary)
        words += [f"<{number}>" for number in range(len(words), vocab)]
        writer = CorpusWriter(file, level=old.level, vocabulary=words)
        for split in old.splits:
            writer.append(split, old.split(split)[:])
        writer.finish(corpus, {**old.provenance, "filled": vocab})
    corpus.with_suffix(".filled").replace(corpus)


class Bench:
    """The corpus, and runs on it.

    Args:
        folder: of everything that is written.
        args: the parsed arguments.
    """

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args, self.number = folder, args, 0
        self.kept: Path | None = args.curves
        args.curves = None  # not where it lies: what it holds is in the result
        self.corpus = folder / "corpus.h5"
        if args.vocab:
            tokens = max(args.samples, 10_000)
            prepare_synthetic(
                self.corpus,
                vocab=args.vocab,
                tokens=tokens,
                branching=min(BRANCHING, args.vocab // 2),
            )
        else:
            prepare_wikitext(self.corpus)
        if args.fill:
            fill_vocabulary(self.corpus, args.fill)

    def start(self, ranks: int, command: Sequence[object], cluster: Any = None) -> None:
        """Run a command on some ranks, of this machine or of an emulated cluster.

        Raises:
            SystemExit: it failed; its output is in the message.
        """
        arguments = [*("-n", str(ranks)), *map(str, command)]
        if cluster is not None:
            done = cluster.mpirun(arguments, limit_s=900.0)
        else:
            launcher = Path(sys.executable).with_name("mpirun")
            done = subprocess.run(
                [str(launcher), "--oversubscribe", "--bind-to", "none", *arguments],
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise SystemExit(f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def run(self, system: System, sets: Sequence[str]) -> Path:
        """Train; return the folder of the run."""
        self.number += 1
        out = self.folder / f"run-{self.number}"
        settings = [
            f"data.corpus={self.corpus}",
            *("train.test=false", "train.worst_rank=false", "train.log_every=1"),
            *("checkpoint.every=0", *self.args.set, *system.sets, *sets),
        ]
        command = [
            *(sys.executable, "-m", "mpilm", "train"),
            *(CONFIGS / f"{system.config}.toml", "--out", out),
            *(word for setting in settings for word in ("--set", setting)),
        ]
        self.start(system.ranks or self.args.ranks, command)
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


def learned(bench: Bench) -> Curves:
    """Return the curves of all that is trained to the target, kept ones as they are."""
    kept = bench.kept
    curves: Curves = {}
    if kept is not None and kept.exists():
        curves = json.loads(kept.read_text())
    for name, system in {**SYSTEMS, **ABLATION}.items():
        if not system.learns or name in curves or "learn" not in bench.args.parts:
            continue
        curves[name] = bench.learn(system)
        if kept is not None:
            kept.write_text(json.dumps(curves, indent=1) + "\n")
    return curves


def timed(
    bench: Bench, systems: dict[str, System], cluster: Any = None
) -> dict[str, list[tuple[float, float]]]:
    """Return (seconds of a sample, bytes a rank sends in a step) of each round."""
    args = bench.args
    ranks = 1 if all(system.ranks == 1 for system in systems.values()) else args.ranks
    of_each = {
        name: {
            "config": str(CONFIGS / f"{system.config}.toml"),
            "ranks": system.ranks,
            "sets": [f"data.corpus={bench.corpus}", *args.set, *system.sets],
        }
        for name, system in systems.items()
    }
    result = bench.folder / "steps.json"
    arguments = [
        *("--corpus", bench.corpus, "--systems", json.dumps(of_each)),
        *("--seconds", args.seconds, "--rounds", args.warmup + args.loops),
        *("--result", result),
    ]
    command = [sys.executable, HERE / "xiao_steps.py", *arguments]
    bench.start(ranks, command, cluster)
    found: dict[str, list[tuple[float, float]]] = json.loads(result.read_text())
    return {name: rounds[args.warmup :] for name, rounds in found.items()}


def compare(bench: Bench) -> list[str]:
    """Report what was asked for; return the ratios against the goals."""
    args = bench.args
    curves = learned(bench)
    args.learned = curves
    target = max((curves[n][-1][1] for n in SYSTEMS if n in curves), default=math.nan)
    corpus = f"synthetic, V={args.vocab}" if args.vocab else "WikiText-2 sample"
    corpus += f" filled to V={args.fill}" if args.fill else ""
    about = f"{corpus}, {args.ranks} ranks, to perplexity {target:.1f}"
    if not curves:
        about = f"{corpus}, {args.ranks} ranks, for the same samples"
    lines: list[str] = []
    if "time" in args.parts:
        rows = rows_of(timed(bench, SYSTEMS), curves, target)
        report("xiao", f"The four systems, {about}", list(rows.values()), args)
        lines += [
            verdict(rows, "naive", OVER_NAIVE),
            verdict(rows, "asynchronous", OVER_ASYNCHRONOUS),
        ]
    if "network" in args.parts:
        sys.path.insert(0, str(ROOT / "tools"))
        from emulated_cluster import EmulatedCluster

        there = {name: s for name, s in SYSTEMS.items() if not s.ranks}
        with one_group(), EmulatedCluster(args.ranks, rate=args.rate) as cluster:
            rows = rows_of(timed(bench, there, cluster), curves, target)
        report("xiao", f"Over {args.rate}, {about}", list(rows.values()), args)
        lines.append(verdict(rows, "asynchronous", OVER_NETWORK))
    if "bytes" in args.parts:
        rows = ablation(bench, curves, target)
        title = f"One sampler after the other, {about}"
        report("xiao", title, list(rows.values()), args)
    return lines


def rows_of(
    found: dict[str, list[tuple[float, float]]], curves: Curves, target: float
) -> dict[str, dict[str, Any]]:
    """Return a row for each system that was timed."""
    rows = {}
    for name, rounds in found.items():
        sample_s = median(s for s, _ in rounds)
        row = {
            "system": name,
            "MB sent a step": median(sent for _, sent in rounds) / 1e6,
            "us a sample": 1e6 * sample_s,
            "least": 1e6 * min(s for s, _ in rounds),
            "most": 1e6 * max(s for s, _ in rounds),
        }
        if name in curves:
            samples = samples_to(target, curves[name])
            row["last perplexity"] = curves[name][-1][1]
            row["samples to target"] = samples
            row["s to target"] = samples * sample_s
        rows[name] = row
    return rows


def verdict(rows: dict[str, dict[str, Any]], name: str, goal: float) -> str:
    """Return a line for a ratio and its goal."""
    fast = rows["sampled asynchronous"]
    key = "s to target" if "s to target" in fast else "us a sample"
    ratio = rows[name][key] / fast[key]
    word = "met" if ratio >= goal else "MISSED"
    return f"goal {word}: sampled asynchronous {ratio:.1f} x {name}, >= {goal}"


def ablation(bench: Bench, curves: Curves, target: float) -> dict[str, dict[str, Any]]:
    """Return rows: one sampler after the other."""
    names = ("asynchronous", *ABLATION, "sampled asynchronous")
    systems = {name: {**SYSTEMS, **ABLATION}[name] for name in names}
    rows = {}
    for name, found in timed(bench, systems).items():
        row = {"sampled": name, "MB sent a step": found[0][1] / 1e6}
        curve = curves.get(name)
        row["last perplexity"] = curve[-1][1] if curve else "not trained"
        row["samples to target"] = samples_to(target, curve) if curve else "-"
        rows[name] = row
    return rows


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__ or "", warmup=0, loops=3)
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--samples", type=int, default=210_000, help="to learn from")
    arguments.add_argument("--points", type=int, default=7, help="evaluations of each")
    arguments.add_argument("--seconds", type=float, default=3.0, help="of a round")
    arguments.add_argument("--vocab", type=int, default=0, help="synthetic corpus")
    arguments.add_argument("--fill", type=int, default=0, help="words in all")
    arguments.add_argument("--rate", default="1gbit", help="of emulated links")
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--curves", type=Path, help="JSON file of what is learned")
    arguments.add_argument("--set", nargs="*", default=[], help="section.key=value")
    args = arguments.parse_args()
    if args.smoke:
        args.vocab, args.loops, args.ranks, args.seconds = 2000, 1, 2, 0.1
        args.samples, args.points, args.parts = 800, 2, ["learn", "time", "bytes"]
        args.set = ["model.embed=8", "model.hidden=8", "train.batch=4"]
        args.set += ["train.unroll=10", "data.chunk_windows=2"]
    if not args.vocab and not WIKITEXT.is_dir():
        print(f"skipped: no {WIKITEXT} (set MPILM_DATA, or give --vocab)")
        return
    args.load = os.getloadavg()  # of the whole machine, before
    with tempfile.TemporaryDirectory(prefix="xiao.") as folder:
        print("\n".join(compare(Bench(Path(folder), args))))


if __name__ == "__main__":
    main()
