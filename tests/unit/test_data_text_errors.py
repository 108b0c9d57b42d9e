"""prepare text: bad input is one line that names the file, and nothing is written."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from mpilm.data import sources
from mpilm.data.hdf5 import SPLITS, Corpus
from mpilm.data.text import prepare_text
from mpilm.errors import DataError


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises(DataError) as error:
        prepare_text(*arguments, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_with_too_many_or_too_few_files_of_a_split(tmp_path: Path) -> None:
    folder, out = tmp_path / "wikitext", tmp_path / "c.h5"
    folder.mkdir()
    (folder / "wiki.test.tokens").write_text("a\n")
    (folder / "wiki.training.tokens").write_text("a\n")
    assert "none for train" in refused(folder, None, None, out)
    (folder / "ptb.test.txt").write_text("a\n")
    assert "several test files" in refused(folder, None, None, out)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    out, missing, empty = tmp_path / "c.h5", tmp_path / "no.txt", tmp_path / "e.txt"
    empty.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    good = tmp_path / "good.txt"
    good.write_text("a\n")
    assert refused(missing, None, None, out) == f"{missing}: no such file or folder"
    assert refused(good, missing, good, out) == f"{missing}: no such file or folder"
    assert refused(empty, None, None, out) == f"{empty} is empty"
    assert refused(good, good, empty, out) == f"{empty} is empty"
    assert "no files in this folder" in refused(folder, good, good, out)
    assert "too small" in refused(good, None, None, out)
    assert not out.exists()


def test_text_without_words_is_refused(tmp_path: Path) -> None:
    blank, out = tmp_path / "blank.txt", tmp_path / "c.h5"
    blank.write_text(" \n\n \n")
    assert refused(blank, blank, blank, out) == f"{blank}: the train text has no words"


@pytest.mark.parametrize("where", SPLITS)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("bytes_", [b"\xff", b"\xe2\x82", b"\xc3"])
def test_a_byte_that_is_not_utf8_is_named_with_its_place(
    tmp_path: Path,
    where: str,
    block: int,
    bytes_: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    good = "caf\u00e9\n\u20ac x\n".encode()
    for name in SPLITS:
        bad = b"ab" + bytes_ + b" c\n" if name == where else b""
        (tmp_path / name).write_bytes(good + bad + good)
    paths = [tmp_path / name for name in SPLITS]
    message = refused(*paths, tmp_path / "c.h5")
    offset = len(good) + 2
    bad_file = tmp_path / where
    assert message == f"{bad_file} is not UTF-8 text: byte {offset}, line 3"
    assert not (tmp_path / "c.h5").exists()


def test_a_character_cut_off_by_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("a\n\u20ac".encode()[:-1])
    message = refused(path, path, path, tmp_path / "c.h5")
    assert message == f"{path} is not UTF-8 text: byte 2, line 2"


def test_utf16_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("hello\n" * 10, encoding="utf-16")
    assert "byte 0, line 1" in refused(path, path, path, tmp_path / "c.h5")


def test_endless_words_are_not_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 100)
    monkeypatch.setattr(sources, "LONGEST_WORD_BYTES", 1000)
    path = tmp_path / "t.txt"
    path.write_bytes(bytes(5000))
    message = refused(path, path, path, tmp_path / "c.h5")
    assert message.startswith(f"{path} is not text")


def test_options_out_of_range(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a b c\n" * 10)
    out = tmp_path / "c.h5"
    assert "vocab: 2" in refused(path, path, path, out, vocab=2)
    assert "level: 'byte'" in refused(path, path, path, out, level="byte")
    assert "share: 0.5" in refused(path, None, None, out, share=0.5)


def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a b c d\n" * 10)

    def change(done: int, total: int) -> None:
        path.write_text("a b \u00e9d\n" * 10)

    out = tmp_path / "c.h5"
    message = refused(path, path, path, out, level="char", progress=change)
    assert message == f"{path} changed while it was read"
    assert not out.exists()


def test_words_are_read_once_so_that_a_later_change_does_not_matter(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / f"{name}.txt" for name in ("train", "valid", "test")]
    for path in paths:
        path.write_text("a b c d\n" * 10)

    def change(done: int, total: int) -> None:
        if 2 * done >= total:
            paths[0].write_text("a b c  \n" * 10)

    out = tmp_path / "c.h5"
    summary = prepare_text(*paths, out, progress=change)
    assert paths[0].read_text().startswith("a b c  ")
    assert summary.tokens == {"train": 50, "valid": 50, "test": 50}
    with Corpus.open(out) as corpus:
        (digest,) = (s["sha256"] for s in corpus.provenance["sources"][:1])
    assert digest == hashlib.sha256(b"a b c d\n" * 10).hexdigest()


def test_no_room_for_the_numbers_is_one_line(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a b c d\n" * 10)

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mpilm.data.text.TemporaryFile", full)
    message = refused(path, path, path, tmp_path / "c.h5")
    assert message == (
        f"{tmp_path / 'c.h5'} cannot be written: {os.strerror(errno.ENOSPC)}"
    )
