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
Departs     a model whose rows move without a gradient (momentum, weight decay) has no
            untouched rows: only strategies that add gradients take it.

Without row tables all of it is the whole vector, without (1) and without copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, allreduced_bytes
from mpilm.vectors import end_to_end, rows_at, set_rows_, to_array, zeros
from mpilm.world.base import IN_PLACE, MAX, Comm


class SharedRows:
    """What a strategy knows of the row tables.

    touched  touched_R, uint8; None: there are no tables
    moved    bytes of (1) and `sum_` so far, each way
    """

    def __init__(self, comm: Comm, layout: Layout) -> None:
        self.comm, self.layout, self.moved = comm, layout, 0
        sizes = [segment.shape[0] for segment in layout.tables]
        self.ends = np.cumsum([0, *sizes])
        self.touched = np.zeros(sum(sizes), np.uint8) if sizes else None
        self.ids: list[Any] = []  # of the last exchange, of each table

    def touch(self, learner: Learner) -> None:
        """Note the rows of the learner's gradient, which an update changes."""
        if self.touched is None:
            return
        for start, segment in zip(self.ends, self.layout.tables, strict=False):
            self.touched[start + to_array(learner.rows[segment.name].ids)] = 1

    def agree(self) -> None:
        """Set `ids` to the rows that anybody has touched; begin anew (1).

        Communicates: collective, one Allreduce of R bytes, blocking.
        """
        assert self.touched is not None
        if self.comm.size > 1:
            self.comm.Allreduce(IN_PLACE, self.touched, MAX)
            self.moved += 2 * len(self.touched) * (self.comm.size - 1) // self.comm.size
        parts = np.split(self.touched, self.ends[1:-1])
        self.ids = [np.flatnonzero(part) for part in parts]
        self.touched[:] = 0

    def gathered(self, vector: Any) -> Any:
        """Return what must be exchanged of a vector of (P,): a copy (2).

        Without row tables it is the vector itself.

        Communicates: as `agree`.
        """
        if self.touched is None:
            return vector
        self.agree()
        rows = [
            rows_at(vector[s.slice].reshape(-1, s.row_width), ids).reshape(-1)
            for s, ids in zip(self.layout.tables, self.ids, strict=True)
        ]
        return end_to_end([vector[: self.layout.num_dense], *rows])

    def put_back_(self, vector: Any, part: Any) -> None:
        """Set what `gathered` returned of a vector, after the exchange."""
        if self.touched is None:
            if part is not vector:
                vector[:] = part
            return
        start = self.layout.num_dense
        vector[:start] = part[:start]
        for segment, ids in zip(self.layout.tables, self.ids, strict=True):
            stop = start + len(ids) * segment.row_width
            rows = part[start:stop].reshape(-1, segment.row_width)
            set_rows_(vector[segment.slice].reshape(-1, segment.row_width), ids, rows)
            start = stop

    def sum_(self, learner: Learner) -> None:
        """Replace the learner's gradient rows by their sum over ranks.

        Communicates: as `agree`; then an Allreduce of 4 u w bytes. Blocking.
        """
        if self.touched is None or self.comm.size == 1:
            return
        self.touch(learner)
        self.agree()
        tables = list(zip(self.layout.tables, self.ids, strict=True))
        sizes = [len(ids) * segment.row_width for segment, ids in tables]
        total = zeros(sum(sizes), like=learner.grad)
        found, start = {}, 0
        for (segment, ids), size in zip(tables, sizes, strict=True):
            rows = learner.rows[segment.name]
            values = total[start : start + size].reshape(-1, segment.row_width)
            set_rows_(values, np.searchsorted(ids, to_array(rows.ids)), rows.values)
            new_ids = rows.ids.new_tensor(ids)
            found[segment.name] = rows._replace(ids=new_ids, values=values)
            start += size
        self.comm.Allreduce(IN_PLACE, total)
        self.moved += allreduced_bytes(len(total), self.comm.size)
        learner.rows = found


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
