"""Every strategy against the same battery; the table is in cases.py."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.strategies import STRATEGIES
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from tests.strategies.cases import CASES
from tests.strategies.fleets import LAYOUT, P, fleet, targets, thetas

NOISY = {"noise": 0.5, "momentum": 0.5}
ROUNDING = 2e-5  # absolute, on models of size 1: float32 against float64
SIZES = (2, 3, 4, 7)
# times are binary fractions: an addition of two of them is exact, whatever the clock
EXACT_TIMES = Machine(
    step_s=0.25, latency_s=2**-16, bandwidth_Bps=2.0**30, node_latency_s=2**-17
)

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def those(**facts):
    """Return the mark of the cases with these facts."""
    found = {
        name: case
        for name, case in CASES.items()
        if all(getattr(case, fact) == value for fact, value in facts.items())
    }
    return pytest.mark.parametrize("case", found.values(), ids=list(found))


def test_every_strategy_has_a_case():
    assert {case.name for case in CASES.values()} == set(STRATEGIES)
    for name in STRATEGIES:
        assert name in CASES


@every_case
def test_one_rank_is_local_to_the_bit(case):
    settings = {k: v for k, v in case.of(1).items() if k not in ("eta", "zeta")}
    (one,) = fleet(case.name, 1, learner=NOISY, **settings)
    (alone,) = fleet("local", 1, learner=NOISY)
    assert np.array_equal(one.learner.theta, alone.learner.theta)
    assert (one.bytes_sent, one.bytes_received) == (0, 0)


@pytest.mark.parametrize("size", SIZES)
@those(follows=True)
def test_ten_rounds_are_the_matrix_reference(case, size):
    steps = 10 * case.of(size).get("period", 1)
    ranks = fleet(case.name, size, steps=steps, **case.of(size))
    first = np.stack([rank.first for rank in ranks]).astype(np.float64)
    models, final = case.reference(first, targets(ranks), steps, size)
    np.testing.assert_allclose(thetas(ranks), models, rtol=0, atol=ROUNDING)
    for rank in ranks:
        np.testing.assert_allclose(rank.final, final, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("size", SIZES)
@those(mixes=True)
def test_mixing_is_a_doubly_stochastic_matrix(case, size):
    """From the unit vectors without gradients: the models are the matrix."""
    still = {"learner": {"lr": 0.0}, "scatter": np.eye(size, P, dtype=np.float32)}
    pace = {"machine": Machine(jitter=0.9), "faults": Faults(slow={"0": 7.0})}
    ranks = fleet(case.name, size, steps=7, **still, **pace, **case.of(size))
    realised = thetas(ranks).astype(np.float64)
    np.testing.assert_allclose(realised[:, :size].sum(axis=0), 1.0, atol=1e-6)
    np.testing.assert_allclose(realised[:, :size].sum(axis=1), 1.0, atol=1e-6)
    assert np.abs(realised[:, :size] - np.eye(size)).max() > 0.1
    if case.exact:
        assert realised.min() >= 0.0


@pytest.mark.parametrize("size", SIZES)
@every_case
def test_bytes_are_as_declared(case, size):
    steps = 4 * case.of(size).get("period", 1)
    for rank in fleet(case.name, size, steps=steps, **case.of(size)):
        found = (rank.bytes_sent, rank.bytes_received)
        assert found == case.moved(rank, size, steps)
        declared = rank.strategy.moved_bytes(LAYOUT)
        assert declared in (None, found)


@pytest.mark.long
@every_case
def test_the_mean_model_reaches_the_mean_minimum(case):
    lr, steps, near = case.minimum
    ranks = fleet(case.name, 6, steps=steps, learner={"lr": lr}, **case.of(6))
    minimum = targets(ranks).mean(axis=0)
    for rank in ranks:
        np.testing.assert_allclose(rank.final, minimum, rtol=0, atol=near)


@pytest.mark.parametrize("save_at", [6, 7])
@every_case
def test_resumed_is_uninterrupted_to_the_bit(case, save_at):
    """Out of lockstep where time is exact: there all keep in step afterwards."""
    settings = {"steps": 20, "learner": NOISY, "machine": EXACT_TIMES}
    settings |= case.of(4)
    whole = fleet(case.name, 4, save_at=save_at, **settings)
    resumed = fleet(case.name, 4, resume=whole, **settings)
    assert np.array_equal(thetas(resumed), thetas(whole))
    for one, other in zip(whole, resumed, strict=True):
        assert np.array_equal(one.final, other.final)
        counts, again = one.strategy.metrics(), other.strategy.metrics()
        for name, value in counts.items():
            np.testing.assert_array_equal(again[name], value)
        kept, again = one.strategy.state(), other.strategy.state()
        assert kept.keys() == again.keys()
        for name, value in kept.items():
            np.testing.assert_array_equal(again[name], value)


@those(exact=True)
def test_saving_and_synchronising_change_nothing(case):
    settings = {"steps": 20, "learner": NOISY, **case.of(4)}
    plain = fleet(case.name, 4, **settings)
    parted = fleet(case.name, 4, parts=3, save_at=7, **settings)
    assert np.array_equal(thetas(plain), thetas(parted))
    assert np.array_equal(plain[0].final, parted[0].final)


@pytest.mark.long
@pytest.mark.parametrize("retire", [True, False])
@those(exact=False)
def test_ranks_that_synchronised_go_on_and_reach_the_minimum(case, retire):
    lr, steps, _ = case.minimum
    settings = {"learner": {"lr": lr}, "steps": steps, **case.of(4)}
    ranks = fleet(case.name, 4, parts=3, retire=retire, **settings)
    minimum = targets(ranks).mean(axis=0)
    for rank in ranks:
        assert rank.learner.samples == steps
        np.testing.assert_allclose(rank.final, minimum, rtol=0, atol=0.1)


@those(exact=True)
def test_time_changes_no_bit(case):
    settings = {"steps": 12, "learner": NOISY, **case.of(6)}
    even = fleet(case.name, 6, **settings)
    machine = Machine(jitter=1.0, latency_s=0.1, eager_bytes=0, bandwidth_Bps=1e3)
    faults = Faults(slow={"0": 30.0, "3": 4.0})
    odd = fleet(case.name, 6, machine=machine, faults=faults, **settings)
    assert np.array_equal(thetas(even), thetas(odd))
