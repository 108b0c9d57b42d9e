"""Files damaged at random, by seed: bytes, numbers in text, objects of HDF5 files."""

from __future__ import annotations

import random
import re
from pathlib import Path

import h5py
import numpy as np

NUMBER = re.compile(rb"-?\d+(\.\d+)?(e-?\d+)?")
ODD_NUMBERS = [
    b"0",
    b"-1",
    b"1e400",
    b"nan",
    b"99999999999999999999",
    b"1.5",
    b"",
    b"[]",
]
ODD_TEXT = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\n\n",
    b'"',
    b"]",
    b"|",
    b"../",
    b"\\",
]
SIZES = [
    0,
    1,
    2,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
]
SHAPES = [(), (0,), (1,), (3,), (2, 2), (7, 1), (10**12,), (2**40, 2), (10**6, 10**6)]
VALUES = [b"0", b"-1", b"1e308", b"nan", b"inf", b"true", b"1979-05-27", b"[]", b"{}"]
VALUES += [
    b'""',
    b'"x"',
    b'"../../x"',
    b"[[]]",
    b"{a = {b = 1}}",
    b"0.5",
    b"3",
    b"[1, 2]",
]
VALUES += [b"9223372036854775807", b"1_000", b'"\\u0000"', b"{ 0 = nan }", b"07:32:00"]
TYPES = ["u1", "i2", "u2", "i4", "<i8", ">i8", "f2", "f4", "f8", "S3", "c8", "O", "?"]


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Return bytes with one to four things wrong with them."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        damage_(draw, found)
    return bytes(found)


def damage_(draw: random.Random, found: bytearray) -> None:
    """Do one thing wrong."""
    size = len(found)
    at, length = draw.randrange(size + 1), draw.choice([1, 1, 2, 4, 8, 64, 500])
    kind = draw.choice(
        ["flip", "set", "cut", "drop", "twice", "number", "text", "size"]
    )
    if kind == "flip" and at < size:
        found[at] ^= 1 << draw.randrange(8)
    elif kind == "set" and at < size:
        found[at] = draw.choice([0, 0x20, 0x7F, 0x80, 0xFF])
    elif kind == "cut":
        del found[at:]
    elif kind == "drop":
        del found[at : at + length]
    elif kind == "twice":
        found[at:at] = found[at : at + length]
    elif kind == "text":
        found[at:at] = draw.choice(ODD_TEXT)
    elif kind == "size":
        width = draw.choice([2, 4, 8])
        number = draw.choice(SIZES) % 2 ** (8 * width)
        found[at : at + width] = number.to_bytes(width, draw.choice(["little", "big"]))
    elif numbers := list(NUMBER.finditer(found[:20_000])):
        where = draw.choice(numbers)
        found[where.start() : where.end()] = draw.choice(ODD_NUMBERS)


def other_value(draw: random.Random, data: bytes) -> bytes:
    """Return TOML in which one setting has another value, or another name."""
    lines = data.splitlines(keepends=True)
    at = draw.choice([n for n, line in enumerate(lines) if b"=" in line])
    key = lines[at].partition(b"=")[0]
    other = draw.choice([b"model", b'""', b"seed", b"name", b"slow.0", key])
    lines[at] = (
        draw.choice([key, key, key, other]) + b"= " + draw.choice(VALUES) + b"\n"
    )
    return b"".join(lines)


def damage_hdf5_(draw: random.Random, path: Path) -> None:
    """Put an object of another shape or type, or none, in the place of one.

    Datasets of a terabyte are declared, not written: the file stays small.
    """
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(draw.choice([1, 1, 2])):
            name = draw.choice(names)
            if name not in file:
                continue
            owner = draw.choice([file, file[name]])
            if owner.attrs and draw.random() < 0.4:
                key = draw.choice(sorted(owner.attrs))
                value = draw.choice([None, -1, 2**62, 0.5, "", "x\0y", b"\xff", [1, 2]])
                del owner.attrs[key]
                if value is not None:
                    owner.attrs[key] = value
                continue
            old = file[name]
            is_data = isinstance(old, h5py.Dataset)
            kind = draw.choice(["drop", "data", "link", "group", "values"])
            if kind == "values" and is_data and old.size and old.dtype.kind in "iuf":
                values = old[...].reshape(-1)
                with np.errstate(all="ignore"):
                    odd = np.array(draw.choice([-1, 0, 2**31, 2**62, 1e30]))
                    values[draw.randrange(values.size)] = odd.astype(values.dtype)
                old[...] = values.reshape(old.shape)
                continue
            attrs = dict(old.attrs)
            del file[name]
            if kind == "data":
                dtype, shape = draw.choice(TYPES), draw.choice(SHAPES)
                dtype = h5py.string_dtype() if dtype == "O" else dtype
                file.create_dataset(name, shape, dtype).attrs.update(attrs)
            elif kind == "link":
                place = draw.choice([h5py.SoftLink("/"), h5py.SoftLink(f"/{name}")])
                outside = h5py.ExternalLink("/dev/zero", "/x")
                file[name] = draw.choice([place, outside])
            elif kind == "group":
                file.create_group(name)
