"""Perplexity of a model on a split, and text from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from mpilm.data.hdf5 import Corpus, read_tokens
from mpilm.data.streams import EvaluationStreams
from mpilm.errors import DataError
from mpilm.strategies import Strategy
from mpilm.strategies.ema import Ema
from mpilm.world.base import IN_PLACE, World

if TYPE_CHECKING:
    from mpilm.config import TrainConfig
    from mpilm.learner import Learner


def evaluate(
    learner: Learner, corpus: Corpus, split: str, train: TrainConfig, world: World
) -> float:
    """Return the perplexity of the learner's model on `split`.

        perplexity = exp( -(1/N) sum_n ln p(w_n | w_<n) )

    The split is cut into `train.eval_streams` sequences, whatever the number of ranks,
    and every rank evaluates some of them; every word is predicted exactly once. So the
    result does not depend on the number of ranks, but for rounding.

    Raises:
        DataError: the corpus has no such split.

    Communicates: collective, one Allreduce of 16 bytes, blocking.
    """
    if split not in corpus.splits:
        known = ", ".join(corpus.splits)
        raise DataError(
            f"{corpus.path}: no split {split!r} (it has {known})", everywhere=True
        )
    streams = EvaluationStreams(
        corpus.split(split), train.eval_streams, train.unroll, world.rank, world.size
    )
    nll_and_count = np.array(learner.evaluate(streams), dtype=np.float64)
    world.comm.Allreduce(IN_PLACE, nll_and_count)
    nll, count = nll_and_count
    try:
        return math.exp(nll / count)
    except OverflowError:
        return math.inf


@contextmanager
def swapped(learner: Learner, source: Strategy | Ema) -> Iterator[None]:
    """Let the learner hold the final model of `source` inside the block.

    Communicates: collective, what `source.final_model_` does.
    """
    theta = learner.theta.clone()
    source.final_model_(learner, learner.theta)
    try:
        yield
    finally:
        learner.theta.copy_(theta)


def unigram_perplexity(corpus: Corpus, split: str, block: int = 1 << 20) -> float:
    """Return the perplexity on `split` of the word frequencies of the train split.

    Every word of the vocabulary counts once more than it was seen (add-one), so that no
    probability is zero. The first token is left out, as in `evaluate`.
    """
    counts = corpus.counts + 1.0
    nll = -np.log(counts / counts.sum())
    tokens = corpus.split(split)
    total = sum(
        float(nll[read_tokens(tokens, start, start + block)].sum())
        for start in range(1, len(tokens), block)
    )
    return math.exp(total / (len(tokens) - 1))
