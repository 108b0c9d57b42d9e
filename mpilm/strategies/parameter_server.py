"""The parameter server of async_sgd, sharded over ranks: pull, push.

Notation    x -> values, this rank's shard;  v -> velocity;  u -> a pushed step
            c -> clock, steps that a rank has done;  s -> bound
Update      v <- m v + u;  x <- x - v                     on arrival, locked   (1)
            a pull of clock c is answered when c - min clock <= s              (2)
Messages    to the server                   from the server
            PULL    clock (8 bytes)         the shard
            PUSH    u of the shard          -
            END     8 bytes                 the same
            Values are as in theta. A rank's own shard needs no message.
Invariants  a pull waits for nobody but for (2). All that a rank sent before its END
            has been applied when END is answered, so nothing is left in flight.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mpilm.learner.flat import Layout
from mpilm.strategies.base import NUM_BINS
from mpilm.strategies.rows import shards_of
from mpilm.vectors import copy_of, zeros
from mpilm.world.base import Comm, Message, Request, World
from mpilm.world.service import Service, Work

PULL, PUSH, END = range(1, 4)  # tags


class ParameterServer(Service):
    """One rank's shard, its server activity, and its way to the other shards.

    shards     where each rank's shard lies in the flat vector; rows are never cut;
               empty on a rank that is no server
    peers      other ranks with a shard, the next one first: not all ask the same first
    values     the own shard, under the lock
    error      (P,), what of the own pushes has not travelled yet; None: all did
    clocks     steps that each rank had done when it last pulled here
    asked      what `ask` has begun: questions and answers
    ended      ranks that will not pull before they `begin` again
    partners   int64 (K,): pushes of each rank to this shard, and this rank's own
    staleness  int64 (17,): pushes of others to this shard between the own pull and push
    num_pulls, num_served, num_ends  own pulls; pulls of others answered; own ENDs

    Args:
        momentum: m; 0: plain SGD, no velocity.
        bound: s, steps; negative: none.
        servers: ranks with a shard; if more than there are, all.

    Communicates: collective when made: it duplicates the communicator.
    """

    waits_for = "a pull or push"

    def __init__(
        self,
        world: World,
        comm: Comm,
        layout: Layout,
        *,
        momentum: float,
        bound: int,
        servers: int,
    ) -> None:
        super().__init__(world, comm, "parameter server")
        self.layout = layout
        self.answers = comm.Dup()
        self.momentum, self.bound = momentum, bound
        self.shards = shards_of(layout, comm.size, servers)
        self.own = self.shards[comm.rank]
        ring = (*range(comm.rank + 1, comm.size), *range(comm.rank))
        self.peers = [p for p in ring if self.shards[p].stop > self.shards[p].start]
        self.values: Any = None
        self.velocity: Any = None
        self.error: Any = None
        self.clocks = np.zeros(comm.size, np.int64)
        self.ended = np.zeros(comm.size, bool)
        self.held: list[tuple[int, Work]] = []  # whose pulls wait for (2); the answers
        self.asked: list[Request] = []
        self.sends: list[Request] = []
        self.partners = np.zeros(comm.size, np.int64)
        self.staleness = np.zeros(NUM_BINS, np.int64)
        self.num_foreign = self.num_seen = 0  # pushes of others: so far, at the pull
        self.num_pulls = self.num_served = self.num_ends = 0

    def load(self, theta: Any) -> None:
        """Take the own shard from `theta`, (P,)."""
        self.values = copy_of(theta[self.own])
        self.incoming = copy_of(self.values)
        self.outgoing = copy_of(self.values)
        if self.momentum:
            self.velocity = copy_of(self.values)
            self.velocity *= 0.0
        if self.comm.exact is not self.comm:
            self.error = zeros(self.layout.size, like=theta)

    @property
    def is_server(self) -> bool:
        """Whether this rank holds a shard."""
        return self.own.stop > self.own.start

    # for the learner
    def pull(self, out: Any, clock: int) -> None:
        """Read the whole model into `out`, (P,), before step number `clock`.

        Communicates: pairwise with every server: 8 bytes there, its shard back;
            blocking.
        """
        self.ask(out, clock)
        if self.is_server:
            self.wait_for_clock(clock)
            self.read_own(out)
        finish_all(self.asked)
        finish_all(self.sends)

    def ask(self, out: Any, clock: int) -> None:
        """Begin to read the other shards into `out`, (P,).

        Communicates: pairwise with every server: 8 bytes there, its shard back; does
            not block.
        """
        question = np.array([clock], np.int64)
        for peer in self.peers:
            part = out[self.shards[peer]]
            self.asked.append(self.answers.Irecv(part, peer, PULL))
            self.asked.append(self.comm.Isend(question, peer, PULL))
        self.num_pulls += 1

    def take(self, out: Any, read: Any, step: Any) -> None:
        """Write into `out` what `ask` has read into `read`, and the own push since.

        Args:
            out, read: (P,).
            step: u of the one `push` after the `ask`, as that has left it.

        Communicates: pairwise: waits for what `ask` has begun.
        """
        finish_all(self.asked)
        for peer in self.peers:
            where = self.shards[peer]
            out[where] = read[where]
            out[where] -= step[where]
            if self.error is not None:
                out[where] += self.error[where]
        self.read_own(out)

    def read_own(self, out: Any) -> None:
        """Write the own shard into `out`, (P,)."""
        with self.lock:
            out[self.own] = self.values
            self.num_seen = self.num_foreign

    def push(self, step: Any) -> None:
        """Apply (1) with u = `step`, (P,), on all ranks.

        `step` is read until the next `pull` or `settle` has returned; in another wire
        format than float32 the error is added to it.

        Communicates: pairwise with every server: its shard there; does not block.
        """
        for peer in self.peers:
            part = step[self.shards[peer]]
            if self.error is not None:
                part += self.error[self.shards[peer]]
                self.error[self.shards[peer]] = self.comm.left_of(part)
            self.sends.append(self.comm.Isend(part, peer, PUSH))
        with self.lock:
            if self.is_server:
                late = self.num_foreign - self.num_seen
                self.staleness[min(late, NUM_BINS - 1)] += 1
            apply_(self.values, self.velocity, step[self.own], momentum=self.momentum)
            self.partners[self.comm.rank] += 1

    def settle(self) -> None:
        """Block until what was pushed may be overwritten."""
        finish_all(self.sends)

    def renew(self) -> None:
        """Wait for all ranks again."""
        self.ended[:] = False

    def retire(self) -> None:
        """Serve, and tell the servers, once, that this rank pulls and pushes no more.

        Communicates: pairwise with every server: 8 bytes there and back; blocking.
        """
        self.begin()
        rank = self.comm.rank
        if self.ended[rank] or self.comm.size == 1:
            return
        finish_all(self.asked)
        finish_all(self.sends)
        with self.lock:
            self.ended[rank] = True
        question, answer = np.zeros(1, np.int64), np.zeros(1, np.int64)
        for peer in sorted(self.peers):
            receive = self.answers.Irecv(answer, peer, END)
            self.comm.Send(question, peer, END)
            receive.Wait()
        self.num_ends += 1

    def wait_for_clock(self, clock: int) -> None:
        """Block until (2) allows this rank to read its own shard."""
        with self.lock:
            self.clocks[rank := self.comm.rank] = clock
        self.world.wait(lambda: self.may_read(rank), "slower ranks (staleness_bound)")

    @property
    def open_requests(self) -> list[Request]:
        """What it has started and not waited for."""
        return [*self.asked, *self.sends]

    def moved_bytes(self) -> tuple[int, int]:
        """Return the bytes of pulls, pushes and ENDs, sent and received.

        True once all ranks have ended: then each has had as many ENDs as it has sent.
        """
        own = self.comm.item_bytes * (self.own.stop - self.own.start)
        others = self.comm.item_bytes * self.layout.size - own
        ends = self.end_bytes()
        pushes = int(self.partners[self.comm.rank])
        sent = self.num_pulls * 8 * len(self.peers)
        sent += pushes * others + self.num_served * own
        received = self.num_pulls * others + (int(self.partners.sum()) - pushes) * own
        return sent + ends, received + self.num_served * 8 + ends

    def end_bytes(self) -> int:
        """Return the bytes of ENDs and of their answers, sent and as many received."""
        answered = self.comm.size - 1 if self.is_server else 0
        return 8 * self.num_ends * (len(self.peers) + answered)

    # the activity
    def own_work(self) -> Work | None:
        """Return the answer to a pull that (2) held back and does so no more."""
        for index, (source, work) in enumerate(self.held):
            if self.may_read(source):
                del self.held[index]
                return work
        return None

    def answer(self, message: Message) -> None:
        """Answer a pull, apply a push, note an end."""
        source, tag = message.source, message.tag
        if tag == PUSH:
            message.Recv(self.incoming)
            with self.lock:
                x, v = self.values, self.velocity
                apply_(x, v, self.incoming, momentum=self.momentum)
                self.count(source)
            return
        clock = np.zeros(1, np.int64)
        message.Recv(clock)
        if tag == PULL:
            self.when_due(source, int(clock[0]), partial(self.send_shard, source))
            return
        with self.lock:
            self.ended[source] = True
        self.answers.Send(clock, source, END)

    def when_due(self, source: int, clock: int, work: Work) -> None:
        """Do `work`, which answers a pull of `source`, when (2) allows it."""
        with self.lock:
            self.clocks[source] = clock
        if self.may_read(source):
            work()
        else:
            self.held.append((source, work))

    def send_shard(self, source: int) -> None:
        """Send what was pulled; the receive of it is posted already."""
        with self.lock:
            self.outgoing[:] = self.values
        self.answers.Send(self.outgoing, source, PULL)
        self.num_served += 1

    def may_read(self, rank: int) -> bool:
        """Return whether (2) holds for the clock of `rank`."""
        if self.bound < 0:
            return True
        slowest = int(self.clocks[~self.ended].min())
        return int(self.clocks[rank]) - slowest <= self.bound

    def count(self, source: int) -> None:
        """Note a push of another rank."""
        self.partners[source] += 1
        self.num_foreign += 1


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


def finish_all(requests: list[Request]) -> None:
    """Block until all are done; empty the list."""
    for request in requests:
        request.Wait()
    requests.clear()
