"""Calls under way: the requests that `MpiComm` hands out.

Transfer          an MPI request, tested by whoever polls: Isend, Irecv, Ibarrier
QueuedCollective  a barrier of all ranks, then a blocking MPI call: Iallreduce, others
CollectiveQueue   runs the collectives of one communicator in order, beside the learner
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, TypeVar

from mpi4py import MPI

from mpilm.errors import LeftBehindError, RanksDiedError, WorldError
from mpilm.world.base import Request
from mpilm.world.mpi.large import num_bytes
from mpilm.world.mpi.progress import Progress, Stopped
from mpilm.world.mpi.staging import Stage
from mpilm.world.mpi.stall import Waiting

T = TypeVar("T")
# a collective: its name, bytes; blocks for all ranks, returns what watches the call
Enter = Callable[[str, int], AbstractContextManager[None]]


class Operation(Request):
    """A call under way. `what` stands in reports of stalls."""

    def __init__(self, progress: Progress, what: str, nbytes: int = 0) -> None:
        self.progress, self.what, self.nbytes = progress, what, nbytes
        self.done = False
        self.error: BaseException | None = None
        self.is_learners = progress.is_learner()
        self.end_watch = progress.watch(what) if progress.watch else None
        if self.is_learners:
            progress.meter.begin()

    def complete(self, error: BaseException | None = None) -> None:
        """Mark it done; wake whoever waits."""
        if self.is_learners:
            self.progress.meter.end()
        if self.end_watch is not None:
            self.end_watch()
        self.error = error
        self.done = True
        self.progress.notify()

    def waiting(self) -> Waiting | None:
        """Return what the inspector should know of a wait for it."""
        if not self.is_learners:  # a server may wait for ever
            return None
        return self.progress.inspector.waiting_for(self.what)

    def Test(self) -> bool:
        if not self.done:
            self.progress.poll()
            self.progress.check()
        return self._verdict()

    def Wait(self) -> None:
        if not self.done:
            self.progress.wait(lambda: self.done or None, self.waiting())
        self._verdict()

    def _verdict(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.done


class Transfer(Operation):
    """An MPI request that `Progress` tests: a send, a receive, an Ibarrier.

    Args:
        progress: the rank's.
        request: mpi4py's.
        what: for reports of stalls.
        status: filled when a receive is complete; None for other requests.
        nbytes: length of the buffer.
        stages: the buffers, kept until it is done.
        target: the stage to deliver into, if any.
        waiting: what the stall inspector should know of a wait for it.
        waited_for: the caller waits for it at once.
    """

    def __init__(
        self,
        progress: Progress,
        request: Any,
        what: str,
        *,
        status: Any = None,
        nbytes: int = 0,
        stages: Sequence[Stage] = (),
        target: Stage | None = None,
        waiting: Waiting | None = None,
        waited_for: bool = False,
    ) -> None:
        super().__init__(progress, what, nbytes)
        self.request, self.status = request, status
        self.stages, self.target, self._waiting = stages, target, waiting
        if not self.look():
            progress.add(self, waited_for=waited_for)

    def waiting(self) -> Waiting | None:
        return self._waiting or super().waiting()

    def look(self) -> bool:
        """Test the MPI request; finish and return True if it is done."""
        error: BaseException | None = None
        try:
            if not self.request.Test(self.status):
                return False
            if self.status is not None:
                self.progress.meter.count(received=num_bytes(self.status))
            if self.target is not None:
                self.target.deliver()
        except MPI.Exception as failed:
            error = self.progress.meaning(failed)
            if error is failed:
                error = WorldError(f"{self.what}: {failed.Get_error_string()}")
        for stage in self.stages:
            stage.release()
        self.complete(error)
        return True


def perform(
    enter: Enter,
    name: str,
    call: Callable[[], T],
    stages: Sequence[Stage],
    target: Stage | None,
) -> T:
    """Wait for all ranks, then make an MPI call that blocks; return its result.

    Args:
        enter: enters a collective of the communicator; returns when all ranks have,
            with what watches the call.
        name: the MPI name of the call.
        call: makes it.
        stages: buffers that MPI reads or writes.
        target: the stage to deliver into, if any.
    """
    try:
        for stage in stages:
            stage.arrived()
        with enter(name, stages[-1].host.nbytes if stages else 0):
            result = call()
        if target is not None:
            target.deliver()
    finally:
        for stage in stages:
            stage.release()
    return result


class QueuedCollective(Operation):
    """A collective in a queue, and its result."""

    result: Any = None

    def __init__(
        self,
        progress: Progress,
        name: str,
        work: Callable[[], Any],
        stages: Sequence[Stage],
    ) -> None:
        super().__init__(progress, name)
        self.work, self.stages = work, stages

    def Wait(self) -> None:
        for stage in self.stages:
            stage.begin()
        # the inspector knows from `enter`; the queue's thread needs the core
        self.progress.wait(lambda: self.done or None, spin=False)
        self._verdict()

    def run(self) -> None:
        """Do it on this thread."""
        error: BaseException | None = None
        try:
            self.result = self.work()
        except BaseException as failed:
            error = self.progress.meaning(failed)
        self.complete(error)


class CollectiveQueue:
    """One communicator's collectives that go on beside the learner, in order."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress = progress
        self._jobs: SimpleQueue[QueuedCollective | None] = SimpleQueue()
        self._last: QueuedCollective | None = None
        progress.thread(self._run, name, end=lambda: self._jobs.put(None))

    @property
    def idle(self) -> bool:
        """Whether everything submitted is done."""
        return self._last is None or self._last.done

    def submit(
        self, name: str, work: Callable[[], Any], stages: Sequence[Stage] = ()
    ) -> QueuedCollective:
        """Run `work` after all that was submitted before; return its request.

        Args:
            stages: the buffers that it uses.
        """
        self._last = QueuedCollective(self.progress, name, work, stages)
        self._jobs.put(self._last)
        return self._last

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            if isinstance(job.error, Stopped | RanksDiedError | LeftBehindError):
                return
