"""Who makes MPI move, and how a rank waits.

MPI libraries move large non-blocking messages only while somebody calls them. Here
that is whoever waits; and, while the learner computes, threads of this page:

    learner    compute ................. Wait
    progress   Test . Test .  . Test               every pending request, with pauses
    queue      Ibarrier ...|==Allreduce==|         one per communicator, in order

Collectives that must go on beside the learner have a queue and a thread. It first
enters a barrier (an Ibarrier polled with pauses, so that nobody spins while waiting for
a late rank) and then calls the fast blocking collective. docs/mpi-world.md has the
measurements behind this.

Without MPI_THREAD_MULTIPLE there are no threads: requests go on in Test and Wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from mpilm.errors import WorldError
from mpilm.world.base import Traffic
from mpilm.world.mpi.clock import (
    BESIDE_PAUSE_S,
    BESIDE_SHARE,
    LAST_PAUSE_S,
    SPIN_S,
    TICK_S,
    clock,
    pause_s,
)
from mpilm.world.mpi.stall import StallInspector, Waiting

T = TypeVar("T")


class Pending(Protocol):
    """Something under way that goes on when it is looked at."""

    def look(self) -> bool:
        """Return whether it is done. Never blocks."""


class Deaths(Protocol):
    """What is known of ranks that have died, see membership.py."""

    @property
    def death(self) -> WorldError | None:
        """What the learner must be told of; None: nobody has died."""

    def translate(self, error: BaseException) -> BaseException:
        """Return what an error means."""


class Stopped(BaseException):
    """Ends a thread whose world is gone."""


class Meter:
    """Counts what a rank communicates; every thread of it may call.

    `in_flight_s` is the time during which at least one of the learner's calls was
    under way: concurrent calls count once, so that `overlap` cannot exceed the share
    of communication that was really hidden.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._lock = threading.Lock()
        self._num_in_flight = 0
        self._since_s = 0.0
        self._blocked_depth = 0
        self._blocked_since_s = 0.0

    @property
    def is_blocked(self) -> bool:
        """Whether the learner waits."""
        return self._blocked_depth > 0

    def count(self, *, sent: int = 0, received: int = 0, messages: int = 0) -> None:
        """Add bytes and calls."""
        with self._lock:
            self.traffic.bytes_sent += sent
            self.traffic.bytes_received += received
            self.traffic.messages += messages

    def begin(self) -> None:
        """One of the learner's calls starts."""
        with self._lock:
            if self._num_in_flight == 0:
                self._since_s = clock()
            self._num_in_flight += 1

    def end(self) -> None:
        """One of the learner's calls is complete."""
        with self._lock:
            self._num_in_flight -= 1
            if self._num_in_flight == 0:
                self.traffic.in_flight_s += clock() - self._since_s

    def block(self) -> None:
        """From now on the learner does nothing but wait."""
        self._blocked_depth += 1
        if self._blocked_depth == 1:
            self._blocked_since_s = clock()

    def unblock(self) -> None:
        """The learner goes on."""
        self._blocked_depth -= 1
        if self._blocked_depth == 0:
            waited_s = clock() - self._blocked_since_s
            self.traffic.blocked_s += waited_s
            if self.traffic.on_blocked is not None:
                self.traffic.on_blocked(waited_s)


