"""What does a checkpoint every few steps cost: written beside training, or waited for?

    python benchmarks/bench_checkpoints.py --out benchmarks/results/checkpoints.json

One rank trains a language model of 98 million parameters (V = 33,278, two layers of
1,150, as in AWD-LSTM on WikiText-2) by real steps of 20 x 35 samples. Ways, in turns:
no checkpoint; one every --every steps, written beside training; the same, and training
waits. Held up is how long a call to save lasts: the copy, or the writing; the
first one also asks for the memory. Its share is of the seconds of all steps and saves.
Steps beside a writer may be longer, the others have a median of their own. Resume: to
find, check and load the last one.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness import parser, report

from mpilm.config import resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.storage.checkpoint import Checkpoints
from mpilm.train.loop import Trainer
from mpilm.world.base import World
from mpilm.world.mpi import run_mpi

WAYS = ("none", "beside", "waiting")


class Watched(Trainer):
    """A trainer that notes when steps end, and how long it was held up by saves.

    ends_s     of the steps
    held_s     seconds of each save but that of the end
    slowed     numbers of the steps that ended while one was being written
    on_disk_s  seconds from the begin of a save to the step that found it written
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.ends_s: list[float] = []
        self.held_s: list[float] = []
        self.on_disk_s: list[float] = []
        self.slowed: set[int] = set()
        super().__init__(*arguments, **options)

    def look_after_saving(self) -> None:
        super().look_after_saving()
        self.ends_s.append(time.perf_counter())
        writer = self.saving.beside and self.saving.beside._writer
        if self.held_s and writer is not None and not self.is_written:
            self.slowed.add(len(self.ends_s))
            self.is_written = writer.is_done
            if self.is_written:
                self.on_disk_s.append(self.ends_s[-1] - self.began_s)

    def save(self, *, beside: bool = False) -> None:
        self.began_s, self.is_written = time.perf_counter(), False
        super().save(beside=beside)
        if len(self.ends_s) < self.num_steps:
            self.held_s.append(time.perf_counter() - self.began_s)

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        train = self.config.train
        return train.samples // (train.batch * train.unroll)

    def judge(self) -> None:
        """Evaluate nothing: steps and saves are what is looked at."""


def settings(args: Any, corpus: Path, way: str) -> dict[str, Any]:
    """Return the configuration of a run."""
    samples = args.batch * args.unroll
    return {
        "data": {"corpus": str(corpus)},
        "model": {"embed": args.hidden, "hidden": args.hidden, "layers": 2},
        "optim": {"name": args.optim, "lr": 0.1 if args.optim == "sgd" else 0.001},
        "train": {
            "batch": args.batch,
            "unroll": args.unroll,
            "samples": samples * (args.every * args.saves + args.every + 1),
            "test": False,
            "worst_rank": False,
            "device": args.device,
        },
        "checkpoint": {
            "every": 0 if way == "none" else samples * args.every,
            "keep": 1,
            "beside": way == "beside",
        },
    }


def row(way: str, trainer: Watched, args: Any) -> dict[str, Any]:
    """Return what was seen of a way."""
    ends_s, held_s = trainer.ends_s, trainer.held_s
    steps_s = {n: b - a for n, (a, b) in enumerate(pairwise(ends_s), start=2)}
    for number, seconds in enumerate(held_s, start=1):  # after so many steps
        steps_s[args.every * number + 1] -= seconds
    plain = [s for n, s in steps_s.items() if n not in trainer.slowed]
    slowed = [s for n, s in steps_s.items() if n in trainer.slowed]
    total_s = ends_s[-1] - ends_s[0]
    return {
        "way": way,
        "steps": len(steps_s),
        "step (s)": statistics.median(plain),
        "beside a writer (s)": statistics.median(slowed) if slowed else "",
        "saves": len(held_s),
        "held up: first (s)": held_s[0] if held_s else "",
        "held up: median of the others (s)": (
            statistics.median(held_s[1:]) if held_s[1:] else ""
        ),
        "held up, of all time (%)": 100.0 * sum(held_s) / total_s,
        "first left out (%)": 100.0 * sum(held_s[1:]) / total_s,
        "on the disk at the end of a step (s)": max(trainer.on_disk_s, default=""),
        "all (s)": total_s,
    }


def main(world: World, args: Any) -> None:
    """Train each way; report."""
    rows, resumed = [], []
    with tempfile.TemporaryDirectory(dir=args.disk) as name:
        folder = Path(name)
        corpus = folder / "corpus.h5"
        tokens = args.batch * (args.unroll * args.every * (args.saves + 2) + 1) * 2
        prepare_synthetic(corpus, vocab=args.vocab, tokens=max(tokens, 20_000))
        for way in args.ways:
            config = resolve(settings(args, corpus, way))
            trainer = Watched(config, world, folder / way)
            num_parameters = trainer.learner.layout.size
            trainer.train()
            rows.append({**row(way, trainer, args), "parameters": num_parameters})
            checkpoints = Checkpoints(folder / way / "checkpoints", world)
            del trainer
            gc.collect()
            began_s = time.perf_counter()
            newest = checkpoints.latest()
            found_s = time.perf_counter() - began_s
            assert newest is not None
            checkpoints.load(newest)
            resumed.append(
                {
                    "way": way,
                    "size (MB)": sum(f.stat().st_size for f in newest.path.iterdir())
                    / 1e6,
                    "found and checked (s)": found_s,
                    "loaded (s)": time.perf_counter() - began_s - found_s,
                }
            )
            report("checkpoints", "One checkpoint every few steps", rows, args)
            report("checkpoints", "Resume", resumed, args)


if __name__ == "__main__":
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--vocab", type=int, default=33_278)
    arguments.add_argument("--hidden", type=int, default=1_150)
    arguments.add_argument("--batch", type=int, default=20)
    arguments.add_argument("--unroll", type=int, default=35)
    arguments.add_argument("--optim", default="sgd")
    arguments.add_argument("--every", type=int, default=10, help="steps")
    arguments.add_argument("--saves", type=int, default=2)
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    arguments.add_argument("--disk", type=Path, help="folder for the checkpoints")
    arguments = arguments.parse_args()
    if arguments.smoke:
        arguments.vocab, arguments.hidden = 100, 8
        arguments.batch, arguments.unroll, arguments.every = 2, 5, 3
    run_mpi(lambda world: main(world, arguments))
