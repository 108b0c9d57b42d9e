"""dpsgd against `W @ theta` in float64, in the virtual world."""

import numpy as np
import pytest

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.strategies.topology import TOPOLOGIES, mixing_matrix
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation

P, SEED, ROUNDS = 40, 11, 10
ROUNDING = 2e-6  # absolute, on models of size 1: float32, ten rounds


def train(
    name,
    size,
    *,
    steps=ROUNDS,
    scatter=False,
    machine=None,
    faults=None,
    state=None,
    watch=None,
    learner=None,
    **settings,
):
    """Train quadratics of different minima; return the learners.

    Args:
        scatter: give every rank another first model, as no strategy would.
        state: states of strategy and learner, one of each per rank, to go on from.
        watch: called with strategy and learner before every step.
    """

    def main(world):
        options = {"lr": 0.125, "seed": world.rank, **(learner or {})}
        mine = ProtocolLearner(P, compute=world.compute, **options)
        first = mine.theta.copy()
        method = strategy(name, world, **settings)
        method.start(mine)
        if scatter:
            mine.theta[:] = first
        if state is not None:
            method.load_state(state[world.rank][0])
            mine.load_state(state[world.rank][1])
        mine.first = mine.theta.copy()
        traffic = world.traffic
        before = np.array([traffic.bytes_sent, traffic.bytes_received])
        for _ in range(steps):
            if watch is not None:
                watch(method, mine)
            method.step(mine)
        mine.moved = np.array([traffic.bytes_sent, traffic.bytes_received]) - before
        method.finish(mine)
        mine.states = (method.state(), mine.state())
        mine.metrics = method.metrics()
        mine.copies = len(getattr(method, "received", ()))
        mine.final = np.empty_like(mine.theta)
        method.final_model_(mine, mine.final)
        return mine

    simulation = Simulation(size, machine=machine, faults=faults)
    learners = simulation.run(main)
    assert simulation.undelivered == []
    return learners


def thetas(learners):
    return np.stack([one.theta for one in learners]).astype(np.float64)


