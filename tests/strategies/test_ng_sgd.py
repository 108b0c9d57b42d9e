"""Natural gradient under the strategies, by the real training program."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpilm.strategies import STRATEGIES

NATURAL = {
    "model": {"dropout": 0.2, "layers": 2, "tied": True},
    "optim": {"name": "ng_sgd", "lr": 0.5, "rank_in": 5, "rank_out": 6, "clip": None},
}
SETTINGS = {
    "hierarchical": {"node_size": 2},
    "sparse_loco": {"period": 5, "share": 0.25},
    "eager_diloco": {"period": 2, "eta": 0.5},
    "divshare": {"period": 2},
}


def theta(trainers, rank=0):
    return trainers[rank].learner.theta.clone()


def factors(trainer):
    """Return the preconditioners' states of a rank, by name."""
    state = trainer.learner.state()
    start = "optimizer/0/"
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


@pytest.mark.long
@pytest.mark.parametrize("name", ["local", "model_averaging", "bmuf"])
def test_resumed_is_uninterrupted_to_the_bit(run, name):
    """Minibatch 26 of 48: between two updates of the estimates, after a start."""
    samples = 48 * 2 * 40
    whole = run(2, name, out="whole", train={"samples": samples}, **NATURAL)
    half = {"samples": samples, "valid_every": 0}
    saving = {"checkpoint": {"every": 26 * 2 * 40}, "train": half}
    run(2, name, out="parts", **saving, **NATURAL)
    newest = max((whole[0].folder.path.parent / "parts/checkpoints").iterdir())
    for path in newest.iterdir():  # drop the last one: the one in the middle is left
        path.unlink()
    newest.rmdir()
    resumed = run(2, name, out="parts", resume=True, train=half, **NATURAL)
    for rank in range(2):
        assert torch.equal(theta(resumed, rank), theta(whole, rank))
        kept, expected = factors(resumed[rank]), factors(whole[rank])
        assert kept.keys() == expected.keys()
        assert all(np.array_equal(kept[key], expected[key]) for key in expected)


@pytest.mark.long
def test_preconditioners_are_each_ranks_own(run):
    trainers = run(3, "model_averaging", steps=20, strategy={"period": 5}, **NATURAL)
    assert torch.equal(theta(trainers, 0), theta(trainers, 1))
    first, second = factors(trainers[0]), factors(trainers[1])
    assert set(first) == {
        f"{name}/{key}"
        for name in (
            "embedding/out",
            *(f"lstm.l{layer}/{side}" for layer in (0, 1) for side in ("in", "out")),
            *(f"{linear}/{side}" for linear in ("softmax",) for side in ("in", "out")),
            *(f"projection/{side}" for side in ("in", "out")),
        )
        for key in ("W", "d", "rho", "t")
    }
    assert not np.array_equal(first["lstm.l0/in/W"], second["lstm.l0/in/W"])
    assert first["lstm.l1/out/t"] == 20


@pytest.mark.long
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_learns_with_it(run, name):
    sections = {**NATURAL, "strategy": SETTINGS.get(name, {})}
    trainers = run(4, name, steps=30, **sections)
    assert trainers[0].totals.valid_perplexity < 25  # 40 words
    assert all(math.isfinite(t.learner.theta.sum().item()) for t in trainers)
