"""Runs as tables for other programs: CSV, and event files of TensorBoard.

    FOLDER/runs.csv    a run in a line: its settings that differ, its summary
    FOLDER/ranks.csv   a rank in a line: speed, waiting, straggler scores
    FOLDER/log.csv     a row of a rank's log in a line

An event file is a row of records (TensorFlow's TFRecord), each a protocol buffer:

    record   uint64 length, uint32 crc(length), data, uint32 crc(data); little endian
    crc      CRC-32C, rotated by 15 bits to the right, plus 0xa282ead8
    Event    1: wall time (double)  2: step (varint)  3: version (text)  5: Summary
    Summary  1: Value               Value  1: tag (text)  2: number (float)
"""

from __future__ import annotations

import csv
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpilm.errors import ConfigError
from mpilm.report.groups import differing, flat, shown
from mpilm.report.reader import PARTS, Run, Vector
from mpilm.storage.files import new_output, reason

CRC_32C = 0x82F63B78  # polynomial, reversed


def write_csv(runs: list[Run], folder: Path) -> list[Path]:
    """Write the tables; return their paths.

    Raises:
        DataError: one cannot be written.
    """
    make_folder(folder)
    tables = {"runs": run_lines, "ranks": rank_lines, "log": log_lines}
    written = []
    for name, lines in tables.items():
        path = folder / f"{name}.csv"
        with new_output(path) as partial, partial.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines(runs))
        written.append(path)
    return written


def make_folder(folder: Path) -> None:
    """Make a folder.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write: {reason(error)}") from None


def run_lines(runs: list[Run]) -> Iterator[list[Any]]:
    """Yield a line of headings, and one for each run."""
    settings = differing(runs)
    keys = sorted({key for run in runs for key in run.summary if is_number(run, key)})
    yield ["run", "strategy", "ranks", "simulated", *settings, *keys]
    for run in runs:
        values = [shown(flat(run.config).get(key, "")) for key in settings]
        numbers = [blank(run.number(key)) for key in keys]
        head = [run.name, run.strategy, run.ranks, int(run.simulated)]
        yield [*head, *values, *numbers]


def is_number(run: Run, key: str) -> bool:
    """Return whether a key of the summary stands for a number."""
    return key not in {"ranks", "simulated"} and math.isfinite(run.number(key))


def blank(value: float) -> float | str:
    """Return a number; "" for one that was not measured."""
    return value if math.isfinite(value) else ""


def rank_lines(runs: list[Run]) -> Iterator[list[Any]]:
    """Yield a line of headings, and one for each rank of each run."""
    names = ("samples_per_s", *PARTS, "waiting", "sent_Bps", "relative", "individual")
    yield ["run", "rank", *names]
    for run in runs:
        for row in run.rank_rows():
            values = [blank(getattr(row, name)) for name in names]
            yield [run.name, row.rank, *values]


def log_lines(runs: list[Run]) -> Iterator[list[Any]]:
    """Yield a line of headings, and one for each row of each log."""
    single = {
        name: None
        for run in runs
        for log in run.logs.values()
        for name, values in log.rows.items()
        if values.ndim == 1
    }
    yield ["run", "rank", *single]
    for run in runs:
        for rank in sorted(run.logs):
            columns = [run.logs[rank].rows.get(name) for name in single]
            for number in range(len(run.logs[rank].rows["step"])):
                values = [
                    "" if column is None else blank(column[number].item())
                    for column in columns
                ]
                yield [run.name, rank, *values]


def write_tensorboard(runs: list[Run], folder: Path) -> list[Path]:
    """Write an event file for each run, `folder`/RUN/events...; return their paths.

    Steps are samples of all ranks, so that runs on different numbers of ranks lie above
    each other; curves are those of the report.

    Raises:
        DataError: one cannot be written.
    """
    written = []
    for run in runs:
        path = folder / run.name / "events.out.tfevents.0.mpilm"
        make_folder(path.parent)
        with new_output(path) as partial, partial.open("wb") as file:
            file.write(record(event(0.0, version="brain.Event:2")))
            for tag, samples, seconds, values in scalars(run):
                for step, time_s, value in zip(samples, seconds, values, strict=True):
                    if math.isfinite(value):
                        made = event(time_s, step=int(step), tag=tag, value=value)
                        file.write(record(made))
        written.append(path)
    return written


def scalars(run: Run) -> Iterator[tuple[str, Vector, Vector, Vector]]:
    """Yield tag, samples of all ranks, seconds and values of each curve."""
    if curve := run.curve():
        yield "train/loss", curve.samples, curve.seconds, curve.loss
    moments, shares = run.waiting()
    yield "waiting", run.samples_at(moments), moments, shares
    yield f"valid/{run.measure}", *run.valid()
    yield "consensus_distance", *run.consensus()


def event(
    time_s: float,
    *,
    step: int = 0,
    version: str = "",
    tag: str = "",
    value: float = 0.0,
) -> bytes:
    """Return an Event as a protocol buffer."""
    found = b"\x09" + struct.pack("<d", time_s) + b"\x10" + varint(step)
    if version:
        found += b"\x1a" + counted(version.encode())
    if tag:
        inside = b"\x0a" + counted(tag.encode()) + b"\x15" + struct.pack("<f", value)
        found += b"\x2a" + counted(b"\x0a" + counted(inside))
    return found


def counted(data: bytes) -> bytes:
    """Return data behind its length."""
    return varint(len(data)) + data


def varint(number: int) -> bytes:
    """Return a number of 0 or more, 7 bits in a byte.

    >>> varint(300).hex()
    'ac02'
    """
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def record(data: bytes) -> bytes:
    """Return a record of an event file."""
    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked(part)) for part in (length, data))
    return length + next(sums) + data + next(sums)


def masked(data: bytes) -> int:
    """Return the checksum that a record holds."""
    found = crc(data)
    return ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc_table() -> Iterable[int]:
    """Yield what each byte does to the checksum."""
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (CRC_32C if value & 1 else 0)
        yield value


TABLE = tuple(crc_table())


def crc(data: bytes) -> int:
    """Return the CRC-32C (RFC 3720, B.4).

    >>> f"{crc(b'123456789'):x}"
    'e3069283'
    """
    found = 0xFFFFFFFF
    for byte in data:
        found = found >> 8 ^ TABLE[(found ^ byte) & 0xFF]
    return found ^ 0xFFFFFFFF
