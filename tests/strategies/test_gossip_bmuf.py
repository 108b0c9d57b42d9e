"""Gossip block momentum against explicit group matrices, and its special cases."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.errors import ConfigError
from mpilm.strategies.blocks import cut
from mpilm.strategies.topology import random_groups
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from tests.strategies.fleets import LAYOUT, P, fleet, targets, thetas
from tests.strategies.references import blocks

NOISY = {"noise": 0.5, "momentum": 0.5}
ONE_BY_ONE = Machine(eager_bytes=0)  # a message is sent only once it is received


def reference(size, *, steps, **settings):
    """Return all models and the final model, in float64, from the equations."""
    ranks = fleet("local", size, steps=0)
    return blocks(thetas(ranks).astype(np.float64), targets(ranks), steps, **settings)


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize(
    ("size", "group_size", "components", "variant"),
    [
        (4, 2, "layers", ("nesterov", "starts")),
        (4, 2, "layers", ("classical", "starts")),
        (6, 3, "layers", ("nesterov", "momenta")),
        (5, 2, 7, ("classical", "momenta")),
        (7, 3, 3, ("nesterov", "models")),
        (4, 3, "whole", ("classical", "models")),
    ],
)
def test_ten_rounds_against_group_matrices(
    size, group_size, components, variant, delay
):
    momentum, mix = variant
    settings = {"period": 4, "group_size": group_size, "components": components}
    settings |= {"eta": 0.4, "zeta": 1.1, "mix": mix, "delay": delay}
    ranks = fleet("gossip_bmuf", size, steps=43, momentum=momentum, **settings)
    expected, final = reference(size, steps=43, momentum=momentum, **settings)
    np.testing.assert_allclose(thetas(ranks), expected, atol=5e-5)
    for rank in ranks:
        np.testing.assert_allclose(rank.final, final, atol=5e-5)


@pytest.mark.parametrize("delay", [0, 3])
def test_without_the_filter_it_averages_in_groups(delay):
    settings = {"period": 4, "group_size": 2, "components": "layers", "delay": delay}
    ranks = fleet("gossip_bmuf", 4, steps=40 + delay, filter=False, **settings)
    expected, final = reference(4, steps=40 + delay, filter=False, eta=0.0, **settings)
    np.testing.assert_allclose(thetas(ranks), expected, atol=1e-5)
    np.testing.assert_allclose(ranks[0].final, final, atol=1e-5)


@pytest.mark.parametrize("momentum", ["classical", "nesterov"])
@pytest.mark.parametrize("components", ["whole", "layers"])
def test_one_group_of_all_ranks_is_bmuf(momentum, components):
    settings = {"period": 5, "momentum": momentum, "steps": 50, "learner": NOISY}
    gossip = fleet("gossip_bmuf", 4, group_size=4, components=components, **settings)
    blocks = fleet("bmuf", 4, **settings)
    np.testing.assert_allclose(thetas(gossip), thetas(blocks), atol=2e-5)
    np.testing.assert_allclose(gossip[0].final, blocks[0].final, atol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"delay": 2}, {"filter": False}])
def test_one_rank_is_local_to_the_bit(settings):
    one = fleet("gossip_bmuf", 1, learner=NOISY, period=3, **settings)
    local = fleet("local", 1, learner=NOISY)
    assert np.array_equal(thetas(one), thetas(local))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"group_size": 5}, "groups of 5 cannot be made of 4 ranks: at most 4"),
        ({"components": 41}, "41 slices of 40 parameters: at most 40"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, text):
    with pytest.raises(ConfigError, match=text) as error:
        fleet("gossip_bmuf", 4, **settings)
    assert "\n" not in str(error.value)


def test_tied_weights_are_in_one_component():
    words = LAYOUT.components["words"]
    assert len(words) == 2
    assert words in cut(LAYOUT, "layers")


@pytest.mark.parametrize("components", ["layers", "whole", 1, 6, 40])
def test_components_cover_the_model_once(components):
    count = np.zeros(P, int)
    for slices in cut(LAYOUT, components):
        for where in slices:
            count[where] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("save_at", [11, 12, 13, 15])
@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("settings", [{}, {"filter": False}, {"mix": "momenta"}])
def test_resumed_is_uninterrupted_to_the_bit(settings, delay, save_at):
    settings = {"period": 6, "delay": delay, "steps": 25, "learner": NOISY, **settings}
    untouched = fleet("gossip_bmuf", 4, **settings)
    whole = fleet("gossip_bmuf", 4, save_at=save_at, **settings)
    resumed = fleet("gossip_bmuf", 4, resume=whole, **settings)
    assert np.array_equal(thetas(whole), thetas(untouched))
    assert np.array_equal(thetas(resumed), thetas(whole))
    assert np.array_equal(resumed[0].final, whole[0].final)
    counts = [rank.strategy.metrics()["partners"].tolist() for rank in whole]
    again = [rank.strategy.metrics()["partners"].tolist() for rank in resumed]
    assert again == counts


@pytest.mark.long
@pytest.mark.parametrize("machine", [None, ONE_BY_ONE])
@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_no_deadlock_whatever_the_groups_and_the_pace(group_size, machine):
    faults = Faults(slow={"0": 30.0, "3": 4.0})
    settings = {"period": 2, "group_size": group_size, "components": 7}
    slow = fleet("gossip_bmuf", 7, machine=machine, faults=faults, **settings)
    even = fleet("gossip_bmuf", 7, **settings)
    assert np.array_equal(thetas(slow), thetas(even))  # time changes no bit


def test_a_slow_rank_delays_its_partners_only():
    period, slow = 4, 0
    settings = {"period": period, "components": "whole", "steps": period}
    machine = Machine(step_s=1.0)
    ranks = fleet(
        "gossip_bmuf", 6, machine=machine, faults=Faults(slow={"0": 10.0}), **settings
    )
    group = next(g for g in random_groups(1, 1, 0, 6, 2) if slow in g)
    for number, rank in enumerate(ranks):
        pace = 10.0 if number in group else 1.0
        assert rank.seconds == pytest.approx(pace * period, rel=0.05)


def test_a_delay_hides_the_messages_behind_computing():
    machine = Machine(step_s=1.0, bandwidth_Bps=160.0)  # about 2 s to exchange 8P bytes
    settings = {"period": 5, "components": "whole", "steps": 30, "machine": machine}
    blocking = fleet("gossip_bmuf", 4, **settings)
    hidden = fleet("gossip_bmuf", 4, delay=4, **settings)
    assert blocking[0].seconds > 40.0
    assert hidden[0].seconds == pytest.approx(30.0, rel=0.01)


def test_partners_are_counted_and_symmetric():
    ranks = fleet("gossip_bmuf", 5, steps=20, period=2, components=3)
    metrics = [rank.strategy.metrics() for rank in ranks]
    partners = np.stack([own["partners"] for own in metrics])
    assert np.array_equal(partners, partners.T)
    assert (np.diag(partners) == 0).all()
    assert partners.sum() >= 5 * 10 * 3
    assert metrics[0]["mixes"] == 10


def copies(strategy):
    """Return how many vectors like theta a strategy holds beside it."""
    held = [strategy.snapshot, strategy.wbar]
    if strategy.momentum is not None:
        held += [strategy.momentum.start_point, strategy.momentum.delta]
    for inbox in getattr(strategy, "inboxes", []):
        held += inbox
    different = {vector.ctypes.data: len(vector) for vector in held}
    return sum(different.values()) / P


@pytest.mark.parametrize(
    ("name", "settings", "number"),
    [
        ("bmuf", {}, 2),
        ("bmuf", {"stagger": True}, 2),
        ("bmuf", {"delay": 2}, 4),
        ("gossip_bmuf", {}, 2 + 12 / P),  # the longest slice of a component
        ("gossip_bmuf", {"components": "whole"}, 3),
        ("gossip_bmuf", {"components": "whole", "group_size": 4}, 5),
        ("gossip_bmuf", {"components": "whole", "filter": False}, 1),
        ("gossip_bmuf", {"delay": 2}, 5),
        ("gossip_bmuf", {"delay": 2, "mix": "momenta"}, 6),
        ("gossip_bmuf", {"delay": 2, "filter": False}, 2),
    ],
)
def test_extra_copies_of_the_model_are_those_of_the_headers(name, settings, number):
    for rank in fleet(name, 4, period=4, steps=10, **settings):
        theta = rank.learner.theta
        held = copies(rank.strategy) - (0 if rank.strategy.delay else 1)  # theta itself
        assert held == pytest.approx(number)
        assert (rank.strategy.snapshot is theta) == (not rank.strategy.delay)


def test_delays_spread_through_chains_of_partners():
    settings = {"steps": 40, "period": 10, "machine": Machine(step_s=1.0)}
    settings["faults"] = Faults(slow={"0": 10.0})
    whole = fleet("gossip_bmuf", 16, components="whole", **settings)
    layers = fleet("gossip_bmuf", 16, components="layers", **settings)
    assert sum(rank.seconds < 41.0 for rank in whole) == 8
    assert sum(rank.seconds < 41.0 for rank in layers) == 0
