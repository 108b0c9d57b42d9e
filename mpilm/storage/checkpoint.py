"""Checkpoints: the state of a whole run on the disk; whole or not there.

    checkpoints/
      step-000001234/      complete: it got this name by renaming
        shared.h5          what all ranks have alike; written by rank 0
        rank-0000.h5       a rank's own state; each rank writes its own, and no other
        rank-0001.h5
      step-000001300.partial/   being written, or left over from a killed run

The files are state files (state_file.py) with the header step and size (ranks), and in
a rank's own file rank. Writing:

    rank 0:  make .partial, shared.h5 | rank-0000.h5 | all well? | rename | all well? |
    rank 1:                           | rank-0001.h5 | all well? |        | all well? |

Files are forced to the disk. Each "all well?", and one after each thing that rank 0
does first, is an allgather of the first error. If there is one, the partial folder is
removed and every rank raises it; older checkpoints are touched only at the very end.
Loading runs no code, whatever the files hold.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpilm.errors import CheckpointError, MpilmError
from mpilm.storage.files import reason, sync_folder
from mpilm.storage.merged import Gathered, Merged
from mpilm.storage.state_file import (
    State,
    check_state,
    read_header,
    read_state,
    write_state,
)
from mpilm.world.base import World

NAME = re.compile(r"step-(\d{9,})(\.replaced)?")


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over, or could not be removed."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    path  its folder
    step  minibatches of rank 0 when it was written
    size  number of ranks that wrote it
    """

    path: Path
    step: int
    size: int

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """Return the checkpoint in a folder.

        Raises:
            CheckpointError: what all ranks share cannot be read.
        """
        header = read_header(path / "shared.h5")
        step, name = header.get("step", -1), NAME.fullmatch(path.name)
        if name is None or int(name[1]) != step:
            raise CheckpointError(f"{path}/shared.h5: belongs to another checkpoint")
        return cls(path, step, header.get("size", -1))

    @property
    def shared(self) -> Path:
        """Path of what all ranks have alike."""
        return self.path / "shared.h5"

    def own(self, rank: int) -> Path:
        """Return the path of a rank's own state."""
        return self.path / f"rank-{rank:04d}.h5"

    def shares(self, rank: int, size: int) -> range:
        """Return whose own states the rank of a world of `size` looks after.

        >>> checkpoint = Checkpoint(Path("step-000000001"), 1, size=5)
        >>> [list(checkpoint.shares(rank, 2)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
        """
        return range(rank, self.size, size)

    def require(self, rank: int) -> None:
        """Raise unless the rank's own file was written by that rank for this step.

        Raises:
            CheckpointError: it belongs to another checkpoint.
        """
        expected = {"step": self.step, "size": self.size, "rank": rank}
        if read_header(self.own(rank)) != expected:
            raise CheckpointError(f"{self.own(rank)}: belongs to another checkpoint")


