"""What the terminal cannot show and what in a path is no UTF-8: nothing ends for it."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest

from mpilm.cli import main
from mpilm.config import read_config, resolve
from mpilm.data.frames import FrameCorpus
from mpilm.data.kaldi_export import write_scores
from mpilm.data.text import prepare_text
from mpilm.speech.plan import SplitConfig
from mpilm.speech.prepare import prepare_wav
from mpilm.train.loop import Trainer
from mpilm.world.mpi.abort import save_traceback
from mpilm.world.virtual import run_virtual

from .tones import write_words

STRANGE = os.fsdecode(b"caf\xe9")  # in the file system's bytes, no UTF-8


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return the folder of a short run; in a path with a byte that is no UTF-8."""
    folder = tmp_path_factory.mktemp("encodings") / STRANGE
    folder.mkdir()
    text = folder / "text"
    text.write_text("na\u00efve \u20ac \u8a9e \u8a9e the cat\n" * 300, encoding="utf-8")
    prepare_text(text, None, None, folder / "c.h5")
    document = {
        "data": {"corpus": str(folder / "c.h5")},
        "model": {"embed": 8, "hidden": 8},
        "train": {"batch": 4, "unroll": 5, "samples": 400, "test": False},
    }
    run = folder / f"run-{STRANGE}"
    run_virtual(lambda world: Trainer(resolve(document), world, run).train(), 1)
    return run


@pytest.fixture(params=["ascii", "latin-1", "utf-8"])
def terminal(request, monkeypatch):
    """Return a function that returns what mpilm prints on a terminal."""

    def printed(*words: str | Path) -> str:
        screen = io.TextIOWrapper(io.BytesIO(), encoding=request.param)
        monkeypatch.setattr(sys, "stdout", screen)
        assert main([*map(str, words)]) == 0
        screen.flush()
        return screen.buffer.getvalue().decode(request.param)

    printed.encoding = request.param
    return printed


def test_words_that_the_terminal_lacks_are_escaped(trained, terminal) -> None:
    said = terminal("generate", trained, "--tokens", "60")
    shown = "\u8a9e \u20ac".encode(terminal.encoding, "backslashreplace")
    for word in shown.decode(terminal.encoding).split():
        assert word in said


@pytest.mark.long
def test_commands_survive_a_strange_path(trained, terminal) -> None:
    folder = trained.parent
    escaped = f"{folder.parent}/caf\\udce9"
    said = terminal("export", trained, "--out", folder / "m.safetensors")
    assert f"{escaped}/m.safetensors: " in said
    page, trace = folder / "r.html", folder / "trace.json"
    said = terminal("report", trained, "--out", page, "--trace", trace)
    assert f"{escaped}/r.html: 1 run" in said
    assert "run-caf\\udce9" in page.read_text(encoding="utf-8")
    assert json.loads(trace.read_text())["traceEvents"]
    text = folder / "text"
    said = terminal("prepare", "text", "--train", text, "--out", folder / "2.h5")
    assert f"{escaped}/2.h5: vocabulary of" in said


def test_a_strange_path_stays_in_the_configuration(trained: Path) -> None:
    config = read_config(trained / "config.toml")
    assert config.data.corpus == str(trained.parent / "c.h5")
    assert Path(config.data.corpus).exists()
    assert config.encoded() == (trained / "config.toml").read_bytes()


def test_a_traceback_is_kept_whatever_it_says(tmp_path: Path) -> None:
    save_traceback(3, ValueError(f"{STRANGE} \u8a9e"), tmp_path)
    text = (tmp_path / "traceback-rank-0003.txt").read_text(encoding="utf-8")
    assert "ValueError: caf\\udce9 \u8a9e" in text


def test_recordings_in_strange_places(tmp_path: Path) -> None:
    folder = write_words(tmp_path / STRANGE, 6)
    odd = (folder / "low_ann_0.wav").rename(folder / f"low_{STRANGE}_0.wav")
    listed = tmp_path / "listed"
    listed.mkdir()
    place = os.fsencode(folder / "low_ann_1.wav")
    (listed / "wav.scp").write_bytes(b"u " + place + b"\n")
    (listed / "text").write_text("u low\n")
    out = tmp_path / f"{STRANGE}.h5"
    splits = SplitConfig((folder, listed), valid_share=0.0)
    summary = prepare_wav(out, splits, num_states=3, rounds=1, skip_bad=True)
    assert summary.frames.utterances == {"train": 18}
    (problem,) = summary.problems
    assert problem == f"recording {odd.name}: its name is not UTF-8"

    archive = tmp_path / f"{STRANGE}.ark"
    with FrameCorpus.open(out) as corpus:
        split = corpus.split("train")
        write_scores(lambda features_TF: features_TF, split, archive, corpus.counts)
        lines = archive.with_suffix(".scp").read_bytes().splitlines()
        assert [line.rpartition(b":")[0] for line in lines] == [
            f"{name} ".encode() + os.fsencode(archive) for name in split.names
        ]
