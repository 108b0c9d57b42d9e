"""A signal makes a run write a checkpoint and stop; --resume gives the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from .conftest import (
    TINY_SAMPLES,
    TINY_STEPS,
    Run,
    Running,
    first_checkpoint,
    mpirun,
    newest,
    training_state,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STOPPED_EARLY = 75


def train(inputs: Path, out: Path, ranks: int, *options: str, during=None) -> Run:
    arguments = ("train", inputs / "tiny.toml", "--out", out, *options)
    return mpirun(ranks, *arguments, during=during)


def test_the_screen_shows_a_bar_on_a_terminal_and_a_summary(trained) -> None:
    folder, run = trained
    assert run.code == 0
    assert run.err == ""
    assert "\u2501" in run.out  # the bar
    assert "3,080 parameters, allreduce on 2 ranks" in run.out
    assert "50,000 training tokens" in run.out
    assert f"{TINY_SAMPLES:,} samples in" in run.out
    assert "nan" not in run.out
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.toml",
        "log",
        "summary.json",
        "vocabulary.json",
    ]
    assert len(list((folder / "checkpoints").iterdir())) == 2


def test_usr1_to_mpirun_then_resume_is_the_uninterrupted_run_to_the_bit(
    inputs: Path, trained, tmp_path: Path
) -> None:
    def stop(running: Running) -> None:
        first_checkpoint(tmp_path)
        running.signal(signal.SIGUSR1)
        running.signal(signal.SIGUSR1)  # schedulers may send it twice

    stopped = train(inputs, tmp_path, 2, during=stop)
    assert stopped.code == STOPPED_EARLY
    assert stopped.said == []
    stopped.has_no_traceback()
    assert "\x1b" not in stopped.out
    assert "stopped early at" in stopped.out
    assert "(exit code 75; what mpirun says of it is no error)" in stopped.out
    assert not (tmp_path / "summary.json").exists()
    step = int(newest(tmp_path).name.removeprefix("step-"))
    assert step < TINY_STEPS

    resumed = mpirun(2, "resume", tmp_path)
    assert resumed.code == 0
    assert f"resumed at step {step:,}" in resumed.out
    for rank in range(2):
        state = training_state(tmp_path, rank)
        reference = training_state(trained[0], rank)
        assert state.keys() == reference.keys()
        for name, value in reference.items():
            assert np.array_equal(state[name], value), name


def test_term_to_mpirun_keeps_the_last_checkpoint(inputs: Path, tmp_path: Path) -> None:
    # mpirun gives its ranks a quarter of a second, then SIGKILL (Open MPI 5.0.11):
    # there may be a checkpoint of the last moment or not, but there is a whole one
    def stop(running: Running) -> None:
        first_checkpoint(tmp_path)
        running.signal(signal.SIGTERM)

    stopped = train(inputs, tmp_path, 2, during=stop)
    assert stopped.code != 0
    stopped.has_no_traceback()
    assert len(training_state(tmp_path, 0)["learner/theta"]) == 3080


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training_begins_is_not_lost(
    inputs: Path, tmp_path: Path, number
) -> None:
    def stop(running: Running) -> None:
        # the folder is made before torch is loaded, which takes seconds
        wait_for((tmp_path / "checkpoints").exists, "folder")
        running.signal(number)

    stopped = train(inputs, tmp_path, 0, during=stop)
    assert stopped.code == STOPPED_EARLY
    stopped.has_no_traceback()
    assert newest(tmp_path).name <= "step-000000012"  # 2 agreements of 5 steps each
