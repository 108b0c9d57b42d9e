"""What a run says of itself: counts, realised mixing, consensus, the worst rank."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mpilm.storage.runlog import read_run
from mpilm.strategies.topology import (
    expected_contraction,
    mixing_matrix,
    realised,
    spectral_gap,
)
from mpilm.train.consensus import realised_gap
from mpilm.train.evaluate import evaluate_alone
from mpilm.train.metrics import LOG_FIELDS, Totals
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine

from .fleets import fleet

CLOCKS = {"seconds", "blocked_s", "in_flight_s", "overlap", "idle"}
CLOCKS |= {"data_s", "forward_s", "backward_s"}


def metrics_of(ranks):
    return [rank.strategy.metrics() for rank in ranks]


def realised_by(metrics):
    """Return the mean mixing matrix of a run."""
    weights = np.stack([own["weights"] for own in metrics])
    return realised(weights, float(np.mean([own["rounds"] for own in metrics])))


def summary_of(trainers):
    return json.loads(trainers[0].folder.summary.read_text())


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("topology", ["fixed_ring", "complete"])
def test_dpsgd_realises_its_topology(topology, size):
    ranks = fleet("dpsgd", size, steps=7, topology=topology)
    metrics = metrics_of(ranks)
    expected = mixing_matrix(topology, size)
    np.testing.assert_allclose(realised_by(metrics), expected, atol=1e-12)
    gap = realised_gap(metrics)
    assert gap == pytest.approx(spectral_gap(expected), abs=1e-9)
    assert gap == pytest.approx(1 - math.sqrt(expected_contraction(topology, size)))


@pytest.mark.long
@pytest.mark.parametrize(
    ("topology", "size"),
    [("random_ring", 8), ("random_pairs", 8), ("random_pairs", 5)],
)
def test_random_topologies_have_the_gap_of_their_mean(topology, size):
    """A pair's T^T T is T; on a ring the mean of both has the same diagonal, 1/3."""
    ranks = fleet("dpsgd", size, steps=600, topology=topology)
    expected = 1 - expected_contraction(topology, size)
    assert realised_gap(metrics_of(ranks)) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("size", [3, 4, 8])
def test_adpsgd_on_a_ring_in_step_realises_the_ring_of_the_papers(size):
    machine = Machine(step_s=1.0, latency_s=1e-3)
    ranks = fleet("adpsgd", size, steps=40, machine=machine, mixing="fixed_ring")
    metrics = metrics_of(ranks)
    expected = mixing_matrix("fixed_ring", size)
    np.testing.assert_allclose(realised_by(metrics), expected, atol=1e-12)
    assert realised_gap(metrics) == pytest.approx(spectral_gap(expected))


def test_means_are_counted_once():
    for rank in fleet("des_loc", 3, steps=9, period=4):
        found = rank.strategy.metrics()
        assert (found["rounds"], found["mixes"]) == (2, 2)


def test_sparta_mixes_the_share_that_it_sends():
    (one, two, three) = metrics_of(fleet("sparta", 3, steps=1, share=0.3))
    share = round(0.3 * 40) / 40 / 3
    np.testing.assert_allclose(one["weights"], [0.0, share, share])
    np.testing.assert_allclose(two["weights"], [share, 0.0, share])
    np.testing.assert_allclose(three["weights"], [share, share, 0.0])


@pytest.mark.parametrize(("nodes", "rounds"), [(1, 6), (2, 2)])
def test_few_nodes_are_counted_by_their_ranks(nodes, rounds):
    """One node has a mean of all in every step, two have one every third."""
    settings = {"inner": "model_averaging", "settings": {"period": 3}}
    ranks = fleet("hierarchical", 2 * nodes, steps=6, node_size=2, **settings)
    for number, found in enumerate(metrics_of(ranks)):
        want = np.full(2 * nodes, rounds / (2 * nodes))
        want[number] = found["weights"][number]  # a rank's own: not counted alike
        assert found["rounds"] == rounds
        np.testing.assert_allclose(found["weights"], want)


