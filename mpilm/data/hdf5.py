"""The corpus file: token ids, vocabulary and provenance in one HDF5 file.

Layout (docs/formats.md has the table):

    /                      attributes: format, version, kind, level, fingerprint, floor
    /vocabulary/bytes      (n,) uint8      the words in UTF-8, end to end, in id order
    /vocabulary/offsets    (V+1,) int64    word i is bytes[offsets[i]:offsets[i+1]]
    /vocabulary/counts     (V,) int64      how often each id stands in the train split
    /splits/NAME           (N,) uint16 | uint32   token ids, with checksums
    /tokenizer             JSON text, of level "subword" only
    /provenance            JSON text

A file is written under a temporary name, fsynced and renamed: it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from mpilm.errors import DataError
from mpilm.storage.files import create_hdf5, new_output, reason, require_stored

T = TypeVar("T")
ShowProgress = Callable[[int, int], None]  # called with how much is done, and in all

FORMAT = "mpilm corpus"
VERSION = 1
SPLITS = ("train", "valid", "test")
UNK = "<unk>"
EOS = "<eos>"

# Chosen, not tuned: 64 or 128 KiB. HDF5 reads whole chunks, and a stream reads some
# thousand tokens at a time.
CHUNK_TOKENS = 1 << 15


def read_tokens(tokens: Any, start: int, stop: int) -> NDArray[Any]:
    """Return tokens[start:stop] of a split.

    Raises:
        DataError: the file cannot be read there, or its checksum is wrong.
    """
    try:
        return tokens[start:stop]
    except OSError as error:
        raise DataError(f"{origin(tokens)} is damaged: {reason(error)}") from error


class Announcer:
    """Lets the system begin to read parts of a split, beside the learner.

    By the time that they are wanted they are in memory: the disk, or the network behind
    it, has worked meanwhile. Only a hint: where it is not possible nothing happens.
    """

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens
        self._places: dict[int, tuple[int, int]] | None = None  # of chunks in the file

    def will_read(self, start: int, stop: int) -> None:
        """Announce tokens[start:stop]; returns at once."""
        if not isinstance(self.tokens, h5py.Dataset):
            return
        try:
            descriptor = self.tokens.file.id.get_vfd_handle()
            length = self.tokens.chunks[0]
            if self._places is None:
                self._places = self._find()
            for first in range(start // length * length, stop, length):
                if first in self._places:
                    place = self._places[first]
                    os.posix_fadvise(descriptor, *place, os.POSIX_FADV_WILLNEED)
        except (AttributeError, OSError, RuntimeError, TypeError):
            return  # no file on a disk, no chunks, another system

    def _find(self) -> dict[int, tuple[int, int]]:
        """Return the places of all chunks; one by one each takes 0.3 ms (measured)."""
        found: dict[int, tuple[int, int]] = {}

        def note(chunk: Any) -> None:
            found[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size

        self.tokens.id.chunk_iter(note)
        return found


def origin(tokens: Any) -> str:
    """Return how messages name `tokens`: "the train split of FILE", or "the data"."""
    if isinstance(tokens, h5py.Dataset):
        return f"the {tokens.name.rsplit('/', 1)[-1]} split of {tokens.file.filename}"
    return "the data"


def words_fingerprint(raw: bytes, offsets: NDArray[np.int64]) -> str:
    """Return a hash of a vocabulary: of its words and of their order."""
    digest = hashlib.sha256(offsets.astype("<i8").tobytes())
    digest.update(raw)
    return digest.hexdigest()


@dataclass(frozen=True)
class PrepareSummary:
    """What a `prepare` command wrote.

    path         the corpus file
    level        "word", "char" or "subword"
    vocabulary   number of words (or characters, or pieces), V
    tokens       split -> number of tokens
    unknown      split -> share of them that is `<unk>`, 0 to 1
    floor        perplexity that no model can get below, where it is known
    fingerprint  hash of the vocabulary
    """

    path: Path
    level: str
    vocabulary: int
    tokens: dict[str, int]
    unknown: dict[str, float]
    floor: float | None
    fingerprint: str


class Corpus:
    """A corpus file, open for reading. Splits are read by slices, never whole.

    path         the file
    kind         "text"
    level        "word", "char" or "subword"
    fingerprint  hash of the vocabulary; equal hashes mean equal ids
    floor        perplexity floor of a synthetic language, else None
    provenance   where the text came from and how it was treated
    counts       (V,) int64, how often each id stands in the train split
    tokenizer    JSON text of the tokenizer of level "subword"; else ""
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self.path = path
        self.kind = str(file.attrs["kind"])
        self.level = str(file.attrs["level"])
        self.fingerprint = str(file.attrs["fingerprint"])
        floor = file.attrs.get("floor")
        self.floor = None if floor is None else float(floor)
        self.provenance: dict[str, Any] = json.loads(file["provenance"].asstr()[()])
        self._raw: bytes = file["vocabulary/bytes"][:].tobytes()
        self._offsets: NDArray[np.int64] = file["vocabulary/offsets"][:]
        self.counts: NDArray[np.int64] = file["vocabulary/counts"][:]
        has_own = "tokenizer" in file
        self.tokenizer = str(file["tokenizer"].asstr()[()]) if has_own else ""
        self.splits: tuple[str, ...] = tuple(
            sorted(file["splits"], key=lambda name: (*SPLITS, name).index(name))
        )
        if words_fingerprint(self._raw, self._offsets) != self.fingerprint:
            raise ValueError("its vocabulary does not match its fingerprint")
        for name in self.splits:
            tokens = file["splits"][name]
            if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
                raise ValueError(f"split {name} holds no token ids")

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Return the corpus at `path`, checked.

        Raises:
            DataError: missing, empty, truncated, damaged or not a corpus.
        """
        return open_corpus(path, cls, "text")

    @cached_property
    def vocabulary(self) -> list[str]:
        """The words (or characters) in id order."""
        raw = self._raw
        return [raw[a:b].decode() for a, b in pairwise(self._offsets.tolist())]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Word (or character) -> id."""
        return {word: index for index, word in enumerate(self.vocabulary)}

    def num_words(self, name: str) -> int:
        """Return words and line ends of a split of level "subword"; 0: not known."""
        return int(self._file["splits"][name].attrs.get("num_words", 0))

    def split(self, name: str) -> h5py.Dataset:
        """Return the token ids of a split, an HDF5 dataset to read by slices.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"{self.path} has no split {name!r}; it has {known}")
        return self._file["splits"][name]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Corpus:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_corpus(path: str | Path, make: Callable[[h5py.File, Path], T], kind: str) -> T:
    """Return what `make` makes of a corpus file of a kind; the file stays open.

    Raises:
        DataError: missing, empty, truncated, damaged, or not such a corpus.
    """
    path = Path(path)
    file = _open_hdf5(path)
    try:
        if file.attrs.get("format") != FORMAT:
            raise DataError(f"{path} is an HDF5 file but not a corpus of mpilm")
        version = int(file.attrs["version"])
        if version != VERSION:
            raise DataError(
                f"{path} has corpus format {version}; this mpilm reads {VERSION}:"
                " prepare it again"
            )
        found = str(file.attrs["kind"])
        if found != kind:
            raise DataError(f"{path} is a corpus of {found}, not of {kind}")
        require_stored(file)
        return make(file, path)
    except DataError:
        file.close()
        raise
    except Exception as error:
        # the content may be anything, so h5py and numpy may raise anything
        file.close()
        raise DataError(f"{path} is a damaged corpus: {reason(error)}") from error


def corpus_kind(path: str | Path) -> str:
    """Return "text" or "frames"; "text" for what is no corpus, whose opening tells."""
    with _open_hdf5(Path(path)) as file:
        return str(file.attrs.get("kind", "text"))


def _open_hdf5(path: Path) -> h5py.File:
    """Return `path` opened for reading; every failure is a one-line DataError."""
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a corpus file")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        # A corpus never changes, and locks fail on many cluster file systems.
        return h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it by mpilm prepare") from None
    except OSError as error:
        if "truncated" in str(error):
            why = "is truncated: copy or prepare it again"
        elif "signature" in str(error):
            why = "is not an HDF5 file; make a corpus of it by mpilm prepare"
        else:
            why = f"cannot be read: {reason(error)}"
        raise DataError(f"{path} {why}") from error


class CorpusWriter:
    """Writes a corpus file block by block, in constant memory.

    unknown  split -> number of `<unk>` written so far
    """

    def __init__(
        self,
        file: h5py.File,
        *,
        level: str,
        vocabulary: Sequence[str],
        counts: NDArray[np.int64] | None = None,
        floor: float | None = None,
    ) -> None:
        """Begin the file.

        Args:
            counts: (V,), how often each id stands in train; None: counted here.
        """
        words = [word.encode() for word in vocabulary]
        offsets = np.zeros(len(words) + 1, np.int64)
        np.cumsum([len(word) for word in words], out=offsets[1:])
        raw = b"".join(words)
        self.fingerprint = words_fingerprint(raw, offsets)
        self.level = level
        self.floor = floor
        self.num_words = len(words)
        self.unknown = dict.fromkeys(SPLITS, 0)
        self._unk = vocabulary.index(UNK) if UNK in vocabulary else -1
        self._counting = counts is None
        self._counts = np.zeros(len(words), np.int64) if counts is None else counts
        self._file = file
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["kind"] = "text"
        file.attrs["level"] = level
        file.attrs["fingerprint"] = self.fingerprint
        if floor is not None:
            file.attrs["floor"] = floor
        group = file.create_group("vocabulary")  # made on the way, it would hold a time
        group["bytes"] = np.frombuffer(raw, np.uint8)
        group["offsets"] = offsets
        for name in SPLITS:
            file.create_dataset(
                f"splits/{name}",
                shape=(0,),
                maxshape=(None,),
                chunks=(CHUNK_TOKENS,),
                dtype=np.uint16 if len(words) <= 1 << 16 else np.uint32,
                fletcher32=True,
            )

    def append(self, split: str, ids: NDArray[Any]) -> None:
        """Write `ids`, (n,), behind what the split has."""
        tokens = self._file["splits"][split]
        start = len(tokens)
        tokens.resize((start + len(ids),))
        tokens[start:] = ids
        self._count(split, ids)

    def write(self, split: str, start: int, ids: NDArray[Any]) -> None:
        """Write `ids`, (n,), at `start`; the split must have been `grow`n to there."""
        self._file["splits"][split][start : start + len(ids)] = ids
        self._count(split, ids)

    def grow(self, split: str, num_tokens: int) -> None:
        """Make room for `num_tokens` in the split."""
        self._file["splits"][split].resize((num_tokens,))

    def _count(self, split: str, ids: NDArray[Any]) -> None:
        if self._unk >= 0:
            self.unknown[split] += int(np.count_nonzero(ids == self._unk))
        if self._counting and split == "train":
            self._counts += np.bincount(ids, minlength=self.num_words)

    def finish(self, path: Path, provenance: dict[str, Any]) -> PrepareSummary:
        """Write counts and provenance; return what the file at `path` will hold."""
        tokens = {name: len(self._file["splits"][name]) for name in SPLITS}
        unknown = {
            name: self.unknown[name] / tokens[name] if tokens[name] else 0.0
            for name in SPLITS
        }
        self._file["vocabulary/counts"] = self._counts
        facts = {"tokens": tokens, "unknown": unknown, "mpilm": library_version()}
        self._file["provenance"] = json.dumps(provenance | facts, indent=1)
        return PrepareSummary(
            path=path,
            level=self.level,
            vocabulary=self.num_words,
            tokens=tokens,
            unknown=unknown,
            floor=self.floor,
            fingerprint=self.fingerprint,
        )


@contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """Yield a new HDF5 file that takes the place of `path` if the block succeeds.

    Raises:
        DataError: it cannot be written (no folder, no permission, disk full).
    """
    with new_output(path) as partial, create_hdf5(partial) as file:
        yield file


def library_version() -> str:
    """Return the version of mpilm that is installed."""
    try:
        return metadata.version("mpilm")
    except metadata.PackageNotFoundError:
        return "not installed"
