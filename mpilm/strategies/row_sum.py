"""Gradients of row tables, summed over ranks in the way that costs least.

Notation    n_j -> rows in the gradient of rank j, u -> rows in any of them (the union)
            w   -> row width, V -> rows of all tables, each 4 w bytes
            K   -> comm.size
Ways        union   which rows anybody has: flags of all rows, summed; then their sum
                    as one vector                                2 (V + 4 u w) bytes
            gather  ids and rows of every rank go round a ring; each rank adds them up
                    in the order of ranks             sum_j n_j (8 + 4 w) bytes
            dense   the tables as they are                           2 (4 V w) bytes
            (what a rank sends, over (K - 1) / K)
Choice      the least of these with what it costs to copy and add, by u and sum_j n_j of
            the step before: `costs`. All ranks know them, so all choose alike; they are
            in the checkpoint, so a resumed run chooses as the run did. Prices are those
            of ranks on one node, or else of a network: nothing is timed in a run, whose
            bits would go by it.
            A dense step does not tell: every LOOK of them there is one by union.
Invariants  the sum is the same on all ranks, and whichever way to rounding.
Departs     in another wire format than float32 always by union: what does not travel
            stays with its row.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from mpilm.learner.flat import Layout, Rows
from mpilm.strategies.base import ITEM_BYTES, Learner
from mpilm.strategies.shared_rows import SharedRows
from mpilm.vectors import (
    add_rows_,
    as_ids,
    end_to_end,
    is_tensor,
    set_rows_,
    to_array,
    zeros,
)
from mpilm.world.base import IN_PLACE, MAX, SUM, Comm, Op

Way = Literal["union", "gather", "dense"]

LOOK = 50  # dense steps in a row; chosen, not tuned
MOST_COUNTED = 255  # ranks that a flag can count
TAG = 1


class Costs(NamedTuple):
    """What ways cost, in bytes that an Allreduce of float32 moves meanwhile.

    gathered  a byte that goes round the ring and is added
    united    a byte of the union: set, summed, read
    flag      a flag: summed, looked at
    dense     a byte of the tables
    call      a message that begins
    """

    gathered: float
    united: float
    flag: float
    dense: float
    call: float


# benchmarks/bench_rows.py: 2 ranks that share memory, where copies cost most; 4 nodes
# over 1 Gbit/s, where bytes do (one of a ring travels once, of an Allreduce twice).
ON_ONE_NODE = Costs(gathered=2.2, united=1.6, flag=2.0, dense=1.0, call=500_000)
OVER_A_NETWORK = Costs(gathered=0.55, united=1.05, flag=1.0, dense=1.0, call=40_000)


class RowSum:
    """Sums `learner.rows`.

    sent, received  bytes so far
    seen            elements of the union, sum_j n_j, elements of those; -1: unknown
    num_dense       dense steps since

    Args:
        comm: of all ranks that train.
        layout: with the tables.
        way: "auto": the cheapest.
    """

    def __init__(self, comm: Comm, layout: Layout, way: Way | Literal["auto"]) -> None:
        self.comm, self.layout, self._way = comm, layout, way
        self.shared = SharedRows(comm, layout)
        self.sent = self.received = self.num_dense = 0
        self.seen = np.full(3, -1, np.int64)
        self.widths = [segment.row_width for segment in layout.tables]
        self.prices = OVER_A_NETWORK
        if layout.tables and comm.size > 1 and comm.Split_node().size == comm.size:
            self.prices = ON_ONE_NODE

    def way(self) -> Way:
        """Return how the next gradients are summed; alike on all ranks."""
        if self.comm.exact is not self.comm:
            return "union"
        if self._way != "auto":
            return self._way
        if self.seen[0] < 0 or self.num_dense >= LOOK:
            return "union"
        costs = self.costs()
        return min(costs, key=lambda way: costs[way])

    def costs(self) -> dict[Way, float]:
        """Return what each way costs, in bytes that an Allreduce moves meanwhile."""
        united, n, gathered = self.seen.tolist()
        flags, size = self.shared.ends[-1], sum(s.size for s in self.layout.tables)
        by, ring = self.prices, 2 * self.comm.size - 1
        return {
            "union": by.flag * flags + by.united * ITEM_BYTES * united + 2 * by.call,
            "gather": by.gathered * (8 * n + ITEM_BYTES * gathered) + ring * by.call,
            "dense": by.dense * ITEM_BYTES * size + by.call,
        }

    def sum_(self, learner: Learner, error: Any = None) -> None:
        """Replace the learner's gradient rows by their sum over ranks.

        Args:
            error: (P,), is added, and becomes what did not travel; None: all does.

        Communicates: collective, blocking; see the header.
        """
        if not self.layout.tables or self.comm.size == 1:
            return
        way = self.way()
        self.num_dense = self.num_dense + 1 if way == "dense" else 0
        if way == "union":
            self.unite(learner, error)
        elif way == "gather":
            self.gather(learner)
        else:
            self.sum_tables(learner)

    def unite(self, learner: Learner, error: Any = None) -> None:
        """Sum the rows that anybody has."""
        self.shared.touch(learner)
        where = slice(self.layout.num_dense, self.layout.size)
        flags = self.shared.taken(where)
        counts = self.comm.size <= MOST_COUNTED  # then a flag says how many have it
        self.reduce(flags, SUM if counts else MAX)
        part = self.shared.part(where, flags)
        total = zeros(part.size, like=learner.grad)
        found, start, ends = {}, 0, self.shared.ends
        numbers: list[int] = []
        for number, (segment, ids) in enumerate(part.rows):
            stop = start + len(ids) * segment.row_width
            rows = learner.rows[segment.name]
            values = total[start:stop].reshape(-1, segment.row_width)
            set_rows_(values, np.searchsorted(ids, to_array(rows.ids)), rows.values)
            found[segment.name] = Rows(as_ids(ids, learner.grad), values)
            start = stop
            own = flags[ends[number] : ends[number + 1]]
            numbers.append(int(own.sum()) if counts else self.comm.size * len(ids))
        if error is not None:
            total += part.of(error)
        left = self.reduce(total)
        if left is not None:
            part.set_(error, left)
        learner.rows = found
        self.note([len(ids) for _, ids in part.rows], numbers)

    def gather(self, learner: Learner) -> None:
        """Let the rows of all ranks go round a ring; add them up in rank order."""
        comm, tables = self.comm, self.layout.tables
        own = [learner.rows[segment.name] for segment in tables]
        numbers = np.zeros((comm.size, len(tables)), np.int64)
        numbers[comm.rank] = [len(rows.ids) for rows in own]
        self.reduce(numbers.reshape(-1))
        ids = np.concatenate([to_array(rows.ids) for rows in own])
        blocks = {comm.rank: (ids, end_to_end([r.values.reshape(-1) for r in own]))}
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for hop in range(comm.size - 1):
            sent, coming = (comm.rank - hop) % comm.size, (left - hop) % comm.size
            num = numbers[coming]
            values = zeros(int(num @ self.widths), like=learner.grad)
            blocks[coming] = (np.empty(num.sum(), np.int64), values)
            for out, buffer in zip(blocks[sent], blocks[coming], strict=True):
                self.pass_on(out, right, buffer, left)
        cuts = np.cumsum(numbers, axis=1)[:, :-1]
        ids_of = [np.split(blocks[rank][0], cuts[rank]) for rank in range(comm.size)]
        found, done = {}, [0] * comm.size
        for number, segment in enumerate(tables):
            parts = [ids[number] for ids in ids_of]
            has = np.zeros(segment.shape[0], bool)
            has[np.concatenate(parts)] = True
            union, place = np.flatnonzero(has), np.cumsum(has) - 1
            width = segment.row_width
            total = zeros(len(union) * width, like=learner.grad).reshape(-1, width)
            for rank, part in enumerate(parts):
                start, done[rank] = done[rank], done[rank] + len(part) * width
                values = blocks[rank][1][start : done[rank]].reshape(-1, width)
                add_rows_(total, place[part], values)
            found[segment.name] = Rows(as_ids(union, learner.grad), total)
        learner.rows = found
        united = [len(found[segment.name].ids) for segment in tables]
        self.note(united, numbers.sum(0).tolist())

    def pass_on(self, out: Any, right: int, buffer: Any, left: int) -> None:
        """Send to the right and receive from the left, what is not empty."""
        coming = self.comm.Irecv(buffer, left, TAG) if len(buffer) else None
        going = self.comm.Isend(out, right, TAG) if len(out) else None
        for request in (coming, going):
            if request is not None:
                request.Wait()
        self.sent += out.nbytes
        self.received += buffer.nbytes

    def sum_tables(self, learner: Learner) -> None:
        """Sum the tables as they are; every row of them has a gradient then."""
        tables, first = self.layout.tables, self.layout.num_dense
        total = zeros(self.layout.size - first, like=learner.grad)
        found = {}
        for segment in tables:
            part = total[segment.start - first : segment.stop - first]
            values = part.reshape(-1, segment.row_width)
            rows = learner.rows[segment.name]
            set_rows_(values, to_array(rows.ids), rows.values)
            ids = as_ids(np.arange(len(values)), learner.grad)
            found[segment.name] = Rows(ids, values)
        self.reduce(total)
        learner.rows = found

    def reduce(self, vector: Any, op: Op = SUM) -> Any:
        """Sum a vector over the ranks, in its place; return what did not travel."""
        left = self.comm.Allreduce(IN_PLACE, vector, op)
        if vector.dtype == np.float32 or is_tensor(vector):
            moved = self.comm.allreduced_bytes(len(vector))
        else:
            moved = 2 * vector.nbytes * (self.comm.size - 1) // self.comm.size
        self.sent += moved
        self.received += moved
        return left

    def note(self, united: list[int], numbers: list[int]) -> None:
        """Keep u and sum_j n_j, of each table, for the next choice."""
        sizes = [np.dot(counts, self.widths) for counts in (united, numbers)]
        self.seen[:] = sizes[0], sum(numbers), sizes[1]
