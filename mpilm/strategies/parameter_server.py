"""A parameter server sharded over all ranks: pull and push, whole or by rows.

Source      the parameter server of async_sgd; row traffic as in T. Xiao et al., "Fast
            Parallel Training of Neural Language Models", IJCAI 2017.
Notation    x -> values, this rank's shard;  v -> velocity;  u -> a pushed step
            c -> clock, steps that a rank has done;  s -> bound
Update      v <- m v + u;  x <- x - v                     on arrival, locked   (1)
            a pull of clock c is answered when c - min clock <= s              (2)
Messages    to the server                          from the server
            PULL       clock                       the shard
            PUSH       u of the shard              -
            PULL_ROWS  clock, segment, row ids     the rows
            PUSH_ROWS  segment, row ids; ROWS: u   -
            END        clock                       clock
            Numbers are int64, values as in theta. A rank's own shard needs none.
Invariants  a pull waits for nobody but for (2). All that a rank sent before its END
            has been applied when END is answered, so nothing is left in flight.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpilm.learner.flat import Layout, Segment, copy_of
from mpilm.strategies.base import NUM_BINS
from mpilm.world.base import Activity, Comm, Message, Request, World

PULL, PUSH, PULL_ROWS, PUSH_ROWS, ROWS, END = range(1, 7)  # tags
Work = tuple[int, int, Any] | Message  # a pull that was held back, or what arrived


class ParameterServer:
    """One rank's shard, its server activity, and its way to the other shards.

    shards     where each rank's shard lies in the flat vector; rows are never cut
    values     the own shard, under the lock
    clocks     steps that each rank had done when it last pulled here
    ended      ranks that will not pull any more
    partners   int64 (K,): pushes of each rank to this shard
    staleness  int64 (17,): pushes of others between the own pull and push

    Args:
        momentum: m; 0: plain SGD, no velocity.
        bound: s, steps; negative: none.
    """

    def __init__(
        self, world: World, comm: Comm, layout: Layout, *, momentum: float, bound: int
    ) -> None:
        self.world, self.comm, self.layout = world, comm, layout
        self.answers = comm.Dup()
        self.lock = world.lock("shard")
        self.momentum, self.bound = momentum, bound
        self.shards = shards(layout, comm.size)
        self.own = self.shards[comm.rank]
        self.values: Any = None
        self.velocity: Any = None
        self.clocks = np.zeros(comm.size, np.int64)
        self.ended = np.zeros(comm.size, bool)
        self.held: list[tuple[int, int, Any]] = []  # pulls that wait for (2)
        self.activity: Activity | None = None
        self.barrier: Request | None = None
        self.sends: list[Request] = []
        self.partners = np.zeros(comm.size, np.int64)
        self.staleness = np.zeros(NUM_BINS, np.int64)
        self.num_foreign = self.num_seen = 0  # pushes of others: so far, at the pull

    def load(self, theta: Any) -> None:
        """Take the own shard from `theta`, (P,)."""
        self.values = copy_of(theta[self.own])
        self.incoming = copy_of(self.values)
        self.outgoing = copy_of(self.values)
        if self.momentum:
            self.velocity = copy_of(self.values)
            self.velocity *= 0.0

    # for the learner
    def begin(self) -> None:
        """Start to serve, unless the activity runs."""
        if self.activity is None and self.comm.size > 1:
            self.ended[:] = False
            self.barrier = None
            self.activity = self.world.start(self.serve, "parameter server")

    def pull(self, out: Any, clock: int) -> None:
        """Read the whole model into `out`, (P,), before step number `clock`.

        Communicates: pairwise with every rank: 8 bytes there, its shard back; blocking.
        """
        question = np.array([clock], np.int64)
        under_way: list[Request] = []
        for peer in self.others():
            part = out[self.shards[peer]]
            under_way.append(self.answers.Irecv(part, peer, PULL))
            under_way.append(self.comm.Isend(question, peer, PULL))
        if self.own.stop > self.own.start:
            self.wait_for_clock(clock)
            with self.lock:
                out[self.own] = self.values
                self.num_seen = self.num_foreign
        finish_all(under_way)
        finish_all(self.sends)

    def push(self, step: Any) -> None:
        """Apply (1) with u = `step`, (P,), on all ranks.

        `step` is read until the next `pull` or `settle` has returned.

        Communicates: pairwise with every rank: its shard there; does not block.
        """
        for peer in self.others():
            part = step[self.shards[peer]]
            self.sends.append(self.comm.Isend(part, peer, PUSH))
        with self.lock:
            late = self.num_foreign - self.num_seen
            self.staleness[min(late, NUM_BINS - 1)] += 1
            apply_(self.values, self.velocity, step[self.own], momentum=self.momentum)
            self.partners[self.comm.rank] += 1

    def pull_rows(self, name: str, ids: Any, out: Any, clock: int) -> None:
        """Read rows of the segment `name` before step number `clock`.

        Args:
            ids: (n,) int64, ascending, each once; (2) holds on the ranks that own them.
            out: (n * width,): the rows, one after the other.

        Communicates: pairwise with the owners: 16 + 8n bytes there, the rows back;
            blocking.
        """
        segment = self.layout[name]
        index = self.layout.segments.index(segment)
        under_way: list[Request] = []
        for peer, some, part in self.by_owner(segment, ids):
            if peer == self.comm.rank:
                self.wait_for_clock(clock)
                with self.lock:
                    self.gather_(segment, some, out[part])
            else:
                question = np.concatenate([np.array([clock, index]), some])
                under_way.append(self.answers.Irecv(out[part], peer, PULL_ROWS))
                under_way.append(self.comm.Isend(question, peer, PULL_ROWS))
        finish_all(under_way)
        finish_all(self.sends)

    def push_rows(self, name: str, ids: Any, rows: Any) -> None:
        """Apply (1) to rows of the segment `name` only; other velocities rest.

        Args:
            ids: (n,) int64, ascending, each once.
            rows: (n * width,): u of these rows; read until `settle` or a pull returns.

        Communicates: pairwise with the owners: 8 + 8n bytes and the rows; does not
            block.
        """
        segment = self.layout[name]
        index = self.layout.segments.index(segment)
        for peer, some, part in self.by_owner(segment, ids):
            if peer == self.comm.rank:
                with self.lock:
                    self.apply_rows_(segment, some, rows[part])
            else:
                head = np.concatenate([np.array([index]), some])
                self.sends.append(self.comm.Isend(head, peer, PUSH_ROWS))
                self.sends.append(self.comm.Isend(rows[part], peer, ROWS))

    def settle(self) -> None:
        """Block until what was pushed may be overwritten."""
        finish_all(self.sends)

    def retire(self, clock: int) -> None:
        """Tell all ranks that this one pulls and pushes no more, once; serve on.

        Communicates: pairwise with every rank: 8 bytes there and back; blocking.
        """
        rank = self.comm.rank
        if self.activity is None or self.ended[rank]:
            return
        question, answer = np.array([clock], np.int64), np.zeros(1, np.int64)
        finish_all(self.sends)
        with self.lock:
            self.ended[rank] = True
        for peer in range(self.comm.size):
            if peer != rank:
                receive = self.answers.Irecv(answer, peer, END)
                self.comm.Send(question, peer, END)
                receive.Wait()

    def end(self) -> None:
        """After `retire`: serve until nobody asks any more; nothing stays in flight.

        Communicates: collective, one barrier, blocking.
        """
        if self.activity is None:
            return
        barrier = self.comm.Ibarrier()
        with self.lock:
            self.barrier = barrier
        self.activity.join()
        self.activity = None

    def others(self) -> Iterator[int]:
        """Yield the other ranks with a shard, the next one first: not all the same."""
        rank, size = self.comm.rank, self.comm.size
        for peer in (*range(rank + 1, size), *range(rank)):
            if self.shards[peer].stop > self.shards[peer].start:
                yield peer

    def wait_for_clock(self, clock: int) -> None:
        """Block until (2) allows this rank to read its own shard."""
        rank = self.comm.rank
        with self.lock:
            self.clocks[rank] = clock
        self.world.wait(lambda: self.may_read(rank), "slower ranks (staleness_bound)")

    def by_owner(self, segment: Segment, ids: Any) -> Iterator[tuple[int, Any, slice]]:
        """Yield (rank, its ids, where their rows lie among all) for each owner.

        Raises:
            ValueError: the ids do not ascend, or are no rows of the segment.
        """
        ids = np.asarray(ids, np.int64)
        num_rows, width = segment.shape[0], row_width(segment)
        if (ids[1:] <= ids[:-1]).any() or ((ids < 0) | (ids >= num_rows)).any():
            raise ValueError(f"{segment.name}: ids must ascend in 0..{num_rows - 1}")
        for peer, shard in enumerate(self.shards):
            bounds = [
                -(-(edge - segment.start) // width)
                for edge in (shard.start, shard.stop)
            ]
            first, last = np.searchsorted(ids, bounds)
            if last > first:
                yield peer, ids[first:last], slice(first * width, last * width)

    # the activity
    def serve(self) -> None:
        """Answer until the barrier of `end` is done."""
        while True:
            work = self.world.wait(self.next_work, "a pull or push")
            if isinstance(work, bool):
                return
            self.do(work)

    def next_work(self) -> Any:
        """Return Work that can be done now; True: nobody asks any more; else None."""
        # when the barrier is done nobody of this time asks: what comes is of the next
        if self.barrier is not None and self.barrier.Test():
            return True
        for index, (source, _, _) in enumerate(self.held):
            if self.may_read(source):
                return self.held.pop(index)
        return self.comm.Improbe()

    def do(self, work: Work) -> None:
        """Answer a pull, apply a push."""
        if isinstance(work, tuple):
            self.answer(*work)
            return
        source, tag = work.source, work.tag
        if tag == PUSH:
            work.Recv(self.incoming)
            with self.lock:
                apply_(
                    self.values, self.velocity, self.incoming, momentum=self.momentum
                )
                self.count(source)
            return
        head = np.zeros(work.nbytes // 8, np.int64)
        work.Recv(head)
        if tag == PUSH_ROWS:
            segment, ids = self.layout.segments[head[0]], head[1:]
            rows = self.incoming[: len(ids) * row_width(segment)]
            self.comm.Recv(rows, source, ROWS)  # sent right behind the head
            with self.lock:
                self.apply_rows_(segment, ids, rows)
                self.count(source)
        elif tag == END:
            with self.lock:
                self.ended[source] = True
            self.answers.Send(head, source, END)
        else:
            with self.lock:
                self.clocks[source] = head[0]
            if self.may_read(source):
                self.answer(source, tag, head)
            else:
                self.held.append((source, tag, head))

    def answer(self, source: int, tag: int, head: Any) -> None:
        """Send what was pulled; the receive of it is posted already."""
        if tag == PULL:
            with self.lock:
                self.outgoing[:] = self.values
            self.answers.Send(self.outgoing, source, PULL)
            return
        segment, ids = self.layout.segments[head[1]], head[2:]
        rows = self.outgoing[: len(ids) * row_width(segment)]
        with self.lock:
            self.gather_(segment, ids, rows)
        self.answers.Send(rows, source, PULL_ROWS)

    def may_read(self, rank: int) -> bool:
        """Return whether (2) holds for the clock of `rank`."""
        if self.bound < 0:
            return True
        slowest = min(
            int(clock)
            for clock, ended in zip(self.clocks, self.ended, strict=True)
            if not ended
        )
        return int(self.clocks[rank]) - slowest <= self.bound

    def count(self, source: int) -> None:
        """Note a push of another rank."""
        self.partners[source] += 1
        self.num_foreign += 1

    def gather_(self, segment: Segment, ids: Any, out: Any) -> None:
        """Copy rows of the own shard into `out`."""
        width = row_width(segment)
        first = segment.start - self.own.start
        for place, row in enumerate(ids.tolist()):
            start = first + row * width
            to = slice(place * width, (place + 1) * width)
            out[to] = self.values[start : start + width]

    def apply_rows_(self, segment: Segment, ids: Any, rows: Any) -> None:
        """Apply (1) to rows of the own shard."""
        width = row_width(segment)
        first = segment.start - self.own.start
        for place, row in enumerate(ids.tolist()):
            where = slice(first + row * width, first + (row + 1) * width)
            step = rows[place * width : (place + 1) * width]
            velocity = self.velocity[where] if self.momentum else None
            apply_(self.values[where], velocity, step, momentum=self.momentum)


def apply_(x: Any, v: Any, u: Any, *, momentum: float) -> None:
    """Take one step (1) with the pushed u; without momentum v is not used.

    >>> x, v = np.array([1.0]), np.array([2.0])
    >>> apply_(x, v, np.array([0.5]), momentum=0.5)
    >>> x, v
    (array([-0.5]), array([1.5]))
    """
    if momentum:
        v *= momentum
        v += u
        u = v
    x -= u


def shards(layout: Layout, num_ranks: int) -> list[slice]:
    """Return equal slices of the flat vector, one a rank, cut between rows.

    >>> shards(Layout.of([("embed", (3, 4), "embed")]), 2)
    [slice(0, 4, None), slice(4, 12, None)]
    """
    starts = [segment.start for segment in layout]
    cuts = []
    for rank in range(num_ranks):
        place = rank * layout.size // num_ranks
        segment = layout.segments[bisect_left(starts, place + 1) - 1]
        cuts.append(place - (place - segment.start) % row_width(segment))
    return [slice(*ends) for ends in zip(cuts, [*cuts[1:], layout.size], strict=True)]


def row_width(segment: Segment) -> int:
    """Return the elements in a row: a step along the first axis."""
    return segment.size // segment.shape[0]


def finish_all(requests: list[Request]) -> None:
    """Block until all are done; empty the list."""
    for request in requests:
        request.Wait()
    requests.clear()
