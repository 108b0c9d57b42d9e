"""Collectives: results against numpy, costs against formulae, misuse."""

import dataclasses
from math import ceil, floor, log2

import numpy as np
import pytest
import torch

from mpilm.errors import WorldError
from mpilm.world import machine as costs
from mpilm.world.base import IN_PLACE, MAX, MIN, SUM
from mpilm.world.machine import Collectives, Link, Machine
from mpilm.world.virtual import run_virtual

SLOW = Machine(latency_s=1.0, bandwidth_Bps=8.0, step_s=0.0)
SIZES = [1, 2, 3, 4, 7, 8]
ORACLES = {SUM: np.add, MAX: np.maximum, MIN: np.minimum}


def vectors(size, dtype, count=33):
    rng = np.random.default_rng(size)
    if np.dtype(dtype).kind == "f":
        return [rng.standard_normal(count).astype(dtype) for _ in range(size)]
    return [rng.integers(0, 200, count).astype(dtype) for _ in range(size)]


def folded(parts, op):
    """The reduction in the order of ranks, in the type of the buffers."""
    total = parts[0].copy()
    for part in parts[1:]:
        total = ORACLES[op](total, part)
    return total


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", [SUM, MAX, MIN])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint8"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_allreduce_is_the_fold_over_ranks(size, op, dtype, library):
    parts = vectors(size, dtype)
    make = torch.from_numpy if library == "torch" else np.asarray

    def main(world):
        rank, comm = world.rank, world.comm
        world.sleep([3.0, 1.0, 2.0, 0.0, 5.0, 4.0, 7.0, 6.0][rank])  # out of order
        in_place = make(parts[rank].copy())
        comm.Allreduce(IN_PLACE, in_place, op)
        source, target = make(parts[rank].copy()), make(np.zeros_like(parts[rank]))
        comm.Allreduce(source, target, op)
        start = make(parts[rank].copy())
        request = comm.Iallreduce(IN_PLACE, start, op)
        request.Wait()
        return [np.asarray(x) for x in (in_place, target, start, source)]

    expected = folded(parts, op)
    for rank, results in enumerate(run_virtual(main, size)):
        for result in results[:3]:
            np.testing.assert_array_equal(result, expected, strict=True)
        np.testing.assert_array_equal(results[3], parts[rank])


def test_ranks_may_mix_numpy_and_torch():
    def main(world):
        make = torch.ones if world.rank % 2 else np.ones
        buf = make(4, dtype=(torch if world.rank % 2 else np).float32)
        world.comm.Allreduce(IN_PLACE, buf)
        world.comm.Bcast(buf, root=1)
        return type(buf), buf.tolist()

    results = run_virtual(main, 4)
    assert [values for _, values in results] == [[4.0] * 4] * 4
    assert results[0][0] is np.ndarray
    assert results[1][0] is torch.Tensor


@pytest.mark.parametrize("size", SIZES)
def test_bcast_copies_the_buffer_of_the_root(size):
    def main(world):
        results = []
        for root in range(world.size):
            buf = np.full(3, 10.0 * world.rank)
            world.comm.Bcast(buf, root)
            results.append(buf.tolist())
        return results

    expected = [[10.0 * root] * 3 for root in range(size)]
    assert run_virtual(main, size) == [expected] * size


def test_buffers_are_read_at_the_call_and_written_at_the_end():
    def main(world):
        vector, result = np.ones(4), np.zeros(4)
        world.sleep(float(-world.rank % world.size))  # rank 0, then from the last on
        request = world.comm.Iallreduce(vector, result)
        vector[:] = 99.0
        world.sleep(4.0)
        early = result.copy()
        request.Wait()
        return early.tolist(), result.tolist()

    machine = Machine(latency_s=10.0, step_s=0.0)
    assert run_virtual(main, 4, machine=machine) == [([0.0] * 4, [4.0] * 4)] * 4


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13, 128])
@pytest.mark.parametrize("msg_bytes", [0, 8, 1024, 10**7])
def test_costs_are_those_of_the_formulae(size, msg_bytes):
    latency_s, bandwidth_Bps = 0.5, 64.0
    link = Link(latency_s, bandwidth_Bps)
    how = costs.as_messages(link)
    transfer_s = msg_bytes / bandwidth_Bps
    up = ceil(log2(size)) if size > 1 else 0
    power = 2 ** round(log2(size)) == size
    rounds = round(log2(size)) if power else floor(log2(size)) + 2
    doubling = rounds * (latency_s + transfer_s)
    ring = 2 * (size - 1) * latency_s + 2 * (size - 1) / size * transfer_s
    near = pytest.approx
    assert costs.message(link, msg_bytes).total_s == latency_s + transfer_s
    assert costs.barrier(how, size).total_s == up * latency_s
    assert costs.broadcast(how, size, msg_bytes).total_s == near(
        up * (latency_s + transfer_s)
    )
    assert costs.allreduce(how, size, msg_bytes).total_s == near(min(doubling, ring))


