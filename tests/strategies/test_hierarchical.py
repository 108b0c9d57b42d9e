"""Hierarchical training: nodes of equal models, and what it is equal to."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from mpilm.config import read_config, resolve
from mpilm.errors import CheckpointError
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.storage.runlog import read_run
from mpilm.strategies import strategy
from mpilm.strategies.adpsgd import AdpsgdConfig
from mpilm.strategies.ema import Ema, EmaConfig
from mpilm.strategies.registry import INNER
from mpilm.train.signals import STOP, SYNC, Agreement, StopRequest
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation
from tests.strategies.fleets import assert_quiet, fleet, targets, thetas

NOISY = {"noise": 0.5, "momentum": 0.5}
NODES = [(2, 2), (2, 3), (4, 2)]  # nodes, ranks in each
SETTINGS = {
    "model_averaging": {"period": 4, "momentum": "average"},
    "bmuf": {"period": 3},
    "gossip_bmuf": {"period": 3, "delay": 1},
    "dpsgd": {"topology": "random_ring"},
    "dpsgd-late": {"overlap": False},
    "noloco": {"period": 3},
    "eager_diloco": {"period": 3, "eta": 0.3},
    "divshare": {"period": 2},
    "sparse_loco": {"period": 3, "share": 1.0},
    "sparta": {"share": 0.2},
    "des_loc": {"period": 4, "period_first": 2, "period_second": 3},
}
NEAR = {
    "async_sgd": (0.05, 150, 0.1),
    "sparse_loco": (0.03, 480, 0.1),
    "divshare": (0.01, 480, 0.15),
}
CASES = [*INNER, "dpsgd-late"]


def train(case, nodes, node_size, **options):
    inner = case.partition("-")[0]
    return fleet(
        "hierarchical",
        nodes * node_size,
        node_size=node_size,
        inner=inner,
        settings=SETTINGS.get(case, {}),
        **{"learner": NOISY, **options},
    )


def members_are_equal(ranks, node_size):
    models = thetas(ranks)
    for rank, model in enumerate(models):
        assert np.array_equal(model, models[rank - rank % node_size])


@pytest.mark.long
@pytest.mark.parametrize(("nodes", "node_size"), NODES)
@pytest.mark.parametrize("case", CASES)
def test_members_of_a_node_are_equal_after_every_step(case, nodes, node_size):
    models = {}

    def watch(chosen, learner):
        step, rank = chosen.step, chosen.world.rank

        def noted(given):
            loss = step(given)
            models.setdefault((rank // node_size, chosen.steps), []).append(
                learner.theta.copy()
            )
            return loss

        chosen.step = noted

    faults = Faults(slow={"1": 7.0})
    ranks = train(case, nodes, node_size, steps=12, watch=watch, faults=faults)
    assert len(models) == nodes * 12
    for same in models.values():
        assert len(same) == node_size
        assert all(np.array_equal(model, same[0]) for model in same)
    members_are_equal(ranks, node_size)
    for rank in ranks:
        assert rank.learner.samples == 12
        assert np.array_equal(rank.final, ranks[0].final)
    assert np.abs(thetas(ranks) - ranks[0].first).max() > 0.1


@pytest.mark.parametrize("inner", INNER)
def test_one_node_is_allreduce_to_the_bit(inner):
    settings = {"eta": 0.0} if "bmuf" in inner else {}
    nodes = {"node_size": 4, "inner": inner, "settings": settings}
    ranks = fleet("hierarchical", 4, learner=NOISY, **nodes)
    reference = fleet("allreduce", 4, learner=NOISY)
    assert np.array_equal(thetas(ranks), thetas(reference))


@pytest.mark.parametrize("case", CASES)
def test_nodes_of_one_rank_are_the_inner_strategy_to_the_bit(case):
    ranks = train(case, 4, 1)
    inner = fleet(case.partition("-")[0], 4, learner=NOISY, **SETTINGS.get(case, {}))
    assert np.array_equal(thetas(ranks), thetas(inner))
    for one, other in zip(ranks, inner, strict=True):
        assert np.array_equal(one.final, other.final)
        assert one.seconds == pytest.approx(other.seconds)
        assert (one.bytes_sent, one.bytes_received) == (
            other.bytes_sent, other.bytes_received,
        )  # fmt: skip
        own, metrics = one.strategy.metrics(), other.strategy.metrics()
        assert own.keys() == metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(own[name], value, atol=1e-12)


@pytest.mark.parametrize(("nodes", "node_size"), NODES)
def test_allreduce_inside_is_allreduce(nodes, node_size):
    ranks = train("allreduce", nodes, node_size)
    reference = fleet("allreduce", nodes * node_size, learner=NOISY)
    np.testing.assert_allclose(thetas(ranks), thetas(reference), rtol=0, atol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_the_mean_model_reaches_the_mean_minimum(case):
    lr, steps, near = NEAR.get(case, (0.125, 240, 1e-4))
    ranks = train(case, 3, 2, steps=steps, learner={"lr": lr})
    minimum = targets(ranks).mean(axis=0)
    for rank in ranks:
        np.testing.assert_allclose(rank.final, minimum, rtol=0, atol=near)


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted_to_the_bit(case):
    """With times that are binary fractions, so that no addition is rounded."""
    machine = Machine(
        step_s=0.25, latency_s=2**-16, bandwidth_Bps=2.0**30, node_latency_s=2**-17
    )
    options = {"steps": 20, "machine": machine}
    whole = train(case, 2, 2, save_at=7, **options)
    resumed = train(case, 2, 2, resume=whole, **options)
    assert np.array_equal(thetas(resumed), thetas(whole))
    for one, other in zip(whole, resumed, strict=True):
        for name, value in one.strategy.metrics().items():
            np.testing.assert_array_equal(other.strategy.metrics()[name], value)
    with pytest.raises(CheckpointError, match="was made with 2 nodes of 2 ranks"):
        train(case, 4, 1, resume=whole, **options)


@pytest.mark.parametrize(
    "case", [name for name in CASES if name in INNER and INNER[name].synchronises]
)
def test_a_moving_average_sees_the_models_of_the_leaders(case):
    """Every rank has the average that it has where each node is one rank."""

    def watch(chosen, learner):
        return Ema(EmaConfig(syncs=4), chosen, learner)

    ranks = train(case, 2, 3, steps=13, watch=watch)
    unseen = train(case, 2, 3, steps=13)
    assert np.array_equal(thetas(ranks), thetas(unseen))
    for rank, one in enumerate(ranks):
        leader = ranks[rank - rank % 3]
        assert one.ema.parts == leader.ema.parts
        assert np.array_equal(one.ema.model, leader.ema.model)
        assert len(one.ema.parts) > 0
        assert np.abs(one.ema.model - one.learner.theta).max() > 0.0


def test_shares_are_those_of_the_inner_matrix_spread_over_the_nodes():
    ranks = train("dpsgd", 4, 2, steps=10)
    metrics = [rank.strategy.metrics() for rank in ranks]
    weights = np.stack([own["weights"] for own in metrics])
    assert {own["rounds"] for own in metrics} == {10}
    np.testing.assert_allclose(weights.sum(axis=0), weights.sum(axis=1))
    inner = ranks[0].strategy.inner.metrics()["weights"]
    assert inner[0] == 0.0
    np.testing.assert_allclose(weights[0][2:], np.repeat(inner[1:], 2) / 2)
    assert weights[0][1] == pytest.approx((10 - inner.sum()) / 2)
    assert np.array_equal(metrics[0]["partners"][1::2], np.zeros(4))
    assert "partners" not in metrics[1]


def test_bytes_are_as_declared():
    """The gradient and the model in the node; the model between two leaders."""
    steps, model = 20, 4 * 40
    ranks = train("model_averaging", 2, 2, steps=steps)
    inside = 2 * model * 1 // 2
    between = (steps // 4) * 2 * (2 * model * 1 // 2)  # momentum is averaged as well
    own = [rank.bytes_sent for rank in ranks]
    end = model  # `finish` sends the model once more
    assert own == [steps * (inside + model) + between + end, steps * inside] * 2


SECTIONS = {
    "optim": {"clip": 0.0},
    "data": {"source": "pool", "chunk_windows": 3},
    "faults": {"slow": {"1": 5.0}},
}


@pytest.mark.long
@pytest.mark.parametrize("inner", ["bmuf", "adpsgd", "async_sgd"])
def test_the_program_trains_nodes(run, inner):
    nodes = {"inner": inner, "node_size": 2}
    total = 30 * 4 * 40
    trainers = run(
        4, "hierarchical", steps=30, out="nodes", strategy=nodes,
        train={"samples": total, "valid_every": total // 3},
        checkpoint={"every": total // 2, "keep": 9}, **SECTIONS,
    )  # fmt: skip
    summary = json.loads(trainers[0].folder.summary.read_text())
    assert summary["samples"] >= total
    assert summary["valid_perplexity"] < 38  # of a vocabulary of 40
    steps = [trainer.totals.step for trainer in trainers]
    assert steps[0] == steps[1]
    assert steps[2] == steps[3]
    if not INNER[inner].lockstep:
        assert steps[0] < steps[2]  # the slow rank holds up its node only
    logs = read_run(trainers[0].folder.path)
    names = [log.events["name"].tolist() for log in logs.values()]
    counts = [(own.count("evaluate"), own.count("checkpoint")) for own in names]
    assert len(set(counts)) == 1
    assert counts[0][0] >= 3
    for one, other in ((0, 1), (2, 3)):
        assert (trainers[one].learner.theta == trainers[other].learner.theta).all()
    resumed = run(
        4, "hierarchical", out="nodes", resume=True, strategy=nodes,
        train={"samples": 2 * total}, **SECTIONS,
    )  # fmt: skip
    assert sum(trainer.learner.samples for trainer in resumed) >= 2 * total


@pytest.mark.long
@pytest.mark.parametrize("inner", ["adpsgd", "async_sgd"])
def test_nodes_agree_and_synchronise_and_never_hang(inner):
    """The trainer's loop with random paces, ends, sync points and signals."""

    def train(world):
        draw = random.Random(f"{seed} {world.rank}")
        chosen = strategy("hierarchical", world, inner=inner, node_size=size)
        learner = ProtocolLearner(40, compute=world.compute, seed=world.rank, lr=0.1)
        chosen.start(learner)
        request = StopRequest()
        agreement = Agreement(
            world, every=5, request=request, lockstep=False, agree=chosen.pace.agree
        )
        num_syncs = 0

        def synchronise():
            nonlocal num_syncs
            chosen.retire(learner)
            chosen.finish(learner)
            world.comm.Barrier()
            num_syncs += 1

        def sync_retired():
            synchronise()
            chosen.retire(learner)

        # as each rank sees the progress of a pool: something else
        while chosen.pace.agree(learner.samples + draw.randint(0, 2)) < goal:
            chosen.step(learner)
            if draw.random() < 0.002:
                request.requested = "SIGTERM"
            outcome = agreement.poll(learner.samples, sync=draw.random() < 0.1)
            if outcome == SYNC:
                synchronise()
            if outcome == STOP:
                break
        chosen.retire(learner)
        agreement.finish(sync_retired)
        chosen.finish(learner)
        return learner.samples, num_syncs, agreement.stopped

    syncs = stops = 0
    for seed in range(60):
        plan = random.Random(seed)
        nodes, size = plan.choice(NODES)
        goal = plan.choice([1, 20, 60])
        machine = Machine(step_s=0.2, jitter=0.5, latency_s=plan.choice([1e-5, 0.05]))
        faults = Faults(slow={str(plan.randrange(nodes * size)): 5.0})
        simulation = Simulation(nodes * size, machine=machine, faults=faults, seed=seed)
        ended = simulation.run(train)
        assert_quiet(simulation)
        for rank, end in enumerate(ended):
            assert end == ended[rank - rank % size]
            assert end[1:] == ended[0][1:]
        syncs, stops = syncs + ended[0][1], stops + ended[0][2]
    assert syncs > 60
    assert 0 < stops < 60


def test_the_configuration_is_resolved_and_read_back(tmp_path):
    overrides = ["strategy.name=hierarchical", "strategy.settings.mixing=fixed_ring"]
    config = resolve({"strategy": {"settings": {"weight": 0.25}}}, overrides)
    given = config.strategy.settings
    assert given.inner_config == AdpsgdConfig(mixing="fixed_ring", weight=0.25)
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert "[strategy.settings]" in path.read_text()
    assert read_config(path) == config
