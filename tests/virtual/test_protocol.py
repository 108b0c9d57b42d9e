"""The protocol learner, and the strategies on it in the virtual world."""

import numpy as np
import pytest

from mpilm.learner.flat import Layout
from mpilm.learner.quadratic import ProtocolLearner, layers
from mpilm.strategies import strategy
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation

P = 40


def run_now(work, ready=None):
    """Stand in for `world.compute` without a world."""
    return work(ready or (lambda part: None))


def train(
    name,
    size,
    *,
    steps=30,
    machine=None,
    faults=None,
    learner=None,
    **settings,
):
    """Train by a strategy; return the learners, the worlds and the simulation."""

    def main(world):
        options = {"lr": 0.125, "seed": world.rank, **(learner or {})}
        mine = ProtocolLearner(P, compute=world.compute, **options)
        chosen = strategy(name, world, **settings)
        chosen.start(mine)
        for _ in range(steps):
            mine.last_loss = chosen.step(mine)
        chosen.finish(mine)
        mine.final = np.empty_like(mine.theta)
        chosen.final_model_(mine, mine.final)
        return mine

    simulation = Simulation(size, machine=machine, faults=faults)
    learners = simulation.run(main)
    assert simulation.undelivered == []
    return learners, simulation


def test_the_learner_follows_its_equations():
    target = np.linspace(-1.0, 1.0, P)
    learner = ProtocolLearner(
        P,
        compute=run_now,
        seed=1,
        target=target,
        lr=0.25,
        momentum=0.5,
        samples_per_step=3,
    )
    theta, velocity = learner.theta.astype(np.float64), np.zeros(P)
    for step in range(6):
        expected = pytest.approx(0.5 * np.sum((theta - target) ** 2), rel=1e-4)
        assert learner.loss() == expected
        loss = learner.gradient()
        assert loss == expected
        np.testing.assert_allclose(learner.grad, theta - target, rtol=1e-4, atol=1e-6)
        learner.update()
        velocity = 0.5 * velocity + theta - target
        theta -= 0.25 * velocity
        np.testing.assert_allclose(learner.theta, theta, rtol=1e-4, atol=1e-6)
        assert learner.samples == 3 * (step + 1)
    np.testing.assert_allclose(learner.moments()["velocity"], velocity, atol=1e-5)


def test_the_noise_has_its_deviation_and_depends_on_the_seed():
    def gradients(seed):
        learner = ProtocolLearner(4000, compute=run_now, seed=seed, noise=2.0, lr=0.0)
        learner.gradient()
        return learner.grad - (learner.theta - learner.target)

    first, again, other = gradients(1), gradients(1), gradients(2)
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.1
    assert first.std() == pytest.approx(2.0, rel=0.05)


def test_parts_are_notified_from_the_last_layer_to_the_first():
    layout = Layout.of([("a", (3, 4), "x"), ("b", (8,), "y"), ("c", (20,), "x")])
    learner = ProtocolLearner(P, compute=run_now, seed=0, layout=layout)
    parts = []
    learner.gradient(parts.append)
    assert parts == [slice(20, 40), slice(12, 20), slice(0, 12)]
    assert learner.moments() == {}


@pytest.mark.parametrize(("size", "num_layers"), [(10, 1), (7, 3), (1000, 4), (3, 3)])
def test_layers_cover_the_vector(size, num_layers):
    layout = layers(size, num_layers)
    assert layout.size == size
    assert len(layout.components) == num_layers


def test_a_restored_learner_goes_on_to_the_bit():
    def make(seed):
        return ProtocolLearner(P, compute=run_now, seed=seed, noise=1.0, momentum=0.9)

    def go(learner, steps):
        for _ in range(steps):
            learner.gradient()
            learner.update()

    whole, half, rest = make(1), make(1), make(1)
    go(whole, 10)
    go(half, 5)
    state = half.state()
    go(half, 2)  # the state is a copy
    rest.load_state(state)
    go(rest, 5)
    assert np.array_equal(rest.theta, whole.theta)
    assert rest.samples == whole.samples


