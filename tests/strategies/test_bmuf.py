"""Block momentum: the filter against slow references, the strategy against others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpilm.config import read_config, resolve
from mpilm.errors import ConfigError
from mpilm.strategies.bmuf import due, filter_
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from tests.strategies.fleets import LAYOUT, P, fleet, thetas

NOISY = {"noise": 0.5, "momentum": 0.5}
PRESET = Path(__file__).parents[2] / "jobs/configs/diloco.toml"


def drifts(blocks, seed=1):
    return np.random.default_rng(seed).standard_normal((blocks, P))


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_filter_follows_the_papers_equations(nesterov):
    eta, zeta = 0.6, 1.3
    model = np.zeros(P, np.float32)
    delta = np.zeros(P, np.float32)
    start = np.zeros(P, np.float32)
    W, W_g, Delta = np.zeros(P), np.zeros(P), np.zeros(P)
    for drift in drifts(10):
        start += drift.astype(np.float32)  # now Wbar
        filter_(model, delta, start, eta=eta, zeta=zeta, nesterov=nesterov)
        Wbar = W_g + drift
        G = Wbar - W_g
        Delta = eta * Delta + zeta * G
        W = W + Delta
        W_g = W + eta * Delta if nesterov else W
        np.testing.assert_allclose(model, W, atol=2e-5)
        np.testing.assert_allclose(delta, Delta, atol=2e-5)
        np.testing.assert_allclose(start, W_g, atol=2e-5)


def test_nesterov_start_points_are_those_of_torchs_nesterov_sgd():
    torch = pytest.importorskip("torch")
    eta, zeta = 0.9, 0.7
    outer = torch.zeros(P, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([outer], lr=zeta, momentum=eta, nesterov=True)
    model, delta, start = np.zeros(P), np.zeros(P), np.zeros(P)
    for drift in drifts(12):
        outer.grad = torch.from_numpy(-drift)
        optimizer.step()
        start += drift
        filter_(model, delta, start, eta=eta, zeta=zeta, nesterov=True)
        np.testing.assert_allclose(start, outer.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize(("eta", "zeta"), [(0.5, 1.0), (0.75, 0.8), (0.0, 1.5)])
def test_constant_drift_comes_to_its_steady_step(eta, zeta):
    drift = drifts(1)[0]
    model, delta, start = np.zeros(P), np.zeros(P), np.zeros(P)
    for _ in range(200):
        start += drift
        filter_(model, delta, start, eta=eta, zeta=zeta, nesterov=False)
    np.testing.assert_allclose(delta, zeta * drift / (1.0 - eta), rtol=1e-9)


@pytest.mark.parametrize("momentum", ["classical", "nesterov"])
@pytest.mark.parametrize("plain", [{"eta": 0.0}, {"warmup": 9}])
def test_without_a_filter_it_is_model_averaging_to_the_bit(momentum, plain):
    settings = {"period": 4, "momentum": momentum, **plain}
    filtered = fleet("bmuf", 3, steps=34, learner=NOISY, **settings)
    averaged = fleet("model_averaging", 3, steps=34, learner=NOISY, period=4)
    assert np.array_equal(thetas(filtered), thetas(averaged))


def test_after_the_warmup_it_is_filtered():
    warm = fleet("bmuf", 3, steps=16, period=4, warmup=3)
    averaged = fleet("model_averaging", 3, steps=16, period=4)
    assert not np.array_equal(thetas(warm), thetas(averaged))


def test_eta_is_automatically_one_less_one_over_the_ranks():
    automatic = fleet("bmuf", 4, period=3)
    given = fleet("bmuf", 4, period=3, eta=0.75)
    assert np.array_equal(thetas(automatic), thetas(given))


@pytest.mark.parametrize("momentum", ["classical", "nesterov"])
def test_the_final_model_is_the_filtered_one_not_the_look_ahead(momentum):
    ranks = fleet("bmuf", 2, steps=15, period=5, momentum=momentum)
    seen = ranks[0].strategy
    assert np.array_equal(ranks[0].final, seen.model)
    ahead = seen.eta * seen.delta if momentum == "nesterov" else 0.0
    np.testing.assert_allclose(ranks[0].learner.theta, seen.model + ahead, atol=1e-6)
    assert np.abs(seen.delta).max() > 1e-3


@pytest.mark.parametrize("period", [1, 2, 3, 7, 20])
def test_staggering_covers_every_component_once_in_a_period(period):
    covered = {step: [] for step in range(1, 3 * period + 1)}
    now = {"step": 0}

    def watch(chosen, learner):
        gradient = learner.gradient

        def counted(ready=None):
            now["step"] = learner.samples + 1
            return gradient(ready)

        learner.gradient = counted
        if chosen.world.rank == 0:
            chosen.on_synchronised = lambda where, model: covered[now["step"]].append(
                where
            )

    fleet("bmuf", 2, steps=3 * period, period=period, stagger=True, watch=watch)
    for first in (period, period + 1, 2 * period + 1):
        count = np.zeros(P, int)
        for step in range(first, first + period):
            for where in covered[step]:
                count[where] += 1
        assert (count == 1).all()
    together = LAYOUT.components["words"]
    for slices in covered.values():
        assert len({where in slices for where in together}) == 1


def test_blocks_end_evenly_spread():
    ends = [len(due(step, 12, 4, stagger=True)) for step in range(1, 13)]
    assert ends == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1]


def test_a_momentum_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"eta: -0\.5 is neither"):
        resolve({"strategy": {"name": "bmuf", "eta": -0.5}})


def test_the_diloco_preset_is_adamw_inside_and_nesterov_outside():
    config = read_config(PRESET)
    assert config.optim.name == "adamw"
    assert config.strategy.name == "bmuf"
    assert config.strategy.settings.momentum == "nesterov"
    assert config.strategy.settings.eta == 0.9
    assert config.strategy.settings.zeta == 0.7


def test_a_slow_rank_slows_all():
    settings = {"machine": Machine(step_s=1.0), "faults": Faults(slow={"0": 10.0})}
    ranks = fleet("bmuf", 16, steps=40, period=10, **settings)
    for rank in ranks:
        assert rank.seconds == pytest.approx(400.0, rel=0.01)
