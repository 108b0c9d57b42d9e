"""`mpilm doctor` and `mpilm probe` under mpirun, as a user starts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch.conftest import mpirun

CHECKED = (
    *(
        "container",
        "MPI",
        "threads of MPI",
        "world",
        "Python",
        "packages",
        "ranks per node",
    ),
    *("cores", "threads", "GPUs", "clock", "shared memory", "run folder"),
    *("HDF5 locking", "scheduler", "same node", "allreduce", "MPI progress"),
)


def names(out: str) -> list[str]:
    """Return what was checked, in order."""
    lines = [line for line in out.splitlines() if line[:8].strip() in {"ok", "warning"}]
    return [line[9:25].strip() for line in lines]


def test_two_ranks_are_examined(tmp_path: Path) -> None:
    run = mpirun(2, "doctor", "--folder", tmp_path / "runs")
    assert run.code == 0, run
    assert names(run.out) == list(CHECKED), run
    assert "ranks 0 and 1: " in run.out
    assert run.out.splitlines()[-1].startswith("0 problems, ")
    run.has_no_traceback()
    assert list(tmp_path.iterdir()) == []


def test_processes_that_do_not_see_each_other(tmp_path: Path) -> None:
    """As mpirun of another MPI starts them: each is alone, and told of four."""
    run = mpirun(0, "doctor", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="0")
    assert run.code == 1
    assert "started 4 processes, but MPI sees a world of one" in run.out
    run.has_no_traceback()


def test_a_rank_that_never_comes_ends_in_a_problem() -> None:
    """Rank 1 takes no part: rank 0 gives up, says where, and all processes end."""
    absent = (
        "import os, time, sys\nfrom mpi4py import MPI\n"
        "if MPI.COMM_WORLD.rank: time.sleep(60)\n"
        "from mpilm.cli import main\n"
        "sys.exit(main(['doctor', '--limit', '3']))"
    )
    run = mpirun(2, program=(sys.executable, "-c", absent), limit_s=40)
    assert run.code != 0
    assert "no end after 3 s" in run.out
    run.has_no_traceback()


@pytest.mark.parametrize("ranks", [2])
def test_probe_measures_a_machine(inputs: Path, tmp_path: Path, ranks: int) -> None:
    """What it prints is a section that `mpilm simulate` reads."""
    run = mpirun(ranks, "probe", inputs / "tiny.toml", "--steps", "5")
    assert run.code == 0, run
    run.has_no_traceback()
    found = tmp_path / "probed.toml"
    found.write_text((inputs / "tiny.toml").read_text() + run.out)
    from mpilm.config import read_config

    machine = read_config(found).machine
    assert 1e-5 < machine.step_s < 5.0
    assert 1e-8 < machine.node_latency_s < 0.1
    assert machine.node_bandwidth_Bps > 1e6
    assert machine.ranks_per_node == ranks
    assert 0.0 < machine.update_s < 5.0
    assert machine.mix_s >= 0.0
    assert machine.node_reduce_Bps > 1e4
