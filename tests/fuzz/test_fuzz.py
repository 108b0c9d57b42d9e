"""Damaged files: a clear line, never a crash, a hang, or memory for what is not there.

`make soak` reads 10,000 of them; here are some of each kind, and what they have found.
"""

from __future__ import annotations

import struct
import tracemalloc

import h5py
import pytest

from mpilm.data.kaldi_archives import Archives
from mpilm.data.wav import WavReader, list_recordings
from mpilm.errors import MpilmError
from tests.fuzz.readers import READERS, make_log, sweep
from tests.unit.kaldi_files import make_folder


@pytest.mark.long
@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_read_or_refused(kind):
    counts, faults = sweep(kind, range(12))
    assert not faults
    assert counts["read"] + counts["refused"] == 12
    assert counts["refused"] > 0


@pytest.mark.parametrize("kind", ["corpus", "frames", "checkpoint", "log"])
@pytest.mark.parametrize("how", ["declared", "circle", "elsewhere"])
def test_what_is_not_stored_is_refused(tmp_path, kind, how):
    """A dataset that takes no byte of the file, a link in a circle, another file."""
    make, read = READERS[kind]
    path = make(tmp_path)[0]
    name = {"log": "rows", "checkpoint": "state/lr"}.get(kind, "splits/train")
    with h5py.File(path, "r+") as file:
        del file[name]
        if how == "declared":
            file.create_dataset(name, (10**12,), "u2")
        elif how == "circle":
            file[name] = h5py.SoftLink(f"/{name}")
        else:
            file[name] = h5py.ExternalLink(make_log(tmp_path / "..")[0], "rows")
    tracemalloc.start()
    with pytest.raises(MpilmError, match=path.name):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        b"FM \4" + struct.pack("<ibi", 40_000, 4, 40_000),
        b"DV \4" + struct.pack("<i", 2**31 - 1),
        b"CM " + struct.pack("<ffii", 0.0, 1.0, 40_000, 40_000),
        b"CM2 " + struct.pack("<ffii", 0.0, 1.0, -1, 3),
        b"\4" + struct.pack("<i", 2**31 - 1),
    ],
)
def test_kaldi_declares_more_than_is_there(tmp_path, header):
    (tmp_path / "x.ark").write_bytes(b"\0B" + header + bytes(100))
    tracemalloc.start()
    with pytest.raises(MpilmError, match=r"x\.ark: no whole matrix or vector at byte"):
        Archives().read("x.ark:0", tmp_path / "x.scp")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("compression", [None, 1, 2, 3, 5])
def test_what_kaldi_writes_is_read(tmp_path, compression):
    folder = make_folder(tmp_path / "k", compression=compression)
    place = (folder / "feats.scp").read_text().split()[1]
    assert Archives().read(place, folder / "feats.scp").shape == (31, 4)


def test_a_null_byte_in_a_path(tmp_path):
    with pytest.raises(MpilmError, match="null byte"):
        Archives().read("x\0y.ark:0", tmp_path / "x.scp")
    (tmp_path / "wav.scp").write_bytes(b"one o\0e.wav\n")
    (tmp_path / "text").write_bytes(b"one one\n")
    with pytest.raises(MpilmError, match="recording one: "):
        for recording in list_recordings(tmp_path):
            WavReader().read(recording)
