"""Ranks are killed under Open MPI with ULFM, and others are started in their place."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from mpilm.storage.checkpoint import load_shared
from mpilm.train.joins import request_ranks

from .conftest import Running, mpirun, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("name", "dead"), [("model_averaging", 0), ("adpsgd", 1)])
def test_a_rank_that_is_killed_is_replaced(
    inputs: Path, tmp_path: Path, name: str, dead: int
) -> None:
    """One rank dies, the others go on, another joins: all train, until told to stop."""
    folder = tmp_path / "run"

    def kill(running: Running) -> None:
        checkpoints = folder / "checkpoints"
        wait_for(lambda: [*checkpoints.glob("step-?????????")], "checkpoint")
        ranks = running.ranks
        os.kill(ranks[dead], signal.SIGKILL)
        died_s = time.time()
        wait_for(lambda: {*running.ranks} - {*ranks}, "rank in its place", 300.0)
        log = folder / "log" / "rank-0002.h5"  # the others are 0 and 1 meanwhile
        wait_for(lambda: log.stat().st_mtime > died_s + 1.0, "rank that joined", 300.0)
        running.signal(signal.SIGUSR1)

    run = mpirun(
        *(3, "train", inputs / "tiny.toml", "--out", folder),
        *("--set", f"strategy.name={name}", "--set", 'world.on_death="replace"'),
        *("--set", "train.samples=60_000_000"),
        options=("--with-ft", "ulfm"),
        during=kill,
        limit_s=500,
    )
    assert run.code == 75, run
    assert " died; 2 go on from the mean" in run.out
    joined = re.findall(r"rank 2 joined; 3 go on from .* at ([\d,]+) samples", run.out)
    assert len(joined) == 1, run
    newest = max((folder / "checkpoints").glob("step-?????????"))
    assert len([*newest.glob("rank-*.h5")]) == 3
    at = int(joined[0].replace(",", ""))
    assert load_shared(folder / "checkpoints")["samples"] >= at > 0


def is_deaf(pid: int) -> bool:
    """Return whether a process ignores SIGUSR1: some ms after its start, or later."""
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = int(re.findall(r"SigIgn:\s*(\w+)", status)[0], 16)
    return bool(ignored >> (signal.SIGUSR1 - 1) & 1)


def test_mpirun_ends_though_ranks_that_were_to_join_are_not_taken_in(
    inputs: Path, tmp_path: Path
) -> None:
    """Who has one started dies while it starts; the run stops while another starts."""
    folder = tmp_path / "run"

    def ask(running: Running) -> None:
        wait_for(lambda: [*folder.glob("checkpoints/step-?????????")], "checkpoint")
        ranks = {*running.ranks}

        def another() -> bool:
            more = {pid for pid in running.ranks if pid not in ranks and is_deaf(pid)}
            ranks.update(more)
            return bool(more)

        def joined() -> bool:
            return (folder / "log" / "rank-0003.h5").exists()

        first = running.ranks[0]
        # mpirun itself ends what it has started for ranks that have all gone: one joins
        request_ranks(folder, 1)
        wait_for(another, "rank that was asked for first")
        wait_for(joined, "rank that joined", 200.0)
        request_ranks(folder, 1)
        wait_for(another, "rank that was asked for")
        os.kill(first, signal.SIGKILL)
        wait_for(another, "rank in its place")
        running.signal(signal.SIGUSR1)

    run = mpirun(
        *(3, "train", inputs / "tiny.toml", "--out", folder),
        *("--set", "strategy.name=model_averaging"),
        *("--set", "train.samples=900_000_000"),
        *("--set", 'world.on_death="replace"'),
        options=("--with-ft", "ulfm"),
        during=ask,
        limit_s=300,
    )
    assert run.code == 75, run
    assert "rank 3 joined; 4 go on from the mean" in run.out
    assert "rank 0 died; 3 go on from the mean" in run.out
    assert run.out.count(" joined; ") == 1


def test_a_process_that_never_starts_mpi_holds_nobody_up_for_long() -> None:
    """Another is asked for; after three of them none any more."""
    program = """
import sys, time
from mpilm.errors import WorldError
from mpilm.world.mpi import MpiWorld, recruits
recruits.START_S, recruits.LATE_S = 2.0, 1.5
JOIN = '''
from mpilm.world.mpi.world import start_mpi
from mpilm.world.mpi.recruits import await_ranks
start_mpi()
assert await_ranks() is None
'''
with MpiWorld() as world:
    if world.rank == 0:
        for number in range(3):
            world.recruit(("sh", "-c", "exit 3"))
            assert world.recruits == (1, 0)
            time.sleep(2.0)
            assert world.recruits == (0, 0)
            if number == 1:
                recruits.LATE_S = 60.0
                world.recruit((sys.executable, "-c", JOIN))
                while not world.recruits[1]:
                    time.sleep(0.1)
                print("one is ready", flush=True)
                world._recruits._ready.pop().ssend(recruits.GO_HOME, 1)
                recruits.LATE_S = 1.5
        try:
            world.recruit(("sh", "-c", "exit 3"))
        except WorldError as error:
            print(error, flush=True)
    world.comm.Barrier()
print(f"rank {world.rank} has left", flush=True)
"""
    start = (sys.executable, "-c", program)
    run = mpirun(2, program=start, options=("--with-ft", "ulfm"), limit_s=120)
    assert run.code == 3, run  # those processes' own
    assert run.out.count("one is ready") == 1, run
    why = "no rank could be added: 3 that were started have not come within 2 s"
    assert run.out.count(why) == 1, run
    assert run.out.count(" has left") == 2, run
