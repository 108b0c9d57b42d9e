"""What a corpus asks of a model: which minibatches, how many inputs and outputs.

The trainer knows nothing else of words or frames.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mpilm.config import OWN
from mpilm.data.batch import Batches
from mpilm.data.frame_batches import FramePool, FrameShards
from mpilm.data.frame_corpus import FrameCorpus
from mpilm.data.frame_evaluation import FrameEvaluation
from mpilm.data.frame_items import View
from mpilm.data.hdf5 import Corpus, corpus_kind
from mpilm.data.pool import PoolBatches
from mpilm.data.streams import EvaluationStreams, Streams
from mpilm.errors import ConfigError, DataError
from mpilm.world.base import World

if TYPE_CHECKING:
    from mpilm.config import Choice, Config, TrainConfig


class Task(ABC):
    """A corpus, as a model and the trainer see it.

    sample       what is counted: "token" or "frame"
    meaning      what the fingerprint is of
    path         the corpus file
    splits       the names of its splits
    fingerprint  hash of what a model's inputs and outputs mean
    floor        perplexity that no model can get below, where it is known
    num_inputs   size of the vocabulary, or of a (spliced) frame
    num_outputs  classes of the softmax
    num_train    samples of the train split
    measure      how a model is judged: an attribute of `Quality`
    wrong        what the share of wrong guesses is called, where there is one
    notes        what a person should be warned of
    """

    measure: ClassVar[str] = "perplexity"
    wrong: ClassVar[str] = "frame_error"
    notes: Sequence[str] = ()
    sample: ClassVar[str]
    meaning: ClassVar[str]
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
    ) -> Iterable[Any]:
        """Return this rank's share of a split, each sample on exactly one rank.

        Raises:
            DataError: there is no such split.
        """

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return what a trained model needs to be used, for `vocabulary.json`."""

    def about(self, num_dropped: int) -> str:
        """Return a line on the data, of which so many samples are left out."""
        return (
            f"{self.path}: {self.num_train:,} training {self.sample}s,"
            f" {num_dropped:,} at the ends of the streams left out"
        )

    def evaluated(self, train: TrainConfig) -> list[str]:
        """Return the names of the splits that training evaluates."""
        test = ["test"] if train.test and "test" in self.splits else []
        return ["valid", *test]

    def require_evaluated(self, train: TrainConfig, rank: int, size: int) -> None:
        """Raise unless the splits that training evaluates can be evaluated.

        Raises:
            DataError: one is missing, or there is nothing to predict in it.
        """
        for split in self.evaluated(train):
            self.evaluation(split, train, rank, size)

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
    meaning = "vocabulary"

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.path, self.splits = corpus.path, corpus.splits
        self.fingerprint, self.floor = corpus.fingerprint, corpus.floor
        self.num_inputs = self.num_outputs = len(corpus.vocabulary)
        self.num_train = len(corpus.split("train"))

    def batches(self, config: Config, world: World, *, lockstep: bool) -> Batches:
        train, data = config.train, config.data
        tokens, counted_by = self.corpus.split("train"), None if lockstep else world
        found: Batches
        if data.source == "shards":
            found = Streams(
                tokens,
                train.batch,
                train.unroll,
                world.rank,
                world.size,
                world=counted_by,
            )
        else:
            found = PoolBatches(
                tokens,
                train.batch,
                train.unroll,
                data.chunk_windows,
                world.rank,
                world.size,
                seed=train.seed,
                world=counted_by,
            )
        found.accumulate = train.accumulate
        return found

    def evaluation(
        self, split: str, train: TrainConfig, rank: int, size: int
    ) -> Iterable[Any]:
        self.require_split(split)
        tokens = self.corpus.split(split)
        return EvaluationStreams(tokens, train.eval_streams, train.unroll, rank, size)

    def word_perplexity(self, split: str, loss: float) -> float | None:
        """Return the perplexity of a word, of pieces whose mean loss is known (nats).

        exp(loss * (N - 1) / (w - 1)): N tokens, w words and line ends, as level "word"
        counts them; of neither the first is predicted. None: tokens are no pieces.
        """
        num_words = self.corpus.num_words(split)
        if num_words < 2:
            return None
        return math.exp(loss * (len(self.corpus.split(split)) - 1) / (num_words - 1))

    def description(self) -> dict[str, Any]:
        found = {"level": self.corpus.level, "words": self.corpus.vocabulary}
        if self.corpus.tokenizer:
            found["tokenizer"] = self.corpus.tokenizer
        return found


