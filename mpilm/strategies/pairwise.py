"""Exchanges between two ranks: a snapshot there, a delta back, in the background.

Notation    x_i -> x, the model of rank i, shared by two activities, (P,)
            s   -> a snapshot of it, d -> a delta: (P,), sent in pieces
            a   -> weight of an exchange
Update      asks      s <- x_i; send s to j                    (under i's lock) (1)
            answers   d <- a (x_j - s); x_j <- x_j - d         (under j's lock) (2)
            asks      x_i <- x_i + d                           (under i's lock) (3)
            Had nothing else happened to x_i meanwhile: x_i <- (1 - a) x_i + a x_j, and
            x_j <- (1 - a) x_j + a x_i, both from the old ones.
Messages    4P bytes there and 4P bytes back, in pieces one after the other.

            i: s = x ====> s          x += d
            j:             x -= d, d ====> d
Invariants  the sum of x over ranks and of the deltas under way stays, whatever the
            delays. Nobody holds a lock while waiting, and a rank that waits for an
            answer goes on answering: no graph can deadlock.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from mpilm.strategies.base import Learner
from mpilm.vectors import SparseVector, copy_of
from mpilm.world.base import Comm, Message, World
from mpilm.world.service import OneAtATime, Work


class Pairwise(OneAtATime):
    """One rank's part: it asks whenever it has credit, and answers whoever asks.

    x           the model, (P,); read and written under the lock
    credit      exchanges that may begin; the learner adds to it, under the lock
    num_unread  pieces mixed into x since the learner has read it, likewise
    round       exchanges begun so far
    partners    int64 (K,): exchanges with each rank, whoever began them

    Args:
        theta: (P,), what x is at every `begin`.
        partner: from the round to the rank to ask.
        weight: a, 0 to 1/2.
        pieces: parts that a model is sent in.

    Communicates: collective when made: it duplicates the communicator.
    """

    waits_for = "a snapshot, a delta or credit"

    def __init__(
        self,
        world: World,
        comm: Comm,
        theta: Any,
        *,
        partner: Callable[[int], int],
        weight: float,
        pieces: int,
    ) -> None:
        super().__init__(world, comm, "exchanges")
        self.deltas = comm.Dup()  # apart: whoever looks for a snapshot must not get one
        self.theta, self.partner, self.weight = theta, partner, weight
        self.x: Any = None  # it and the buffers: none before the first `begin`
        self.asking: Any = None  # a snapshot, then the delta of the own exchange
        self.answering: Any = None  # somebody's snapshot, then the delta for it
        cuts = [index * len(theta) // pieces for index in range(pieces + 1)]
        self.slices = [slice(*ends) for ends in pairwise(cuts)]
        self.peer = self.piece = 0  # of the own exchange
        self.credit = 0.0
        self.num_unread = self.round = 0
        self.partners = SparseVector(comm.size, np.int64)

    def renew(self) -> None:
        """Start from theta; a checkpoint of this moment holds no credit."""
        if self.x is None:
            self.x = copy_of(self.theta)
            longest = max(part.stop - part.start for part in self.slices)
            self.asking = copy_of(self.theta[:longest])
            self.answering = copy_of(self.theta[:longest])
        self.x[:] = self.theta
        self.credit, self.num_unread = 0.0, 0

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes sent and received by the exchanges that are over."""
        moved = self.comm.item_bytes * len(self.theta) * int(self.partners.sum())
        return moved, moved

    # for the learner, under the lock
    def read_(self, theta: Any) -> None:
        """Set theta to x."""
        theta[:] = self.x

    def write_(self, learner: Learner) -> None:
        """Set x to the learner's theta, which an update has changed."""
        self.x[:] = learner.theta

    # it asks
    def own_work(self) -> Work | None:
        """Return the next part of the own exchange, or its begin."""
        if self.under_way is None:
            return self.ask if self.credit >= 1.0 and not self.is_ending else None
        if not self.under_way.Test():
            return None
        return self.receive_delta if self.is_sending else self.take_delta

    def ask(self) -> None:
        """Begin an exchange."""
        with self.lock:
            self.credit -= 1.0
        self.peer, self.piece = self.partner(self.round), 0
        self.round += 1
        self.send_snapshot()

    def send_snapshot(self) -> None:
        """(1) for one piece."""
        part = self.slices[self.piece]
        snapshot = self.asking[: part.stop - part.start]
        with self.lock:
            snapshot[:] = self.x[part]
        self.under_way = self.comm.Isend(snapshot, self.peer, self.piece)
        self.is_sending = True

    def receive_delta(self) -> None:
        """The snapshot has gone: its buffer is free for the delta."""
        part = self.slices[self.piece]
        delta = self.asking[: part.stop - part.start]
        self.under_way = self.deltas.Irecv(delta, self.peer, self.piece)
        self.is_sending = False

    def take_delta(self) -> None:
        """Apply (3) to one piece; go on with the next."""
        with self.lock:
            self.mix_()
            self.num_unread += 1
        self.piece += 1
        if self.piece < len(self.slices):
            self.send_snapshot()
        else:
            self.under_way = None
            self.partners[self.peer] += 1

    def mix_(self) -> None:
        """(3) for the piece that has come. Under the lock."""
        part = self.slices[self.piece]
        self.x[part] += self.asking[: part.stop - part.start]

    # it answers
    def answer(self, message: Message) -> None:
        """(2) for one piece."""
        part = self.slices[message.tag]
        buffer = self.answering[: part.stop - part.start]
        message.Recv(buffer)
        with self.lock:
            answer_(self.x[part], buffer, weight=self.weight)
            if (left := self.comm.left_of(buffer)) is not None:
                self.x[part] += left  # of the delta: not sent, so not taken off
            self.num_unread += 1
        self.reply = self.deltas.Isend(buffer, message.source, message.tag)
        if message.tag == len(self.slices) - 1:
            self.partners[message.source] += 1


def answer_(x: Any, snapshot: Any, *, weight: float) -> None:
    """Move x towards a snapshot; turn the snapshot into the delta of its sender: (2).

    Args:
        x: (n,), a piece of the own model.
        snapshot: (n,), the same piece of the other's.

    >>> x, s = np.array([4.0]), np.array([0.0])
    >>> answer_(x, s, weight=0.25)
    >>> x, s
    (array([3.]), array([1.]))
    """
    snapshot *= -1.0
    snapshot += x
    snapshot *= weight
    x -= snapshot
