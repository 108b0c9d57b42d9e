"""What does each strategy cost in perplexity, time and bytes, beside `local`?

    mpirun -n 4 python benchmarks/bench_strategies.py

All ranks train an LSTM language model of the WikiText-2 sample by every strategy, one
after the other, on equally many samples (all ranks together). MPILM_DATA says where the
sample is; without it the benchmark is skipped. --smoke takes a synthetic corpus.

Fixed before anything was measured, the same in every row:

    optimiser  plain SGD, clipped at 0.25 (momenta would stay on ranks that are mixed)
    schedule   warm-up over a tenth of the samples, then exponential: large rates want
               the first, and distances to the mean vanish with the second
    data       from the common pool, so that every rank sees all of the text
    rate       base * ranks / gain: the mean model is to move as fast per sample as that
               of `local`, the linear scaling of docs/references.md

The gain is what a strategy multiplies a rank's step by in the mean model:

    1 / (1 - eta)  of a block momentum: K for bmuf (eta = 1 - 1/K), k for gossip_bmuf
                   (eta = 1 - 1/k)
    ranks          of async_sgd, where every push is a whole step, and of ranks that are
                   never averaged (local)
    1              all others

Settings are the strategies' defaults but for those in `entries`, with reasons there.
The moving average ([ema]) stands where a strategy synchronises; its window is a
twentieth of the samples. --loops are seeds: numbers are means, and the spread is the
largest minus the smallest final perplexity.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import parser, report

from mpilm.config import resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.data.text import prepare_text
from mpilm.strategies import STRATEGIES
from mpilm.train.loop import Trainer
from mpilm.world.base import World
from mpilm.world.mpi.world import MpiWorld, abort_on_error, start_mpi

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MPILM_DATA", ROOT.parent / "shared/data"))
SAMPLE = DATA / "wikitext2-sample"
GROUP = 2  # ranks in a group of gossip_bmuf: its default

Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    gain   what the strategy multiplies a rank's step by, see above
    alone  on one rank, which processes all the samples
    """

    name: str
    strategy: str
    gain: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)
    alone: bool = False


def entries(ranks: int) -> list[Entry]:
    """Return the rows of the table."""
    found = [
        Entry("local, 1 rank", "local", alone=True),
        # never mixed but in the end: what the others gain by talking
        Entry("local", "local", gain=ranks),
        Entry("allreduce", "allreduce"),
        Entry("model_averaging", "model_averaging"),
    ]
    for momentum, short in ("classical", "CBM"), ("nesterov", "NBM"):
        # blocks of plain averages first, as CNTK's authors advise (docs/references.md)
        settings = {"momentum": momentum, "warmup": 5}
        found.append(Entry(f"bmuf, {short}", "bmuf", ranks, settings))
    pairs = {"group_size": min(GROUP, ranks)}
    found += [
        Entry("gossip_bmuf", "gossip_bmuf", gain=min(GROUP, ranks), settings=pairs),
        Entry("dpsgd, fixed_ring", "dpsgd"),
        Entry("delay_by_one", "delay_by_one"),
    ]
    for mixing in "fixed_ring", "random_ring", "random_pairs":
        found.append(Entry(f"adpsgd, {mixing}", "adpsgd", settings={"mixing": mixing}))
    found.append(Entry("async_sgd", "async_sgd", gain=ranks))
    if "hierarchical" in STRATEGIES and ranks % 2 == 0:
        # this machine is one node: two ranks play one, adpsgd is between them
        nodes = {"node_size": 2, "inner": "adpsgd"}
        found.append(Entry("hierarchical, adpsgd", "hierarchical", settings=nodes))
    return found


def configuration(
    entry: Entry, args: argparse.Namespace, corpus: str, ranks: int, seed: int
) -> dict[str, Any]:
    """Return the configuration of a row."""
    size = 1 if entry.alone else ranks
    window = args.samples // 20 if STRATEGIES[entry.strategy].synchronises else 0
    return {
        "data": {"corpus": corpus, "source": "pool", "chunk_windows": args.windows},
        "model": {"embed": args.embed, "hidden": args.embed, "dropout": args.dropout},
        "optim": {"name": "sgd", "lr": args.lr * size / entry.gain, "clip": 0.25},
        "schedule": {
            "name": "exponential",
            "final_ratio": args.final_ratio,
            "warmup_samples": args.samples // 10,
        },
        "strategy": {"name": entry.strategy, **entry.settings},
        "ema": {"samples": window},
        "train": {
            "samples": args.samples,
            "batch": args.batch,
            "unroll": args.unroll,
            "seed": seed,
            "test": False,
        },
    }


def train(entry: Entry, document: Mapping[str, Any], world: World, out: Path) -> None:
    """Train a row; what it came to stands in `out`. Collective."""
    config = resolve(document)
    if not entry.alone:
        Trainer(config, world, out).train()
    elif world.rank == 0:  # the others sleep at the barrier
        with MpiWorld(start_mpi().COMM_SELF) as own:
            Trainer(config, own, out).train()
    world.comm.Barrier()