class FrameTask(Task):
    """Classify the frames of speech.

    context  frames on either side that are spliced to the input

    Args:
        settings: the model's; they say how it looks at frames.
    """

    sample = "frame"
    meaning = "set of features and classes"

    def __init__(self, corpus: FrameCorpus, settings: Any) -> None:
        self.corpus, self._settings = corpus, settings
        self.path, self.splits = corpus.path, corpus.splits
        self.fingerprint, self.floor = corpus.fingerprint, None
        self.context = corpus.context if settings.context < 0 else settings.context
        self.num_inputs = corpus.num_features * (2 * self.context + 1)
        self.num_outputs = corpus.num_classes
        self.num_train = 0
        if "train" in corpus.splits:
            self.num_train = corpus.split("train").num_labelled

    def view(self, train: TrainConfig) -> View:
        """Return how the model looks at an utterance."""
        return frame_view(self._settings, self.context, train)

    def batches(self, config: Config, world: World, *, lockstep: bool) -> Batches:
        train, data = config.train, config.data
        self.require_split("train")
        self.require_split("valid")
        split, view = self.corpus.split("train"), self.view(train)
        rank, size = world.rank, world.size
        counted_by = None if lockstep else world
        found: Batches
        if data.source == "shards":
            found = FrameShards(
                split,
                view,
                train.batch,
                data.cache,
                rank,
                size,
                seed=train.seed,
                world=counted_by,
            )
        else:
            found = FramePool(
                split,
                view,
                train.batch,
                data.chunk_windows,
                rank,
                size,
                seed=train.seed,
                world=counted_by,
            )
        found.accumulate = train.accumulate
        return found

    def evaluation(
        self, split: str, train: TrainConfig, rank: int, size: int
    ) -> Iterable[Any]:
        self.require_split(split)
        frames, view = self.corpus.split(split), self.view(train)
        return FrameEvaluation(frames, view, train.eval_streams, rank, size)

    def description(self) -> dict[str, Any]:
        return {
            "features": self.corpus.num_features,
            "context": self.context,
            "classes": self.corpus.num_classes,
            "names": self.corpus.classes,
            "counts": self.corpus.counts.tolist(),
        }


def frame_view(settings: Any, context: int, train: TrainConfig) -> View:
    """Return how a model with these settings looks at an utterance."""
    if not settings.recurrent:
        return View(context)
    return View(context, train.unroll, settings.whole)


def open_task(path: Path | str, model: Choice | None = None) -> Task:
    """Return the task of a corpus file, for a model (None: of words).

    Raises:
        DataError: missing, empty, damaged, or not a corpus.
        ConfigError: a model of words, but a corpus of frames, or the other way round;
            or a model of somebody's own.
    """
    if model is None:
        return LanguageTask(Corpus.open(path))
    if model.name == OWN:
        raise ConfigError(
            "model.name = own: its program has the model and the data: start that one"
            " again, with resume = True in its call of mpilm.fit"
        )
    kind = corpus_kind(path)
    if kind != model.settings.reads:
        raise ConfigError(
            f"model.name = {model.name} reads a corpus of {model.settings.reads},"
            f" {path} is one of {kind}"
        )
    if kind == "frames":
        return FrameTask(FrameCorpus.open(path), model.settings)
    return LanguageTask(Corpus.open(path))
