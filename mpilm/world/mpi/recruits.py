"""Ranks that join: started by mpirun while the others work, taken in when ready.

    rank 0    thread: Spawn . wait for READY | port ->  | Accept | Merge | new world
    rank 1    ... works ...                             | Accept | Merge | new world
    new one            import, connect  READY | <- port | Connect| Merge | new world

Rank 0 spawns it alone, so nobody waits while a program starts. Then all accept it on a
port, which takes a fraction of a second. If the run ends before, rank 0 waits until it
is ready, and sends it home: mpirun waits for every process that it has started. Seen
with Open MPI 5.0.11 under `mpirun --with-ft ulfm`, after deaths of any rank, rank 0 and
those that joined among them. What does not work there stands in docs/log.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mpi4py import MPI

READY, GO_HOME = b"ready", ""
LOOK_S = 0.05  # between two looks for a message; chosen, not tuned
START_S = 60.0  # that a process may take to start when the run is over; chosen, too
LATE_S = 300.0  # that it may take while the run goes on; then another is asked for
MOST_LOST = 3  # that do not come, one after the other: then no more are asked for


class Recruits:
    """The ranks that this one has asked for.

    Spawn waits for ever for a process that has ended before it started MPI (Open MPI
    5.0.11), others can be started meanwhile.
    """

    def __init__(self) -> None:
        self._errors: list[str] = []  # of those that failed since one has come
        self._starting: dict[int, float] = {}  # number -> when it was asked for
        self._num_asked = 0
        self._ready: list[MPI.Intracomm] = []  # this rank and the new one, each

    @property
    def num_ready(self) -> int:
        """How many wait to be taken in."""
        return len(self._ready)

    @property
    def num_late(self) -> int:
        """How many have not come for so long that nobody counts on them any more."""
        late_s = time.monotonic() - LATE_S
        return sum(began_s < late_s for began_s in list(self._starting.values()))

    @property
    def num_under_way(self) -> int:
        """How many others are not ready yet."""
        return len(self._starting) - self.num_late

    @property
    def failure(self) -> str:
        """Why no more are started; "": nothing speaks against it."""
        if self.num_late + len(self._errors) < MOST_LOST:
            return ""
        late = f"{self.num_late} that were started have not come within {LATE_S:.0f} s"
        return "; ".join([*([late] if self.num_late else []), *self._errors[-1:]])

    def start(self, command: Sequence[str]) -> None:
        """Have a program started, on a thread."""
        self._num_asked += 1
        self._starting[self._num_asked] = time.monotonic()
        threading.Thread(
            target=self._start,
            args=(self._num_asked, command),
            name="mpilm recruit",
            daemon=True,
        ).start()

    def _start(self, number: int, command: Sequence[str]) -> None:
        try:
            spawned = MPI.COMM_SELF.Spawn(command[0], list(command[1:]), maxprocs=1)
            spawned.Set_errhandler(MPI.ERRORS_RETURN)
            pair = spawned.Merge(high=False)
            pair.Set_errhandler(MPI.ERRORS_RETURN)
            receive(pair, 1)
            self._ready.append(pair)
            self._errors.clear()
        except MPI.Exception as error:
            self._errors.append(str(error))
        finally:
            del self._starting[number]

    def accept(self, control: MPI.Intracomm) -> MPI.Intracomm:
        """Return the communicator with the first one that is ready. Collective."""
        port = ""
        if control.rank == 0:
            port = MPI.Open_port()
            self._ready.pop(0).send(port, 1)
        joined = control.Accept(port)
        if port:
            MPI.Close_port(port)
        return united(joined, high=False)

    def dismiss(self) -> bool:
        """Send home those that nobody takes in any more, once they have been started.

        Return whether Spawn waits for none any more.

        Communicates: with each of them; blocks until it is ready and has heard of it,
        or START_S are over.
        """
        began_s = time.monotonic()
        while self.num_under_way and time.monotonic() < began_s + START_S:
            time.sleep(LOOK_S)
        while self._ready:
            with suppress(MPI.Exception):  # it has died
                self._ready.pop().ssend(GO_HOME, 1)
        return not self._starting


def await_ranks() -> MPI.Intracomm | None:
    """Return the communicator of the ranks that have asked for this process, and it.

    Blocks until they take it in. None: they have ended, or who has asked has died.
    """
    parent = MPI.Comm.Get_parent()
    parent.Set_errhandler(MPI.ERRORS_RETURN)
    try:
        pair = parent.Merge(high=True)
        pair.Set_errhandler(MPI.ERRORS_RETURN)
        pair.send(READY, 0)
        port = receive(pair, 0)
    except MPI.Exception:
        return None
    return united(MPI.COMM_SELF.Connect(port), high=True) if port else None


def united(joined: MPI.Intercomm, *, high: bool) -> MPI.Intracomm:
    """Return one communicator of both sides, once all are there. Collective."""
    joined.Set_errhandler(MPI.ERRORS_RETURN)
    comm = joined.Merge(high=high)
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    comm.Barrier()
    return comm


def receive(pair: MPI.Intracomm, source: int) -> Any:
    """Return the next message, without taking a core meanwhile."""
    while not pair.iprobe(source):
        time.sleep(LOOK_S)
        with suppress(AttributeError):  # a library without ULFM
            failed = pair.Get_failed()
            is_gone = failed.size > 0
            failed.Free()
            if is_gone:
                raise MPI.Exception(MPI.ERR_PROC_FAILED)
    return pair.recv(source=source)
