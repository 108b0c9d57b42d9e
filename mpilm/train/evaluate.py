"""How good a model is on a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilm.data.hdf5 import Corpus, read_tokens
from mpilm.storage.aside import Aside
from mpilm.strategies import Strategy
from mpilm.strategies.ema import Ema
from mpilm.world.base import IN_PLACE, World

if TYPE_CHECKING:
    from mpilm.config import TrainConfig
    from mpilm.learner.evaluation import Sums
    from mpilm.learner.learner import Learner
    from mpilm.train.task import Task


Watch = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Quality:
    """How good a model is on a split.

    loss   mean negative log-likelihood of a sample, nats
    error  share of samples whose class was not the likeliest; NaN: not measured
    """

    loss: float
    error: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def short(self, measure: str) -> str:
        """Return it in few words, for models that are judged by `measure`."""
        if measure == "loss":
            return f"loss {self.loss:.4f}"
        return f"frame error {self.error:.2%}"

    def text(self, measure: str) -> str:
        """Return it in words, for models that are judged by `measure`."""
        if measure != "loss":
            return str(self)
        error = "" if math.isnan(self.error) else f", error {self.error:.2%}"
        return f"loss {self.loss:.4f}{error}"

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"perplexity {self.perplexity:.2f}"
        return f"frame error {self.error:.2%}, cross-entropy {self.loss:.4f}"


def evaluate(
    learner: Learner,
    task: Task,
    split: str,
    train: TrainConfig,
    world: World,
    *,
    watch: Watch = iter,
) -> Quality:
    """Return how good the learner's model is on `split`.

        perplexity = exp( -(1/N) sum_n ln p(w_n | w_<n) )

    The split is cut into pieces that do not depend on the number of ranks, and every
    rank evaluates some of them; every sample counts exactly once. So the result does
    not depend on the number of ranks, but for rounding.

    Args:
        watch: is handed the minibatches, and yields them on.

    Raises:
        DataError: the corpus has no such split.

    Communicates: collective, one Allreduce of 24 bytes, blocking.
    """
    share = task.evaluation(split, train, world.rank, world.size)
    sums = learner.evaluate(watch(share))
    if world.eval_s:
        world.sleep(sums.num_targets * world.eval_s)
    return together(sums, world)


def evaluate_alone(
    learner: Learner,
    task: Task,
    split: str,
    train: TrainConfig,
    *,
    most: int | None = None,
    watch: Watch = iter,
) -> tuple[Quality, int]:
    """Return how good the learner's model is on `split`, and on how many samples.

    No communication.

    Args:
        most: stop after so many samples.
        watch: see `evaluate`.
    """
    batches = watch(task.evaluation(split, train, 0, 1))
    sums = learner.evaluate(batches, most)
    return quality(sums.nll, sums.num_targets, sums.errors), sums.num_targets


def evaluate_each(
    learner: Learner,
    task: Task,
    split: str,
    train: TrainConfig,
    world: World,
    *,
    most: int | None = None,
    watch: Watch = iter,
) -> tuple[list[Quality], int]:
    """Return how good every rank's own model is on `split`, by rank; on how many.

    All ranks work at the same time, each on the same samples.

    Args:
        most: see `evaluate_alone`; the same on all ranks.

    Communicates: collective, a small allgather, blocking.
    """
    own, count = evaluate_alone(learner, task, split, train, most=most, watch=watch)
    if world.eval_s:
        world.sleep(count * world.eval_s)
    return world.comm.allgather(own), count


def quality(nll: float, count: float, errors: float) -> Quality:
    """Return the means of sums over a split; of nothing they are NaN."""
    if not count:
        return Quality(math.nan, math.nan)
    return Quality(float(nll / count), float(errors / count))


@contextmanager
def swapped(
    learner: Learner, source: Strategy | Ema, folder: Path | None = None
) -> Iterator[None]:
    """Let the learner hold the final model of `source` inside the block.

    Afterwards it has its own again, buffers and all.

    Args:
        folder: where a long theta waits in a file meanwhile; None: in memory.

    Communicates: collective, what `source.final_model_` does.
    """
    if holds_final(source):  # there is nothing to be put back
        yield
        return
    theta, rest = learner.theta, learner.rest.copy()
    with Aside(theta, folder) as own:
        try:
            source.final_model_(learner, theta)
            yield
        finally:
            own.put_back_()
            learner.rest.put_back(rest)


def holds_final(source: Strategy | Ema) -> bool:
    """Return whether theta is the final model: the mean of one rank's."""
    is_mean = getattr(type(source), "final_model_", None) is Strategy.final_model_
    return is_mean and source.world.size == 1  # type: ignore[union-attr]


def evaluate_mean(
    strategy: Strategy, learner: Learner, batches: Iterable[Any]
) -> Quality:
    """Return how good the model of all ranks is by now; training goes on as it was.

    In a loop of one's own, at a place that all ranks come to; out of lockstep it ends
    background work there first.

    Args:
        strategy: what trains the learner.
        learner: this rank's.
        batches: this rank's share of what to evaluate on.

    Communicates: collective, `strategy.final_model_` and an Allreduce of 24 bytes.
    """
    if not strategy.lockstep:
        strategy.retire(learner)
        strategy.finish(learner)
    with swapped(learner, strategy):
        return together(learner.evaluate(batches), strategy.world)


def together(sums: Sums, world: World) -> Quality:
    """Return the means over all ranks' sums. Collective, an Allreduce of 24 bytes."""
    errors = sums.errors if sums.num_targets else 0.0
    total = np.array([sums.nll, sums.num_targets, errors])
    world.comm.Allreduce(IN_PLACE, total)
    return quality(*total)


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
