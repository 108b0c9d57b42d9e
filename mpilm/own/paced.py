"""How far all ranks are, in lockstep.

In lockstep all ranks must end, validate and save at the same step, so they must take
the same number for the samples of all ranks. Where a DataLoader was dealt out here that
is known (`Dealt`). Otherwise minibatches may differ in size (`Paced`):

Notation    t -> steps of every rank
            s(t) -> samples of all ranks in their first t steps
            E -> every
Update      at step kE:  s((k-1)E) is known, and the sum for s(kE) is started (1)
            done(t) = s(kE) + (t - kE) (s(kE) - s((k-1)E)) / E                (2)
            before the first is known: t times the samples of all ranks' first step
Messages    an Iallreduce of 8 bytes, waited for E steps after it was started: ranks
            keep together anyhow within the strategy's period.
Invariants  the same on all ranks; exact where steps are all of one size. A state and
            `load_state` change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mpilm.world.base import IN_PLACE, Request, Traffic, World


class Dealt:
    """Counts of ranks in lockstep whose items were dealt out evenly: no messages.

    What counts are the indices drawn: a data set may make fewer samples of them.

    Args:
        size: ranks.
        after: from minibatches that a rank has drawn to its items.
        accumulate: minibatches in a step.

    traffic  nothing
    """

    rest = 0  # another number of ranks does not go on, see `Batches.resize`

    def __init__(self, size: int, after: Callable[[int], int], accumulate: int) -> None:
        self.size, self.after, self.accumulate = size, after, accumulate
        self.traffic = Traffic()
        self.minibatches = self.own = 0  # drawn by this rank

    def start(self, goal: int = 0) -> None:
        """Nothing to begin."""

    def begin(self, first: int) -> None:
        """Nothing to agree on."""

    def drawn(self, num_samples: int) -> None:
        """Note that this rank has drawn a step."""
        self.minibatches += self.accumulate
        self.own += num_samples

    def done(self, own: int) -> int:
        """Return the items of all ranks so far, as this rank has done `own` samples."""
        before = self.accumulate if own < self.own else 0
        return self.size * self.after(self.minibatches - before)

    def synchronise(self, own: int) -> int:
        """Return the same."""
        return self.done(own)

    def state(self) -> dict[str, Any]:
        """Return where it stands."""
        return {"counts/minibatches": self.minibatches, "counts/own": self.own}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.minibatches = int(state["counts/minibatches"])
        self.own = int(state["counts/own"])

    def close(self) -> None:
        """Nothing to end."""


NAMES = ("steps", "own", "at", "known", "rate_samples", "rate_steps", "pending")


class Paced:
    """Counts of ranks in lockstep.

    Args:
        every: E, the same on all ranks.

    traffic  what counting has taken of the world's bytes and messages
    """

    rest = 0  # another number of ranks does not go on, see `Batches.resize`

    def __init__(self, world: World, every: int) -> None:
        self.world, self.every = world, max(1, every)
        self.traffic = Traffic()
        self.steps = self.own = 0  # drawn by this rank
        self.at = self.known = 0  # kE, s(kE)
        self.rate_samples, self.rate_steps = 0, 1
        self.pending = -1  # s of the reduction that is over and not yet taken
        self._sum = np.zeros(1, np.int64)
        self._reduction: Request | None = None

    def start(self, goal: int = 0) -> None:
        """Collective, one Dup."""
        self.comm = self.world.comm.Dup()

    def begin(self, first: int) -> None:
        """Take the samples of this rank's first step. Collective, an Allreduce."""
        total = np.array([first], np.int64)
        self.comm.Allreduce(IN_PLACE, total)
        self.rate_samples, self.rate_steps = int(total[0]), 1

    def drawn(self, num_samples: int) -> None:
        """Note what this rank has drawn in a step. See (1)."""
        self.steps, self.own = self.steps + 1, self.own + num_samples
        if self.steps % self.every:
            return
        if self.steps > self.every:
            self._settle()
            self.rate_steps = self.every
            self.rate_samples = self.pending - self.known
            self.at, self.known = self.steps - self.every, self.pending
        self.pending = -1
        self._sum[0] = self.own
        self._reduction = self.comm.Iallreduce(IN_PLACE, self._sum)
        moved = 2 * self._sum.nbytes * (self.comm.size - 1) // self.comm.size
        self.traffic.bytes_sent += moved
        self.traffic.bytes_received += moved
        self.traffic.messages += 1

    def _settle(self) -> None:
        if self._reduction is not None:
            self._reduction.Wait()
            self._reduction, self.pending = None, int(self._sum[0])

    def done(self, own: int) -> int:
        """Return the samples of all ranks so far (2), as this rank has done `own`."""
        steps = self.steps - (own < self.own)
        ahead = (steps - self.at) * self.rate_samples // self.rate_steps
        return self.known + ahead

    def synchronise(self, own: int) -> int:
        """Return the samples of all ranks, exactly. Collective, an Allreduce."""
        total = np.array([own], np.int64)
        self.comm.Allreduce(IN_PLACE, total)
        return int(total[0])

    def state(self) -> dict[str, Any]:
        """Return where it stands. At the same step on all ranks."""
        self._settle()
        return {f"counts/{name}": getattr(self, name) for name in NAMES}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        for name in NAMES:
            setattr(self, name, int(state[f"counts/{name}"]))

    def close(self) -> None:
        """Let nothing be in flight. At the same step on all ranks."""
        self._settle()
