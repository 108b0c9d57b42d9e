"""A parameter server that also moves single rows of matrices.

Source      T. Xiao et al., "Fast Parallel Training of Neural Language Models", IJCAI
            2017: of an embedding a minibatch needs and changes some rows only.
Update      (1) and (2) of parameter_server.py, for the rows; other velocities rest.
Messages    to the server                        from the server
            PULL_ROWS  clock, segment, row ids   the rows
            PUSH_ROWS  segment, row ids
            ROWS       u of the rows             -
            Numbers are int64, values as in theta.
Invariants  pushes of all rows are a push of the model, to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mpilm.strategies.parameter_server import ParameterServer, apply_, finish_all
from mpilm.strategies.rows import by_owner, rows_in
from mpilm.world.base import Message, Request

PULL_ROWS, PUSH_ROWS, ROWS = range(4, 7)  # tags, beside those of ParameterServer


class RowServer(ParameterServer):
    """`pull`, `push` and `moved_bytes` are of whole models, as in ParameterServer."""

    # for the learner
    def pull_rows(self, name: str, ids: Any, out: Any, clock: int) -> None:
        """Read rows of the segment `name` before step number `clock`.

        Args:
            ids: (n,) int64, ascending, each once; (2) holds on the ranks that own them.
            out: (n * width,): the rows, one after the other.

        Raises:
            ValueError: the ids do not ascend, or are no rows of the segment.

        Communicates: pairwise with the owners: 16 + 8n bytes there, the rows back;
            blocking.
        """
        segment = self.layout[name]
        index = self.layout.segments.index(segment)
        under_way: list[Request] = []
        for peer, own, part in by_owner(segment, self.shards, ids):
            if peer == self.comm.rank:
                self.wait_for_clock(clock)
                self.gather_(index, own, out[part])
            else:
                question = np.concatenate([np.array([clock, index]), own])
                under_way.append(self.answers.Irecv(out[part], peer, PULL_ROWS))
                under_way.append(self.comm.Isend(question, peer, PULL_ROWS))
        finish_all(under_way)
        finish_all(self.sends)

    def push_rows(self, name: str, ids: Any, rows: Any) -> None:
        """Apply (1) to rows of the segment `name` only; other velocities rest.

        Args:
            ids: (n,) int64, ascending, each once.
            rows: (n * width,): u of these rows; read until `settle` or a pull returns.

        Raises:
            ValueError: the ids do not ascend, or are no rows of the segment.

        Communicates: pairwise with the owners: 8 + 8n bytes and the rows; does not
            block.
        """
        segment = self.layout[name]
        index = self.layout.segments.index(segment)
        for peer, own, part in by_owner(segment, self.shards, ids):
            if peer == self.comm.rank:
                self.apply_rows_(index, own, rows[part])
            else:
                head = np.concatenate([np.array([index]), own])
                self.sends.append(self.comm.Isend(head, peer, PUSH_ROWS))
                self.sends.append(self.comm.Isend(rows[part], peer, ROWS))

    # the activity
    def answer(self, message: Message) -> None:
        """Answer a pull of rows, apply a push of rows; others as ParameterServer."""
        source, tag = message.source, message.tag
        if tag not in (PULL_ROWS, PUSH_ROWS):
            super().answer(message)
            return
        head = np.zeros(message.nbytes // 8, np.int64)
        message.Recv(head)
        if tag == PULL_ROWS:
            send = partial(self.send_rows, source, int(head[1]), head[2:])
            self.when_due(source, int(head[0]), send)
            return
        index, ids = int(head[0]), head[1:]
        rows = self.incoming[: len(ids) * self.layout.segments[index].row_width]
        self.comm.Recv(rows, source, ROWS)  # sent right behind the head
        self.apply_rows_(index, ids, rows)
        with self.lock:
            self.count(source)

    def send_rows(self, source: int, index: int, ids: Any) -> None:
        """Send rows that were pulled; the receive of them is posted already."""
        rows = self.outgoing[: len(ids) * self.layout.segments[index].row_width]
        self.gather_(index, ids, rows)
        self.answers.Send(rows, source, PULL_ROWS)

    def gather_(self, index: int, ids: Any, out: Any) -> None:
        """Copy rows of the own shard, of the segment of this index, into `out`."""
        segment, start = self.layout.segments[index], self.own.start
        values, first = rows_in(self.values, start, segment)
        with self.lock:
            out[:] = values[ids - first].reshape(-1)

    def apply_rows_(self, index: int, ids: Any, u: Any) -> None:
        """Apply (1) to rows of the own shard."""
        segment, start = self.layout.segments[index], self.own.start
        values, first = rows_in(self.values, start, segment)
        at, v = ids - first, None
        with self.lock:
            x = values[at]
            if self.momentum:
                velocity, _ = rows_in(self.velocity, start, segment)
                v = velocity[at]
            apply_(x, v, u.reshape(x.shape), momentum=self.momentum)
            values[at] = x
            if self.momentum:
                velocity[at] = v
