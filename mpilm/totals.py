"""What a rank has taken for a run so far: time, traffic, loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpilm.world.base import World


@dataclass
class Totals:
    """What this rank has taken for the run so far, all launches together."""

    step: int = 0
    seconds: float = 0.0  # evaluations and checkpoints included
    train_seconds: float = 0.0  # without them
    blocked_s: float = 0.0
    in_flight_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    loss_sum: float = 0.0  # of logged minibatches since the last evaluation
    loss_count: int = 0
    valid_perplexity: float = math.nan  # the last one measured
    valid_error: float = math.nan  # share of wrong frames; NaN for text
    ema_valid_perplexity: float = math.nan  # of the moving average, if there is one


class Meter:
    """Adds passing time and traffic to the totals, training apart from the rest."""

    def __init__(self, world: World, totals: Totals) -> None:
        self.world, self.totals = world, totals
        self.last = self.read()

    def read(self) -> dict[str, float]:
        """Return the world's clock and counters."""
        traffic = self.world.traffic
        return {
            "seconds": self.world.now_s(),
            "blocked_s": traffic.blocked_s,
            "in_flight_s": traffic.in_flight_s,
            "bytes_sent": traffic.bytes_sent,
            "bytes_received": traffic.bytes_received,
        }

    def mark(self) -> None:
        """Count what passed since the last mark as training."""
        now = self.read()
        for name, value in now.items():
            delta = value - self.last[name]
            setattr(self.totals, name, getattr(self.totals, name) + delta)
        self.totals.train_seconds += now["seconds"] - self.last["seconds"]
        self.last = now

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Count the time of the block, but neither as training nor its traffic."""
        self.mark()
        yield
        now = self.read()
        self.totals.seconds += now["seconds"] - self.last["seconds"]
        self.last = now
