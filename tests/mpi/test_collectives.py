"""Collectives: rank arithmetic is the oracle; a guard element follows each buffer."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from mpilm.errors import WorldError
from mpilm.world.base import IN_PLACE, MAX, MIN, SUM, Comm, Op, Request
from mpilm.world.mpi import MpiWorld

GUARD = 77
DTYPES = ["float32", "float64", "int32", "int64", "uint8"]
KINDS = ["numpy", "torch"]


def guarded(values: Any, dtype: str, kind: str) -> tuple[Any, Any]:
    """Return a buffer with `values` and the array it is the beginning of."""
    whole = np.append(np.asarray(values), GUARD).astype(dtype)
    if kind == "torch":
        torch = pytest.importorskip("torch")
        whole = torch.from_numpy(whole)
    return whole[:-1], whole


def expected(op: Op, size: int, length: int) -> np.ndarray:
    """Reduce `rank + index` over ranks."""
    all_RN = np.arange(size)[:, None] + np.arange(length)[None, :]
    return {SUM: all_RN.sum(0), MAX: all_RN.max(0), MIN: all_RN.min(0)}[op]


@pytest.mark.mpich
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [SUM, MAX, MIN], ids=lambda op: op.name)
def test_allreduce(
    comm: Comm, op: Op, dtype: str, kind: str, agree: list[bool]
) -> None:
    mine = comm.rank + np.arange(13)
    want = expected(op, comm.size, 13)
    for start in (False, True):
        for in_place in (False, True):
            buf, whole = guarded(mine if in_place else 0 * mine, dtype, kind)
            send, untouched = guarded(mine, dtype, kind)
            source = IN_PLACE if in_place else send
            if start:
                comm.Iallreduce(source, buf, op).Wait()
            else:
                comm.Allreduce(source, buf, op)
            agree.append(np.array_equal(np.asarray(buf), want))
            agree.append(int(whole[-1]) == GUARD)
            agree.append(np.array_equal(np.asarray(untouched)[:-1], mine))


def test_an_empty_vector_and_a_large_one(comm: Comm, agree: list[bool]) -> None:
    for length in (0, 1, 1_000_003):
        x = np.full(length, comm.rank + 1.0, np.float32)
        comm.Allreduce(IN_PLACE, x)
        agree.append(bool(np.all(x == comm.size * (comm.size + 1) / 2)))


@pytest.mark.mpich
def test_many_reductions_under_way_keep_their_order(
    comm: Comm, agree: list[bool]
) -> None:
    vectors = [np.full(50 * n + 1, comm.rank + n, np.float64) for n in range(40)]
    requests: list[Request] = []
    for n, x in enumerate(vectors):
        if n % 7 == 3:  # a blocking call in between must take its turn
            comm.Allreduce(IN_PLACE, x)
        elif n % 7 == 5:
            comm.Bcast(x, root=n % comm.size)
        elif n % 7 == 6:
            comm.Barrier()
            requests.append(comm.Ibarrier())
            requests.append(comm.Iallreduce(IN_PLACE, x))
        else:
            requests.append(comm.Iallreduce(IN_PLACE, x))
    for request in reversed(requests):
        request.Wait()
    for n, x in enumerate(vectors):
        ranks = sum(range(comm.size)) + comm.size * n
        want = n % comm.size + n if n % 7 == 5 else ranks
        agree.append(bool(np.all(x == want)))


def test_communicators_may_be_used_in_different_orders(
    world: MpiWorld, agree: list[bool]
) -> None:
    if not world.background:
        pytest.skip("needs MPI_THREAD_MULTIPLE")
    comms = [world.comm.Dup() for _ in range(3)]
    vectors = [np.full(1000, float(n)) for n in range(3)]
    order = [(n + world.rank) % 3 for n in range(3)]
    requests = [comms[n].Iallreduce(IN_PLACE, vectors[n]) for n in order]
    for request in requests:
        request.Wait()
    for n, x in enumerate(vectors):
        agree.append(bool(np.all(x == n * world.size)))


def test_a_reduction_ends_without_help_from_the_learner(
    world: MpiWorld, agree: list[bool]
) -> None:
    if not world.background:
        pytest.skip("needs MPI_THREAD_MULTIPLE")
    x = np.ones(2_000_000, np.float32)
    request = world.comm.Iallreduce(IN_PLACE, x)
    start_s = world.now_s()
    while not request.done and world.now_s() < start_s + 30.0:  # calls no MPI
        np.ones((64, 64)) @ np.ones((64, 64))
    agree.append(request.done and bool(np.all(x == world.size)))
    request.Wait()


@pytest.mark.mpich
@pytest.mark.parametrize("kind", KINDS)
def test_bcast_from_every_root(comm: Comm, kind: str, agree: list[bool]) -> None:
    for root in range(comm.size):
        buf, whole = guarded(100 * comm.rank + np.arange(9), "int32", kind)
        comm.Bcast(buf, root)
        agree.append(np.array_equal(np.asarray(buf), 100 * root + np.arange(9)))
        agree.append(int(whole[-1]) == GUARD)


def test_ibarrier_waits_for_the_last(comm: Comm, agree: list[bool]) -> None:
    token = np.zeros(1, np.int32)
    if comm.rank > 0:
        request = comm.Ibarrier()
        agree.append(not request.Test())
        comm.Send(token, 0)
    else:
        for _ in range(comm.size - 1):
            comm.Recv(token)
        request = comm.Ibarrier()
    request.Wait()
    agree.append(request.Test())


def test_nobody_leaves_a_barrier_before_the_last_comes(
    world: MpiWorld, agree: list[bool]
) -> None:
    world.comm.Barrier()
    if world.rank == world.size - 1:
        world.sleep(0.1)
    came_s = time.monotonic()  # one clock: the tests run on one machine
    world.comm.Barrier()
    left_s = time.monotonic()
    times = world.comm.allgather((came_s, left_s))
    agree.append(min(left for _, left in times) >= max(came for came, _ in times))


def test_allgather(comm: Comm, agree: list[bool]) -> None:
    found = comm.allgather({"rank": comm.rank, "text": "x" * comm.rank})
    agree.append(found == [{"rank": r, "text": "x" * r} for r in range(comm.size)])


def test_groups(world: MpiWorld, agree: list[bool]) -> None:
    comm = world.comm
    turned = comm.Split(0, key=-comm.rank)
    assert turned is not None
    agree.append(turned.rank == comm.size - 1 - comm.rank)
    upper = comm.Split(None if comm.rank == 0 else 1)
    agree.append(upper is None if comm.rank == 0 else upper.size == comm.size - 1)
    node = comm.Split_node()
    agree.append(node.size == world.local_size and node.rank == world.local_rank)
    keys = comm.allgather((comm.Dup().key, comm.Dup().key))
    agree.append(len(set(keys)) == 1 and len(set(keys[0])) == 2)


def test_bad_buffers_are_refused(world: MpiWorld, agree: list[bool]) -> None:
    bad = [
        [1.0, 2.0],
        np.zeros((2, 2)),
        np.zeros(8)[::2],
        np.zeros(3, np.complex64),
    ]
    for buf in bad:
        with pytest.raises(WorldError, match="buffer"):
            world.comm.Allreduce(IN_PLACE, buf)
    with pytest.raises(WorldError, match="differ in length"):
        world.comm.Allreduce(np.zeros(3), np.zeros(4))
    with pytest.raises(WorldError, match="root"):
        world.comm.Bcast(np.zeros(3), root=world.size)
    agree.append(world.comm.allgather(1) == [1] * world.size)  # nobody is out of step


def test_traffic_of_collectives(world: MpiWorld, agree: list[bool]) -> None:
    comm, traffic, size = world.comm, world.traffic, world.size
    agree.append(comm.Dup().traffic is traffic)
    sent, received, calls = (
        traffic.bytes_sent,
        traffic.bytes_received,
        traffic.messages,
    )
    comm.Allreduce(IN_PLACE, np.zeros(1000, np.float32))
    comm.Iallreduce(IN_PLACE, np.zeros(1000, np.float32)).Wait()
    comm.Bcast(np.zeros(100, np.float64), root=0)
    comm.Barrier()
    moved = 2 * (2 * 4000 * (size - 1) // size)
    bcast = 800 if size > 1 else 0
    root = world.rank == 0
    agree.append(traffic.bytes_sent - sent == moved + bcast * root)
    agree.append(traffic.bytes_received - received == moved + bcast * (not root))
    agree.append(traffic.messages - calls == 4)


@pytest.mark.mpi(min_size=2)
def test_overlap_is_measured(world: MpiWorld, agree: list[bool]) -> None:
    if not world.background:
        pytest.skip("needs MPI_THREAD_MULTIPLE")
    traffic, late = world.traffic, world.rank == world.size - 1
    x = np.ones(1000, np.float32)

    def hidden_share(step: Any) -> float:
        world.comm.Barrier()
        blocked_s, in_flight_s = traffic.blocked_s, traffic.in_flight_s
        step()
        blocked_s = traffic.blocked_s - blocked_s
        return 1 - blocked_s / (traffic.in_flight_s - in_flight_s)

    def blocking() -> None:
        world.sleep(0.3 * late)
        world.comm.Allreduce(IN_PLACE, x)

    def beside() -> None:  # five buckets, but one wait: they count once
        world.sleep(0.3 * late)
        requests = [world.comm.Iallreduce(IN_PLACE, x[:n]) for n in range(1, 6)]
        world.sleep(0.8)
        for request in requests:
            request.Wait()

    def waiting() -> None:
        world.sleep(0.3 * late)
        for request in [world.comm.Iallreduce(IN_PLACE, x[:n]) for n in range(1, 6)]:
            request.Wait()

    shares = [hidden_share(step) for step in (blocking, beside, waiting)]
    if not late:
        agree.extend([shares[0] < 0.3, shares[1] > 0.7, shares[2] < 0.3])
