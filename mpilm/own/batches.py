"""Any source of minibatches as the trainer wants it: endless, counted, resumable.

A place in the data is an epoch and the minibatches drawn of it. To go on there, a
DataLoader that is dealt out here skips indices; any other iterable is gone through
again up to that place; an object with `state` and `load_state` keeps its own.

What a data set draws from torch's random numbers (augmentation) comes from a state of
this rank's data alone, which is saved: not from that of dropout. (Workers have seeds of
their own, from those of the epoch; a resume within an epoch begins them anew.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any
from zlib import crc32

import torch
from torch.nn.utils.rnn import PackedSequence

from mpilm.data.batch import Batches
from mpilm.data.counts import Counts
from mpilm.errors import DataError
from mpilm.learner.minibatch import arrays
from mpilm.learner.parts import Parts
from mpilm.learner.random_state import RandomState
from mpilm.own.paced import Dealt, Paced
from mpilm.own.sources import Endless, MinibatchSource, Own
from mpilm.storage.saved import nested, under
from mpilm.world.base import World

SAME_DATA = (
    "all ranks got the same first minibatch: give each rank data of its own"
    " (batches = a function of the world), or shard = True"
)


class OwnBatches(Batches):
    """One rank's minibatches.

    Args:
        source: where they come from.
        counts: how far all ranks are.
        accumulate: minibatches in a step.
        count: from a minibatch to its samples.
        by_epochs: whether the run's length is in items of the data set.
        seed: of what is drawn while they are made; give each rank another.

    notes  what a person should be warned of; known after `start`
    """

    def __init__(
        self,
        source: MinibatchSource,
        counts: Counts | Paced | Dealt,
        world: World,
        *,
        accumulate: int,
        count: Callable[[Any], int],
        by_epochs: bool,
        seed: int,
    ) -> None:
        geometry = {**source.geometry, "accumulate": accumulate}
        super().__init__(counts, geometry)  # type: ignore[arg-type]
        self.source, self.world, self.count = source, world, count
        self.accumulate, self.num_dropped = accumulate, source.num_dropped
        self.by_epochs = by_epochs
        self.notes: list[str] = []
        self._random = RandomState(seed, torch.device("cpu"))
        self._number = self._drawn = 0  # of epochs; minibatches of this one
        self._iterator: Iterator[Any] | None = None
        self._per_epoch = 0  # minibatches, as the last epoch had them
        self._begin: dict[str, Any] = {}  # where it was before the first minibatch

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._number + self._drawn / max(self._per_epoch, self._drawn + 1)

    def start(self, goal: int = 0) -> None:
        super().start(goal)
        self._random.put_in_place()
        self._begin = self._place_of_source()
        first = self._draw_one()
        self._number = self._drawn = 0
        self._iterator = chain([first], self._rest())
        if self.by_epochs and not isinstance(self.counts, Dealt):
            self._require_items(self.count(first), self.source.first)
        if isinstance(self.counts, Paced | Dealt):
            self.counts.begin(self.accumulate * self.count(first))
        if self.world.size > 1 and not self.source.is_dealt:
            same = self.world.comm.allgather(checksum(first))
            if None not in same and len(set(same)) == 1:
                self.notes.append(SAME_DATA)

    def _require_items(self, samples: int, items: int) -> None:
        """Raise where an epoch, of items, would not be one by what is counted here.

        A data set may leave some out: half or twice as many are chosen, not tuned.

        Raises:
            DataError: one line with both numbers.
        """
        if items and not items <= 2 * samples <= 4 * items:
            raise DataError(
                f"epochs: a minibatch of {items} items of the data set counts as"
                f" {samples} samples: give samples, or a num_samples that counts items"
            )

    def draw(self) -> Any:
        self._random.put_in_place()
        if self.accumulate == 1:
            return self._draw_one()
        return Parts(self._draw_one() for _ in range(self.accumulate))

    def next(self) -> Any:
        drawn = self.draw()
        parts = drawn if isinstance(drawn, Parts) else [drawn]
        self.counts.drawn(sum(map(self.count, parts)))
        return drawn

    def _draw_one(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = self.source.epoch(self._number, self._drawn)
            for batch in self._iterator:
                self._drawn += 1
                return batch
            self._end_epoch()
        raise DataError("batches: an epoch of this rank has no minibatch")

    def _rest(self) -> Iterator[Any]:
        """Return what is left of this epoch. (An iterator may be false: its length.)"""
        return iter(()) if self._iterator is None else self._iterator

    def _end_epoch(self) -> None:
        if isinstance(self.source, Own) and self.source.once:
            raise DataError(
                f"batches: the iterator ended after {self._drawn} minibatches, and"
                " cannot begin again: give an iterable, or a function of the world that"
                " returns one"
            )
        self._iterator, self._per_epoch = None, self._drawn
        self._number, self._drawn = self._number + 1, 0

    def place(self) -> dict[str, Any]:
        return {
            "epoch": self._number,
            "drawn": self._drawn,
            "per_epoch": self._per_epoch,
            **(self._place_of_source() if self._number or self._drawn else self._begin),
            **(self.counts.state() if isinstance(self.counts, Paced | Dealt) else {}),
        }

    def _place_of_source(self) -> dict[str, Any]:
        return {
            **nested("random", self._random.state()),
            **nested("source", self.source.state()),
        }

    def go_to(self, place: dict[str, Any]) -> None:
        self._number, self._drawn = int(place["epoch"]), int(place["drawn"])
        self._per_epoch = int(place["per_epoch"])
        self._random.put_in_place()
        if isinstance(self.source, Own) and self.source.once:
            for _ in range(self._drawn):  # it has not begun but for the first ones
                next(self._rest(), None)
        elif isinstance(self.source, Endless) and not self.source.keeps_place:
            for _ in range(self._drawn):
                next(self._rest(), None)
        else:
            self._iterator = None
            self.source.load_state(under("source", place))
            self._iterator = self.source.epoch(self._number, self._drawn)
        self._random.load_state(under("random", place))
        if isinstance(self.counts, Paced | Dealt):
            self.counts.load_state(place)

    def close(self) -> None:
        self._iterator = None  # workers end
        super().close()


def checksum(batch: Any) -> int | None:
    """Return a checksum of what a minibatch holds; None: nothing to compare."""
    found = None
    for array in arrays(batch):
        content = array.data if isinstance(array, PackedSequence) else array
        content = torch.as_tensor(content)
        try:
            content = content.detach().cpu().contiguous().view(-1).view(torch.uint8)
        except RuntimeError:
            continue
        found = crc32(content.numpy().tobytes(), found or 0)
    return found
