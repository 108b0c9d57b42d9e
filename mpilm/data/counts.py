"""How many samples all ranks have taken, and which chunk of the pool is next.

Why         Learning rate, validations, checkpoints and the end of a run go by samples
            of all ranks. Out of lockstep no rank knows them by itself: beside a rank
            100 times slow the others are far further than it is.
Notation    b_j  samples that rank j has drawn: those of the minibatch in work count
            s    sum over ranks of b_j, and rest: samples of ranks that are no more
            goal: the run ends at s >= goal
Lockstep    (`Turns`) s is the own count times the ranks, and rank r of K takes the
            leases r, r + K, r + 2K, ... of the pool. No messages.
Otherwise   (`Counter`) rank 0 keeps all b_j and the next lease, and a `Service` on it
            answers. TOTAL holds the sum over the *other* ranks: the own count is exact.

            rank r   COUNT | compute ................... | COUNT | compute
            rank 0       take it: TOTAL to r           TOTAL to r: K counts have come
                                                       since its last, or s >= goal

            A rank sends its next COUNT when the last was answered; TOTALs that come
            while it computes wait, and it takes all of them when it looks: even a rank
            that computes 100 times as long finds the newest.
Messages    16 bytes each. A rank sends a COUNT in each of its steps at most, and gets
            a TOTAL for it and one when K counts of others have come. For a chunk of the
            pool 8 bytes each way.
Cost        rank 0 takes some 0.2 ms of CPU for a COUNT and its TOTAL (170 us measured
            between 3 ranks on 2 busy cores, pauses included, 2026-11-26). Above
            PER_STEP ranks a rank sends a COUNT in every K / PER_STEP of its steps, in
            every one near the goal: 16 of them in a step, 3 ms, at 128 ranks as at 16.
Invariants  what a rank takes for s is never more than s, and less by what the others
            drew since their last COUNTs. All end at goal <= s; where messages take
            less time than a step, s < goal + one minibatch of every rank. Every lease
            is given once; those that no rank has begun are handed back by `state`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpilm.world.base import (
    IN_PLACE,
    Message,
    Request,
    Traffic,
    World,
    require_background,
)
from mpilm.world.service import Service, Work

ASK, LEASE, COUNT, TOTAL = 1, 2, 3, 4  # tags
END = -1  # in place of a number: the last TOTAL
PER_STEP = 16  # COUNTs that rank 0 takes in a step of the fleet; chosen, not tuned
# A COUNT in every step when fewer steps are left, so that none is late by more than
# this share of what is to come; chosen, not tuned.
NEAR_STEPS = 64


class Turns:
    """Ranks in lockstep: nobody needs to be asked.

    traffic  what counting has taken of the world's bytes and messages: nothing
    rest     samples beside those of the ranks, less than one for each
    """

    def __init__(self, rank: int, size: int) -> None:
        self._next, self._rank, self._size = rank, rank, size
        self.rest = 0
        self.traffic = Traffic()

    def start(self, goal: int = 0) -> None:
        """Nothing to begin."""

    def close(self) -> None:
        """Nothing to end."""

    def drawn(self, num_samples: int) -> None:
        """Nothing to note."""

    def done(self, own: int) -> int:
        """Return the samples of all ranks, where this one has done `own`."""
        return own * self._size + self.rest

    def known(self, own: int) -> int:
        """Return the same."""
        return self.done(own)

    def synchronise(self, own: int) -> int:
        """Return the same."""
        return self.done(own)

    def ask(self) -> None:
        """Nothing to ask."""

    def take(self) -> int:
        """Return this rank's next lease."""
        lease, self._next = self._next, self._next + self._size
        return lease

    def state(self) -> dict[str, Any]:
        """Return this rank's next lease."""
        return {"next_lease": self._next}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self._next = int(state["next_lease"])

    def go_on(self, lease: int) -> None:
        """Deal out from this lease on, on all ranks."""
        self._next = lease + self._rank