def row(entry: Entry, summaries: Sequence[Mapping[str, Any]], lr: float) -> Row:
    """Return the row of an entry, from the summary of every seed."""

    def mean(key: str) -> float | str:
        values = [summary.get(key) for summary in summaries]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else "-"

    perplexities = [summary["valid_perplexity"] for summary in summaries]
    ranks = summaries[0]["ranks"]
    moved = sum(s["bytes_sent"] for s in summaries) / len(summaries) / ranks
    found = {
        "strategy": entry.name,
        "lr": lr,
        "perplexity": mean("valid_perplexity"),
        "worst rank": mean("worst_rank_valid_perplexity"),
        "ema": mean("ema_valid_perplexity"),
        "seconds": mean("train_seconds"),
        "MB sent/rank": moved / 1e6,
        "distance": mean("consensus_distance_relative"),
        "gap": mean("spectral_gap"),
        "idle": mean("idle"),
        "samples": round(sum(s["samples"] for s in summaries) / len(summaries)),
    }
    if len(summaries) > 1:
        found["spread"] = max(perplexities) - min(perplexities)
    return found


def markdown(rows: Sequence[Row]) -> str:
    """Return the table for docs/strategies.md.

    >>> print(markdown([{"strategy": "local", "perplexity": 212.345, "ema": "-"}]))
    | strategy | perplexity | ema |
    |---|---|---|
    | local | 212.3 | - |
    """
    digits = {"perplexity": 1, "worst rank": 1, "ema": 1, "seconds": 0, "spread": 1}
    digits |= {"MB sent/rank": 1, "distance": 4, "gap": 2, "idle": 2}

    def cell(name: str, value: Any) -> str:
        if isinstance(value, float) and name in digits:
            return f"{value:,.{digits[name]}f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(name, value) for name, value in one.items()] for one in rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text.replace("| --- ", "|---").replace("--- |", "---|")


@contextmanager
def workplace(world: World) -> Iterator[Path]:
    """Make a folder that all ranks of this machine see; remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="mpilm-") as own:
        yield Path(world.comm.allgather(own)[0])
        world.comm.Barrier()


def compare(world: MpiWorld, args: argparse.Namespace) -> None:
    """Train all rows and report."""
    with workplace(world) as folder:
        corpus = folder / "corpus.h5"
        with world.all_or_none():
            if world.rank == 0 and args.smoke:
                prepare_synthetic(corpus, vocab=args.vocab, tokens=5000)
            elif world.rank == 0:
                held_out = (SAMPLE / "wiki.test-a.tokens",)
                text = (SAMPLE / "wiki.valid.tokens",)
                prepare_text(text, held_out, held_out, corpus, vocab=args.vocab)
        found: dict[str, list[Any]] = {}
        chosen = [
            entry
            for entry in entries(world.size)
            if not args.only or entry.strategy in args.only
        ]
        rates = {}
        for seed in range(1, args.loops + 1):
            for number, entry in enumerate(chosen):
                document = configuration(entry, args, str(corpus), world.size, seed)
                rates[entry.name] = document["optim"]["lr"]
                out = folder / f"{number}-{seed}"
                if world.rank == 0:
                    print(f"\n== {entry.name}, seed {seed}", flush=True)
                train(entry, document, world, out)
                if world.rank == 0:
                    summary = json.loads((out / "summary.json").read_text())
                    found.setdefault(entry.name, []).append(summary)
        if world.rank != 0:
            return
        rows = [row(e, found[e.name], rates[e.name]) for e in chosen]
        title = f"Strategies on {world.size} ranks, {args.samples:,} samples"
        report("strategies", title, rows, args, comm=world.control)
        print(f"\n{markdown(rows)}")


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--samples", type=int, default=1_200_000, help="per row")
    arguments.add_argument("--lr", type=float, default=5.0, help="of one rank alone")
    arguments.add_argument("--final-ratio", type=float, default=0.05)
    arguments.add_argument("--vocab", type=int, default=5_000)
    arguments.add_argument("--embed", type=int, default=64, help="hidden units too")
    arguments.add_argument("--dropout", type=float, default=0.2)
    arguments.add_argument("--batch", type=int, default=10, help="B, sequences a rank")
    arguments.add_argument("--unroll", type=int, default=35, help="T, time steps")
    arguments.add_argument("--windows", type=int, default=10, help="in a chunk")
    arguments.add_argument("--only", nargs="+", help="strategies to train")
    args = arguments.parse_args()
    if args.smoke:
        args.loops, args.samples, args.vocab, args.embed = 1, 1200, 50, 8
        args.batch, args.unroll, args.windows = 2, 5, 2
    elif not SAMPLE.is_dir():
        print(f"skipped: no WikiText-2 sample in {DATA} (set MPILM_DATA)")
        return
    with MpiWorld(stall_s=0.0) as world, abort_on_error(world):
        compare(world, args)


if __name__ == "__main__":
    main()
