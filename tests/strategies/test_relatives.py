"""What the relatives are where their settings make them another strategy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mpilm.learner.learner import Learner
from mpilm.strategies import strategy
from mpilm.strategies.sgp import goals_of
from mpilm.strategies.sparse_codes import SparseCodes
from mpilm.strategies.sparta import index_set
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual
from tests.strategies.fleets import fleet, targets, thetas
from tests.strategies.modules import Mixed, Points

NOISY = {"noise": 0.5, "momentum": 0.5}


@pytest.mark.parametrize(
    ("name", "settings", "other", "others"),
    [
        ("gossip_pga", {"period": 1}, "model_averaging", {"period": 1}),
        ("sparta", {"share": 1.0}, "model_averaging", {"period": 1}),
        (
            "des_loc",
            {"period": 4, "period_first": 4, "period_second": 4},
            "model_averaging",
            {"period": 4, "momentum": "average"},
        ),
    ],
)
def test_it_is_another_strategy_to_the_bit(name, settings, other, others):
    ranks = fleet(name, 3, learner=NOISY, **settings)
    theirs = fleet(other, 3, learner=NOISY, **others)
    assert np.array_equal(thetas(ranks), thetas(theirs))
    for one, two in zip(ranks, theirs, strict=True):
        assert (one.bytes_sent, one.bytes_received) == (
            two.bytes_sent,
            two.bytes_received,
        )


def test_after_a_global_average_all_ranks_are_equal_and_before_they_are_not():
    ends = [thetas(fleet("gossip_pga", 5, steps=n, period=4)) for n in (7, 8)]
    apart, together = (np.abs(models - models[0]).max() for models in ends)
    assert together == 0.0
    assert apart > 1e-3


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_push_sum_weights_are_one_where_each_rank_has_one_sender(size):
    even = fleet("sgp", size, graph="exponential", steps=20)
    assert [rank.strategy.weight for rank in even] == [1.0] * size
    uneven = [
        rank.strategy.weight for rank in fleet("sgp", size, graph="random", steps=20)
    ]
    assert sum(uneven) == size  # sums of powers of 1/2 are exact
    assert (max(uneven) > 1.0) == (size > 2)


def test_push_sum_finds_the_mean_where_plain_gossip_would_not():
    """Without gradients all z come to the mean of the first models."""
    first = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    settings = {"learner": {"lr": 0.0}, "scatter": first, "graph": "random"}
    ranks = fleet("sgp", 5, steps=60, **settings)
    wanted = np.broadcast_to(first.astype(np.float64).mean(axis=0), first.shape)
    np.testing.assert_allclose(thetas(ranks), wanted, atol=1e-5)
    assert np.ptp([rank.strategy.weight for rank in ranks]) > 0.1


def test_nobody_sends_to_itself_and_all_are_sent_to():
    rounds = [goals_of("random", 5, 3, number) for number in range(200)]
    for goals in rounds:
        assert all(goal != rank for rank, goal in enumerate(goals))
    assert {goal for goals in rounds for goal in goals} == set(range(5))


def test_every_parameter_is_drawn_about_as_often():
    counts = np.zeros(100)
    for step in range(2000):
        where = index_set(100, 0.1, 5, step)
        assert len(set(where.tolist())) == 10
        counts[where] += 1
    np.testing.assert_allclose(counts, 200.0, atol=6 * np.sqrt(180.0))


def test_each_moment_of_adamw_is_one_on_all_ranks_at_its_own_period():
    """What is equal after each step, over 12 steps."""

    def main(world):
        learner = Learner(
            Mixed(0),
            Points(world.rank),
            lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
            compute=world.compute,
        )
        settings = {"period": 2, "period_first": 3, "period_second": 4}
        chosen = strategy("des_loc", world, **settings)
        chosen.start(learner)
        found = []
        for _ in range(12):
            chosen.step(learner)
            vectors = {"theta": learner.theta, **learner.moments()}
            found.append({name: vector.clone() for name, vector in vectors.items()})
        return found

    ranks = run_virtual(main, 3)
    equal = {
        name: [
            step + 1
            for step in range(12)
            if all(
                torch.equal(rank[step][name], ranks[0][step][name]) for rank in ranks
            )
        ]
        for name in ranks[0][0]
    }
    assert equal == {
        "theta": [2, 4, 6, 8, 10, 12],
        "exp_avg": [3, 6, 9, 12],
        "exp_avg_sq": [4, 8, 12],
    }


@pytest.mark.parametrize("size", [1, 5, 16, 4096, 10_000])
@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_a_packet_has_the_largest_of_each_chunk_at_two_sizes(size, share):
    vector = np.random.default_rng(size).normal(size=size).astype(np.float32)
    codes = SparseCodes(size, 4096, share)
    packet = codes.packet(vector)
    chunks, kept = codes.num_chunks, codes.count
    bits = -(-2 * chunks * kept // 8)
    assert packet.nbytes == chunks * (2 * kept + 8) + bits
    out = codes.vector(packet)
    for start in range(0, size, codes.chunk):
        part, got = (v[start : start + codes.chunk] for v in (vector, out))
        sent = got != 0.0
        if len(part) == codes.chunk:  # zeros of the last one's padding may be sent
            assert sent.sum() == kept
        assert len(set(np.abs(got[sent]).tolist())) <= 2
        assert (np.sign(got[sent]) == np.sign(part[sent])).all()
        least = np.abs(part[sent]).min()
        assert (np.abs(part[~sent]) <= least).all()


def test_what_is_not_sent_comes_later():
    """One large entry and many small ones: all of them arrive, at decay 1."""
    codes = SparseCodes(8, 8, share=0.25)
    error, arrived = np.zeros(8, np.float32), np.zeros(8)
    wanted = np.array([9, 1, 1, 1, 1, 1, 1, 1], np.float32)
    for _ in range(400):
        error += wanted
        sent = codes.vector(codes.packet(error))
        error -= sent
        arrived += sent
    np.testing.assert_allclose(arrived / 400, wanted, rtol=0.05)


def test_sparse_loco_ranks_are_equal_after_a_block():
    ranks = fleet("sparse_loco", 4, steps=12, period=4, chunk=16, share=0.2)
    models = thetas(ranks)
    assert np.array_equal(models, np.broadcast_to(models[0], models.shape))
    assert np.abs(models[0] - ranks[0].first).max() > 0.1
    assert max(np.abs(rank.strategy.error).max() for rank in ranks) > 0.0


def test_eager_updates_hide_a_reduction_behind_a_whole_block():
    machine = Machine(step_s=1.0, bandwidth_Bps=60.0)  # 4 s for a reduction
    settings = {"period": 5, "steps": 30, "machine": machine}
    blocking = fleet("bmuf", 4, **settings)
    hidden = fleet("eager_diloco", 4, **settings)
    assert blocking[0].seconds > 50.0
    assert hidden[0].seconds == pytest.approx(30.0, rel=0.01)
    assert hidden[0].bytes_sent == blocking[0].bytes_sent


def growth(late, eta, step):
    """Return by what the outer steps grow: the largest root of (10) to (12), nesterov.

    Args:
        late: share of the others in a mean, whose updates are a block old.
        step: zeta h, where a block brings a rank by the share h to its minimum.
    """
    W, delta, before = np.eye(3)  # rows: of the state, from which all else is made
    update = -(W + eta * delta)  # D_i / h, from g
    mean = late * before + (1 - late) * update
    delta = eta * delta + step * mean
    return np.abs(np.linalg.eigvals([W + delta, delta, update])).max()


def largest_step(late, eta):
    """Return zeta h up to which the outer steps do not grow."""
    low, high = 0.0, 3.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if growth(late, eta, middle) < 1 else (low, middle)
    return low


def test_the_page_of_eager_diloco_has_the_limits_of_its_outer_step():
    page = (Path(__file__).parents[2] / "docs/eager_diloco.md").read_text()
    for name, late in (("4 ranks", 3 / 4), ("16 ranks", 15 / 16), ("ever more", 1)):
        limits = [f"{largest_step(late, eta):.2f}" for eta in (0.9, 0.6, 0.4, 0.2)]
        assert f"| {name} | {' | '.join(limits)} |" in page
    assert f"would be {largest_step(0, 0.9):.2f}" in page


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("eta", [0.9, 0.6, 0.4, 0.2])
@pytest.mark.parametrize("size", [4, 16])
def test_late_updates_want_a_small_outer_step(size, eta, share):
    def grows(step):
        """Return whether the model goes away from the mean minimum."""
        far = []
        for steps in (60, 240):
            ranks = fleet(
                "eager_diloco", size, steps=steps, learner={"lr": share},
                period=1, eta=eta, zeta=step / share,
            )  # fmt: skip
            far.append(np.abs(ranks[0].final - targets(ranks).mean(axis=0)).max())
        return far[1] > max(far[0], 1e-4)  # rounding

    limit = largest_step(1 - 1 / size, eta)
    assert not grows(0.93 * limit)
    assert grows(1.07 * limit)


def test_a_mix_of_divshare_is_the_mean_of_what_is_there():
    still = {"learner": {"lr": 0.0}, "machine": Machine(step_s=1.0)}
    first, second = fleet("divshare", 2, steps=2, scatter=True, fragments=1, **still)
    mean = (first.first.astype(np.float64) + second.first) / 2
    for rank in (first, second):
        np.testing.assert_allclose(rank.learner.theta, mean, atol=1e-6)
        assert rank.strategy.metrics()["weights"].sum() >= 0.5
    assert np.abs(first.first - mean).max() > 0.1


def test_fragments_of_divshare_go_their_own_ways():
    """All ranks of 5 get parts of all others', and hold no two models more."""
    still = {"learner": {"lr": 0.0}, "machine": Machine(step_s=1.0)}
    ranks = fleet("divshare", 5, steps=12, scatter=True, fragments=8, **still)
    for number, rank in enumerate(ranks):
        partners = rank.strategy.metrics()["partners"]
        assert partners[number] == 0
        assert (np.delete(partners, number) > 0).all()
    spread = thetas(ranks).std(axis=0).max()
    assert spread < 0.05 * np.stack([rank.first for rank in ranks]).std(axis=0).max()


