"""What docs/convergence.md derives for quadratics, measured in the virtual world."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.world.machine import Machine
from mpilm.world.virtual.world import Simulation

IN_STEP = [
    ("allreduce", {}),
    ("delay_by_one", {}),
    ("dpsgd", {"topology": "fixed_ring"}),
    ("dpsgd", {"topology": "random_ring"}),
    ("dpsgd", {"topology": "random_pairs"}),
    ("dpsgd", {"topology": "exponential", "overlap": False}),
]
RINGS_AND_PAIRS = ("fixed_ring", "random_ring", "random_pairs")
ADPSGD = [("adpsgd", {"mixing": mixing}) for mixing in RINGS_AND_PAIRS]
SIGMA, P = 0.5, 1000


def mean_models(name, settings, size, *, steps, lr, start=0.0, num=P):
    """Return the mean model after each step, (steps, num), of ranks with one loss.

    Every rank has |theta|^2 / 2, noise SIGMA, and begins at `start`.
    """

    def main(world):
        learner = ProtocolLearner(
            num,
            compute=world.compute,
            seed=world.rank,
            target=np.zeros(num),
            lr=lr,
            noise=SIGMA,
        )
        learner.theta[:] = start
        method = strategy(name, world, **settings)
        method.start(learner)
        models = np.empty((steps, num), np.float32)
        for model in models:
            method.step(learner)
            model[:] = learner.theta
        method.finish(learner)
        return models

    machine = Machine(step_s=0.1, jitter=0.1 if name == "adpsgd" else 0.0)
    return np.mean(Simulation(size, machine=machine).run(main), axis=0)


@pytest.mark.parametrize("size", [4, pytest.param(16, marks=pytest.mark.long)])
@pytest.mark.parametrize(("name", "settings"), [*IN_STEP, *ADPSGD])
def test_the_mean_model_fluctuates_like_one_rank_with_k_minibatches(
    name, settings, size
):
    """(6): whatever the topology; in the background to 6%, for what is stale."""
    lr, after = 0.1, 60
    models = mean_models(name, settings, size, steps=after + 100, lr=lr)
    measured = np.square(models[after:]).mean()
    predicted = lr * SIGMA**2 / (size * (2 - lr))
    tolerance = 0.06 if name == "adpsgd" else 0.02
    assert measured == pytest.approx(predicted, rel=tolerance)


@pytest.mark.parametrize("weight", [0.5, 1 / 3])
@pytest.mark.parametrize("size", [4, 5, 16])
def test_one_random_pair_contracts_as_derived(size, weight):
    squares = []
    for i, j in itertools.combinations(range(size), 2):
        apart = np.zeros(size)
        apart[i], apart[j] = 1.0, -1.0
        matrix = np.eye(size) - weight * np.outer(apart, apart)
        squares.append(matrix.T @ matrix)
    second = np.linalg.eigvalsh(np.mean(squares, axis=0))[-2]
    assert second == pytest.approx(1 - 4 * weight * (1 - weight) / (size - 1))


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("dpsgd", {"topology": "fixed_ring"}, 4),
        ("adpsgd", {}, 4),
        pytest.param("dpsgd", {"topology": "fixed_ring"}, 16, marks=pytest.mark.long),
        pytest.param("adpsgd", {}, 16, marks=pytest.mark.long),
    ],
)
def test_the_cited_bound_is_kept_with_the_margin_of_quadratics(name, settings, size):
    """(4), at its own learning rate; by (7) a quadratic comes to half of it."""
    num, rounds, start = 100, 400, 1.0
    variance, begun, total = num * SIGMA**2, num * start**2 / 2, size * rounds
    lr = size / (10 + math.sqrt(variance * total))
    bound = 20 * begun / total + 2 * (begun + 1) * math.sqrt(variance / total)
    models = mean_models(
        name, settings, size, steps=rounds, lr=lr, start=start, num=num
    )
    measured = np.square(models).sum(axis=1).mean()
    assert 0.4 * bound < measured < 0.55 * bound
