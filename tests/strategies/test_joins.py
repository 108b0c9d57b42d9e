"""Ranks join in training: in the virtual world, every strategy that survives deaths."""

from __future__ import annotations

import json

import pytest

from mpilm.train.joins import Recruiting, request_ranks
from mpilm.world.virtual import run_virtual
from tests.strategies.deaths import SHORT, SURVIVING, Dying


@pytest.fixture
def train(run):
    """Return a function: train with these profiles of faults."""

    def train(name, *profile, size=3, on_death="go_on", **sections):
        settings = {
            "strategy": SHORT.get(name, {}),
            "faults": {"profile": list(profile)},
            "machine": {"step_s": 0.1},
            "world": {"on_death": on_death},
            "train": {"test": False, "worst_rank": False, "samples": 6000},
        }
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values}
        return run(size, name, out="x", can_shrink=True, **settings)

    return train


def check(trainers, size, summary):
    """Assert that the ranks end as one run of `size`, every sample counted."""
    alive = [trainer for trainer in trainers if trainer is not None]
    assert [trainer.world.size for trainer in alive] == [size] * size
    total = summary["samples"]
    own = sum(trainer.learner.samples for trainer in alive)
    assert own + alive[0].batches.counts.rest == total
    assert 6000 <= total < 6000 + 3 * 40 * size
    return alive


@pytest.mark.long
@pytest.mark.parametrize("name", SURVIVING)
def test_a_rank_joins(train, tmp_path, capsys, name):
    trainers = train(name, {"kind": "join_at", "step": 12}, size=3)
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    alive = check(trainers, 4, summary)
    assert (
        alive[3].totals.step == alive[0].totals.step or not alive[0].strategy.lockstep
    )
    assert summary["ranks"] == 4
    assert summary["valid_perplexity"] < 40
    assert "rank 3 joined; 4 go on from the mean" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", ["model_averaging", "adpsgd"])
@pytest.mark.parametrize("dead", [0, 2])
def test_a_rank_that_died_is_replaced(train, tmp_path, name, dead):
    death = {"kind": "fail_at", "rank": dead, "step": 12}
    trainers = train(name, death, on_death="replace")
    assert [rank for rank, found in enumerate(trainers) if found is None] == [dead]
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    check(trainers, 3, summary)
    assert summary["ranks"] == 3
    assert summary["valid_perplexity"] < 40


@pytest.mark.parametrize(
    ("name", "dead", "when"),
    [
        ("gossip_bmuf", 1, "before"),
        ("async_sgd", 0, "in"),
        ("model_averaging", 3, "in"),  # the new one
        ("adpsgd", 2, "after"),
    ],
)
def test_a_rank_dies_as_another_is_taken_in(train, monkeypatch, name, dead, when):
    """The run ended: the new rank had nothing to go on from."""
    monkeypatch.setattr(Dying, "dies", (dead, when))
    monkeypatch.setattr("tests.strategies.conftest.Trainer", Dying)
    pool = {"source": "pool", "chunk_windows": 4}
    trainers = train(name, {"kind": "join_at", "step": 12}, data=pool)
    assert [rank for rank, found in enumerate(trainers) if found is None] == [dead]
    alive = [trainer for trainer in trainers if trainer is not None]
    assert [trainer.world.size for trainer in alive] == [3] * 3
    own = sum(trainer.learner.samples for trainer in alive)
    assert 6000 <= own + alive[0].batches.counts.rest < 6000 + 3 * 40 * 3
    line = f"rank {dead} died as rank 3 was taken in; 3 go on from the mean"
    assert line in alive[0].news


def test_where_no_rank_can_be_added_a_line_says_so(run, tmp_path, capsys):
    profile = [{"kind": "join_at", "step": 2}]
    train = {"test": False, "worst_rank": False, "samples": 1000}
    run(2, "local", out="x", faults={"profile": profile}, train=train)
    lines = capsys.readouterr().out
    assert lines.count("no rank is added: that takes Open MPI") == 1
    assert json.loads((tmp_path / "x/summary.json").read_text())["ranks"] == 2


def test_a_request_for_ranks_that_cannot_be_taken_in_is_answered(tmp_path):
    request_ranks(tmp_path, 1)

    def answer(world):
        recruiting = Recruiting(world, tmp_path, replaces=False, can_start=False)
        assert not recruiting.look(0, 0)
        return recruiting.failure

    line = "no rank is added: a new process does not know this model of your own"
    assert run_virtual(answer, 2) == [line, ""]
    assert not list(tmp_path.iterdir())
