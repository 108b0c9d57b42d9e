"""How a DataLoader draws from its data set, and how a rank draws its part of that.

the order of the data set, or shuffled      `DealtIndices`: drawn anew here
any other sampler or batch sampler          `Strided`: its elements in turns
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
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

EPOCH_SEED = 7_919  # keeps the seeds of epochs apart; a prime, no more


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
