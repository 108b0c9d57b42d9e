"""Minibatches whose gradient is not finite, on one rank: skipped and counted."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mpilm.errors import MpilmError
from mpilm.storage.checkpoint import load_shared
from mpilm.strategies.model_averaging import ModelAveraging
from mpilm.train.loop import Trainer

TOGETHER = {"allreduce": 2}  # ranks that skip what one of them cannot use
NAMES = ["allreduce", "model_averaging", "bmuf", "dpsgd", "delay_by_one"]


@pytest.fixture
def spoiled(monkeypatch):
    """Return a function: from now on the loss of these steps of a rank is `value`."""

    def spoil(rank: int, steps: range | set[int], value: float = math.nan) -> None:
        set_up = Trainer.set_up

        def injected(trainer: Trainer, *, resume: bool) -> None:
            set_up(trainer, resume=resume)
            objective = trainer.learner._objective
            loss = objective._loss

            def spoiled_loss(model, batch):
                is_bad = trainer.world.rank == rank and trainer.totals.step in steps
                found = loss(model, batch)
                return found * value if is_bad and model.training else found

            objective._loss = spoiled_loss

        monkeypatch.setattr(Trainer, "set_up", injected)

    return spoil


@pytest.mark.long
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*NAMES, "adpsgd", "async_sgd"])
def test_bad_steps_are_skipped_and_counted(run, spoiled, tmp_path, name, value):
    spoiled(1, {3, 7}, value)
    trainers = run(2, name, out="x", train={"test": False})
    skipped = [trainer.totals.skipped for trainer in trainers]
    assert skipped == ([2, 2] if name in TOGETHER else [0, 2])
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["skipped"] == sum(skipped)
    assert summary["per_rank"]["skipped"] == skipped
    assert summary["valid_perplexity"] < 40  # of 40 words
    assert math.isfinite(summary["train_loss"])


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_skipped_step_changes_nothing(run, spoiled, optim):
    """The step of a bad minibatch is the last: the same bits as one step less."""
    settings = {"optim": {"name": optim, "lr": 0.01, "momentum": None}}
    settings["optim"] |= {"momentum": 0.9} if optim == "sgd" else {}
    (one_less,) = run(1, "local", steps=5, **settings)
    spoiled(0, {5})
    (trainer,) = run(1, "local", steps=6, **settings)
    assert trainer.totals.skipped == 1
    assert torch.equal(trainer.learner.theta, one_less.learner.theta)
    moments = one_less.learner.moments()
    assert moments
    for name, moment in trainer.learner.moments().items():
        assert torch.equal(moment, moments[name])


@pytest.mark.long
@pytest.mark.parametrize("name", ["allreduce", "model_averaging", "adpsgd"])
def test_too_many_in_a_row_end_all_ranks(run, spoiled, tmp_path, name):
    spoiled(1, range(20, 1_000_000))
    settings = {"train": {"max_bad_steps": 4}, "checkpoint": {"every": 400}}
    what = "the loss is .*not finite 4 times in a row at step 24: .*checkpoints"
    with pytest.raises(MpilmError, match=what):
        run(2, name, steps=1000, out="x", **settings)
    theta = load_shared(tmp_path / "x/checkpoints")["theta"]
    assert np.isfinite(theta).all()
    assert not (tmp_path / "x/summary.json").exists()


@pytest.mark.long
def test_a_good_step_between_them_begins_the_count_anew(run, spoiled):
    spoiled(1, set(range(50)) - set(range(3, 50, 4)))
    _, trainer = run(2, "model_averaging", train={"max_bad_steps": 4})
    assert trainer.totals.skipped == 38


@pytest.mark.long
@pytest.mark.parametrize("factor", [math.nan, 1000.0])
def test_a_bad_model_is_left_out_of_an_average(run, monkeypatch, factor):
    """Rank 1 comes to the second average with a model that is not to be used."""
    average, seen = ModelAveraging.average_those_in_, {}

    def watched(strategy, learner):
        if strategy.rounds == 1:
            seen[strategy.world.rank] = learner.theta.clone()
        average(strategy, learner)
        if strategy.rounds == 1:
            seen[strategy.world.rank, "after"] = learner.theta.clone()

    step = ModelAveraging.step

    def spoiled_step(strategy, learner):
        if strategy.world.rank == 1 and strategy.steps == 7:
            learner.theta *= factor
        return step(strategy, learner)

    monkeypatch.setattr(ModelAveraging, "average_those_in_", watched)
    monkeypatch.setattr(ModelAveraging, "step", spoiled_step)
    settings = {"period": 5, "leave_out": 1.0}
    trainers = run(3, "model_averaging", steps=20, strategy=settings)
    mean = (seen[0] + seen[2]) / 2
    for rank in range(3):
        torch.testing.assert_close(seen[rank, "after"], mean)
    assert [t.strategy.metrics()["left_out"] for t in trainers] == [0, 1, 0]
    assert torch.isfinite(trainers[1].learner.theta).all()
