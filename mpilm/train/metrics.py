"""What a rank has taken for a run so far: time, traffic, loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mpilm.learner.spent import Spent
from mpilm.strategies.base import NUM_BINS
from mpilm.world.base import Traffic, World

LOG_FIELDS = {  # a row of the log; docs/metrics.md defines each of them
    "step": "i8",  # minibatches of this rank
    "samples": "i8",  # samples of this rank
    "seconds": "f8",  # of training, evaluations and checkpoints left out
    "loss": "f8",  # mean negative log-likelihood of this minibatch, nats
    "lr": "f8",
    # so far:
    "blocked_s": "f8",  # the learner waited for communication
    "in_flight_s": "f8",  # communication was under way
    "data_s": "f8",  # the learner waited for its next minibatch
    "forward_s": "f8",  # from a minibatch to its loss
    "backward_s": "f8",  # from the loss to the gradient
    "bytes_sent": "i8",
    "bytes_received": "i8",
    "messages": "i8",  # sends, receives and collectives
    "overlap": "f8",  # share of in_flight_s behind other work
    "idle": "f8",  # share of seconds that were blocked
    "mixes": "i8",  # times that this rank's model was mixed with others
    "staleness": f"{NUM_BINS}i8",  # updates by foreign mixes since their model was read
    "skipped": "i8",  # minibatches so far whose gradient was not finite
    "valid_perplexity": "f8",  # as last measured
    "valid_loss": "f8",  # the same of a model of somebody's own
    # as last measured, with a mean model:
    "consensus_step": "i8",
    "consensus_distance": "f8",  # ||theta_i - m||
    "spectral_gap": "f8",  # of the realised mixing matrix
}


@dataclass
class Totals:
    """What this rank has taken for the run so far, all launches together.

    Checkpoints hold it: a new field needs a default.
    """

    step: int = 0
    seconds: float = 0.0  # evaluations and checkpoints included
    train_seconds: float = 0.0  # without them
    blocked_s: float = 0.0
    in_flight_s: float = 0.0
    data_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    messages: int = 0
    loss_sum: float = 0.0  # of the logged minibatches
    loss_count: int = 0
    skipped: int = 0  # minibatches whose gradient was not finite: no update
    valid_perplexity: float = math.nan  # the last one measured
    valid_loss: float = math.nan  # instead of it, of a model of somebody's own
    valid_error: float = math.nan  # share of wrong guesses; NaN for text
    ema_valid_perplexity: float = math.nan  # of the moving average, if there is one
    ema_valid_loss: float = math.nan
    consensus_step: int = -1  # when the three below were measured
    consensus_distance: float = math.nan  # of this rank's model to the mean m
    consensus_norm: float = math.nan  # ||m||
    spectral_gap: float = math.nan

    @property
    def overlap(self) -> float:
        """Share of communication time hidden behind other work, 0 to 1."""
        return Traffic(blocked_s=self.blocked_s, in_flight_s=self.in_flight_s).overlap

    @property
    def idle(self) -> float:
        """Share of the training time in which the learner waited."""
        return self.blocked_s / self.train_seconds if self.train_seconds else 0.0

    def row(self) -> dict[str, Any]:
        """Return those values of a row of the log that stand here."""
        values = {"seconds": self.train_seconds}
        for name in LOG_FIELDS:
            if name not in values and hasattr(self, name):
                values[name] = getattr(self, name)
        return values


class MetricsRecorder:
    """Adds passing time and traffic to the totals, training excluded from the rest."""

    def __init__(self, world: World, totals: Totals, spent: Spent) -> None:
        self.world, self.totals, self.spent = world, totals, spent
        self.excluded: tuple[Traffic, ...] = ()
        self.last = self.read()

    def begin(self, *excluded: Traffic) -> None:
        """Count from now on, but not the bytes and messages of `excluded`."""
        self.excluded = excluded
        self.last = self.read()

    def read(self) -> dict[str, float]:
        """Return the world's clock and counters."""
        traffic, excluded = self.world.traffic, self.excluded
        return {
            "seconds": self.world.now_s(),
            "blocked_s": traffic.blocked_s,
            "in_flight_s": traffic.in_flight_s,
            "data_s": self.spent.data,
            "forward_s": self.spent.forward,
            "backward_s": self.spent.backward,
            "bytes_sent": traffic.bytes_sent - sum(e.bytes_sent for e in excluded),
            "bytes_received": traffic.bytes_received
            - sum(e.bytes_received for e in excluded),
            "messages": traffic.messages - sum(e.messages for e in excluded),
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
    def paused(self) -> Iterator[None]:
        """Count the time of the block, but neither as training nor its traffic."""
        self.mark()
        yield
        now = self.read()
        self.totals.seconds += now["seconds"] - self.last["seconds"]
        self.last = now


class Milestones:
    """Multiples of a number of samples, and which of them have been passed.

    every    samples; 0: there are none
    samples  how far the run is

    >>> stones = Milestones(100)
    >>> stones.due(99), stones.due(250), stones.pass_(250), stones.due(299)
    (False, True, True, False)
    """

    def __init__(self, every: int, samples: int = 0) -> None:
        self.every = every
        self.passed = samples // every if every else 0

    def state(self) -> dict[str, int]:
        """Return what a checkpoint must hold: one that is due is due after a resume."""
        return {"every": self.every, "passed": self.passed}

    def load_state(self, state: dict[str, int]) -> None:
        """Take up what `state` returned, if it is of the same multiples."""
        if state.get("every") == self.every:
            self.passed = int(state["passed"])

    def due(self, samples: int) -> bool:
        """Return whether a milestone lies behind that was not passed."""
        return self.every > 0 and samples // self.every > self.passed

    def pass_(self, samples: int) -> bool:
        """Pass the milestones up to `samples`; return whether there were any."""
        found = self.due(samples)
        if found:
            self.passed = samples // self.every
        return found
