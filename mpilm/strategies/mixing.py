"""The mean over some ranks of one vector each, on its way while the rank computes.

Notation    S    sources: the ranks whose vectors are averaged, this one included
            x_j  vector of rank j
Update      out <- (1/|S|) sum_(j in S) x_j                                    (1)
Messages    x_j to each destination of j (Isend), one from each source (Irecv). Vectors
            of one rank arrive in the order of its rounds (MPI's messages do not
            overtake): so each is added in the round it belongs to, however far ahead
            its sender is.

            rank i: | Isend x_i, Irecv x_j | computing ........ | Wait, out <- mean |
Wire        in another format than float32, x_j - Q(x_j) is added to rank j's mean (1).
Invariants  the vectors are added in the order of ranks (a + b = b + a), so all ranks
            with the same sources get the same bits, whenever the messages come.
Cost        a buffer for one source, two for more; with more buffers more vectors are
            received at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from mpilm.vectors import chunked, copy_of
from mpilm.world.base import Comm, Request


class Mean:
    """One mean on its way.

    Args:
        vector: x of this rank; not to be changed before `finish_`.
        members: S, in any order, with this rank or without.
        destinations: ranks that have this one among their sources; None: those of S.

    vector    x of this rank
    sources   the other ranks of S, ascending
    sends     one for each destination
    receives  one for each source, as far as they are started, with its buffer

    Communicates: pairwise, `vector` to each destination; not blocking.
    """

    def __init__(
        self,
        comm: Comm,
        vector: Any,
        members: Iterable[int],
        *,
        destinations: Iterable[int] | None = None,
        tag: int = 0,
    ) -> None:
        self.comm, self.vector, self.tag = comm, vector, tag
        self.sources = sorted(set(members) - {comm.rank})
        to = self.sources if destinations is None else destinations
        self.sends = [comm.Isend(vector, rank, tag) for rank in to]
        self.receives: list[tuple[Request, Any]] = []

    @property
    def num_bytes(self) -> int:
        """Bytes sent, where the sources are the destinations as many as received."""
        return self.comm.item_bytes * len(self.vector) * len(self.sends)

    def receive(self, buffers: Sequence[Any]) -> None:
        """Start receiving, as many vectors at once as there are buffers.

        Args:
            buffers: each as long as `vector`: one for one source, two or more for more.

        Communicates: pairwise, a vector from each source; not blocking.
        """
        for buffer in buffers:
            self._receive_next(buffer)

    def _receive_next(self, buffer: Any) -> None:
        """Start receiving from the next source, if there is one left."""
        place = len(self.receives)
        if place < len(self.sources):
            request = self.comm.Irecv(buffer, self.sources[place], self.tag)
            self.receives.append((request, buffer))

    def finish_(self, out: Any = None) -> None:
        """Write the mean (1) into `out`, or over `vector`.

        Args:
            out: may be the first buffer.

        Communicates: waits for all that was started, and for further vectors one by
            one in the last buffers.
        """
        out = self.vector if out is None else out
        left = self.comm.left_of(self.vector) if self.sources else None
        if left is not None:
            self.vector -= left  # exact: what the others have got
        addends = self._addends()
        total = next(addends)
        for addend in islice(addends, max(0, len(self.sources) - 1)):
            total += addend
        last = next(addends, None)
        for send in self.sends:
            send.Wait()
        if last is None:  # there is no other
            if out is not total:
                out[:] = total
            return
        if last is out:
            total, last = last, total  # a + b = b + a, and nothing to copy
        elsewhere = total is not out
        for sum_, addend, mean in chunked(total, last, out):
            sum_ += addend
            if elsewhere:
                mean[:] = sum_
            mean /= 1 + len(self.sources)  # times float32(1/3) grows by 3e-8 a round
        if left is not None:
            out += left
            if out is not self.vector:
                self.vector += left

    def finish_without_(self, left_out: Collection[int], out: Any = None) -> None:
        """Write the mean (1) over all but some ranks of S; as `finish_`.

        Their vectors are received and not looked at.

        Args:
            left_out: ranks, not all of S; this one may be among them.
        """
        out = self.vector if out is None else out
        left, own = self.comm.left_of(self.vector), self.vector
        if left is not None:
            own = own - left  # what the others have got
        total: Any = None
        count, rank = 0, self.comm.rank
        places = {source: place for place, source in enumerate(self.sources)}
        for member in sorted({*self.sources, rank}):
            addend = own
            if member != rank:
                request, addend = self.receives[places[member]]
                request.Wait()
            if member not in left_out:
                total = copy_of(addend) if total is None else total + addend
                count += 1
            if member != rank:
                self._receive_next(addend)
        for send in self.sends:
            send.Wait()
        total /= count
        out[:] = total
        if left is not None and rank not in left_out:
            out += left

    def _addends(self) -> Iterator[Any]:
        """Yield the vectors in the order of ranks, but this rank's never first of more.

        If it should be, it is the second: a + b = b + a. A buffer is used again as soon
        as the next vector is asked for; only the first one stays.
        """
        if not self.sources:
            yield self.vector
        lower = sum(source < self.comm.rank for source in self.sources)
        for place in range(len(self.sources)):
            request, buffer = self.receives[place]
            request.Wait()
            yield buffer
            if place > 0:
                self._receive_next(buffer)
            if place == max(0, lower - 1):
                yield self.vector
