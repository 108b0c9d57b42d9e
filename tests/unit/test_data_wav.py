"""Wav files: every header that a program writes gives the same samples."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from mpilm.data.wav import Recording, WavReader
from mpilm.errors import DataError

RATE = 8000
SAMPLES = np.array([0, 1, -1, 255, -256, 32767, -32768], np.int16)
PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")
FLOAT_GUID = b"\3" + PCM_GUID[1:]
LIST = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"


def chunk(name: bytes, content: bytes, length: int | None = None) -> bytes:
    size = len(content) if length is None else length
    return name + struct.pack("<I", size) + content + bytes(len(content) % 2)


def form(tag: int = 1, *, bits: int = 16, block: int = 2, more: bytes = b"") -> bytes:
    values = (tag, 1, RATE, RATE * block, block, bits)
    return chunk(b"fmt ", struct.pack("<HHIIHH", *values) + more)


def extensible(guid: bytes = PCM_GUID, **options: int) -> bytes:
    return form(0xFFFE, more=struct.pack("<HHI", 22, 16, 4) + guid, **options)


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def read(folder: Path, content: bytes) -> list[float]:
    path = folder / "x.wav"
    path.write_bytes(content)
    return WavReader().read(Recording("x", path, "", ("w",))).tolist()


RAW = SAMPLES.tobytes()
DATA = chunk(b"data", RAW)
HEADERS = {
    "plain": riff(form(), DATA),
    "format of 18 bytes": riff(form(more=b"\0\0"), DATA),
    "extensible": riff(extensible(), DATA),
    "other chunks": riff(LIST, form(), chunk(b"fact", b"abcd"), DATA, LIST),
    "the last chunk without its pad byte": riff(form(), DATA, LIST)[:-1],
    "longer than its own size": riff(form(), DATA, size=20) + b"more",
    "ffmpeg into a pipe": riff(form(), chunk(b"data", RAW, 2**32 - 1), size=2**32 - 1),
    "SoX into a pipe": riff(
        form(), chunk(b"data", RAW, 0x7FFFF000), size=0x7FFFF000 + 36
    ),
    "arecord into a pipe": riff(form(), chunk(b"data", RAW, 2**31), size=2**31 + 36),
    "2^31 - 1": riff(form(), chunk(b"data", RAW, 2**31 - 1), size=2**31 - 1),
    "all sizes 0": riff(form(), chunk(b"data", RAW, 0), size=0),
    "never finished": riff(form(), chunk(b"data", RAW, 0), size=36),
    "extensible into a pipe": riff(extensible(), chunk(b"data", RAW, 2**32 - 1)),
    "broken off in a sample": riff(form(), chunk(b"data", RAW, 2**32 - 1)) + b"\7",
}


@pytest.mark.parametrize("header", HEADERS)
def test_every_header_gives_the_same_samples(tmp_path: Path, header: str) -> None:
    assert read(tmp_path, HEADERS[header]) == SAMPLES.tolist()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("placeholder", [None, 0, 0x7FFFF000, 2**32 - 1])
@pytest.mark.parametrize("head", [form, extensible])
def test_every_width(tmp_path: Path, width: int, placeholder, head) -> None:
    levels = [-32768, -256, 0, 256, 32512]
    if width == 1:
        raw = bytes(level // 256 + 128 for level in levels)
    else:
        wide = [level << 8 * (width - 2) for level in levels]
        raw = b"".join(x.to_bytes(width, "little", signed=True) for x in wide)
    file = riff(
        head(bits=8 * width, block=width),
        chunk(b"data", raw, placeholder),
        size=None if placeholder is None else placeholder,
    )
    if placeholder is not None:
        file = file[: len(file) - len(raw) % 2]  # a pad byte would be a sample
    assert read(tmp_path, file) == levels


BAD = {
    "no samples": (riff(form(), chunk(b"data", b"")), "has no samples"),
    "none, and more follows": (riff(form(), chunk(b"data", b""), LIST), "no samples"),
    "none in a pipe": (riff(form(), chunk(b"data", b"", 2**32 - 1)), "no samples"),
    "no data": (riff(form(), LIST), "has no samples"),
    "no format": (riff(DATA, form()), "no format before the samples"),
    "a short format": (riff(chunk(b"fmt ", b"12"), DATA), "a format of 2 bytes"),
    "truncated": (riff(form(), DATA)[:-3], "is truncated: 5 of 7 samples"),
    "cut in a chunk": (riff(LIST, form())[:15], "is truncated"),
    "a chunk longer than the file": (riff(chunk(b"abcd", b"", 99)), "is truncated"),
    "float": (riff(form(3, bits=32, block=4), DATA), "floating point"),
    "float, extensible": (riff(extensible(FLOAT_GUID), DATA), "floating point"),
    "mu-law": (riff(form(7, bits=8, block=1), DATA), "mu-law"),
    "another format": (riff(form(85), DATA), "format 85"),
    "strange format": (riff(extensible(b"?" * 16), DATA), "format 65534"),
    "24 bits in 32": (riff(form(bits=24, block=4), DATA), "24 bits in blocks of 4"),
    "64 bits": (riff(form(bits=64, block=8), DATA), "samples of 64 bits"),
    "0 bits": (riff(form(bits=0, block=0), DATA), "0 bits"),
    "RIFX": (b"RIFX" + riff(form(), DATA)[4:], "not a wav file of linear PCM"),
    "not WAVE": (riff(form(), DATA).replace(b"WAVE", b"AVI "), "not a wav file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_one_line(tmp_path: Path, kind: str) -> None:
    content, words = BAD[kind]
    with pytest.raises(DataError) as error:
        read(tmp_path, content)
    line = str(error.value)
    assert line.startswith("recording x: ")
    assert line.endswith(f" ({tmp_path / 'x.wav'})")
    assert words in line
    assert "\n" not in line


def test_no_file_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.wav")
    with pytest.raises(DataError, match="recording x: is no file"):
        WavReader().read(Recording("x", tmp_path / "x.wav", "", ("w",)))


def test_a_size_is_not_believed(tmp_path: Path) -> None:
    """2 GB of samples in a file of 60 bytes: no memory is asked for."""
    content = riff(form(), chunk(b"data", RAW, 0x7FFE0000))
    with pytest.raises(DataError, match="is truncated: 7 of 1073676288 samples"):
        read(tmp_path, content)
