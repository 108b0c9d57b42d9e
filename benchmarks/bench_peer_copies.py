"""What does a copy of each rank's state in the next rank's memory cost?

    mpirun -n 2 python benchmarks/bench_peer_copies.py \\
        --out benchmarks/results/peer_copies.json

Ranks train a language model by model_averaging and AdamW, real steps on a core each,
in blocks of --block steps, in turns: no copies; one every --every steps; in every step.
A step counts with all that follows it (copy, and what is still to be waited for), of
the slowest rank; the share is a ratio of two medians of blocks of this one run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import parser, report

from mpilm.config import resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.train.loop import Trainer
from mpilm.train.peer_copies import PeerCopies
from mpilm.world.base import World
from mpilm.world.mpi import run_mpi


class Watched(Trainer):
    """A trainer whose copies change from block to block.

    ways     steps between two copies -> what makes them; 0: nothing does
    ends_s   of the steps of a block
    blocks   steps between two copies -> seconds of each block, but the first
    held_s   seconds that each call for copies lasted that began one
    """

    def prepare(self, every: list[int], block: int) -> None:
        """Make what copies, before training. Collective."""
        self.ways = {n: PeerCopies(self.world, n) if n else None for n in every}
        self.block, self.began_s, self.shift = block, 0.0, every[1] // 2
        self.blocks: dict[int, list[float]] = {n: [] for n in every}
        self.held_s: dict[int, list[float]] = {n: [] for n in every}

    def look_after_saving(self) -> None:
        step = self.totals.step
        names = list(self.ways)
        place = step + self.shift  # copies fall due inside a block, not at its end
        way = names[(place - 1) // self.block % len(names)]
        began_s = time.perf_counter()
        self.saving.copies = copies = self.ways[way]
        if copies and place % self.block == 1:
            copies._next = None  # not what fell due in the blocks of others
        super().look_after_saving()
        if way and step % way == 0:
            self.held_s[way].append(time.perf_counter() - began_s)
        if place % self.block:
            return
        if copies:
            copies.settle()  # the block pays for what it has begun
        self.world.comm.Barrier()
        now_s = time.perf_counter()
        if place > self.block * len(names):  # the first ones ask for the memory
            self.blocks[way].append(now_s - self.began_s)
        self.began_s = now_s

    def judge(self) -> None:
        """Evaluate nothing: steps and copies are what is looked at."""


def settings(args: Any, corpus: Path, size: int, num_ways: int) -> dict[str, Any]:
    """Return the configuration of a run."""
    num_steps = args.block * num_ways * (1 + args.loops)
    return {
        "data": {"corpus": str(corpus)},
        "model": {"embed": args.hidden, "hidden": args.hidden, "layers": 2},
        "optim": {"name": "adamw", "lr": 0.001},
        "strategy": {"name": "model_averaging", "period": args.period},
        "train": {
            "batch": args.batch,
            "unroll": args.unroll,
            "samples": args.batch * args.unroll * size * num_steps,
            "test": False,
            "worst_rank": False,
            "device": "cpu",
        },
    }


def main(world: World, args: Any) -> None:
    """Train; report."""
    every = [0, args.every, 1]
    name = world.comm.allgather(tempfile.mkdtemp() if world.rank == 0 else "")[0]
    corpus = Path(name) / "corpus.h5"
    if world.rank == 0:
        tokens = 4 * args.batch * (args.unroll + 1) * world.size
        prepare_synthetic(corpus, vocab=args.vocab, tokens=max(20_000, tokens))
    world.comm.Barrier()
    config = resolve(settings(args, corpus, world.size, len(every)))
    trainer = Watched(config, world, Path(name) / "run")
    trainer.prepare(every, args.block)
    trainer.train()
    found = world.comm.allgather((trainer.blocks, trainer.held_s))
    rows = []
    plain_s = 0.0
    for way in every:
        slowest = [
            max(times) for times in zip(*(b[way] for b, _ in found), strict=True)
        ]
        step_s = statistics.median(slowest) / args.block
        plain_s = plain_s or step_s
        copies = trainer.ways[way]
        sent = copies.traffic.bytes_sent if copies else 0
        num = len(trainer.held_s[way])
        rows.append(
            {
                "copy every (steps)": way,
                "parameters": trainer.learner.layout.size,
                "blocks": len(slowest),
                "step (s)": step_s,
                "more than without (%)": 100.0 * (step_s / plain_s - 1.0),
                "of all blocks: least": min(slowest) / args.block,
                "most": max(slowest) / args.block,
                "a copy (MB)": sent / num / 1e6 if num else 0.0,
                "held up by one (s)": (
                    statistics.median(s for _, held in found for s in held[way])
                    if num
                    else 0.0
                ),
            }
        )
    if world.rank == 0:
        report("peer_copies", "Copies in a peer's memory", rows, args)


if __name__ == "__main__":
    arguments = parser(__doc__, warmup=0, loops=7)
    arguments.add_argument("--vocab", type=int, default=10_000)
    arguments.add_argument("--hidden", type=int, default=400)
    arguments.add_argument("--batch", type=int, default=20)
    arguments.add_argument("--unroll", type=int, default=35)
    arguments.add_argument("--period", type=int, default=10)
    arguments.add_argument("--every", type=int, default=10, help="steps")
    arguments.add_argument("--block", type=int, default=20, help="steps")
    arguments = arguments.parse_args()
    if arguments.smoke:
        arguments.vocab, arguments.hidden, arguments.loops = 100, 8, 1
        arguments.batch, arguments.unroll, arguments.block = 2, 5, 4
        arguments.every = 2
    run_mpi(lambda world: main(world, arguments))
