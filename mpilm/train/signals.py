"""All ranks stop together when one got a signal, and sync when one asks for it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

from mpilm.world.base import MAX, Request, Traffic, World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# One Ctrl-C may arrive twice: from the terminal, and forwarded by mpirun. A person is
# slower than this (chosen, not tuned).
ECHO_S = 0.5
PAUSE_S = 1.0  # between the starts of two reductions out of lockstep; chosen, not tuned


class StopRequest:
    """Context manager that turns signals into a wish to stop.

    SIGTERM, SIGINT and SIGUSR1 set `requested`, once or many times alike. A second
    SIGINT raises KeyboardInterrupt at once. On leaving, the handlers are as before.

    requested  name of the first signal that came, such as "SIGTERM", or None
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self.interrupted_at_s: float | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now_s = time.monotonic()
        if self.interrupted_at_s is None:
            self.interrupted_at_s = now_s
        elif now_s - self.interrupted_at_s > ECHO_S:
            raise KeyboardInterrupt


DONE, RUNNING, SYNC, STOP = 0, 1, 2, 3


class Agreement:
    """Agreement of all ranks to stop or to sync, without waiting for it in every step.

    Each rank contributes DONE, RUNNING, SYNC or STOP to an Iallreduce; the outcome is
    the maximum. One at a time is in flight, behind the computing (a blocking one in
    every step cost 20% of the speed in returnn#1727). All ranks conclude the same from
    the same outcome:

        STOP     all ranks stop; nobody starts another reduction
        SYNC     out of lockstep: all come to a sync point (validate, save) and go on
        RUNNING  another reduction is started
        DONE     all ranks have finished; nobody starts another reduction

    In lockstep a reduction started at step s is waited for at step s + every, the same
    on all ranks: they stop at the same step, at most 2 * every steps after the signal.

        step     s                  s + every            s + 2 every
        rank 0   |=== Iallreduce ===|=== Iallreduce ===|  stop
        rank 1   |=== Iallreduce ===|=== Iallreduce ===|  stop
                     ^ SIGTERM at rank 1: too late for this one

    So no rank runs ahead of another by more than 2 * every steps. A strategy whose
    period is no longer than `every` keeps its ranks closer than that by itself; with
    one that is longer, reductions would hold up the fast ranks.

    Otherwise (not lockstep) one is only tested, never waited for; each rank stops when
    it sees the outcome, and starts the next a second after the last. A rank that has
    finished goes on contributing, DONE, in `finish`, until all have: so the reductions
    of the others come to an end, their signals reach all ranks, and none is left in
    flight.

    Args:
        world: this rank's world.
        every: steps from the start of a reduction to its outcome, in lockstep.
        request: what this rank wishes.
        lockstep: whether all ranks take the same steps.
        agree: `Pace.agree`: ranks that agree see the outcome at the same step.

    traffic  what the reductions have taken of the world's bytes and messages

    Communicates: collective (it duplicates the communicator), blocking.
    """

    def __init__(
        self,
        world: World,
        *,
        every: int,
        request: StopRequest,
        lockstep: bool = True,
        agree: Callable[[int], int] = int,
    ) -> None:
        self.world, self.comm = world, world.comm.Dup()
        self.every, self.request = every, request
        self.lockstep, self.agree = lockstep, agree
        self.mine = np.zeros(1, np.int64)
        self.outcome = np.zeros(1, np.int64)
        self.reduction: Request | None = None
        self.started_at = 0
        self.started_at_s = -math.inf
        self.stopped = False
        self.traffic = Traffic()

    def poll(self, step: int, *, sync: bool = False) -> int:
        """Return STOP, SYNC or RUNNING: what to do now; call it after every step.

        Args:
            step: minibatches of this rank.
            sync: whether this rank asks for a sync point. Out of lockstep only.

        Communicates: one Iallreduce of 8 bytes at a time; in lockstep started every
        `every` steps and waited for `every` steps later, otherwise never waited for.
        """
        outcome = RUNNING
        if self.reduction is not None:
            if not self._is_over(self.reduction, step):
                return RUNNING
            outcome = self._conclude()
        if not self.stopped and self._is_due():
            self.started_at, self.started_at_s = step, self.world.now_s()
            wish = SYNC if sync and outcome != SYNC else RUNNING
            self._start(wish if self.request.requested is None else STOP)
        return STOP if self.stopped else outcome

    def finish(self, sync: Callable[[], None] | None = None) -> bool:
        """Take part until all ranks have finished; return whether they were stopped.

        Call it on every rank when its loop has ended, before anything else collective.

        Args:
            sync: called at every sync point.

        Communicates: collective, Iallreduce of 8 bytes, blocking.
        """
        if self.reduction is None and not self.stopped:
            self._start(DONE)
        while self.reduction is not None:
            self.reduction.Wait()
            outcome = self._conclude()
            if outcome == SYNC and sync is not None:
                sync()
            if outcome in {RUNNING, SYNC}:
                self._start(DONE)
        return self.stopped

    def _conclude(self) -> int:
        """Return the outcome of the reduction that is over."""
        self.reduction = None
        self.stopped = bool(self.outcome[0] == STOP)
        return int(self.outcome[0])

    def _is_over(self, reduction: Request, step: int) -> bool:
        """Return whether to look at the outcome; in lockstep the same on all ranks."""
        if not self.lockstep:
            if not self.agree(reduction.Test()):
                return False
            reduction.Wait()  # another rank has seen the end of it
            return True
        if step - self.started_at < self.every:
            return False
        reduction.Wait()
        return True

    def _is_due(self) -> bool:
        """Return whether to start the next one; in lockstep the same on all ranks."""
        if self.lockstep:
            return True
        return bool(self.agree(self.world.now_s() - self.started_at_s >= PAUSE_S))

    def _start(self, choice: int) -> None:
        self.mine[0] = choice
        self.reduction = self.comm.Iallreduce(self.mine, self.outcome, op=MAX)
        moved = 2 * self.mine.nbytes * (self.comm.size - 1) // self.comm.size
        self.traffic.bytes_sent += moved
        self.traffic.bytes_received += moved
        self.traffic.messages += 1
