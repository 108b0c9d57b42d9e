"""Text files as sources of a corpus: which files, which part of them, in blocks.

A `Part` is a stretch of one file. Blocks end at a line end or a space, so that no word
is cut, and a file of many gigabytes is read in constant memory.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpilm.data.hdf5 import SPLITS
from mpilm.errors import DataError

Paths = str | Path | Sequence[str | Path]

# Chosen by measurement (docs/data.md): larger blocks are not faster.
BLOCK_BYTES = 1 << 20
# A run of bytes without white space that is longer than this is not text.
LONGEST_WORD_BYTES = 1 << 26


@dataclass
class Source:
    """One file.

    path    as the user named it
    size    in bytes
    digest  sha256 of what has been read with `hashing`, in file order
    """

    path: Path
    size: int
    digest: Any = field(default_factory=hashlib.sha256)


@dataclass
class Part:
    """Bytes `start` to `stop` of a source."""

    source: Source
    start: int
    stop: int

    def blocks(self, hashing: bool = False) -> Iterator[tuple[str, int]]:
        """Yield (text, bytes read for it); the last text ends in a line end.

        Raises:
            DataError: not UTF-8 (with byte and line), not text, or unreadable.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        where, carry, begun = self.start, "", self.start > 0
        for raw in self._read():
            if hashing:
                self.source.digest.update(raw)
            pending = len(decoder.getstate()[0])
            final = where + len(raw) == self.stop
            try:
                text = carry + decoder.decode(raw, final)
            except UnicodeDecodeError as error:
                raise self._not_utf8(where - pending + error.start) from None
            if not begun and text:
                begun = True
                text = text.removeprefix("\ufeff")
            where += len(raw)
            if final:
                yield text if text.endswith("\n") else text + "\n", len(raw)
                return
            # the last word stays: it may be an <eos> that the line end belongs to
            cut = text.rfind("\n") + 1 or text.rfind(" ", 0, len(text.rstrip())) + 1
            carry = text[cut:]
            if len(carry) > LONGEST_WORD_BYTES:
                raise DataError(
                    f"{self.source.path} is not text: no white space in"
                    f" {LONGEST_WORD_BYTES} characters before byte {where}"
                )
            yield text[:cut], len(raw)

    def _read(self) -> Iterator[bytes]:
        left = self.stop - self.start
        try:
            with self.source.path.open("rb") as file:
                file.seek(self.start)
                while left:
                    raw = file.read(min(BLOCK_BYTES, left))
                    if not raw:
                        raise DataError(
                            f"{self.source.path} became shorter while it was read"
                        )
                    left -= len(raw)
                    yield raw
        except OSError as error:
            raise unreadable(self.source.path, error) from error

    def _not_utf8(self, offset: int) -> DataError:
        line, left = 1, offset
        with self.source.path.open("rb") as file:
            while left and (raw := file.read(min(BLOCK_BYTES, left))):
                line += raw.count(b"\n")
                left -= len(raw)
        return DataError(
            f"{self.source.path} is not UTF-8 text: byte {offset}, line {line}"
        )


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the one-line error for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: no such file or folder")
    return DataError(f"{path} cannot be read: {error.strerror or error}")


def find_sources(paths: Paths) -> list[Source]:
    """Return the files named, folders replaced by the files in them, by name.

    Hidden files are left out.

    Raises:
        DataError: a file is missing, empty or unreadable, or a folder has no files.
    """
    sources = []
    for path in _listed(paths):
        try:
            files = sorted(_files(path)) if path.is_dir() else [path]
            if not files:
                raise DataError(f"{path}: there are no files in this folder")
            for file in files:
                if file.stat().st_size == 0:
                    raise DataError(f"{file} is empty")
                sources.append(Source(file, file.stat().st_size))
        except OSError as error:
            raise unreadable(path, error) from error
    return sources


def _listed(paths: Paths) -> list[Path]:
    if isinstance(paths, str | Path):
        return [Path(paths)]
    return [Path(path) for path in paths]


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            yield path


