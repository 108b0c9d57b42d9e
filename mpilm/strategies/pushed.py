"""What a step of a learner's own optimiser is worth: u = lr * P(g), to be pushed."""

from __future__ import annotations

from typing import Any

from mpilm.strategies.base import Learner
from mpilm.strategies.rows import rows_in
from mpilm.vectors import copy_of, rows_at, to_array


class Pushed:
    """Takes the learner's update and returns it as a step, theta_before - theta_after.

    Of plain SGD it is lr * g, in the memory of `grad`; theta stays as it is then.
    """

    def __init__(self) -> None:
        self._kept: Any = None  # theta, beside the learner's update of it

    def of(self, learner: Learner) -> Any:
        """Return u, (P,)."""
        if learner.is_plain_sgd:
            learner.grad *= learner.lr
            return learner.grad
        if self._kept is None:
            self._kept = copy_of(learner.theta)
        self._kept[:] = learner.theta
        learner.update()
        self._kept -= learner.theta
        return self._kept

    def of_rows(self, learner: Learner) -> tuple[Any, dict[str, Any]]:
        """Return u before the row tables, and of the rows in `rows`."""
        if learner.is_plain_sgd:
            u, rows = learner.grad, dict(learner.rows)
            u *= learner.lr
            for _, g in rows.values():
                g *= learner.lr
            return u, rows
        before = touched(learner)
        learner.update()
        after = touched(learner)
        u = before[0] - after[0]
        return u, {n: (i, x - after[1][n][1]) for n, (i, x) in before[1].items()}


def touched(learner: Learner) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """Return copies of all before the row tables, and of the rows in `rows`."""
    layout, theta = learner.layout, learner.theta
    rows = {}
    for name, (ids, _) in learner.rows.items():
        table, _ = rows_in(theta, 0, layout[name])
        rows[name] = (ids, rows_at(table, to_array(ids)))
    return copy_of(theta[: layout.num_dense]), rows
