"""Run folders under mpirun: two starts in one, kills at bad moments."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import (
    TINY_SAMPLES,
    TINY_STEPS,
    Running,
    first_checkpoint,
    mpirun,
    training_state,
    wait_for,
)
from .test_bad_input import contents

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STOPPED_EARLY = 75
NO_TORCH = "raise RuntimeError('torch is loaded')"


def test_the_second_start_is_refused_and_the_first_goes_on(
    inputs: Path, tmp_path: Path
) -> None:
    train = ("train", inputs / "tiny.toml", "--out", tmp_path / "x")
    seen = []

    def start_again(running: Running) -> None:
        first_checkpoint(tmp_path / "x")
        rank_0 = f"pid {running.ranks[0]} on {os.uname().nodename}"
        os.kill(running.pid, signal.SIGSTOP)  # mpirun; the ranks are stopped as well
        for rank in running.ranks:
            os.kill(rank, signal.SIGSTOP)
        before = contents(tmp_path / "x")
        for options in ((), ("--resume",)):
            second = mpirun(2, *train, *options)
            second.refused(str(tmp_path / "x"), "is in use by", rank_0)
        seen.append(contents(tmp_path / "x") == before)
        for pid in (*running.ranks, running.pid):
            os.kill(pid, signal.SIGCONT)
        running.signal(signal.SIGUSR1)

    first = mpirun(2, *train, during=start_again)
    assert seen == [True]
    assert first.code == STOPPED_EARLY, first
    assert len(training_state(tmp_path / "x", 0)["learner/theta"]) == 3080
    assert not (tmp_path / "x" / "owner.json").exists()


def test_a_killed_run_leaves_its_folder_to_the_next(
    inputs: Path, tmp_path: Path
) -> None:
    train = ("train", inputs / "tiny.toml", "--out", tmp_path)

    def kill(running: Running) -> None:
        first_checkpoint(tmp_path)
        for rank in running.ranks:  # as KILL does, but `mpirun` below takes that for
            os.kill(rank, signal.SIGQUIT)  # the end of its patience

    assert mpirun(2, *train, during=kill).code != 0
    assert (tmp_path / "owner.json").exists()
    resumed = mpirun(2, "resume", tmp_path)
    assert resumed.code == 0, resumed
    assert "resumed at step" in resumed.out
    assert not (tmp_path / "owner.json").exists()


def test_a_run_killed_in_its_last_validation_has_its_last_step(
    inputs: Path, trained, tmp_path: Path
) -> None:
    def kill(running: Running) -> None:
        last = tmp_path / f"checkpoints/step-{TINY_STEPS:09d}"
        wait_for(last.exists, "last checkpoint")
        running.signal(signal.SIGTERM)  # mpirun sends KILL half a second later

    program = (sys.executable, Path(__file__).parent / "inject.py", "0", "slow")
    train = ("train", inputs / "tiny.toml", "--out", tmp_path)
    killed = mpirun(2, *train, program=program, during=kill)
    assert killed.code != 0
    assert "valid perplexity" not in killed.out
    assert not (tmp_path / "summary.json").exists()
    resumed = mpirun(2, "resume", tmp_path)
    assert resumed.code == 0, resumed
    assert f"resumed at step {TINY_STEPS:,}" in resumed.out
    found, expected = (
        json.loads((folder / "summary.json").read_text())["valid_perplexity"]
        for folder in (tmp_path, trained[0])
    )
    assert found == expected
    for rank in range(2):
        state, reference = (training_state(f, rank) for f in (tmp_path, trained[0]))
        for name, value in reference.items():
            assert np.array_equal(state[name], value), name


def test_a_run_goes_on_on_another_number_of_ranks(trained, tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "x")
    more = ("--set", f"train.samples={TINY_SAMPLES + 6000}")
    resumed = mpirun(3, "resume", tmp_path / "x", *more)
    assert resumed.code == 0, resumed
    assert f"resumed at step {TINY_STEPS:,}, {TINY_SAMPLES:,} samples" in resumed.out
    assert "ranks: 2 until now" in resumed.out
    found, before = (
        json.loads((folder / "summary.json").read_text())
        for folder in (tmp_path / "x", trained[0])
    )
    assert (found["ranks"], found["samples"]) == (3, TINY_SAMPLES + 6000)
    assert found["valid_perplexity"] < 1.2 * before["valid_perplexity"]
    again = mpirun(0, "resume", tmp_path / "x")
    assert again.code == 0, again
    assert "the run has ended" in again.out


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_run_that_has_ended_ends_at_once(trained, tmp_path: Path, ranks) -> None:
    (tmp_path / "torch.py").write_text(NO_TORCH)
    folder, before = trained[0], contents(trained[0])
    done = mpirun(ranks, "resume", folder, PYTHONPATH=str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{folder}: the run has ended; more train.samples go on\n"
    assert contents(folder) == before


def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path: Path) -> None:
    mpirun(0, "resume", tmp_path / "x").refused("x: no run here")
    mpirun(0, "train", "--out", tmp_path / "x", "--resume").refused("no run here")
    assert not (tmp_path / "x").exists()
