"""Row tables in whole runs: which strategies take them; that nothing else changes."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpilm.errors import MpilmError
from mpilm.learner.flat import Layout, Rows
from mpilm.strategies import STRATEGIES
from mpilm.strategies.row_sum import ON_ONE_NODE, OVER_A_NETWORK, RowSum
from mpilm.strategies.shared_rows import SharedRows
from mpilm.testing.fleet import with_tables
from mpilm.train.notes import introduction
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual
from mpilm.world.wire import WireComm

SAMPLED = {"softmax": "sampled", "sampled_frequent": 4, "sampled_random": 16}
MOMENTUM = {"optim": {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3}}
REFUSING = [name for name, kind in STRATEGIES.items() if not kind.takes_rows]


@pytest.fixture
def run(run):
    """Return what trains with minibatches of 20 tokens: half of the words at most."""
    return functools.partial(run, batch=2)


def named(trainer):
    learner = trainer.learner
    theta = learner.theta.clone()
    return {segment.name: theta[segment.slice] for segment in learner.layout}


def assert_close(trainers, others, bound):
    for trainer, other in zip(trainers, others, strict=True):
        expected = named(other)
        for name, value in named(trainer).items():
            assert (value - expected[name]).abs().max() <= bound, name


@pytest.mark.long
@pytest.mark.parametrize("sections", [{}, MOMENTUM], ids=["plain", "momentum"])
def test_local_trains_alike_with_rows_and_without(run, sections):
    sparse, dense = (
        run(2, "local", model={**SAMPLED, "sparse": rows}, **sections)
        for rows in (True, False)
    )
    assert sparse[0].learner.layout.tables
    assert_close(sparse, dense, 2e-6)
    first, second = (t[0].totals.valid_perplexity for t in (sparse, dense))
    assert first == pytest.approx(second, rel=1e-6)
    assert first < 35  # of 40 words


@pytest.mark.long
@pytest.mark.parametrize("sections", [{}, MOMENTUM], ids=["plain", "momentum"])
def test_a_run_with_rows_goes_on_where_it_stopped(run, tmp_path, sections):
    """A checkpoint brings all rows up to date: both runs write one in the middle."""
    saves = {"checkpoint": {"every": 20 * 20}}
    model = {**SAMPLED, "sparse": True}
    (whole,) = run(1, "local", steps=40, model=model, **sections, **saves)
    run(1, "local", steps=20, out="x", model=model, **sections, **saves)
    (resumed,) = run(
        1, "local", steps=40, out="x", resume=True, model=model, **sections, **saves
    )
    assert torch.equal(whole.learner.theta, resumed.learner.theta)


@pytest.mark.parametrize("name", REFUSING)
def test_other_strategies_refuse_rows_in_one_line(run, name):
    with pytest.raises(MpilmError) as caught:
        run(2, name, steps=1, model={"sparse": True}, data={"source": "pool"})
    assert "model.sparse" in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sample_without_rows_is_noted(run):
    for rows in (True, False):
        (trainer,) = run(1, "local", steps=1, model={**SAMPLED, "sparse": rows})
        parts = trainer.task, trainer.strategy, trainer.learner
        lines = introduction(trainer.config, *parts)
        noted = any("still go over the whole vocabulary" in line for line in lines)
        assert noted != rows


# among ranks: rows against whole models
TAKING = {
    "allreduce": {},
    "allreduce union": {"strategy": {"rows": "union"}},
    "allreduce gather": {"strategy": {"rows": "gather"}},
    "allreduce dense": {"strategy": {"rows": "dense"}},
    "model_averaging": {"strategy": {"period": 3}},
    "bmuf": {"strategy": {"period": 3, "momentum": "classical"}},
    "bmuf nesterov": {"strategy": {"period": 3}},
    "bmuf staggered": {"strategy": {"period": 3, "stagger": True}},
    "bmuf delayed": {"strategy": {"period": 4, "delay": 2}},
    "delay_by_one": {},
    "dpsgd": {"strategy": {"topology": "random_ring"}},
    "gossip_bmuf": {"strategy": {"period": 3}},
}
PAIRS = ("dpsgd", "gossip_bmuf")  # against whole models: test_row_laws.py


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "case", [c for c in TAKING if c not in PAIRS and not c.startswith("allreduce")]
)
def test_rows_are_exchanged_as_whole_models_are_to_the_bit(
    run, monkeypatch, case, size
):
    """The same learners, with rows; the reference exchanges all of them."""
    options = {"steps": 13, "model": {**SAMPLED, "sparse": True}, **TAKING[case]}
    sparse = run(size, case.split()[0], **options)

    def everything(self, learner):
        self.touched[:] = 1

    monkeypatch.setattr(SharedRows, "touch", everything)
    whole = run(size, case.split()[0], **options)
    assert_close(sparse, whole, 0.0)
    traffic = [t[0].strategy.rows.moved + t[0].strategy.moved for t in (sparse, whole)]
    assert traffic[0] < traffic[1]


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "case", [c for c in TAKING if c not in ("bmuf staggered", *PAIRS)]
)
def test_rows_train_as_dense_gradients_do_on_several_ranks(run, case, size):
    """Row tables lie last: staggered, the components come in another order."""
    sparse, dense = (
        run(size, case.split()[0], model={**SAMPLED, "sparse": rows}, **TAKING[case])
        for rows in (True, False)
    )
    assert sparse[0].learner.layout.tables
    assert_close(sparse, dense, 1e-5)


@pytest.mark.long
def test_allreduce_with_momentum_keeps_ranks_alike_to_the_bit(run):
    """A row is read by one rank and updated by all: each brings it up at its time."""
    sparse, dense = (
        run(3, "allreduce", steps=30, model={**SAMPLED, "sparse": rows}, **MOMENTUM)
        for rows in (True, False)
    )
    assert_close(sparse, dense, 1e-5)
    first, *others = (named(trainer) for trainer in sparse)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.long
@pytest.mark.parametrize("case", TAKING)
def test_the_bytes_of_rows_are_those_that_the_world_counts(run, case):
    model = {**SAMPLED, "sparse": True}
    for trainer in run(3, case.split()[0], steps=7, model=model, **TAKING[case]):
        sent, received = trainer.strategy.moved_bytes(trainer.learner.layout)
        assert (trainer.totals.bytes_sent, trainer.totals.bytes_received) == (
            sent,
            received,
        )
        assert sent > 0


@pytest.mark.long
@pytest.mark.parametrize("case", TAKING)
def test_a_run_of_several_ranks_goes_on_with_what_was_touched(run, case):
    """It stops in the middle of a block: rows of before must be exchanged after."""
    name, options = case.split()[0], {"model": {**SAMPLED, "sparse": True}}
    saves = {"checkpoint": {"every": 8 * 2 * 20}, **options, **TAKING[case]}
    whole = run(2, name, steps=16, **saves)
    run(2, name, steps=8, out=case, **saves)
    resumed = run(2, name, steps=16, out=case, resume=True, **saves)
    assert_close(whole, resumed, 0.0)


POOL = {"data": {"source": "pool"}}


@pytest.mark.long
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("bound", [-1, 0])
def test_async_sgd_pulls_and_pushes_rows_as_whole_models(run, bound, clip):
    """Messages cost nothing and ranks never ask at once: both runs have one order."""
    settings = {
        "optim": {"clip": clip},
        "strategy": {"staleness_bound": bound},
        "machine": {"latency_s": 0.0, "bandwidth_Bps": 1e15, "step_s": 0.1},
        "faults": {"slow": {"1": 1.37}},
        **POOL,
    }
    sparse, dense = (
        run(2, "async_sgd", steps=6, model={**SAMPLED, "sparse": rows}, **settings)
        for rows in (True, False)
    )
    assert_close(sparse, dense, 1e-5)
    sent, expected = (trainers[0].totals.bytes_sent for trainers in (sparse, dense))
    assert sent < 0.9 * expected
    for trainer, other in zip(sparse, dense, strict=True):
        more = [
            t.totals.bytes_sent - t.strategy.moved_bytes(t.learner.layout)[0]
            for t in (trainer, other)
        ]
        assert more[0] == more[1]  # of the pool


@pytest.mark.long
def test_async_sgd_with_rows_goes_on_from_its_checkpoint(run):
    options = {"model": {**SAMPLED, "sparse": True}, **POOL}
    saves = {"checkpoint": {"every": 10 * 2 * 20}, **options}
    run(2, "async_sgd", steps=10, out="a", **saves)
    resumed = run(2, "async_sgd", steps=20, out="a", resume=True, **saves)
    assert resumed[0].totals.valid_perplexity < 38
    assert_close(resumed[:1], resumed[1:], 0.0)  # the assembled model


@pytest.mark.parametrize(
    "name",
    [
        *("model_averaging", "bmuf", "delay_by_one", "async_sgd"),
        *("dpsgd", "gossip_bmuf", "adpsgd"),
    ],
)
def test_rows_that_move_by_themselves_are_refused(run, name):
    model = {**SAMPLED, "sparse": True}
    for sections in (MOMENTUM, {"optim": {"name": "adamw", "lr": 0.01}}):
        with pytest.raises(MpilmError, match="momentum or weight decay"):
            run(2, name, steps=1, model=model, **sections, **POOL)


class Sums:
    """Gradients of rows, summed in one way after the other on the same ranks."""

    def __init__(self, size, rows_of, num_words=200, width=8):
        parts = [("table", (num_words, width), "table"), ("bias", (num_words,), "bias")]
        layout = with_tables(Layout.of(parts), {"table", "bias"})
        self.chosen = []

        def main(world):
            learner = SimpleNamespace(grad=np.zeros(0, np.float32), layout=layout)
            found = []
            for way in ("union", "gather", "dense", *["auto"] * 4):
                if way != "auto" or len(found) == 3:
                    sums = RowSum(world.comm, layout, way)
                if world.rank == 0 and way == "auto":
                    self.chosen.append(sums.way())
                learner.rows = rows_of(world.rank, layout)
                sums.sum_(learner)
                whole = np.zeros(layout.size, np.float32)
                for segment in layout:
                    ids, values = learner.rows[segment.name]
                    assert (ids[1:] > ids[:-1]).all()
                    part = whole[segment.slice].reshape(segment.shape[0], -1)
                    part[ids] = values
                found.append(whole)
            return found

        self.found = run_virtual(main, size)


def drawn_rows(share, *, same=False):
    """Return what draws so many rows, on all ranks the same or fewer on later ones."""

    def rows_of(rank, layout):
        rank = 0 if same else rank
        draw = np.random.default_rng(rank)
        found = {}
        for segment in layout:
            num = max(0, round(share * segment.shape[0]) - rank)
            ids = np.sort(draw.choice(segment.shape[0], num, replace=False))
            values = draw.normal(size=(num, segment.row_width)).astype(np.float32)
            found[segment.name] = Rows(ids, values)
        return found

    return rows_of


@pytest.mark.parametrize(
    ("ranks_per_node", "prices"), [(4, ON_ONE_NODE), (2, OVER_A_NETWORK)]
)
def test_what_a_way_costs_goes_by_whether_all_ranks_share_a_node(
    ranks_per_node, prices
):
    layout = with_tables(Layout.of([("table", (9, 2), "table")]), {"table"})
    machine = Machine(ranks_per_node=ranks_per_node)
    found = run_virtual(
        lambda world: RowSum(world.comm, layout, "auto").prices, 4, machine=machine
    )
    assert found == [prices] * 4


@pytest.mark.parametrize("way", ["union", "gather", "dense"])
def test_rows_that_travel_rounded_are_united_whatever_is_asked_for(way):
    """Only there what rounding takes off is kept."""
    layout = with_tables(Layout.of([("table", (9, 2), "table")]), {"table"})

    def main(world):
        rounded = WireComm(world.comm, "bfloat16")
        return [RowSum(comm, layout, way).way() for comm in (world.comm, rounded)]

    assert run_virtual(main, 2) == [[way, "union"]] * 2


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.005, 0.1, 1.0])
def test_rows_are_summed_alike_in_every_way(size, share):
    rows_of = drawn_rows(share)
    sums = Sums(size, rows_of)
    parts = [("table", (200, 8), "table"), ("bias", (200,), "bias")]
    layout = Layout.of(parts)
    right = np.zeros(layout.size)
    for rank in range(size):
        for segment in layout:
            ids, values = rows_of(rank, layout)[segment.name]
            right[segment.slice].reshape(segment.shape[0], -1)[ids] += values
    for found in sums.found:
        for own, first in zip(found, sums.found[0], strict=True):
            assert np.array_equal(own, first)
            assert np.abs(own - right).max() <= 1e-5


@pytest.mark.parametrize(
    ("rows_of", "shape", "way"),
    [
        (drawn_rows(0.0001), (400_000, 2), "gather"),  # flags would be more
        (drawn_rows(0.0005), (40_000, 32), "union"),  # messages would be more
        (drawn_rows(0.1, same=True), (40_000, 32), "union"),
        (drawn_rows(0.1), (40_000, 32), "gather"),
        (drawn_rows(1.0), (40_000, 32), "dense"),
    ],
)
def test_the_cheapest_way_is_taken(rows_of, shape, way):
    num_words, width = shape
    chosen = Sums(4, rows_of, num_words=num_words, width=width).chosen
    assert chosen == ["union", way, way, way]
