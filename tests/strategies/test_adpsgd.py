"""adpsgd in the virtual world: it conserves, it never waits, it mixes as T says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.errors import WorldError
from mpilm.learner.quadratic import ProtocolLearner, layers
from mpilm.strategies.adpsgd import Adpsgd, AdpsgdConfig
from mpilm.strategies.topology import mixing_matrix
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual
from tests.strategies.fleets import fleet, targets, thetas
from tests.strategies.schedules import schedule

MIXINGS = ("fixed_ring", "random_ring", "random_pairs")
STEP_S = 0.1
LAYOUT = layers(23)


def consensus(models):
    """Mean squared distance to the mean model."""
    return float(np.mean((models - np.mean(models, axis=0)) ** 2))


def train(size, steps, *, settings=None, machine=None, faults=None, until_s=None, **of):
    """Train quadratics from different models; `of`: options of the learners."""
    return fleet(
        "adpsgd", size, steps=steps, scatter=True, machine=machine, faults=faults,
        until_s=until_s, learner={"layout": LAYOUT, "lr": 0.1, **of},
        **(settings or {}),
    )  # fmt: skip


def firsts(ranks):
    return np.array([rank.first for rank in ranks])


@pytest.mark.parametrize("weight", [0.5, 1 / 3, 0.1])
@pytest.mark.parametrize("pieces", [1, 3])
def test_an_exchange_is_the_2x2_matrix(weight, pieces):
    # credit comes with a step, and that of the last step is not used: one exchange
    ranks = train(2, [2, 0], lr=0.0, settings={"weight": weight, "pieces": pieces})
    matrix = np.array([[1 - weight, weight], [weight, 1 - weight]])
    assert ranks[0].strategy.service.round == 1
    np.testing.assert_allclose(thetas(ranks), matrix @ firsts(ranks), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_a_ring_in_step_mixes_by_the_thirds_of_the_papers(size):
    rounds = 6
    ranks = train(size, rounds + 1, lr=0.0, settings={"mixing": "fixed_ring"})
    matrix = np.linalg.matrix_power(mixing_matrix("fixed_ring", size), rounds)
    np.testing.assert_allclose(thetas(ranks), matrix @ firsts(ranks), atol=1e-6, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_mixing_brings_all_models_together(mixing, size):
    ranks = train(size, 150, lr=0.0, settings={"mixing": mixing})
    assert consensus(thetas(ranks)) < 1e-3 * consensus(firsts(ranks))


@pytest.mark.long
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_mean_model_stays_under_any_delays(seed):
    """Stragglers, jitter, slow links, uneven steps, sync points; learning rate 0."""
    chosen = schedule("adpsgd", seed)
    learner = {**chosen.plan["learner"], "lr": 0.0}
    chosen.plan.update(learner=learner, scatter=True)
    ranks = chosen.run()
    mean = firsts(ranks).mean(axis=0)
    np.testing.assert_allclose(thetas(ranks).mean(axis=0), mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ranks[0].final, mean, rtol=0, atol=1e-6)


def test_two_ranks_in_step_only_swap_with_a_half():
    ranks = train(2, 8, lr=0.0, settings={"weight": 0.5})  # 7 swaps
    np.testing.assert_allclose(thetas(ranks), firsts(ranks)[::-1], atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_mean_model_approaches_the_mean_minimum(mixing):
    ranks = train(
        5, 400, lr=0.02, settings={"mixing": mixing},
        machine=Machine(step_s=STEP_S, jitter=0.5),
    )  # fmt: skip
    target = targets(ranks).mean(axis=0)
    begun = np.abs(firsts(ranks).mean(axis=0) - target).max()
    assert np.abs(ranks[0].final - target).max() < 0.05 * begun


@pytest.mark.long
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_a_straggler_slows_nobody_else(mixing, factor):
    size = 16
    machine = Machine(step_s=STEP_S, latency_s=1e-3, bandwidth_Bps=4 * 23 / 0.01)
    ranks = train(
        size, 10**6, until_s=12.0, settings={"mixing": mixing},
        machine=machine, faults=Faults(slow={"3": factor}), lr=0.0,
    )  # fmt: skip
    rates = [rank.learner.samples / rank.seconds for rank in ranks]
    ideal = (size - 1 + 1 / factor) / STEP_S
    assert sum(rates) >= 0.97 * ideal
    mixes = ranks[3].strategy.metrics()["partners"].sum()
    assert mixes > 60  # it is asked all the same


@pytest.mark.parametrize("pieces", [1, 2])
def test_communication_as_long_as_computing_is_hidden(pieces):
    # a rank sends a snapshot and a delta of 4P bytes in every step
    machine = Machine(step_s=STEP_S, latency_s=1e-5, bandwidth_Bps=8 * 23 / STEP_S)
    ranks = train(4, 50, machine=machine, settings={"pieces": pieces})
    assert max(rank.seconds for rank in ranks) <= 1.05 * 50 * STEP_S


def test_staleness_counts_the_exchanges_within_a_step():
    ranks = train(2, [20, 2], faults=Faults(slow={"1": 10.0}))
    assert ranks[1].strategy.metrics()["staleness"][8:13].sum() == 2
    assert ranks[0].strategy.metrics()["staleness"][3:].sum() == 0


def test_state_goes_on_where_it_was():
    kept = train(3, 10)[1].strategy.state()

    def main(world):
        strategy = Adpsgd(world, AdpsgdConfig())
        strategy.start(ProtocolLearner(23, compute=world.compute, seed=9))
        strategy.load_state(kept)
        return strategy.state()

    state = run_virtual(main, 3)[1]
    assert kept["service/round"] > 0
    assert kept.keys() == state.keys()
    for name, value in kept.items():
        np.testing.assert_array_equal(state[name], value)


def test_without_threads_it_is_refused_in_one_line():
    def main(world):
        world.background = False
        strategy = Adpsgd(world, AdpsgdConfig())
        learner = ProtocolLearner(4, compute=world.compute, seed=0)
        with pytest.raises(WorldError, match="adpsgd needs MPI_THREAD_MULTIPLE"):
            strategy.require(learner)
        return True

    assert run_virtual(main, 2) == [True, True]
