"""One run at a time in a folder: real locks, real processes, real deaths."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpilm.errors import CheckpointError
from mpilm.storage import owner
from mpilm.storage.owner import NAME, Owner, Record, started

NO_LOCKS = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
"""
TAKE = """
import sys, time
from pathlib import Path
from mpilm.errors import CheckpointError
from mpilm.storage.owner import Owner
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
try:
    owner = Owner(Path(sys.argv[1])).take()
except CheckpointError as error:
    print(error, flush=True)
else:
    print("mine", flush=True)
    sys.stdin.read()
"""


def start(folder: Path, *, at_s: float = 0.0, has_locks: bool = True, **environment):
    """Start a process that takes a folder and holds it until its stdin ends."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            ("" if has_locks else NO_LOCKS) + TAKE,
            folder,
            str(at_s),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture(params=[True, False], ids=["locks", "no-locks"])
def has_locks(request, monkeypatch) -> bool:
    """Whether the file system has locks; if not, flock fails as it does there."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    if not request.param:
        monkeypatch.setattr(fcntl, "flock", refuse)
        monkeypatch.setattr(owner, "SETTLE_S", 0.05)
    return request.param


def elsewhere(folder: Path, *, silent_s: float, **changes: object) -> Record:
    """Leave the file of an owner on another host."""
    record = dataclasses.replace(Record.here(), host="far", boot="another", **changes)
    path = folder / NAME
    path.write_text(json.dumps(dataclasses.asdict(record)))
    os.utime(path, (time.time() - silent_s,) * 2)
    return record


def test_the_second_one_is_refused_and_nothing_is_left(tmp_path, has_locks):
    first = Owner(tmp_path).take()
    before = (tmp_path / NAME).read_bytes()
    with pytest.raises(CheckpointError, match=f"in use by pid {os.getpid()} on "):
        Owner(tmp_path).take()
    assert (tmp_path / NAME).read_bytes() == before
    first.require()
    first.release()
    first.release()
    assert list(tmp_path.iterdir()) == []
    Owner(tmp_path).take().release()


@pytest.mark.long
def test_the_owner_is_named_and_its_death_frees_the_folder(tmp_path, has_locks):
    process = start(tmp_path, has_locks=has_locks, SLURM_JOB_ID="17")
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(CheckpointError) as refused:
        Owner(tmp_path).take()
    line = str(refused.value)
    assert (
        f"{tmp_path}: is in use by pid {process.pid} on {os.uname().nodename}" in line
    )
    assert ", SLURM job 17, since 20" in line
    process.send_signal(signal.SIGSTOP)  # a suspended one lives
    with pytest.raises(CheckpointError, match="is in use"):
        Owner(tmp_path).take()
    process.kill()
    process.wait()
    assert (tmp_path / NAME).exists()
    Owner(tmp_path).take().release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_owners_pid_is_not_the_owner(tmp_path, has_locks):
    mine = Record.here()
    late = dataclasses.replace(mine, started=mine.started - 1, token="x")
    (tmp_path / NAME).write_text(json.dumps(dataclasses.asdict(late)))
    Owner(tmp_path).take().release()
    assert started(os.getpid()) == mine.started > 0
    assert started(2**22 + 1) == -1  # above the highest pid that Linux gives


def test_an_owner_on_another_host_lives_while_it_touches_the_file(tmp_path, has_locks):
    record = elsewhere(tmp_path, silent_s=50.0, pid=7, job="PBS job 3.s")
    with pytest.raises(CheckpointError) as refused:
        Owner(tmp_path).take()
    assert f"in use by pid 7 on far, PBS job 3.s, since {record.since}" in str(
        refused.value
    )
    assert "last sign of life was 50 s ago" in str(refused.value)
    assert f"120 s, or remove {tmp_path / NAME}" in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    elsewhere(tmp_path, silent_s=owner.DEAD_S + 1.0)
    Owner(tmp_path).take().release()


def test_an_owner_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT_S", 0.02)
    mine = Owner(tmp_path).take()
    os.utime(tmp_path / NAME, (0.0, 0.0))
    deadline_s = time.monotonic() + 20.0
    while (tmp_path / NAME).stat().st_mtime == 0.0:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    mine.release()


def test_one_that_was_taken_for_dead_finds_out(tmp_path, has_locks):
    mine = Owner(tmp_path).take()
    mine.require()
    other = elsewhere(tmp_path, silent_s=0.0)
    with pytest.raises(CheckpointError, match=f"taken over by pid {other.pid} on far"):
        mine.require()
    mine.release()
    assert Record.read(tmp_path / NAME) == other  # not ours to remove
    (tmp_path / NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{NAME} is gone"):
        mine.require()


@pytest.mark.long
def test_of_many_that_start_at_the_same_moment_one_wins(tmp_path, has_locks):
    for _ in range(3):
        at_s = time.time() + 2.0
        many = [start(tmp_path, at_s=at_s, has_locks=has_locks) for _ in range(6)]
        said = [process.stdout.readline() for process in many]
        assert said.count("mine\n") == 1, said
        assert all("is in use by" in text for text in said if text != "mine\n")
        for process in many:  # the winner does not release: next round it is dead
            process.communicate()


def test_what_is_no_record_is_taken_for_nobody(tmp_path, has_locks):
    (tmp_path / NAME).write_text('{"host": 3')
    Owner(tmp_path).take().release()


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write: No such"):
        Owner(tmp_path / "none").take()
