"""Nodes under mpirun: a rank dies in the middle, the run ends, and goes on later."""

from __future__ import annotations

import json
from pathlib import Path

from mpilm.storage.runlog import read_run

from .conftest import mpirun, newest

NODES = """\
[strategy]
name = "hierarchical"
node_size = 2
inner = "adpsgd"
[strategy.settings]
mixing = "random_pairs"
"""


def test_nodes_train_die_and_go_on(inputs: Path, tmp_path: Path) -> None:
    tiny = (inputs / "tiny.toml").read_text()
    config, out = tmp_path / "nodes.toml", tmp_path / "run"
    config.write_text(tiny + NODES)
    train = ["train", config, "--out", out]
    for setting in (
        "train.samples=120_000", "train.valid_every=30_000", "checkpoint.every=16_000"
    ):  # fmt: skip
        train += ["--set", setting]
    death = 'faults.profile=[{kind="fail_at", rank=3, step=600}]'
    died = mpirun(4, *train, "--set", death)
    assert died.code == 4
    assert "rank 3: dies before step 600, as [faults] declares" in died.said
    assert newest(out)

    # checkpoints hold no fault: the same rank lives now
    whole = mpirun(4, *train, "--resume")
    assert whole.code == 0, whole
    whole.has_no_traceback()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["samples"] >= 120_000
    logs = read_run(out)
    names = [log.events["name"].tolist() for log in logs.values()]
    counts = [(own.count("evaluate"), own.count("checkpoint")) for own in names]
    assert len(set(counts)) == 1
    assert counts[0][0] >= 2
    steps = [int(log.rows["step"][-1]) for log in logs.values()]
    assert steps[0] == steps[1]  # a node is in lockstep
    assert steps[2] == steps[3]
