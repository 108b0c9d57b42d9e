"""Objects in Kaldi's archives, read one by one.

Archives are binary (also compressed) or text. Binary ones are read by kaldiio. Pipes
("cat x.gz |") and kaldiio's own pickles are refused: a list of files runs no program.
A path that is not there is looked for beside the list that names it.

What is wrong with one utterance is a DataError that names it.
"""

from __future__ import annotations

import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from kaldiio.matio import read_kaldi
from numpy.typing import NDArray

from mpilm.data.lists import read_list
from mpilm.errors import DataError
from mpilm.storage.files import reason

# what an object in an archive may begin with, binary or text
BEGINNING = re.compile(rb"\0B|[\s\[0-9+-]")
# Frames that a range may reach beyond the end, where they are left out: the tolerance
# of Kaldi's kaldi-holder.cc, for edge effects (2) and rounded times of segments (1).
BEYOND = 3
LONGEST_KEY_BYTES = 1 << 12  # what has no blank for longer is no archive
MOST_HEADER_BYTES = 32
ELEMENT_BYTES = {b"FM": 4, b"DM": 8, b"FV": 4, b"DV": 8}
COMPRESSED_BYTES = {b"CM": 1, b"CM2": 2, b"CM3": 1}
PLACE = re.compile(r"(?P<path>.*?)(:(?P<offset>\d+))?(\[(?P<part>[\d:,]*)\])?")


@dataclass
class Bad:
    """What to do about bad utterances.

    skip   leave them out; else the first one is an error
    lines  utterance -> what was wrong with it, one line
    """

    skip: bool = False
    lines: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, error: DataError) -> None:
        """Leave an utterance out, or raise what is wrong with it."""
        if not self.skip:
            raise error
        self.lines[name] = str(error)


@contextmanager
def utterance(name: str, bad: Bad | None = None) -> Iterator[None]:
    """Put the utterance's name before the DataError of the block, if it is not there.

    Args:
        bad: what to do about it; None: raise it.
    """
    try:
        yield
    except DataError as error:
        line = str(error)
        if not line.startswith("utterance "):
            line = f"utterance {name}: {line}"
        named = DataError(line)
        if bad is None:
            raise named from error.__cause__
        bad.note(name, named)


def find_archive(name: str, beside: Path) -> Path:
    """Return the path of an archive, looked for beside the list that names it too."""
    path = Path(name)
    if not path.exists() and (beside.parent / path).exists():
        return beside.parent / path
    return path


def files_of(path: Path) -> Iterator[Path]:
    """Yield a file and, if it is a list of places, the archives that it names."""
    yield path
    if path.suffix == ".scp" and path.exists():
        places = (PLACE.fullmatch(p) for _, p in read_list(path, of_paths=True))
        for name in dict.fromkeys(match["path"] for match in places if match):
            yield find_archive(name, path)


