"""delay_by_one against its recursion in float64, and what it hides; virtual world."""

import numpy as np
import pytest

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation

P, STEPS = 40, 10
ROUNDING = 2e-6  # absolute, on models of size 1: float32, ten steps


def train(
    size,
    *,
    name="delay_by_one",
    steps=STEPS,
    scatter=False,
    machine=None,
    faults=None,
    observer=None,
    learner=lambda rank: {},
    **settings,
):
    """Train quadratics; return the learners.

    Args:
        scatter: give every rank another first model, as no strategy would.
        observer: called with (rank, where, model) after a synchronisation.
        learner: a rank's options of its ProtocolLearner.
    """

    def main(world):
        options = {"lr": 0.125, "seed": world.rank, **learner(world.rank)}
        mine = ProtocolLearner(P, compute=world.compute, **options)
        first = mine.theta.copy()
        method = strategy(name, world, **settings)
        if observer is not None:
            method.on_synchronised = lambda *seen: observer(world.rank, *seen)
        method.start(mine)
        if scatter:
            mine.theta[:] = first
        mine.first = mine.theta.copy()
        traffic, start_s = world.traffic, world.now_s()
        before = np.array([traffic.bytes_sent, traffic.bytes_received])
        times_s = np.array([traffic.blocked_s, traffic.in_flight_s])
        for _ in range(steps):
            method.step(mine)
        mine.step_s = (world.now_s() - start_s) / max(1, steps)
        mine.moved = np.array([traffic.bytes_sent, traffic.bytes_received]) - before
        mine.times_s = np.array([traffic.blocked_s, traffic.in_flight_s]) - times_s
        method.finish(mine)
        mine.final = np.empty_like(mine.theta)
        method.final_model_(mine, mine.final)
        return mine

    simulation = Simulation(size, machine=machine, faults=faults)
    learners = simulation.run(main)
    assert simulation.undelivered == []
    return learners


def thetas(learners):
    return np.stack([one.theta for one in learners]).astype(np.float64)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_different_data_follow_the_recursion(size, momentum):
    options = {"momentum": momentum}
    learners = train(size, scatter=True, learner=lambda rank: options)
    theta = np.stack([one.first for one in learners]).astype(np.float64)
    target = np.stack([one.target for one in learners]).astype(np.float64)
    velocity = np.zeros_like(theta)
    for _ in range(STEPS):
        velocity = momentum * velocity + theta - target  # at the local models
        theta = theta.mean(axis=0) - 0.125 * velocity  # (1)
    np.testing.assert_allclose(thetas(learners), theta, rtol=0, atol=ROUNDING)
    assert np.ptp(theta, axis=0).max() > 0.1  # each adds its own gradient


@pytest.mark.parametrize("size", [2, 3, 5])
def test_equal_data_are_a_single_rank(size):
    same = {"seed": 4, "noise": 0.3, "momentum": 0.5}
    many = train(size, learner=lambda rank: same)
    (one,) = train(1, name="local", learner=lambda rank: same)
    for learner in many:
        np.testing.assert_allclose(learner.theta, one.theta, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_averaging_preserves_the_mean_of_all_models(size):
    learners = train(size, scatter=True, steps=25, learner=lambda rank: {"lr": 0.0})
    first = np.stack([one.first for one in learners]).astype(np.float64)
    assert abs(thetas(learners) - first.mean(axis=0)).max() < 1e-6


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_mean_model_moves_as_with_allreduce(size):
    late, now = train(size), train(size, name="allreduce")
    np.testing.assert_allclose(late[0].final, now[0].final, rtol=0, atol=ROUNDING)
    assert abs(late[0].theta - now[0].theta).max() > 0.01


def test_the_observer_sees_the_mean_of_the_models_before_the_step():
    seen = {0: [], 1: [], 2: []}

    def observer(rank, where, model):
        assert where == slice(0, P)
        seen[rank].append(model.copy())

    learners = train(3, scatter=True, observer=observer)
    first = np.mean([one.first for one in learners], axis=0)
    np.testing.assert_allclose(seen[0][0], first, rtol=0, atol=ROUNDING)
    assert len(seen[0]) == STEPS
    for rank in (1, 2):
        assert np.array_equal(seen[rank], seen[0])
    unseen = train(3, scatter=True)
    assert np.array_equal(thetas(unseen), thetas(learners))


@pytest.mark.parametrize(
    "method",
    [
        {"name": "delay_by_one"},
        {"name": "dpsgd", "topology": "fixed_ring"},
        {"name": "dpsgd", "topology": "random_ring"},
        {"name": "dpsgd", "topology": "exponential"},
    ],
    ids=lambda method: method.get("topology", method["name"]),
)
@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_communication_no_longer_than_computing_is_hidden(method, size, share):
    """Issue B: step time at most 1.05 x computing alone."""
    slow_network = {"latency_s": 1e-4, "bandwidth_Bps": 1e5}

    def step(compute_s, steps=STEPS):
        machine = Machine(step_s=compute_s, **slow_network)
        learners = train(size, steps=steps, machine=machine, **method)
        return max(learners, key=lambda one: one.step_s)

    alone_s = step(0.0, steps=1).step_s
    assert alone_s > 1e-3  # the network, nothing else
    both = step(alone_s / share)
    assert both.step_s <= 1.05 * alone_s / share
    blocked_s, in_flight_s = both.times_s
    assert blocked_s <= 0.05 * in_flight_s
    # what does not fit behind computing is seen
    assert step(alone_s / 3).step_s >= 1.5 * alone_s / 3


def test_one_slow_rank_slows_all():
    machine = Machine(step_s=0.01)
    even = train(4, machine=machine)
    slowed = train(4, machine=machine, faults=Faults(slow={"2": 10.0}))
    for fast, slow in zip(even, slowed, strict=True):
        assert slow.step_s == pytest.approx(10 * fast.step_s, rel=0.2)
    assert np.array_equal(thetas(even), thetas(slowed))
