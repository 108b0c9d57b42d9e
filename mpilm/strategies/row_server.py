"""A parameter server of which a rank reads and writes only what its minibatch touches.

Source      T. Xiao et al., "Fast Parallel Training of Neural Language Models", IJCAI
            2017: of an embedding a minibatch needs and changes some rows only.
Notation    part -> of a shard: all of it before the row tables, and some rows of these;
                    pushed of hidden matrices, too, where some units are (units.py)
Update      (1) and (2) of parameter_server.py, for the part; other velocities rest.
Messages    to the server                        from the server
            PULL_PART  clock, head               the part
            PUSH_PART  head
            PART       u of the part             -
            head: how many rows of each matrix that travels in rows, then their ids;
            int64. Values are as in theta. One question to a shard, however many there
            are.
Invariants  parts with all rows are the model, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mpilm.learner.flat import Layout, Segment
from mpilm.strategies.base import NUM_BINS
from mpilm.strategies.parameter_server import ParameterServer, apply_, finish_all
from mpilm.strategies.rows import ShardPart, by_owner, spans_between
from mpilm.vectors import end_to_end, to_array, zeros
from mpilm.world.base import Comm, Message, Request, World

PULL_PART, PUSH_PART, PART = range(4, 7)  # tags, beside those of ParameterServer

RowSteps = Mapping[str, tuple[Any, Any]]  # table -> ids, rows


class RowServer(ParameterServer):
    """`pull` and `push` are of whole models, as in ParameterServer.

    in_rows  what travels in rows: the row tables; pushed, the hidden matrices first
    dense    the slices of each rank's shard that travel whole
    sent, received  bytes of parts and their heads

    Args:
        units: the hidden matrices of which some rows are pushed.
        settings: those of ParameterServer.
    """

    def __init__(
        self,
        world: World,
        comm: Comm,
        layout: Layout,
        *,
        units: tuple[Segment, ...] = (),
        **settings: Any,
    ) -> None:
        super().__init__(world, comm, layout, **settings)
        tables = layout.tables
        self.in_rows = {PULL_PART: tables, PUSH_PART: (*units, *tables)}
        self.dense = {
            tag: [spans_between(s.start, s.stop, segments) for s in self.shards]
            for tag, segments in self.in_rows.items()
        }
        self.sent = self.received = 0

    def parts(
        self, ids: Mapping[str, Any], tag: int
    ) -> dict[int, tuple[ShardPart, list[slice]]]:
        """Return rank -> its part, and where its rows lie among those of each matrix.

        Args:
            ids: matrix -> (n,) int64, ascending, each once.
            tag: PULL_PART or PUSH_PART.

        Raises:
            ValueError: the ids do not ascend, or are no rows of the matrix.
        """
        none = np.zeros(0, np.int64)
        in_rows = self.in_rows[tag]
        found = {r: [(none, slice(0, 0))] * len(in_rows) for r in self.ranks_with_shard}
        for number, segment in enumerate(in_rows):
            owned = by_owner(segment, self.shards, ids.get(segment.name, none))
            for rank, own, where in owned:
                found[rank][number] = (own, where)
        return {
            rank: (
                ShardPart(
                    self.dense[tag][rank],
                    tuple(zip(in_rows, (own for own, _ in each), strict=True)),
                ),
                [where for _, where in each],
            )
            for rank, each in found.items()
        }

    @property
    def ranks_with_shard(self) -> list[int]:
        """The others with a shard, in the order to ask them; then this one."""
        return [*self.peers, *([self.comm.rank] if self.is_server else [])]

    # for the learner
    def pull_part(self, out: Any, ids: Mapping[str, Any], clock: int) -> None:
        """Read all before the row tables, and rows, into `out`, before step `clock`.

        Args:
            out: (P,); the other rows stay.
            ids: table -> (n,) int64, ascending, each once.

        Communicates: pairwise with every owner: 8 (1 + tables + rows) bytes there, the
            part back; blocking.
        """
        under_way: list[Request] = []
        answers = []
        for peer, (part, _) in self.parts(ids, PULL_PART).items():
            if peer == self.comm.rank:
                self.wait_for_clock(clock)
                with self.lock:
                    part.set_(out, part.of(self.values, self.own.start))
                    self.num_seen = self.num_foreign
                continue
            head, values = part.head(clock), zeros(part.size, like=out)
            answers.append((part, values))
            under_way.append(self.answers.Irecv(values, peer, PULL_PART))
            under_way.append(self.comm.Isend(head, peer, PULL_PART))
            self.count_bytes(sent=head.nbytes, received=self.nbytes(values))
        finish_all(under_way)
        finish_all(self.sends)
        for part, values in answers:
            part.set_(out, values)
        self.num_pulls += 1

    def push_part(self, dense: Any, rows: RowSteps) -> None:
        """Apply (1) to what travels whole and to rows; other velocities rest.

        Args:
            dense: u before the row tables.
            rows: matrix -> ids as in `pull_part`, and u of them, (n, width).

        Communicates: pairwise with every owner: 8 (tables + rows) bytes and the part;
            does not block.
        """
        ids = {name: to_array(own) for name, (own, _) in rows.items()}
        for peer, (part, places) in self.parts(ids, PUSH_PART).items():
            found = [dense[span] for span in part.dense]
            for (segment, own), where in zip(part.rows, places, strict=True):
                if len(own):
                    found.append(rows[segment.name][1].reshape(-1)[where])
            u = end_to_end(found or [dense[:0]])
            if peer != self.comm.rank:
                if self.error is not None:
                    u += part.of(self.error)
                    part.set_(self.error, self.comm.left_of(u))
                head = part.head()
                self.sends.append(self.comm.Isend(head, peer, PUSH_PART))
                self.sends.append(self.comm.Isend(u, peer, PART))
                self.count_bytes(sent=head.nbytes + self.nbytes(u))
                continue
            with self.lock:
                late = self.num_foreign - self.num_seen
                self.staleness[min(late, NUM_BINS - 1)] += 1
                self.apply_part_(part, u)
                self.partners[peer] += 1

    # the activity
    def answer(self, message: Message) -> None:
        """Answer a pull of a part, apply a push of one; others as ParameterServer."""
        source, tag = message.source, message.tag
        if tag not in (PULL_PART, PUSH_PART):
            super().answer(message)
            return
        head = np.zeros(message.nbytes // 8, np.int64)
        message.Recv(head)
        self.count_bytes(received=head.nbytes)
        if tag == PULL_PART:
            send = partial(self.send_part, source, self.own_part(head[1:], tag))
            self.when_due(source, int(head[0]), send)
            return
        part = self.own_part(head, tag)
        u = zeros(part.size, like=self.values)
        self.comm.Recv(u, source, PART)  # sent right behind the head
        self.count_bytes(received=self.nbytes(u))
        with self.lock:
            self.apply_part_(part, u)
            self.count(source)

    def own_part(self, head: Any, tag: int) -> ShardPart:
        """Return the part of the own shard that a head speaks of."""
        in_rows = self.in_rows[tag]
        counts, ids = np.split(head, [len(in_rows)])
        each = np.split(ids, np.cumsum(counts)[:-1]) if in_rows else []
        rows = tuple(zip(in_rows, each, strict=True))
        return ShardPart(self.dense[tag][self.comm.rank], rows)

    def send_part(self, source: int, part: ShardPart) -> None:
        """Send what was pulled; the receive of it is posted already."""
        with self.lock:
            values = part.of(self.values, self.own.start)
        self.answers.Send(values, source, PULL_PART)
        self.count_bytes(sent=self.nbytes(values))

    def apply_part_(self, part: ShardPart, u: Any) -> None:
        """Apply (1) to a part of the own shard, under the lock."""
        start = self.own.start
        x, v = part.of(self.values, start), None
        if self.momentum:
            v = part.of(self.velocity, start)
        apply_(x, v, u, momentum=self.momentum)
        part.set_(self.values, x, start)
        if self.momentum:
            part.set_(self.velocity, v, start)

    def nbytes(self, values: Any) -> int:
        """Return the bytes that float32 values have on their way."""
        return self.comm.item_bytes * len(values)

    def count_bytes(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes that travel."""
        with self.lock:
            self.sent += sent
            self.received += received

    def moved_bytes(self) -> tuple[int, int]:
        """Return the bytes of parts and ENDs, sent and received."""
        ends = self.end_bytes()
        return self.sent + ends, self.received + ends
