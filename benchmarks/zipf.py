"""A text of the size and vocabulary of WikiText-103, of random words.

    python benchmarks/zipf.py --out wt103-size/     # 580 MB

Word v of V has probability proportional to 1/(v+1) (Zipf's law): the worst case for a
dictionary, as half of the words of a text are rarer than the 500th. Lines have 57 words
on average, as WikiText-103's; it has no order of words that could be learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

WORDS = 267_733  # with <unk> and <eos> 267,735
# words of the splits, line ends left out
TOKENS = {"train": 101_425_671, "valid": 213_886, "test": 241_211}
LINE = 57
BLOCK = 1 << 20


def write_zipf(path: Path, num_words: int, *, vocab: int = WORDS, seed: int = 1) -> int:
    """Write a text of `num_words` words; return how many lines it has."""
    rng = np.random.default_rng(seed)
    frequency = np.cumsum(1.0 / np.arange(1, vocab + 1))
    words = [f"w{v}" for v in range(vocab)]
    lines = 0
    with path.open("w") as file:
        for begin in range(0, num_words, BLOCK):
            number = min(BLOCK, num_words - begin)
            ids = np.searchsorted(frequency, rng.random(number) * frequency[-1])
            drawn = [words[v] for v in ids.tolist()]
            ends = np.flatnonzero(rng.random(number) * LINE < 1.0).tolist()
            for start, stop in zip([0, *ends], [*ends, number], strict=True):
                file.write(" ".join(drawn[start:stop]))
                file.write("\n")
            lines += len(ends) + 1
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, required=True, help="folder")
    arguments.add_argument("--smoke", action="store_true", help="a thousandth of it")
    args = arguments.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, (split, number) in enumerate(TOKENS.items(), start=1):
        number = number // 1000 if args.smoke else number
        path = args.out / f"wiki.{split}.tokens"
        lines = write_zipf(path, number, seed=seed)
        print(f"{path}: {number:,} words, {lines:,} lines")


if __name__ == "__main__":
    main()
