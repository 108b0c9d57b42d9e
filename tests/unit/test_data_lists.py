"""Lists: one idea of a line, a separator and a byte order mark, for all readers."""

from __future__ import annotations

from pathlib import Path

import kaldiio
import numpy as np
import pytest

from mpilm.config import read_config
from mpilm.data import lists, sources
from mpilm.data.frames import FrameCorpus
from mpilm.data.hdf5 import Corpus
from mpilm.data.kaldi_archives import Bad
from mpilm.data.kaldi_prepare import prepare_kaldi
from mpilm.data.lists import read_list
from mpilm.data.text import prepare_text
from mpilm.data.wav import list_recordings
from mpilm.errors import DataError

from .kaldi_files import make_folder, utterances
from .tones import tone, write_wav

BOM = b"\xef\xbb\xbf"


def found(path: Path, content: bytes, **options) -> list[tuple[str, str]]:
    path.write_bytes(content)
    return list(read_list(path, **options))


@pytest.mark.parametrize("between", [b" ", b"\t", b" \t  "])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \t\n", b"\t\r\n"])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_all_ways_to_write_a_list_are_one_list(tmp_path, between, end, mark) -> None:
    lines = [(b"u1", b"one  two"), (b"u2", b""), (b"u3", b"three")]
    content = mark + b"".join(between.join(line) + end for line in lines)
    expected = [("u1", "one  two"), ("u2", ""), ("u3", "three")]
    assert found(tmp_path / "l", content) == expected
    assert found(tmp_path / "l", content.removesuffix(end)) == expected
    assert found(tmp_path / "l", content + b"\n \n") == expected


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    text = "eins\u2028zwei\u0085drei\x0bvier\x1cf\u00fcnf\u00a0half"
    assert found(tmp_path / "l", f"u {text}\n".encode()) == [("u", text)]
    assert lists.split_words("a\u2028b \u00a0c\x0bd") == ["a\u2028b", "\u00a0c", "d"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"u 1\nv 2\nu 3\n", "l, line 3: u is there twice"),
        (b"u 1\n\nv 2\n", "l: line 2 is blank"),
        (b"u 1\nv \xff\n", "l: not UTF-8 text: byte 6, line 2"),
        (b"u 1\nv\xff 2\n", "l: not UTF-8 text: byte 5, line 2"),
        (BOM + b"\xff 2\n", "l: not UTF-8 text: byte 3, line 1"),
        (b"u" * 300, "l: is no list: a line of 256 bytes"),
    ],
)
def test_a_bad_list_is_one_line(tmp_path, monkeypatch, content, words) -> None:
    monkeypatch.setattr(lists, "LONGEST_LINE_BYTES", 256)
    with pytest.raises(DataError) as error:
        found(tmp_path / "l", content)
    assert str(error.value) == f"{tmp_path}/{words}"


def test_paths_may_have_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    content = b"u caf\xe9/x.wav\n"
    assert found(tmp_path / "l", content, of_paths=True) == [("u", "caf\udce9/x.wav")]


# corpora


def rewritten(folder: Path, change) -> None:
    for name in ("feats.scp", "utt2spk", "text", "pdf.scp", "pdf.txt", "cmvn.scp"):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))


CHANGES = {
    "tabs": lambda raw: raw.replace(b" ", b"\t"),
    "blanks": lambda raw: raw.replace(b" ", b" \t "),
    "windows": lambda raw: BOM + raw.replace(b"\n", b"\r\n"),
    "no last newline": lambda raw: raw.removesuffix(b"\n"),
}


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("alignment", ["pdf.scp", "pdf.txt"])
def test_kaldi_folders_give_equal_corpora(tmp_path, change, alignment) -> None:
    folder = make_folder(tmp_path / "train")
    stats = {f"s{i}": np.full((2, 5), 10.0 + i) for i in range(3)}
    kaldiio.save_ark(f"{folder}/cmvn.ark", stats, scp=f"{folder}/cmvn.scp")
    outs = [tmp_path / "1.h5", tmp_path / "2.h5"]
    for out in outs:
        prepare_kaldi({"train": folder}, out, alignments=[folder / alignment])
        rewritten(folder, CHANGES[change])
    assert outs[0].read_bytes() == outs[1].read_bytes()


