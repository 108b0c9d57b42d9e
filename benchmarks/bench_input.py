"""Does input ever hold up a learner? A corpus of WikiText-103's size, cold and warm.

    python benchmarks/bench_input.py --out benchmarks/results/input.json

Prepare   `mpilm prepare text` of a text of random words, V = 267,735 (zipf.py; --text
          takes another folder), in a process of its own: CPU time and peak memory. A
          small part of it beside the whole shows that memory does not grow with it.
Reader    CPU time of drawing a minibatch, beside that of a step that trains on it:
          sampled softmax with rows, two layers.
Ahead     wall time in `next()` while a learner computes (`busy`, 1 ms, in its place),
          the corpus thrown out of memory before, of calls that read a block: with and
          without reading ahead by the system (`Announcer`).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_vocabulary import make_learner, sizes
from harness import parser, report
from zipf import TOKENS, write_zipf

from mpilm.data import streams as streams_module
from mpilm.data.hdf5 import Announcer, Corpus
from mpilm.data.streams import Streams

GOAL_TOKENS_PER_S, GOAL_FEED = 1e6, 20.0
BUSY_S = 1e-3


def prepared(text: Path, out: Path) -> dict[str, Any]:
    """Return what `prepare text` of a folder took."""
    code = (
        "import sys; from mpilm.data.text import prepare_text;"
        "made = prepare_text(sys.argv[1], None, None, sys.argv[2]);"
        "print(sum(made.tokens.values()), made.vocabulary);"
        "status = open('/proc/self/status').read();"  # ru_maxrss has the parent's, too
        "print(status.split('VmHWM:')[1].split()[0])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code, str(text), str(out)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    tokens, vocab, peak_kib = map(int, found.split())
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "tokens": tokens,
        "V": vocab,
        "CPU (s)": cpu_s,
        "rate (M tokens/s)": tokens / cpu_s / 1e6,
        "peak memory (MB)": peak_kib * 1024 / 1e6,
    }


def reader(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return CPU times of a minibatch and of the step that trains on it."""
    with Corpus.open(path) as corpus:
        own = sizes(args, len(corpus.vocabulary), args.hidden)
        streams = Streams(corpus.split("train"), args.batch, args.unroll)
        number = min(streams.num_windows, 50 * args.loops)
        start_s = time.process_time()
        for _ in range(number):
            streams.next()
        draw_s = (time.process_time() - start_s) / number
        learner = make_learner(own, sampled=True)
        learner.batches = streams
        steps = []
        for index in range(args.warmup + args.loops):
            start_s = time.process_time()
            learner.gradient()
            learner.update()
            if index >= args.warmup:
                steps.append(time.process_time() - start_s)
    step_s = median(steps)
    return {
        "V": own.vocab,
        "H": args.hidden,
        "minibatch (us CPU)": 1e6 * draw_s,
        "step (ms CPU)": 1e3 * step_s,
        "reader faster by": step_s / draw_s,
    }


def forget(path: Path) -> None:
    """Throw a file out of the system's memory."""
    os.sync()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def without_reading_ahead() -> Iterator[None]:
    """Let nothing be announced in the block."""
    real = Announcer.will_read
    Announcer.will_read = lambda *_: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Announcer.will_read = real  # type: ignore[method-assign]


def cold(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return wall times in `next()` of an epoch's first minibatches from the disk."""
    forget(path)
    x = torch.ones(128, 128)
    calls = []
    with Corpus.open(path) as corpus:
        streams = Streams(corpus.split("train"), args.batch, args.unroll)
        streams.next()  # the first block nobody could announce
        blocks = 1 + args.loops
        number = min(streams.num_windows, streams._rows.num_ahead * blocks)
        for _ in range(number):
            start_s = time.perf_counter()
            streams.next()
            calls.append(time.perf_counter() - start_s)
            until_s = time.perf_counter() + BUSY_S
            while time.perf_counter() < until_s:
                x.mm(x)
        num_ahead = streams._rows.num_ahead
    reading = calls[num_ahead - 1 :: num_ahead]  # the others copy from memory
    return {"reading (ms)": 1e3 * float(np.median(reading)), "calls": number}


def ahead(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return `cold` with and without reading ahead, in turns."""
    found: dict[str, list[dict[str, Any]]] = {"by the system": [], "none": []}
    for _ in range(1 if args.smoke else 3):
        found["by the system"].append(cold(path, args))
        with without_reading_ahead():
            found["none"].append(cold(path, args))
    return [
        {
            "reading ahead": name,
            "minibatches": each[0]["calls"],
            "a call that reads (ms, median)": median(e["reading (ms)"] for e in each),
        }
        for name, each in found.items()
    ]


def main() -> None:
    arguments = parser(__doc__, warmup=2, loops=8)
    arguments.add_argument("--text", type=Path, help="folder of a text to prepare")
    arguments.add_argument("--hidden", type=int, default=512, help="H")
    arguments.add_argument("--unroll", type=int, default=35, help="T, time steps")
    arguments.add_argument("--batch", type=int, default=20, help="B, sequences")
    args = arguments.parse_args()
    share, vocab = 1, 267_733
    if args.smoke:
        args.loops, args.warmup, args.hidden, share, vocab = 1, 0, 8, 500, 5000
        streams_module.READ_AHEAD_TOKENS = 1 << 14
    torch.set_num_threads(1)
    goals: list[str] = []

    def goal(what: str, value: float, least: float) -> None:
        verdict = "met" if value >= least else "MISSED"
        goals.append(f"goal {verdict}: {what} {value:.3g} >= {least:.3g}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for part in (20, 1):
            text = args.text if args.text and part == 1 else folder / f"text-{part}"
            if not text.exists():
                text.mkdir()
                for seed, (split, number) in enumerate(TOKENS.items(), start=1):
                    number //= share * part
                    write_zipf(text / f"{split}.txt", number, vocab=vocab, seed=seed)
            rows.append(prepared(text, folder / "corpus.h5"))
        report("input", "prepare text, one core", rows, args)
        goal("M tokens/s", rows[-1]["rate (M tokens/s)"], GOAL_TOKENS_PER_S / 1e6)
        row = reader(folder / "corpus.h5", args)
        report("input", "Reader beside a step", [row], args)
        goal("reader over step", row["reader faster by"], GOAL_FEED)
        rows = ahead(folder / "corpus.h5", args)
        report("input", "A minibatch whose block is not in memory", rows, args)
    print("\n".join(goals))


if __name__ == "__main__":
    main()
