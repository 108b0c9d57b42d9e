"""From wav to words with the commands of docs/digits.md, under mpirun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpilm.data.frames import FrameCorpus
from tests.unit.tones import write_wav, write_words

from .conftest import mpirun

SETTINGS = {
    "model": 'name = "lstm_am"\nhidden = 24\nlayers = 1\ncontext = 2',
    "optim": 'name = "adamw"\nlr = 0.02\nclip = 1.0',
    "strategy": 'name = "model_averaging"\nperiod = 5',
    "train": "samples = 16_000\nbatch = 4\nunroll = 20",
}


@pytest.mark.slow
def test_from_wav_to_words(tmp_path: Path) -> None:
    folder = write_words(tmp_path / "wav", 12, ("ann", "bob"))
    write_wav(folder / "low_ann_99.wav", b"")
    corpus, run, again = (tmp_path / name for name in ("c.h5", "run", "2.h5"))
    prepare = ("prepare", "wav", "--train", folder, "--out", corpus)
    options = ("--test-names", "_[01]$", "--strings", "2-4", "--train-strings", 20)
    sizes = ("--num-strings", 8, "--states", 3, "--silence-states", 1, "--rounds", 2)

    mpirun(2, *prepare, *options, *sizes).refused(
        "recording low_ann_99: has no samples"
    )
    assert not corpus.exists()
    prepared = mpirun(2, *prepare, *options, *sizes, "--skip-bad")
    assert prepared.code == 0, prepared
    assert prepared.out.count(f"{corpus}: 40 features, 10 classes, 3 words") == 1
    assert "left out: 1" in prepared.out

    sections = {"data": f'corpus = "{corpus}"', **SETTINGS}
    config = tmp_path / "c.toml"
    config.write_text("".join(f"[{k}]\n{v}\n" for k, v in sections.items()))
    trained = mpirun(2, "train", config, "--out", run)
    assert trained.code == 0, trained

    splits = ("--split", "test", "--split", "strings", "--tune", "valid-strings")
    words = tmp_path / "words.txt"
    decoded = mpirun(2, "decode", run, *splits, "--out", words)
    assert decoded.code == 0, decoded
    assert decoded.out.count("strings WER") == 2  # valid-strings, strings
    figures = json.loads((run / "decode.json").read_text())
    assert [f["split"] for f in figures] == ["valid-strings", "test", "strings"]
    assert figures[2]["wer"] < 0.2
    assert len(words.read_text().splitlines()) == 2 * 2 * 3 + 8
    alone = mpirun(0, "decode", run, *splits)
    assert alone.out == decoded.out
    assert json.loads((run / "decode.json").read_text()) == figures

    aligned = mpirun(2, "align", run, "--out", again)
    assert aligned.code == 0, aligned
    with FrameCorpus.open(corpus) as old, FrameCorpus.open(again) as new:
        assert old.splits == new.splits
        assert old.split("train").names == new.split("train").names

    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for command, out in (("align", corpus), ("decode", run / "decode.json")):
        mpirun(0, command, run, "--out", out).refused(str(out), "name another")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    nowhere = mpirun(0, "decode", run, "--split", "no")
    nowhere.refused("has no split 'no'; it has train, valid, test, strings")
    mpirun(0, "decode", tmp_path / "other").refused("no run here")
