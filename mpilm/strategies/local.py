"""No communication: every rank trains alone.

Source      the single-rank baseline that every strategy is compared with.
Update      theta <- theta - lr * P(grad)                                      (1)
Messages    none while training; the first model is rank 0's (one Bcast).
Invariants  every strategy at one rank equals `local`, to the bit.
Departs     nowhere. At several ranks the models drift apart; the final model is their
            mean, as for every strategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Section [strategy] of `local`: it has no settings."""


class Local(Strategy):
    """Plain SGD on one rank."""

    name = "local"
    Config = LocalConfig
    survives = True
    takes_rows = True

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()  # (1)
        return loss

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        return 0, 0
