"""Signals at every moment: nothing half-written, one line, and a run that goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpilm.config import tomllib
from mpilm.data.kaldi_prepare import prepare_kaldi
from mpilm.data.synthetic import prepare_synthetic
from mpilm.storage.checkpoint import complete_checkpoints
from mpilm.storage.state_file import read_state

from .kaldi_files import make_folder
from .signalled import Ended, Warm
from .tones import write_words

pytestmark = pytest.mark.long
INT, TERM, USR1, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
CODES = {INT: (130, "mpilm: interrupted\n"), TERM: (143, "mpilm: terminated\n")}
CODES[HUP] = CODES[TERM]
TINY = """\
[data]
corpus = "{corpus}"
[model]
embed = 4
hidden = 4
[train]
samples = 1500
batch = 4
unroll = 5
valid_every = 500
worst_rank = false
[checkpoint]
every = 500
"""
DNN = """\
[data]
corpus = "{corpus}"
[model]
name = "dnn"
hidden = 8
layers = 2
context = 1
[train]
batch = 8
[pretrain]
batch = 8
"""
SWEEP = """\
config = "{place}/train.toml"
run = "protocol"
ranks = [2]
options = ["--steps", "5"]
[vary]
"strategy.name" = ["allreduce", "bmuf"]
"""
SPEECH = """\
[data]
corpus = "{place}/speech.h5"
[model]
name = "lstm_am"
hidden = 8
layers = 1
bottleneck = 4
[train]
samples = 2000
batch = 4
unroll = 20
"""
GOES_ON = ": stopped; the same command goes on\n"  # of a sweep

LOOP = "mpilm.train.loop:Trainer"
PHASES = {
    "start": (f"{LOOP}.set_up", 1),
    "training": (f"{LOOP}.refresh_lr", 30),
    "vote": ("mpilm.train.signals:Agreement._start", 5),
    "validation": (f"{LOOP}.judge", 1),
    "checkpoint": (f"{LOOP}.save", 1),
    "between checkpoint and last validation": (f"{LOOP}.validate", 3),
    "last evaluation": (f"{LOOP}.conclude", 1),
    "close": ("mpilm.world.mpi.world:MpiWorld.close", 1),
}
SIGNALS = {"SIGTERM": [TERM], "SIGINT": [INT], "SIGUSR1": [USR1], "twice": [TERM, TERM]}
SIGNALS["second SIGINT"] = [INT, INT]
# `make soak` takes all of them, and `plan` below
CASES = [
    ("start", "SIGTERM"),
    ("vote", "SIGUSR1"),
    ("validation", "twice"),
    ("checkpoint", "second SIGINT"),
    ("last evaluation", "SIGINT"),
]
NAMES = ["synthetic", "text", "export", "report", "pretrain"]
# what they write holds times, so that no two runs write the same bytes
TIMED = ["protocol"]
IS_WHOLE = "MPILM_MINUTES" in os.environ
if IS_WHOLE:
    CASES = [(phase, name) for phase in PHASES for name in SIGNALS]
    NAMES += ["plan", "wav", "decode", "align"]
    TIMED += ["simulate", "sweep"]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """Return what runs commands."""
    with Warm() as process:
        yield process


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> Path:
    """Return a folder: texts, a corpus, train.toml, and a whole run of it."""
    folder = tmp_path_factory.mktemp("signalled")
    draw = random.Random(1)
    for split in ("train", "valid", "test"):
        lines = (" ".join(draw.choices("abcdefgh", k=9)) for _ in range(400))
        (folder / f"{split}.txt").write_text("\n".join(lines))
    corpus = folder / "corpus.h5"
    prepare_synthetic(corpus, vocab=20, tokens=4000, seed=1, branching=4)
    (folder / "train.toml").write_text(TINY.format(corpus=corpus))
    words = ["train", folder / "train.toml", "--out", folder / "run"]
    assert warm.run(words, folder).code == 0
    of = make_folder(folder / "frames", 0)
    prepare_kaldi(
        {"train": of},
        folder / "frames.h5",
        alignments=[of / "pdf.txt"],
        num_classes=6,
        shares={"valid": 0.3},
    )
    dnn = DNN.format(corpus=folder / "frames.h5")
    (folder / "dnn.toml").write_text(dnn)
    (folder / "sweep.toml").write_text(SWEEP.format(place=folder))
    if IS_WHOLE:
        write_words(folder / "wav", 12, ("ann", "bob"))
        (folder / "speech.toml").write_text(SPEECH.format(place=folder))
        words = commands(folder, folder)["wav"]
        assert warm.run(words, folder).code == 0
        (folder / "c.h5").rename(folder / "speech.h5")
        words = ["train", folder / "speech.toml", "--out", folder / "speech"]
        assert warm.run(words, folder).code == 0
    return folder


def commands(place: Path, out: Path) -> dict[str, list[object]]:
    """Return commands that write into `out`."""
    texts = [
        w for s in ("train", "valid", "test") for w in (f"--{s}", place / f"{s}.txt")
    ]
    return {
        "synthetic": [
            *("prepare", "synthetic", "--out", out / "c.h5"),
            *("--vocab", 30, "--tokens", 20_000),
        ],
        "text": ["prepare", "text", *texts, "--out", out / "c.h5"],
        "export": ["export", place / "run", "--out", out / "m.safetensors"],
        "report": ["report", place / "run", "--out", out / "r.html"],
        "pretrain": ["pretrain", place / "dnn.toml", "--out", out / "first.h5"],
        "simulate": [
            *("simulate", place / "train.toml", "--out", out / "s"),
            *("--ranks", "2", "--steps", 3),
        ],
        "protocol": [
            *("simulate", place / "train.toml", "--out", out / "s"),
            *("--protocol-only", "--ranks", "2,3,4,5", "--strategies", "bmuf,adpsgd"),
        ],
        "sweep": ["sweep", place / "sweep.toml", "--out", out / "s"],
        "wav": [
            *("prepare", "wav", "--train", place / "wav", "--out", out / "c.h5"),
            *("--test-names", "_[01]$", "--states", 3, "--rounds", 2),
        ],
        "decode": ["decode", out / "speech", "--out", out / "words.txt"],
        "align": ["align", place / "speech", "--out", out / "c.h5"],
        "plan": [
            *("plan", place / "train.toml", "--ranks", 2, "--out", out / "p.toml"),
            "--throughput",
        ],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path: Path) -> bytes:
    """Return what a file holds; safetensors puts its header in any order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True)
    return header.encode() + data[end:]


