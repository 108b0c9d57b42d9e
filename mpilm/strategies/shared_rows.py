"""Row tables among ranks: exchange the rows that somebody has touched, and no others.

Notation    R -> rows of all tables together, V_1 + V_2 + ...
            touched_R  -> 1 for a row that this rank has updated since the last exchange
            u -> rows that any rank has touched, P_d -> elements of grad, w -> row width
Exchange    touched_R <- max over ranks of touched_R                             (1)
            the dense part of a vector and its u rows travel as one vector       (2)
Messages    (1) an Allreduce of R bytes, blocking; (2) what the strategy does with a
            vector of P_d + u w instead of P elements.
Invariants  A row that nobody has touched is the same on all ranks, so its mean is
            itself: the exchange of rows is that of whole models, to the bit where the
            mean of K equal numbers is (K a power of 2) and sums go in rank order.
            In another wire format than float32 it differs by what did not travel: that
            stays with its rank until the row is exchanged again.
Departs     a model whose rows move without a gradient (momentum, weight decay) has no
            untouched rows: only strategies that add gradients take it.

Without row tables all of it is the whole vector, without (1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner
from mpilm.strategies.rows import ShardPart
from mpilm.vectors import to_array
from mpilm.world.base import IN_PLACE, MAX, Comm


class SharedRows:
    """What a strategy knows of the row tables.

    touched  touched_R, uint8; None: there are no tables
    moved    bytes of (1) so far, each way
    """

    def __init__(self, comm: Comm, layout: Layout) -> None:
        self.comm, self.layout, self.moved = comm, layout, 0
        sizes = [segment.shape[0] for segment in layout.tables]
        self.ends = np.cumsum([0, *sizes]).tolist()
        self.touched = np.zeros(sum(sizes), np.uint8) if sizes else None

    def touch(self, learner: Learner) -> None:
        """Note the rows of the learner's gradient, which an update changes."""
        if self.touched is None:
            return
        for start, segment in zip(self.ends, self.layout.tables, strict=False):
            self.touched[start + to_array(learner.rows[segment.name].ids)] = 1

    def agree(self, where: slice) -> ShardPart:
        """Return a slice's dense part and touched rows; begin anew there (1).

        Communicates: collective, one Allreduce of R bytes, or less if some tables lie
            outside; blocking.
        """
        flags = self.taken(where)
        if len(flags) and self.comm.size > 1:
            self.comm.Allreduce(IN_PLACE, flags, MAX)
            self.moved += 2 * len(flags) * (self.comm.size - 1) // self.comm.size
        return self.part(where, flags)

    def tables_in(self, where: slice) -> range:
        """Return the numbers of the tables that lie in a slice; none is cut by it."""
        tables = self.layout.tables
        inside = [where.start <= s.start and s.stop <= where.stop for s in tables]
        first = inside.index(True) if any(inside) else 0
        return range(first, first + sum(inside))

    def taken(self, where: slice) -> Any:
        """Return touched_R of the tables in a slice, a copy; begin anew there."""
        tables = self.tables_in(where)
        if self.touched is None or not tables:
            return np.zeros(0, np.uint8)
        flags = self.touched[self.ends[tables.start] : self.ends[tables.stop]]
        found = flags.copy()
        flags[:] = 0
        return found

    def part(self, where: slice, flags: Any) -> ShardPart:
        """Return a slice's dense part, and the rows that `flags` (as `taken`) name."""
        tables, end = self.tables_in(where), self.layout.num_dense
        start = self.ends[tables.start]
        rows = [
            np.flatnonzero(flags[self.ends[n] - start : self.ends[n + 1] - start])
            for n in tables
        ]
        segments = self.layout.tables[tables.start : tables.stop]
        dense = slice(min(where.start, end), min(where.stop, end))
        spans = (dense,) if dense.stop > dense.start else ()
        return ShardPart(spans, tuple(zip(segments, rows, strict=True)))


def require_resting_rows(name: str, learner: Learner) -> None:
    """Raise if rows move without a gradient: then none is the same on all ranks.

    Raises:
        ConfigError: one line that says what would work.
    """
    if learner.layout.tables and not learner.rows_rest:
        raise ConfigError(
            f"strategy.name = {name}: exchanges the rows that somebody has read; with"
            " momentum or weight decay others move too: take model.sparse = false,"
            ' optim.name = "sgd" without them, or strategy allreduce'
        )
