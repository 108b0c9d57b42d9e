"""The common pool: chunks of the data leased to whichever rank is free.

Why         With fixed shards a slow rank's part of the data is hardly seen, and a
            straggler looks worse than it is (docs/references.md). From a common pool it
            simply takes fewer chunks.
Notation    lease n -> chunk order(n // C)[n % C]: an endless sequence of epochs, each a
                       permutation of all C chunks drawn from (seed, epoch)
            chunk   -> W minibatches. Of text: B rows of W windows of T steps, one
                       contiguous stretch; the carried state is zeroed where it begins
Leases      In lockstep (no world) they are dealt in turn; otherwise the next one is a
            counter on rank 0, see counts.py. A rank asks for its next lease shortly
            before it needs it, so that the answer is there in time and a slow rank
            holds no chunk that others could begin.
Invariants  Every lease is given once. In C leases in a row every chunk is visited once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.batch import Batch, Batches
from mpilm.data.counts import Counts, counts_of
from mpilm.data.hdf5 import origin, read_tokens
from mpilm.errors import DataError
from mpilm.world.base import World

# Minibatches from the question for a lease to its use: a round trip beside computing
# ranks takes some milliseconds, pauses between two looks (world/mpi/progress.py).
# Chosen, not tuned.
AHEAD = 2
NUM_KNOWN = 1024  # leases that a rank remembers; chosen, not tuned


class LeasedBatches(Batches):
    """Endless minibatches of one rank from a common pool of chunks.

    num_chunks   chunks in an epoch, C
    lease        this rank's latest lease; -1: none yet

    Args:
        windows: minibatches in a chunk, W.
    """

    num_chunks: int

    def __init__(
        self, counts: Counts, geometry: dict[str, int], *, windows: int
    ) -> None:
        super().__init__(counts, geometry)
        self.lease = -1
        self._windows = self._window = windows
        self._is_open = False
        self._left: list[tuple[int, int]] = []  # leases that others had begun
        self._taken: deque[int] = deque(maxlen=NUM_KNOWN)  # the latest leases

    @abstractmethod
    def open(self, lease: int) -> None:
        """Make the chunk of a lease ready."""

    @abstractmethod
    def window(self, index: int) -> Batch:
        """Return a minibatch of the chunk."""

    @property
    def epoch(self) -> float:
        """Passes of all ranks over the data, where this rank's latest lease stands."""
        share = self._window / self._windows
        return max(0.0, (self.lease + share) / self.num_chunks)

    def draw(self) -> Batch:
        """Return the next minibatch; a chunk that is used up is followed by another.

        Communicates: out of lockstep: with the last but one minibatch of a chunk asks
            rank 0 for the next lease, 8 bytes there and back; at the start of a chunk
            takes the answer, and blocks if it is still under way.
        """
        if self._window == self._windows:
            if self._left:
                self.lease, self._window = self._left.pop(0)
            else:
                self.lease, self._window = self.counts.take(), 0
                self._taken.append(self.lease)
            self._is_open = False
        if not self._is_open:
            self.open(self.lease)
            self._is_open = True
        found = self.window(self._window)
        self._window += 1
        if self._window > self._windows - AHEAD and not self._left:
            self.counts.ask()
        return found

    def place(self) -> dict[str, Any]:
        held = {"lease": self.lease, "window": self._window}
        left = {"left": np.array(self._left, np.int64)} if self._left else {}
        return {**held, **left, **self.counts.state()}

    def survive(self) -> dict[str, Any]:
        held = {"lease": self.lease, "window": self._window}
        taken = np.array(self._taken, np.int64)
        left = np.array(self._left, np.int64)
        return {**held, "left": left, "taken": taken, **self._geometry}

    def go_to(self, place: dict[str, Any]) -> None:
        self.lease, self._window = int(place["lease"]), int(place["window"])
        self._is_open = False
        self._left = left_in(place)
        self.counts.load_state(place)

    def resize(self, places: Sequence[Mapping[str, Any]], rank: int, size: int) -> None:
        """Deal out what those ranks had in hand; then come the leases nobody has had.

        Nothing is left out, nothing seen twice.
        """
        left = [place for place in places if place]
        held = [(int(p["lease"]), int(p["window"])) for p in left]
        begun = [h for h in held if h[0] >= 0 and h[1] < self._windows]
        begun += [lease for place in left for lease in left_in(place)]
        if not all("next_lease" in place for place in places):  # ranks have died
            first, unbegun = not_taken(left)
        else:
            next_K = [int(place["next_lease"]) for place in places]
            first = max(next_K)
            unbegun = {int(n) for place in places for n in place.get("returned", ())}
            for next_ in next_K:  # in lockstep each has leases of its own
                unbegun |= set(range(next_, first, len(places)))
        begun += [(lease, 0) for lease in sorted(unbegun)]
        self.lease, self._window = max(lease for lease, _ in held), self._windows
        self._is_open = False
        self._left = begun[rank::size]
        self.counts.go_on(first)


