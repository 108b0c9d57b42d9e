"""Checkpoints that are written while training goes on, from a copy in memory.

    learner  step | copy | step step step step step step step . | next copy, or settle
    writer              | write, fsync |    | rename, remove old |
    ranks                              |- Iallreduce: all well? -|

At the step a rank copies its state into buffers, which are kept for the next time. A
thread writes, checks and forces them to the disk. Once it has, the rank takes part in a
reduction that nobody waits for; when all have, rank 0's thread gives the checkpoint its
name. Until then it is a partial one, which nobody reads. What failed is raised on all
ranks where they next settle: the older checkpoints stand.

In the virtual world a rank writes at once, which takes no time there.

Memory      buffers as large as what the rank writes: its own state, on rank 0 what all
            have alike too; and where several ranks make the final model, (P,) for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from mpilm.errors import CheckpointError
from mpilm.storage.checkpoint import Checkpoints, Writing, line_of
from mpilm.storage.files import at_a_page
from mpilm.storage.saved import State
from mpilm.vectors import lending, to_array, zeros
from mpilm.world.base import MAX, Request, Traffic, World


class Background:
    """Work on a thread that calls no MPI; in the virtual world it is done at once.

    failure  the line of what it raised
    """

    def __init__(self, world: World, work: Callable[[], None]) -> None:
        self.failure: str | None = None
        self._work = work
        # daemon: a run that fails does not wait for what is not needed any more
        self._thread = threading.Thread(
            target=self._run, name="mpilm save", daemon=True
        )
        if world.is_virtual:
            self._run()
        else:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.failure = line_of(error)

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for its end."""
        if self._thread.ident is not None:
            self._thread.join()


class Copied:
    """A checkpoint that is being copied; it has the face of a `Writing`.

    shared, own  what is to be written, copied
    """

    def __init__(self, beside: Beside) -> None:
        self._beside = beside
        self._shared, self._own = State(), State()

    def shared(self, state: Mapping[str, Any]) -> None:
        """Copy what all ranks have alike, on rank 0.

        Raises:
            CheckpointError: on every rank the same line: there is no memory for it.

        Communicates: collective, a small allgather, blocking.
        """
        with self._beside.checkpoints.all_or_none():
            if self._beside.checkpoints.world.rank == 0:
                self._shared = self._beside.copied("shared", state)

    def own(self, state: Mapping[str, Any]) -> None:
        """Copy what only this rank has. As `shared`."""
        with self._beside.checkpoints.all_or_none():
            self._own = self._beside.copied("own", state)

    def write(self, writing: Writing) -> None:
        """Write both on this rank. No communication."""
        writing.write_shared(self._shared)
        writing.write_own(self._own)


class Beside:
    """Writes the checkpoints of a run beside its training; one on every rank.

    traffic  what its reductions have taken of the world's bytes and messages

    Communicates: collective (it duplicates the communicator), blocking.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.traffic = Traffic()
        self._comm = checkpoints.world.comm.Dup()
        self._buffers: dict[str, np.ndarray] = {}
        self._spare: dict[str, Any] = {}
        self._mine, self._all = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._writing: Writing | None = None  # the one under way
        self._writer: Background | None = None
        self._reduction: Request | None = None
        self._placer: Background | None = None

    def spare(self, name: str, like: Any) -> Any:
        """Return a vector as long as another, kept; what is made in it is not copied
        again."""
        if name not in self._spare or len(self._spare[name]) != len(like):
            self._spare[name] = zeros(len(like), like)
        return self._spare[name]

    def copied(self, name: str, state: Mapping[str, Any]) -> State:
        """Return the state with its arrays copied into buffers that are kept."""
        with lending():
            spare = [to_array(vector) for vector in self._spare.values()]
        found = dict(state)
        for entry, value in state.items():
            if not isinstance(value, np.ndarray):
                continue
            if not value.shape:  # AdamW counts its steps in one, in place
                found[entry] = value.copy()
                continue
            if any(np.may_share_memory(value, kept) for kept in spare):
                continue
            key = f"{name}/{entry}"
            kept = self._buffers.get(key)
            if kept is None or (kept.shape, kept.dtype) != (value.shape, value.dtype):
                kept = self._buffers[key] = at_a_page(value)
            np.copyto(kept, value)
            found[entry] = kept
        return found

    @contextmanager
    def writing(self, step: int) -> Iterator[Copied]:
        """Copy a checkpoint part by part in the block; it is written after it.

        Raises:
            CheckpointError: on all ranks the same line: the one before could not be
                written, or this one not be begun.

        Communicates: collective, small allgathers, blocking; it waits for the one
            before.
        """
        self.settle()
        writing = self.checkpoints.begun(step)
        with writing.or_nothing():
            writing.make()
            copied = Copied(self)
            yield copied
        world = self.checkpoints.world
        self._writing = writing
        self._writer = Background(world, lambda: copied.write(writing))

    def poll(self) -> None:
        """Go on with the one under way, if there is one. Never blocks.

        Raises:
            CheckpointError: this rank could not write it; the others do not know yet.

        Communicates: once for each checkpoint an Iallreduce of 8 bytes.
        """
        if self._writing is None or self._writer is None or not self._writer.is_done:
            return
        if self._writer.failure:
            raise CheckpointError(self._writer.failure)
        if self._agree().Test():
            self._place()

    def settle(self) -> None:
        """Wait until the one under way is on the disk, if there is one.

        Raises:
            CheckpointError: on every rank the same line, as `Checkpoints.save`.

        Communicates: collective, the Iallreduce of `poll`, a small allgather, blocking.
        """
        writing, writer = self._writing, self._writer
        if writing is None or writer is None:
            return
        try:
            writer.join()
            with writing.or_nothing():
                self._agree().Wait()
                self._place()
                jobs = [writer] if self._placer is None else [writer, self._placer]
                with self.checkpoints.all_or_none():
                    for job in jobs:
                        job.join()
                        if job.failure:
                            raise CheckpointError(job.failure)
        finally:
            self._writing = self._writer = self._reduction = self._placer = None

    def abandon(self) -> None:
        """Wait for this rank's thread; what it has written stays partial.

        After a death, before other checkpoints are made. No communication.
        """
        for job in (self._writer, self._placer):
            if job is not None:
                job.join()

    def _agree(self) -> Request:
        """Return the reduction that tells all ranks whether all parts are written."""
        if self._reduction is None:
            assert self._writer is not None
            self._mine[0] = self._writer.failure is not None
            moved = 2 * self._mine.nbytes * (self._comm.size - 1) // self._comm.size
            self.traffic.bytes_sent += moved
            self.traffic.bytes_received += moved
            self.traffic.messages += 1
            self._reduction = self._comm.Iallreduce(self._mine, self._all, op=MAX)
        return self._reduction

    def _place(self) -> None:
        """Give the checkpoint its name, if all ranks have written their parts."""
        if self._placer is None and self._writing is not None and not self._all[0]:
            self._placer = Background(
                self.checkpoints.world, self._writing.put_in_place
            )