class Archives:
    """Reads objects by their places; keeps the last archive open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def read(self, place: str, beside: Path) -> NDArray[Any]:
        """Return the object at `place`, "archive:offset[rows,columns]".

        Args:
            beside: the list that names it.

        Raises:
            DataError: no such file, or nothing whole that Kaldi writes stands there.
        """
        if place.startswith("|") or place.endswith("|"):
            raise DataError(f"{beside}: {place!r} is a pipe: write it to a file first")
        match = PLACE.fullmatch(place)
        if match is None or not match["path"]:
            raise DataError(f"{beside}: {place!r} is no place in an archive")
        path = find_archive(match["path"], beside)
        file, offset = self._open(path), int(match["offset"] or 0)
        array = read_object(file, path, offset)
        for axis, part in enumerate((match["part"] or "").split(",")):
            if part not in ("", ":"):
                array = _range_of(array, axis, part, place)
        return array

    def _open(self, path: Path) -> BinaryIO:
        if path != self._path or self._file is None:
            self.close()
            try:
                self._file = path.open("rb")
            except (OSError, ValueError) as error:  # a path with a null byte
                raise DataError(f"{path}: {reason(error)}") from None
            self._path = path
        return self._file

    def close(self) -> None:
        """Close the archive."""
        if self._file is not None:
            self._file.close()
        self._file = None


def _range_of(array: NDArray[Any], axis: int, part: str, place: str) -> NDArray[Any]:
    """Return the rows or columns first:last, last included, as Kaldi counts.

    As in Kaldi, the last row may lie a little beyond the end: see BEYOND.
    """
    first, colon, last = part.partition(":")
    if not (first and (last or not colon)) or int(last or first) < int(first):
        raise DataError(f"{place}: {part} is no range first:last")
    start, stop = int(first), int(last or first) + 1
    size = array.shape[axis] if axis < array.ndim else 0
    if start >= size or stop > size + (BEYOND if axis == 0 else 0):
        raise DataError(f"{place}: {part} lies outside of {array.shape}")
    return array[start:stop] if axis == 0 else array[:, start:stop]


def read_object(file: BinaryIO, path: Path, offset: int) -> NDArray[Any]:
    """Return the matrix or vector that begins at `offset`.

    Raises:
        DataError: there is none, or not all of it.
    """
    try:
        file.seek(offset)
        beginning = file.read(2)
        if not beginning:
            raise DataError(f"{path}: ends before byte {offset}: truncated?")
        if not BEGINNING.match(beginning):
            raise DataError(f"{path}: byte {offset} begins no matrix or vector")
        file.seek(offset)
        if beginning != b"\0B":
            return _read_text(file)
        require_room(file)
        return np.asarray(read_kaldi(file))
    except DataError:
        raise
    except Exception as error:
        # the content may be anything, so kaldiio and numpy may raise anything
        raise DataError(
            f"{path}: no whole matrix or vector at byte {offset}: truncated?"
        ) from error


def require_room(file: BinaryIO) -> None:
    """Raise unless what a binary header declares can stand in the rest of the file.

    kaldiio would ask for the memory first. The file stays where it is, before "\\0B".

    Raises:
        ValueError: it is too large, or of a kind that Kaldi does not write.
    """
    begin = file.tell()
    head = file.read(MOST_HEADER_BYTES)
    left = os.fstat(file.fileno()).st_size - begin
    file.seek(begin)
    if head[2:3] == b"\4":  # integers, each with a byte before it
        needed = 5 * _sizes(head, 3, 1)
    else:
        kind, _, _ = head[2:].partition(b" ")
        at = 3 + len(kind)
        if kind in ELEMENT_BYTES:
            is_matrix = kind.endswith(b"M")
            needed = ELEMENT_BYTES[kind] * _sizes(head, at, 1 + is_matrix, gap=1)
        elif kind in COMPRESSED_BYTES:
            needed = COMPRESSED_BYTES[kind] * _sizes(head, at + 8, 2)
        else:
            raise ValueError("no matrix or vector")
    if needed > left:
        raise ValueError(f"{needed} bytes are declared, {left} are there")


def _sizes(head: bytes, at: int, num: int, *, gap: int = 0) -> int:
    """Return the product of so many int32, each behind a gap.

    Raises:
        ValueError: one is negative.
    """
    product = 1
    for _ in range(num):
        at += gap
        size = int.from_bytes(head[at : at + 4], "little", signed=True)
        if size < 0:
            raise ValueError(f"a size of {size}")
        product, at = product * size, at + 4
    return product


def _read_text(file: BinaryIO) -> NDArray[Any]:
    """Return what stands in the text: 1 2 3, or [ 1 2 3 ], or rows between brackets.

    kaldiio takes the type of the first number for that of all, and no tabs.
    """
    line = file.readline()
    before, bracket, text = line.partition(b"[")
    if not bracket:
        return np.array(line.split(), np.int32)
    if before.strip():
        raise ValueError("no number")
    while b"]" not in line:
        line = file.readline()
        if not line:
            raise ValueError("no closing bracket")
        text += line
    inside, _, after = text.partition(b"]")
    if after.strip():
        raise ValueError("more behind the bracket")
    rows = [row for row in map(bytes.split, inside.split(b"\n")) if row]
    array = np.array(rows, np.float64).reshape(len(rows), -1)
    return array if b"\n" in inside or not rows else array[0]


def read_archive(path: Path, bad: Bad) -> Iterator[tuple[str, int, NDArray[Any]]]:
    """Yield (key, offset, object) of an archive, binary or text.

    Args:
        bad: takes note where it breaks off; nothing follows.

    Raises:
        DataError: it cannot be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from None
    with closing(file):
        if file.read(len(BOM_UTF8)) != BOM_UTF8:
            file.seek(0)
        while key := _read_key(file, path):
            offset = file.tell()
            found: list[NDArray[Any]] = []
            with utterance(key, bad):
                found.append(read_object(file, path, offset))
            if not found:
                return
            yield key, offset, found[0]


def _read_key(file: BinaryIO, path: Path) -> str:
    """Return the next key of an archive, the blank behind it read; "" at the end."""
    key = b""
    while (byte := file.read(1)) and not (key and byte.isspace()):
        key += byte.strip()
        if len(key) > LONGEST_KEY_BYTES:
            raise DataError(f"{path}: is no archive of Kaldi")
    if byte == b"\n":  # the line is empty, and what stands there has no numbers
        file.seek(-1, os.SEEK_CUR)
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no archive of Kaldi") from None


def whereabouts(path: Path, offset: int) -> str:
    """Return where in an archive an object is, for people: its line, or its byte."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(2) == b"\0B":
            return f"byte {offset}"
        file.seek(0)
        number = 1
        while file.readline() and file.tell() < offset:
            number += 1
    return f"line {number}"
