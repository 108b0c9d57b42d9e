"""Checkpoints when the disk is full, the folder closed, or the run killed."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from mpilm.errors import CheckpointError
from mpilm.storage.beside import Beside
from mpilm.storage.checkpoint import Checkpoints
from mpilm.world.virtual import run_virtual


def in_child(work):
    """Run `work` in a forked process; return whether it returned True."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() is True else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


WAY = "waiting"


@pytest.fixture(params=["waiting", "beside", "on a thread"], autouse=True)
def way(request, monkeypatch):
    """How checkpoints are written: all tests hold for each."""
    monkeypatch.setattr(sys.modules[__name__], "WAY", request.param)


def saver(folder, world):
    """Return a function that saves as `WAY` says, and is done when it returns."""
    checkpoints = Checkpoints(folder, world)
    if WAY == "waiting":
        return checkpoints.save
    world.is_virtual = WAY != "on a thread"  # else it writes at once
    beside = Beside(checkpoints)

    def save(step, shared, own):
        with beside.writing(step) as writing:
            writing.shared(shared)
            writing.own(own)
        for part in (shared, own):  # training goes on
            part["theta"][:] = -1.0
        for _ in range(10):
            with suppress(CheckpointError):  # all ranks are told of it in `settle`
                beside.poll()
            world.sleep(0.001)
            time.sleep(0.0002)
        beside.settle()

    return save


def state(step, num_bytes):
    return {"step": step, "theta": np.full(num_bytes // 8, step, np.float64)}


def save(folder, step, sizes):
    """Save on len(sizes) ranks, rank r sizes[r] bytes; return each rank's error."""

    def main(world):
        try:
            own = state(step, sizes[world.rank])
            saver(folder, world)(step, state(step, 1000), own)
        except CheckpointError as error:
            return str(error)
        return None

    return run_virtual(main, len(sizes))


def load(folder, size):
    """Return the step of the newest checkpoint, once every rank's content is right."""

    def main(world):
        checkpoints = Checkpoints(folder, world)
        newest = checkpoints.latest()
        for part in checkpoints.load(newest):
            assert part["step"] == newest.step
            assert (part["theta"] == newest.step).all()
        return newest.step

    return run_virtual(main, size)[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def small_disk(folder, num_bytes):
    """Mount a disk of its own on `folder`; skip where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", folder]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True, timeout=20)


@pytest.mark.parametrize("full", [0, 1])
def test_disk_full(tmp_path, full):
    folder = tmp_path / "disk"
    small, large = [10_000, 10_000], [10_000, 10_000]
    large[full] = 2_000_000
    with small_disk(folder, 1_000_000):
        assert save(folder, 10, small) == [None, None]
        path = folder / "step-000000020.partial"
        lines = [
            f"rank {rank}: {path}/rank-{rank:04d}.h5: No space left on device"
            for rank in (0, 1)
        ]
        likely = [lines[full]]
        if WAY == "on a thread":  # whoever writes last finds it full
            likely = [*lines, lines[0].replace("rank-0000", "shared")]
        first, second = save(folder, 20, large)
        assert first == second
        assert first in likely
        assert names(folder) == ["step-000000010"]
        assert load(folder, 2) == 10
        assert save(folder, 30, small) == [None, None]
        assert load(folder, 2) == 30


def test_disk_full_at_any_moment(tmp_path):
    """From no room at all to enough, in steps of a page."""
    with small_disk(tmp_path / "disk", 200_000):
        folder, filler = tmp_path / "disk" / "checkpoints", tmp_path / "disk" / "filler"
        assert save(folder, 1, [20_000]) == [None]
        outcomes = []
        disk = os.statvfs(tmp_path / "disk")
        for num_pages in range(disk.f_bavail, 0, -1):
            filler.write_bytes(bytes(num_pages * disk.f_frsize))
            outcomes.append(save(folder, 2, [20_000])[0])
            if outcomes[-1] is None:
                break
            assert outcomes[-1].endswith("No space left on device")
            assert load(folder, 1) == 1
            assert names(folder) == ["step-000000001"]
        assert len(outcomes) > 5
        assert load(folder, 1) == 2


def test_file_size_limit(tmp_path):
    """Like a quota: one rank's file is too large."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        first = save(tmp_path, 10, [1000, 1000, 1000])
        second = save(tmp_path, 20, [1000, 1000, 1_000_000])
        path = tmp_path / "step-000000020.partial" / "rank-0002.h5"
        return first == [None] * 3 and second == [f"rank 2: {path}: File too large"] * 3

    assert in_child(work)
    assert names(tmp_path) == ["step-000000010"]
    assert load(tmp_path, 3) == 10


def test_folder_not_writable():
    """As another user if we are root, whom nothing is forbidden."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        assert save(folder, 10, [1000, 1000]) == [None, None]
        folder.chmod(0o555)

        def work():
            if os.getuid() == 0:
                os.setuid(65534)
            line = f"rank 0: {folder}/step-000000020.partial: Permission denied"
            found = save(folder, 20, [1000, 1000])
            return found == [line, line] and load(folder, 2) == 10

        assert in_child(work)
        folder.chmod(0o755)
        assert names(folder) == ["step-000000010"]


def save_until_killed(folder, first, report):
    """Save one checkpoint after another; report each step once it is on the disk."""

    def main(world):
        save = saver(folder, world)
        step = first
        while True:
            shared, own = state(step, 200_000), state(step, 100_000)
            save(step, shared, own)
            if world.rank == 0:
                os.write(report, step.to_bytes(8, "little"))
            step += 1

    run_virtual(main, 2)


@pytest.mark.long
def test_killed_at_any_moment_the_newest_complete_one_loads(tmp_path):
    random.seed(1)
    newest, num_leftovers = 0, 0
    for _ in range(20 if WAY == "waiting" else 8):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_until_killed(tmp_path, newest + 1, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        reported = [os.read(read_end, 8)]
        time.sleep(random.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        while step := os.read(read_end, 8):
            reported.append(step)
        os.close(read_end)
        # saved and not yet reported is possible, reported and not saved is not
        last = int.from_bytes(reported[-1], "little")
        newest = load(tmp_path, 2)
        assert newest in {last, last + 1}
        num_leftovers += any(name.endswith(".partial") for name in names(tmp_path))
    assert num_leftovers > 0, "never killed in the middle of saving"


@pytest.mark.long
def test_large_arrays_are_not_copied(tmp_path):
    def work():
        own = state(1, 80_000_000)
        save(tmp_path / "warm", 1, [1000])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def main(world):
            Checkpoints(tmp_path / "c", world).save(1, {}, own)
            return True

        run_virtual(main, 1)
        used_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return used_kib < 8_000

    assert in_child(work)
