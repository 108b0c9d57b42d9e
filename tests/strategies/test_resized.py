"""Runs that are resumed on another number of ranks: models, samples, data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mpilm.data.batch import Batches
from mpilm.data.pool import PoolBatches
from mpilm.data.streams import Streams
from mpilm.errors import MpilmError
from mpilm.storage.checkpoint import complete_checkpoints
from mpilm.storage.state_file import read_state
from mpilm.strategies import STRATEGIES
from mpilm.strategies.base import Strategy
from mpilm.strategies.blocks import BlockStrategy
from mpilm.world.virtual import run_virtual

SETTINGS = {
    "model_averaging": {"period": 3},
    "bmuf": {"period": 4, "delay": 2},
    "gossip_bmuf": {"period": 3, "delay": 1},
    "async_sgd": {"momentum": 0.5},
    "eager_diloco": {"period": 3},
    "noloco": {"period": 3},
    "des_loc": {"period": 3},
    "sparse_loco": {"period": 3},
    "hierarchical": {"node_size": 2, "inner": "bmuf", "settings": {"period": 4}},
}
FINE = ("local", "adpsgd", "dpsgd", "delay_by_one", "allreduce", "model_averaging")


@pytest.fixture
def taken_over(monkeypatch):
    """Return what ranks went on from: rank -> theta before, and after; velocity."""
    seen = {}
    for kind in (Strategy, *STRATEGIES.values(), BlockStrategy):
        if "take_over" not in vars(kind):
            continue

        def watched(strategy, learner, merged, *, original=kind.take_over):
            before = learner.theta.numpy().copy()
            original(strategy, learner, merged)
            velocity = getattr(strategy.service, "velocity", None)
            kept = None if velocity is None else velocity.numpy().copy()
            after = learner.theta.numpy().copy()
            seen[strategy.world.rank] = before, after, kept

        monkeypatch.setattr(kind, "take_over", watched)
    return seen


def saved(folder):
    """Return the newest checkpoint: what is shared, and the own states by rank."""
    path = complete_checkpoints(folder / "checkpoints")[0]
    own = [read_state(path) for path in sorted(path.glob("rank-*.h5"))]
    return read_state(path / "shared.h5"), own


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [("gossip_bmuf", 2, {"filter": False, "delay": 1}), ("eager_diloco", 1, {})],
)
def test_a_run_goes_on_without_what_it_had_no_need_of(
    run, tmp_path, name, size, settings
):
    """A filter that is off, or that one rank alone does not need."""
    train = {"test": False, "worst_rank": False}
    strategy = {"strategy": {"period": 3, **settings}}
    run(3, name, out="x", train={**train, "samples": 1000}, **strategy)
    more = {**train, "samples": 2000}
    run(size, name, out="x", resume=True, train=more, **strategy)
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["ranks"] == size
    assert summary["samples"] >= 2000


@pytest.mark.long
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_goes_on_at_another_size(run, tmp_path, taken_over, name):
    size = {"hierarchical": 2, "sparta": 5, "async_sgd": 5, "noloco": 1}.get(name, 3)
    settings = {"strategy": SETTINGS.get(name, {})}
    train = {"test": False, "worst_rank": False}
    run(4, name, out="x", train={**train, "samples": 1100}, **settings)
    shared, own = saved(tmp_path / "x")
    mean = np.mean([state["learner/theta"] for state in own], axis=0)
    before = int(shared["samples"])
    settings["train"] = {**train, "samples": 3000}
    trainers = run(size, name, out="x", resume=True, **settings)
    assert sorted(taken_over) == list(range(size))
    for at, after, _ in taken_over.values():
        np.testing.assert_allclose(at, mean, atol=1e-6)
        assert np.array_equal(after, taken_over[0][1])
    if name in FINE:
        np.testing.assert_allclose(taken_over[0][1], mean, atol=1e-6)
    if name == "sgp":
        np.testing.assert_allclose(taken_over[0][1], shared["theta"], atol=1e-6)
    if name == "async_sgd":
        kept = [state["strategy/service/velocity"] for state in own]
        now = [velocity for _, _, velocity in map(taken_over.get, range(size))]
        assert np.array_equal(np.concatenate(now), np.concatenate(kept))
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["ranks"] == size
    assert summary["valid_perplexity"] < 40
    drawn = [t.learner.samples - before // size for t in trainers]
    assert all(samples % 40 == 0 for samples in drawn)
    assert summary["samples"] == before + sum(drawn)
    # nobody takes a step more than it must
    assert 3000 <= summary["samples"] < 3000 + 2 * size * 40


@pytest.mark.long
def test_samples_are_exact_where_they_cannot_be_shared_evenly(run, tmp_path):
    """1,120 samples go on on 3 ranks, then on 7: none is lost to rounding."""
    counts = []
    for size, samples in ((4, 1100), (3, 1600), (7, 2100)):
        train = {"test": False, "worst_rank": False, "samples": samples}
        run(size, "allreduce", out="x", resume=bool(counts), train=train)
        summary = json.loads((tmp_path / "x/summary.json").read_text())
        counts.append(summary["samples"])
    assert counts == [1120, 1600, 2160]


@pytest.mark.long
@pytest.mark.parametrize("name", ["bmuf", "gossip_bmuf"])
@pytest.mark.parametrize("momentum", ["classical", "nesterov"])
def test_the_filtered_model_and_its_momentum_stay(run, tmp_path, name, momentum):
    """W and Delta, whatever eta is on another number of ranks."""
    settings = {"period": 4, "momentum": momentum}
    run(4, name, steps=8, out="x", strategy=settings)
    shared, own = saved(tmp_path / "x")
    found = []
    original = BlockStrategy.take_over

    def watched(strategy, learner, merged):
        original(strategy, learner, merged)
        model = learner.theta.clone()
        strategy.momentum.model_(model)
        found.append((model.numpy(), strategy.momentum.delta.numpy().copy()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockStrategy, "take_over", watched)
        settings = {"strategy": settings, "train": {"samples": 2000}}
        run(2, name, out="x", resume=True, **settings)
    delta = np.mean([state["strategy/momentum/delta"] for state in own], axis=0)
    for model, kept in found:
        np.testing.assert_allclose(model, shared["theta"], atol=1e-6)
        np.testing.assert_allclose(kept, delta, atol=1e-6)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("sizes", [(4, 3, 5, 1), (3, 2, 4, 1), (2, 6, 1)])
def test_no_chunk_of_the_pool_is_lost_or_seen_twice(lockstep, sizes):
    """Ranks change their number in the middle of chunks; 30 chunks, 90 minibatches."""
    seen, places = [], []

    def main(world):
        counted_by = None if lockstep else world
        batches = PoolBatches(
            np.arange(30 * 3 * 4 + 1), 2, 2, 3, world.rank, world.size, seed=1,
            world=counted_by,
        )  # fmt: skip
        if places:
            batches.take_over(places, world.rank, world.size, samples=0)
        batches.start()
        batches.synchronise(0)
        own = number // world.size + (world.rank < number % world.size)
        for _ in range(own):
            seen.extend(batches.next().targets.ravel().tolist())
            world.sleep(0.1)
        world.comm.Barrier()
        place = batches.state()
        batches.close()
        return place

    for size in sizes:
        number = 17 if size > 1 else 90 - 17 * (len(sizes) - 1)
        places = run_virtual(main, size)
    assert sorted(seen) == list(range(1, 361))


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (3, 1)])
def test_rows_of_a_text_go_on_at_the_same_share_of_an_epoch(sizes):
    before, after = sizes
    tokens = np.arange(2 * 4 * 3 * 5 * 7 + 1)
    place = {"passes": 1, "rest": 0}
    first = Streams(tokens, 2, 5, 0, before)
    first.go_to({"passes": 1, "window": 2 * first.num_windows // 3})
    place = first.state()
    second = Streams(tokens, 2, 5, 0, after)
    second.take_over([place] * before, 0, after, samples=0)
    assert first.epoch == pytest.approx(second.epoch, abs=1.0 / second.num_windows)
    with pytest.raises(MpilmError, match="saved with steps = 5"):
        Streams(tokens, 2, 7, 0, after).take_over([place] * before, 0, after, 0)


def test_data_of_ones_own_say_what_would_work():
    class Own(Streams):
        resize = Batches.resize

    places = [Streams(np.arange(999), 2, 5, 0, 3).state()] * 3
    with pytest.raises(MpilmError, match=r"that of 3 ranks, here are 2.*with 3"):
        Own(np.arange(999), 2, 5, 0, 2).take_over(places, 0, 2, 0)