@pytest.mark.parametrize("mixing", ["fixed_ring", "random_ring", "random_pairs"])
def test_adpsgd_realises_a_doubly_stochastic_matrix_whoever_is_slow(mixing):
    machine = Machine(step_s=1.0, latency_s=1e-3, jitter=0.3)
    faults = Faults(slow={"1": 10.0})
    settings = {"mixing": mixing, "mixes_per_step": 3.0}
    ranks = fleet("adpsgd", 5, steps=30, machine=machine, faults=faults, **settings)
    matrix = realised_by(metrics_of(ranks))
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
    assert 0.0 < realised_gap(metrics_of(ranks)) < 1.0


@pytest.mark.parametrize(
    ("name", "settings", "rounds"),
    [
        ("allreduce", {}, 20),
        ("delay_by_one", {}, 20),
        ("model_averaging", {"period": 5, "warmup": 3}, 6),
        ("bmuf", {"period": 5}, 4),
        ("gossip_bmuf", {"period": 5, "group_size": 4}, 4),
    ],
)
def test_averages_over_all_ranks_leave_nothing(name, settings, rounds):
    metrics = metrics_of(fleet(name, 4, steps=20, **settings))
    assert realised_gap(metrics) == pytest.approx(1.0)
    assert [own["mixes"] for own in metrics] == [rounds] * 4
    for rank, own in enumerate(metrics):
        mixed = own["partners"] > 0
        assert mixed.tolist() == [peer != rank for peer in range(4)]


@pytest.mark.long
def test_gossip_in_pairs_has_the_gap_of_random_pairs():
    ranks = fleet("gossip_bmuf", 6, steps=200, period=1, components=3)
    expected = 1 - expected_contraction("random_pairs", 6)
    assert realised_gap(metrics_of(ranks)) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(
    ("name", "size"), [("local", 3), ("async_sgd", 3), ("dpsgd", 1), ("allreduce", 1)]
)
def test_where_no_models_are_mixed_there_is_no_gap(name, size):
    assert math.isnan(realised_gap(metrics_of(fleet(name, size, steps=4))))


@pytest.mark.long
def test_consensus_and_the_worst_rank_are_those_of_the_ranks_own_models(run):
    trainers = run(3, "local", steps=30, train={"worst_rank_share": 1.0})
    summary = summary_of(trainers)
    assert summary["worst_rank_samples"] is None
    thetas = np.stack([t.learner.theta.numpy() for t in trainers]).astype(np.float64)
    mean = thetas.mean(axis=0)
    distances = np.linalg.norm(thetas - mean, axis=1)
    found = summary["per_rank"]["consensus_distance"]
    np.testing.assert_allclose(found, distances, rtol=1e-5)
    rms = float(np.sqrt((distances**2).mean()))
    assert summary["consensus_distance"] == pytest.approx(rms, rel=1e-5)
    relative = rms / float(np.linalg.norm(mean))
    assert summary["consensus_distance_relative"] == pytest.approx(relative, rel=1e-5)

    own = {
        split: [
            evaluate_alone(t.learner, t.task, split, t.config.train)[0].perplexity
            for t in trainers
        ]
        for split in ("valid", "test")
    }
    worst = int(np.argmax(own["valid"]))
    assert summary["worst_rank"] == worst
    assert summary["worst_rank_valid_perplexity"] == max(own["valid"])
    assert summary["worst_rank_test_perplexity"] == own["test"][worst]
    assert summary["per_rank"]["valid_perplexity"] == own["valid"]
    assert max(own["valid"]) != summary["valid_perplexity"]  # of the mean model


def test_where_all_ranks_hold_the_same_model_none_is_the_worst(run):
    """Three equal numbers: their mean, taken in float32, is another."""
    summary = summary_of(run(3, "allreduce", steps=10))
    assert summary["consensus_distance"] == 0.0
    assert summary["worst_rank"] is None
    assert summary["worst_rank_valid_perplexity"] is None
    assert "valid_perplexity" not in summary["per_rank"]


def test_the_worst_rank_is_measured_only_if_asked_for(run):
    summary = summary_of(run(2, "local", steps=10, train={"worst_rank": False}))
    assert summary["consensus_distance"] > 0.0
    assert summary["worst_rank"] is None


