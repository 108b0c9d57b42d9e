"""What a run has measured: a log per rank, a summary, a trace for a browser.

    runs/x/log/rank-0000.h5
      /         attributes: format, version, rank, host
      /num      (2,) int64: rows and events that count
      /rows     one record per row; the fields are the caller's, "step" among them
      /events   one record per event: name, activity, step, start_s, stop_s

A killed rank leaves a sound file. The HDF5 library only makes the file, closed and
renamed into place, with room for more records than there are. From then on records are
written straight into that room, where HDF5 says it lies, and then `num`: what a reader
counts is always whole, and HDF5 is never caught in the middle of its own metadata.
When the room is full, a file with twice the room takes its place.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import h5py
import numpy as np

from mpilm.errors import CheckpointError
from mpilm.launch import node_name
from mpilm.storage.files import (
    create_hdf5,
    new_file,
    open_hdf5,
    reason,
    write_fully,
    write_json,
)

FORMAT = "mpilm log"
VERSION = 2

EVENT = np.dtype(
    [
        ("name", "S24"),  # compute, communicate, evaluate, checkpoint, ...
        ("activity", "S24"),  # in which it happened
        ("step", "i8"),
        ("start_s", "f8"),
        ("stop_s", "f8"),
    ]
)
ROOM = 4096  # records a new file has room for; chosen, not tuned


@dataclass
class RankLog:
    """The log of one rank: field -> one value per row, or per event.

    host  on which it was written last; "": not known
    """

    rank: int
    rows: dict[str, np.ndarray]
    events: dict[str, np.ndarray]
    host: str = ""


class _Table:
    """Records of one type: those in the file, and those not yet written."""

    def __init__(self, name: str, records: np.ndarray) -> None:
        self.name, self.dtype, self.num = name, records.dtype, len(records)
        self.waiting: list[tuple] = []
        self.room = 0  # records the file has room for
        self.offset = 0  # of the first record in the file, bytes

    @property
    def is_full(self) -> bool:
        """Whether the waiting records need a larger file."""
        return self.num + len(self.waiting) > self.room

    def write(self, descriptor: int) -> None:
        """Write the waiting records behind the others."""
        if self.waiting:
            block = np.array(self.waiting, self.dtype)
            place = self.offset + self.num * self.dtype.itemsize
            write_fully(descriptor, block.view(np.uint8), place)
            self.num += len(self.waiting)
            self.waiting = []


class RunLog:
    """The log that a rank writes while it trains.

    What is not yet flushed is lost when the rank is killed. Activities of a rank may
    share its log.

    Args:
        path: the file; an earlier one is replaced.
        rank: whose log it is.
        fields: name -> signed integer or float type of numpy of each value in a row
            ("i8", "f8", or 16 at once "16i8"); "step" must be there.
        from_step: keep rows and events of an earlier file up to this step: a run that
            is resumed goes on from there. 0: begin anew.
        flush_rows: rows after which they are written.
        flush_s: seconds after which they are written, with the next row or event.

    Raises:
        CheckpointError: the file cannot be written, or the earlier one is corrupt,
            foreign, or has fields that these lack (new ones are NaN or -1 there).

    Communicates: none.
    """

    def __init__(
        self,
        path: Path | str,
        rank: int,
        fields: Mapping[str, str],
        *,
        from_step: int = 0,
        flush_rows: int = 1000,
        flush_s: float = 5.0,
    ) -> None:
        self.path, self.rank = Path(path), rank
        self.flush_rows, self.flush_s = flush_rows, flush_s
        rows, events = np.empty(0, np.dtype(list(fields.items()))), np.empty(0, EVENT)
        if from_step > 0 and self.path.exists():
            _, old_rows, old_events = _read_log(self.path)
            old_rows = old_rows[old_rows["step"] <= from_step]
            rows = _in_fields(rows.dtype, old_rows, path)
            events = old_events[old_events["step"] <= from_step]
        # events go on after the earlier ones, on one clock without gaps
        self.earlier_s = float(events["stop_s"].max()) if len(events) else 0.0
        self.rows, self.events = _Table("rows", rows), _Table("events", events)
        self.defaults = {
            name: not_measured(rows.dtype[name]) for name in rows.dtype.names or ()
        }
        self.lock = Lock()
        self.descriptor = -1
        self.flushed_at_s = time.monotonic()
        self._renew(rows, events, room=ROOM)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # a log that cannot be closed either must not hide what went wrong before
        with suppress(CheckpointError) if kind else nullcontext():
            self.close()

    def row(self, **values: Any) -> None:
        """Append a row. A field left out is NaN, or -1 if it is an integer.

        Raises:
            CheckpointError: the log cannot be written.
        """
        unknown = values.keys() - self.defaults.keys()
        if unknown or "step" not in values:
            raise ValueError(f"row needs step and knows no {sorted(unknown)}")
        with self.lock:
            self.rows.waiting.append(tuple({**self.defaults, **values}.values()))
            self._flush_if_due()

    def event(
        self,
        name: str,
        start_s: float,
        stop_s: float,
        *,
        step: int,
        activity: str = "main",
    ) -> None:
        """Append an event: what this rank did from `start_s` to `stop_s`.

        Args:
            name: what was done, up to 24 bytes, such as "compute".
            start_s, stop_s: by the clock of this rank's world.
            step: minibatch it belongs to.
            activity: the activity that did it, up to 24 bytes; a row in the trace.

        Raises:
            CheckpointError: the log cannot be written.
        """
        start_s, stop_s = start_s + self.earlier_s, stop_s + self.earlier_s
        with self.lock:
            record = (name.encode(), activity.encode(), step, start_s, stop_s)
            self.events.waiting.append(record)
            self._flush_if_due()

    def flush(self) -> None:
        """Write what waits; from now on a reader finds it.

        Raises:
            CheckpointError: the log cannot be written.
        """
        with self.lock:
            self._flush()

    def close(self) -> None:
        """Write what waits and give back the room that was not used.

        Raises:
            CheckpointError: the log cannot be written.
        """
        if self.descriptor < 0:
            return
        try:
            with self.lock:
                self._flush()
                _, rows, events = _read_log(self.path)
                with suppress(CheckpointError):  # no place for a copy: then not
                    self._renew(rows, events, room=0)
        finally:
            os.close(self.descriptor)
            self.descriptor = -1

    def _flush_if_due(self) -> None:
        if (
            len(self.rows.waiting) >= self.flush_rows
            or len(self.events.waiting) >= 10 * self.flush_rows
            or time.monotonic() - self.flushed_at_s >= self.flush_s
        ):
            self._flush()

    def _flush(self) -> None:
        tables = (self.rows, self.events)
        if any(table.is_full for table in tables):
            _, rows, events = _read_log(self.path)
            most = max(table.num + len(table.waiting) for table in tables)
            self._renew(rows, events, room=2 * most)
        try:
            for table in tables:
                table.write(self.descriptor)
            num = np.array([table.num for table in tables], np.int64)
            write_fully(self.descriptor, num, self.num_offset)
        except OSError as error:
            raise self._error(error) from error
        self.flushed_at_s = time.monotonic()

    def _renew(self, rows: np.ndarray, events: np.ndarray, *, room: int) -> None:
        """Put a file with these records, and room for more, in the place of the old."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(self.path) as partial, create_hdf5(partial) as file:
                file.attrs["format"] = np.bytes_(FORMAT)
                file.attrs["version"] = VERSION
                file.attrs["rank"] = self.rank
                file.attrs["host"] = node_name(os.environ)
                num = np.array([len(rows), len(events)], np.int64)
                self.num_offset = file.create_dataset("num", data=num).id.get_offset()
                for table, records in (self.rows, rows), (self.events, events):
                    table.room = max(room, len(records))
                    table.offset = _reserve(file, table, records)
            descriptor = os.open(self.path, os.O_WRONLY)
        except OSError as error:
            raise self._error(error) from error
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = descriptor

    def _error(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: cannot write the log: {reason(error)}")


def not_measured(kind: np.dtype) -> float:
    """Return what stands for a value that was not measured: NaN, or -1.

    >>> not_measured(np.dtype("17i8")), not_measured(np.dtype("f8"))
    (-1, nan)
    """
    return -1 if kind.base.kind == "i" else math.nan


def _in_fields(dtype: np.dtype, old: np.ndarray, path: Path | str) -> np.ndarray:
    """Return rows of an earlier program with the fields of this one.

    Raises:
        CheckpointError: a field is missing here, or has another type.
    """
    known, before = dict(dtype.fields or {}), dict(old.dtype.fields or {})
    if any(name not in known or known[name][0] != before[name][0] for name in before):
        raise CheckpointError(f"{path}: a log with other fields; move it away")
    rows = np.empty(len(old), dtype)
    for name in known:
        rows[name] = old[name] if name in before else not_measured(dtype[name])
    return rows


def _reserve(file: h5py.File, table: _Table, records: np.ndarray) -> int:
    """Make the dataset of a table, write its records, return where it begins, bytes.

    It is contiguous and allocated at once; what is not written takes no place on disks
    that know sparse files.
    """
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    dataset = file.create_dataset(
        table.name, shape=(max(table.room, 1),), dtype=table.dtype, dcpl=creation
    )
    dataset[: len(records)] = records
    return int(dataset.id.get_offset())


def _read_log(path: Path) -> tuple[tuple[int, str], np.ndarray, np.ndarray]:
    """Return the rank and its host, and the records of a log that count.

    Raises:
        CheckpointError: one line with the path: missing, truncated, corrupt, foreign.
    """
    with open_hdf5(path, FORMAT, VERSION) as file:
        num_rows, num_events = (int(n) for n in file["num"][()])
        rows, events = file["rows"], file["events"]
        if not 0 <= num_rows <= len(rows) or not 0 <= num_events <= len(events):
            raise CheckpointError(f"{path}: corrupt: wrong number of records")
        if "step" not in (rows.dtype.names or ()) or events.dtype != EVENT:
            raise CheckpointError(f"{path}: corrupt: wrong fields")
        place = int(file.attrs["rank"]), str(file.attrs.get("host", ""))
        return place, rows[:num_rows], events[:num_events]


def read_log(path: Path | str) -> RankLog:
    """Return the log of one rank, also of one that is running or was killed.

    Raises:
        CheckpointError: one line with the path: missing, truncated, corrupt, foreign.
    """
    (rank, host), rows, events = _read_log(Path(path))
    log = RankLog(
        rank,
        {name: rows[name] for name in rows.dtype.names or ()},
        {name: events[name] for name in EVENT.names or ()},
        host,
    )
    for name in ("name", "activity"):
        log.events[name] = np.char.decode(log.events[name], "utf-8", "replace")
    return log


def read_run(folder: Path | str) -> dict[int, RankLog]:
    """Return rank -> log of a run folder.

    Raises:
        CheckpointError: there is no log, or one cannot be read.
    """
    paths = sorted((Path(folder) / "log").glob("rank-*.h5"))
    if not paths:
        raise CheckpointError(f"{folder}: no logs here")
    logs = [read_log(path) for path in paths]
    return {log.rank: log for log in logs}


def chrome_trace(folder: Path | str, out: Path | str) -> int:
    """Write the events of all ranks as a Chrome trace; return how many there were.

    Open it in chrome://tracing or ui.perfetto.dev: a process per rank, a thread per
    activity. The clocks of the ranks are taken as they are.

    Raises:
        CheckpointError: a log cannot be read, or `out` not be written.
    """
    trace: list[dict[str, Any]] = []
    num_events = 0
    for rank, log in read_run(folder).items():
        name: dict[str, Any] = {"name": f"rank {rank}"}
        trace.append({"ph": "M", "name": "process_name", "pid": rank, "args": name})
        activities = list(map(str, np.unique(log.events["activity"])))
        for number, activity in enumerate(activities):
            about = {"ph": "M", "name": "thread_name", "pid": rank, "tid": number}
            trace.append({**about, "args": {"name": activity}})
        for name_, activity, step, start_s, stop_s in zip(
            *log.events.values(), strict=True
        ):
            trace.append(
                {
                    "ph": "X",
                    "name": str(name_),
                    "pid": rank,
                    "tid": activities.index(str(activity)),
                    "ts": start_s * 1e6,
                    "dur": (stop_s - start_s) * 1e6,
                    "args": {"step": int(step)},
                }
            )
            num_events += 1
    write_json(Path(out), {"traceEvents": trace})
    return num_events


def write_summary(path: Path | str, summary: Mapping[str, Any]) -> None:
    """Write `summary` as JSON, sorted by key; what is not finite becomes null.

    A reader sees the old file or the new one, never a part.

    Raises:
        CheckpointError: it cannot be written; the old file stands.
    """
    write_json(Path(path), summary, indent=2)