def test_local_and_size_one_are_plain_gradient_descent_to_the_bit():
    alone = ProtocolLearner(P, compute=run_now, seed=0, lr=0.125)
    for _ in range(30):
        alone.gradient()
        alone.update()
    for name in ("local", "allreduce", "model_averaging"):
        (learner,), _ = train(name, 1)
        assert np.array_equal(learner.theta, alone.theta)
        assert np.array_equal(learner.final, alone.theta)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "allreduce"},
        {"name": "allreduce", "bucket_bytes": 64},
        {"name": "model_averaging", "period": 1},
        {"name": "model_averaging", "period": 5},
    ],
)
def test_the_mean_model_follows_the_mean_loss(settings):
    """Equal curvature: mean theta = mean target + (1-lr)^n (theta_0 - mean target)."""
    learners, _ = train(size=5, steps=20, **settings)
    target = np.mean([learner.target for learner in learners], axis=0)
    start = ProtocolLearner(P, compute=run_now, seed=0).theta
    expected = target + 0.875**20 * (start - target)
    for learner in learners:
        np.testing.assert_allclose(learner.theta, expected, atol=1e-5)
        np.testing.assert_allclose(learner.final, expected, atol=1e-5)


def test_model_averaging_every_minibatch_is_allreduce():
    reduced, _ = train("allreduce", 4)
    averaged, _ = train("model_averaging", 4, period=1)
    for a, b in zip(reduced, averaged, strict=True):
        np.testing.assert_allclose(a.theta, b.theta, atol=1e-6)


@pytest.mark.parametrize("momentum", ["keep", "reset", "average"])
def test_model_averaging_treats_momentum(momentum):
    learners, _ = train(
        "model_averaging",
        3,
        steps=4,
        period=4,
        momentum=momentum,
        learner={"momentum": 0.5},
    )
    velocities = [learner.moments()["velocity"] for learner in learners]
    if momentum == "reset":
        assert not np.any(velocities)
    elif momentum == "average":
        assert np.array_equal(velocities[0], velocities[1])
        assert np.any(velocities[0])
    else:
        assert not np.array_equal(velocities[0], velocities[1])


def test_results_do_not_depend_on_time():
    """Slow ranks, jitter and slow links change when, never what."""
    machines = [
        Machine(),
        Machine(latency_s=0.3, bandwidth_Bps=100.0, jitter=0.9, ranks_per_node=2),
    ]
    faults = [Faults(), Faults(slow={"0": 100.0, "3": 2.0})]
    for name, settings in (
        ("allreduce", {"bucket_bytes": 32}),
        ("model_averaging", {"period": 3}),
    ):
        runs = [
            train(name, 4, machine=m, faults=f, **settings)[0]
            for m, f in zip(machines, faults, strict=True)
        ]
        for a, b in zip(*runs, strict=True):
            assert np.array_equal(a.theta, b.theta)


def test_buckets_are_reduced_behind_the_backward_pass():
    # 40 float32 = 160 bytes: 4 rounds' worth of transfers, well below a step of 1 s
    machine = Machine(step_s=1.0, latency_s=0.01, bandwidth_Bps=2000.0)

    def overlap_and_time(**settings):
        _, simulation = train("allreduce", 4, machine=machine, **settings)
        return simulation.worlds[0].traffic.overlap, simulation.now_s

    whole, whole_s = overlap_and_time(bucket_bytes=10**6)
    parts, parts_s = overlap_and_time(bucket_bytes=40)
    assert whole < 0.1  # the start and the end of the run, which hide nothing
    assert parts > 0.5
    assert parts_s < whole_s


@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_a_straggler_sets_the_pace_of_allreduce(factor):
    machine = Machine(step_s=1.0, latency_s=0.0, bandwidth_Bps=1e12)
    _, even = train("allreduce", 4, machine=machine)
    faults = Faults(slow={"2": factor})
    _, uneven = train("allreduce", 4, machine=machine, faults=faults)
    assert uneven.now_s / even.now_s == pytest.approx(factor, rel=1e-6)
    blocked_s = [world.traffic.blocked_s for world in uneven.worlds]
    assert blocked_s[0] == pytest.approx(30 * (factor - 1.0), rel=1e-6)
    assert blocked_s[2] == pytest.approx(0.0, abs=1e-6)