def test_what_probe_has_measured_of_collectives_is_what_they_cost():
    """Entering them in our own software, and a reduction apart from its messages."""
    machine = Machine(
        latency_s=1.0,
        bandwidth_Bps=8.0,
        enter_s=0.5,
        reduce_latency_s=2.0,
        reduce_Bps=4.0,
        step_s=0.0,
    )

    def main(world):
        comm, times = world.comm, []
        for call in (
            comm.Barrier,
            lambda: comm.Bcast(np.zeros(2)),
            lambda: comm.Allreduce(IN_PLACE, np.zeros(1)),
            lambda: comm.Sendrecv(np.zeros(1), world.rank ^ 1, 0, np.zeros(1)),
        ):
            start_s = world.now_s()
            call()
            times.append(world.now_s() - start_s)
        return times

    rounds = 2
    expected = [rounds * 1.5, rounds * (1.5 + 2.0), rounds * (0.5 + 2.0 + 2.0), 2.0]
    assert run_virtual(main, 4, machine=machine) == [expected] * 4
    small = machine.scaled(8.0)
    how = small.collectives(same_node=False)
    assert how == Collectives(Link(1.0, 1.0), Link(2.0, 0.5), 0.5)
    assert (
        costs.allreduce(how, 4, 8).total_s
        == costs.allreduce(machine.collectives(same_node=False), 4, 64).total_s
    )


def test_all_that_is_counted_in_bytes_is_scaled_and_nothing_else():
    fields = [field.name for field in dataclasses.fields(Machine)]
    values = {name: 8.0 * (n + 1) for n, name in enumerate(fields) if name != "jitter"}
    values |= {n: int(values[n]) for n in ("burst_bytes", "eager_bytes")}
    values["ranks_per_node"] = 4
    found = dataclasses.asdict(Machine(**values).scaled(8.0))
    for name, value in values.items():
        in_bytes = name.endswith(("_Bps", "_bytes"))
        assert found[name] == (value / 8.0 if in_bytes else value), name


def times_of(call, size, machine):
    """The time at which each rank has left `call`."""

    def main(world):
        call(world)
        return world.now_s()

    return run_virtual(main, size, machine=machine)


def test_collectives_start_with_the_last_rank_and_end_everywhere_at_once():
    def call(collective):
        def run(world):
            world.sleep(float(world.rank))
            collective(world.comm)

        return run

    # 5 ranks, 16 doubles, 1 s and 8 bytes/s
    short = call(lambda comm: comm.Allreduce(IN_PLACE, np.zeros(1)))
    long = call(lambda comm: comm.Allreduce(IN_PLACE, np.zeros(160)))
    bcast = call(lambda comm: comm.Bcast(np.zeros(16)))
    barrier = call(lambda comm: comm.Barrier())
    assert times_of(short, 5, SLOW) == [4.0 + 4 * (1.0 + 1.0)] * 5
    assert times_of(long, 5, SLOW) == [4.0 + 8 * 1.0 + 8 / 5 * 160.0] * 5
    assert times_of(bcast, 5, SLOW) == [4.0 + 3 * (1.0 + 16.0)] * 5
    assert times_of(barrier, 5, SLOW) == [4.0 + 3.0] * 5


def test_a_group_inside_a_node_uses_the_link_of_the_node():
    machine = Machine(latency_s=1.0, ranks_per_node=2, node_latency_s=0.25, step_s=0.0)

    def main(world):
        node = world.comm.Split_node()
        start_s = world.now_s()
        node.Barrier()
        inside_s = world.now_s() - start_s
        world.comm.Barrier()
        return inside_s, world.now_s() - start_s - inside_s

    assert run_virtual(main, 4, machine=machine) == [(0.25, 2.0)] * 4


def test_transfers_queue_at_the_ports_and_latencies_overlap():
    def main(world):
        comm = world.comm
        requests = [comm.Iallreduce(IN_PLACE, np.zeros(8)) for _ in range(3)]
        times = []
        for request in requests:
            request.Wait()
            times.append(world.now_s())
        return times

    # two ranks: one round of 1 s + 64 bytes / 8 bytes/s
    assert run_virtual(main, 2, machine=SLOW) == [[9.0, 17.0, 25.0]] * 2


def test_a_collective_waits_for_a_busy_port():
    def main(world):
        if world.rank == 0:
            world.comm.Isend(np.zeros(8), 1)
        elif world.rank == 1:
            world.comm.Irecv(np.zeros(8), 0)
        world.comm.Barrier()
        return world.now_s()

    # the barrier begins when the message has left, at 8 s
    assert run_virtual(main, 4, machine=SLOW) == [10.0] * 4


