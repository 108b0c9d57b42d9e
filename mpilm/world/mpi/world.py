"""The real world: one MPI process per rank, real time, threads.

    with MpiWorld() as world, abort_on_error(world):
        ...

mpi4py is imported, and MPI started, when the first `MpiWorld` is made. How messages
move stands in progress.py, reports of stalls in stall.py, ends in abort.py.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mpilm.errors import (
    BAD_INPUT,
    DIED,
    STALLED,
    LeftBehindError,
    RanksDiedError,
    WorldError,
    say,
)
from mpilm.launch import check_launch
from mpilm.vectors import finish_kernels
from mpilm.world.base import Activity, Notify, World, require_ended
from mpilm.world.faults import Faults
from mpilm.world.mpi.abort import abort_on_error
from mpilm.world.mpi.activities import NotifyingLock, ThreadActivity
from mpilm.world.mpi.clock import clock, pause_s
from mpilm.world.mpi.stall import Waiting
from mpilm.world.mpi.start import (
    has_ulfm,
    leave_out_finalize,
    nowhere,
    start_mpi,
    start_mpi_within,
)
from mpilm.world.parts import completion_shares

if TYPE_CHECKING:  # to import it starts MPI
    from mpi4py import MPI

__all__ = ["MpiWorld", "abort_on_error", "start_mpi"]

T = TypeVar("T")

FORWARD_S = 0.5  # for mpirun to read our last line; without it, 1 of 40 was lost
LEAVE_S = 10.0  # how long a rank that exits without close() waits for the others
CRASH_S = 1.0  # the same after an uncaught exception
JOIN_S = 5.0  # for threads at the end
ABORT_S = 10.0  # for mpirun to end us when asked to; then we end by ourselves
INIT_S = 60.0  # of a process that joins: MPI waits for ever for one that has died
SETTLE_S = 1.0  # for requests under way when a rank has died


class MpiWorld(World):
    """One rank's face of the real world.

    Args:
        comm: mpi4py communicator of its ranks; all of MPI_COMM_WORLD if None. It is
            duplicated: the world's messages never match anybody else's.
        faults: what is wrong with the ranks (`mpilm.world.faults.Faults`).
        step_s: computing takes at least so long, seconds; for learners that sleep.
        stall_s: a wait of so many seconds is reported on stderr, as long as the rank
            has not waited in the same way some times (world/waits.py); 0: never.
        stall_abort_s: a wait of so many seconds ends all ranks; 0: never.
        silence_s: so many seconds without an answer from a rank end all, while others
            wait; 0: never, as without MPI_THREAD_MULTIPLE.

    Raises:
        WorldError: the launcher started several processes that do not see each other.

    Communicates: collective.
    """

    def __init__(
        self,
        comm: Any = None,
        *,
        faults: Faults | None = None,
        step_s: float = 0.0,
        stall_s: float = 60.0,
        stall_abort_s: float = 0.0,
        silence_s: float = 0.0,
    ) -> None:
        mpi = start_mpi()
        if comm is None:
            comm = mpi.COMM_WORLD
            check_launch(comm.size)
        self.background = mpi.Query_thread() >= mpi.THREAD_MULTIPLE
        self.step_s = step_s
        self.on_failure: Callable[[BaseException], None] | None = None
        self.number = comm.rank  # of this rank, whoever dies
        self._limits = {"stall_s": stall_s, "stall_abort_s": stall_abort_s}
        self._limits["silence_s"] = silence_s
        self._num_steps = 0
        self._is_closing = self._closed = False
        self._before: list[Any] = []  # of worlds with more ranks: MPI may use them yet
        self.can_shrink = has_ulfm()
        self.can_grow = self.can_shrink and self.background
        from mpilm.world.mpi.recruits import Recruits

        self._recruits = Recruits()
        self._begin(comm, faults)
        atexit.register(self._leave)
        self._start_s = clock()

    @classmethod
    def joined(cls) -> MpiWorld | None:
        """Return the world of ranks at work, who have asked for this process.

        None: they have ended before they took it in.

        Communicates: collective with `grow` of the others; blocks until then.
        """
        start_mpi_within(INIT_S)
        from mpilm.world.mpi.recruits import await_ranks

        leave_out_finalize()
        comm = await_ranks()
        if comm is None:
            return None
        world = cls(comm)
        world.joins = True
        return world

    def _begin(
        self, comm: MPI.Intracomm, faults: Faults | None, *, is_own: bool = False
    ) -> None:
        """Make what belongs to these ranks. Collective.

        Args:
            is_own: nobody else has `comm`: then the ranks can `agree` on it, though one
                of them die here.
        """
        mpi = start_mpi()
        from mpilm.world.mpi.comm import MpiComm
        from mpilm.world.mpi.resources import Resources

        self.control: MPI.Intracomm = comm if is_own else comm.Dup()
        self.resources = Resources(
            self.control,
            faults,
            **self._limits,
            abort=lambda: self.abort(STALLED),
            last_words=lambda: f"{self.last_words()}",  # as it is then
            background=self.background,
            generation=len(self._before),
        )
        self.progress = self.resources.progress
        node = comm.Split_type(mpi.COMM_TYPE_SHARED, comm.rank)
        self.local_rank, self.local_size = node.rank, node.size
        node.Free()
        self.comm: MpiComm = MpiComm(self.resources, comm.Dup(), "world")
        self.activities: list[ThreadActivity] = []
        self.progress.begin()
        self.control.Barrier()

    def __enter__(self) -> MpiWorld:
        return self

    @property
    def faults(self) -> Faults | None:
        """What is wrong with the ranks."""
        return self.resources.faults

    def configure(self, *, faults: Faults | None, silence_s: float = 0.0) -> None:
        """Declare what is wrong with the ranks in this run, and what ends it.

        Args:
            faults: what is wrong.
            silence_s: of a rank; as of the class.

        Raises:
            ConfigError: they speak of a rank that does not exist.
        """
        if faults is not None:
            faults.check(self.size)
        self.resources.faults = faults
        self._limits["silence_s"] = silence_s
        self.resources.inspector.silence_s = silence_s if self.background else 0.0

    def take_gpu_buffers(self, device: str) -> None:
        """Give MPI tensors on `device`, a GPU, as they are, from now on.

        The MPI library must be able to: `mpilm.doctor.cuda_aware` looks.
        """
        from mpilm.world.mpi.staging import enter

        self.resources.staging.direct = "cuda"
        self.progress.enter = partial(enter, device)

    def device(self, kind: str = "auto") -> str:
        """Return the torch device of this rank: local rank modulo visible GPUs, or CPU.

        A GPU becomes torch's current one: `torch.cuda.synchronize()` means it.

        Args:
            kind: "cpu", "cuda", or "auto" (a GPU where there is one).

        Raises:
            WorldError: "cuda" where no GPU is visible.
        """
        if kind == "cpu":
            return "cpu"
        try:
            import torch
        except ImportError:
            num_gpus = 0
        else:
            num_gpus = torch.cuda.device_count()
        if num_gpus:
            torch.cuda.set_device(self.local_rank % num_gpus)
            return f"cuda:{self.local_rank % num_gpus}"
        if kind == "cuda":
            raise WorldError("train.device: no GPU is visible (torch.cuda finds none)")
        return "cpu"

    def now_s(self) -> float:
        return clock() - self._start_s

    def sleep(self, seconds: float) -> None:
        if not seconds >= 0.0:
            raise WorldError(f"cannot sleep {seconds} seconds")
        time.sleep(seconds)
        self.progress.check()

    def wait(self, ready: Callable[[], T | None], what: str) -> T:
        # a background activity may have to wait for ever: only the learner is watched
        watched = Waiting(what) if self.progress.is_learner() else None
        return self.progress.wait(ready, watched)

    def lock(self, name: str) -> AbstractContextManager[Any]:
        return NotifyingLock(self.progress, name)

    def start(self, work: Callable[[], None], name: str) -> Activity:
        if not self.background:
            raise WorldError(
                f"{name} needs MPI_THREAD_MULTIPLE, which this MPI library or its"
                " start-up does not give"
            )
        activity = ThreadActivity(self, work, name)
        self.activities.append(activity)
        return activity

    def compute(self, work: Callable[[Notify], T], ready: Notify | None = None) -> T:
        step, self._num_steps = self._num_steps, self._num_steps + 1
        start_s = self.now_s()
        factor = 1.0
        if self.faults is not None:
            if self.faults.fails(self.number, step):
                self._die(step)
            factor = self.faults.slowdown(self.number, start_s, step)
        if factor <= 1.0 and self.step_s <= 0.0:
            return self._work(work, ready or _ignore)
        parts: list[Any] = []
        result = self._work(work, parts.append)
        finish_kernels()
        lasts_s = factor * max(self.now_s() - start_s, self.step_s)
        if ready is not None:
            for part, share in zip(parts, completion_shares(parts), strict=True):
                self._sleep_until(start_s + share * lasts_s)
                ready(part)
        self._sleep_until(start_s + lasts_s)
        return result

    def _work(self, work: Callable[[Notify], T], notify: Notify) -> T:
        self.progress.computing = True
        try:
            return work(notify)
        finally:
            self.progress.computing = False

    def _sleep_until(self, time_s: float) -> None:
        left_s = time_s - self.now_s()
        if left_s > 0.0:
            time.sleep(left_s)

    def close(self) -> None:
        if self._closed:
            return
        try:
            self.require_ended()
        except WorldError as error:  # the others may wait for what never comes
            time.sleep(2.0 * FORWARD_S if self.rank else 0.0)  # one line is enough
            say(f"rank {self.rank}: {error}" if self.size > 1 else str(error))
            self.abort(BAD_INPUT)
        for activity in list(self.activities):
            activity.join()
        self._is_closing = True
        while True:
            try:
                self._wait_for_all()
                break
            except Exception as error:
                if not isinstance(self.progress.meaning(error), RanksDiedError):
                    raise
                self.shrink()
        if not self._recruits.dismiss():
            leave_out_finalize()
        self._closed = True
        atexit.unregister(self._leave)
        self.progress.stop(JOIN_S)
        for handle in (*reversed(self.resources.handles), self.control):
            handle.Free()

    def _wait_for_all(self) -> None:
        """Wait until all ranks close, and nothing is on its way."""
        self.comm.entered += 1
        waiting = Waiting("close", self.comm, self.comm.entered)
        self.progress.wait(self.control.Ibarrier().Test, waiting)
        # nobody asks any more; when all have their answers, nothing is on its way
        self.progress.wait(lambda: self.resources.inspector.idle)
        self.progress.wait(self.control.Ibarrier().Test)

    def shrink(self) -> list[int]:
        if not self.can_shrink:
            return super().shrink()
        faults, control = self.resources.faults, self.control
        while True:
            self._end("ranks died")
            comm: Any = self.control.Shrink()
            are_closing, is_well = [False], False
            try:
                self._begin(comm, faults, is_own=True)
                are_closing, is_well = self.comm.allgather(self._is_closing), True
            except Exception as error:  # another one has died meanwhile
                if not isinstance(self.progress.meaning(error), RanksDiedError):
                    raise
            if self.agree(is_well):
                self._leave_generations("ranks died")
                return [] if any(are_closing) else world_ranks_of(comm, control)

    def agree(self, is_well: bool) -> bool:
        if not self.can_shrink:
            return super().agree(is_well)
        from mpi4py import MPI

        try:
            return bool(self.control.Agree(int(is_well)))
        except MPI.Exception:  # one has died; it is raised on all, or on none
            return False

    @property
    def recruits(self) -> tuple[int, int]:
        ready = self._recruits.num_ready
        return self._recruits.num_under_way + ready, ready

    def recruit(self, command: Sequence[str]) -> None:
        if not self.can_grow:
            super().recruit(command)
        if self._recruits.failure:
            raise WorldError(f"no rank could be added: {self._recruits.failure}")
        self._recruits.start(command)

    def grow(self) -> int:
        if not self.can_grow:
            return super().grow()
        before, faults = self.size, self.resources.faults
        try:
            comm = self._recruits.accept(self.control)
        except Exception as error:
            raise self.progress.meaning(error) from error
        leave_out_finalize()
        self._end("a rank joined")
        self._leave_generations("a rank joined")
        self._begin(comm, faults)
        return before

    def _end(self, reason: str) -> None:
        """Let all that is under way among these ranks end."""
        self.resources.membership.revoke(reason)
        self.progress.stop(JOIN_S)
        self.progress.settle(SETTLE_S)
        self._before.append((self.resources, self.comm))

    def _leave_generations(self, reason: str) -> None:
        """Take no failure of what was before for a death of today."""
        for resources, _ in self._before:
            if not isinstance(resources.membership.death, LeftBehindError):
                resources.membership.leave(reason)

    def require_ended(self) -> None:
        """Raise if an activity would never end.

        Raises:
            WorldError: one line.
        """
        require_ended(self.activities)

    def _die(self, step: int) -> None:
        """End this process as an accident would. Does not return."""
        say(f"rank {self.rank}: dies before step {step}, as [faults] declares")
        time.sleep(FORWARD_S)
        if self.can_shrink:  # an exit code ends the others even there
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(DIED)  # no clean-up, no MPI_Finalize: mpirun ends the others

    def abort(self, code: int) -> None:
        """End all ranks at once. Does not return."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(FORWARD_S)
        # where mpirun cannot be reached Abort waits for it, with Python's lock held
        faulthandler.dump_traceback_later(ABORT_S, exit=True, file=nowhere())
        self.control.Abort(code)

    def _leave(self) -> None:
        """End the threads of a world that nobody closed; abort if others still work.

        Without this, MPI_Finalize would wait for ever for the others, and they for us.
        """
        mpi = start_mpi()
        if self._closed or mpi.Is_finalized():
            return
        crashed = getattr(sys, "last_value", None) is not None
        start_s = clock()
        limit_s = CRASH_S if crashed else LEAVE_S
        for _ in range(2):  # the barriers of close(), which others may be calling
            request = self.control.Ibarrier()
            while not request.Test():
                waited_s = clock() - start_s
                if waited_s > limit_s:
                    say(f"rank {self.rank}: exits while others still work; aborting")
                    self.abort(1)
                time.sleep(pause_s(waited_s))
        self.progress.stop(JOIN_S)


def world_ranks_of(comm: MPI.Comm, before: MPI.Comm) -> list[int]:
    """Return the ranks that those of `comm` had in `before`."""
    from mpilm.world.mpi.comm import world_ranks

    return world_ranks(comm, before)


def run_mpi(main: Callable[[MpiWorld], T], *, faults: Faults | None = None) -> T:
    """Return what `main(world)` returned on this rank; the world is closed after it.

    The same as `run_virtual` in the real world: an error on one rank ends all of them.

    Args:
        main: runs once on each rank that mpirun started.
        faults: what is wrong with which ranks.

    Raises:
        SystemExit: an error, which has been reported.
    """
    with MpiWorld(faults=faults) as world, abort_on_error(world):
        return main(world)


def _ignore(part: Any) -> None:
    """Nobody wants to know."""