def test_a_slow_network_drops_fragments_and_slows_nobody():
    """A fragment of 20 bytes takes 0.4 s of a step of 1 s: 2 or 3 of 8 get through."""
    settings = {"fragments": 8, "steps": 40}
    slow = Machine(step_s=1.0, bandwidth_Bps=50.0)
    ranks = fleet("divshare", 4, machine=slow, **settings)
    quick = fleet("divshare", 4, machine=Machine(step_s=1.0), **settings)
    for rank, other in zip(ranks, quick, strict=True):
        assert rank.seconds == pytest.approx(40.0)
        assert 1.0 / 8 < rank.bytes_sent / other.bytes_sent < 3.5 / 8
        assert len(rank.strategy.service.queue) <= 8


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gossip_pga", {"period": 5}),
        ("sgp", {"graph": "random"}),
        ("noloco", {"period": 5}),
        ("sparta", {"share": 0.1}),
        ("des_loc", {"period": 2, "period_first": 3}),
        ("sparse_loco", {"period": 5}),
        ("eager_diloco", {"period": 5}),
    ],
)
def test_the_trainer_resumes_it_from_a_checkpoint_file(run, name, settings):
    sections = {"strategy": settings, "optim": {"name": "adamw", "lr": 0.01}}
    steps = 3 * 40  # samples of all ranks in a step
    whole = run(3, name, out="whole", train={"samples": 16 * steps}, **sections)
    sections["checkpoint"] = {"every": 8 * steps}
    run(3, name, out="parts", train={"samples": 8 * steps}, **sections)
    resumed = run(
        3, name, out="parts", resume=True, train={"samples": 16 * steps}, **sections
    )
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(
            torch.as_tensor(one.learner.theta), torch.as_tensor(other.learner.theta)
        )