def test_ibarrier_is_done_when_all_have_come():
    def main(world):
        world.sleep(2.0 * world.rank)
        barrier = world.comm.Ibarrier()
        early = barrier.Test()
        world.wait(barrier.Test, "the others")
        return early, world.now_s()

    assert run_virtual(main, 3, machine=SLOW) == [(False, 6.0)] * 3


def test_at_size_one_collectives_are_done_at_once():
    def main(world):
        vector = np.arange(3.0)
        requests = [world.comm.Iallreduce(IN_PLACE, vector), world.comm.Ibarrier()]
        assert all(request.Test() for request in requests)
        world.comm.Bcast(vector)
        return vector.tolist(), world.now_s(), world.traffic

    values, now_s, traffic = run_virtual(main, 1)[0]
    assert (values, now_s) == ([0.0, 1.0, 2.0], 0.0)
    assert (traffic.bytes_sent, traffic.bytes_received) == (0, 0)


def test_what_is_counted_of_collectives():
    def main(world):
        vector = np.zeros(10, np.float32)
        comm = world.comm.Dup()
        comm.Allreduce(IN_PLACE, vector)
        comm.Bcast(vector, root=1)
        world.sleep(float(world.rank))
        comm.Barrier()
        return world.traffic

    traffics = run_virtual(main, 4, machine=Machine(latency_s=1.0))
    moved = 2 * 40 * 3 // 4
    assert [t.bytes_sent for t in traffics] == [moved, moved + 40, moved, moved]
    assert [t.bytes_received for t in traffics] == [
        moved + 40,
        moved,
        moved + 40,
        moved + 40,
    ]
    assert [t.messages for t in traffics] == [3] * 4  # Dup moves nothing
    blocked_s = [t.blocked_s for t in traffics]
    assert np.allclose(np.diff(blocked_s), -1.0)  # who comes late waits less
    assert all(t.overlap == 0.0 for t in traffics)


def test_overlap_is_the_share_hidden_behind_computing():
    def main(world):
        vector = np.zeros(8)
        request = world.comm.Iallreduce(IN_PLACE, vector)  # 9 s
        world.sleep(6.0)
        request.Wait()
        return world.traffic.overlap

    assert run_virtual(main, 2, machine=SLOW) == [pytest.approx(6 / 9)] * 2


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        (
            [
                lambda c: c.Allreduce(IN_PLACE, np.zeros(4, np.float32)),
                lambda c: c.Bcast(np.zeros(1)),
            ],
            "calls Bcast of 8 bytes of float64 from root 0 on world (communicator 0)"
            " where rank 0 called Allreduce of 16 bytes of float32 (sum)",
        ),
        (
            [
                lambda c: c.Allreduce(IN_PLACE, np.zeros(2)),
                lambda c: c.Allreduce(IN_PLACE, np.zeros(3)),
            ],
            "calls Allreduce of 24 bytes",
        ),
        (
            [
                lambda c: c.Allreduce(IN_PLACE, np.zeros(2)),
                lambda c: c.Allreduce(IN_PLACE, np.zeros(4, np.float32)),
            ],
            "16 bytes of float32",
        ),
        (
            [
                lambda c: c.Allreduce(IN_PLACE, np.zeros(2)),
                lambda c: c.Allreduce(IN_PLACE, np.zeros(2), MAX),
            ],
            "(max)",
        ),
        (
            [lambda c: c.Bcast(np.zeros(2), 0), lambda c: c.Bcast(np.zeros(2), 1)],
            "from root 1",
        ),
        ([lambda c: c.Barrier(), lambda c: c.Ibarrier().Wait()], "calls Ibarrier"),
        ([lambda c: c.Dup(), lambda c: c.Split(0)], "calls Split"),
    ],
)
def test_ranks_that_call_different_collectives_are_named(calls, problem):
    def main(world):
        world.sleep(float(world.rank))
        calls[world.rank](world.comm)

    with pytest.raises(WorldError, match=r"^rank 1: calls ") as caught:
        run_virtual(main, 2)
    assert problem in str(caught.value)


def test_two_buffers_of_different_length_are_refused():
    with pytest.raises(WorldError, match="rank 0: Allreduce: the two buffers differ"):
        run_virtual(lambda w: w.comm.Allreduce(np.zeros(2), np.zeros(3)), 1)


def test_allgather_gives_every_rank_its_own_copies():
    def main(world):
        mine = {"rank": world.rank}
        everyone = world.comm.allgather(mine)
        mine["rank"] = -1
        everyone[0]["seen"] = world.rank
        world.comm.Barrier()
        return everyone, world.comm.allgather(world.rank * 1.5)

    for rank, (everyone, numbers) in enumerate(run_virtual(main, 3)):
        assert everyone == [{"rank": 0, "seen": rank}, {"rank": 1}, {"rank": 2}]
        assert numbers == [0.0, 1.5, 3.0]
