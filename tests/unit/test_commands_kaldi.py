"""`mpilm prepare kaldi` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpilm.cli import main
from mpilm.data.frames import FrameCorpus
from tests.unit.kaldi_files import make_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "train")


def command(folder: Path, *more: object) -> int:
    words = ["prepare", "kaldi", "--train", folder, "--ali", folder / "pdf.ark"]
    return main([str(word) for word in [*words, *more]])


def test_it_says_what_it_wrote(folder, capsys):
    out = folder.parent / "c.h5"
    options = ("--norm-vars", "--context", 3, "--valid-share", 0.4, "--classes", 8)
    assert command(folder, "--out", out, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: 4 features, 8 classes"
    assert len(lines) == 3
    with FrameCorpus.open(out) as corpus:
        assert corpus.context == 3
        assert corpus.provenance["variance"] is True
        for line, split in zip(lines[1:], ("train", "valid"), strict=True):
            utterances = corpus.split(split)
            assert line.split()[:2] == [split, str(len(utterances))]
            assert "100.00% of them with a label" in line


def test_bad_utterances_stop_it_or_are_shown(folder, capsys):
    text = (folder / "pdf.txt").read_text().replace("s1-u01 ", "s1-u01 0 0 ")
    (folder / "pdf.txt").write_text(text)
    options = ("--ali", folder / "pdf.txt", "--out", folder.parent / "c.h5")
    assert command(folder, *options) == 2
    error = capsys.readouterr().err
    bad = "utterance s1-u01: alignment of 14 frames is longer than the features (12)"
    assert error == f"mpilm: {bad}\n"
    assert command(folder, *options, "--skip-bad") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["  1 bad utterances left out:", f"    {bad}"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", "-1"], "--context -1: must be 0 or more"),
        (["--valid-share", "1"], "--valid-share 1.0: must be in [0, 1)"),
        (["--classes", "0"], "--classes 0: must be 1 or more"),
        (["--valid", "nowhere"], "nowhere/feats.scp: No such file"),
    ],
)
def test_bad_options_are_one_line(folder, capsys, options, words):
    assert command(folder, "--out", folder.parent / "c.h5", *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_there_must_be_a_folder(tmp_path, capsys):
    assert main(["prepare", "kaldi", "--out", str(tmp_path / "c.h5")]) == 2
    assert "at least one of --train, --valid and --test" in capsys.readouterr().err