class Counter(Service):
    """Ranks out of lockstep: rank 0 counts the samples, and the leases of the pool.

    Call `start` before the first minibatch, `synchronise` after `load_state` and when
    all ranks pause, `close` after the last minibatch.

    traffic  what counting has taken of the world's bytes and messages; without leases
    rest     samples beside those of the ranks, less than one for each

    Args:
        world: of at least two ranks.
    """

    waits_for = "a count or a question for the pool"
    ended_by = "batches.close()"

    def __init__(self, world: World) -> None:
        super().__init__(world, world.comm, "counter")  # `start` makes its own comm
        self.traffic = Traffic()
        self.rest = 0
        self._goal = 0
        self._is_started = self._is_closed = False
        # rank r: what it knows, and what it has sent
        self._own = self._others = 0  # b_r; sum of b_j, j != r
        self._steps = 0  # minibatches since the last COUNT
        self._batch = 0  # samples of the last one
        self._counts = self._counts_answered = 0  # numbers of COUNT messages
        self._count, self._total = np.zeros(2, np.int64), np.zeros(2, np.int64)
        self._count_sent: Request | None = None
        self._question = np.zeros(1, np.int64)
        self._answer = np.full(1, -1, np.int64)  # a lease; -1: none is held
        self._asked: list[Request] = []  # for a lease, under way
        # rank 0, under the lock
        size = world.size
        self._drawn_K = np.zeros(size, np.int64)  # b_j
        self._sum = 0  # of b_j
        self._number_K = np.zeros(size, np.int64)  # of the last COUNT
        self._news_K = np.zeros(size, np.int64)  # counts that came since its TOTAL
        self._is_due_K = np.zeros(size, bool)  # for a TOTAL
        self._totals_K2 = np.zeros((size, 2), np.int64)
        self._totals_sent: list[Request | None] = [None] * size
        self._next = 0  # lease that nobody has had
        self._returned: list[int] = []  # leases before that, to give again
        self._taken, self._given = np.zeros(2, np.int64), np.zeros(1, np.int64)

    def start(self, goal: int = 0) -> None:
        """Begin to serve on rank 0. Collective, one Dup.

        Args:
            goal: samples of all ranks at which the run ends; 0: there is none.

        Raises:
            WorldError: a world without background communication.
        """
        require_background(self.world, "that counts samples out of lockstep")
        self.comm = self.comm.Dup()
        self._goal, self._is_started = goal, True
        if self.comm.rank == 0:
            self.begin()

    # samples
    def drawn(self, num_samples: int) -> None:
        """Note that this rank has drawn a minibatch.

        Communicates: at most one COUNT, non-blocking.
        """
        self._own += num_samples
        self._steps, self._batch = self._steps + 1, num_samples
        if self.comm.rank == 0:
            with self.lock:
                self._note(0, self._own)
        else:
            self._look()

    def done(self, own: int) -> int:
        """Return the samples of all ranks as known here; those in work elsewhere count.

        Args:
            own: samples that this rank has done.

        Communicates: as `drawn`.
        """
        if self.comm.rank != 0:
            self._look()
        return self.known(own)

    def known(self, own: int) -> int:
        """Return the same, as it was known before. No communication."""
        return self._others + own

    def synchronise(self, own: int) -> int:
        """Return the samples of all ranks; from now on all know where all are.

        Args:
            own: samples that this rank has done, and drawn.

        Communicates: collective, one Allreduce of 8K bytes, blocking.
        """
        self._require_started()
        drawn_K = np.zeros(self.comm.size, np.int64)
        drawn_K[self.comm.rank] = own
        self.comm.Allreduce(IN_PLACE, drawn_K)
        total = int(drawn_K.sum()) + self.rest
        with self.lock:
            self._own, self._others = own, total - own
            self._drawn_K[:], self._sum = drawn_K, total
        return total

    def _look(self) -> None:
        """Take all TOTALs that have come; send a COUNT if there is news. Rank r > 0."""
        while (message := self.comm.Improbe(0, TOTAL)) is not None:
            message.Recv(self._total)
            self._take_total()
        is_answered = self._counts == self._counts_answered and not self._is_closed
        if self._steps and is_answered and self._steps >= self._count_every():
            if self._count_sent is not None:
                self._count_sent.Wait()  # it was answered
            self._steps, self._counts = 0, self._counts + 1
            self._count[:] = self._own, self._counts
            self._count_sent = self.comm.Isend(self._count, 0, COUNT)
            self._excluded(sent=self._count.nbytes)

    def _count_every(self) -> int:
        """Return the steps from one COUNT of this rank to the next."""
        every = -(-self.comm.size // PER_STEP)
        if every == 1 or not self._goal:
            return every
        left = self._goal - self._own - self._others
        steps_left = left // max(1, self._batch * self.comm.size)
        return max(1, min(every, steps_left // NEAR_STEPS))

    def _take_total(self) -> None:
        others, number = self._total.tolist()
        self._excluded(received=self._total.nbytes)
        if number == END:
            self._is_closed = True
        else:
            self._others = max(self._others, others)  # may be older than `synchronise`
            self._counts_answered = number

    def _excluded(self, *, sent: int = 0, received: int = 0) -> None:
        self.traffic.bytes_sent += sent
        self.traffic.bytes_received += received
        self.traffic.messages += 1

    # leases
    def ask(self) -> None:
        """Ask for this rank's next lease, unless it is held or asked for already.

        Communicates: 8 bytes to rank 0 and 8 bytes back, non-blocking.
        """
        if self.comm.rank == 0 or self._asked or self._answer[0] >= 0:
            return
        self._asked = [
            self.comm.Irecv(self._answer, 0, LEASE),
            self.comm.Isend(self._question, 0, ASK),
        ]

    def take(self) -> int:
        """Return this rank's next lease.

        Communicates: blocks until the answer has come; asks, if `ask` was not called.
        """
        self._require_started()
        if self._is_closed:
            raise RuntimeError("the pool is closed")
        if self.comm.rank == 0:
            return self._give()
        self.ask()
        self._settle()
        lease = int(self._answer[0])
        self._answer[0] = -1
        return lease

    def _give(self) -> int:
        with self.lock:
            if self._returned:
                return self._returned.pop(0)
            self._next += 1
            return self._next - 1

    def _settle(self) -> None:
        for request in self._asked:
            request.Wait()
        self._asked = []

    # state
    def state(self) -> dict[str, Any]:
        """Return the leases still to give; those held and not begun are among them.

        Communicates: collective, two small allgathers, blocking.
        """
        self._require_started()
        self._settle()
        unbegun = [int(lease) for lease in self.comm.allgather(int(self._answer[0]))]
        # nobody asks between the two: what rank 0 reads belongs to what was gathered
        own = (self._next, self._returned) if self.comm.rank == 0 else None
        gathered = self.comm.allgather(own)[0]
        assert gathered is not None
        counter, returned = gathered
        unbegun = sorted({*returned, *unbegun} - {-1})
        return {"next_lease": counter, "returned": np.array(unbegun, np.int64)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned. Before a minibatch all ranks `synchronise`."""
        self._next = int(state["next_lease"])
        self._returned = [int(lease) for lease in state["returned"]]

    def go_on(self, lease: int) -> None:
        """Give this lease and those after it. Before a minibatch `synchronise`."""
        self._next, self._returned = lease, []

    # the end
    def close(self) -> None:
        """Serve until no rank asks; nothing stays in flight.

        Communicates: collective, one barrier, blocking.
        """
        self._require_started()
        self._settle()
        while self._counts_answered < self._counts:
            self._receive_total()
        comm = self.comm
        self.end()
        self.comm = comm  # the last TOTALs are there, and it begins no more
        if comm.rank == 0:
            for peer in range(1, comm.size):
                self._send_total(peer, 0, END)
            for request in self._totals_sent[1:]:
                assert request is not None
                request.Wait()
            self._is_closed = True
        while not self._is_closed:
            self._receive_total()

    def _receive_total(self) -> None:
        self.comm.Recv(self._total, 0, TOTAL)
        self._take_total()

    def _require_started(self) -> None:
        if not self._is_started:
            raise RuntimeError("start() comes before the first minibatch")

    # the activity on rank 0
    def answer(self, message: Message) -> None:
        """Give a lease, or take a count: a TOTAL is due for it."""
        source = message.source
        if message.tag == ASK:
            message.Recv(self._given)
            self._given[0] = self._give()
            self.comm.Send(self._given, source, LEASE)
            return
        message.Recv(self._taken)
        drawn, number = self._taken.tolist()
        with self.lock:
            self._excluded(received=self._taken.nbytes)
            self._number_K[source] = number
            self._is_due_K[source] = True
            self._note(source, drawn)

    def own_work(self) -> Work | None:
        """Return how to send the TOTALs that are due."""
        due = np.flatnonzero(self._is_due_K).tolist()
        ready = [peer for peer in due if self._may_send(peer)]
        return (lambda: self._send_totals(ready)) if ready else None

    def _note(self, rank: int, drawn: int) -> None:
        """Note that a rank has drawn so many samples. On rank 0, under the lock."""
        before = self._sum
        self._sum += max(0, drawn - int(self._drawn_K[rank]))
        self._drawn_K[rank] = max(drawn, self._drawn_K[rank])
        self._others = self._sum - int(self._drawn_K[0])
        self._news_K += 1
        self._is_due_K |= self._news_K >= self.comm.size
        if before < self._goal <= self._sum:
            self._is_due_K[:] = True
        self._is_due_K[0] = False

    def _may_send(self, peer: int) -> bool:
        """Return whether the last TOTAL has left: a rank that takes none gets none."""
        sent = self._totals_sent[peer]
        return sent is None or sent.Test()

    def _send_totals(self, peers: list[int]) -> None:
        with self.lock:
            self._is_due_K[peers] = False
            self._news_K[peers] = 0
            for peer in peers:
                others = self._sum - int(self._drawn_K[peer])
                self._send_total(peer, others, int(self._number_K[peer]))

    def _send_total(self, peer: int, others: int, number: int) -> None:
        sent, total = self._totals_sent[peer], self._totals_K2[peer]
        if sent is not None:
            sent.Wait()  # the buffer is in use until then
        total[:] = others, number
        self._totals_sent[peer] = self.comm.Isend(total, peer, TOTAL)
        self._excluded(sent=total.nbytes)


Counts = Turns | Counter


def counts_of(rank: int, size: int, world: World | None) -> Counts:
    """Return the `Counter` of a world of several ranks; without one `Turns`."""
    if world is None or world.size == 1:
        return Turns(rank, size)
    return Counter(world)
