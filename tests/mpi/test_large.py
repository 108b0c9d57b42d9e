"""Messages above 2 GiB and of more than 2^31 elements.

The way of long buffers is tried with short ones, on all ranks and types; with really
long ones by hand, at two ranks (some 10 GB of memory, a minute):

    MPILM_TEST_LARGE=1 mpirun -n 2 python -m mpi4py -m pytest -x --with-mpi \
        --timeout=900 tests/mpi/test_large.py
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from mpilm.world.base import IN_PLACE, MAX, Comm
from mpilm.world.mpi import MpiWorld, large

GUARD = 77
LENGTHS = [7, 8, 20, 21, 22]  # around multiples of the most elements in a call
DTYPES = ["float32", "float64", "int32", "int64", "uint8"]


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of MPI takes more than seven elements."""
    monkeypatch.setattr(large, "MOST", 7)


@pytest.mark.mpich
@pytest.mark.usefixtures("short_calls")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_message_longer_than_a_call(
    world: MpiWorld, comm: Comm, length: int, dtype: str, agree: list[bool]
) -> None:
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    mine = (comm.rank + np.arange(length)).astype(dtype)
    want = [*((before + np.arange(length)).astype(dtype)), GUARD]
    counted = world.traffic.bytes_received
    for probed in (False, True):
        whole = np.full(length + 1, GUARD, dtype)
        if probed:
            send = comm.Isend(mine, after, 3)
            message = world.wait(lambda: comm.Improbe(tag=3), "a message")
            agree.append(message.nbytes == mine.nbytes)
            message.Recv(whole[:-1])
        else:
            receive = comm.Irecv(whole[:-1], before, 3)
            send = comm.Isend(mine, after, 3)
            receive.Wait()
        send.Wait()
        agree.append(whole.tolist() == want)
    agree.append(world.traffic.bytes_received - counted == 2 * mine.nbytes)


@pytest.mark.mpich
@pytest.mark.usefixtures("short_calls")
def test_a_short_message_into_a_long_buffer(comm: Comm, agree: list[bool]) -> None:
    """And one of another shape: its pieces end elsewhere."""
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    for length, room in ((3, 30), (8, 30), (16, 20)):
        buf = np.full(room, GUARD, np.int32)
        receive = comm.Irecv(buf, before)
        comm.Isend(np.arange(length, dtype=np.int32), after).Wait()
        receive.Wait()
        agree.append(buf.tolist() == [*range(length), *[GUARD] * (room - length)])


@pytest.mark.mpich
@pytest.mark.usefixtures("short_calls")
@pytest.mark.parametrize("length", LENGTHS)
def test_collectives_longer_than_a_call(
    world: MpiWorld,
    comm: Comm,
    length: int,
    agree: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = comm.rank + np.arange(length)
    most = comm.size - 1 + np.arange(length)
    for background in {world.background, False}:
        monkeypatch.setattr(world.progress, "background", background)
        for start in (False, True):
            for in_place in (False, True):
                whole = np.append(mine if in_place else 0 * mine, GUARD)
                send = IN_PLACE if in_place else mine
                if start:
                    comm.Iallreduce(send, whole[:-1], MAX).Wait()
                else:
                    comm.Allreduce(send, whole[:-1], MAX)
                agree.append(whole.tolist() == [*most, GUARD])
    whole = np.append(mine, GUARD)
    root = comm.size - 1
    comm.Bcast(whole[:-1], root)
    agree.append(whole.tolist() == [*(root + np.arange(length)), GUARD])


@pytest.mark.skipif(
    "MPILM_TEST_LARGE" not in os.environ, reason="MPILM_TEST_LARGE is not set: 10 GB"
)
@pytest.mark.mpi(min_size=2)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype, length", [("float32", 6e8), ("uint8", 2.2e9)])
def test_more_than_a_c_int_counts(
    world: MpiWorld, dtype: str, length: float, agree: list[bool]
) -> None:
    """Bytes, then elements."""
    comm, size = world.comm, int(length)
    x = np.zeros(size, dtype)
    marks = [0, size // 2, size - 1]
    if comm.rank == 0:
        x[marks] = [1, 2, 3]
    sent, received = world.traffic.bytes_sent, world.traffic.bytes_received
    for probed in (False, True):
        if comm.rank == 0:
            comm.Isend(x, 1).Wait()
        elif comm.rank == 1 and probed:
            message = world.wait(comm.Improbe, "a message")
            agree.append(message.nbytes == x.nbytes)
            message.Recv(x)
        elif comm.rank == 1:
            comm.Irecv(x, 0).Wait()
        agree.append(comm.rank > 1 or x[marks].tolist() == [1, 2, 3])
        if comm.rank > 0:
            x[marks] = 0
        comm.Barrier()
    agree.append(world.traffic.bytes_sent - sent == 2 * x.nbytes * (comm.rank == 0))
    got = world.traffic.bytes_received - received
    agree.append(got == 2 * x.nbytes * (comm.rank == 1))
    comm.Bcast(x)
    agree.append(x[marks].tolist() == [1, 2, 3])
    comm.Allreduce(IN_PLACE, x)
    agree.append(x[marks].tolist() == [comm.size * n for n in (1, 2, 3)])
    agree.append(int(np.count_nonzero(x)) == 3)
