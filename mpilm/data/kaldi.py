"""Kaldi's files: feature archives, alignments, speakers, CMVN; read one by one.

    DIR/feats.scp   utterance -> archive:offset[rows,columns]
    DIR/utt2spk     utterance -> speaker
    DIR/text        utterance -> words; may be absent
    DIR/cmvn.scp    speaker -> statistics; may be absent, then they are computed

Archives are binary (also compressed) or text, as kaldiio reads them. Pipes
("cat x.gz |") and kaldiio's own pickles are refused: a list of files runs no program.
A path that is not there is looked for beside the list that names it.

What is wrong with one utterance is a DataError that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from kaldiio.matio import read_kaldi, read_token
from numpy.typing import NDArray

from mpilm.errors import DataError
from mpilm.storage.files import reason

# what an object in an archive may begin with, binary or text
BEGINNING = re.compile(rb"\0B|[\s\[0-9+-]")
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


def read_list(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (key, rest of the line) of a Kaldi list: scp, utt2spk, text.

    Raises:
        DataError: it cannot be read, or a line has no key.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                key, _, rest = line.strip().partition(" ")
                if not key:
                    raise DataError(f"{path}: line {number} is blank")
                yield key, rest.strip()
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from None


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
        places = (PLACE.fullmatch(place) for _, place in read_list(path))
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
                array = _cut(array, axis, part, place)
        return array

    def _open(self, path: Path) -> BinaryIO:
        if path != self._path or self._file is None:
            self.close()
            try:
                self._file = path.open("rb")
            except OSError as error:
                raise DataError(f"{path}: {reason(error)}") from None
            self._path = path
        return self._file

    def close(self) -> None:
        """Close the archive."""
        if self._file is not None:
            self._file.close()
        self._file = None


def _cut(array: NDArray[Any], axis: int, part: str, place: str) -> NDArray[Any]:
    """Return the rows or columns first:last, last included, as Kaldi counts."""
    first, _, last = part.partition(":")
    if not (first and (last or ":" not in part)):
        raise DataError(f"{place}: {part} is no range first:last")
    stop = int(last or first) + 1
    if axis >= array.ndim or stop > array.shape[axis]:
        raise DataError(f"{place}: {part} lies outside of {array.shape}")
    return array[int(first) : stop] if axis == 0 else array[:, int(first) : stop]


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
        if beginning != b"\0B":  # kaldiio reads text byte by byte
            line = file.readline()
            if b"[" not in line:
                return np.array(line.split(), np.int32)
            file.seek(offset)
        return np.asarray(read_kaldi(file))
    except DataError:
        raise
    except Exception as error:
        # the content may be anything, so kaldiio and numpy may raise anything
        raise DataError(
            f"{path}: no whole matrix or vector at byte {offset}: truncated?"
        ) from error


class KaldiFolder:
    """A data folder of Kaldi: DIR with feats.scp.

    speakers  utterance -> speaker; empty where there is no utt2spk
    texts     utterance -> words; empty where there is no text

    Raises:
        DataError: no feats.scp, or an empty one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.scp = path, path / "feats.scp"
        self.size = sum(1 for _ in read_list(self.scp))
        if not self.size:
            raise DataError(f"{self.scp}: is empty")
        self.speakers = self._optional("utt2spk")
        self.texts = self._optional("text")

    def _optional(self, name: str) -> dict[str, str]:
        path = self.path / name
        return dict(read_list(path)) if path.exists() else {}

    def files(self) -> Iterator[Path]:
        """Yield the files that are read, archives too."""
        for name in ("feats.scp", "utt2spk", "text", "cmvn.scp"):
            yield from files_of(self.path / name)

    def names(self) -> Iterator[str]:
        """Yield the utterances, in the order of feats.scp."""
        return (name for name, _ in read_list(self.scp))

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield (utterance, where its features are), in the order of feats.scp."""
        return read_list(self.scp)

    def features(self, archives: Archives, name: str, place: str) -> NDArray[Any]:
        """Return the features of an utterance, (T, F).

        Raises:
            DataError: one line with its name.
        """
        with utterance(name):
            return archives.read(place, self.scp)

    def speaker(self, name: str) -> str:
        """Return the speaker of an utterance; "" where there is no utt2spk.

        Raises:
            DataError: there is one, but without this utterance.
        """
        if self.speakers and name not in self.speakers:
            raise DataError(f"utterance {name}: is not in {self.path / 'utt2spk'}")
        return self.speakers.get(name, "")


class Alignments:
    """Labels of utterances: pdf ids, or targets, from archives or lists of places.

    A vector has one class per frame. A matrix with one column is read as such; of one
    with more columns (targets) the largest in each row counts.

    num_classes  one more than the largest label

    Args:
        paths: files; *.scp are lists, others archives, binary or text.
        bad: what to do about alignments that cannot be read. What follows such a one
            in its archive is out of reach: those utterances have none.

    Raises:
        DataError: a file cannot be read, or is empty.
    """

    def __init__(self, paths: Sequence[Path], bad: Bad) -> None:
        self._places: dict[str, tuple[int, str]] = {}
        self._paths = list(paths)
        self._archives = Archives()
        self.num_classes = 0
        for index, path in enumerate(self._paths):
            before = len(self._places)
            for name, place, labels_T in self._entries(path, bad):
                self._places[name] = (index, place)
                if len(labels_T):
                    self.num_classes = max(self.num_classes, int(labels_T.max()) + 1)
            if len(self._places) == before:
                raise DataError(f"{path}: holds no alignment")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def labels(self, name: str) -> NDArray[np.int32]:
        """Return the labels of an utterance, (T,).

        Raises:
            DataError: there are none.
        """
        if name not in self._places:
            raise DataError(f"utterance {name}: has no alignment")
        index, place = self._places[name]
        with utterance(name):
            return as_labels(self._archives.read(place, self._paths[index]))

    def _entries(
        self, path: Path, bad: Bad
    ) -> Iterator[tuple[str, str, NDArray[np.int32]]]:
        if path.suffix == ".scp":
            for name, place in read_list(path):
                with utterance(name, bad):
                    labels_T = as_labels(self._archives.read(place, path))
                    yield name, place, labels_T
            return
        if path.suffix == ".gz":
            raise DataError(
                f"{path}: is compressed; Kaldi's ali.*.gz hold transition ids:"
                " ali-to-pdf makes pdf ids of them"
            )
        for name, offset, array in read_archive(path, bad):
            with utterance(name, bad):
                yield name, f"{path}:{offset}", as_labels(array)


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
        while True:
            try:
                key = read_token(file)
            except UnicodeDecodeError:
                raise DataError(f"{path}: is no archive of Kaldi") from None
            if key is None:
                return
            key, offset = key.strip(), file.tell()
            if not key:
                return
            found: list[NDArray[Any]] = []
            with utterance(key, bad):
                found.append(read_object(file, path, offset))
            if not found:
                return
            yield key, offset, found[0]


def as_labels(array: NDArray[Any]) -> NDArray[np.int32]:
    """Return one class per frame, (T,).

    >>> as_labels(np.array([[0.1, 0.9], [0.8, 0.2]])), as_labels(np.array([[3.0]]))
    (array([1, 0], dtype=int32), array([3], dtype=int32))

    Raises:
        DataError: they are no whole numbers, or not finite.
    """
    if not np.isfinite(array).all():
        raise DataError("labels are not finite")
    if array.ndim == 2 and array.shape[1] > 1:
        return array.argmax(axis=1).astype(np.int32)
    flat = array.reshape(-1)
    labels = flat.astype(np.int32)
    if (labels != flat).any():
        raise DataError("labels are no whole numbers")
    return labels
