"""Messages from rank to rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpilm.errors import WorldError
from mpilm.world.base import ANY_SOURCE, ANY_TAG, Comm
from mpilm.world.mpi import MpiWorld

GUARD = 77.0
LARGE = 1_500_000


def ring(comm: Comm) -> tuple[int, int]:
    """Return the ranks before and after this one."""
    return (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size


@pytest.mark.mpich
@pytest.mark.parametrize("length", [0, 1, 1000, LARGE])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_ring(comm: Comm, kind: str, length: int, agree: list[bool]) -> None:
    before, after = ring(comm)
    send: Any = np.full(length, float(comm.rank), np.float32)
    whole: Any = np.full(length + 1, GUARD, np.float32)
    if kind == "torch":
        torch = pytest.importorskip("torch")
        send, whole = torch.from_numpy(send), torch.from_numpy(whole)
    receive = comm.Irecv(whole[:-1], before, tag=5)
    comm.Isend(send, after, tag=5).Wait()
    receive.Wait()
    agree.append(bool((whole[:-1] == before).all()) and whole[-1] == GUARD)
    whole[:] = GUARD
    comm.Sendrecv(send, after, 6, whole[:-1], before, 6)
    agree.append(bool((whole[:-1] == before).all()) and whole[-1] == GUARD)


@pytest.mark.mpich
def test_messages_do_not_overtake(comm: Comm, agree: list[bool]) -> None:
    before, after = ring(comm)
    sends = [comm.Isend(np.full(1 + 400 * n, n), after) for n in range(30)]
    for n in range(30):
        buf = np.zeros(1 + 400 * n, np.int64)
        comm.Recv(buf, before)
        agree.append(bool(np.all(buf == n)))
    for send in sends:
        send.Wait()


def test_tags_and_sources_select(comm: Comm, agree: list[bool]) -> None:
    before, after = ring(comm)
    sends = [comm.Isend(np.array([tag]), after, tag) for tag in (1, 2, 3)]
    for source, tag, want in ((before, 3, 3), (ANY_SOURCE, 1, 1), (before, ANY_TAG, 2)):
        buf = np.zeros(1, np.int64)
        comm.Recv(buf, source, tag)
        agree.append(buf[0] == want)
    for send in sends:
        send.Wait()


@pytest.mark.mpich
@pytest.mark.parametrize("length", [3, LARGE])
def test_improbe(world: MpiWorld, comm: Comm, length: int, agree: list[bool]) -> None:
    before, after = ring(comm)
    agree.append(comm.Improbe() is None)
    world.comm.Barrier()
    send = comm.Isend(np.full(length, comm.rank + 0.5), after, tag=4)
    message = world.wait(lambda: comm.Improbe(tag=4), "a message")
    agree.append((message.source, message.tag) == (before, 4))
    agree.append(message.nbytes == 8 * length)
    agree.append(comm.Improbe() is None)  # matched: nobody else can have it
    buf = np.full(length + 1, GUARD)
    message.Recv(buf)
    agree.append(bool(np.all(buf[:-1] == before + 0.5)) and buf[-1] == GUARD)
    send.Wait()


def test_too_short_a_buffer(comm: Comm, agree: list[bool]) -> None:
    before, after = ring(comm)
    send = comm.Isend(np.zeros(5), after)
    with pytest.raises(WorldError, match="a message from rank"):
        comm.Recv(np.zeros(4), before)
    send.Wait()
    with pytest.raises(WorldError, match="dest"):
        comm.Isend(np.zeros(1), comm.size)
    agree.append(True)


@pytest.mark.mpi(min_size=2)
def test_a_large_message_arrives_while_the_sender_computes(
    world: MpiWorld, agree: list[bool]
) -> None:
    if not world.background:
        pytest.skip("needs MPI_THREAD_MULTIPLE")
    before, after = ring(world.comm)
    buf = np.zeros(LARGE)
    receive = world.comm.Irecv(buf, before)
    send = world.comm.Isend(np.full(LARGE, 1.0 + world.rank), after)
    start_s = world.now_s()
    while not (send.done and receive.done) and world.now_s() < start_s + 30.0:
        np.ones((64, 64)) @ np.ones((64, 64))  # calls no MPI
    agree.append(send.done and receive.done and bool(np.all(buf == 1.0 + before)))
    send.Wait()
    receive.Wait()


def test_traffic_of_messages(comm: Comm, agree: list[bool]) -> None:
    before, after = ring(comm)
    traffic = comm.traffic
    start = (traffic.bytes_sent, traffic.bytes_received, traffic.messages)
    comm.Sendrecv(np.zeros(10), after, 0, np.zeros(20), before, 0)
    end = (traffic.bytes_sent, traffic.bytes_received, traffic.messages)
    agree.append(tuple(np.subtract(end, start)) == (80, 80, 2))
