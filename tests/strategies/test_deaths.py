"""Ranks die in training, and the others go on: in the virtual world."""

from __future__ import annotations

import json

import pytest

from tests.strategies import deaths
from tests.strategies.deaths import SHORT, SURVIVING, Dying


@pytest.fixture
def train(run):
    """Return a function: train where these ranks die before these steps."""

    def train(name, deaths, *, size=4, out=None, **sections):
        profile = [{"kind": "fail_at", "rank": r, "step": s} for r, s in deaths]
        settings = {
            "strategy": SHORT.get(name, {}),
            "faults": {"profile": profile},
            "machine": {"step_s": 0.1},
            "world": {"on_death": "go_on"},
            "train": {"test": False, "worst_rank": False, "samples": 4000},
        }
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values}
        return run(size, name, out=out, can_shrink=True, **settings)

    return train


@pytest.mark.long
@pytest.mark.parametrize("name", SURVIVING)
def test_the_others_go_on(train, tmp_path, capsys, name):
    trainers = train(name, [(2, 12)], out="x")
    assert [t is None for t in trainers] == [False, False, True, False]
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["ranks"] == 3
    assert 4000 <= summary["samples"] < 4300
    assert summary["valid_perplexity"] < 40
    assert "rank 2 died; 3 go on from the mean" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("name", SURVIVING)
def test_random_deaths(name):
    found = deaths.sweep(name, range(3))
    assert found["the others went on"] > 0


def test_without_filter_a_death_is_survived():
    """gossip_bmuf asked for the momentum of a filter that was off."""
    assert deaths.run("gossip_bmuf", 5) == "the others went on"


def test_an_exchange_of_before_a_death_keeps_nobody_waiting():
    """The last one left ended its run before what adpsgd had begun knew of the end."""
    assert deaths.run("adpsgd", 1) == "the others went on"


@pytest.mark.parametrize(("name", "seed"), [("bmuf", 53), ("des_loc", 112)])
def test_ranks_that_were_a_step_apart_count_alike_after_a_death(name, seed):
    """Each went on counting its own steps to the next mean, and waited for ever."""
    assert deaths.run(name, seed) == "the others went on"


@pytest.mark.parametrize(
    ("name", "when"),
    [("gossip_bmuf", "before"), ("async_sgd", "in"), ("model_averaging", "after")],
)
def test_a_second_death_while_the_others_go_on(
    train, tmp_path, monkeypatch, name, when
):
    """It ended the run: nobody knew who had gone on already."""
    monkeypatch.setattr(Dying, "dies", (1, when))
    monkeypatch.setattr("tests.strategies.conftest.Trainer", Dying)
    trainers = train(name, [(3, 12)], out="x")
    assert [t is None for t in trainers] == [False, True, False, True]
    alive = [trainers[0], trainers[2]]
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["ranks"] == 2
    own = sum(trainer.learner.samples for trainer in alive)
    assert own + alive[0].batches.counts.rest == summary["samples"]
    assert 4000 <= summary["samples"] < 4300
    assert "ranks 1 and 3 died; 2 go on from the mean" in alive[0].news
