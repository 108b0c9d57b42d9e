"""Of hidden matrices the steps of some units only: the largest, and some drawn.

Source      T. Xiao et al., "Fast Parallel Training of Neural Language Models", IJCAI
            2017, by its abstract: traffic is sampled. Which units: our reading.
Notation    u_HD -> the step of a hidden matrix, a row for each unit
            r, q -> share, random: parts of the units
            e_HD -> kept, what earlier steps have not pushed
Update      u <- u + e, where the rest is kept; e = 0 where it is dropped      (1)
            A = the max(1, r H) rows of u with the largest norm                (2)
            B = q H of the other rows, drawn evenly from seed, rank and step   (3)
            rows A and B of u are pushed; e <- u without them                  (4)
Invariants  kept: what is pushed and e add up to all steps so far.
Departs     a unit is a row of one matrix: of an LSTM, one gate of a cell. Drawn rows
            are not scaled up, so with the rest dropped a step is smaller in the mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpilm.learner.flat import Layout, Segment
from mpilm.vectors import rows_at, set_rows_, to_array, zeros

# Modules of our models whose rows are words or classes, not hidden units.
OUTER = ("embedding", "softmax")


def unit_matrices(layout: Layout) -> tuple[Segment, ...]:
    """Return the matrices whose rows are hidden units; row tables are none.

    >>> parts = ("embedding.weight", (9, 2)), ("lstm.weight", (8, 2)), ("b", (8,))
    >>> layout = Layout.of([(*part, "") for part in parts])
    >>> [segment.name for segment in unit_matrices(layout)]
    ['lstm.weight']
    """
    return tuple(
        segment
        for segment in layout
        if len(segment.shape) > 1
        and not segment.is_table
        and segment.name.partition(".")[0] not in OUTER
    )


class Units:
    """Chooses what is pushed of hidden matrices.

    matrices  which
    kept      e of all of them, where they lie in grad, (P,); None: it is dropped

    Args:
        config: with `units` (r), `units_random` (q), and `unsent`.
        rank: of the draws.
        like: a vector of the kind of grad.
    """

    def __init__(self, layout: Layout, config: Any, rank: int, *, like: Any) -> None:
        self.matrices = unit_matrices(layout)
        self.share, self.random, self.rank = config.units, config.units_random, rank
        self.kept: Any = None
        if config.unsent == "kept":
            self.kept = zeros(layout.num_dense, like=like)

    def chosen(self, u: Any, step: int) -> dict[str, tuple[Any, Any]]:
        """Return matrix -> ids of its units, and their steps (1) to (4).

        Args:
            u: the step of all before the row tables; changed by (1).
            step: number of it.
        """
        random = np.random.default_rng([self.rank, step])
        found = {}
        for segment in self.matrices:
            rows = u[segment.slice].reshape(-1, segment.row_width)
            if self.kept is not None:
                kept = self.kept[segment.slice].reshape(-1, segment.row_width)
                rows += kept  # (1)
                kept[:] = rows
            norms = to_array((rows * rows).sum(1))
            ids = largest_and_drawn(norms, self.share, self.random, random)
            found[segment.name] = ids, rows_at(rows, ids)
            if self.kept is not None:
                set_rows_(kept, ids, 0.0 * found[segment.name][1])  # (4)
        return found


def largest_and_drawn(
    norms_H: Any, share: float, drawn: float, random: np.random.Generator
) -> Any:
    """Return A and B, (2) and (3), ascending, int64.

    >>> norms = np.array([1.0, 9.0, 2.0, 8.0])
    >>> largest_and_drawn(norms, 0.5, 0.0, np.random.default_rng(0))
    array([1, 3])
    >>> len(largest_and_drawn(norms, 0.5, 0.25, np.random.default_rng(0)))
    3
    """
    size = len(norms_H)
    count = min(size, max(1, round(share * size)))
    order = np.argsort(-norms_H, kind="stable")
    others = order[count:]
    more = random.choice(others, min(len(others), round(drawn * size)), replace=False)
    return np.sort(np.concatenate([order[:count], more]))
