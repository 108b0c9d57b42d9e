"""async_sgd in the virtual world: every push counts once, pulls keep the bound."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.errors import WorldError
from mpilm.flat import Layout
from mpilm.protocol import ProtocolLearner
from mpilm.strategies.async_sgd import AsyncSgd, AsyncSgdConfig
from mpilm.strategies.parameter_server import ParameterServer, row_width, shards
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, run_virtual
from tests.strategies.asynchronous import schedule, train

STEP_S = 0.1
TABLES = Layout.of(
    [("embed", (7, 3), "embed"), ("bias", (5,), "out"), ("out", (4, 2), "out")]
)


def test_random_schedules():
    for seed in range(120):
        schedule("async_sgd", seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_schedule(seed):
    schedule("async_sgd", seed)


def alone(steps, **learning):
    learner = ProtocolLearner(
        23, compute=lambda work, _: work(lambda _: None), seed=0, **learning
    )
    for _ in range(steps):
        learner.gradient()
        learner.update()
    return learner.theta


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_rank_is_local_to_the_bit(momentum):
    ranks = train("async_sgd", 1, 20, momentum=momentum, noise=0.1)
    expected = alone(20, momentum=momentum, noise=0.1)
    np.testing.assert_array_equal(ranks.models[0], expected)


def test_one_rank_with_momentum_of_the_server_is_momentum_sgd():
    ranks = train("async_sgd", 1, 20, settings={"momentum": 0.9})
    np.testing.assert_allclose(ranks.models[0], alone(20, momentum=0.9), atol=1e-5)


def test_the_local_optimizer_may_make_the_step():
    ranks = train(
        "async_sgd", 2, [20, 0], settings={"local_optimizer": True}, momentum=0.9
    )
    np.testing.assert_allclose(ranks.models[0], alone(20, momentum=0.9), atol=1e-5)


@pytest.mark.parametrize("bound", [-1, 1])
def test_the_model_reaches_the_mean_minimum(bound):
    ranks = train(
        "async_sgd", 4, 400, lr=0.02, settings={"staleness_bound": bound},
        machine=Machine(step_s=STEP_S),
    )  # fmt: skip
    target = np.mean([learner.target for learner in ranks.learners], axis=0)
    begun = np.abs(ranks.begun[0] - target).max()
    assert np.abs(ranks.models[0] - target).max() < 0.05 * begun


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_nobody_is_further_ahead_than_the_bound(bound):
    run = {"faults": Faults(slow={"2": 10.0}), "machine": Machine(step_s=STEP_S)}
    ranks = train("async_sgd", 4, 12, settings={"staleness_bound": bound}, **run)
    assert max(ranks.leads) == bound
    assert max(train("async_sgd", 4, 12, **run).leads) > 4


@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_a_straggler_slows_nobody_else(factor):
    size = 16
    machine = Machine(step_s=STEP_S, latency_s=1e-4, bandwidth_Bps=4 * 23 / 1e-4)
    ranks = train(
        "async_sgd", size, 10**6, until_s=8.0, machine=machine, lr=0.0,
        faults=Faults(slow={"3": factor}),
    )  # fmt: skip
    rates = [
        learner.samples / seconds
        for learner, seconds in zip(ranks.learners, ranks.seconds, strict=True)
    ]
    assert sum(rates) >= 0.97 * (size - 1 + 1 / factor) / STEP_S


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_are_those_of_pulls_and_pushes(size):
    steps, num_parameters = 10, 24
    ranks = train("async_sgd", size, steps, num_parameters=num_parameters)
    sent = received = 0
    for world in ranks.simulation.worlds:
        sent += world.traffic.bytes_sent
        received += world.traffic.bytes_received
    model = 4 * num_parameters * (size - 1)  # all shards to and from all other ranks
    pairs = size * (size - 1)
    worked = steps * (2 * model + 8 * pairs) + 16 * pairs  # the end: 8 and 8
    # the first Bcast, and the shards' in finish and final_model_: counted by receivers
    assert received == worked + 3 * model
    assert sent == worked + 4 * num_parameters * 3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=5),
    st.integers(1, 20),
)
def test_shards_cover_everything_and_cut_no_row(tables, size):
    layout = Layout.of([(f"t{i}", shape, "all") for i, shape in enumerate(tables)])
    found = shards(layout, size)
    assert len(found) == size
    assert found[0].start == 0
    assert found[-1].stop == layout.size
    for one, other in pairwise(found):
        assert one.stop == other.start
    width = max(row_width(segment) for segment in layout)
    for shard in found:
        assert abs((shard.stop - shard.start) - layout.size / size) <= width
        for segment in layout:
            if segment.start < shard.start < segment.stop:
                assert (shard.start - segment.start) % row_width(segment) == 0


row_choices = st.lists(
    st.tuples(st.integers(0, 2), st.sets(st.integers(0, 3), max_size=4)), max_size=5
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.lists(row_choices, min_size=6, max_size=6))
def test_rows_are_pulled_and_pushed_as_in_the_dense_model(size, choices):
    begun = np.arange(TABLES.size, dtype=np.float32)
    expected = begun.copy()

    def of(name, ids):
        segment = TABLES[name]
        width = row_width(segment)
        starts = segment.start + np.array(sorted(ids), np.int64) * width
        return (starts[:, None] + np.arange(width)).reshape(-1)

    for rank in range(size):
        for index, ids in choices[rank]:
            expected[of(TABLES.segments[index].name, ids)] -= rank + 1

    def main(world):
        comm = world.comm.Dup()
        server = ParameterServer(world, comm, TABLES, momentum=0.0, bound=-1)
        server.load(begun.copy())
        server.begin()
        for index, ids in choices[world.rank]:
            name = TABLES.segments[index].name
            rows = np.full(len(of(name, ids)), world.rank + 1, np.float32)
            server.push_rows(name, sorted(ids), rows)
        server.settle()
        server.retire(0)
        server.end()
        comm.Barrier()
        server.begin()
        dense = np.zeros_like(begun)
        server.pull(dense, 0)
        for index, ids in choices[world.rank]:
            name = TABLES.segments[index].name
            where = of(name, ids)
            rows = np.zeros(len(where), np.float32)
            server.pull_rows(name, sorted(ids), rows, 0)
            np.testing.assert_array_equal(rows, dense[where])
        server.retire(0)
        server.end()
        return dense

    simulation = Simulation(size)
    for dense in simulation.run(main):
        np.testing.assert_array_equal(dense, expected)
    assert simulation.undelivered == []


def test_momentum_of_rows_is_that_of_the_dense_model():
    def main(world, sparse):
        comm = world.comm.Dup()
        server = ParameterServer(world, comm, TABLES, momentum=0.5, bound=0)
        server.load(np.zeros(TABLES.size, np.float32))
        server.begin()
        step = np.ones(TABLES.size, np.float32)
        out = np.zeros_like(step)
        for clock in range(3):
            server.pull(out, clock)
            if world.rank == 0 and not sparse:
                server.push(step)
            elif world.rank == 0:
                for segment in TABLES:
                    ids = range(segment.shape[0])
                    server.push_rows(segment.name, list(ids), step[segment.slice])
        server.retire(3)
        server.end()
        comm.Barrier()
        return server.values

    dense, rows = (
        np.concatenate(run_virtual(lambda world, sparse=s: main(world, sparse), 3))
        for s in (False, True)
    )
    np.testing.assert_array_equal(dense, rows)
    np.testing.assert_array_equal(dense, np.float32(-(1 + 1.5 + 1.75)))


@pytest.mark.parametrize("ids", [[1, 1], [2, 0], [-1], [7]])
def test_rows_that_do_not_ascend_or_do_not_exist_are_refused(ids):
    def main(world):
        server = ParameterServer(world, world.comm, TABLES, momentum=0.0, bound=-1)
        with pytest.raises(ValueError, match=r"embed: ids must ascend in 0\.\.6"):
            server.push_rows("embed", ids, np.zeros(6, np.float32))
        return True

    assert run_virtual(main, 1) == [True]


def test_state_goes_on_where_it_was():
    momentum = {"momentum": 0.5}
    strategies = train("async_sgd", 3, 10, settings=momentum).strategies
    kept = [strategy.state() for strategy in strategies]

    def main(world):
        strategy = AsyncSgd(world, AsyncSgdConfig(**momentum))
        strategy.start(ProtocolLearner(23, compute=world.compute, seed=9))
        strategy.load_state(kept[world.rank])
        return strategy.state()

    for state, before in zip(run_virtual(main, 3), kept, strict=True):
        assert before["clock"] == 10
        assert np.abs(before["velocity"]).max() > 0
        assert before.keys() == state.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(state[name], value)


def test_without_threads_it_is_refused_in_one_line():
    def main(world):
        world.background = False
        strategy = AsyncSgd(world, AsyncSgdConfig())
        learner = ProtocolLearner(4, compute=world.compute, seed=0)
        with pytest.raises(WorldError, match="async_sgd needs MPI_THREAD_MULTIPLE"):
            strategy.require(learner)
        return True

    assert run_virtual(main, 2) == [True, True]
