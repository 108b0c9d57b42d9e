"""Tests of the real world: the same file at any number of ranks.

    mpirun -n 3 python -m mpi4py -m pytest -x --with-mpi tests/mpi

Rank 0 reports on the screen, the others to build/mpi/rank-N.txt; what fails on another
rank is shown on stderr too. Every test is passed by all ranks in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.junitxml import LogXML

from mpilm.world.base import Comm
from mpilm.world.mpi.world import MpiWorld, start_mpi

LOGS = Path(__file__).parents[2] / "build" / "mpi"
RANK = start_mpi().COMM_WORLD.rank
STALL_S, STALL_ABORT_S = 20.0, 60.0


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if RANK > 0:
        for plugin in config.pluginmanager.get_plugins():
            if isinstance(plugin, LogXML):
                plugin.logfile = os.devnull  # rank 0 writes the report
        LOGS.mkdir(parents=True, exist_ok=True)
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter._tw._file = (LOGS / f"rank-{RANK}.txt").open("w")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    complain(report)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    complain(report)


def complain(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Show what failed here, if the screen is another rank's."""
    if RANK > 0 and report.failed:
        sys.__stderr__.write(f"\nrank {RANK}: {report.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest) -> Iterator[MpiWorld]:
    world = MpiWorld(stall_s=STALL_S, stall_abort_s=STALL_ABORT_S)
    yield world
    if not request.session.testsfailed:  # else the others may not come
        world.close()


@pytest.fixture(scope="session", params=["world", "Dup", "Split", "Split_half"])
def comm(request: pytest.FixtureRequest, world: MpiWorld) -> Comm:
    """A communicator; the same assertions must hold on each kind."""
    comm = world.comm
    if request.param == "Dup":
        return comm.Dup()
    if request.param == "Split":
        turned = comm.Split(0, key=-comm.rank)
        assert turned is not None
        return turned
    if request.param == "Split_half":
        half = comm.Split(comm.rank % 2)
        assert half is not None
        return half
    return comm


@pytest.fixture
def agree(world: MpiWorld) -> Iterator[list[bool]]:
    """Verdicts of this rank; asserted together after the test's communication.

    An assertion that fails on one rank between two messages would leave the others
    waiting.
    """
    verdicts: list[bool] = []
    yield verdicts
    everyone = world.comm.allgather(verdicts)
    failed = {rank: v for rank, v in enumerate(everyone) if not all(v)}
    assert not failed, f"verdicts by rank: {failed}"
