"""Minibatches whose gradient is not finite, on one rank: skipped and counted."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mpilm.errors import MpilmError
from mpilm.learner.finite_check import FiniteCheck
from mpilm.storage.checkpoint import load_shared
from mpilm.strategies import STRATEGIES
from mpilm.strategies.model_averaging import ModelAveraging
from mpilm.train.loop import Trainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("log_every", [1, 7])
def test_a_bad_step_may_be_known_a_step_late(
    run, spoiled, monkeypatch, kind, log_every
):
    """As on a GPU: torch's fused optimisers look at the flag themselves."""
    settings = on_gpu(kind, device="cpu", log_every=log_every)
    spoiled(0, {0, 3, 4, 9})
    (waited,) = run(1, "local", steps=10, **settings)
    assert waited.totals.skipped == 4
    monkeypatch.setattr(
        "mpilm.learner.learner.FiniteCheck",
        lambda optimizer, device, *, waits, on_bad: FiniteCheck(
            optimizer, device, waits=False, on_bad=on_bad
        ),
    )
    (late,) = run(1, "local", steps=10, **settings)
    assert late.totals.skipped == 4
    assert torch.isfinite(late.learner.theta).all()
    assert math.isfinite(late.totals.loss_sum)


def on_gpu(kind, **train):
    """Settings of a run on a card, where a bad step is known a step late."""
    optim = {"momentum": {"momentum": 0.9}, "adamw": {"name": "adamw", "lr": 0.01}}
    return {"optim": optim.get(kind, {}), "train": {"device": "cuda", **train}}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("log_every", [1, 7])
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("name", ["allreduce", "model_averaging", "async_sgd"])
def test_bad_steps_on_a_card(run, spoiled, name, kind, log_every):
    spoiled(1, {0, 3, 7, 49})  # the first and the last, too
    trainers = run(2, name, **on_gpu(kind, test=False, log_every=log_every))
    skipped = [trainer.totals.skipped for trainer in trainers]
    assert skipped == ([4, 4] if name in TOGETHER else [0, 4])
    for trainer in trainers:
        assert torch.isfinite(trainer.learner.theta).all()
        assert math.isfinite(trainer.totals.loss_sum)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_a_skipped_step_changes_nothing_on_a_card(run, spoiled, kind):
    (one_less,) = run(1, "local", steps=5, **on_gpu(kind))
    spoiled(0, {5})
    (trainer,) = run(1, "local", steps=6, **on_gpu(kind))
    assert trainer.totals.skipped == 1
    assert torch.equal(trainer.learner.theta, one_less.learner.theta)
    for name, moment in trainer.learner.moments().items():
        assert torch.equal(moment, one_less.learner.moments()[name])


@pytest.mark.gpu
@needs_gpu
def test_too_many_in_a_row_end_all_ranks_on_a_card(run, spoiled):
    spoiled(1, range(20, 1_000_000))
    settings = on_gpu("adamw", max_bad_steps=4, log_every=100)
    with pytest.raises(MpilmError, match=r"not finite 4 times in a row at step 2[45]"):
        run(2, "model_averaging", steps=1000, **settings)


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


BLOCKS = {
    "bmuf": ("bmuf", {}),
    "bmuf-delayed": ("bmuf", {"delay": 3}),
    "gossip_bmuf": ("gossip_bmuf", {}),
    "gossip_bmuf-delayed": ("gossip_bmuf", {"delay": 3, "mix": "momenta"}),
    "gossip_bmuf-unfiltered": ("gossip_bmuf", {"filter": False, "delay": 2}),
    "model_averaging": ("model_averaging", {}),
}


@pytest.fixture
def damaged(monkeypatch):
    """Return a function: rank 1 has its model multiplied before some of its steps."""

    def damage(kind, factor: float, steps: set[int] | range) -> None:
        step = kind.step

        def damaged_step(strategy, learner):
            if strategy.world.rank == 1 and strategy.steps in steps:
                learner.theta *= factor
            return step(strategy, learner)

        monkeypatch.setattr(kind, "step", damaged_step)

    return damage


@pytest.mark.long
@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("factor", [math.nan, 1000.0])
def test_a_bad_model_is_left_out_of_blocks(run, damaged, tmp_path, case, factor):
    """Rank 1 comes to the second mean with a model that is not to be used."""
    name, settings = BLOCKS[case]
    damaged(STRATEGIES[name], factor, {7})
    settings = {**settings, "period": 5, "leave_out": 1.0}
    train = {"test": False, "max_bad_rounds": 2}
    trainers = run(3, name, steps=20, out="x", strategy=settings, train=train)
    assert [t.strategy.metrics()["left_out"] for t in trainers] == [0, 1, 0]
    for trainer in trainers:
        assert torch.isfinite(trainer.learner.theta).all()
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["valid_perplexity"] < 40


@pytest.mark.long
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("name", ["bmuf", "gossip_bmuf"])
def test_what_is_left_out_goes_on_from_the_mean_of_the_others(
    run, damaged, monkeypatch, name, delay
):
    kind, seen = STRATEGIES[name], {}
    damaged(kind, math.nan, {2})
    begin, apply = kind.end_block, kind.apply

    def began(strategy, learner, number):
        seen.setdefault((strategy.world.rank, number), learner.theta.clone())
        begin(strategy, learner, number)

    def applied(strategy, learner, number):
        before = learner.theta.clone()
        apply(strategy, learner, number)
        key = (strategy.world.rank, number, "after")
        seen.setdefault(key, (before, learner.theta.clone()))

    monkeypatch.setattr(kind, "end_block", began)
    monkeypatch.setattr(kind, "apply", applied)
    settings = {"eta": 0.0, "period": 3, "delay": delay, "leave_out": 1.0}
    trainers = run(3, name, steps=6, strategy=settings, train={"test": False})
    for number, slices in enumerate(trainers[0].strategy.components):
        for where in slices:
            mean = (seen[0, number][where] + seen[2, number][where]) / 2
            torch.testing.assert_close(seen[1, number, "after"][1][where], mean)
            before, after = seen[0, number, "after"]
            moved = after - before + seen[0, number]
            torch.testing.assert_close(moved[where], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["bmuf", "gossip_bmuf", "model_averaging"])
def test_left_out_too_often_all_stop_and_a_good_checkpoint_stands(
    run, damaged, tmp_path, name
):
    damaged(STRATEGIES[name], 1000.0, range(20, 1_000_000))
    settings = {"strategy": {"period": 5, "leave_out": 1.0}}
    settings |= {"train": {"max_bad_rounds": 3}, "checkpoint": {"every": 400}}
    what = "a rank was left out of 3 rounds in a row.* at step 35: .*checkpoints"
    with pytest.raises(MpilmError, match=what):
        run(3, name, steps=1000, out="x", **settings)
    theta = load_shared(tmp_path / "x/checkpoints")["theta"]
    assert np.isfinite(theta).all()


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


@pytest.mark.long
@pytest.mark.parametrize("name", ["model_averaging", "bmuf", "gossip_bmuf"])
def test_the_bytes_of_losses_are_those_that_the_world_counts(run, name):
    for trainer in run(3, name, steps=7, strategy={"period": 2, "leave_out": 1.0}):
        declared = trainer.strategy.moved_bytes(trainer.learner.layout)
        totals = trainer.totals
        assert (totals.bytes_sent, totals.bytes_received) == declared
