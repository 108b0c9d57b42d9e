"""Exchanges between two ranks, of a model with row tables.

Update      (1) to (3) of pairwise.py, for all elements before the row tables and the
            rows that the asking rank has touched since it last asked.
Messages    as in pairwise.py, and before each snapshot its head: how many rows of each
            table, then their ids; int64.

            i: head, s = x ====> s          x += d
            j:                   x -= d, d ====> d
Invariants  those of pairwise.py, row by row.
Departs     from exchanges of whole models: a row that the asking rank has not touched
            stays on both, though it may differ. Rows that the answering rank touched go
            with an exchange of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner
from mpilm.strategies.pairwise import Pairwise, answer_
from mpilm.strategies.rows import ShardPart
from mpilm.strategies.shared_rows import SharedRows
from mpilm.vectors import copy_of, to_array, zeros
from mpilm.world.base import Message, Request


class PairwiseRows(Pairwise):
    """One rank's part.

    rows            what it has touched since it last asked
    mixed_R         uint8, 1 for a row that was mixed since the learner has read x
    sent, received  bytes
    """

    def __init__(self, *args: Any, layout: Layout, pieces: int, **options: Any) -> None:
        super().__init__(*args, pieces=pieces, **options)
        self.layout, self.num_pieces = layout, pieces
        self.whole = slice(0, layout.size)
        self.rows = SharedRows(self.comm, layout)
        self.mixed_R = self.rows.taken(self.whole)
        self.parts: list[ShardPart] = []  # of the own exchange
        self.head: Request | None = None
        self.sent = self.received = 0

    @property
    def moved_bytes(self) -> tuple[int, int]:
        return self.sent, self.received

    def renew(self) -> None:
        if self.x is None:
            self.x = copy_of(self.theta)
        self.x[:] = self.theta
        self.credit, self.num_unread = 0.0, 0

    # for the learner, under the lock
    def read_(self, theta: Any) -> None:
        part = self.rows.part(self.whole, self.mixed_R)
        part.set_(theta, part.of(self.x))
        self.mixed_R[:] = 0

    def write_(self, learner: Learner) -> None:
        self.rows.touch(learner)
        rows = tuple(
            (s, to_array(learner.rows[s.name].ids)) for s in self.layout.tables
        )
        part = ShardPart((slice(0, self.layout.num_dense),), rows)
        part.set_(self.x, part.of(learner.theta))

    # it asks
    def ask(self) -> None:
        with self.lock:
            touched = self.rows.part(self.whole, self.rows.taken(self.whole))
        self.parts = touched.cut(self.num_pieces)
        super().ask()

    def send_snapshot(self) -> None:
        part = self.parts[self.piece]
        with self.lock:
            self.asking = part.of(self.x)
        head = part.head()
        self.head = self.comm.Isend(head, self.peer, self.piece)
        tag = self.num_pieces + self.piece
        self.under_way = self.comm.Isend(self.asking, self.peer, tag)
        self.is_sending = True
        self.count(sent=head.nbytes + self.nbytes(part), received=self.nbytes(part))

    def receive_delta(self) -> None:
        self.under_way = self.deltas.Irecv(self.asking, self.peer, self.piece)
        self.is_sending = False

    def take_delta(self) -> None:
        if self.head is not None:
            self.head.Wait()  # the answer to it is there
        super().take_delta()

    def mix_(self) -> None:
        part, mixed = self.parts[self.piece], self.asking
        mixed += part.of(self.x)
        part.set_(self.x, mixed)
        self.note(part)

    # it answers
    def answer(self, message: Message) -> None:
        head = np.zeros(message.nbytes // 8, np.int64)
        message.Recv(head)
        source, piece = message.source, message.tag
        part = self.part_of(head, piece)
        buffer = zeros(part.size, like=self.x)
        self.comm.Recv(buffer, source, self.num_pieces + piece)  # right behind the head
        with self.lock:
            x = part.of(self.x)
            answer_(x, buffer, weight=self.weight)
            if (left := self.comm.left_of(buffer)) is not None:
                x += left  # of the delta: not sent, so not taken off
            part.set_(self.x, x)
            self.note(part)
            self.num_unread += 1
        self.answering = buffer
        self.reply = self.deltas.Isend(buffer, source, piece)
        self.count(sent=self.nbytes(part), received=head.nbytes + self.nbytes(part))
        if piece == self.num_pieces - 1:
            self.partners[source] += 1

    def part_of(self, head: Any, piece: int) -> ShardPart:
        """Return what a head speaks of."""
        tables, end = self.layout.tables, self.layout.num_dense
        counts, ids = np.split(head, [len(tables)])
        each = np.split(ids, np.cumsum(counts)[:-1])
        dense = ShardPart((slice(0, end),), ()).cut(self.num_pieces)[piece].dense
        return ShardPart(dense, tuple(zip(tables, each, strict=True)))

    def note(self, part: ShardPart) -> None:
        """Remember which rows of x the learner has not read yet."""
        for start, (_, ids) in zip(self.rows.ends, part.rows, strict=False):
            self.mixed_R[start + ids] = 1

    def nbytes(self, part: ShardPart) -> int:
        """Return the bytes of its float32 on their way."""
        return self.comm.item_bytes * part.size

    def count(self, *, sent: int, received: int) -> None:
        """Count bytes that travel."""
        self.sent += sent
        self.received += received