def begin(place: Path, out: Path, name: str) -> list[object]:
    """Return a command, and make the folder that it is to write into."""
    out.mkdir()
    if name == "decode":  # it writes into the run, too
        shutil.copytree(place / "speech", out / "speech")
    return commands(place, out)[name]


@dataclass(frozen=True)
class Moment:
    """Signals at an event, or after some CPU seconds."""

    numbers: tuple[int, ...]
    event: int = 0
    seconds: float = 0.0

    @property
    def when(self) -> dict[str, Any]:
        """The arguments of `Warm.run`."""
        return {"numbers": self.numbers, "event": self.event, "seconds": self.seconds}


def moments(whole: Ended) -> list[Moment]:
    """Return when a command that ends like `whole` is signalled, and how."""
    most, shares = (6, (0.2, 0.5, 0.8)) if IS_WHOLE else (3, (0.3, 0.8))
    events = range(1, 1 + min(most, whole.events))
    places = [{"event": n} for n in events]
    places += [{"seconds": share * whole.seconds} for share in shares]
    signals = [(INT,), (TERM,), (HUP,)]
    if IS_WHOLE:
        return [Moment(s, **p) for p in places for s in (*signals, (TERM, TERM))]
    found = [Moment(signals[n % 3], **p) for n, p in enumerate(places)]
    return [*found, Moment((TERM, TERM), event=min(2, whole.events))]