def find_splits(folder: Path) -> dict[str, Path] | None:
    """Return the split files of a corpus as distributed, or None if it is not one.

    They have train, valid or test as a part of their name: `wiki.train.tokens`,
    `ptb.valid.txt`. A folder that has none of valid and test is not such a corpus.

    Raises:
        DataError: it has several files for one split, or none for train.
    """
    found: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for path in sorted(_files(folder)):
        for name in SPLITS:
            if re.search(rf"(^|[._-]){name}([._-]|$)", path.name):
                found[name].append(path)
    if not found["valid"] and not found["test"]:
        return None
    for name, paths in found.items():
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise DataError(f"{folder} has several {name} files ({names}): name one")
    if not found["train"]:
        raise DataError(f"{folder} has files for valid or test, but none for train")
    return {name: paths[0] for name, paths in found.items() if paths}


def plan_parts(
    train: Paths, valid: Paths | None, test: Paths | None, share: float
) -> dict[str, list[Part]]:
    """Return the parts of each split, in reading order.

    A split that is None is the last `share` of the train files (valid before test),
    cut at a line end.

    Raises:
        DataError: a file is missing, empty, unreadable, or too small to be cut.
    """
    listed = _listed(train)
    if valid is None and test is None and len(listed) == 1 and listed[0].is_dir():
        splits = find_splits(listed[0])
        if splits:
            train, valid, test = (
                splits["train"],
                splits.get("valid"),
                splits.get("test"),
            )
    sources = find_sources(train)
    given = {"valid": valid, "test": test}
    missing = [name for name, paths in given.items() if paths is None]
    total = sum(source.size for source in sources)
    cuts = [
        round(total * (1 - share * (len(missing) - i))) for i in range(len(missing))
    ]
    pieces = _cut(sources, cuts)
    parts = {"train": pieces[0]} | dict(zip(missing, pieces[1:], strict=True))
    for name, paths in given.items():
        if paths is not None:
            parts[name] = [
                Part(source, 0, source.size) for source in find_sources(paths)
            ]
    return {name: parts[name] for name in SPLITS}


def _cut(sources: list[Source], cuts: list[int]) -> list[list[Part]]:
    """Return the sources in len(cuts) + 1 pieces, cut near the byte positions given."""
    pieces: list[list[Part]] = [[]]
    begin = 0
    targets = list(cuts)
    for source in sources:
        start, end = 0, begin + source.size
        while targets and targets[0] < end:
            stop = _cut_at(source, max(targets.pop(0) - begin, start))
            if stop > start:
                pieces[-1].append(Part(source, start, stop))
            pieces.append([])
            start = stop
        if start < source.size:
            pieces[-1].append(Part(source, start, source.size))
        begin = end
    if len(pieces) <= len(cuts) or not all(pieces):
        raise DataError(
            f"{sources[-1].path} is too small to take valid and test text from its end:"
            " give them"
        )
    return pieces


def _cut_at(source: Source, offset: int) -> int:
    """Return the first position from `offset` on that follows a line end (or space)."""
    offset = max(0, offset - 1)
    try:
        with source.path.open("rb") as file:
            file.seek(offset)
            raw = file.read(BLOCK_BYTES)
    except OSError as error:
        raise unreadable(source.path, error) from error
    cut = raw.find(b"\n") + 1 or raw.find(b" ") + 1
    if not cut:
        raise DataError(
            f"{source.path} has no line end after byte {offset} to cut the text at"
        )
    return offset + cut


def count_bytes(parts: dict[str, list[Part]]) -> int:
    """Return the bytes of all parts together."""
    return sum(part.stop - part.start for split in parts.values() for part in split)


def read_text(
    parts: list[Part], read: Callable[[int], None], hashing: bool = False
) -> Iterator[str]:
    """Yield the text of the parts in blocks, reporting bytes to `read`."""
    for part in parts:
        for text, num_bytes in part.blocks(hashing):
            yield text
            read(num_bytes)
