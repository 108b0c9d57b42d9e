"""examples/own_model.py runs as docs/library.md says, in both worlds."""

from __future__ import annotations

import sys
from pathlib import Path

from .conftest import mpirun

EXAMPLE = Path(__file__).parents[2] / "examples/own_model.py"
REAL, VIRTUAL = "run_mpi(train)  # run_virtual(train, 4)", "run_virtual(train, 4)"


def loss(line: str, ranks: int) -> float:
    """Return the loss that the example prints."""
    words = line.split()
    assert words[0] == "loss", line
    assert words[-1] == str(ranks), line
    return float(words[1].rstrip(","))


def test_it_trains_under_mpirun() -> None:
    run = mpirun(2, program=(sys.executable, EXAMPLE))
    assert run.code == 0, run
    run.has_no_traceback()
    assert loss(run.out.strip(), 2) < 0.2


def test_it_trains_in_the_virtual_world_with_one_line_changed(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    assert text.count(REAL) == 1
    changed = tmp_path / "own_model.py"
    changed.write_text(text.replace(REAL, VIRTUAL))
    run = mpirun(0, program=(sys.executable, changed))
    assert run.code == 0, run
    assert loss(run.out.strip(), 4) < 0.2
