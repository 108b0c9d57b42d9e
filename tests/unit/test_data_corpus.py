"""The corpus file: what opens, what does not and why; whole or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpilm.data.hdf5 import Corpus, CorpusWriter, new_hdf5
from mpilm.data.text import prepare_text
from mpilm.errors import DataError

WORDS = ["<eos>", "<unk>", "the", "na\u00efve", "\U0001f600"]


def write(path: Path, words: list[str] = WORDS) -> Path:
    with new_hdf5(path) as file:
        writer = CorpusWriter(file, level="word", vocabulary=words)
        writer.append("train", np.array([2, 3, 1, 0, 2], np.uint32))
        writer.append("train", np.array([4, 0], np.uint32))
        writer.append("valid", np.array([1, 0], np.uint32))
        writer.append("test", np.array([1, 1, 1, 0], np.uint32))
        writer.finish(path, {"command": "test"})
    return path


def refused(path: Path) -> str:
    """Return the one-line message with which opening `path` fails."""
    with pytest.raises(DataError) as error:
        Corpus.open(path)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with Corpus.open(write(tmp_path / "c.h5")) as corpus:
        assert corpus.kind == "text"
        assert corpus.level == "word"
        assert corpus.floor is None
        assert corpus.vocabulary == WORDS
        assert corpus.ids["the"] == 2
        assert corpus.splits == ("train", "valid", "test")
        assert corpus.split("train")[:].tolist() == [2, 3, 1, 0, 2, 4, 0]
        assert corpus.split("train").dtype == np.uint16
        assert corpus.counts.tolist() == [2, 1, 2, 1, 1]
        assert corpus.provenance["command"] == "test"
        assert corpus.provenance["unknown"] == {
            "train": 1 / 7,
            "valid": 1 / 2,
            "test": 3 / 4,
        }


def test_ids_are_32_bits_wide_where_16_do_not_hold_them(tmp_path: Path) -> None:
    for num_words, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        path = tmp_path / f"{num_words}.h5"
        words = [f"w{i}" for i in range(num_words)]
        with new_hdf5(path) as file:
            writer = CorpusWriter(file, level="word", vocabulary=words)
            writer.append("train", np.array([0, num_words - 1], np.uint32))
            writer.finish(path, {})
        with Corpus.open(path) as corpus:
            assert corpus.split("train").dtype == dtype
            assert corpus.split("train")[1] == num_words - 1


def test_equal_vocabularies_have_equal_fingerprints_and_others_do_not(
    tmp_path: Path,
) -> None:
    def fingerprint(words: list[str]) -> str:
        with Corpus.open(write(tmp_path / "c.h5", words)) as corpus:
            return corpus.fingerprint

    same = fingerprint(list(WORDS))
    assert same == fingerprint(list(WORDS))
    swapped = [WORDS[1], WORDS[0], *WORDS[2:]]
    split_elsewhere = ["<eos>", "<unk>", "th", "ena\u00efve", "\U0001f600"]
    assert len({same, fingerprint(swapped), fingerprint(split_elsewhere)}) == 3


def test_an_unknown_split_is_named_with_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "c.h5")
    with Corpus.open(path) as corpus, pytest.raises(DataError) as error:
        corpus.split("dev")
    assert str(error.value) == f"{path} has no split 'dev'; it has train, valid, test"


def test_a_missing_an_empty_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "empty.h5").touch()
    assert "no such file" in refused(tmp_path / "missing.h5")
    assert "is empty" in refused(tmp_path / "empty.h5")
    assert "is a folder" in refused(tmp_path)


def test_a_text_file_is_not_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "text.h5"
    path.write_text("the cat\n" * 1000)
    assert "is not an HDF5 file" in refused(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_corpus_is_refused(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "c.h5")
    os.truncate(path, int(path.stat().st_size * share))
    assert "is truncated" in refused(path)


def test_a_foreign_hdf5_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.h5"
    with h5py.File(path, "w") as file:
        file["splits/train"] = np.zeros(10, np.uint16)
    assert "not a corpus of mpilm" in refused(path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.h5")
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 99
    assert "format 99" in refused(path)


@pytest.mark.parametrize("name", ["vocabulary/bytes", "provenance", "splits"])
def test_a_corpus_that_lost_a_part_is_damaged(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "c.h5")
    with h5py.File(path, "a") as file:
        del file[name]
    assert "damaged" in refused(path)


def test_a_changed_vocabulary_does_not_match_its_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "c.h5")
    with h5py.File(path, "a") as file:
        file["vocabulary/bytes"][7] = ord("x")
    assert "fingerprint" in refused(path)


def test_tokens_of_another_type_are_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "c.h5")
    with h5py.File(path, "a") as file:
        del file["splits/valid"]
        file["splits/valid"] = np.zeros(5, np.float32)
    assert "split valid holds no token ids" in refused(path)


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt."""


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = write(tmp_path / "c.h5")
    before = path.read_bytes()
    with pytest.raises(Interrupted), new_hdf5(path) as file:
        file["x"] = np.zeros(100_000)
        raise Interrupted
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.h5"]


@pytest.mark.long
def test_a_killed_prepare_leaves_the_old_corpus_whole(tmp_path: Path) -> None:
    """SIGKILL in the middle of the encoding pass."""
    path = write(tmp_path / "c.h5")
    before = path.read_bytes()
    text = tmp_path / "train.txt"
    text.write_text("a b c d\n" * 500_000)
    code = (
        "import os, sys\n"
        "from mpilm.data.text import prepare_text\n"
        "def progress(done, total):\n"
        "    if done > 0.8 * total: os.kill(os.getpid(), 9)\n"
        "prepare_text(sys.argv[1], None, None, sys.argv[2], progress=progress)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(text), str(path)], check=False, timeout=60
    )
    assert done.returncode == -9
    assert path.read_bytes() == before


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail half-way."""
    text = tmp_path / "train.txt"
    text.write_text("a b c d\n" * 500_000)
    out = tmp_path / "out" / "c.h5"
    code = (
        "import resource, signal, sys\n"
        "from mpilm.data.text import prepare_text\n"
        "from mpilm.errors import DataError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    prepare_text(sys.argv[1], None, None, sys.argv[2])\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(text), str(out)],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(f"{out} cannot be written: ")
    assert done.stdout.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) in ([text.name], ["out", text.name])
    assert not out.parent.exists() or os.listdir(out.parent) == []


def test_an_output_in_an_impossible_place_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "train.txt"
    text.write_text("a b c d\n" * 100)
    for out in (text / "c.h5", Path("/proc/c.h5")):
        with pytest.raises(DataError, match="cannot be written") as error:
            prepare_text(text, None, None, out)
        assert str(out) in str(error.value)
