"""What a corpus asks of a model: which minibatches, how many inputs and outputs.

The trainer knows nothing else of words or frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mpilm.data.batch import Batch, Batches
from mpilm.data.hdf5 import Corpus
from mpilm.data.pool import PoolBatches
from mpilm.data.streams import EvaluationStreams, Streams
from mpilm.errors import DataError
from mpilm.world.base import World

if TYPE_CHECKING:
    from mpilm.config import Config, TrainConfig


class Task(ABC):
    """A corpus, as a model and the trainer see it.

    sample       what is counted: "token" or "frame"
    path         the corpus file
    splits       the names of its splits
    fingerprint  hash of what a model's inputs and outputs mean
    floor        perplexity that no model can get below, where it is known
    num_inputs   size of the vocabulary, or of a frame
    num_outputs  classes of the softmax
    num_train    samples of the train split
    """

    sample: ClassVar[str]
    path: Path
    splits: tuple[str, ...]
    fingerprint: str
    floor: float | None
    num_inputs: int
    num_outputs: int
    num_train: int

    @abstractmethod
    def batches(self, config: Config, world: World, *, lockstep: bool) -> Batches:
        """Return this rank's source of training minibatches.

        Raises:
            DataError: too little data for so many ranks.
        """

    @abstractmethod
    def evaluation(
        self, split: str, train: TrainConfig, rank: int, size: int
    ) -> Iterable[Batch]:
        """Return this rank's share of a split, each sample on exactly one rank.

        Raises:
            DataError: there is no such split.
        """

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return what a trained model needs to be used, for `vocabulary.json`."""

    def require_split(self, split: str) -> None:
        """Raise unless there is such a split.

        Raises:
            DataError: one line that names those there are.
        """
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(
                f"{self.path}: no split {split!r} (it has {known})", everywhere=True
            )


class LanguageTask(Task):
    """Predict the next word (or character) of running text."""

    sample = "token"

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.path, self.splits = corpus.path, corpus.splits
        self.fingerprint, self.floor = corpus.fingerprint, corpus.floor
        self.num_inputs = self.num_outputs = len(corpus.vocabulary)
        self.num_train = len(corpus.split("train"))

    def batches(self, config: Config, world: World, *, lockstep: bool) -> Batches:
        train, data = config.train, config.data
        tokens = self.corpus.split("train")
        if data.source == "shards":
            return Streams(tokens, train.batch, train.unroll, world.rank, world.size)
        return PoolBatches(
            tokens,
            train.batch,
            train.unroll,
            data.chunk_windows,
            world.rank,
            world.size,
            seed=train.seed,
            world=None if lockstep else world,
        )

    def evaluation(
        self, split: str, train: TrainConfig, rank: int, size: int
    ) -> Iterable[Batch]:
        self.require_split(split)
        tokens = self.corpus.split(split)
        return EvaluationStreams(tokens, train.eval_streams, train.unroll, rank, size)

    def description(self) -> dict[str, Any]:
        return {"level": self.corpus.level, "words": self.corpus.vocabulary}


def open_task(path: Path | str) -> Task:
    """Return the task of a corpus file.

    Raises:
        DataError: missing, empty, damaged, or not a corpus.
    """
    return LanguageTask(Corpus.open(path))
