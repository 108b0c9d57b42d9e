"""Random programs in random schedules: right results, same seed same run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.world.base import IN_PLACE, MAX, MIN, SUM
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation

machines = st.builds(
    Machine,
    latency_s=st.sampled_from([0.0, 1e-3, 0.5]),
    bandwidth_Bps=st.sampled_from([50.0, 1e9, float("inf")]),
    ranks_per_node=st.integers(1, 4),
    node_latency_s=st.sampled_from([0.0, 0.1]),
    node_bandwidth_Bps=st.sampled_from([100.0, 1e9]),
    step_s=st.sampled_from([0.0, 0.25]),
    jitter=st.sampled_from([0.0, 0.3, 1.0]),
    eager_bytes=st.sampled_from([0, 65_536]),
)
faults = st.builds(
    Faults,
    slow=st.dictionaries(st.just("0"), st.sampled_from([1.0, 5.0, 100.0])),
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("compute"), st.none()),
        st.tuples(st.just("allreduce"), st.sampled_from([SUM, MAX, MIN])),
        st.tuples(st.just("iallreduce"), st.integers(1, 4)),
        st.tuples(st.just("bcast"), st.integers(0, 5)),
        st.tuples(st.just("barrier"), st.none()),
        st.tuples(st.just("ring"), st.integers(1, 5)),
        st.tuples(st.just("pairs"), st.randoms(use_true_random=False)),
    ),
    max_size=12,
)
ORACLES = {SUM: np.add, MAX: np.maximum, MIN: np.minimum}


def perform(world, kind, choice, partner, x):
    """Do one operation of a random program on one rank's vector."""
    comm = world.comm
    size, rank = world.size, world.rank
    if kind == "compute":
        world.compute(lambda notify: None)
        x *= 0.5
    elif kind == "allreduce":
        comm.Allreduce(IN_PLACE, x, choice)
    elif kind == "iallreduce":
        parts = np.array_split(x, choice)
        requests = [comm.Iallreduce(IN_PLACE, part) for part in parts]
        world.compute(lambda notify: None)
        for request in requests:
            request.Wait()
    elif kind == "bcast":
        comm.Bcast(x, choice % size)
    elif kind == "barrier":
        barrier = comm.Ibarrier()
        world.wait(barrier.Test, "the others")
    elif kind == "ring":
        other = np.empty_like(x)
        to, source = (rank + choice) % size, (rank - choice) % size
        comm.Sendrecv(x, to, choice, other, source, choice)
        x += other
    elif kind == "pairs" and partner is not None:
        other = np.empty_like(x)
        receive = comm.Irecv(other, partner, 77)
        send = comm.Isend(x, partner, 77)
        receive.Wait()
        send.Wait()
        x[:] = (x + other) * 0.5


def expected_after(kind, choice, partners, xs):
    """The same operation on all ranks' vectors at once."""
    size = len(xs)
    if kind == "compute":
        return [x * 0.5 for x in xs]
    if kind in ("allreduce", "iallreduce"):
        total = xs[0].copy()
        for x in xs[1:]:
            total = ORACLES[choice if kind == "allreduce" else SUM](total, x)
        return [total.copy() for _ in xs]
    if kind == "bcast":
        return [xs[choice % size].copy() for _ in xs]
    if kind == "ring":
        return [x + xs[(rank - choice) % size] for rank, x in enumerate(xs)]
    if kind == "pairs":
        return [
            x if p is None else (x + xs[p]) * 0.5
            for x, p in zip(xs, partners, strict=True)
        ]
    return xs


def matching(size, random):
    """Who exchanges with whom in a random matching; None: nobody."""
    order = list(range(size))
    random.shuffle(order)
    partners = [None] * size
    for a, b in zip(order[::2], order[1::2], strict=False):
        partners[a], partners[b] = b, a
    return partners


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(st.integers(1, 6), operations, machines, faults, st.integers(0, 99))
def test_random_programs(size, program, machine, faults, seed):
    partners = [
        matching(size, choice) if kind == "pairs" else [None] * size
        for kind, choice in program
    ]

    def start(rank):
        return np.random.default_rng(rank).standard_normal(9).astype(np.float32)

    def main(world):
        x = start(world.rank)
        times = []
        for (kind, choice), partner in zip(program, partners, strict=True):
            perform(world, kind, choice, partner[world.rank], x)
            times.append(world.now_s())
        return x, times

    def run():
        simulation = Simulation(size, machine=machine, faults=faults, seed=seed)
        results = simulation.run(main)
        assert simulation.undelivered == []
        return results

    expected = [start(rank) for rank in range(size)]
    for (kind, choice), partner in zip(program, partners, strict=True):
        expected = expected_after(kind, choice, partner, expected)
    first, again = run(), run()
    for rank, (x, times) in enumerate(first):
        np.testing.assert_array_equal(x, expected[rank])
        assert times == sorted(times)
        assert times == again[rank][1]


def gossip(world, rounds, delays):
    """Snapshot and delta until all ranks are done; return the model."""
    comm, size = world.comm, world.size
    x = np.random.default_rng(world.rank).standard_normal(4)
    start = x.copy()
    finished = []
    snapshot, answer = 1, 2

    ending = []  # the barrier, once this rank's learner has finished

    def look():
        message = comm.Improbe(tag=snapshot)
        if message is None and finished and not ending:
            ending.append(comm.Ibarrier())
        return message or (bool(ending) and ending[0].Test())

    def serve():
        while (message := world.wait(look, "a snapshot or the end")) is not True:
            s = np.empty_like(x)
            message.Recv(s)
            delta = (x - s) * 0.5  # half of what the asker lacks
            x[:] -= delta
            comm.Isend(delta, message.source, answer)

    served = world.start(serve, "serving")
    rng = np.random.default_rng([7, world.rank])
    for _ in range(rounds if size > 1 else 0):
        world.sleep(delays * float(rng.random()))
        peer = (world.rank + 1 + int(rng.integers(size - 1))) % size
        d = np.empty_like(x)
        receive = comm.Irecv(d, peer, answer)
        comm.Isend(x, peer, snapshot)
        receive.Wait()
        x += d
    finished.append(True)
    served.join()
    return start, x


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.1, 3.0]),
    machines,
    st.integers(0, 99),
)
def test_gossip_conserves_the_sum_and_ends(size, rounds, delays, machine, seed):
    simulation = Simulation(size, machine=machine, seed=seed)
    results = simulation.run(lambda world: gossip(world, rounds, delays))
    before = sum(start for start, _ in results)
    after = sum(x for _, x in results)
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert simulation.undelivered == []
