"""What goes wrong in the middle: one line, all ranks end, nothing good is lost."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpilm.storage.checkpoint import load_shared

from .conftest import Running, first_checkpoint, mpirun, newest, training_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
INJECT = (sys.executable, Path(__file__).with_name("inject.py"))
ENDLESS = ("--set", "train.samples=1_000_000_000")


def test_an_exception_on_one_rank_ends_all(inputs: Path, tmp_path: Path) -> None:
    arguments = ("train", inputs / "tiny.toml", "--out", tmp_path, *ENDLESS)
    run = mpirun(2, "1", "raise", *arguments, program=INJECT)
    traceback = tmp_path / "traceback-rank-0001.txt"
    words = ("rank 1: RuntimeError: the disk; caught fire", str(traceback))
    run.refused(*words, code=1)
    assert "caught fire" in traceback.read_text()


def test_an_infinite_loss_on_one_rank_ends_all_in_order(
    inputs: Path, tmp_path: Path
) -> None:
    arguments = ("train", inputs / "tiny.toml", "--out", tmp_path, *ENDLESS)
    strategy = ("--set", "strategy.name=model_averaging")
    run = mpirun(2, "1", "inf", *arguments, *strategy, program=INJECT)
    run.refused("rank 1: the loss is inf at step 100", "optim.lr", str(tmp_path))
    assert "MPI_ABORT" not in run.err


def test_an_absurd_learning_rate_is_named(inputs: Path, tmp_path: Path) -> None:
    arguments = ("train", inputs / "tiny.toml", "--out", tmp_path, *ENDLESS)
    absurd = ("--set", "optim.name=sgd", "--set", "optim.lr=1e38")
    run = mpirun(0, *arguments, *absurd)
    run.refused("the loss is", "step", "a smaller optim.lr")


def test_a_model_that_is_not_finite_is_never_saved(
    inputs: Path, tmp_path: Path
) -> None:
    arguments = ("train", inputs / "tiny.toml", "--out", tmp_path, *ENDLESS)
    options = ("--set", "strategy.name=local", "--set", "checkpoint.every=800")
    run = mpirun(2, "1", "model", *arguments, *options, program=INJECT)
    run.refused("the model is not finite at step 100", str(tmp_path))
    assert "MPI_ABORT" not in run.err
    assert newest(tmp_path).name == "step-000000090"


def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on(
    inputs: Path, tmp_path: Path
) -> None:
    """Open MPI's mpirun names the rank; the job scripts know its exit code."""
    killed: list[tuple[int, float]] = []

    def kill(running: Running) -> None:
        first_checkpoint(tmp_path)
        killed.append((running.ranks[1], time.monotonic()))
        os.kill(killed[0][0], signal.SIGKILL)

    arguments = ("train", inputs / "tiny.toml", "--out", tmp_path, *ENDLESS)
    run = mpirun(2, *arguments, during=kill)
    ((pid, at_s),) = killed
    assert time.monotonic() - at_s < 30.0
    assert run.code == 128 + signal.SIGKILL
    assert re.search(rf"rank \d+ with PID {pid} ", run.err), run
    saved = load_shared(tmp_path / "checkpoints")["samples"]
    run = mpirun(2, "resume", tmp_path, "--set", f"train.samples={saved + 8000}")
    assert run.code == 0, run
    assert load_shared(tmp_path / "checkpoints")["samples"] == saved + 8000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes; where none may be mounted, a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Callable[[Running], None]:
    """Return what makes the disk full as soon as there is a checkpoint."""

    def act(running: Running) -> None:
        first_checkpoint(disk / "run")
        if not disk.is_mount():  # no file may grow: the same to a program
            for rank in running.ranks:
                resource.prlimit(rank, resource.RLIMIT_FSIZE, (1024, 1024))
            return
        with (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                try:
                    filler.write(bytes(4096))
                except OSError:
                    return

    return act


def test_a_full_disk_leaves_the_last_checkpoint(inputs: Path, disk: Path) -> None:
    arguments = ("train", inputs / "tiny.toml", "--out", disk / "run")
    # keep = 1: the one that is replaced must not go before the new one is whole
    options = ("--set", "checkpoint.keep=1")
    run = mpirun(2, *arguments, *options, *ENDLESS, during=fill(disk))
    run.refused(str(disk / "run"))
    assert "No space left on device" in run.said[0] or "File too large" in run.said[0]
    assert "MPI_ABORT" not in run.err
    (disk / "filler").unlink(missing_ok=True)
    saved = load_shared(disk / "run/checkpoints")["samples"]
    more = ("--set", f"train.samples={saved + 8000}")
    run = mpirun(2, *arguments, *options, *more, "--resume")
    assert run.code == 0
    assert load_shared(disk / "run/checkpoints")["samples"] == saved + 8000


def test_resume_passes_over_a_truncated_checkpoint(
    inputs: Path, trained, tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    first, last = sorted((tmp_path / "run/checkpoints").iterdir())
    os.truncate(last / "rank-0001.h5", 5000)
    arguments = ("train", inputs / "tiny.toml", "--out", tmp_path / "run", "--resume")
    run = mpirun(2, *arguments)
    assert run.code == 0
    assert len(run.said) == 1
    assert run.said[0].startswith("warning: passed over a checkpoint: rank 1: ")
    assert str(last / "rank-0001.h5") in run.said[0]
    assert f"resumed at step {int(first.name[5:]):,}" in run.out
    for rank in range(2):
        theta = training_state(tmp_path / "run", rank)["learner/theta"]
        assert (theta == training_state(trained[0], rank)["learner/theta"]).all()
