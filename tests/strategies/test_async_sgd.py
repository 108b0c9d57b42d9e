"""async_sgd in the virtual world: every push counts once, pulls keep the bound."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.errors import ConfigError, WorldError
from mpilm.learner.flat import Layout, Segment
from mpilm.learner.quadratic import ProtocolLearner, layers
from mpilm.strategies import strategy
from mpilm.strategies.async_sgd import AsyncSgd, AsyncSgdConfig
from mpilm.strategies.row_server import RowServer
from mpilm.strategies.rows import num_servers, shards, shards_of
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, run_virtual
from tests.strategies.fleets import fleet, targets

STEP_S = 0.1
LAYOUT = layers(23)
TABLES = Layout(
    (
        Segment("lstm", 0, (5,), "lstm"),
        Segment("embed", 5, (7, 3), "embed", is_table=True),
        Segment("bias", 26, (5,), "out", is_table=True),
        Segment("out", 31, (4, 2), "out", is_table=True),
    )
)


def train(size, steps, *, settings=None, machine=None, faults=None, until_s=None, **of):
    """Train quadratics; `of`: options of the learners."""
    return fleet(
        "async_sgd", size, steps=steps, machine=machine, faults=faults,
        until_s=until_s, learner={"layout": LAYOUT, "lr": 0.1, **of},
        **(settings or {}),
    )  # fmt: skip


def lead(ranks):
    """Return how many steps the fastest rank was ever ahead of the slowest."""
    return max(lead for rank in ranks for lead in rank.leads)


def alone(steps, **learning):
    learner = ProtocolLearner(
        23, compute=lambda work, _: work(lambda _: None), seed=0, **learning
    )
    for _ in range(steps):
        learner.gradient()
        learner.update()
    return learner.theta


def test_one_rank_with_momentum_of_the_server_is_momentum_sgd():
    ranks = train(1, 20, settings={"momentum": 0.9})
    np.testing.assert_allclose(ranks[0].final, alone(20, momentum=0.9), atol=1e-5)


def test_an_optimizer_with_momentum_makes_the_step():
    ranks = train(2, [20, 0], momentum=0.9)
    np.testing.assert_allclose(ranks[0].final, alone(20, momentum=0.9), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("bound", [-1, 1])
def test_the_model_reaches_the_mean_minimum(bound):
    ranks = train(
        4, 400, lr=0.02, settings={"staleness_bound": bound},
        machine=Machine(step_s=STEP_S),
    )  # fmt: skip
    target = targets(ranks).mean(axis=0)
    begun = np.abs(ranks[0].first - target).max()
    assert np.abs(ranks[0].final - target).max() < 0.05 * begun


@pytest.mark.parametrize("bound", [0, 1, 4])
def test_nobody_is_further_ahead_than_the_bound(bound):
    run = {"faults": Faults(slow={"2": 10.0}), "machine": Machine(step_s=STEP_S)}
    ranks = train(4, 12, settings={"staleness_bound": bound}, **run)
    assert lead(ranks) == bound
    assert lead(train(4, 12, **run)) > 4


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_model_pulled_ahead_has_the_own_steps(wire, momentum):
    settings = {"ahead": True, "wire": wire}
    ranks = train(2, [20, 0], settings=settings, momentum=momentum)
    error = 1e-5 if wire == "float32" else 2e-2
    np.testing.assert_allclose(ranks[0].final, alone(20, momentum=momentum), atol=error)


@pytest.mark.parametrize("size", [2, 5])
def test_a_pull_ahead_is_hidden_behind_the_gradient(size):
    shard_s = 0.3 * STEP_S / size  # of every server, one after the other
    machine = Machine(
        step_s=STEP_S, latency_s=1e-5, bandwidth_Bps=4 * 23 / size / shard_s
    )

    def seconds(ahead):
        ranks = train(size, 20, machine=machine, settings={"ahead": ahead})
        return max(rank.seconds for rank in ranks) / 20

    assert seconds(False) > 1.1 * STEP_S
    assert seconds(True) < 1.04 * STEP_S  # the last pull is nobody's


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"momentum": 0.5}, "momentum = 0.5"),
        ({"staleness_bound": 0}, "staleness_bound = 0"),
        ({"units": 0.5}, "units = 0.5"),
    ],
)
def test_ahead_is_refused_beside_what_it_cannot_know(other, said):
    def main(world):
        learner = ProtocolLearner(23, compute=world.compute, seed=0)
        strategy("async_sgd", world, ahead=True, **other).require(learner)

    with pytest.raises(ConfigError, match=f"ahead = true: not together with {said}"):
        run_virtual(main, 2)


@pytest.mark.parametrize("servers", [1, 3, 5])
def test_few_ranks_hold_the_model(servers):
    ranks = train(
        5, 6, settings={"servers": servers, "staleness_bound": 2},
        machine=Machine(step_s=STEP_S, jitter=0.2),
    )  # fmt: skip
    services = [rank.strategy.service for rank in ranks]
    held = [server.own.stop - server.own.start for server in services]
    assert sum(held) == 23
    assert sum(length > 0 for length in held) == servers
    for rank, (server, length) in enumerate(zip(services, held, strict=True)):
        pushes = [6 if length or other == rank else 0 for other in range(5)]
        assert server.partners.tolist() == pushes
    pushed = sum(rank.learner.moved for rank in ranks)
    for rank in ranks:
        np.testing.assert_allclose(rank.final, ranks[0].first + pushed, atol=1e-5)
        moved = rank.strategy.moved_bytes(LAYOUT)
        assert moved == (rank.bytes_sent, rank.bytes_received)


def test_more_servers_than_ranks_are_refused():
    def main(world):
        learner = ProtocolLearner(23, compute=world.compute, seed=0)
        strategy("async_sgd", world, servers=5).require(learner)

    with pytest.raises(ConfigError, match=r"servers: 5 of 4 ranks .* at most 4"):
        run_virtual(main, 4)


@pytest.mark.parametrize(
    ("ranks", "elements", "servers"),
    [(3, 23, 3), (4, 23, 4), (5, 23, 4), (16, 1_000, 8), (16, 10_000, 16)],
)
def test_every_server_of_many_ranks_has_enough_to_serve(ranks, elements, servers):
    layout = layers(elements)
    found = shards_of(layout, ranks, num_servers(ranks, 4 * elements, 500))
    assert sum(shard.stop > shard.start for shard in found) == servers
    assert [found[0].start, found[-1].stop] == [0, elements]
    assert all(one.stop == other.start for one, other in pairwise(found))


@pytest.mark.long
@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_a_straggler_slows_nobody_else(factor):
    size = 16
    machine = Machine(step_s=STEP_S, latency_s=1e-4, bandwidth_Bps=4 * 23 / 1e-4)
    ranks = train(
        size, 10**6, until_s=8.0, machine=machine, lr=0.0,
        faults=Faults(slow={"3": factor}),
    )  # fmt: skip
    rates = [rank.learner.samples / rank.seconds for rank in ranks]
    assert sum(rates) >= 0.97 * (size - 1 + 1 / factor) / STEP_S


@pytest.mark.long
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
    width = max(segment.row_width for segment in layout)
    for shard in found:
        assert abs((shard.stop - shard.start) - layout.size / size) <= width
        for segment in layout:
            if segment.start < shard.start < segment.stop:
                assert (shard.start - segment.start) % segment.row_width == 0


row_choices = st.lists(
    st.fixed_dictionaries({s.name: st.sets(st.integers(0, 3)) for s in TABLES.tables}),
    max_size=3,
)


def ids_of(choice):
    return {name: np.array(sorted(ids), np.int64) for name, ids in choice.items()}


def rows_of(choice, value, kind=np.array):
    """Return a push of `value` everywhere in some rows."""
    rows = {}
    for name, ids in ids_of(choice).items():
        shape = (len(ids), TABLES[name].row_width)
        rows[name] = (kind(ids), kind(np.full(shape, value, np.float32)))
    return rows


def elements_of(choice):
    """Return where these rows, and all before the tables, lie in the flat vector."""
    found = [np.arange(TABLES.num_dense)]
    for name, ids in ids_of(choice).items():
        segment, width = TABLES[name], TABLES[name].row_width
        starts = segment.start + ids * width
        found.append((starts[:, None] + np.arange(width)).reshape(-1))
    return np.concatenate(found)


def ended(server):
    server.settle()
    server.retire()
    server.end()


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.lists(row_choices, min_size=6, max_size=6))
def test_rows_are_pulled_and_pushed_as_in_the_dense_model(size, choices):
    begun = np.arange(TABLES.size, dtype=np.float32)
    expected = begun.copy()
    for rank in range(size):
        for choice in choices[rank]:
            expected[elements_of(choice)] -= rank + 1

    def main(world):
        comm = world.comm.Dup()
        server = RowServer(world, comm, TABLES, momentum=0.0, bound=-1, servers=8)
        server.load(begun.copy())
        server.begin()
        dense = np.full(TABLES.num_dense, world.rank + 1, np.float32)
        for choice in choices[world.rank]:
            server.push_part(dense, rows_of(choice, world.rank + 1))
        ended(server)
        comm.Barrier()
        server.begin()
        whole = np.zeros_like(begun)
        server.pull(whole, 0)
        for choice in choices[world.rank]:
            part = np.full_like(begun, np.nan)
            server.pull_part(part, ids_of(choice), 0)
            where = elements_of(choice)
            np.testing.assert_array_equal(part[where], whole[where])
            assert np.isnan(np.delete(part, where)).all()
        ended(server)
        return whole

    simulation = Simulation(size)
    for whole in simulation.run(main):
        np.testing.assert_array_equal(whole, expected)
    assert simulation.undelivered == []


ALL = {segment.name: set(range(segment.shape[0])) for segment in TABLES.tables}


def test_momentum_of_rows_is_that_of_the_dense_model():
    def main(world, sparse):
        comm = world.comm.Dup()
        server = RowServer(world, comm, TABLES, momentum=0.5, bound=0, servers=8)
        server.load(np.zeros(TABLES.size, np.float32))
        server.begin()
        step = np.ones(TABLES.size, np.float32)
        out = np.zeros_like(step)
        for clock in range(3):
            server.pull(out, clock)
            if world.rank == 0 and not sparse:
                server.push(step)
            elif world.rank == 0:
                server.push_part(step[: TABLES.num_dense], rows_of(ALL, 1.0))
        ended(server)
        comm.Barrier()
        return server.values

    dense, rows = (
        np.concatenate(run_virtual(lambda world, sparse=s: main(world, sparse), 3))
        for s in (False, True)
    )
    np.testing.assert_array_equal(dense, rows)
    np.testing.assert_array_equal(dense, np.float32(-(1 + 1.5 + 1.75)))


def test_rows_of_tensors_are_those_of_arrays():
    torch = pytest.importorskip("torch")
    some = {"embed": {0, 3, 6}, "bias": {1}, "out": set()}

    def main(world, kind):
        server = RowServer(
            world, world.comm.Dup(), TABLES, momentum=0.5, bound=-1, servers=8
        )
        server.load(kind(np.arange(TABLES.size, dtype=np.float32)))
        server.begin()
        for value in (0.25, 0.5):
            dense = kind(np.full(TABLES.num_dense, value, np.float32))
            server.push_part(dense, rows_of(some, value, kind))
        ended(server)
        server.begin()
        out = kind(np.zeros(TABLES.size, np.float32))
        server.pull_part(out, ids_of({"embed": {0, 3, 4}, "out": {3}}), 0)
        ended(server)
        return np.concatenate([np.asarray(out), np.asarray(server.values)])

    for size in (1, 3):
        arrays = run_virtual(lambda world: main(world, np.array), size)
        tensors = run_virtual(lambda world: main(world, torch.tensor), size)
        for array, tensor in zip(arrays, tensors, strict=True):
            np.testing.assert_array_equal(tensor, array)


@pytest.mark.parametrize("ids", [[1, 1], [2, 0], [-1], [7]])
def test_rows_that_do_not_ascend_or_do_not_exist_are_refused(ids):
    def main(world):
        server = RowServer(world, world.comm, TABLES, momentum=0.0, bound=-1, servers=8)
        with pytest.raises(ValueError, match=r"embed: ids must ascend in 0\.\.6"):
            server.pull_part(np.zeros(TABLES.size), {"embed": np.array(ids)}, 0)
        return True

    assert run_virtual(main, 1) == [True]


def test_state_goes_on_where_it_was():
    momentum = {"momentum": 0.5}
    kept = [rank.strategy.state() for rank in train(3, 10, settings=momentum)]

    def main(world):
        strategy = AsyncSgd(world, AsyncSgdConfig(**momentum))
        strategy.start(ProtocolLearner(23, compute=world.compute, seed=9))
        strategy.load_state(kept[world.rank])
        return strategy.state()

    for state, before in zip(run_virtual(main, 3), kept, strict=True):
        assert before["clock"] == 10
        assert np.abs(before["service/velocity"]).max() > 0
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


@pytest.mark.parametrize("size", [1, 3])
def test_the_final_model_is_that_of_the_servers_whatever_theta_is(size):
    def main(world):
        learner = ProtocolLearner(
            23, compute=world.compute, seed=world.rank, layout=LAYOUT, lr=0.1
        )
        chosen = strategy("async_sgd", world)
        chosen.start(learner)
        for _ in range(3):
            chosen.step(learner)
        chosen.finish(learner)
        of_servers, out = learner.theta.copy(), np.zeros(23, np.float32)
        if not chosen.is_local:
            learner.theta[:] = world.rank
        chosen.final_model_(learner, out)
        return np.array_equal(out, of_servers) and bool(out.any())

    assert run_virtual(main, size) == [True] * size
