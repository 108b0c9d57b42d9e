"""What somebody has given to `mpilm.fit`, as the trainer sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import nn

from mpilm.data.batch import Batches
from mpilm.data.counts import Turns, counts_of
from mpilm.errors import DataError, ModelError
from mpilm.learner.learner import Learner
from mpilm.learner.minibatch import samples_of
from mpilm.learner.random_state import RandomState
from mpilm.own.batches import OwnBatches
from mpilm.own.paced import Dealt, Paced
from mpilm.own.sources import MinibatchSource, evaluation_of
from mpilm.train.task import Task
from mpilm.world.base import World

if TYPE_CHECKING:
    from mpilm.config import Config, TrainConfig

PACE = 5  # steps between two counts in lockstep, at least; chosen, not tuned


@dataclass
class Given:
    """What somebody has given, looked at.

    model      the module whose parameters are trained
    called     the one that is called: the same, or compiled
    source     of the training minibatches
    splits     what to evaluate, by name
    count      from a minibatch to its samples
    learner    of this rank
    scheduler  a torch scheduler of its optimiser, or None
    per_epoch  training samples of an epoch of all ranks; 0: not known
    hooks      in the optimiser, to be removed after training
    by_epochs  whether the length was given in epochs: of items of the data set
    """

    model: nn.Module
    called: Any
    source: MinibatchSource
    splits: dict[str, Any]
    count: Callable[[Any], int] = samples_of
    learner: Learner = field(init=False)
    scheduler: Any = None
    per_epoch: int = 0
    hooks: list[Any] = field(default_factory=list)
    by_epochs: bool = False


class OwnTask(Task):
    """To train a model of somebody's own."""

    sample = "sample"
    meaning = "set of parameters"
    measure = "loss"
    wrong = "error"

    def __init__(self, given: Given) -> None:
        self.given = given
        self.path = Path("the model")
        self.splits = tuple(given.splits)
        self.fingerprint = fingerprint_of(given.learner)
        self.floor, self.num_inputs, self.num_outputs = None, 0, 0
        self.num_train = given.per_epoch
        self._batches: OwnBatches | None = None

    @property
    def notes(self) -> list[str]:  # type: ignore[override]
        """What became clear of the data when training began."""
        return self._batches.notes if self._batches else []

    def batches(self, config: Config, world: World, *, lockstep: bool) -> Batches:
        counts: Any = Turns(0, 1)
        sampler: Any = getattr(self.given.source, "sampler", None)
        accumulate = config.optim.settings.accumulate
        is_even = self.given.source.is_dealt and hasattr(sampler, "after")
        by_items = self.given.by_epochs or self.given.count is samples_of
        if lockstep and by_items and is_even:
            counts = Dealt(world.size, sampler.after, accumulate)
        elif world.size > 1 and lockstep:
            period = getattr(config.strategy.settings, "period", 1)
            counts = Paced(world, max(PACE, period))
        elif world.size > 1:
            counts = counts_of(world.rank, world.size, world)
        self._batches = OwnBatches(
            self.given.source,
            counts,
            world,
            accumulate=accumulate,
            count=self.given.count,
            by_epochs=self.given.by_epochs,
            seed=data_seed(config.train.seed, world.rank),
        )
        return self._batches

    def evaluation(
        self, split: str, train: TrainConfig, rank: int, size: int
    ) -> Iterable[Any]:
        self.require_split(split)
        found = evaluation_of(self.given.splits[split], rank, size, split)
        return with_random(found, seed=data_seed(train.seed, rank))

    def evaluated(self, train: TrainConfig) -> list[str]:
        return [s for s in self.splits if s == "valid" or train.test]

    def description(self) -> dict[str, Any]:
        return {"model": type(self.given.model).__name__}

    def about(self, num_dropped: int) -> str:
        if not self.num_train:
            return "minibatches without a known end"
        left_out = f", {num_dropped:,} left out of each" if num_dropped else ""
        return f"{self.num_train:,} training samples in an epoch{left_out}"


def fingerprint_of(learner: Learner) -> str:
    """Return a hash of the names and shapes of what is trained."""
    entries = [(segment.name, segment.shape) for segment in learner.layout]
    return f"{crc32(repr(entries).encode()):08x}"


def data_seed(seed: int, rank: int) -> int:
    """Return the seed of what a rank's data draw; dropout has seed + rank.

    >>> data_seed(1, 0), data_seed(1, 1)
    (1000003, 1000004)
    """
    return seed * 1_000_003 + rank


def with_random(batches: Iterable[Any], *, seed: int) -> Iterator[Any]:
    """Yield minibatches that draw random numbers from a state of their own.

    They are the same in every evaluation, and training draws what it would have drawn.
    """
    random = RandomState(seed, torch.device("cpu"))
    random.put_in_place()
    found = iter(batches)
    while True:
        random.put_in_place()
        try:
            batch = next(found)
        except StopIteration:
            return
        yield batch


def count_of(given: Callable[[Any], int] | None) -> Callable[[Any], int]:
    """Return the function from a minibatch to its samples: a given one, `samples_of`.

    A run goes by samples: of minibatches without any it would never end.
    """
    if given is None:
        return samples_of

    def count(batch: Any) -> int:
        found: Any = given(batch)
        try:
            if int(found) == found > 0:
                return int(found)
        except (TypeError, ValueError):
            pass
        raise DataError(
            f"num_samples: returned {found!r} for a minibatch: a whole number above 0"
            " is wanted"
        )

    return count


def compiled(model: Any) -> tuple[nn.Module, Any]:
    """Return the module to train, and the one to call: `torch.compile` wraps it.

    Raises:
        ModelError: it is no module.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise ModelError(f"model: of type {type(model).__name__}, not a torch module")
    return inner, model


def loss_of(
    given: Given, loss: Callable[[Any, Any], Any] | None, autocast: str, device: str
) -> Callable[[Any, Any], Any]:
    """Return the loss as a Learner calls it.

    Raises:
        ModelError: there is none.
    """
    if loss is None:
        loss = getattr(given.model, "loss", None) and call_own
    if not callable(loss):
        raise ModelError(
            "loss: give a function from (model, minibatch) to the mean loss, or a model"
            " with a method loss(minibatch)"
        )

    def of(_: Any, batch: Any) -> Any:
        return loss(given.called, batch)

    if not autocast:
        return of
    cast = partial(
        torch.autocast, torch.device(device).type, dtype=getattr(torch, autocast)
    )

    def of_cast(_: Any, batch: Any) -> Any:
        with cast():
            return loss(given.called, batch)

    return of_cast


def call_own(model: Any, batch: Any) -> Any:
    """Return the loss as the model computes it itself."""
    return model.loss(batch)


def require_splits(splits: dict[str, Any]) -> None:
    """Raise unless each can be gone through again and again.

    Raises:
        DataError: one line that names the split.
    """
    for name, batches in splits.items():
        try:
            evaluation_of(batches, 0, 1, name)
        except TypeError as error:
            raise DataError(f"{name}: {error}") from None
