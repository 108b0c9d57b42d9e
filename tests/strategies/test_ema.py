"""The moving average: its value, and that it only looks on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mpilm.errors import CheckpointError, ConfigError
from mpilm.strategies import STRATEGIES
from mpilm.strategies.ema import CHUNK, Ema, EmaConfig, average_
from mpilm.train.run import TrainedModel
from tests.strategies.fleets import LAYOUT, P, fleet, thetas

NOISY = {"noise": 0.5, "momentum": 0.5, "samples_per_step": 3}


def watcher(config, seen=None):
    """Return what attaches an average to a strategy, and keeps the models it sees."""

    def watch(chosen, learner):
        ema = Ema(config, chosen, learner)
        if seen is not None and chosen.world.rank == 0:
            observe = chosen.on_synchronised

            def keep(where, model):
                seen.append((where, np.array(model, np.float64)))
                observe(where, model)

            chosen.on_synchronised = keep
        return ema

    return watch


@pytest.mark.parametrize(
    ("config", "decay"),
    [
        (EmaConfig(syncs=8), 1.0 - 1.0 / 8.0),
        # 3 ranks, 5 steps of 3 samples between two synchronisations
        (EmaConfig(samples=200), math.exp(-45.0 / 200.0)),
    ],
)
def test_value_against_the_closed_form(config, decay):
    seen = []
    ranks = fleet(
        "model_averaging",
        3,
        steps=60,
        period=5,
        learner=NOISY,
        watch=watcher(config, seen),
    )
    models = np.stack([model for _, model in seen])
    count = len(models)
    weights = (1.0 - decay) * decay ** np.arange(count - 1, -1, -1.0)
    expected = weights @ models / (1.0 - decay**count)
    assert count == 12
    assert ranks[0].ema.model.dtype == np.float32
    for rank in ranks:
        np.testing.assert_allclose(rank.ema.model, expected, atol=1e-6)


@pytest.mark.parametrize("config", [EmaConfig(syncs=9), EmaConfig(samples=100)])
def test_the_first_average_is_the_first_model(config):
    seen = []
    ranks = fleet(
        "bmuf", 2, steps=5, period=5, learner=NOISY, watch=watcher(config, seen)
    )
    assert np.array_equal(ranks[0].ema.model, seen[0][1].astype(np.float32))


def test_equal_models_stay_as_they_are():
    model = np.random.default_rng(1).standard_normal(CHUNK + 7).astype(np.float32)
    average, weight = np.zeros_like(model), 0.0
    average[:] = model
    for _ in range(50):
        weight = average_(average, model, weight, 0.999)
    assert np.array_equal(average, model)


def test_a_long_window_loses_no_updates_in_float32():
    decay, count = 0.9999, 3000
    rng = np.random.default_rng(1)
    average, exact, weight, norm = np.zeros(P, np.float32), np.zeros(P), 0.0, 0.0
    for _ in range(count):
        model = (100.0 + rng.standard_normal(P)).astype(np.float32)
        weight = average_(average, model, weight, decay)
        norm = decay * norm + 1.0 - decay
        exact += (1.0 - decay) / norm * (model - exact)
    np.testing.assert_allclose(average, exact, rtol=3e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("allreduce", {}),
        ("model_averaging", {"period": 4}),
        ("bmuf", {"period": 4}),
        ("bmuf", {"period": 4, "stagger": True}),
        ("bmuf", {"period": 4, "delay": 3}),
        ("bmuf", {"period": 4, "delay": 2, "stagger": True}),
        ("gossip_bmuf", {"period": 4}),
        ("gossip_bmuf", {"period": 4, "delay": 2}),
        ("delay_by_one", {}),
    ],
)
def test_training_is_the_same_to_the_bit_with_it_and_without(name, settings):
    config = EmaConfig(syncs=3)
    without = fleet(name, 4, learner=NOISY, **settings)
    averaged = fleet(name, 4, learner=NOISY, watch=watcher(config), **settings)
    assert np.array_equal(thetas(averaged), thetas(without))
    assert np.array_equal(averaged[0].final, without[0].final)
    assert averaged[0].bytes_sent == without[0].bytes_sent
    assert not np.array_equal(averaged[0].ema.model, averaged[0].final)


def test_bmuf_shows_the_filtered_model_not_the_look_ahead():
    seen = []
    config = EmaConfig(syncs=3)
    ranks = fleet("bmuf", 2, steps=20, period=5, watch=watcher(config, seen))
    assert np.array_equal(seen[-1][1], ranks[0].final)
    assert not np.array_equal(seen[-1][1], ranks[0].learner.theta)


def test_parts_that_are_synchronised_apart_are_averaged_apart():
    seen = []
    config = EmaConfig(samples=150)
    ranks = fleet(
        "bmuf", 2, steps=30, period=6, stagger=True, watch=watcher(config, seen)
    )
    for number, slices in enumerate(LAYOUT.components.values()):
        first = 2 * (number * 6 // 3 or 6)  # samples of 2 ranks in the first block
        for where in slices:
            models = [model for part, model in seen if part == where]
            lengths = [first] + [2 * 6] * (len(models) - 1)
            weights, left = [], 1.0
            for length in reversed(lengths):
                decay = math.exp(-length / 150.0)
                weights.insert(0, left * (1.0 - decay))
                left *= decay
            expected = np.average(models, axis=0, weights=weights)
            assert len(models) == 5
            np.testing.assert_allclose(ranks[0].ema.model[where], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bmuf", {}),
        ("bmuf", {"stagger": True}),
        ("bmuf", {"delay": 4}),
        ("bmuf", {"delay": 4, "stagger": True}),
        ("gossip_bmuf", {"delay": 4}),
        ("gossip_bmuf", {"delay": 4, "filter": False}),
    ],
)
def test_resumed_is_uninterrupted_to_the_bit(name, settings):
    """With a delay it is saved between a block's end and what comes of it."""
    watch = watcher(EmaConfig(samples=50))
    settings = {"steps": 25, "period": 6, "learner": NOISY, **settings}
    untouched = fleet(name, 3, watch=watch, **settings)
    whole = fleet(name, 3, save_at=13, watch=watch, **settings)
    resumed = fleet(name, 3, resume=whole, watch=watch, **settings)
    assert np.array_equal(whole[1].ema.model, untouched[1].ema.model)
    assert np.array_equal(resumed[1].ema.model, whole[1].ema.model)


