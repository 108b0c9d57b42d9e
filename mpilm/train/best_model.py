"""The model at the last validation that was kept, to go back to.

Of a rank its own theta, and buffers: after a validation that the schedule rejects
(`schedule.reject`) every rank goes on from where it was at the last one that was kept.
The optimiser, its moments and the place in the data stay: the rejected samples are not
seen again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpilm.storage.saved import nested, under
from mpilm.vectors import fill_, to_array

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner


class BestModel:
    """A copy of a rank's theta and buffers, one more P of memory."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.theta_P = learner.theta.clone()
        self.rest = learner.rest.copy()

    def judge(self, is_kept: bool) -> None:
        """Keep theta as it is, or put the one kept last back."""
        if is_kept:
            self.theta_P.copy_(self.learner.theta)
            self.rest = self.learner.rest.copy()
        else:
            self.learner.theta.copy_(self.theta_P)
            self.learner.rest.put_back(self.rest)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of this rank."""
        return {
            "theta": to_array(self.theta_P),
            **nested("model", self.learner.rest.state(self.rest)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned; empty: the learner's model is the best."""
        if not state:
            self.judge(is_kept=True)
        else:
            fill_(self.theta_P, state["theta"])
            self.rest |= self.learner.rest.read(under("model", state))