def assert_ended(ended: Ended, moment: Moment) -> None:
    """Assert the exit code of a signal, and one line."""
    code, line = CODES[moment.numbers[0]]
    assert ended.code == code, (moment, ended)
    assert ended.said.endswith((line, GOES_ON)), (moment, ended)
    assert "Traceback" not in ended.said, (moment, ended)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_leaves_its_files_whole_or_none(
    warm: Warm, place: Path, tmp_path: Path, name: str
) -> None:
    """At each of its first changes of files, and in between; each signal in turn."""
    out = tmp_path / "whole"
    before = begin(place, out, name)
    there = contents(out).keys()
    whole = warm.run(before, out)
    assert whole.code == 0, whole
    want = contents(out)
    assert want.keys() > there
    ended_early, all_moments = 0, moments(whole)
    for index, moment in enumerate(all_moments):
        out = tmp_path / f"{index}"
        ended = warm.run(begin(place, out, name), out, **moment.when)
        have = contents(out)
        shutil.rmtree(out)
        if ended.code == 0:  # it was over already, or nearly
            assert have == want
            continue
        ended_early += 1
        assert_ended(ended, moment)
        assert have.items() <= want.items(), (moment, list(have))
    assert ended_early >= len(all_moments) // 2


@pytest.mark.parametrize("name", TIMED)
def test_a_command_leaves_files_that_can_be_read_and_goes_on(
    warm: Warm, place: Path, tmp_path: Path, name: str
) -> None:
    """What it wrote holds times: each file is read, none is left over."""
    out = tmp_path / "whole"
    whole = warm.run(begin(place, out, name), out)
    assert whole.code == 0, whole
    want = contents(out).keys()
    for index, moment in enumerate(moments(whole)):
        out = tmp_path / f"{index}"
        ended = warm.run(begin(place, out, name), out, **moment.when)
        if ended.code:
            assert_ended(ended, moment)
        have = contents(out)
        assert {file.partition("/checkpoints/")[0] for file in have} <= {
            file.partition("/checkpoints/")[0] for file in want
        }
        for file in have:
            read(out / file)
        assert warm.run(commands(place, out)[name], out).code == 0, (moment, ended)
        assert contents(out).keys() >= want, moment
        shutil.rmtree(out)


def read(path: Path) -> None:
    """Read a file by its kind; an error means that it is not whole."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".toml":
        tomllib.loads(path.read_text())
    elif path.suffix == ".h5":
        h5py.File(path).close()
    else:
        assert path.suffix in (".log", ".csv", ".html"), path


@pytest.mark.parametrize(("phase", "name"), CASES)
def test_training_stops_or_ends_and_goes_on_to_the_same_bits(
    warm: Warm, place: Path, tmp_path: Path, phase: str, name: str
) -> None:
    run = tmp_path / "run"
    words = ["train", place / "train.toml", "--out", run]
    ended = warm.run(words, run, numbers=SIGNALS[name], call=PHASES[phase])
    assert "Traceback" not in ended.said, ended
    late = phase in ("last evaluation", "close") or phase.startswith("between")
    if name == "second SIGINT":
        assert ended.code == 130, ended
        assert ended.said == "mpilm: interrupted\n"
    else:
        assert ended.code == (0 if late else 75), ended
        assert ended.said == ""
    if complete_checkpoints(run / "checkpoints"):
        assert warm.run(["resume", run], run).code == 0
    else:
        assert name == "second SIGINT"
        assert warm.run([*words, "--resume"], run).code == 0
    states = []
    for folder in (run, place / "run"):
        newest = complete_checkpoints(folder / "checkpoints")[0]
        states.append(read_state(newest / "rank-0000.h5"))
    for key, value in states[1].items():
        if not key.startswith("totals/"):
            assert np.array_equal(states[0][key], value), key