def test_a_strategy_that_never_synchronises_is_refused():
    with pytest.raises(ConfigError, match="local has no synchronised model") as error:
        fleet("local", 2, watch=watcher(EmaConfig(syncs=3)))
    assert "\n" not in str(error.value)
    assert not STRATEGIES["local"].synchronises


def test_a_window_is_in_samples_or_in_synchronisations():
    with pytest.raises(ValueError, match="one or the other"):
        EmaConfig(samples=1, syncs=1)
    assert not EmaConfig().on
    assert EmaConfig(syncs=1).decay(0) == 0.0


@pytest.mark.long
@pytest.mark.parametrize("name", ["bmuf", "gossip_bmuf"])
def test_the_trainer_keeps_evaluates_and_resumes_it(run, name):
    sections = {"strategy": {"period": 5}, "optim": {"name": "adamw", "lr": 0.01}}
    train = {"samples": 24 * 2 * 40, "valid_every": 8 * 2 * 40}
    without = run(2, name, train=train, **sections)
    sections["ema"] = {"samples": 600}
    whole = run(2, name, out="whole", train=train, **sections)
    sections["checkpoint"] = {"every": 13 * 2 * 40}
    run(2, name, out="parts", train=train, **sections)
    folder = whole[0].folder.path.parent / "parts"
    newest = max((folder / "checkpoints").iterdir())
    for path in newest.iterdir():  # drop the last one: the one in the middle is left
        path.unlink()
    newest.rmdir()
    resumed = run(2, name, out="parts", resume=True, train=train, **sections)
    assert np.array_equal(whole[0].learner.theta, without[0].learner.theta)
    for rank in range(2):
        assert np.array_equal(resumed[rank].learner.theta, whole[rank].learner.theta)
        assert np.array_equal(resumed[rank].ema.model, whole[rank].ema.model)
    summary = json.loads(whole[0].folder.summary.read_text())
    for split in ("valid", "test"):
        average, raw = (
            summary[f"ema_{split}_perplexity"],
            summary[f"{split}_perplexity"],
        )
        assert math.isfinite(average)
        assert average != raw
    average = TrainedModel.read(folder, ema=True).theta_P
    mean = (whole[0].ema.model + whole[1].ema.model) / 2
    np.testing.assert_allclose(average, mean, atol=1e-6)
    with pytest.raises(CheckpointError, match="no moving average"):
        TrainedModel.read(without[0].folder.path, ema=True)
