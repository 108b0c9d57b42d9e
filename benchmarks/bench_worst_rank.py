"""What does it cost to evaluate every rank's own model at the end of a run?

    python benchmarks/bench_worst_rank.py --out benchmarks/results/worst_rank.json

A short run of two virtual ranks of gossip_bmuf in one process, so that the CPU time of
the process is that of both ranks and of nothing else: without that evaluation, with it
as it is by default (`train.worst_rank_share`, a tenth of the run's work), and with all
of both splits, in turns. An LSTM language model of Python's documentation, and an LSTM
acoustic model of made frames. Every run evaluates the final model on both splits, once,
shared between the ranks; that is no part of the share. --smoke: a few steps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from harness import parser, report

from mpilm.config import Config, resolve
from mpilm.data.docs import prepare_docs
from mpilm.data.frames import FrameWriter
from mpilm.data.hdf5 import new_hdf5
from mpilm.train.loop import Trainer
from mpilm.world.virtual import run_virtual

RANKS = 2
VARIANTS: dict[str, dict[str, Any]] = {
    "without": {"worst_rank": False},
    "a tenth": {},
    "all": {"worst_rank_share": 1.0},
}


def words(folder: Path, samples: int) -> dict[str, Any]:
    """Return the run of a language model of 460,496 parameters."""
    prepare_docs(folder / "docs.h5", vocab=2000)
    return {
        "data": {"corpus": str(folder / "docs.h5")},
        "model": {"embed": 96, "hidden": 96},
        "optim": {"name": "adamw", "lr": 0.01, "clip": 1.0},
        "train": {"samples": samples, "batch": 8, "unroll": 20},
    }


def frames(folder: Path, samples: int) -> dict[str, Any]:
    """Return the run of an acoustic model; 100 utterances of 3 s to evaluate on."""
    rng = np.random.default_rng(1)
    with new_hdf5(folder / "frames.h5") as file:
        writer = FrameWriter(file, num_features=40, num_classes=100)
        for split, count in (("train", 400), ("valid", 50), ("test", 50)):
            for number in range(count):
                labels_T = np.repeat(rng.integers(0, 100, 30), 10).astype(np.int32)
                noise_TF = rng.standard_normal((300, 40))
                features_TF = (
                    noise_TF + np.eye(40)[labels_T % 40] * (1 + labels_T // 40)[:, None]
                )
                writer.append(split, f"{split}-{number}", features_TF, labels_T)
        writer.finish(folder / "frames.h5", {"command": "bench_worst_rank"})
    return {
        "data": {"corpus": str(folder / "frames.h5")},
        "model": {"name": "lstm_am", "hidden": 96, "layers": 2},
        "optim": {"name": "adamw", "lr": 0.01, "clip": 1.0},
        "train": {"samples": samples, "batch": 8, "unroll": 20},
    }


def cpu_s(config: Config, out: Path) -> float:
    """Return the CPU time of a run."""
    began_s = time.process_time()
    with redirect_stdout(StringIO()):
        run_virtual(lambda world: Trainer(config, world, out).train(), RANKS)
    return time.process_time() - began_s


def main() -> None:
    """Run the variants in turns."""
    asked = parser(__doc__, warmup=1, loops=5)
    asked.add_argument("--samples", type=int, default=20_000, help="of a run")
    args = asked.parse_args()
    if args.smoke:
        args.warmup, args.loops, args.samples = 0, 1, 4_000
    kinds: dict[str, Callable[[Path, int], dict[str, Any]]] = {
        "language model": words,
        "acoustic model": frames,
    }
    rows = []
    for kind, make in kinds.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            document = make(folder, args.samples)
            document["strategy"] = {"name": "gossip_bmuf", "period": 10}
            took: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            for turn in range(args.warmup + args.loops):
                for variant, more in VARIANTS.items():
                    train = {**document["train"], **more, "threads": 1}
                    config = resolve({**document, "train": train})
                    spent_s = cpu_s(config, folder / f"{variant}-{turn}")
                    if turn >= args.warmup:
                        took[variant].append(spent_s)
        base = np.array(took["without"])
        for variant, each in took.items():
            share = np.array(each) / base - 1.0
            rows.append(
                {
                    "model": kind,
                    "own models on": variant,
                    "CPU s (median)": float(np.median(each)),
                    "share of the run (median)": float(np.median(share)),
                    "least": float(share.min()),
                    "most": float(share.max()),
                }
            )
    title = f"{RANKS} ranks, {args.samples:,} samples, CPU time in turns"
    report("worst_rank", title, rows, args)


if __name__ == "__main__":
    main()
