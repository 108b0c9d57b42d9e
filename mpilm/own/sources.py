"""Where the minibatches of a rank come from: a DataLoader, any iterable, an object.

    DataLoader of a data set with a length      dealt out over the ranks here: every
                                                sample of an epoch on one rank
    the same with a DistributedSampler          dealt out already
    the same from a function of the world       this rank's own data
    any other iterable, or `.next()`            this rank's own minibatches

With `shard = True` all of them are dealt out; of any other iterable a rank takes every
K-th minibatch, which must then come in the same order on all ranks. With
`shard = False` nothing is dealt out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from mpilm.errors import DataError
from mpilm.own.drawing import (
    EPOCH_SEED,
    DealtIndices,
    Drawing,
    Strided,
    copied,
    has_length,
    is_plain,
    minibatches_of,
    order_of,
    sampler_of,
)


class MinibatchSource(ABC):
    """Minibatches of one rank, epoch after epoch.

    geometry     what a place in the data depends on: name -> number
    per_epoch    samples of an epoch of all ranks; 0: not known
    num_dropped  samples that are left out of an epoch
    first        items in the first minibatch, where per_epoch counts items; else 0
    is_dealt     no other rank has the same minibatches
    """

    geometry: Mapping[str, int] = MappingProxyType({})
    per_epoch = 0
    num_dropped = 0
    first = 0
    is_dealt = False

    @abstractmethod
    def epoch(self, number: int, start: int) -> Iterator[Any]:
        """Return an iterator over an epoch, without its first `start` minibatches."""

    def state(self) -> dict[str, Any]:
        """Return what else its place in the data depends on."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""


