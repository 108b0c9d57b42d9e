"""`mpilm status RUN`: each rank's speed, where its time goes, nodes that are slow."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpilm.commands.ranks import rank_table, read_ranks, slow_nodes
from mpilm.commands.sweep import status
from mpilm.config import resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.errors import ConfigError
from mpilm.report.reader import RankRow
from mpilm.train.loop import Trainer
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual.world import run_virtual


def train(place, size, faults, **settings):
    """Train a small model on some ranks, some of them slow, into `place`/run."""
    prepare_synthetic(place / "c.h5", vocab=30, tokens=2_000)
    config = resolve(
        {
            "data": {"corpus": str(place / "c.h5")},
            "model": {"embed": 4, "hidden": 4},
            "strategy": {"name": "model_averaging"},
            "train": {"batch": 2, "unroll": 5, **settings},
        }
    )

    def main(world):
        Trainer(config, world, place / "run").train()

    run_virtual(main, size, machine=Machine(step_s=0.1), faults=faults)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a run of 3 ranks, of which rank 1 takes three times as long for a step."""
    place = tmp_path_factory.mktemp("status")
    train(place, 3, Faults(slow={1: 3.0}), samples=900, log_every=2)
    return place / "run"


def test_a_slow_rank_is_named_with_what_it_is_slow_in(folder, capsys):
    assert status(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert "100.0%" in lines[2].replace(" 99.9%", "100.0%")  # all of it is backward
    assert lines[4:] == [
        "rank 1 computes 3.0 x as long for a sample as the fastest, most of it backward"
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    ("profile", "named"),
    [
        # of 90 steps the last ten take twice as long: out of line with those before
        ({"kind": "periodic", "every_steps": 90, "for_steps": 10, "factor": 2.0}, True),
        # a fifth of the steps, wherever: the last window has 1.9 x the usual time, too,
        # but that is how this rank is
        ({"kind": "spikes", "probability": 0.2, "factor": 8.0}, False),
    ],
)
def test_a_rank_that_becomes_slow_is_named_by_its_own_past(tmp_path, profile, named):
    faults = Faults(profile=({"ranks": [1], **profile},), seed=5)
    train(tmp_path, 2, faults, samples=1800, log_every=3)
    run, rows = read_ranks(tmp_path / "run")
    lines = list(rank_table(run, rows))
    windows = run._windows(1)
    assert windows[-1] / np.median(windows[:-1]) == pytest.approx(1.9, abs=0.15)
    found = [line for line in lines if "as it did before" in line]
    want = "rank 1 computes 2.0 x as long for a sample now as it did before"
    assert found == ([want] if named else []), lines


def test_parts_of_a_step_are_in_the_summary(folder):
    of_rank = json.loads((folder / "summary.json").read_text())["per_rank"]
    steps = of_rank["steps"]
    assert of_rank["backward_s"] == pytest.approx(
        [0.1 * steps[0], 0.3 * steps[1], 0.1 * steps[2]]
    )
    assert of_rank["data_s"] == of_rank["forward_s"] == [0.0] * 3


def row(host, recent):
    return RankRow(0, 1.0, 0.1, 0.1, 0.1, 0.0, 0.0, 1.0, 1.0, recent, host)


def test_a_node_is_slow_if_all_its_ranks_are():
    rows = [row("a", 1.0), row("a", 0.9), row("b", 0.3), row("b", 0.4), row("c", 0.3)]
    assert slow_nodes(rows, 2.0) == ["b", "c"]
    assert slow_nodes(rows, 3.0) == ["c"]
    assert slow_nodes([*rows, row("c", 0.9)], 2.0) == ["b"]
    assert slow_nodes([row("", 0.1)], 2.0) == []


def test_a_table_of_one_run_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="--csv: is for sweeps"):
        status(folder, csv=tmp_path / "x.csv")
