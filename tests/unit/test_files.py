"""Files that are there as a whole or not at all, and inputs that no output destroys."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import h5py
import kaldiio
import numpy as np
import pytest

from mpilm.cli import main
from mpilm.errors import DataError
from mpilm.storage.files import (
    DIRECT_BYTES,
    PAGE_BYTES,
    at_a_page,
    create_hdf5,
    new_file,
    new_output,
    replace_file,
    require_apart,
)

from .kaldi_files import make_folder
from .tones import write_words


def test_a_block_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as partial:
        partial.write_text("new")
        raise KeyboardInterrupt
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["f"])
    replace_file(path, b"new")
    assert (path.read_text(), os.listdir(tmp_path)) == ("new", ["f"])


def test_a_link_stays_and_the_file_that_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to("far/file")
    for text in ("one", "two"):
        replace_file(link, text.encode())
        assert link.is_symlink()
        assert (tmp_path / "far/file").read_text() == text


def test_what_is_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, why in (
        (tmp_path, "Is a directory"),
        (pipe, "is no regular file"),
        (Path("/dev/null"), "is no regular file"),
    ):
        failure = pytest.raises(DataError, match=f"{path} cannot be written: {why}")
        with failure, new_output(path):
            pytest.fail("the work began")
        with pytest.raises(DataError, match=f"{path} is (a folder|no regular file)"):
            require_apart([path])
    assert Path("/dev/null").is_char_device()


def names_of(path: Path) -> list[Path]:
    """Return other names of a file: links, soft and hard, and a way around."""
    soft, hard = path.with_name("soft"), path.with_name("hard")
    soft.symlink_to(path.name)
    hard.hardlink_to(path)
    return [path, soft, hard, path.parent / "sub" / ".." / path.name]


def test_every_name_of_an_input_is_that_input(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "f"
    path.write_text("precious")
    other = tmp_path / "g"
    other.write_text("")
    for name in names_of(path):
        for given in ([name], [other, name]):
            with pytest.raises(DataError, match=r"is read.*, and would be written"):
                require_apart(given, [path])
        with pytest.raises(DataError, match="would be one file to write"):
            require_apart([path, name])
    require_apart([other, tmp_path / "new"], [path, tmp_path / "new"])
    with pytest.raises(DataError, match="would be one file to write"):
        require_apart([tmp_path / "new", tmp_path / "sub" / ".." / "new"])


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(folder: Path, capsys, command: str, *words: str) -> None:
    """Check that a command says one line and changes nothing."""
    before = contents(folder)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words or ("would be written",):
        assert word in error
    assert contents(folder) == before


def test_prepare_text_keeps_its_sources(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text("one two three\n" * 100)
    (tmp_path / "link").symlink_to("text/b")
    text = f"prepare text --train {folder}/a"
    refused(tmp_path, capsys, f"{text} --out {folder}/a")
    refused(tmp_path, capsys, f"{text} --valid {folder}/b --out {tmp_path}/link")
    refused(tmp_path, capsys, f"prepare text --train {folder} --out {folder}/c")
    refused(tmp_path, capsys, f"{text} --out {folder}", "is a folder")
    out = tmp_path / "c.h5"
    for _ in range(2):  # an older output is no input
        assert main(f"{text} --out {out}".split()) == 0


def test_prepare_kaldi_keeps_lists_archives_and_alignments(tmp_path, capsys) -> None:
    folder = make_folder(tmp_path / "train")
    stats = {f"s{i}": np.ones((2, 5)) for i in range(3)}
    kaldiio.save_ark(f"{folder}/cmvn.ark", stats, scp=f"{folder}/cmvn.scp")
    (tmp_path / "hard").hardlink_to(folder / "feats.ark")
    command = f"prepare kaldi --train {folder} --ali {folder}/pdf.scp --out"
    for name in (
        *("train/feats.scp", "train/feats.ark", "hard", "train/utt2spk", "train/text"),
        *("train/pdf.scp", "train/pdf.ark", "train/cmvn.scp", "train/cmvn.ark"),
    ):
        refused(tmp_path, capsys, f"{command} {tmp_path}/{name}")


def test_prepare_wav_keeps_recordings_and_lists(tmp_path: Path, capsys) -> None:
    folder = write_words(tmp_path / "wav", 4)
    command = "prepare wav --states 3 --rounds 1 --train"
    refused(tmp_path, capsys, f"{command} {folder} --out {folder}/low_ann_0.wav")
    listed = tmp_path / "listed"
    listed.mkdir()
    for name, rest in (("wav.scp", f"{folder}/low_ann_0.wav"), ("text", "low")):
        (listed / name).write_text(f"u {rest}\n")
    for name in ("wav/low_ann_0.wav", "listed/wav.scp", "listed/text"):
        refused(tmp_path, capsys, f"{command} {listed} --out {tmp_path}/{name}")


def saved(path, array):
    """Return what is read back of an array that is written with a short one beside."""
    with create_hdf5(path) as file:
        file.create_dataset("short", data=np.arange(3))
        file.create_dataset("long", data=array)
        file.attrs["after"] = 7
    with h5py.File(path, "r") as file:
        assert file["short"][:].tolist() == [0, 1, 2]
        assert file.attrs["after"] == 7
        return file["long"][:]


@pytest.mark.parametrize("extra", [0, 1, 1023, 1024])
@pytest.mark.parametrize("error", [None, "open", "write"])
def test_long_arrays_go_past_the_page_cache_where_they_can(
    tmp_path, monkeypatch, extra, error
):
    """The same bytes are in the file, also where the file system has no such way."""
    array = at_a_page(np.empty(DIRECT_BYTES + extra, np.float32))
    array[:] = np.random.default_rng(1).standard_normal(len(array), np.float32)
    opened, real_open, real_write = [], os.open, os.pwrite

    def open_(path, flags, *rest):
        is_direct = flags & os.O_DIRECT
        if is_direct and error == "open":
            raise OSError(errno.EINVAL, "no")
        found = real_open(path, flags & ~os.O_DIRECT, *rest)
        if is_direct:
            opened.append(found)
        return found

    def write(descriptor, data, offset):
        if descriptor in opened:
            size = memoryview(data).nbytes
            assert not size % PAGE_BYTES and not offset % PAGE_BYTES
            if error == "write":
                raise OSError(errno.EINVAL, "no")
            size = min(size, DIRECT_BYTES)  # a part only
            return real_write(descriptor, memoryview(data)[:size], offset)
        return real_write(descriptor, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", write)
    assert np.array_equal(saved(tmp_path / "x.h5", array), array)
    assert bool(opened) == (error != "open")
    others = np.empty(len(array) + 1, np.float32)[1:]  # at no page
    others[:] = array
    assert np.array_equal(saved(tmp_path / "y.h5", others), array)


def test_a_disk_that_is_full_past_the_page_cache_too(tmp_path, monkeypatch):
    array, real = at_a_page(np.zeros(DIRECT_BYTES, np.uint8)), os.pwrite

    def write(descriptor, data, offset):
        if memoryview(data).nbytes >= DIRECT_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path / "x.h5", array)
