"""Does jobs/configs/wt103_lstm.toml train a corpus of WikiText-103's size on 4 ranks?

    mpirun -n 4 python benchmarks/bench_wt103.py --out benchmarks/results/wt103.json

The corpus is a random language of 267,735 words, 103 million of them (docs/data.md),
its valid split cut to 4,096 words: a full softmax over 267,735 words takes a core some
5 ms a word. The configuration is the preset's, but for the number of samples and the
warm-up. --corpus takes one that is there, --corpus NAME makes it where it is not.

step      wall and CPU time of `strategy.step` of each rank, the rounds that exchange
          included; ranks share the cores that there are
memory    resident while it trains, less what a process had before its model was made;
          beside the parameters, what a checkpoint holds of the strategy (the start and
          the momentum of blocks), and what torch hands out in a step
learns    perplexity on the valid split before, of a unigram model, and afterwards
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench_vocabulary import allocated_bytes, make_learner, resident, stepping
from harness import parser, report

from mpilm.config import read_config
from mpilm.data import synthetic
from mpilm.data.hdf5 import Corpus
from mpilm.train.evaluate import unigram_perplexity
from mpilm.train.loop import Trainer
from mpilm.world.mpi import MpiWorld

PRESET = Path(__file__).parents[1] / "jobs" / "configs" / "wt103_lstm.toml"
VOCAB, TOKENS, HELD_OUT = 267_735, 103_000_000, 4_097
GOAL_MEMORY = 1.15


def make_corpus(path: Path, args: argparse.Namespace) -> None:
    """Write the corpus, unless it is there."""
    if not path.exists():
        synthetic.MOST_HELD_OUT = HELD_OUT
        synthetic.prepare_synthetic(path, vocab=args.vocab, tokens=args.tokens)


class Measured(Trainer):
    """A trainer that notes what its steps take."""

    def set_up(self, *, resume: bool) -> None:
        gc.collect()
        self.libraries = resident("VmRSS")
        super().set_up(resume=resume)
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.memory = 0
        step = self.strategy.step

        def noted(learner: Any) -> Any:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            loss = step(learner)
            self.wall_s.append(time.perf_counter() - wall_s)
            self.cpu_s.append(time.process_time() - cpu_s)
            if len(self.wall_s) % 5 == 0:
                self.memory = max(self.memory, resident("VmRSS") - self.libraries)
            return loss

        self.strategy.step = noted  # type: ignore[method-assign]


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--corpus", type=Path, help="HDF5 file")
    arguments.add_argument("--samples", type=int, default=1_400_000)
    arguments.add_argument("--lr", type=float, help="in the preset's place")
    args = arguments.parse_args()
    args.vocab, args.tokens = (3000, 60_000) if args.smoke else (VOCAB, TOKENS)
    args.samples = 36_000 if args.smoke else args.samples
    with MpiWorld() as world:
        name = tempfile.mkdtemp() if world.rank == 0 else ""
        folder = Path(world.comm.allgather(name)[0])
        corpus = args.corpus or folder / "corpus.h5"
        if world.rank == 0:
            make_corpus(corpus, args)
        world.comm.allgather(None)  # it is there
        changes = [
            f"data.corpus={corpus}",
            f"train.samples={args.samples}",
            f"train.valid_every={args.samples // 2}",
            "train.test=false",
            "train.worst_rank=false",
            "checkpoint.every=0",
            f"schedule.warmup_samples={args.samples // 20}",
        ]
        changes += [f"optim.lr={args.lr}"] if args.lr else []
        if args.smoke:
            changes += [f"model.{key}=16" for key in ("embed", "hidden")]
            changes += ["model.sampled_frequent=500", "model.sampled_random=500"]
        config = read_config(PRESET, changes)
        warm = argparse.Namespace(vocab=3000, embed=8, hidden=8, layers=2)
        vars(warm).update(dropout=0.0, unroll=35, batch=20, device="cpu")
        stepping(make_learner(warm, sampled=True))()  # torch's libraries
        trainer = Measured(config, world, folder / "run")
        trainer.train()
        learner = trainer.learner
        activations = allocated_bytes(learner.gradient)
        theta = 4 * learner.layout.size
        kept = sum(
            getattr(value, "nbytes", 0) for value in trainer.strategy.state().values()
        )
        row = {
            "rank": world.rank,
            "step (ms, median)": 1e3 * median(trainer.wall_s),
            "mean (ms)": 1e3 * sum(trainer.wall_s) / len(trainer.wall_s),
            "CPU (ms, median)": 1e3 * median(trainer.cpu_s),
            "resident (MB)": trainer.memory / 1e6,
            "parameters (MB)": theta / 1e6,
            "strategy (MB)": kept / 1e6,
            "handed out in a step (MB)": activations / 1e6,
            "resident / (parameters + strategy)": trainer.memory / (theta + kept),
        }
        rows = world.comm.allgather(row)
        if world.rank != 0:
            return
        args.load = os.getloadavg()
        about = f"V={args.vocab} H={config.model.settings.hidden}"
        report("wt103", f"A step on {world.size} ranks, {about}", rows, args)
        with Corpus.open(corpus) as opened:
            unigram = unigram_perplexity(opened, "valid")
            floor = opened.floor
        totals = trainer.totals
        learned = {
            "strategy": config.strategy.name,
            "words": trainer.samples,
            "steps of a rank": totals.step,
            "training (s)": totals.train_seconds,
            "perplexity before": float(args.vocab),
            "unigram": unigram,
            "after": totals.valid_perplexity,
            "floor": floor,
            "sent by rank 0 (MB)": totals.bytes_sent / 1e6,
            # gossip_bmuf sends models and starts, bmuf sends and receives models
            "share of two models a block": totals.bytes_sent
            / (2 * theta * (totals.step // config.strategy.settings.period)),
        }
        report("wt103", f"A run on {world.size} ranks, {about}", [learned], args)
        worst = max(r["resident / (parameters + strategy)"] for r in rows)
        verdict = "met" if worst <= GOAL_MEMORY else "MISSED"
        print(f"goal {verdict}: memory {worst:.2f} <= {GOAL_MEMORY}")
        verdict = "met" if totals.valid_perplexity <= args.vocab / 10 else "MISSED"
        print(f"goal {verdict}: perplexity at most a tenth of what it was")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
