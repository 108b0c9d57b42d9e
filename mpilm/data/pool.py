"""The common pool: chunks of text leased to whichever rank is free.

Why         With fixed shards a slow rank's part of the data is hardly seen, and a
            straggler looks worse than it is (PAPERS.md, trap 28). From a common pool it
            simply takes fewer chunks.
Notation    lease n -> chunk order(n // C)[n % C]: an endless sequence of epochs, each a
                       permutation of all C chunks drawn from (seed, epoch)
            chunk   -> B rows of W windows of T steps, one contiguous stretch of text;
                       the carried state is zeroed where a chunk begins
Lockstep    (no world) rank r of K takes leases r, r + K, r + 2K, ...: no messages.
Free        (a world)  the next lease is a counter on rank 0. A rank asks for its next
            lease as soon as it begins a chunk, so that the answer is there long before
            it is needed. An activity on rank 0 answers:

            rank r:  chunk 7 | ask .............. chunk 12 | ask ......
            rank 0:          serve: 12                      serve: 19
Messages    8 bytes to rank 0 and 8 bytes back for every chunk of another rank.
End         `close`: a rank takes its outstanding answer and starts a barrier; rank 0
            serves until the barrier is done, when nobody can ask any more.
Invariants  Every lease is given once. In C leases in a row every chunk is visited once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.batch import Batch
from mpilm.data.hdf5 import origin, read_tokens
from mpilm.data.streams import require_geometry
from mpilm.errors import DataError
from mpilm.world.base import (
    ANY_SOURCE,
    IN_PLACE,
    MAX,
    Activity,
    Comm,
    Message,
    Request,
    World,
    require_background,
)

ASK, LEASE = 1, 2  # tags


class PoolBatches:
    """Endless minibatches of one rank from the common pool.

    tokens       (N,) token ids: an HDF5 dataset or an array
    num_chunks   chunks in an epoch, C
    num_dropped  targets never visited: the tail that fills no chunk
    lease        this rank's latest lease; -1: none yet

    With a world, call `start` before the first minibatch and `close` after the last.

    Args:
        batch: rows of a chunk, B.
        steps: time steps of a minibatch, T.
        chunk_windows: minibatches in a chunk, W.
        seed: of the order of chunks; the same on all ranks.
        world: leases come from a counter on rank 0; None: they are dealt in turn.

    Raises:
        DataError: there are fewer chunks than ranks.
        WorldError: a world without background communication.
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
        self.num_dropped = len(tokens) - 1 - self.num_chunks * self._chunk_targets
        self.tokens = tokens
        self._shape = (batch, chunk_windows, steps)
        self._geometry = {
            "batch": batch,
            "steps": steps,
            "chunk_windows": chunk_windows,
            "tokens": len(tokens),
            "pool_seed": seed,
        }
        self._seed = seed
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))
        self._leases: Leases = (
            Counter(world) if world and world.size > 1 else Turns(rank, size)
        )
        self.lease = -1  # none yet
        self._window = chunk_windows
        self._inputs_BWT: NDArray[Any] | None = None
        self._targets_BWT: NDArray[Any] | None = None

    @property
    def epoch(self) -> float:
        """Passes of all ranks over the data so far, by this rank's latest lease."""
        if self.lease < 0:
            return 0.0
        share = self._window / self._shape[1]
        return (self.lease + share) / self.num_chunks

    @property
    def samples(self) -> int:
        """Samples that all ranks have drawn so far, by this rank's latest lease."""
        batch, windows, steps = self._shape
        return max(0, self.lease * windows + self._window) * batch * steps

    def start(self) -> None:
        """Begin to serve leases. With a world: collective, one Dup."""
        self._leases.start()

    def close(self) -> None:
        """End background work. With a world: collective, one barrier, blocking."""
        self._leases.close()

    def chunk(self, lease: int) -> int:
        """Return the chunk that a lease is for."""
        epoch, place = divmod(lease, self.num_chunks)
        if self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch])
            self._order = (epoch, order.permutation(self.num_chunks))
        return int(self._order[1][place])

    def next(self) -> Batch:
        """Return the next minibatch; a chunk that is used up is followed by another.

        Communicates: with a world, at the start of a chunk: takes the answer of 8 bytes
            asked for one chunk ago (blocks if it is still under way), asks for another.
        """
        if self._window == self._shape[1]:
            self.lease, self._window = self._leases.take(), 0
            self._inputs_BWT = None
        if self._inputs_BWT is None or self._targets_BWT is None:
            first = self.chunk(self.lease) * self._chunk_targets
            text = read_tokens(self.tokens, first, first + self._chunk_targets + 1)
            self._inputs_BWT = text[:-1].reshape(self._shape)
            self._targets_BWT = text[1:].reshape(self._shape)
        inputs_TB = self._inputs_BWT[:, self._window].T.astype(np.int64, order="C")
        targets_TB = self._targets_BWT[:, self._window].T.astype(np.int64, order="C")
        start = self._window == 0
        self._window += 1
        return Batch(inputs_TB, targets_TB, targets_TB.size, start)

    def state(self) -> dict[str, Any]:
        """Return this rank's lease and place in it, and the leases still to come.

        Communicates: with a world: collective, one Allreduce of 8 bytes, blocking.
        """
        return {
            "lease": self.lease,
            "window": self._window,
            **self._leases.state(self.lease),
            **self._geometry,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken, before the first minibatch.

        Communicates: with a world: collective, one barrier, blocking.

        Raises:
            DataError: it was taken from other data or another geometry.
        """
        require_geometry(self._geometry, state)
        self.lease, self._window = int(state["lease"]), int(state["window"])
        self._inputs_BWT = None
        self._leases.load_state(state)


class Turns:
    """Leases dealt in turn: rank r of K takes r, r + K, r + 2K, ..."""

    def __init__(self, rank: int, size: int) -> None:
        self._next, self._size = rank, size

    def start(self) -> None:
        """Nothing to begin."""

    def take(self) -> int:
        """Return this rank's next lease."""
        lease, self._next = self._next, self._next + self._size
        return lease

    def close(self) -> None:
        """Nothing to end."""

    def state(self, held: int) -> dict[str, Any]:
        """Return the next lease and the number of ranks that it is true for."""
        return {"next_lease": self._next, "ranks": self._size}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        require_geometry({"ranks": self._size}, state)
        self._next = int(state["next_lease"])


class Counter:
    """Leases from a counter on rank 0, one asked for ahead.

    Rank 0 takes its own leases from the counter itself, under the lock.
    """

    def __init__(self, world: World) -> None:
        require_background(world, "that is asynchronous, with the common pool of data,")
        self._world = world
        self._comm: Comm | None = None
        self._server: Activity | None = None
        self._lock = world.lock("pool")
        self._next = 0  # rank 0: the counter
        self._barrier: Request | None = None
        self._question = np.zeros(1, np.int64)
        self._answer = np.full(1, -1, np.int64)  # -1: none is held
        self._under_way: list[Request] = []

    def start(self) -> None:
        """Begin to serve on rank 0. Collective."""
        self._comm = self._world.comm.Dup()
        if self._comm.rank == 0:
            self._server = self._world.start(self._serve, "pool")

    def take(self) -> int:
        """Return the lease asked for before; ask for another."""
        comm = self._started()
        if self._barrier is not None:
            raise RuntimeError("the pool is closed")
        if comm.rank == 0:
            return self._count()
        if self._answer[0] < 0 and not self._under_way:
            self._ask(comm)
        self._settle()
        lease = int(self._answer[0])
        self._ask(comm)
        return lease

    def close(self) -> None:
        """Take the outstanding answer; serve until all ranks have. Collective."""
        comm = self._started()
        self._settle()
        self._barrier = comm.Ibarrier()
        if self._server:
            self._server.join()
            self._server = None
        else:
            self._barrier.Wait()

    def state(self, held: int) -> dict[str, Any]:
        """Return the lease held ahead, and the counter. Collective.

        The counter is one more than the latest lease of any rank, held or ahead: leases
        of a rank grow, so the latest one given anywhere is among them. Ranks that go on
        meanwhile take later ones, which a resumed run gives again.
        """
        comm = self._started()
        self._settle()
        ahead = int(self._answer[0])
        latest = np.array([max(held, ahead, -1)], np.int64)
        comm.Allreduce(IN_PLACE, latest, MAX)
        return {"ahead": ahead, "counter": int(latest[0]) + 1, "ranks": comm.size}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned. Collective: nobody asks before all have."""
        comm = self._started()
        require_geometry({"ranks": comm.size}, state)
        self._answer[0] = int(state["ahead"])
        self._next = int(state["counter"])
        comm.Barrier()

    def _started(self) -> Comm:
        if self._comm is None:
            raise RuntimeError("start() comes before the first minibatch")
        return self._comm

    def _count(self) -> int:
        with self._lock:
            lease, self._next = self._next, self._next + 1
        return lease

    def _ask(self, comm: Comm) -> None:
        self._answer[0] = -1
        self._under_way = [
            comm.Irecv(self._answer, 0, LEASE),
            comm.Isend(self._question, 0, ASK),
        ]

    def _settle(self) -> None:
        for request in self._under_way:
            request.Wait()
        self._under_way = []

    def _serve(self) -> None:
        """Answer every question until the barrier of `close` is done. On rank 0."""
        comm = self._started()
        question, answer = np.zeros(1, np.int64), np.zeros(1, np.int64)

        def asked_or_over() -> Message | bool:
            message = comm.Improbe(ANY_SOURCE, ASK)
            over = self._barrier is not None and self._barrier.Test()
            return message or over

        while True:
            message = self._world.wait(asked_or_over, "a question for the pool")
            if not isinstance(message, Message):
                return
            message.Recv(question)
            answer[0] = self._count()
            comm.Send(answer, message.source, LEASE)


Leases = Turns | Counter