def not_taken(places: Sequence[Mapping[str, Any]]) -> tuple[int, set[int]]:
    """Return the first lease nobody has had, and those before it to give again.

    Those that nobody who is left has taken, since the oldest that one of them holds:
    ranks that have died had them, or may have.
    """
    taken = {int(lease) for place in places for lease in place["taken"]}
    held = [int(place["lease"]) for place in places if int(place["lease"]) in taken]
    first = max(taken, default=-1) + 1
    return first, set(range(min(held, default=first), first)) - taken


def left_in(place: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the leases, each with its next minibatch, that wait for a rank."""
    left = np.asarray(place.get("left", ())).reshape(-1, 2)
    return [(int(lease), int(window)) for lease, window in left]


class PoolBatches(LeasedBatches):
    """Endless minibatches of text from the common pool.

    tokens       (N,) token ids: an HDF5 dataset or an array
    num_dropped  targets never visited: the tail that fills no chunk

    Args:
        batch: rows of a chunk, B.
        steps: time steps of a minibatch, T.
        chunk_windows: minibatches in a chunk, W.
        seed: of the order of chunks; the same on all ranks.
        world: ranks out of lockstep: leases come from a counter on rank 0; None: they
            are dealt in turn.

    Raises:
        DataError: there are fewer chunks than ranks.
    """

    def __init__(  # noqa: PLR0917 - as Streams, and the size of a chunk
        self,
        tokens: Any,
        batch: int,
        steps: int,
        chunk_windows: int,
        rank: int = 0,
        size: int = 1,
        *,
        seed: int,
        world: World | None = None,
    ) -> None:
        self._chunk_targets = batch * steps * chunk_windows
        self.num_chunks = (len(tokens) - 1) // self._chunk_targets
        if self.num_chunks < size:
            raise DataError(
                f"{size} ranks x batch {batch} x steps {steps} x chunk of"
                f" {chunk_windows} need at least {size * self._chunk_targets + 1}"
                f" tokens, {origin(tokens)} has {len(tokens)}"
            )
        geometry = {
            "ranks": size,
            "batch": batch,
            "steps": steps,
            "chunk_windows": chunk_windows,
            "tokens": len(tokens),
            "pool_seed": seed,
        }
        counts = counts_of(rank, size, world)
        super().__init__(counts, geometry, windows=chunk_windows)
        self.num_dropped = len(tokens) - 1 - self.num_chunks * self._chunk_targets
        self.tokens = tokens
        self._shape = (batch, chunk_windows, steps)
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))
        self._inputs_BWT: NDArray[Any] = np.zeros((0, 0, 0))
        self._targets_BWT: NDArray[Any] = np.zeros((0, 0, 0))

    def chunk(self, lease: int) -> int:
        """Return the chunk that a lease is for."""
        epoch, place = divmod(lease, self.num_chunks)
        if self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, order.permutation(self.num_chunks))
        return int(self._order[1][place])

    def open(self, lease: int) -> None:
        first = self.chunk(lease) * self._chunk_targets
        text = read_tokens(self.tokens, first, first + self._chunk_targets + 1)
        self._inputs_BWT = text[:-1].reshape(self._shape)
        self._targets_BWT = text[1:].reshape(self._shape)

    def window(self, index: int) -> Batch:
        inputs_TB = self._inputs_BWT[:, index].T.astype(np.int64, order="C")
        targets_TB = self._targets_BWT[:, index].T.astype(np.int64, order="C")
        return Batch(inputs_TB, targets_TB, targets_TB.size, index == 0)
