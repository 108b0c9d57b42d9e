"""Training an LSTM language model for real, in the virtual world, by each strategy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mpilm.data.hdf5 import Corpus
from mpilm.storage.runlog import read_run

ALL = ("local", "allreduce", "model_averaging", "dpsgd", "delay_by_one")


def theta(trainers, rank=0):
    return trainers[rank].learner.theta.clone()


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 4])
def test_allreduce_on_n_ranks_is_local_with_n_times_the_batch(run, size):
    one = run(1, "local", batch=4 * size)
    many = run(size, "allreduce", batch=4)
    difference = (theta(one) - theta(many)).norm() / theta(one).norm()
    assert difference < 1e-5
    for rank in range(size):
        assert torch.equal(theta(many, rank), theta(many))


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_model_averaging_with_period_1_and_plain_sgd_is_allreduce(run, size):
    gradients = run(size, "allreduce")
    models = run(size, "model_averaging", strategy={"period": 1})
    difference = (theta(gradients) - theta(models)).norm() / theta(models).norm()
    assert difference < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("optim", [{"momentum": 0.9}, {"name": "adamw", "lr": 0.01}])
@pytest.mark.parametrize("name", ALL[1:])
def test_one_rank_is_local_to_the_bit(run, name, optim):
    sections = {"optim": optim, "model": {"dropout": 0.3}}
    assert torch.equal(
        theta(run(1, "local", **sections)), theta(run(1, name, **sections))
    )


@pytest.mark.long
def test_model_averaging_averages_at_the_same_steps_on_all_ranks(run):
    trainers = run(3, "model_averaging", steps=20, strategy={"period": 6, "warmup": 2})
    models = [theta(trainers, rank) for rank in range(3)]
    assert trainers[0].totals.step == 20  # last average after step 20 = 2 + 3 * 6
    assert torch.equal(models[0], models[1])
    trainers = run(3, "model_averaging", steps=21, strategy={"period": 6, "warmup": 2})
    assert not torch.equal(theta(trainers, 0), theta(trainers, 1))


@pytest.mark.long
def test_period_in_samples_equals_period_in_minibatches(run):
    by_steps = run(2, "model_averaging", strategy={"period": 5})
    by_samples = run(2, "model_averaging", strategy={"period_samples": 5 * 4 * 10})
    assert torch.equal(theta(by_steps), theta(by_samples))


@pytest.mark.long
@pytest.mark.parametrize("optim", [{"momentum": 0.9}, {"name": "adamw", "lr": 0.01}])
@pytest.mark.parametrize("momentum", ["keep", "reset", "average"])
def test_moments_are_kept_reset_or_averaged(run, momentum, optim):
    trainers = run(
        2,
        "model_averaging",
        steps=10,
        optim=optim,
        strategy={"period": 10, "momentum": momentum},
    )
    first, second = (
        torch.cat([v.flatten() for v in t.learner.moments().values()]) for t in trainers
    )
    vectors = 2 if "name" in optim else 1
    assert len(first) == vectors * trainers[0].learner.layout.size
    for trainer in trainers:  # the count that AdamW corrects the bias by
        for state in trainer.learner.optimizer.state.values():
            if "step" in state:
                assert state["step"] == (0 if momentum == "reset" else 10)
    if momentum == "keep":
        assert not torch.equal(first, second)
    else:
        assert torch.equal(first, second)
        assert (first.norm() == 0) == (momentum == "reset")


@pytest.mark.long
@pytest.mark.parametrize("source", ["shards", "pool"])
@pytest.mark.parametrize("name", ALL)
def test_resumed_is_uninterrupted_to_the_bit(run, name, source):
    sections = {
        "model": {"dropout": 0.3, "layers": 2},
        "optim": {"name": "adamw", "lr": 0.01, "clip": 0.5},
        "schedule": {"name": "exponential", "warmup_samples": 300},
        "data": {"source": source, "chunk_windows": 3},
    }
    samples = 24 * 2 * 40
    whole = run(2, name, out="whole", train={"samples": samples}, **sections)
    half = {"samples": samples, "valid_every": 0}
    run(2, name, out="parts", checkpoint={"every": 13 * 2 * 40}, train=half, **sections)
    newest = max((whole[0].folder.path.parent / "parts/checkpoints").iterdir())
    for path in newest.iterdir():  # drop the last one: the one in the middle is left
        path.unlink()
    newest.rmdir()
    resumed = run(2, name, out="parts", resume=True, train=half, **sections)
    assert resumed[0].totals.step == whole[0].totals.step
    for rank in range(2):
        assert torch.equal(theta(resumed, rank), theta(whole, rank))
    log = read_run(resumed[0].folder.path)[1].rows
    reference = read_run(whole[0].folder.path)[1].rows
    assert log["step"].tolist() == reference["step"].tolist()
    assert np.array_equal(log["loss"], reference["loss"])


def test_summary_holds_what_a_user_compares(run):
    trainers = run(2, "allreduce", steps=30)
    folder = trainers[0].folder
    summary = json.loads(folder.summary.read_text())
    assert summary["strategy"] == "allreduce"
    assert summary["ranks"] == 2
    assert summary["samples"] == 30 * 2 * 40
    assert summary["steps"] == 30
    parameters = trainers[0].learner.layout.size
    # 30 gradients and the first model; 2 ranks move 4 bytes each way per parameter
    reduced = 30 * 2 * 4 * parameters
    assert reduced <= summary["bytes_sent"] <= reduced + 3 * 4 * parameters
    assert 0.0 < summary["overlap"] <= 1.0
    assert summary["comm_seconds"] >= 0.0
    for key in ("seconds", "train_loss", "samples_per_s", "test_perplexity"):
        assert summary[key] > 0.0
    logs = read_run(folder.path)
    assert sorted(logs) == [0, 1]
    assert len(logs[1].rows["step"]) == 30


@pytest.mark.long
def test_training_approaches_the_perplexity_floor(run, corpus):
    trainers = run(
        2,
        "allreduce",
        steps=700,
        batch=20,
        optim={"name": "adamw", "lr": 0.02},
        schedule={"name": "exponential"},
        model={"embed": 32, "hidden": 32},
    )
    with Corpus.open(corpus) as data:
        floor = data.floor
    valid = trainers[0].totals.valid_perplexity
    # 5,000 tokens of valid text: its own entropy is within 3% of the rate (2 sigma)
    assert 0.97 * floor < valid < 1.08 * floor
    assert math.isfinite(valid)


@pytest.mark.long
@pytest.mark.parametrize("source", ["shards", "pool"])
@pytest.mark.parametrize("name", ["adpsgd", "async_sgd"])
def test_ranks_out_of_lockstep_train_to_the_end(run, name, source):
    trainers = run(
        3,
        name,
        steps=30,
        optim={"clip": 0.0},
        data={"source": source, "chunk_windows": 3},
        faults={"slow": {"1": 5.0}},
    )
    summary = json.loads(trainers[0].folder.summary.read_text())
    own = [trainer.learner.samples for trainer in trainers]
    assert 30 * 3 * 40 <= summary["samples"] == sum(own) < 31 * 3 * 40
    assert 4 * own[1] < min(own[0], own[2])  # it takes a fifth of the steps
    assert summary["valid_perplexity"] < 35  # of a vocabulary of 40


@pytest.mark.long
@pytest.mark.parametrize("name", ["adpsgd", "async_sgd"])
def test_ranks_out_of_lockstep_meet_to_validate_and_to_save(run, name):
    """The slow rank comes when it has done its step; afterwards all go on."""
    total = 60 * 3 * 40
    trainers = run(
        3,
        name,
        out="synced",
        steps=60,
        optim={"clip": 0.0},
        data={"source": "pool", "chunk_windows": 3},
        faults={"slow": {"1": 5.0}},
        train={"samples": total, "valid_every": total // 4},
        checkpoint={"every": total // 3, "keep": 9},
    )
    logs = read_run(trainers[0].folder.path)
    names = [log.events["name"].tolist() for log in logs.values()]
    counts = [(own.count("evaluate"), own.count("checkpoint")) for own in names]
    assert counts[0] == counts[1] == counts[2]
    evaluations, checkpoints = counts[0]
    assert 3 <= evaluations <= 5, counts
    assert 3 <= checkpoints <= 4
    kept = list(trainers[0].folder.checkpoints.iterdir())
    assert 3 <= len(kept) <= checkpoints  # the last two may be of the same step
    summary = json.loads(trainers[0].folder.summary.read_text())
    assert summary["samples"] >= total
    assert summary["valid_perplexity"] < 35
    resumed = run(
        3,
        name,
        out="synced",
        resume=True,
        optim={"clip": 0.0},
        data={"source": "pool", "chunk_windows": 3},
        train={"samples": 2 * total, "valid_every": total // 4},
    )
    assert sum(t.learner.samples for t in resumed) >= 2 * total