def test_the_worst_rank_takes_a_tenth_of_a_run_at_most(run):
    """10 steps of 40 samples: 400 / 10 samples for two splits, in whole batches."""
    trainers = run(2, "local", steps=10)
    summary = summary_of(trainers)
    most = 20
    assert summary["worst_rank_samples"] == most
    own, count = evaluate_alone(
        trainers[1].learner,
        trainers[1].task,
        "valid",
        trainers[1].config.train,
        most=most,
    )
    batch = next(
        iter(trainers[1].task.evaluation("valid", trainers[1].config.train, 0, 1))
    )
    assert most <= count < most + batch.num_samples
    assert summary["per_rank"]["valid_perplexity"][1] == own.perplexity


@pytest.mark.long
def test_the_log_holds_the_metrics_of_every_rank(run):
    total = 40 * 3 * 40
    trainers = run(
        3,
        "adpsgd",
        optim={"clip": 0.0},
        faults={"slow": {"1": 3.0}},
        train={"samples": total, "valid_every": total // 3},
    )
    summary = summary_of(trainers)
    logs = read_run(trainers[0].folder.path)
    for rank, trainer in enumerate(trainers):
        rows = logs[rank].rows
        assert set(rows) == set(LOG_FIELDS)
        assert (rows["staleness"].sum(axis=1) == rows["step"]).all()
        for name in ("bytes_sent", "bytes_received", "messages", "mixes", "seconds"):
            assert (np.diff(rows[name]) >= 0).all(), name
        for name in ("overlap", "idle"):
            assert ((rows[name] >= 0.0) & (rows[name] <= 1.0)).all(), name
        measured = rows["consensus_step"] >= 0
        assert 0 < measured.sum() < len(measured)
        assert (rows["consensus_step"][measured] < rows["step"][measured]).all()
        for name in ("consensus_distance", "spectral_gap"):
            assert np.isnan(rows[name][~measured]).all()
            assert (rows[name][measured] > 0.0).all()
        own = {name: values[rank] for name, values in summary["per_rank"].items()}
        assert own["staleness"] == trainer.strategy.metrics()["staleness"].tolist()
        assert own["steps"] == rows["step"][-1] == sum(own["staleness"])
        assert own["mixes"] == sum(own["partners"]) >= rows["mixes"][-1]
        assert own["bytes_sent"] >= rows["bytes_sent"][-1] > 0
    assert summary["staleness"] == np.sum(summary["per_rank"]["staleness"], 0).tolist()
    assert summary["messages"] == sum(summary["per_rank"]["messages"])
    assert 0.0 < summary["spectral_gap"] <= 1.0
    assert 0.0 <= summary["idle"] < 1.0


def test_what_a_strategy_does_not_send_is_not_counted(run):
    summary = summary_of(run(2, "local", steps=50))
    assert summary["messages"] == summary["bytes_sent"] == 0


def test_totals_of_an_earlier_program_can_be_loaded():
    earlier = {
        "step": 5,
        "seconds": 2.0,
        "train_seconds": 1.0,
        "blocked_s": 0.25,
        "in_flight_s": 0.5,
        "bytes_sent": 10,
        "bytes_received": 20,
        "loss_sum": 3.0,
        "loss_count": 1,
        "valid_perplexity": math.nan,
        "valid_error": math.nan,
        "ema_valid_perplexity": math.nan,
    }
    totals = Totals(**earlier)
    assert (totals.messages, totals.consensus_step) == (0, -1)
    assert (totals.overlap, totals.idle) == (0.5, 0.25)


@pytest.mark.long
@pytest.mark.parametrize("name", ["model_averaging", "bmuf", "gossip_bmuf", "dpsgd"])
def test_rows_of_a_resumed_run_are_those_of_the_uninterrupted_one(run, name):
    samples = 24 * 2 * 40
    train = {"samples": samples, "valid_every": samples // 4}
    whole = run(2, name, out="whole", train=train)
    run(2, name, out="parts", train=train, checkpoint={"every": 13 * 2 * 40})
    newest = max((whole[0].folder.path.parent / "parts/checkpoints").iterdir())
    for path in newest.iterdir():  # drop the last one: the one in the middle is left
        path.unlink()
    newest.rmdir()
    resumed = run(2, name, out="parts", resume=True, train=train)
    for rank in range(2):
        rows = read_run(resumed[0].folder.path)[rank].rows
        expected = read_run(whole[0].folder.path)[rank].rows
        assert rows["step"].tolist() == list(range(1, 25))
        for field in LOG_FIELDS.keys() - CLOCKS:
            np.testing.assert_array_equal(rows[field], expected[field], field)
