"""A node as one learner, for the strategy between the nodes (`hierarchical`).

    leader   | gradient ........ | inner strategy: update, exchange with other leaders
    others   | gradient ........ |
                 ==(1)==>

Equation    grad <- (1/m) sum of grad over the node's m ranks                    (1)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpilm.strategies.allreduce import OverlappedSum
from mpilm.strategies.base import Learner
from mpilm.world.base import Comm


class SuperLearner:
    """The leader's model, the mean gradient of all ranks of the node.

    On the other ranks it takes part in `gradient`, and nothing else.

    Args:
        learner: this rank's.
        node: the ranks of the node; rank 0 is the leader.
        bucket_bytes: bytes of gradient reduced by one call.
        moves_first: whether the leader's theta may have changed since it was sent.
    """

    def __init__(
        self, learner: Learner, node: Comm, *, bucket_bytes: int, moves_first: bool
    ) -> None:
        self.learner, self.node = learner, node
        self.bucket_bytes, self.moves_first = bucket_bytes, moves_first
        self.theta, self.grad = learner.theta, learner.grad
        self.layout, self.rows = learner.layout, learner.rows

    @property
    def samples(self) -> int:
        """Samples that this rank has processed."""
        return self.learner.samples

    @property
    def refresh(self) -> Callable[[], None]:
        """Set `lr` to what it is now."""
        return self.learner.refresh

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.learner.lr

    def draw(self) -> dict[str, Any]:
        """Return the rows that the next gradient reads."""
        return self.learner.draw()

    @property
    def rows_rest(self) -> bool:
        """Whether rows stay without a gradient."""
        return self.learner.rows_rest

    def gradient(
        self, ready: Callable[[slice], None] | None = None, *, scale: float = 1.0
    ) -> Any:
        """Set `grad` to `scale` times the node's mean; return the own mean loss (1).

        Communicates: collective in the node, as `allreduce`; a Bcast of 4P bytes before
        it if the inner strategy has moved theta; blocking.
        """
        learner = self.learner
        if self.moves_first:
            self.node.Bcast(learner.theta, root=0)
        reduction = OverlappedSum(self.node, learner, self.bucket_bytes)
        share = 1.0 / self.node.size
        loss = learner.gradient(ready=reduction.segment_is_ready, scale=share)
        reduction.finish()
        learner.refresh()  # the others of the node may have taken longer
        if scale != 1.0:
            learner.grad *= scale
        if ready is not None:
            for segment in reversed(self.layout.segments):
                ready(segment.slice)
        return loss

    @property
    def rest(self) -> None:
        """Nothing: what lies outside theta is one for all ranks of all nodes."""

    def update(self) -> None:
        """Take one step of the leader's optimiser."""
        self.learner.update()

    def __getattr__(self, name: str) -> Any:
        """Whatever else a learner offers is the leader's own."""
        return getattr(self.learner, name)