class Progress:
    """All that is under way on one rank, and the threads that move it.

    computing  whether the learner computes, so that others should leave it the core
    enter      what the progress thread calls once, when it is set
    watch      told of every call that begins; what it returns is called at its end

    Args:
        meter: counts the time of waits.
        inspector: watches every wait.
        background: whether threads may call MPI beside the learner.
    """

    computing = False
    membership: Deaths | None = None
    enter: Callable[[], None] | None = None
    watch: Callable[[str], Callable[[], None]] | None = None

    def __init__(
        self, meter: Meter, inspector: StallInspector, *, background: bool
    ) -> None:
        self.meter, self.inspector, self.background = meter, inspector, background
        self._pending: dict[int, Pending] = {}
        self._polling = threading.Lock()
        self._changed = threading.Condition()  # for `wait`
        self._needed = threading.Event()  # for the progress thread
        self._threads: list[threading.Thread] = []
        self._on_stop: list[Callable[[], None]] = []
        self._beside: set[int] = set()  # identities of threads that are not the learner
        self._stopping = False
        self._failure: BaseException | None = None
        self._next_tick_s = 0.0

    def begin(self) -> None:
        """Start the progress thread, where threads are possible."""
        if self.background:
            self.thread(self._run, "mpilm progress")

    def thread(
        self,
        work: Callable[[], None],
        name: str,
        end: Callable[[], None] | None = None,
    ) -> None:
        """Run `work` on a thread beside the learner.

        Args:
            work: must not raise.
            name: of the thread, for debuggers.
            end: wakes it when the world ends, if `wait` would not.
        """
        if end is not None:
            self._on_stop.append(end)

        def run() -> None:
            self._beside.add(threading.get_ident())
            work()

        # daemon: an interpreter that exits without close() must not wait for it
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def is_learner(self) -> bool:
        """Return whether the learner calls (autograd's own threads are the learner)."""
        return threading.get_ident() not in self._beside

    def add(self, pending: Pending, *, waited_for: bool) -> None:
        """Have `pending` looked at until it is done.

        Args:
            pending: not done yet.
            waited_for: the caller waits at once, so the progress thread may sleep on.
        """
        self._pending[id(pending)] = pending
        if not waited_for:
            self._needed.set()

    def poll(self) -> None:
        """Look once at everything that is pending. Never blocks."""
        if not self._pending or not self._polling.acquire(blocking=False):
            return
        try:
            for pending in list(self._pending.values()):
                if pending.look():
                    del self._pending[id(pending)]
        finally:
            self._polling.release()

    def wait(
        self,
        ready: Callable[[], T | None],
        waiting: Waiting | None = None,
        *,
        spin: bool = True,
    ) -> T:
        """Block until `ready()` is neither None nor False; return it.

        Args:
            ready: is asked after every change on this rank, and in growing intervals.
            waiting: what for, if the stall inspector should know.
            spin: ask without pausing at first, if the learner has nothing else to do;
                not if a thread of this rank is waited for: it needs the core, and
                wakes us.
        """
        found = ready()
        if found is not None and found is not False:
            return found
        learner = self.is_learner()
        if learner:
            self.meter.block()
        try:
            with self.inspector.watching(waiting):
                return self._wait(ready, spin=spin)
        finally:
            if learner:
                self.meter.unblock()

    def _wait(self, ready: Callable[[], T | None], *, spin: bool) -> T:
        start_s = clock()
        while True:
            self.poll()
            found = ready()
            if found is not None and found is not False:
                return found
            self.check()
            if not self.background:
                self._tick()
            waited_s = clock() - start_s
            if spin and waited_s < SPIN_S and self.meter.is_blocked:
                time.sleep(0.0)
                continue
            longest_s = BESIDE_PAUSE_S if self.computing else LAST_PAUSE_S
            pause = pause_s(waited_s, longest_s=longest_s) if spin else longest_s
            with self._changed:
                self._changed.wait(pause)

    def notify(self) -> None:
        """Let everybody in `wait` look again."""
        with self._changed:
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the learner as soon as it waits."""
        self._failure = error
        self.notify()

    def reported(self, error: BaseException) -> None:
        """The learner knows of `error` already."""
        if self._failure is error:
            self._failure = None

    def check(self) -> None:
        """Raise if this thread should not go on waiting.

        Raises:
            Stopped: the world is gone.
            BaseException: what an activity of this rank raised; in the learner only.
        """
        death = self.membership.death if self.membership else None
        if self.is_learner():
            if death is not None:
                raise death
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
        elif self._stopping or death is not None:
            raise Stopped

    def meaning(self, error: BaseException) -> BaseException:
        """Return an error of MPI, or what it says: that a rank has died.

        A queue that ends because of a death leaves its calls with that death.
        """
        if self.membership is None:
            return error
        if isinstance(error, Stopped) and self.membership.death is not None:
            return self.membership.death
        return self.membership.translate(error)

    def settle(self, timeout_s: float) -> None:
        """Wait until nothing is pending: after a death MPI ends all of it."""
        deadline_s = clock() + timeout_s
        while self._pending and clock() < deadline_s:
            self.poll()
            time.sleep(LAST_PAUSE_S)

    def stop(self, timeout_s: float) -> bool:
        """End the threads; return whether all of them ended in time."""
        self._stopping = True
        self.notify()
        self._needed.set()
        for end in self._on_stop:
            end()
        deadline_s = clock() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - clock()))
        return not any(thread.is_alive() for thread in self._threads)

    def _tick(self) -> None:
        now_s = clock()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            self.inspector.tick(now_s)

    def _run(self) -> None:
        """Be the progress thread."""
        since_s = clock()
        entered = None
        while not self._stopping:
            try:
                if self.enter is not None and self.enter is not entered:
                    entered = self.enter
                    entered()
                if not self.meter.is_blocked:  # else the learner polls
                    self.poll()
                self._tick()
            except BaseException as error:
                self.fail(self.meaning(error))
                return
            if not self._pending:
                self._needed.wait(TICK_S)
            if self._needed.is_set():
                self._needed.clear()
                since_s = clock()
            time.sleep(pause_s(clock() - since_s, BESIDE_SHARE, BESIDE_PAUSE_S))
