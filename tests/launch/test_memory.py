"""Memory of ranks, as benchmarks/bench_memory.py reads it, at a modest size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_memory.py"
MOST = 0.5  # of theta: a copy of it would be 1


def test_no_phase_takes_another_copy_of_the_model(tmp_path: Path) -> None:
    """theta is 77 MB; block momentum keeps two vectors more."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peaks of memory cannot be set back here")
    out = tmp_path / "memory.json"
    sizes = ("--vocab", "150000", "--hidden", "128", "--samples", "9100")
    command = [sys.executable, BENCH, *sizes, "--strategies", "gossip_bmuf"]
    subprocess.run([*command, "--no-resume", "--out", out], check=True)
    [row] = json.loads(out.read_text())["tables"][0]["rows"]
    needed = row["theta (MB)"] + row["kept (MB)"] + row["activations (MB)"]
    for phase in ("validation", "consensus", "checkpoint", "end"):
        more = (row[phase] * needed - row["between steps (MB)"]) / row["theta (MB)"]
        assert more < MOST, phase
