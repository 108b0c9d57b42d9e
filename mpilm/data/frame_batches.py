"""Minibatches of frames, or of sub-sequences of frames, from a frames corpus.

Notation    item -> what is drawn at random: a frame with a label (a DNN), or a
                    sub-sequence of T frames (an LSTM)
            B -> batch, items of a minibatch      c -> context
            C -> cache, minibatches whose items are shuffled together
Shards      Utterances sorted by length, each to the rank with the fewest items (LPT);
            fixed for the whole run. Every rank takes min over ranks of floor(items / B)
            minibatches per epoch: the same number of synchronisations everywhere. What
            is left over is dropped; in every epoch it is something else.
Pool        No shards: a chunk is a stretch of an order of all utterances, leased to
            whoever is free (pool.py).
Order       Epoch e: the utterances in an order drawn from (seed, e), of shards from
            (seed, rank, e); their items in blocks of C minibatches (of a chunk: in the
            pool), shuffled in each block. A place in it is (e, minibatch): that is all
            a checkpoint holds.
Splicing    Input of frame t: frames t-c to t+c; beyond the ends of the utterance its
            first and last frame again. It is done when a minibatch is made, so that the
            cache holds each frame once.
Source      partition and cache: H. Su and H. Chen, arXiv 1507.01239, 2015;
            sub-sequences: X. Cui et al., arXiv 2110.11199, 2021 (docs/references.md).
Departs     from Su and Chen: the order of utterances is new in every epoch, and items
            are not carried over from one cache to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpilm.data.batch import Batch, Batches
from mpilm.data.counts import counts_of
from mpilm.data.frame_corpus import FrameSplit
from mpilm.data.frame_items import Block, Order, View, partition
from mpilm.data.pool import LeasedBatches
from mpilm.errors import DataError
from mpilm.seeds import FRAME_ORDER, derive
from mpilm.world.base import World


class FrameShards(Batches):
    """Endless minibatches of one rank's utterances.

    num_batches  minibatches in an epoch, the same on all ranks
    num_dropped  frames of all ranks that an epoch does not visit

    Args:
        batch: items of a minibatch, B.
        cache_frames: frames that are shuffled together.
        world: ranks out of lockstep: they count samples through it; None: in lockstep.

    Raises:
        DataError: fewer utterances than ranks, or too few items.
    """

    def __init__(  # noqa: PLR0917 - as Streams, and the size of the cache
        self,
        split: FrameSplit,
        view: View,
        batch: int,
        cache_frames: int,
        rank: int = 0,
        size: int = 1,
        *,
        seed: int,
        world: World | None = None,
    ) -> None:
        items_U = view.count(split)
        useful = np.flatnonzero(items_U)
        if len(useful) < size:
            raise DataError(
                f"{size} ranks need as many utterances with labels, the {split.name}"
                f" split of {split.path} has {len(useful)}",
                everywhere=True,
            )
        self._items_U = items_U[useful]
        ranks = partition(self._items_U, size)
        loads = np.bincount(ranks, self._items_U, size).astype(np.int64)
        self.num_batches = int(loads.min()) // batch
        if self.num_batches < 1:
            raise DataError(
                f"{size} ranks x {_minibatch(batch, view)}: the smallest share of the"
                f" {split.name} split of {split.path} has {loads.min()}",
                everywhere=True,
            )
        used = size * self.num_batches * batch
        self.num_dropped = (int(loads.sum()) - used) * view.item_frames
        self._batch, self._view = batch, view
        own = derive(FRAME_ORDER, seed, rank)
        self._order = Order(split, view, useful[ranks == rank], own)
        self._cache = max(1, cache_frames // (batch * view.item_frames))
        geometry = {
            "ranks": size,
            "batch": batch,
            "steps": view.steps,
            "cache": self._cache,
            "items": int(loads.sum()),
            "data_seed": seed,
        }
        super().__init__(counts_of(rank, size, world), geometry)
        self._passes = self._index = 0
        self._held = (-1, -1)
        self._block: Block | None = None

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._passes + self._index / self.num_batches

    def draw(self) -> Batch:
        which, place = divmod(self._index, self._cache)
        if self._held != (self._passes, which) or self._block is None:
            first, last = which * self._cache, (which + 1) * self._cache
            last = min(last, self.num_batches)
            self._block = None  # frees its memory before the next is read
            self._block = self._order.block(
                self._passes, first * self._batch, last * self._batch
            )
            self._held = (self._passes, which)
        at = place * self._batch
        found = self._block.batch(at, at + self._batch, self._view.item_frames)
        self._index += 1
        if self._index == self.num_batches:
            self._passes, self._index = self._passes + 1, 0
        return found

    def place(self) -> dict[str, Any]:
        return {"passes": self._passes, "index": self._index}

    def go_to(self, place: dict[str, Any]) -> None:
        self._passes, self._index = int(place["passes"]), int(place["index"])

    def resize(self, places: Sequence[Mapping[str, Any]], rank: int, size: int) -> None:
        """Go on at the same share of the epoch, in shares of another length."""
        left = [place for place in places if place]
        place = left[rank % len(left)]
        loads = np.bincount(partition(self._items_U, len(places)), self._items_U)
        num_batches = max(1, int(loads.min()) // self._batch)
        index = int(place["index"]) * self.num_batches // num_batches
        self._passes, self._index = int(place["passes"]), index


class FramePool(LeasedBatches):
    """Endless minibatches of one rank from the common pool, see pool.py.

    num_dropped  frames that an epoch does not visit

    Args:
        batch: items of a minibatch, B.
        chunk_batches: minibatches of a chunk; its items are shuffled together.
        world: ranks out of lockstep: leases come from a counter on rank 0; None: they
            are dealt in turn.

    Raises:
        DataError: fewer chunks than ranks.
    """

    def __init__(  # noqa: PLR0917 - as PoolBatches
        self,
        split: FrameSplit,
        view: View,
        batch: int,
        chunk_batches: int,
        rank: int = 0,
        size: int = 1,
        *,
        seed: int,
        world: World | None = None,
    ) -> None:
        useful = np.flatnonzero(view.count(split))
        self._order = Order(split, view, useful, seed)
        self._chunk_items = batch * chunk_batches
        num_items = self._order.num_items
        self.num_chunks = num_items // self._chunk_items
        if self.num_chunks < size:
            raise DataError(
                f"{size} ranks x {_minibatch(batch, view)} x chunk of {chunk_batches}:"
                f" the {split.name} split of {split.path} has {num_items}",
                everywhere=True,
            )
        geometry = {
            "ranks": size,
            "batch": batch,
            "steps": view.steps,
            "chunk_windows": chunk_batches,
            "items": num_items,
            "pool_seed": seed,
        }
        counts = counts_of(rank, size, world)
        super().__init__(counts, geometry, windows=chunk_batches)
        unused = num_items - self.num_chunks * self._chunk_items
        self.num_dropped = unused * view.item_frames
        self._batch, self._view = batch, view
        self._block: Block | None = None

    def open(self, lease: int) -> None:
        epoch, chunk = divmod(lease, self.num_chunks)
        first = chunk * self._chunk_items
        self._block = None  # frees its memory before the next is read
        self._block = self._order.block(epoch, first, first + self._chunk_items)

    def window(self, index: int) -> Batch:
        assert self._block is not None
        at = index * self._batch
        return self._block.batch(at, at + self._batch, self._view.item_frames)


def _minibatch(batch: int, view: View) -> str:
    if view.steps:
        return f"minibatch of {batch} sub-sequences of {view.steps} frames"
    return f"minibatch of {batch} frames"
