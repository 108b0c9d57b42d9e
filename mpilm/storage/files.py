"""Files that are on the disk as a whole or not at all.

A file is written under a temporary name, forced to the disk (fsync) and renamed, which
is atomic; then its folder is forced to the disk, so that the name survives too
(`new_file`; checkpoint.py does the same with folders).
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpilm.errors import CheckpointError, DataError

NUMBERS = re.compile(r"\[\n[-+.,eEnul\d\s]*\]")  # an indented list; null is one too
PAGE_BYTES = 4096  # a multiple of the blocks of all disks that we know of
DIRECT_BYTES = 1 << 20  # chosen, not tuned
SIGNATURE = b"\x89HDF\r\n\x1a\n"


def reason(error: BaseException) -> str:
    """Return why something failed, on one line without the file's name."""
    if isinstance(error, OSError) and error.errno and error.filename:
        return os.strerror(error.errno)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.splitlines()[0]
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def text_of(path: Path) -> str:
    """Return the text of a file in UTF-8, a byte order mark at its beginning dropped.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8; a ValueError.
    """
    return path.read_bytes().decode("utf-8-sig")


def printable(text: str) -> str:
    """Return text in which the bytes of a path that are no UTF-8 are escaped.

    >>> print(printable("caf\\udce9"))
    caf\\udce9
    """
    return text.encode(errors="backslashreplace").decode()


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    """Force the content of a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_fully(descriptor: int, data: Any, offset: int) -> None:
    """Write all of `data` at `offset`; os.pwrite may write a part only."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file that takes the place of `path`.

    Where the block succeeds, its file is forced to the disk and renamed; if it raises,
    nothing is left of it, and what stood at `path` stays. A link at `path` stays too:
    the file that it names is replaced.

    Raises:
        OSError: it cannot be written, or at `path` stands what is no file.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "is no regular file")  # such as /dev/null
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync_file(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """Do as `new_file` for a file that a user named; its folder is made if need be.

    Raises:
        DataError: one line with the path: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            yield partial
    except OSError as error:
        raise DataError(f"{path} cannot be written: {reason(error)}") from error


def require_apart(outputs: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Raise if a file to be written is also read, or stands for two outputs.

    Links are followed, and all names of a file (hard links) are that file.

    Args:
        inputs: gone through only where an output is there already.

    Raises:
        DataError: one line with the names; also where an output is a folder.
    """
    taken: dict[Any, Path] = {}
    is_there = False
    for out in outputs:
        if out.exists() and not out.is_file():
            what = "a folder" if out.is_dir() else "no regular file"
            raise DataError(f"{out} is {what}: name a file to write")
        name = _identity(out)
        if other := taken.get(name):
            names = f"{other} and {out}" if str(other) != str(out) else f"{out}, twice,"
            raise DataError(f"{names} would be one file to write: name another")
        taken[name] = out
        is_there = is_there or out.exists()
    for path in inputs if is_there else ():
        if path.is_file() and _identity(path) in taken:
            out = taken[_identity(path)]
            which = "" if str(out) == str(path) else f" as {path}"
            raise DataError(
                f"{out} is read{which}, and would be written: name another file"
            )


def _identity(path: Path) -> Any:
    """Return what all names of a file have in common."""
    try:
        about = path.stat()
    except OSError:
        return os.path.realpath(path)
    return about.st_dev, about.st_ino


def replace_file(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`: a reader sees the old content or the new.

    Raises:
        OSError: it could not be written; the old content stands.
    """
    with new_file(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: Any, *, indent: int | None = None) -> None:
    """Make `value` the content of `path` as JSON, sorted by key; see `plain`.

    With `indent`, a list of numbers stands on one line.

    Raises:
        CheckpointError: it could not be written; the old content stands.
    """
    text = json.dumps(plain(value), indent=indent, sort_keys=True, allow_nan=False)
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), text)
    try:
        replace_file(path, f"{text}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {reason(error)}") from error


def plain(value: Any) -> Any:
    """Return `value` in the types of JSON; what is not finite becomes null.

    >>> plain({"loss": np.float32(0.5), "best": math.nan, 3: (1, True)})
    {'loss': 0.5, 'best': None, '3': [1, True]}
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def at_a_page(like: np.ndarray) -> np.ndarray:
    """Return memory for an array of this shape that `create_hdf5` can write directly.

    >>> at_a_page(np.zeros((3, 500_000), np.float32)).ctypes.data % PAGE_BYTES
    0
    """
    if like.nbytes < DIRECT_BYTES:
        return np.empty(like.shape, like.dtype)
    pages = mmap.mmap(-1, like.nbytes)
    return np.frombuffer(pages, like.dtype, like.size).reshape(like.shape)


@contextmanager
def create_hdf5(path: Path) -> Iterator[h5py.File]:
    """Yield a new HDF5 file that is closed and forced to the disk at the end.

    Its format is the one of HDF5 1.10, whose metadata carry checksums. Arrays are
    written from where they are, without a copy in memory.

    Raises:
        OSError: the file could not be written (disk full, quota, permission).
    """
    with _Sink(path) as sink:
        try:
            with h5py.File(
                sink,
                "w",
                libver=("v110", "v110"),
                alignment_threshold=DIRECT_BYTES,
                alignment_interval=PAGE_BYTES,
            ) as file:
                yield file
        finally:
            # goes before what HDF5 made of reading back unwritten metadata
            if sink.error:
                raise sink.error
        os.fsync(sink.descriptor)


@contextmanager
def open_hdf5(path: Path, what: str, version: int) -> Iterator[h5py.File]:
    """Yield an HDF5 file of ours open for reading; what goes wrong inside is one line.

    Its attribute "format" says what it is, and "version" how it is laid out.

    Raises:
        CheckpointError: one line with the path: missing, truncated, corrupt, foreign.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                raise CheckpointError(f"{path}: not an HDF5 file")
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != np.bytes_(what):
                raise CheckpointError(f"{path}: no {what}")
            if file.attrs["version"] != version:
                raise CheckpointError(
                    f"{path}: {what} of version {file.attrs['version']}, this program"
                    f" reads {version}"
                )
            require_stored(file)
            yield file
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None
    except Exception as error:
        # the content may be anything, so h5py and numpy may raise anything
        raise CheckpointError(f"{path}: corrupt: {reason(error)}") from error


def require_stored(file: h5py.File) -> None:
    """Raise unless all that a file declares stands in it, as we write it.

    So that nothing is allocated for what is only declared: a dataset may say that it is
    a terabyte long and take no byte; links may lead to other files, or in a circle.

    Raises:
        ValueError: one line that names what is stored otherwise.
    """

    def look(name: str, link: Any) -> None:
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{name} is a link")
        item = file[name]
        if not isinstance(item, h5py.Dataset):
            return
        creation = item.id.get_create_plist()
        is_elsewhere = item.is_virtual or creation.get_external_count() > 0
        if is_elsewhere or item.nbytes > item.id.get_storage_size():
            raise ValueError(f"{name} is not stored as it is declared")

    file.visititems_links(look)


class _Sink:
    """The bytes under an HDF5 file, written by us and not by the HDF5 library.

    HDF5 cannot recover from a failed write: it raises late, in flush or close, or ends
    the process with a segmentation fault (seen with HDF5 2.0.0 on a full tmpfs). So it
    never sees one: the first failure is kept in `error`, later writes are dropped.

    What is long, and lies at a page in memory and in the file, goes past the page cache
    where the file system can do that: the kernel's copy takes most of a writer's CPU
    time (benchmarks/bench_checkpoint_cpu.py).

    It has the methods that h5py's driver "fileobj" calls.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self.direct: int | None = None  # the same file, past the page cache
        self.can_direct = hasattr(os, "O_DIRECT")
        self.position = 0
        self.error: OSError | None = None
        self.path = path

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *exception: Any) -> None:
        os.close(self.descriptor)
        if self.direct is not None:
            os.close(self.direct)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            self.position = offset
        else:
            self.position = os.lseek(self.descriptor, offset, whence)
        return self.position

    def tell(self) -> int:
        return self.position

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                done = self._write_direct(data)
                if done < memoryview(data).nbytes:
                    rest = memoryview(data).cast("B")[done:] if done else data
                    write_fully(self.descriptor, rest, self.position + done)
            except OSError as error:
                self.error = OSError(error.errno, error.strerror, str(self.path))
        size = memoryview(data).nbytes
        self.position += size
        return size

    def _write_direct(self, data: Any) -> int:
        """Write what can go past the page cache; return how many bytes that was.

        Raises:
            OSError: it could not be written.
        """
        view = memoryview(data)
        size = view.nbytes // PAGE_BYTES * PAGE_BYTES
        if not self.can_direct or size < DIRECT_BYTES or self.position % PAGE_BYTES:
            return 0
        if np.frombuffer(view, np.uint8).ctypes.data % PAGE_BYTES:
            return 0
        try:
            if self.direct is None:
                self.direct = os.open(self.path, os.O_WRONLY | os.O_DIRECT)
            return os.pwrite(self.direct, view.cast("B")[:size], self.position)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.can_direct = False  # tmpfs and some others
            return 0

    def read(self, size: int = -1) -> bytes:
        data = os.pread(self.descriptor, size, self.position)
        self.position += len(data)
        return data

    def readinto(self, data: Any) -> int:
        size = os.preadv(self.descriptor, [data], self.position)
        self.position += size
        return size

    def truncate(self, size: int | None = None) -> int:
        size = self.position if size is None else size
        if self.error is None:
            try:
                os.ftruncate(self.descriptor, size)
            except OSError as error:
                self.error = OSError(error.errno, error.strerror, str(self.path))
        return size

    def flush(self) -> None:
        """Do nothing: nothing is buffered here."""
