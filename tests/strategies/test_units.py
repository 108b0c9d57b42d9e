"""Pushing some units of hidden matrices: which, what becomes of the rest, in runs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from mpilm.config import resolve
from mpilm.errors import ConfigError, MpilmError
from mpilm.learner.flat import Layout
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies.async_sgd import AsyncSgd, AsyncSgdConfig
from mpilm.strategies.units import Units, unit_matrices
from mpilm.world.virtual import run_virtual

LAYOUT = Layout.of(
    [
        ("embedding.weight", (5, 3), "embedding"),
        ("lstm.weight_ih_l0", (8, 3), "lstm"),
        ("lstm.bias_ih_l0", (8,), "lstm"),
        ("lstm.weight_hh_l0", (8, 2), "lstm"),
        ("softmax.weight", (5, 2), "softmax"),
    ]
)
HIDDEN = ("lstm.weight_ih_l0", "lstm.weight_hh_l0")
POOL = {"data": {"source": "pool"}}
ROWS = {
    "softmax": "sampled",
    "sampled_frequent": 4,
    "sampled_random": 16,
    "sparse": True,
}


@pytest.fixture
def run(run):
    """Return what trains with minibatches of 20 tokens: half of the words at most."""
    return functools.partial(run, batch=2)


def units(kind=np.array, *, random=0.25, unsent="kept", rank=0):
    config = AsyncSgdConfig(units=0.25, units_random=random, unsent=unsent)
    return Units(LAYOUT, config, rank, like=kind(np.zeros(1, np.float32)))


def draw_steps(number):
    random = np.random.default_rng(3)
    # row r is about r + 1 long: the largest are known
    steps = random.normal(1.0, 0.01, (number, LAYOUT.size)).astype(np.float32)
    for name in HIDDEN:
        rows = steps[:, LAYOUT[name].slice].reshape(number, 8, -1)
        rows *= np.arange(1, 9, dtype=np.float32)[:, None]
    return steps


def test_the_largest_are_chosen_and_others_are_drawn():
    chooser = units(unsent="dropped")
    assert tuple(s.name for s in chooser.matrices) == HIDDEN
    seen = set()
    for step, u in enumerate(draw_steps(50)):
        before = u.copy()
        for name, (ids, rows) in chooser.chosen(u, step).items():
            assert {6, 7} <= set(ids.tolist())
            assert len(ids) == 4
            assert (ids[1:] > ids[:-1]).all()
            table = before[LAYOUT[name].slice].reshape(8, -1)
            np.testing.assert_array_equal(rows, table[ids])
            seen |= set(ids.tolist())
        np.testing.assert_array_equal(u, before)
    assert seen == set(range(8))


def test_ranks_and_steps_draw_others_and_the_same_again():
    (u,) = draw_steps(1)

    def ids(rank, step):
        found = units(random=0.5, unsent="dropped", rank=rank).chosen(u, step)
        return found[HIDDEN[0]][0].tolist()

    assert ids(0, 1) == ids(0, 1)
    assert len({tuple(ids(rank, step)) for rank in range(3) for step in range(3)}) > 4


def test_what_is_pushed_and_kept_adds_up_to_all_steps():
    chooser, steps = units(), draw_steps(30)
    pushed = np.zeros(LAYOUT.size)
    for step, u in enumerate(steps.copy()):
        for name, (ids, rows) in chooser.chosen(u, step).items():
            pushed[LAYOUT[name].slice].reshape(8, -1)[ids] += rows
    for name in HIDDEN:
        where = LAYOUT[name].slice
        total = steps[:, where].sum(0, dtype=np.float64)
        np.testing.assert_allclose(pushed[where] + chooser.kept[where], total, 1e-5)
        lost = np.abs(chooser.kept[where]).max()
        assert 0.0 < lost < 0.6 * total.max()  # what is kept grows until it is pushed


def test_tensors_are_chosen_as_arrays_are():
    for unsent in ("dropped", "kept"):
        arrays, tensors = units(unsent=unsent), units(torch.tensor, unsent=unsent)
        for step, u in enumerate(draw_steps(4)):
            expected = arrays.chosen(u.copy(), step)
            found = tensors.chosen(torch.from_numpy(u.copy()), step)
            for name, (ids, rows) in expected.items():
                np.testing.assert_array_equal(found[name][0], ids)
                np.testing.assert_array_equal(found[name][1], rows)


# in runs
@pytest.mark.long
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("model", [ROWS, {}], ids=["rows", "dense"])
def test_only_chosen_units_move(run, model, clip):
    """One row of each matrix in a step, of 64: most stay as they were."""
    trainers = run(
        2, "async_sgd", steps=3, model=model, optim={"clip": clip},
        strategy={"units": 0.001}, **POOL,
    )  # fmt: skip
    (first,) = run(1, "local", steps=1, model=model, optim={"lr": 1e-30})
    for segment in unit_matrices(first.learner.layout):
        before = first.learner.theta[segment.slice].view(segment.shape)
        after = trainers[0].learner.theta[segment.slice].view(segment.shape)
        moved = (before != after).any(1)
        assert 1 <= moved.sum() <= 6
        assert len(moved) == 64


@pytest.mark.long
@pytest.mark.parametrize("unsent", ["dropped", "kept"])
def test_runs_learn_and_send_less_and_go_on_from_a_checkpoint(run, unsent):
    strategy = {"units": 0.1, "units_random": 0.05, "unsent": unsent}
    options = {"model": ROWS, **POOL}
    saves = {"checkpoint": {"every": 20 * 2 * 20}, "strategy": strategy, **options}
    whole = run(2, "async_sgd", steps=40, **options)
    run(2, "async_sgd", steps=20, out=unsent, **saves)
    some = run(2, "async_sgd", steps=40, out=unsent, resume=True, **saves)
    assert some[0].totals.valid_perplexity < 20  # of 40 words
    sent = [sum(t.totals.bytes_sent for t in trainers) for trainers in (some, whole)]
    assert sent[0] < 0.9 * sent[1]
    learner, strategy = some[0].learner, some[0].strategy
    kept = strategy.units.kept
    assert (kept is not None) == (unsent == "kept")
    if kept is not None:
        assert all(kept[s.slice].any() for s in unit_matrices(learner.layout))


@pytest.mark.long
def test_the_bytes_are_those_that_the_world_counts(run):
    settings = {"strategy": {"units": 0.3}, "model": ROWS, **POOL}
    found = run(3, "async_sgd", steps=7, **settings)
    for trainer in found:
        sent, received = trainer.strategy.moved_bytes(trainer.learner.layout)
        # leases of the pool are a few bytes each
        assert 0 <= trainer.totals.bytes_sent - sent < 2000
        assert 0 <= trainer.totals.bytes_received - received < 2000
        assert sent > 20_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": 0.0}, "units"),
        ({"units": 1.5}, "units"),
        ({"units": 0.5, "units_random": -0.1}, "units_random"),
        ({"units": 0.5, "units_random": 1.0}, "units_random"),
        ({"units": 0.7, "units_random": 0.4}, r"units \+ units_random = 1\.1: at most"),
        ({"unsent": "lost"}, "unsent"),
    ],
)
def test_rates_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve({"strategy": {"name": "async_sgd", **settings}})
    assert "\n" not in str(caught.value)


def test_a_model_without_hidden_matrices_is_refused():
    def main(world):
        strategy = AsyncSgd(world, AsyncSgdConfig(units=0.5))
        layout = Layout.of([("bias", (7,), "all")])
        learner = ProtocolLearner(7, compute=world.compute, seed=0, layout=layout)
        with pytest.raises(MpilmError, match=r"strategy.units = 0.5: the model has no"):
            strategy.require(learner)
        return True

    assert run_virtual(main, 2) == [True, True]
