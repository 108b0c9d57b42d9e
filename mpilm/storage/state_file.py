"""A flat state dict in one HDF5 file: bit-exact, checked, unable to run code.

A state dict maps names "a/b/c" to numpy arrays, int, float, str, bytes or bool.

    /                attributes: format, version, num_entries, and a header of integers
    /state/a/b/c     one contiguous dataset per entry; attributes
                       type    array, int, bigint, float, str, bytes or bool
                       crc32   of name, type, element type, shape and content

Arrays keep shape, element type and byte order. An int of more than 64 bits is stored
as little-endian two's complement (bigint), a str as UTF-8; both, like bytes, as uint8.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpilm.errors import CheckpointError
from mpilm.storage.files import create_hdf5, open_hdf5

State = dict[str, Any]

FORMAT = "mpilm checkpoint file"
VERSION = 1
PART_BYTES = 4 << 20  # some milliseconds of a disk; chosen, not tuned


def write_state(path: Path, state: Mapping[str, Any], **header: int) -> None:
    """Write `state` into a new file, and force it to the disk.

    Nothing in `state` may change meanwhile. Contiguous arrays are not copied.

    Raises:
        CheckpointError: a name or value that cannot be stored.
        OSError: the file could not be written.
    """
    _check_names(state)
    with create_hdf5(path) as file:
        file.attrs["format"] = np.bytes_(FORMAT)
        file.attrs["version"] = VERSION
        file.attrs["num_entries"] = len(state)
        file.attrs.update(header)
        group = file.create_group("state")
        for name, value in state.items():
            kind, array = _encode(name, value)
            dataset = _write(group, name, array)
            dataset.attrs["type"] = np.bytes_(kind)
            dataset.attrs["crc32"] = _checksum(name, kind, array)


def _write(group: h5py.Group, name: str, array: np.ndarray) -> h5py.Dataset:
    """Return a new dataset with the array in it.

    A long one is written in parts: h5py lets one thread at a time in, and the others
    may want their next minibatch.
    """
    if array.nbytes <= PART_BYTES:
        return group.create_dataset(name, data=array)
    dataset = group.create_dataset(name, array.shape, array.dtype, fill_time="never")
    num_rows = max(1, PART_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), num_rows):
        dataset[start : start + num_rows] = array[start : start + num_rows]
    return dataset


def read_state(path: Path) -> State:
    """Return the state in a file, every entry checked.

    Raises:
        CheckpointError: one line with the path: missing, truncated, corrupt, foreign.
    """
    with open_hdf5(path, FORMAT, VERSION) as file:
        return dict(_entries(file))


def check_state(path: Path) -> None:
    """Read a file as `read_state` does, but keep only one entry at a time.

    Raises:
        CheckpointError: as `read_state`.
    """
    with open_hdf5(path, FORMAT, VERSION) as file:
        for _ in _entries(file):
            pass


def read_header(path: Path) -> dict[str, int]:
    """Return the header of a file; its entries are not looked at.

    Raises:
        CheckpointError: missing, truncated, foreign.
    """
    with open_hdf5(path, FORMAT, VERSION) as file:
        fixed = ("format", "version", "num_entries")
        return {k: int(v) for k, v in file.attrs.items() if k not in fixed}


def _entries(file: h5py.File) -> Iterator[tuple[str, Any]]:
    """Yield every entry, or raise for the first that is not as it was written."""
    datasets: list[tuple[str, h5py.Dataset]] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            datasets.append((name, item))

    file["state"].visititems(visit)  # follows no soft or external links
    expected = int(file.attrs["num_entries"])
    if len(datasets) != expected:
        raise ValueError(f"{len(datasets)} entries of {expected}")
    for name, dataset in datasets:
        yield name, _entry(name, dataset)


def _entry(name: str, dataset: h5py.Dataset) -> Any:
    creation = dataset.id.get_create_plist()
    if (
        dataset.shape is None
        or not _is_storable(dataset.dtype)
        or creation.get_layout() != h5py.h5d.CONTIGUOUS
        or creation.get_external_count()
        or dataset.id.get_storage_size() != dataset.nbytes
    ):
        raise ValueError(f"{name} is stored as mpilm never does")
    array = np.empty(dataset.shape, dataset.dtype)
    if array.size:
        dataset.read_direct(array)
    kind = dataset.attrs["type"].decode()
    if _checksum(name, kind, array) != int(dataset.attrs["crc32"]):
        raise ValueError(f"{name} does not match its checksum")
    return _decode(kind, array)


def _check_names(state: Mapping[str, Any]) -> None:
    for name in state:
        parts = name.split("/")
        if not name.isprintable() or not all(part.strip(".") for part in parts):
            raise CheckpointError(f"state entry {name!r}: no name for a dataset")
        for stop in range(1, len(parts)):
            parent = "/".join(parts[:stop])
            if parent in state:
                raise CheckpointError(
                    f"state entry {parent!r}: also a part of {name!r}"
                )


def _is_storable(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8 and dtype.metadata is None


def _encode(name: str, value: Any) -> tuple[str, np.ndarray]:
    """Return type and array that stand for `value` in a file."""
    if isinstance(value, bool):
        return "bool", np.array(value)
    if isinstance(value, int):
        if -(2**63) <= value < 2**63:
            return "int", np.array(value, np.int64)
        num_bytes = value.bit_length() // 8 + 1
        return "bigint", _bytes(value.to_bytes(num_bytes, "little", signed=True))
    if isinstance(value, float):
        return "float", np.array(value, np.float64)
    if isinstance(value, str):
        return "str", _bytes(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return "bytes", _bytes(value)
    if isinstance(value, (np.ndarray, np.generic)) and _is_storable(value.dtype):
        return "array", np.asarray(value, order="C")
    what = getattr(value, "dtype", None) or type(value).__name__
    raise CheckpointError(f"state entry {name!r}: {what} cannot be stored")


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _decode(kind: str, array: np.ndarray) -> Any:
    """Return what `_encode` was given."""
    if kind == "array":
        return array
    if kind == "bigint":
        return int.from_bytes(array.tobytes(), "little", signed=True)
    if kind == "str":
        return array.tobytes().decode("utf-8", "surrogatepass")
    if kind == "bytes":
        return array.tobytes()
    scalars: dict[str, type] = {"bool": bool, "int": int, "float": float}
    return scalars[kind](array[()])


def _checksum(name: str, kind: str, array: np.ndarray) -> int:
    about = f"{name}\0{kind}\0{array.dtype.str}\0{array.shape}"
    content = array.reshape(-1).view(np.uint8).data
    return zlib.crc32(content, zlib.crc32(about.encode()))
