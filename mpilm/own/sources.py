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

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from mpilm.errors import DataError

EPOCH_SEED = 7_919  # keeps the seeds of epochs apart; a prime, no more


class MinibatchSource(ABC):
    """Minibatches of one rank, epoch after epoch.

    geometry     what a place in the data depends on: name -> number
    per_epoch    samples of an epoch of all ranks; 0: not known
    num_dropped  samples that are left out of an epoch
    is_dealt     no other rank has the same minibatches
    """

    geometry: Mapping[str, int] = MappingProxyType({})
    per_epoch = 0
    num_dropped = 0
    is_dealt = False

    @abstractmethod
    def epoch(self, number: int, start: int) -> Iterator[Any]:
        """Return an iterator over an epoch, without its first `start` minibatches."""

    def state(self) -> dict[str, Any]:
        """Return what else its place in the data depends on."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""


class Drawing(NamedTuple):
    """How a DataLoader draws from its data set.

    sampler      gives indices, or lists of them
    batch        indices in a minibatch; None: what the sampler gives is one
    drop_last    whether a smaller last one is left out
    gives_lists  whether the sampler gives lists
    """

    sampler: Any
    batch: int | None
    drop_last: bool
    gives_lists: bool

    def by(self, draws: Any) -> dict[str, Any]:
        """Return the settings of a DataLoader whose minibatches `draws` gives."""
        if self.gives_lists or self.batch is not None:
            return {"batch_sampler": draws}
        return {"sampler": draws, "batch_size": None}


class DealtIndices(BatchSampler):
    """Indices of one rank: an epoch is the same permutation on all ranks.

        rank r of K   order[r], order[r + K], ...  in minibatches of `batch`

    The last N mod K of the order are left out, so that all ranks take the same number
    of steps; where it is shuffled they are others in every epoch.

    Args:
        num_items: N.
        batch: indices in a minibatch; None: single indices come, not lists.
    """

    def __init__(
        self,
        num_items: int,
        batch: int | None,
        rank: int,
        size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int,
    ) -> None:
        self.num_items, self.batch = num_items, batch
        self.rank, self.size = rank, size
        self.shuffle, self.seed = shuffle, seed
        own = num_items // size
        self.own = own - own % (batch or 1) if drop_last else own
        self.number = self.start = 0

    def after(self, minibatches: int) -> int:
        """Return the items in so many minibatches of this rank.

        >>> turns = DealtIndices(9, 3, 0, 2, shuffle=False, drop_last=False, seed=0)
        >>> [turns.after(n) for n in range(5)]
        [0, 3, 4, 7, 8]
        """
        epochs, rest = divmod(minibatches, len(self))
        return epochs * self.own + min(rest * (self.batch or 1), self.own)

    def __len__(self) -> int:
        """Number of minibatches of an epoch."""
        return math.ceil(self.own / (self.batch or 1))

    def __iter__(self) -> Iterator[Any]:
        order = np.arange(self.num_items)
        if self.shuffle:
            np.random.default_rng((self.seed, self.number)).shuffle(order)
        own = order[self.rank :: self.size][: self.own].tolist()
        if self.batch is None:
            yield from own[self.start :]
            return
        for first in range(self.start * self.batch, self.own, self.batch):
            yield own[first : first + self.batch]


class Strided:
    """Every K-th element of what a sampler gives, from the r-th on.

    A sampler that draws from torch's random numbers draws the same on all ranks.

    own  elements of a rank in an epoch; 0: not known before
    """

    def __init__(self, sampler: Any, rank: int, size: int, *, seed: int) -> None:
        self.sampler, self.rank, self.size, self.seed = sampler, rank, size, seed
        self.own = len(sampler) // size if hasattr(sampler, "__len__") else 0
        self.number = self.start = 0

    def __iter__(self) -> Iterator[Any]:
        whole = zip(*[iter(self._order())] * self.size, strict=False)  # without tail
        own = (elements[self.rank] for elements in whole)
        return islice(own, self.start, None)

    def _order(self) -> Iterable[Any]:
        if not hasattr(self.sampler, "__len__"):  # it may be without end
            return self.sampler
        return drawn(self.sampler, self.seed * EPOCH_SEED + self.number)


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
            self.per_epoch = replicas * own
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


def minibatches_of(order: Drawing, num_items: int) -> list[Any]:
    """Return the indices of every minibatch, the same on all ranks.

    What a DistributedSampler would deal out is not dealt out once more.
    """
    whole: list[Any] = list(range(num_items))
    is_whole = isinstance(order.sampler, DistributedSampler)
    if not (is_whole or is_plain(order, num_items)):
        whole = drawn(order.sampler, 0)
    batch = order.batch
    if batch is None:
        return whole
    return [whole[n : n + batch] for n in range(0, len(whole), batch)]


def copied(loader: DataLoader[Any], **own: Any) -> DataLoader[Any]:
    """Return a DataLoader with the settings of another, but for some of its own."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers["prefetch_factor"] = loader.prefetch_factor
        workers["persistent_workers"] = loader.persistent_workers
        workers["multiprocessing_context"] = loader.multiprocessing_context
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        **workers,
        **own,
    )


def order_of(loader: Any) -> Drawing:
    """Return how a DataLoader draws; its batch sampler may be torch's or another."""
    by = loader.batch_sampler
    if by is None:
        return Drawing(loader.sampler, None, False, False)
    if type(by) is BatchSampler:
        return Drawing(by.sampler, by.batch_size, by.drop_last, False)
    return Drawing(by, None, False, True)


def sampler_of(found: Any) -> Any:
    """Return what gives the indices of a DataLoader; of anything else None."""
    return order_of(found).sampler if isinstance(found, DataLoader) else None


def drawn(sampler: Any, seed: int) -> list[Any]:
    """Return all that a sampler gives, as it draws at `seed` from torch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return list(sampler)


def is_plain(order: Drawing, num_items: int) -> bool:
    """Return whether it is that of the data set, or shuffled, no more."""
    sampler = order.sampler
    if type(sampler) is RandomSampler:
        return sampler.num_samples == num_items and not sampler.replacement
    return type(sampler) is SequentialSampler


def has_length(loader: DataLoader[Any]) -> bool:
    """Return whether a DataLoader draws by index from a data set with a length."""
    dataset = loader.dataset
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")


def is_iterator(found: Any) -> bool:
    """Return whether it can be gone through only once."""
    return isinstance(found, Iterator)
