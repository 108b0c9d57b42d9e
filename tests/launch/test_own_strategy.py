"""examples/own_strategy.py runs as docs/own_strategy.md says, in both worlds."""

from __future__ import annotations

import sys
from pathlib import Path

from .conftest import mpirun

EXAMPLE = Path(__file__).parents[2] / "examples/own_strategy.py"


def distance(line: str, ranks: int) -> float:
    """Return the distance that the example prints."""
    words = line.split()
    assert words[:4] == ["distance", "to", "the", "minimum"], line
    assert words[-1] == str(ranks), line
    return float(words[4].rstrip(","))


def test_it_trains_under_mpirun() -> None:
    run = mpirun(3, program=(sys.executable, EXAMPLE))
    assert run.code == 0, run
    run.has_no_traceback()
    assert distance(run.out.strip(), 3) < 0.01


def test_it_trains_in_the_virtual_world_with_one_line_changed(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    changed = tmp_path / "own_strategy.py"
    changed.write_text(
        text.replace("import run_mpi\n", "import run_virtual\n").replace(
            "run_mpi(train)", "run_virtual(train, 4)"
        )
    )
    run = mpirun(0, program=(sys.executable, changed))
    assert run.code == 0, run
    assert distance(run.out.strip(), 4) < 0.01


def test_mpilm_trains_with_it_saves_and_resumes(inputs: Path, tmp_path: Path) -> None:
    named = ("--set", "strategy.name=examples.own_strategy:Easgd")
    settings = (*named, "--set", "strategy.period=4", "--set", "train.samples=8_000")
    out = tmp_path / "run"
    run = mpirun(2, "train", inputs / "tiny.toml", "--out", out, *settings)
    assert run.code == 0, run
    run.has_no_traceback()
    assert "examples.own_strategy:Easgd on 2 ranks" in run.out, run
    longer = (*settings[:-1], "train.samples=12_000")
    run = mpirun(2, "train", inputs / "tiny.toml", "--out", out, *longer, "--resume")
    assert run.code == 0, run
    assert "resumed at step" in run.out, run
    run = mpirun(0, "eval", out, "--split", "valid")
    assert run.code == 0, run
    wrong = ("--set", "strategy.name=examples.own_strategy:Nothing")
    run = mpirun(2, "train", inputs / "tiny.toml", "--out", tmp_path / "x", *wrong)
    run.refused("examples.own_strategy:Nothing", "cannot be loaded")
