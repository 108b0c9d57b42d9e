"""The folder of a run.

runs/x/
  owner.json        who is at work here, see storage/owner.py
  config.toml       the resolved configuration that the run began with
  changes.toml      settings that were changed since, see changes.py
  vocabulary.json   the words, in the order of their ids; or what the frames are
  checkpoints/      see checkpoint.py
  log/rank-0000.h5  see runlog.py
  summary.json      what the run came to
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpilm.config import Config, read_config, resolve
from mpilm.errors import CheckpointError
from mpilm.storage.checkpoint import complete_checkpoints
from mpilm.storage.files import reason, replace_file, require_apart, text_of
from mpilm.storage.owner import Owner
from mpilm.storage.runlog import write_summary
from mpilm.train.changes import (
    Change,
    read_changes,
    with_changes,
    write_changes,
)
from mpilm.train.resume_point import ResumePoint
from mpilm.train.task import Task


class RunFolder:
    """Paths of a run. As a context manager it is released at the end.

    owner  this run's ownership of the folder, on rank 0

    Args:
        resumed_by: how a person goes on with a run; by the command line if "".
    """

    def __init__(self, path: Path | str, *, resumed_by: str = "") -> None:
        self.path, self.resumed_by = Path(path), resumed_by
        self.owner: Owner | None = None
        self.config = self.path / "config.toml"
        self.changes = self.path / "changes.toml"
        self.vocabulary = self.path / "vocabulary.json"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / "summary.json"

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log."""
        return self.path / "log" / f"rank-{rank:04d}.h5"

    def files(self) -> Iterator[Path]:
        """Yield what a run consists of, as far as it is there."""
        yield from (self.config, self.changes, self.vocabulary)
        for pattern in ("owner.json", "summary*.json", "log/*", "checkpoints/*/*"):
            yield from self.path.glob(pattern)

    def require_apart(self, config: Config, source: Path) -> None:
        """Raise if a new run here would write over what it reads.

        The configuration that a run wrote may be read again: it stays as it is.

        Args:
            source: file that the configuration comes from.

        Raises:
            DataError: one line with the file.
        """
        if self.has_checkpoint():
            return
        written = set(self.files())
        try:
            if self.config.read_bytes() == config.encoded():
                written.remove(self.config)
        except OSError:
            pass  # nothing is there
        require_apart(written, config.inputs(source))

    def claim(self, rank: int, *, resume: bool) -> None:
        """Make the folder; what is there already stays as it is.

        Rank 0 owns it for all ranks from now on, until `release`.

        Raises:
            CheckpointError: it cannot be made, another run is at work in it, or it
                holds a run that is not resumed.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot write: {reason(error)}"
            ) from None
        if rank == 0:
            self.owner = Owner(self.path).take()
        if self.has_checkpoint() and not resume:
            way = self.resumed_by or "--resume (or mpilm resume)"
            raise CheckpointError(
                f"{self.path}: holds a run; {way} goes on with it, another --out starts"
                " a new one"
            )
        if self.summary.exists() and not self.has_checkpoint():
            raise CheckpointError(
                f"{self.path}: holds what a run came to, without its checkpoints:"
                " another --out starts a new one"
            )

    def inherit(self, rank: int) -> None:
        """Own the folder on rank 0, if the one that did has died.

        Raises:
            CheckpointError: another run has taken it.
        """
        if rank == 0 and self.owner is None:
            self.owner = Owner(self.path).take()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def require_own(self) -> None:
        """Raise if another run has taken the folder over; rank 0 looks.

        Raises:
            CheckpointError: one line that names it.
        """
        if self.owner:
            self.owner.require()

    def release(self) -> None:
        """Let another run have the folder."""
        if self.owner:
            self.owner.release()

    def describe(self, config: Config, task: Task, place: ResumePoint | None) -> None:
        """Write what a run begins with; or, at a place, what is changed from there on.

        Raises:
            CheckpointError: it cannot be written; what was there stands.
        """
        if place:
            self.note_changes(place.changes, place.samples)
            return
        try:
            write_changes(self.changes, [])
            replace_file(self.config, config.encoded())
            replace_file(self.vocabulary, json.dumps(task.description()).encode())
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot write: {reason(error)}"
            ) from None

    def note_changes(self, changes: Sequence[Change], samples: int) -> None:
        """Note the settings that are changed where a run goes on.

        Changes from later samples on belong to a past that the run has left. A summary
        is set aside: it tells what the run came to before.

        Args:
            changes: from `samples` on.
            samples: of all ranks, in the checkpoint that the run goes on from.

        Raises:
            CheckpointError: they cannot be written.
        """
        before = read_changes(self.changes)
        now = [change for change in before if change.samples < samples] + [*changes]
        try:
            if now != before:
                write_changes(self.changes, now)
            if self.summary.exists():
                came_to = self.read_summary().get("samples", samples)
                self.summary.rename(self.path / f"summary-{came_to}.json")
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot write: {reason(error)}"
            ) from None

    def conclude(self, summary: dict[str, Any]) -> None:
        """Write what the run came to; what was changed on the way is added to it.

        Raises:
            CheckpointError: it cannot be written, or another run has the folder now.
        """
        self.require_own()
        changes = read_changes(self.changes)
        summary["changes"] = [asdict(change) for change in changes]
        write_summary(self.summary, summary)

    def read_config(self, overrides: Sequence[str] = ()) -> Config:
        """Return what the run was last trained with, with overrides applied.

        Raises:
            CheckpointError: there is no run here, or its changes cannot be read.
            ConfigError: an override is wrong.
        """
        first = read_config(self.require().config).to_document()
        last = with_changes(first, read_changes(self.changes))
        return resolve(last, overrides, origin=str(self.config))

    def last_words(self) -> str:
        """Return what people are told of the last checkpoint when a wait ends a run."""
        found = complete_checkpoints(self.checkpoints)
        if not found:
            return "; there is no checkpoint yet"
        way = self.resumed_by or f"mpilm resume {self.path}"
        return f"; the last checkpoint is {found[0].name}, {way} goes on from it"

    def has_checkpoint(self) -> bool:
        """Return whether a complete checkpoint is there."""
        return bool(complete_checkpoints(self.checkpoints))

    def require(self) -> RunFolder:
        """Return self.

        Raises:
            CheckpointError: there is no run here.
        """
        if not self.config.is_file():
            raise CheckpointError(f"{self.path}: no run here (no config.toml)")
        return self

    def read_summary(self) -> dict[str, Any]:
        """Return what the run came to; empty: it has not ended, as far as is known."""
        try:
            return dict(json.loads(text_of(self.summary)))
        except (OSError, ValueError, TypeError):
            return {}

    def read_vocabulary(self) -> dict[str, Any]:
        """Return what `Task.description` gave: what the model's data mean.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        try:
            found = json.loads(text_of(self.vocabulary))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.vocabulary}: {error}") from None
        keys = ("words", "level"), ("features", "context", "classes", "names", "counts")
        if not any(isinstance(found, dict) and found.keys() >= {*k} for k in keys):
            raise CheckpointError(f"{self.vocabulary}: is not what training wrote")
        return dict(found)
