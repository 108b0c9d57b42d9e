"""Block momentum: the filter against slow references, the strategy against others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpilm.config import read_config, resolve
from mpilm.errors import CheckpointError, ConfigError
from mpilm.strategies.block_momentum import BlockMomentum
from mpilm.strategies.blocks import due
from mpilm.testing.check import lost_mass
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from tests.strategies.fleets import LAYOUT, P, fleet, targets, thetas
from tests.strategies.references import blocks

NOISY = {"noise": 0.5, "momentum": 0.5}
PRESET = Path(__file__).parents[2] / "jobs/configs/diloco.toml"


def reference(size, *, steps, **settings):
    """Return all models and the final model, in float64, from the equations."""
    first = fleet("local", size, steps=0)
    settings = {"group_size": size, "eta": 1.0 - 1.0 / size, **settings}
    return blocks(thetas(first).astype(np.float64), targets(first), steps, **settings)


def drifts(blocks, seed=1):
    return np.random.default_rng(seed).standard_normal((blocks, P))


def block_momentum(dtype=np.float64, **settings):
    """Return a filter that begins at zero."""
    return BlockMomentum(np.zeros(P, dtype), **settings)


@pytest.mark.parametrize("momentum", ["classical", "nesterov"])
def test_the_filter_follows_the_papers_equations(momentum):
    eta, zeta = 0.6, 1.3
    block = block_momentum(np.float32, eta=eta, zeta=zeta, momentum=momentum)
    wbar, model = np.zeros(P, np.float32), np.zeros(P, np.float32)
    W, W_g, Delta = np.zeros(P), np.zeros(P), np.zeros(P)
    for drift in drifts(10):
        wbar += drift.astype(np.float32)
        for where in (slice(0, 7), slice(7, P)):
            block.filter_(where, wbar[where])
        Wbar = W_g + drift
        G = Wbar - W_g
        Delta = eta * Delta + zeta * G
        W = W + Delta
        W_g = W + eta * Delta if momentum == "nesterov" else W
        block.model_(model)
        np.testing.assert_allclose(model, W, atol=2e-5)
        np.testing.assert_allclose(block.delta, Delta, atol=2e-5)
        np.testing.assert_allclose(wbar, W_g, atol=2e-5)
        assert np.array_equal(block.start_point, wbar)


def test_nesterov_start_points_are_those_of_torchs_nesterov_sgd():
    torch = pytest.importorskip("torch")
    eta, zeta = 0.9, 0.7
    outer = torch.zeros(P, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([outer], lr=zeta, momentum=eta, nesterov=True)
    block, start = block_momentum(eta=eta, zeta=zeta, momentum="nesterov"), np.zeros(P)
    for drift in drifts(12):
        outer.grad = torch.from_numpy(-drift)
        optimizer.step()
        start += drift
        block.filter_(slice(None), start)
        np.testing.assert_allclose(start, outer.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize(("eta", "zeta"), [(0.5, 1.0), (0.75, 0.8), (0.0, 1.5)])
def test_constant_drift_comes_to_its_steady_step(eta, zeta):
    drift = drifts(1)[0]
    block, start = block_momentum(eta=eta, zeta=zeta, momentum="classical"), np.zeros(P)
    for _ in range(200):
        start += drift
        block.filter_(slice(None), start)
    np.testing.assert_allclose(block.delta, zeta * drift / (1.0 - eta), rtol=1e-9)


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
    expected, final = reference(2, steps=15, period=5, momentum=momentum)
    np.testing.assert_allclose(ranks[0].final, final, atol=2e-6)
    np.testing.assert_allclose(ranks[0].learner.theta, expected[0], atol=2e-6)
    apart = np.abs(ranks[0].learner.theta - ranks[0].final).max()
    assert apart > 1e-3 if momentum == "nesterov" else apart == 0.0


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


def test_the_streaming_preset_is_diloco_in_turn_and_under_way():
    config = read_config(PRESET.with_name("streaming_diloco.toml"))
    diloco = read_config(PRESET)
    assert config.optim == diloco.optim
    settings = config.strategy.settings
    plain = replace(settings, stagger=False, delay=0, wire="float32")
    assert plain == diloco.strategy.settings
    assert settings.stagger
    assert settings.delay == 5
    assert settings.wire == "int4"


def test_a_slow_rank_slows_all():
    settings = {"machine": Machine(step_s=1.0), "faults": Faults(slow={"0": 10.0})}
    ranks = fleet("bmuf", 16, steps=40, period=10, **settings)
    for rank in ranks:
        assert rank.seconds == pytest.approx(400.0, rel=0.01)


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": "classical", "zeta": 0.8},
        {"eta": 0.0},
        {"warmup": 4},
    ],
)
def test_with_a_delay_it_follows_the_equations(settings, stagger):
    settings = {"period": 5, "delay": 3, "stagger": stagger, **settings}
    parts = {"components": "layers"} if stagger else {}
    ranks = fleet("bmuf", 3, steps=52, **settings)  # the last mean is not applied
    expected, final = reference(3, steps=52, **settings, **parts)
    np.testing.assert_allclose(thetas(ranks), expected, atol=5e-5)
    for rank in ranks:
        np.testing.assert_allclose(rank.final, final, atol=5e-5)


def test_a_delay_hides_the_reduction_behind_computing():
    machine = Machine(step_s=1.0, bandwidth_Bps=120.0)  # 2 s for a reduction
    settings = {"period": 5, "steps": 30, "machine": machine}
    blocking = fleet("bmuf", 4, **settings)
    hidden = fleet("bmuf", 4, delay=4, **settings)
    assert blocking[0].seconds > 40.0
    assert hidden[0].seconds == pytest.approx(30.0, rel=0.01)
    assert hidden[0].bytes_sent == blocking[0].bytes_sent


def test_bytes_are_counted_part_by_part():
    """Staggered, a component is reduced before the first period is over."""
    for steps in range(1, 9):
        for rank in fleet("bmuf", 3, steps=steps, period=4, stagger=True):
            found = (rank.bytes_sent, rank.bytes_received)
            assert rank.strategy.moved_bytes(LAYOUT) == found
            assert found[0] > 0


@pytest.mark.parametrize("save_at", [7, 8, 9])
@pytest.mark.parametrize("name", ["bmuf", "gossip_bmuf"])
def test_a_resumed_run_with_another_period_loses_nothing(name, save_at):
    """What began at step 6 is to be applied at 10; now a block ends at 9."""
    settings = {"steps": 20, "learner": NOISY}
    long = {"period": 6, "delay": 4, **settings}
    short = {"period": 3, "delay": 2, **settings}
    saved = fleet(name, 4, save_at=save_at, **long)
    ranks = fleet(name, 4, resume=saved, **short)
    assert lost_mass(ranks) == 0.0


@pytest.mark.parametrize(
    ("name", "before", "after", "text"),
    [
        ("gossip_bmuf", {"filter": False}, {}, "lacks momentum/delta"),
        ("gossip_bmuf", {}, {"filter": False}, "has momentum/delta"),
        ("gossip_bmuf", {}, {"delay": 2}, "lacks applies_at"),
        ("gossip_bmuf", {"delay": 2}, {}, "has applies_at"),
        ("gossip_bmuf", {"delay": 2}, {"delay": 2, "components": 4}, "has shape"),
        ("bmuf", {}, {"delay": 2}, "lacks applies_at"),
        ("bmuf", {"delay": 2}, {}, "has applies_at"),
        ("bmuf", {"delay": 2}, {"delay": 2, "stagger": True}, "has shape"),
    ],
)
def test_resumed_with_what_was_not_saved_is_refused(name, before, after, text):
    saved = fleet(name, 4, period=5, save_at=7, **before)
    with pytest.raises(CheckpointError, match=text) as error:
        fleet(name, 4, period=5, resume=saved, **after)
    assert f"strategy {name}: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("bmuf", {}, {"stagger": True}),
        ("bmuf", {}, {"eta": 0.0, "period": 3}),
        ("bmuf", {"momentum": "classical"}, {}),
        ("gossip_bmuf", {}, {"components": "whole", "group_size": 4}),
        ("gossip_bmuf", {"mix": "models"}, {"mix": "momenta"}),
        ("gossip_bmuf", {"delay": 2}, {"delay": 4}),
    ],
)
def test_resumed_with_what_was_saved_goes_on(name, before, after):
    settings = {"period": 5, "learner": {"lr": 0.05}}
    saved = fleet(name, 4, save_at=7, **{**settings, **before})
    ranks = fleet(name, 4, resume=saved, steps=300, **{**settings, **after})
    minimum = targets(ranks).mean(axis=0)
    for rank in ranks:
        np.testing.assert_allclose(rank.final, minimum, atol=0.02)
