"""Fragments of models to other ranks, one way, in the background.

Notation    x_i -> theta, the model of rank i, (P,), cut into F fragments
            S_f -> sums[f], what has come for fragment f since the last (2)
            n_f -> counts[f].sum(), how many that were
Update      sends     x_i[f] as it is when its turn comes    (under i's lock)   (1)
            receives  S_f <- S_f + x_j[f],  n_f <- n_f + 1   (under i's lock)
            mixes     x_i[f] <- (x_i[f] + S_f) / (1 + n_f);  S_f, n_f <- 0      (2)
Messages    4 P/F bytes for a fragment, and 1 byte back that says it has been received;
            then the next one.

            i: x[f] ====> .....       <- next
            j:      ====> S_f +=, 1 byte ->
Invariants  a rank whose fragments all are acknowledged has none under way: so nothing
            is in flight once all ranks have come to the barrier of `end`. (2) is a
            mean: models stay between the least and the largest of all.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.vectors import copy_of
from mpilm.world.base import Comm, Message, World
from mpilm.world.service import OneAtATime, Work


class Fragments(OneAtATime):
    """One rank's part: it sends what is in its queue, and sums up what comes.

    theta    the model, (P,); read under the lock; changed by `mix_` and the learner
    queue    (fragment, rank) still to send, the next one last; set under the lock
    sums     (P,), what has come
    counts   int64 (F, K), how many of each fragment from each rank since the last (2)
    sent, received   bytes so far, acknowledgements included

    Args:
        fragments: F, at most P.

    Communicates: collective when made: it duplicates the communicator.
    """

    waits_for = "a fragment, an acknowledgement or a round"

    def __init__(self, world: World, comm: Comm, theta: Any, *, fragments: int) -> None:
        super().__init__(world, comm, "fragments")
        self.acks = comm.Dup()  # apart: whoever looks for a fragment must not get one
        self.theta = theta
        cuts = [index * len(theta) // fragments for index in range(fragments + 1)]
        self.slices = [slice(*ends) for ends in pairwise(cuts)]
        self.sums: Any = None  # it and the buffers: none before the first `begin`
        self.outgoing: Any = None
        self.incoming: Any = None
        self.ack_in, self.ack_out = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
        self.queue: list[tuple[int, int]] = []
        self.counts = np.zeros((fragments, comm.size), np.int64)
        self.peer = self.number = 0  # of what is under way
        self.sent = self.received = 0

    def renew(self) -> None:
        """Make the buffers; a checkpoint of this moment holds no queue."""
        if self.sums is None:
            longest = max(part.stop - part.start for part in self.slices)
            self.sums = copy_of(self.theta)
            self.sums[:] = 0.0
            self.outgoing = copy_of(self.theta[:longest])
            self.incoming = copy_of(self.theta[:longest])
        self.queue = []

    # it sends
    def own_work(self) -> Work | None:
        """Return the next part of sending."""
        if self.under_way is None:
            return self.send if self.queue and not self.is_ending else None
        if not self.under_way.Test():
            return None
        return self.receive_acknowledgement if self.is_sending else self.end_sending

    def send(self) -> None:
        """(1) for the next fragment of the queue."""
        with self.lock:
            self.number, self.peer = self.queue.pop()
            part = self.slices[self.number]
            buffer = self.outgoing[: part.stop - part.start]
            buffer[:] = self.theta[part]
        self.under_way = self.comm.Isend(buffer, self.peer, self.number)
        self.is_sending = True
        self.sent += self.comm.item_bytes * len(buffer)

    def receive_acknowledgement(self) -> None:
        """The fragment has gone; whether it is there says its receiver."""
        self.under_way = self.acks.Irecv(self.ack_in, self.peer, self.number)
        self.is_sending = False
        self.received += 1

    def end_sending(self) -> None:
        """It is there."""
        self.under_way = None

    # it receives
    def answer(self, message: Message) -> None:
        """Add a fragment to the sums, and say so."""
        part = self.slices[message.tag]
        buffer = self.incoming[: part.stop - part.start]
        message.Recv(buffer)
        with self.lock:
            self.sums[part] += buffer
            self.counts[message.tag, message.source] += 1
        self.reply = self.acks.Isend(self.ack_out, message.source, message.tag)
        self.received += self.comm.item_bytes * len(buffer)
        self.sent += 1

    # the learner mixes
    def mix_(self) -> NDArray[np.float64]:
        """Apply (2). Under the lock.

        Returns:
            weights of the ranks' models in the new one, over all of it, (K,).
        """
        weights = np.zeros(self.comm.size)
        for part, counts in zip(self.slices, self.counts, strict=True):
            if number := int(counts.sum()):
                model = self.theta[part]
                model += self.sums[part]
                model *= 1.0 / (1 + number)
                self.sums[part] = 0.0
                weights += (part.stop - part.start) * counts / (1 + number)
        self.counts[:] = 0
        return weights / len(self.theta)
