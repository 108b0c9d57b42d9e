"""Real MPI ranks and the virtual world train the same model.

At 1 and 2 ranks to the bit: a sum of two numbers has no order. At 3 and 4 to rounding:
MPI libraries choose the order of a sum by its size, the virtual world has its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mpilm.world.virtual import run_virtual

from .conftest import mpirun
from .train_all import LOCKSTEP, STEPS, train_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROGRAM = (sys.executable, Path(__file__).with_name("train_all.py"))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_real_and_virtual_ranks_train_the_same_model(
    inputs: Path, tmp_path: Path, ranks: int
) -> None:
    real, virtual = tmp_path / "real", tmp_path / "virtual"
    run = mpirun(ranks, inputs / "tiny.toml", real, program=PROGRAM)
    assert run.code == 0, run
    run_virtual(lambda world: train_all(world, inputs / "tiny.toml", virtual), ranks)
    for name in LOCKSTEP:
        for rank in range(ranks):
            theta = np.load(real / f"{name}-{rank}.npy")
            expected = np.load(virtual / f"{name}-{rank}.npy")
            if ranks == 2 or name == "local":
                assert np.array_equal(theta, expected), (name, rank)
            difference = np.linalg.norm(theta - expected) / np.linalg.norm(expected)
            assert difference < 1e-5, (name, rank, STEPS)