@pytest.mark.parametrize("change", CHANGES)
def test_recordings_are_listed_equally(tmp_path: Path, change: str) -> None:
    write_wav(tmp_path / "one.wav", tone("low", 1))
    texts = {
        "wav.scp": "u1 one.wav\nu2 one.wav\n",
        "text": "u1 low high\nu2 low\u2028high\u00a0low\n",
        "utt2spk": "u1 ann\nu2 bob\n",
    }
    recordings = []
    for rewrite in (bytes, CHANGES[change]):
        for name, text in texts.items():
            (tmp_path / name).write_bytes(rewrite(text.encode()))
        recordings.append(list_recordings(tmp_path))
    assert recordings[0] == recordings[1]
    words = [recording.words for recording in recordings[0]]
    assert words == [("low", "high"), ("low\u2028high\u00a0low",)]


@pytest.mark.parametrize(
    "name", ["feats.scp", "utt2spk", "text", "pdf.scp", "cmvn.scp"]
)
def test_a_key_that_is_there_twice_is_named(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "train")
    stats = {f"s{i}": np.full((2, 5), 10.0) for i in range(3)}
    kaldiio.save_ark(f"{folder}/cmvn.ark", stats, scp=f"{folder}/cmvn.scp")
    path = folder / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1]]))
    with pytest.raises(DataError) as error:
        out = tmp_path / "c.h5"
        prepare_kaldi({"train": folder}, out, alignments=[folder / "pdf.scp"])
    key = lines[1].split()[0]
    line = f"{path}, line {len(lines) + 1}: {key} is there twice"
    assert str(error.value) == line
    assert not out.exists()


def test_an_utterance_with_two_alignments_is_named(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "train"), tmp_path / "c.h5"
    text = (folder / "pdf.txt").read_text()
    ark = (folder / "pdf.ark").read_bytes()
    first = text.splitlines(keepends=True)[0]
    (folder / "twice.txt").write_text(text + first)
    (folder / "twice.ark").write_bytes(ark + ark)
    (folder / "other.scp").write_text(f"s0-u00 {folder / 'pdf.ark'}:7\n")
    where = {
        ("twice.txt",): "twice.txt, line 13",
        ("twice.ark",): f"twice.ark, byte {len(ark) + 7}",
        ("pdf.ark", "pdf.txt"): "pdf.txt, line 1",
        ("pdf.txt", "other.scp"): "other.scp, line 1",
    }
    for names, place in where.items():
        paths = [folder / name for name in names]
        with pytest.raises(DataError) as error:
            prepare_kaldi({"train": folder}, out, alignments=paths, cmvn="none")
        line = str(error.value)
        known = f"utterance s0-u00: {folder}/{place}: s0-u00 is there twice"
        first = "" if len(names) == 1 else f", first in {paths[0]}"
        assert line == known + first
    bad = Bad(skip=True)
    paths = [folder / "twice.txt"]
    prepare_kaldi({"train": folder}, out, alignments=paths, cmvn="none", bad=bad)
    assert list(bad.lines) == ["s0-u00"]
    with FrameCorpus.open(out) as corpus:
        names = [name for name, *_ in utterances() if name != "s0-u00"]
        assert corpus.split("train").names == names


def test_a_byte_order_mark_is_dropped_at_any_block_size(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1)
    path = tmp_path / "t.txt"
    path.write_bytes(BOM + b"a b\n")
    prepare_text(path, path, path, tmp_path / "c.h5")
    with Corpus.open(tmp_path / "c.h5") as corpus:
        assert sorted(corpus.vocabulary) == ["<eos>", "<unk>", "a", "b"]


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(BOM + b"[train]\r\nseed = 7\r\n")
    assert read_config(path).train.seed == 7