class Checkpoints:
    """The checkpoints of a run; one such object on every rank.

    Args:
        folder: where they lie; made when the first one is saved.
        world: this rank's world.
        keep: how many are left after saving one, at least 1.
    """

    def __init__(self, folder: Path | str, world: World, *, keep: int = 2) -> None:
        self.folder, self.world, self.keep = Path(folder), world, keep

    def save(
        self, step: int, shared: Mapping[str, Any], own: Mapping[str, Any]
    ) -> Checkpoint:
        """Write a checkpoint; on return it is on the disk, on every rank.

        Afterwards the newest `keep` are left. Checkpoints of later steps are removed:
        they belong to a past that this run, gone on from an older one, has left.

        Args:
            step: minibatches of this rank; the folder is named after rank 0's.
            shared: what all ranks have alike; rank 0's is written.
            own: what only this rank has. Neither may change meanwhile.

        Raises:
            CheckpointError: on every rank the same line, which names rank and file;
                the earlier checkpoints stand.

        Communicates: collective, five small allgathers, blocking.
        """
        with self.writing(step) as writing:
            writing.shared(shared)
            writing.own(own)
        return writing.checkpoint

    @contextmanager
    def writing(self, step: int) -> Iterator[Writing]:
        """Write a checkpoint part by part in the block; after it, as after `save`.

        Raises:
            CheckpointError: as `save`. Whatever the block raises, nothing is left.

        Communicates: collective, three small allgathers, blocking.
        """
        writing = self.begun(step)
        with writing.or_nothing():
            writing.make()
            yield writing
            with self.all_or_none():
                writing.put_in_place()

    def begun(self, step: int) -> Writing:
        """Return a checkpoint to be written; nothing of it is there yet.

        Communicates: collective, a small allgather, blocking.
        """
        step = self.world.comm.allgather(step)[0]
        final = Checkpoint(self.folder / f"step-{step:09d}", step, self.world.size)
        return Writing(replace(final, path=_partial(final.path)), final, self)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that can be read; None if there is none at all.

        Everything that this world could load of it is read and checked. A broken one is
        passed over with a `CheckpointWarning` on rank 0. Partial ones do not count.

        Raises:
            CheckpointError: there are checkpoints, but none can be read.

        Communicates: collective, two small allgathers and one for each one tried.
        """
        rank, comm = self.world.rank, self.world.comm
        paths: list[Path] = []
        with self.all_or_none():
            if rank == 0:
                paths = complete_checkpoints(self.folder)
        first: CheckpointError | None = None
        for path in comm.allgather(paths)[0]:
            try:
                with self.all_or_none():
                    checkpoint = Checkpoint.at(path)
                    if rank == 0:
                        check_state(checkpoint.shared)
                    for number in checkpoint.shares(rank, self.world.size):
                        checkpoint.require(number)
                        check_state(checkpoint.own(number))
            except CheckpointError as error:
                first = first or error
                if rank == 0:
                    _warn(f"passed over a checkpoint: {error}")
                continue
            return checkpoint
        if first:
            raise _none_readable(self.folder, first)
        return None

    def load(self, checkpoint: Checkpoint) -> tuple[State, State]:
        """Return what all ranks share, and this rank's own state.

        Raises:
            CheckpointError: on every rank the same line: a file is missing, corrupt or
                foreign. The checkpoint must be of as many ranks: else `merge`.

        Communicates: collective, one small allgather, blocking.
        """
        with self.all_or_none():
            shared = read_state(checkpoint.shared)
            checkpoint.require(self.world.rank)
            own = read_state(checkpoint.own(self.world.rank))
        return shared, own

    def merge(self, checkpoint: Checkpoint) -> tuple[State, Merged]:
        """Return what all ranks share, and what those of another number have left.

        Raises:
            CheckpointError: as `load`.

        Communicates: collective, small allgathers, and for each vector of (P,) that the
        ranks have of their own an Allreduce of 4P bytes; blocking.
        """
        rank, size = self.world.rank, self.world.size
        states, nearest = Gathered(), State()
        with self.all_or_none():
            shared = read_state(checkpoint.shared)
            for number in checkpoint.shares(rank, size):
                states.add(number, state := read_state(checkpoint.own(number)))
                nearest = nearest or state
            if not nearest:
                nearest = read_state(checkpoint.own(rank % checkpoint.size))
        merged = states.merged(self.world.comm, checkpoint.size, nearest, shared)
        return shared, merged

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Run a block on every rank; if it fails on one, raise its error on all.

        Communicates: collective, one small allgather, blocking.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        text = None if failure is None else line_of(failure)
        failures = self.world.comm.allgather(text)
        for rank, text in enumerate(failures):
            if text is not None:
                line = f"rank {rank}: {text}"
                raise CheckpointError(line, everywhere=True) from failure

    def _clean(self) -> None:
        """Remove what a killed run or a failed save has left."""
        for path in self.folder.glob("step-*.partial"):
            shutil.rmtree(path)
        for path in self.folder.glob("step-*.replaced"):
            if path.with_suffix("").exists():
                _remove(path)
            else:  # killed between the two renames below
                path.rename(path.with_suffix(""))

    def _put_in_place(self, partial: Path, final: Path) -> None:
        """Give a complete checkpoint its name, then remove those not kept."""
        sync_folder(partial)
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync_folder(self.folder)
        found = complete_checkpoints(self.folder)
        place = found.index(final)
        kept = [path for path in found[place:] if path != replaced][: self.keep]
        for path in found:
            if path in kept:
                continue
            try:
                _remove(path)
            except OSError as error:
                _warn(f"{path}: could not be removed: {reason(error)}")


class Writing:
    """A checkpoint that is being written.

    partial     where
    checkpoint  what it will be
    """

    def __init__(
        self, partial: Checkpoint, checkpoint: Checkpoint, of: Checkpoints
    ) -> None:
        self.partial, self.checkpoint, self._of = partial, checkpoint, of

    def make(self) -> None:
        """Make its folder. Collective, a small allgather, blocking."""
        with self._of.all_or_none():
            if self._of.world.rank == 0:
                self._of._clean()
                self.partial.path.mkdir(parents=True)

    def shared(self, state: Mapping[str, Any]) -> None:
        """Write what all ranks have alike; nothing of it may change meanwhile.

        Raises:
            CheckpointError: on every rank the same line, which names rank and file.

        Communicates: collective, a small allgather, blocking.
        """
        with self._of.all_or_none():
            self.write_shared(state)

    def own(self, state: Mapping[str, Any]) -> None:
        """Write what only this rank has. As `shared`."""
        with self._of.all_or_none():
            self.write_own(state)

    # on this rank; no communication
    def write_shared(self, state: Mapping[str, Any]) -> None:
        """Write what all ranks have alike, if this is rank 0."""
        if self._of.world.rank == 0:
            write_state(self.partial.shared, state, **self._header)

    def write_own(self, state: Mapping[str, Any]) -> None:
        """Write what only this rank has."""
        rank = self._of.world.rank
        write_state(self.partial.own(rank), state, **self._header, rank=rank)

    def put_in_place(self) -> None:
        """Give it its name, if this is rank 0, then remove those not kept."""
        if self._of.world.rank == 0:
            self._of._put_in_place(self.partial.path, self.checkpoint.path)

    @contextmanager
    def or_nothing(self) -> Iterator[None]:
        """Leave nothing of it on the disk if the block raises."""
        try:
            yield
        except BaseException:
            if self._of.world.rank == 0:
                shutil.rmtree(self.partial.path, ignore_errors=True)
            raise

    @property
    def _header(self) -> dict[str, int]:
        return {"step": self.partial.step, "size": self.partial.size}


def load_shared(folder: Path | str) -> State:
    """Return what all ranks share in the newest checkpoint where it can be read.

    For evaluation, export, or a run of another number of ranks. Reads only.

    Raises:
        CheckpointError: no checkpoint, or none that can be read.

    Communicates: none.
    """
    first: CheckpointError | None = None
    for path in complete_checkpoints(Path(folder)):
        try:
            return read_state(Checkpoint.at(path).shared)
        except CheckpointError as error:
            first = first or error
            _warn(f"passed over a checkpoint: {error}")
    if first:
        raise _none_readable(Path(folder), first)
    raise CheckpointError(f"{folder}: no checkpoint")


def _none_readable(folder: Path, first: CheckpointError) -> CheckpointError:
    line = f"{folder}: no checkpoint can be read; the newest: {first}"
    return CheckpointError(line, everywhere=first.everywhere)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, newest first; none if there is no folder."""
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = [(NAME.fullmatch(path.name), path) for path in paths]
    keys = [(int(match[1]), not match[2], path) for match, path in matches if match]
    return [path for *_, path in sorted(keys, reverse=True)]


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _remove(path: Path) -> None:
    """Remove a checkpoint so that at no time a part of it looks like the whole."""
    doomed = path.rename(_partial(path))
    shutil.rmtree(doomed)


def line_of(error: Exception) -> str:
    """Return one line that says what failed and which file it was."""
    if isinstance(error, MpilmError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {reason(error)}"
    return f"{type(error).__name__}: {reason(error)}"


def _warn(text: str) -> None:
    warnings.warn(text, CheckpointWarning, stacklevel=3)