def reference(learners, topology, *, overlap, steps=ROUNDS, lr=0.125):
    """Return what (1) and (2) make of the first models, float64 (K, P)."""
    theta = np.stack([one.first for one in learners]).astype(np.float64)
    target = np.stack([one.target for one in learners]).astype(np.float64)
    for round_ in range(steps):
        mixing = mixing_matrix(topology, len(theta), SEED, round_)
        mixed = mixing @ theta
        theta = mixed - lr * ((theta if overlap else mixed) - target)
    return theta


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_ten_rounds_are_the_matrix_reference(topology, size, overlap):
    settings = {"topology": topology, "overlap": overlap, "seed": SEED}
    learners = train("dpsgd", size, scatter=True, **settings)
    wanted = reference(learners, topology, overlap=overlap)
    np.testing.assert_allclose(thetas(learners), wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("eager_bytes", [0, 65_536])
def test_models_are_averaged_in_their_round_however_slow_a_rank_is(
    topology, eager_bytes
):
    """Fast ranks run ahead of the slow one: their next models wait there, in order."""
    size, slow, waiting = 6, 2, []

    def watch(method, learner):
        if method.comm.rank == slow:
            waiting.append(len(method.comm.arrived))

    learners = train(
        "dpsgd",
        size,
        scatter=True,
        machine=Machine(step_s=0.01, jitter=0.9, eager_bytes=eager_bytes),
        faults=Faults(slow={str(slow): 20.0}),
        watch=watch,
        topology=topology,
        seed=SEED,
    )
    assert max(waiting) > 0  # models came before the slow rank asked for them
    wanted = reference(learners, topology, overlap=True)
    np.testing.assert_allclose(thetas(learners), wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_model_is_not_touched_before_it_is_sent(overlap):
    """The receiver is slow: models of neighbours come long before the own is sent."""

    def main(world):
        learner = ProtocolLearner(P, compute=world.compute, seed=world.rank)
        method = strategy("dpsgd", world, topology="exponential", overlap=overlap)
        method.start(learner)
        sends, isend, update = [], method.comm.Isend, learner.update

        def noted(*message):
            sends.append(isend(*message))
            return sends[-1]

        def checked():
            assert all(send.Test() for send in sends)
            update()

        method.comm.Isend, learner.update = noted, checked
        for _ in range(ROUNDS):
            method.step(learner)
        return len(sends)

    machine = Machine(step_s=0.01, eager_bytes=0)
    simulation = Simulation(5, machine=machine, faults=Faults(slow={"2": 20.0}))
    assert simulation.run(main) == [ROUNDS] * 5


@pytest.mark.parametrize("size", [2, 3, 5])
def test_complete_graph_without_overlap_is_allreduce(size):
    mixed = train("dpsgd", size, topology="complete", overlap=False)
    averaged = train("allreduce", size)
    for one in mixed:
        np.testing.assert_allclose(one.final, averaged[0].theta, rtol=0, atol=ROUNDING)
    # the last updates are mixed by the step that would come next
    assert np.ptp(thetas(mixed), axis=0).max() > 0.01


@pytest.mark.parametrize("size", [2, 3, 5])
def test_complete_graph_with_overlap_is_delay_by_one(size):
    mixed = train("dpsgd", size, scatter=True, topology="complete")
    late = train("delay_by_one", size, scatter=True)
    np.testing.assert_allclose(thetas(mixed), thetas(late), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_mixing_preserves_the_mean_of_all_models(topology, size):
    still = {"learner": {"lr": 0.0}, "topology": topology, "seed": SEED}
    learners = train("dpsgd", size, scatter=True, steps=25, **still)
    first = np.stack([one.first for one in learners]).astype(np.float64)
    drift = abs(thetas(learners).mean(axis=0) - first.mean(axis=0))
    assert drift.max() < 4e-7
    assert thetas(learners).std(axis=0).max() < 0.9 * first.std(axis=0).max()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_one_rank_is_local_to_the_bit(topology, overlap):
    noisy = {"learner": {"momentum": 0.5, "noise": 0.3}}
    (alone,) = train("dpsgd", 1, topology=topology, overlap=overlap, **noisy)
    (local,) = train("local", 1, **noisy)
    assert np.array_equal(alone.theta, local.theta)
    assert alone.moved.tolist() == [0, 0]


@pytest.mark.parametrize("size", [2, 5, 8])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_step_moves_one_model_to_and_from_each_neighbour(topology, size):
    learners = train("dpsgd", size, topology=topology, seed=SEED)
    received_from = sum(
        (mixing_matrix(topology, size, SEED, round_) > 0).astype(int) - np.eye(size)
        for round_ in range(ROUNDS)
    )
    for rank, learner in enumerate(learners):
        sent, received = received_from[:, rank].sum(), received_from[rank].sum()
        assert learner.moved.tolist() == [4 * P * sent, 4 * P * received]
        assert learner.metrics["partners"].tolist() == received_from[rank].tolist()
        assert learner.metrics["mixes"] == received
        most = (
            max(
                (mixing_matrix(topology, size, SEED, t) > 0).sum(1).max()
                for t in range(ROUNDS)
            )
            - 1
        )
        assert learner.copies == min(2, most)


def predicted_spread(topology, size, lr):
    """Return the stationary E|theta_i - mean|^2 per parameter over (lr sigma)^2.

    docs/convergence.md (5): gradient noise of variance sigma^2, equal minima.
    """
    shifted = mixing_matrix(topology, size) - lr * np.eye(size)  # T is symmetric
    left = np.linalg.eigvalsh(shifted)[:-1] ** 2
    if topology.startswith("random"):  # every direction is turned into every other
        left = np.full(size - 1, left.mean())
    return np.sum(1.0 / (1.0 - left)) / size


@pytest.mark.long
@pytest.mark.parametrize(
    "topology", ["fixed_ring", "random_pairs", "random_ring", "complete"]
)
def test_consensus_distance_is_what_the_model_predicts(topology):
    size, lr, sigma, after = 16, 0.1, 0.5, 40
    spreads = []

    def main(world):
        learner = ProtocolLearner(
            1000,
            compute=world.compute,
            seed=world.rank,
            target=np.zeros(1000),
            lr=lr,
            noise=sigma,
        )
        method = strategy("dpsgd", world, topology=topology, seed=SEED)
        method.start(learner)
        models = []
        for _ in range(after + 40):
            method.step(learner)
            models.append(learner.theta.copy())
        return models[after:]

    for models in zip(*Simulation(size).run(main), strict=True):
        spreads.append(np.stack(models).var(axis=0).mean())
    measured = np.mean(spreads) / (lr * sigma) ** 2
    assert measured == pytest.approx(predicted_spread(topology, size, lr), rel=0.02)


def test_tensors_are_mixed_like_arrays():
    torch = pytest.importorskip("torch")

    def main(world):
        rank = world.rank
        models = {"numpy": np.linspace(rank, 2 * rank + 1, P, dtype=np.float32)}
        models["torch"] = torch.from_numpy(models["numpy"].copy())
        for theta in models.values():
            method = strategy("dpsgd", world, topology="fixed_ring")
            method.start_mean(theta).finish_()
        return models

    for models in Simulation(4).run(main):
        assert np.array_equal(models["numpy"], models["torch"].numpy())
        assert np.ptp(models["numpy"]) > 0.5
