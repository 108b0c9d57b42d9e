"""Wav files of linear PCM, chunk by chunk.

    "RIFF" size "WAVE", then chunks: name, size, content, a byte if size is odd

Format   in the chunk "fmt ": 1 (PCM), or 0xFFFE (extensible) with the sub-format PCM
Samples  in the chunk "data". A program that writes into a pipe cannot know their size
         beforehand, and leaves 0 or a number near 2^31 or 2^32 in its place (ffmpeg,
         SoX, arecord): they go on to the end of the file then.

The standard library's wave does not know such sizes, nor the extensible format before
Python 3.12. No size is believed: what is read is never more than the file has.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mpilm.errors import DataError

PCM, EXTENSIBLE = 1, 0xFFFE
FORMATS = {3: "floating point", 6: "A-law", 7: "mu-law"}
# the sub-format of the extensible format: its first 2 bytes are a format as above
GUID_END = bytes.fromhex("000000001000800000aa00389b71")
# Sizes from here on stand for "not known" where the file is shorter: 2^31 - 4096 is
# SoX's; less header than 64 kB. No recording is so long.
LEAST_PLACEHOLDER = 0x7FFF0000


@dataclass(frozen=True)
class Pcm:
    """What a wav file holds.

    rate      samples/s
    channels  their number
    width     bytes of a sample: 1 without a sign, more with one, little-endian
    raw       whole samples of all channels, channel after channel
    """

    rate: int
    channels: int
    width: int
    raw: bytes

    @property
    def num_samples(self) -> int:
        """Samples of one channel."""
        return len(self.raw) // (self.channels * self.width)


def read_pcm(path: Path) -> Pcm:
    """Return the samples of a wav file.

    Raises:
        DataError: what is wrong with it, without its name: not a wav file of linear
            PCM, empty, truncated, without samples.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise DataError("is no file" if path.exists() else "no such file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise DataError("an empty file")
        name, riff_size = _header(file)
        if name != b"RIFF" or _exactly(file, 4) != b"WAVE":
            raise _not_pcm("no RIFF")
        about: tuple[int, int, int] | None = None
        while file.tell() < size:
            name, length = _header(file)
            here = file.tell()
            if name == b"data":
                if about is None:
                    raise _not_pcm("no format before the samples")
                return _pcm(file, about, _length(length, here, riff_size, size), size)
            if name == b"fmt ":
                about = _format(file, length)
            file.seek(here + length + length % 2)
        raise DataError("has no samples" if file.tell() == size else "is truncated")


def _length(length: int, begin: int, riff_size: int, size: int) -> int:
    """Return the bytes of the samples that begin at `begin`, in a file of `size`."""
    if length == 0:
        # really none, if the header as a whole knows how long it is, and other chunks
        # follow; else there was nothing to see yet when it was written
        end = 8 + riff_size
        return 0 if begin < end <= size else size - begin
    if length >= LEAST_PLACEHOLDER:
        return min(length, size - begin)
    return length


def _pcm(file: BinaryIO, about: tuple[int, int, int], length: int, size: int) -> Pcm:
    rate, channels, width = about
    there = min(length, size - file.tell())
    num, promised = (n // (channels * width) for n in (there, length))
    if num < promised:
        raise DataError(f"is truncated: {num} of {promised} samples")
    if not num:
        raise DataError("has no samples")
    return Pcm(rate, channels, width, _exactly(file, num * channels * width))


def _format(file: BinaryIO, length: int) -> tuple[int, int, int]:
    """Return samples/s, channels and bytes of a sample."""
    if length < 16:
        raise _not_pcm(f"a format of {length} bytes")
    raw = _exactly(file, min(length, 40))
    tag, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", raw)
    if tag == EXTENSIBLE and len(raw) == 40 and raw[26:] == GUID_END:
        (tag,) = struct.unpack_from("<H", raw, 24)
    if tag != PCM:
        raise _not_pcm(FORMATS.get(tag, f"format {tag}"))
    width = (bits + 7) // 8
    if not (rate and channels and width):
        raise _not_pcm(f"{rate} samples/s, {channels} channels, {bits} bits")
    if block not in (0, channels * width):
        raise _not_pcm(f"{bits} bits in blocks of {block} bytes")
    return rate, channels, width


def _header(file: BinaryIO) -> tuple[bytes, int]:
    """Return name and size of the chunk that begins here."""
    name, length = struct.unpack("<4sI", _exactly(file, 8))
    return name, length


def _exactly(file: BinaryIO, num_bytes: int) -> bytes:
    raw = file.read(num_bytes)
    if len(raw) < num_bytes:
        raise DataError("is truncated")
    return raw


def _not_pcm(why: str) -> DataError:
    return DataError(f"not a wav file of linear PCM ({why})")