class Loader(MinibatchSource):
    """A DataLoader of a data set with a length, dealt out over the ranks.

    Another DataLoader is made with its settings and a sampler of ours: where the order
    was that of the data set, or a shuffled one, it is drawn anew from `seed`; the
    elements of any other sampler are dealt out in turns.

    Args:
        own: whether the data is this rank's own: nothing is dealt out then.

    Raises:
        DataError: too little data for so many ranks.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        rank: int,
        size: int,
        *,
        seed: int,
        own: bool = False,
    ) -> None:
        self.seed, self.rank, self.is_dealt = seed, rank, not own
        share = (0, 1) if own else (rank, size)
        self.generator = torch.Generator()
        num_items = len(loader.dataset)  # type: ignore[arg-type]
        order = order_of(loader)
        self.sampler, self.skips = self._dealt(order, num_items, *share), 1
        draws, items = self.sampler, self.sampler.own
        if isinstance(draws, Strided) and order.batch is not None:
            draws = BatchSampler(draws, order.batch, order.drop_last)
            self.skips = order.batch
            items -= items % order.batch if order.drop_last else 0
        if not order.gives_lists:
            self.per_epoch = share[1] * items
            self.first = min(order.batch or 1, items)
        if isinstance(self.sampler, DealtIndices):
            self.num_dropped = num_items - self.per_epoch
        self.loader = copied(loader, generator=self.generator, **order.by(draws))
        batch = order.batch or 0
        self.geometry = {"items": num_items, "batch_size": batch, "ranks": size}

    def _dealt(self, order: Drawing, num_items: int, rank: int, size: int) -> Any:
        """Return the part of one of `size` ranks of what a sampler gives."""
        if not is_plain(order, num_items):
            return Strided(order.sampler, rank, size, seed=self.seed)
        found = DealtIndices(
            num_items,
            order.batch,
            rank,
            size,
            shuffle=isinstance(order.sampler, RandomSampler),
            drop_last=order.drop_last,
            seed=self.seed,
        )
        if found.own < 1:
            need = f"{order.batch} each" if order.drop_last else "one each"
            raise DataError(
                f"batches: a data set of {num_items} items cannot be dealt out over"
                f" {size} ranks, {need}"
            )
        return found

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        self.sampler.number, self.sampler.start = number, start * self.skips
        # of workers, and of a shuffling sampler that is not ours
        self.generator.manual_seed(
            (self.seed * EPOCH_SEED + number) * 1_000 + self.rank
        )
        return iter(self.loader)


class Own(MinibatchSource):
    """An iterable, as it is on this rank.

    Args:
        given: the iterable.
        make: returns it anew: for every epoch, if it is an iterator; None: there is no
            such function, and an iterator has one epoch.
        rank, size: take every K-th minibatch; of (0, 1) all.
        count: from a minibatch to its samples.

    once  whether there is one epoch only
    """

    def __init__(
        self,
        given: Iterable[Any],
        make: Callable[[], Iterable[Any]] | None,
        rank: int,
        size: int,
        count: Callable[[Any], int],
    ) -> None:
        self.given, self.make, self.rank, self.size = given, make, rank, size
        self.once = is_iterator(given) and make is None
        self._is_begun = False
        self.sampler = sampler_of(given)
        replicas = getattr(self.sampler, "num_replicas", 0)
        self.is_dealt = size > 1 or replicas > 0
        if replicas and hasattr(self.sampler, "__len__"):
            order, own = order_of(given), len(self.sampler)
            own -= own % order.batch if order.batch and order.drop_last else 0
            self.per_epoch, self.first = replicas * own, min(order.batch or 1, own)
        if isinstance(given, Sequence):
            if size == 1:
                self.per_epoch = sum(count(batch) for batch in given)
            self.geometry = {"minibatches": len(given)}

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        if self._is_begun and self.make and is_iterator(self.given):
            self.given = self.make()
        self._is_begun = True
        set_epoch = getattr(sampler_of(self.given), "set_epoch", None)
        if set_epoch:
            set_epoch(number)
        return islice(self.given, self.rank + start * self.size, None, self.size)


class Endless(MinibatchSource):
    """An object whose `.next()` gives minibatches without end."""

    def __init__(self, given: Any) -> None:
        self.given = given
        self.keeps_place = hasattr(given, "state") and hasattr(given, "load_state")

    def epoch(self, number: int, start: int) -> Iterator[Any]:
        if not self.keeps_place:
            for _ in range(start):
                self.given.next()
        while True:
            yield self.given.next()

    def state(self) -> dict[str, Any]:
        return dict(self.given.state()) if self.keeps_place else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.keeps_place:
            self.given.load_state(state)


def source_of(
    batches: Any,
    world: Any,
    *,
    shard: bool | None,
    seed: int,
    count: Callable[[Any], int],
) -> MinibatchSource:
    """Return the source of what somebody has given.

    Args:
        batches: see above; or a function from the world to it, called once more for
            every epoch if it gives an iterator.
        shard: see above; None: as said there.
        count: from a minibatch to its samples.

    Raises:
        DataError: it gives no minibatches, or is dealt out for other ranks.
    """
    rank, size = world.rank, world.size
    is_function = isinstance(batches, type) or (
        callable(batches)
        and not (hasattr(batches, "__iter__") or hasattr(batches, "next"))
    )
    found = batches(world) if is_function else batches
    if hasattr(found, "next") and not hasattr(found, "__iter__"):
        return Endless(found)
    if not isinstance(found, Iterable):
        raise DataError(
            f"batches: of type {type(found).__name__}: give a DataLoader, an iterable"
            " of minibatches, or a function from the world to one"
        )
    if isinstance(found, torch.Tensor | np.ndarray | str | bytes | dict):
        raise DataError(
            f"batches: a {type(found).__name__} is no series of minibatches: put a"
            " DataLoader around a data set, or a list around minibatches"
        )
    replicas = getattr(sampler_of(found), "num_replicas", None)
    if replicas is not None:
        of = getattr(sampler_of(found), "rank", rank)
        if (of, replicas) != (rank, size):
            raise DataError(
                f"batches: the sampler of the DataLoader is for rank {of} of"
                f" {replicas}, this is rank {rank} of {size}"
            )
    elif type(found) is DataLoader and has_length(found):
        own = is_function if shard is None else not shard
        return Loader(found, rank, size, seed=seed, own=own)
    make = (lambda: batches(world)) if is_function else None
    every = (rank, size) if shard and replicas is None else (0, 1)
    return Own(found, make, every[0], every[1], count)


def evaluation_of(batches: Any, rank: int, size: int, what: str) -> Iterable[Any]:
    """Return one rank's share of the minibatches of a split, in their order.

    Each is on one rank, and they are the same at any number of ranks.

    Raises:
        DataError: they cannot be gone through again and again.
    """
    found = (
        batches() if callable(batches) and not hasattr(batches, "__iter__") else None
    )
    found = batches if found is None else found
    if not isinstance(found, Iterable) or isinstance(found, torch.Tensor | str | dict):
        raise DataError(
            f"{what}: of type {type(found).__name__}: give a DataLoader, a list of"
            " minibatches, or a function that returns an iterator"
        )
    if is_iterator(found) and found is batches:
        raise DataError(
            f"{what}: an iterator is used up by one evaluation: give a list of"
            " minibatches, a DataLoader, or a function that returns the iterator"
        )
    if type(found) is DataLoader and has_length(found):
        order = order_of(found)
        whole = minibatches_of(order, len(found.dataset))  # type: ignore[arg-type]
        if not whole:
            raise DataError(f"{what}: has no minibatch")
        generator = torch.Generator().manual_seed(0)
        return copied(found, generator=generator, **order.by(whole[rank::size]))
    if isinstance(found, Sequence) and not len(found):
        raise DataError(f"{what}: has no minibatch")
    return islice(found, rank, None, size)


def is_iterator(found: Any) -> bool:
    """Return whether it can be gone through only once."""
    return isinstance(found, Iterator)
