"""How fast are corpora written, and what does drawing a minibatch cost?

    python benchmarks/bench_data.py --text some.txt

Times are CPU time of one process, so that a shared machine does not decide; the disk is
the page cache. Text: --text, or a synthetic text with words as frequent as in English.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Timing, parser, report

from mpilm.data.docs import prepare_docs
from mpilm.data.hdf5 import Corpus
from mpilm.data.pool import PoolBatches
from mpilm.data.sources import Part, Source
from mpilm.data.streams import Streams
from mpilm.data.synthetic import prepare_synthetic
from mpilm.data.vocabulary import ENCODERS

SHAPES = ((20, 35), (64, 128), (512, 35))  # batch, steps


def cpu_s(call: Callable[[], Any], args: Any) -> Timing:
    """Return the CPU seconds of the counted calls."""
    seconds = []
    for index in range(args.warmup + args.loops):
        start_s = time.process_time()
        call()
        if index >= args.warmup:
            seconds.append(time.process_time() - start_s)
    return Timing(tuple(seconds))


def write_text(path: Path, num_words: int) -> None:
    """Write a text whose words are as frequent as in English: the i-th has 1/i."""
    rng = np.random.default_rng(1)
    frequency = np.cumsum(1.0 / np.arange(1, 50_001))
    ids = np.searchsorted(frequency, rng.random(num_words) * frequency[-1])
    with path.open("w") as file:
        for line in np.array_split(ids, num_words // 50):
            file.write(" ".join(f"w{i}" for i in line.tolist()) + "\n")


def corpora(folder: Path, args: Any) -> list[dict[str, Any]]:
    """Return table 1."""
    text = args.text or folder / "text.txt"
    if args.text is None:
        write_text(text, args.tokens)
    rows = []

    def row(what: str, num_tokens: int, timing: Timing) -> None:
        rows.append(
            {
                "what": what,
                "tokens": num_tokens,
                "median (s)": timing.median_s,
                "min (s)": timing.min_s,
                "rate (M tokens/s)": num_tokens / timing.median_s / 1e6,
            }
        )

    for level, kind in ENCODERS.items():
        part = Part(Source(text, text.stat().st_size), 0, text.stat().st_size)

        def count(part: Part = part, kind: Any = kind) -> Any:
            encoder = kind()
            for block, _ in part.blocks(hashing=True):
                encoder.count(block)
            return encoder

        encoder = count()
        encoder.choose(None)

        def encode(part: Part = part, encoder: Any = encoder) -> int:
            return sum(len(encoder.encode(block)) for block, _ in part.blocks())

        num_tokens = encode()
        row(f"{level}: count, hash", num_tokens, cpu_s(count, args))
        row(f"{level}: encode", num_tokens, cpu_s(encode, args))

    def synthetic() -> None:
        prepare_synthetic(folder / "synthetic.h5", vocab=args.vocab, tokens=args.tokens)

    row(f"prepare synthetic, V {args.vocab}", args.tokens, cpu_s(synthetic, args))
    summary = prepare_docs(folder / "docs.h5")
    once = cpu_s(lambda: prepare_docs(folder / "docs.h5"), args)
    row("prepare docs", sum(summary.tokens.values()), once)
    return rows


def minibatches(folder: Path, args: Any) -> list[dict[str, Any]]:
    """Return table 2."""
    rows = []
    with Corpus.open(folder / "synthetic.h5") as corpus:
        tokens = corpus.split("train")
        for batch, steps in SHAPES:
            sources = {
                "streams": Streams(tokens, batch, steps),
                "pool": PoolBatches(tokens, batch, steps, 20, seed=1),
            }
            number = len(tokens) // (batch * steps)
            for name, source in sources.items():

                def epoch(source: Any = source, number: int = number) -> None:
                    for _ in range(number):
                        source.next()

                timing = cpu_s(epoch, args)
                rows.append(
                    {
                        "source": name,
                        "batch": batch,
                        "steps": steps,
                        "median (us/minibatch)": timing.median_s / number * 1e6,
                        "min (us/minibatch)": timing.min_s / number * 1e6,
                    }
                )
    return rows


def main() -> None:
    arguments = parser(__doc__, warmup=1, loops=5)
    arguments.add_argument("--text", type=Path, help="text file to encode")
    arguments.add_argument("--tokens", type=int, default=5_000_000)
    arguments.add_argument("--vocab", type=int, default=267_735)
    args = arguments.parse_args()
    if args.smoke:
        args.warmup, args.loops, args.tokens, args.vocab = 0, 1, 400_000, 1000
    with tempfile.TemporaryDirectory() as folder:
        report("data", "Corpora, CPU time", corpora(Path(folder), args), args)
        rows = minibatches(Path(folder), args)
        report("data", "Drawing a minibatch, CPU time", rows, args)


if __name__ == "__main__":
    main()
