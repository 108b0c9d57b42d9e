"""Ranks are killed under Open MPI with ULFM, and the others train to the end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mpilm.storage.checkpoint import load_shared

from .conftest import mpirun
from .die_in_turn import STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROGRAM = (sys.executable, Path(__file__).with_name("die_in_turn.py"))
# in each world one rank less; of three worlds one loses rank 0, which owns the folder
TURNS = [
    ("model_averaging:3", "bmuf:0", "gossip_bmuf:1"),
    ("dpsgd:2", "adpsgd:1", "async_sgd:0"),
]
# Rank 1 is killed; to the others MPI's next error might mean anything.
UNCLEAR = """\
import os, signal
from mpi4py import MPI
from mpilm.world.mpi import MpiWorld
with MpiWorld() as world:
    meaning, error = world.resources.membership.translate, MPI.Exception(MPI.ERR_OTHER)
    is_death = [meaning(error) is not error]
    world.comm.Barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    is_death += [meaning(error) is not error]
    left = world.shrink()
    print(f"rank {world.rank}: {is_death}, left: {left}", flush=True)
"""


@pytest.mark.parametrize("turns", TURNS, ids="-".join)
def test_the_others_go_on(inputs: Path, tmp_path: Path, turns: tuple[str, ...]) -> None:
    """Samples are counted, the model is finite, and mpirun's exit code is 0."""
    run = mpirun(
        4,
        *(inputs / "tiny.toml", tmp_path, *turns),
        program=PROGRAM,
        options=("--with-ft", "ulfm"),
        limit_s=400,
    )
    assert run.code == 0, run
    said = [line.split()[2:] for line in run.out.splitlines() if "went on: " in line]
    assert [name for name, *_ in said] == [turn.partition(":")[0] for turn in turns]
    for size, (name, before, after, samples, counted, is_finite) in zip(
        (4, 3, 2), said, strict=True
    ):
        assert (int(before), int(after)) == (size, size - 1)
        asked = 150 * 40 * size
        assert asked <= int(samples) < asked + 30 * 40 * size
        assert samples == counted
        assert is_finite == "True"
        assert load_shared(tmp_path / name / "checkpoints")["samples"] == int(samples)
    deaths = [line for line in run.out.splitlines() if " died; " in line]
    assert len(deaths) == len(turns)
    for line, size in zip(deaths, (4, 3, 2), strict=True):
        at = int(line.split(" samples, ")[0].split()[-1].replace(",", ""))
        assert at >= STEPS * 40 * (size - 1), line
    if "model_averaging:3" in turns:  # rank 0 has a copy of it
        found = re.search(r" models and that of rank 3 after (\d+) steps at ", run.out)
        assert found is not None, run
        assert int(found[1]) in range(STEPS - 10, 150, 5)
    assert list(tmp_path.glob("traceback*")) == []


def test_an_unclear_error_is_a_death_if_a_rank_has_died() -> None:
    """Open MPI's nonblocking collectives report some deaths as MPI_ERR_OTHER."""
    program = (sys.executable, "-c", UNCLEAR)
    run = mpirun(3, program=program, options=("--with-ft", "ulfm"))
    assert run.code == 0, run
    said = sorted(line for line in run.out.splitlines() if line.startswith("rank "))
    assert said == [f"rank {n}: [False, True], left: [0, 2]" for n in (0, 1)]
