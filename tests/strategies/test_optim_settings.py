"""No setting of [optim] is silently ignored: each changes what every strategy makes."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import nn

from mpilm.convert import Choice, fields_of
from mpilm.data.batch import Batch
from mpilm.learner.learner import Learner
from mpilm.optim.build import build_optimizer
from mpilm.optim.configs import OPTIMIZERS
from mpilm.strategies import STRATEGIES, strategy
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual

STEPS = 6
LITTLE = ("async_sgd", "adpsgd")  # of ng_sgd, which has many settings
# optimiser -> settings that all its runs have; setting -> (another value, with what)
BASES = {
    "sgd": {"lr": 0.2, "clip": 0.0},
    "adamw": {"lr": 0.02, "clip": 0.0},
    "muon": {"lr": 0.02, "clip": 0.0},
    "ng_sgd": {"lr": 0.2, "rank_in": 3, "rank_out": 2, "update_period": 1},
}
CHANGES = {
    "sgd": {
        "lr": (0.1, {}),
        "momentum": (0.9, {}),
        "nesterov": (True, {"momentum": 0.9}),
        "weight_decay": (0.1, {}),
        "clip": (1e-3, {}),
    },
    "adamw": {
        "lr": (0.01, {}),
        "beta1": (0.5, {}),
        "beta2": (0.9, {}),
        "eps": (0.1, {}),
        "weight_decay": (0.5, {}),
        "clip": (1e-3, {}),
    },
    "muon": {
        "lr": (0.01, {}),
        "momentum": (0.5, {}),
        "beta1": (0.5, {}),
        "beta2": (0.9, {}),
        "eps": (0.1, {}),
        "weight_decay": (0.5, {}),
        "clip": (1e-3, {}),
    },
    "ng_sgd": {
        "lr": (0.1, {"max_change": "none"}),
        "rank_in": (1, {}),
        "rank_out": (1, {}),
        "alpha": (0.1, {}),
        "num_samples_history": (20.0, {}),
        "update_period": (2, {}),
        "summed": (True, {"max_change": "none"}),
        "max_change": ("none", {"max_change_map": 1e-3}),
        "max_change_per_sample": (1e-4, {"max_change": "nnet2"}),
        "max_change_map": (1e-3, {}),
        "max_change_all": (1e-3, {}),
    },
}
SETTINGS = {
    "model_averaging": {"period": 2},
    "bmuf": {"period": 2},
    "gossip_bmuf": {"period": 2, "group_size": 2},
    "eager_diloco": {"period": 2},
    "hierarchical": {"node_size": 1, "inner": "async_sgd"},
}


class Points:
    """Minibatches of points in 8 dimensions, of 5 classes; a rank's own."""

    num_dropped = 0

    def __init__(self, rank):
        self.random = np.random.default_rng(rank)

    def next(self):
        x = self.random.normal(size=(10, 8)).astype(np.float32)
        return Batch(x, self.random.integers(0, 5, 10), 10, False)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch.inputs), batch.targets)


def make_learner(world, name, settings):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    choice = Choice(name, OPTIMIZERS[name](**settings))
    optimizer = build_optimizer(choice, model)
    points = Points(world.rank)
    return Learner(model, points, optimizer, loss=loss, compute=world.compute)


def train(method, steps, name, settings):
    """Return the final model of `steps` of every rank by a strategy."""

    def main(world):
        learner = make_learner(world, name, settings)
        chosen = strategy(method, world, **SETTINGS.get(method, {}))
        chosen.require(learner)
        chosen.start(learner)
        for _ in range(steps[world.rank]):
            chosen.step(learner)
        chosen.retire(learner)
        chosen.finish(learner)
        final = learner.theta.clone()
        chosen.final_model_(learner, final)
        return final.numpy()

    machine = Machine(step_s=0.25, latency_s=2**-10)
    return run_virtual(main, len(steps), machine=machine)[0]


@cache
def of_both(method, name, settings, steps=STEPS):
    return train(method, (steps, steps), name, dict(settings))


def frozen(settings):
    return tuple(sorted(settings.items()))


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "name", "setting"),
    [
        (method, name, setting)
        for name, changes in CHANGES.items()
        for setting in changes
        for method in (LITTLE if name == "ng_sgd" else STRATEGIES)
    ],
)
def test_every_setting_changes_what_every_strategy_makes(method, name, setting):
    value, beside = CHANGES[name][setting]
    without = {**BASES[name], **beside}
    steps = 14 if setting == "update_period" else STEPS  # the first 10 always update
    find = partial(of_both, method, name, steps=steps)
    before, after = find(frozen(without)), find(frozen({**without, setting: value}))
    assert np.abs(after - before).max() > 1e-5


def test_no_setting_is_left_out():
    for name, config in OPTIMIZERS.items():
        assert set(CHANGES[name]) == set(fields_of(config))


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", STRATEGIES)
def test_every_optimizer_differs_from_plain_sgd(method, name):
    changed = {"momentum": 0.9} if name == "sgd" else {}
    found = of_both(method, name, frozen({**BASES[name], **changed}))
    plain = of_both(method, "sgd", frozen(BASES["sgd"]))
    assert np.abs(found - plain).max() > 1e-3


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name, changes in CHANGES.items() for setting in changes],
)
def test_async_sgd_takes_the_steps_of_the_optimizer(name, setting):
    """One of two ranks trains: what it pushes makes the model of one rank alone."""
    value, beside = CHANGES[name][setting]
    settings = {**BASES[name], **beside, setting: value}
    alone = train("local", (STEPS,), name, settings)
    pushed = train("async_sgd", (STEPS, 0), name, settings)
    np.testing.assert_allclose(pushed, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (partial(torch.optim.SGD, lr=0.1), True),
        (partial(torch.optim.SGD, lr=0.1, fused=True), True),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.5), False),
        (partial(torch.optim.SGD, lr=0.1, weight_decay=0.5), False),
        (partial(torch.optim.SGD, lr=0.1, maximize=True), False),
        (partial(torch.optim.AdamW, lr=0.1), False),
        (partial(torch.optim.ASGD, lr=0.1), False),
    ],
)
def test_what_is_plain_sgd(make, plain):
    learner = Learner(nn.Linear(8, 5), Points(0), make, loss=loss)
    assert learner.is_plain_sgd == plain


def test_hooks_and_rates_of_their_own_are_not_plain_sgd():
    def rates(parameters):
        groups = [{"params": [p], "lr": 0.1 + i} for i, p in enumerate(parameters)]
        return torch.optim.SGD(groups)

    learner = Learner(nn.Linear(8, 5), Points(0), rates, loss=loss, flat=False)
    assert not learner.is_plain_sgd
    for hook in "register_step_pre_hook", "register_step_post_hook":
        sgd = partial(torch.optim.SGD, lr=0.1)
        learner = Learner(nn.Linear(8, 5), Points(0), sgd, loss=loss)
        remove = getattr(learner.optimizer, hook)(lambda *_: None)
        assert not learner.is_plain_sgd
        remove.remove()
        assert learner.is_plain_sgd
