"""Signals at every moment: nothing half-written, one line, and a run that goes on."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mpilm.data.synthetic import prepare_synthetic
from mpilm.storage.checkpoint import complete_checkpoints
from mpilm.storage.state_file import read_state

from .signalled import Warm

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
NAMES = ["synthetic", "text", "export", "report"]
if "MPILM_MINUTES" in os.environ:
    CASES = [(phase, name) for phase in PHASES for name in SIGNALS]
    NAMES.append("plan")


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
        "plan": [
            *("plan", place / "train.toml", "--ranks", 2, "--out", out / "p.toml"),
            "--throughput",
        ],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", NAMES)
def test_a_command_leaves_its_files_whole_or_none(
    warm: Warm, place: Path, tmp_path: Path, name: str
) -> None:
    """At each of its first changes of files, and in between; each signal in turn."""
    out = tmp_path / "whole"
    out.mkdir()
    whole = warm.run(commands(place, out)[name], out)
    assert whole.code == 0, whole
    want = contents(out)
    assert want
    moments = [{"event": number + 1} for number in range(min(4, whole.events))]
    moments += [{"seconds": share * whole.seconds} for share in (0.3, 0.8)]
    ended_early = 0
    for index, moment in enumerate(moments):
        number = (INT, TERM, HUP)[index % 3]
        out = tmp_path / f"{index}"
        out.mkdir()
        ended = warm.run(commands(place, out)[name], out, numbers=[number], **moment)
        have = contents(out)
        if ended.code == 0:  # it was over already, or nearly
            assert have == want
            continue
        ended_early += 1
        code, line = CODES[number]
        assert ended.code == code, (moment, ended)
        assert ended.said.endswith(line), (moment, ended)
        assert "Traceback" not in ended.said, (moment, ended)
        assert have.items() <= want.items(), (moment, number.name, list(have))
    assert ended_early >= len(moments) // 2


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
