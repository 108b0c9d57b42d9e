"""A minibatch, and what every source of minibatches offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpilm.data.counts import Counts
from mpilm.errors import DataError, MpilmError
from mpilm.learner.parts import Parts
from mpilm.world.base import Traffic


class Batch(NamedTuple):
    """One minibatch.

    inputs       (T, B) int64 token ids, or (T, B, F) float32 frames
    targets      (T, B) int64; -1 where there is nothing to predict (padding)
    num_samples  predicted tokens or frames: targets that are not -1
    start        the carried recurrent state must be zeroed before this batch
    """

    inputs: NDArray[Any]
    targets: NDArray[np.int64]
    num_samples: int
    start: bool


class Batches(ABC):
    """An endless source of minibatches for one rank; it knows how far all ranks are.

    num_dropped  targets that are never visited (the tail that fills no minibatch)
    counts       how that is known, see counts.py

    accumulate   minibatches that make one step of the learner

    Call `start` before the first minibatch, `close` after the last.

    Args:
        counts: `counts_of` the world.
        geometry: what a place in the data depends on: name -> number.
    """

    num_dropped: int
    accumulate: int = 1

    def __init__(self, counts: Counts, geometry: dict[str, int]) -> None:
        self.counts, self._geometry = counts, geometry

    # what a source does
    @property
    @abstractmethod
    def epoch(self) -> float:
        """Passes over the data so far."""

    @abstractmethod
    def draw(self) -> Batch:
        """Return the next minibatch; after the last one the next epoch begins."""

    @abstractmethod
    def place(self) -> dict[str, Any]:
        """Return where this rank stands. As collective as `Counts.state`."""

    @abstractmethod
    def go_to(self, place: dict[str, Any]) -> None:
        """Go on from what `place` returned."""

    def resize(self, places: Sequence[Mapping[str, Any]], rank: int, size: int) -> None:
        """Go on where ranks of another number have stood; no communication.

        Args:
            places: where each of them was (`state`, `survive`); empty: it has died.
            rank, size: of this world.

        Raises:
            DataError: this source cannot do it.
        """
        raise DataError(
            f"resume: the place in the data is that of {len(places)} ranks, here are"
            f" {size}: data of your own cannot be split anew; resume with {len(places)}"
        )

    # for whoever trains with it
    def start(self, goal: int = 0) -> None:
        """Begin background work, if there is any.

        Args:
            goal: samples of all ranks at which the run ends, so that all know of it at
                once; 0: it has no such end.

        Raises:
            WorldError: out of lockstep, in a world without background communication.

        Communicates: out of lockstep collective, one Dup.
        """
        self.counts.start(goal)

    def close(self) -> None:
        """End background work, if there is any. Collective."""
        self.counts.close()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close at the end of the block, or when all ranks raise alike in it."""
        try:
            yield
        except MpilmError as error:
            if error.everywhere:
                self.close()
            raise
        self.close()

    def next(self) -> Batch | Parts:
        """Return the minibatch of the next step, or several that make one.

        After the last one the next epoch begins.

        Communicates: out of lockstep at most one message of 16 bytes, non-blocking;
            from the pool also the next lease, see `LeasedBatches.draw`.
        """
        if self.accumulate == 1:
            batch = self.draw()
            self.counts.drawn(batch.num_samples)
            return batch
        parts = Parts(self.draw() for _ in range(self.accumulate))
        self.counts.drawn(sum(part.num_samples for part in parts))
        return parts

    def done(self, own: int) -> int:
        """Return the samples of all ranks so far, as known here.

        In lockstep exact; otherwise minibatches that others have in work count, and
        what they drew in their last step or two may be missing.

        Args:
            own: samples that this rank has done.

        Communicates: as `next`; never blocks.
        """
        return self.counts.done(own)

    def synchronise(self, own: int) -> int:
        """Return the samples of all ranks, exactly. No minibatch is in work meanwhile.

        Args:
            own: samples that this rank has done.

        Communicates: out of lockstep collective, one Allreduce of 8K bytes, blocking.
        """
        return self.counts.synchronise(own)

    def survive(self) -> dict[str, Any]:
        """Return where this rank stands, after others have died. No communication."""
        return {**self.place(), **self._geometry}

    @property
    def traffic(self) -> Traffic:
        """What counting samples has taken of the world's bytes and messages."""
        return self.counts.traffic

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on from here.

        Communicates: from the pool out of lockstep collective, two small allgathers.
        """
        rest = {"rest": self.counts.rest} if self.counts.rest else {}
        return {**self.place(), **rest, **self._geometry}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken; `synchronise` comes next, on all ranks.

        Raises:
            DataError: it was taken from other data or another geometry.
        """
        require_geometry(self._geometry, state)
        self.go_to(state)
        self.counts.rest = int(state.get("rest", 0))

    def take_over(
        self, places: Sequence[Mapping[str, Any]], rank: int, size: int, samples: int
    ) -> None:
        """Go on from the places of ranks of another number: `synchronise` comes next.

        Every rank is taken to have done an equal share of the samples.

        Args:
            places: `state` or `survive` of each of those ranks; empty: it has died.
            rank, size: of this world.
            samples: of all of them.

        Raises:
            DataError: they are of other data or another geometry.
        """
        mine = {n: v for n, v in self._geometry.items() if n not in {"ranks", "rows"}}
        require_geometry(mine, next(place for place in places if place))
        self.resize(places, rank, size)
        self.counts.rest = samples % size


def require_geometry(mine: dict[str, int], state: Mapping[str, Any]) -> None:
    """Raise unless a saved data cursor means the same here.

    Raises:
        DataError: other data, ranks, batch or steps.
    """
    for name, value in mine.items():
        if int(state[name]) != value:
            raise DataError(
                f"resume: the place in the data was saved with {name} ="
                f" {int(state[name])}, this run has {value}: ranks, batch, unroll and"
                " corpus must stay as they were"
            )
