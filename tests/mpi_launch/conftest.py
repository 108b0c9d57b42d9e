"""Tests that start mpirun themselves: ends, stalls, launches. Plain pytest runs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

TIMEOUT_S = 60.0
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}
HEADER = """\
import sys, time
import numpy as np
from mpilm.errors import *
from mpilm.world.base import *
from mpilm.world.mpi import MpiWorld, abort_on_error
import mpilm.world.mpi.world
x = np.ones(1000, np.float32)
"""


class Run(subprocess.CompletedProcess[str]):
    """A run that ended; `said` are the lines of mpilm on stderr."""

    @property
    def said(self) -> list[str]:
        """Lines of mpilm on stderr."""
        lines = self.stderr.splitlines()
        return [line[7:] for line in lines if line.startswith("mpilm: ")]


Launch = Callable[..., Run]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Return a function that runs a program on `n` ranks and fails if it hangs."""
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun")

    def launch(n: int, program: str, **environment: str) -> Run:
        script = tmp_path / "program.py"
        script.write_text(HEADER + textwrap.dedent(program))
        command = [sys.executable, str(script)]
        if n > 0:  # 0: without mpirun
            command = [mpirun, "-n", str(n), *command]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, **ENVIRONMENT, **environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Run(done.args, done.returncode, done.stdout, done.stderr)

    return launch
