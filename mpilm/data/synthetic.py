"""A synthetic language with a known entropy rate: a perplexity floor for any model.

Source      a Markov chain of order o over V words, made so that its entropy rate needs
            no stationary distribution.
Notation    context -> the last o words, one of V^o
            S[context] -> its k different successors, k = branching
            w_j -> probability of the j-th successor, the same in every context:
                   w_j = (1/j) / sum_i (1/i), j = 1..k (Zipf)
Entropy     p(next | context) = w_j for next = S[context][j], so in every context
                H = - sum_j w_j ln w_j   nats per word                         (1)
                floor = exp(H)                                                 (2)
            (1) is the entropy rate whatever the distribution over contexts; and the
            -ln p of successive words are independent draws of -ln w_J, so the mean over
            N words of an ideal predictor is H +- sqrt(Var(-ln w_J) / N).
Words       S[context][0..k-2] are drawn by Zipf frequency (word v: 1/(v+1)), so a few
            words are frequent and most are rare; S[context][k-1] is the next word on a
            random cycle through all words, so every word can be reached from every one.
Joins       A split is written by several chains side by side, each in its own stretch.
            The first o words of a stretch are drawn evenly from the vocabulary and do
            not follow (1): `joins` in the provenance counts them. They raise an ideal
            predictor's mean by at most joins * (ln V - H) / N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.hdf5 import SPLITS, CorpusWriter, PrepareSummary, ShowProgress, new_hdf5
from mpilm.errors import DataError

# Chains side by side: enough that numpy's overhead for one step is shared by many
# words. A chain is no shorter than LEAST_CHAIN, so joins are rare. Chosen, not tuned.
MOST_CHAINS = 1024
LEAST_CHAIN = 1 << 14
# Steps of all chains held at a time: 32 MB of ids.
BLOCK_STEPS = 1 << 13
# Entries of the successor table: 256 MB. Beyond that a language is too large.
MOST_SUCCESSORS = 1 << 26
# valid and test are 1/20 of the train split, but no longer than this.
MOST_HELD_OUT = 250_000


@dataclass(frozen=True)
class SyntheticLanguage:
    """The language itself: successors, their probabilities, and its entropy.

    >>> language = SyntheticLanguage(vocab=50, seed=1, branching=4)
    >>> language.successors.shape
    (50, 4)
    >>> round(language.entropy, 4), round(language.floor, 4)
    (1.2425, 3.4641)

    vocab       number of words, V
    seed        of the table of successors
    order       words in a context, o
    branching   successors of a context, k; None: 8, or half the vocabulary if fewer
    successors  (V^o, k) uint32; context (a, b) is row a*V + b

    Raises:
        DataError: the sizes do not fit together.
    """

    vocab: int
    seed: int
    order: int = 1
    branching: int | None = None
    weights: NDArray[np.float64] = field(init=False, repr=False, compare=False)
    successors: NDArray[np.uint32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        k = min(8, self.vocab // 2) if self.branching is None else self.branching
        if self.vocab < 4 or not 2 <= k <= self.vocab // 2:
            raise DataError(
                f"vocab {self.vocab}, branching {k}: at least 4 words, and 2 to vocab/2"
                " successors"
            )
        if self.order < 1 or self.vocab**self.order * k > MOST_SUCCESSORS:
            raise DataError(
                f"vocab {self.vocab}, order {self.order}, branching {k}: order is 1 or"
                f" more, and vocab^order * branching at most {MOST_SUCCESSORS}"
            )
        weights = 1.0 / np.arange(1, k + 1)
        object.__setattr__(self, "branching", k)
        object.__setattr__(self, "weights", weights / weights.sum())
        object.__setattr__(self, "successors", self._draw_successors(k))

    @property
    def entropy(self) -> float:
        """Entropy rate in nats per word, (1)."""
        return float(-np.sum(self.weights * np.log(self.weights)))

    @property
    def floor(self) -> float:
        """Perplexity of the ideal predictor, (2)."""
        return exp(self.entropy)

    def _draw_successors(self, k: int) -> NDArray[np.uint32]:
        """Return k different successors of every context."""
        rng = np.random.default_rng([self.seed, 0])
        num_contexts = self.vocab**self.order
        frequency = np.cumsum(1.0 / np.arange(1, self.vocab + 1))
        cycle = rng.permutation(self.vocab)
        after = np.empty(self.vocab, np.uint32)
        after[cycle] = np.roll(cycle, -1)
        table = np.empty((num_contexts, k), np.uint32)
        table[:, -1] = after[np.arange(num_contexts) % self.vocab]
        # Draw column by column; a word that the row has already is drawn again.
        for column in range(k - 1):
            taken = np.concatenate([table[:, :column], table[:, -1:]], axis=1)
            rows = np.arange(num_contexts)
            while len(rows):
                drawn = np.searchsorted(
                    frequency, rng.random(len(rows)) * frequency[-1]
                )
                table[rows, column] = drawn
                rows = rows[(taken[rows] == table[rows, column, None]).any(axis=1)]
        return table

    def generate(
        self, num_words: int, rng: np.random.Generator, block: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.uint32], int]]:
        """Yield (position, words, joins): stretches of a text of `num_words` words.

        Together they cover it once. Each chain goes on from block to block; `joins`
        counts the words of a stretch that do not follow the language.
        """
        block = block or BLOCK_STEPS
        num_chains = max(1, min(MOST_CHAINS, num_words // LEAST_CHAIN))
        bounds = np.array([num_words * c // num_chains for c in range(num_chains + 1)])
        longest = int(np.diff(bounds).max())
        cumulative = np.cumsum(self.weights)[:-1]
        last = rng.integers(self.vocab, size=(self.order, num_chains))
        for begin in range(0, longest, block):
            steps = min(block, longest - begin)
            words = np.empty((steps, num_chains), np.uint32)
            picks = np.searchsorted(
                cumulative, rng.random((steps, num_chains)), "right"
            )
            for step in range(steps):
                if begin + step < self.order:
                    words[step] = last[begin + step]
                    continue
                context = last[0]
                for word in last[1:]:
                    context = context * self.vocab + word
                words[step] = self.successors[context, picks[step]]
                last = np.concatenate([last[1:], words[None, step]]).astype(np.int64)
            for chain, (start, stop) in enumerate(pairwise(bounds.tolist())):
                length = min(steps, stop - start - begin)
                joins = max(0, min(self.order - begin, length))
                yield start + begin, words[:length, chain], joins

    def nll(self, tokens: NDArray[Any]) -> NDArray[np.float64]:
        """Return -ln p of tokens[order:] for a predictor that knows the language.

        At a join the language has no such successor: the predictor says 1/V there.
        """
        tokens = tokens.astype(np.int64)
        length = len(tokens) - self.order
        context = np.zeros(length, np.int64)
        for back in range(self.order):
            context = context * self.vocab + tokens[back : back + length]
        hit = self.successors[context] == tokens[self.order :, None]
        nll = -np.log(self.weights)[hit.argmax(axis=1)]
        return np.where(hit.any(axis=1), nll, np.log(self.vocab))


def prepare_synthetic(
    out: str | Path,
    *,
    vocab: int = 1000,
    tokens: int = 1_000_000,
    seed: int = 1,
    order: int = 1,
    branching: int | None = None,
    progress: ShowProgress | None = None,
) -> PrepareSummary:
    """Write a corpus in a synthetic language; its perplexity floor is in the summary.

    Args:
        vocab: words.
        tokens: length of the train split; valid and test are shorter.
        seed: of the language and of the text.
        order: words that the next one depends on.
        branching: words that can follow; fewer: a lower floor.
        progress: called with tokens done and in all.

    Raises:
        DataError: the sizes do not fit together, or `out` cannot be written.
    """
    if tokens < 1000:
        raise DataError(f"tokens: {tokens} are too few; 1000 is the least")
    if seed < 0:
        raise DataError(f"seed: {seed} is negative")
    out = Path(out)
    language = SyntheticLanguage(vocab, seed, order, branching)
    held_out = min(tokens // 20, MOST_HELD_OUT)
    sizes = {"train": tokens, "valid": held_out, "test": held_out}
    done, total, joins = 0, sum(sizes.values()), dict.fromkeys(SPLITS, 0)
    digits = len(str(vocab - 1))
    with new_hdf5(out) as file:
        writer = CorpusWriter(
            file,
            level="word",
            vocabulary=[f"w{word:0{digits}}" for word in range(vocab)],
            floor=language.floor,
        )
        for number, (name, num_words) in enumerate(sizes.items(), start=1):
            writer.grow(name, num_words)
            rng = np.random.default_rng([seed, number])
            for start, words, num_joins in language.generate(num_words, rng):
                writer.write(name, start, words)
                joins[name] += num_joins
                done += len(words)
                if progress:
                    progress(done, total)
        return writer.finish(
            out,
            {
                "command": "prepare synthetic",
                "options": {
                    "vocab": vocab,
                    "tokens": tokens,
                    "seed": seed,
                    "order": order,
                    "branching": language.branching,
                },
                "entropy_nats": language.entropy,
                "floor": language.floor,
                "joins": joins,
            },
        )
