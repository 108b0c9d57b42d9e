"""Small measurements between ranks: messages, reductions, progress beside computing.

Every function is called by all ranks of a communicator of mpi4py. Ranks that have no
part wait without burning their core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

clock = time.perf_counter

SHORT_BYTES, LONG_BYTES = 8, 16 << 20
ALLREDUCE_BYTES = (4 << 10, 1 << 20, 16 << 20)
BUSY_S = 0.05  # computing beside a message lasts at least so long; chosen, not tuned


def settle(comm: MPI.Comm) -> None:
    """Wait for all ranks, leaving the core to others."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(1e-3)


def message_s(comm: MPI.Comm, peer: int, num_bytes: int, rounds: int) -> float:
    """Return the seconds that a message from rank 0 to `peer` takes, on all ranks.

    The median of ping-pongs, halved. Collective.
    """
    settle(comm)
    buffer = np.zeros(num_bytes, np.uint8)
    took = []
    for _ in range(rounds + 2):
        start_s = clock()
        if comm.rank == 0:
            comm.Send(buffer, peer)
            comm.Recv(buffer, peer)
        elif comm.rank == peer:
            comm.Recv(buffer, 0)
            comm.Send(buffer, 0)
        took.append((clock() - start_s) / 2)
    seconds = statistics.median(took[2:])  # two rounds to warm up
    settle(comm)
    return float(comm.bcast(seconds, 0))


def link(comm: MPI.Comm, peer: int) -> tuple[float, float]:
    """Return latency, seconds, and bandwidth, bytes per second, of 0 -> `peer`."""
    latency_s = message_s(comm, peer, SHORT_BYTES, rounds=200)
    long_s = message_s(comm, peer, LONG_BYTES, rounds=6)
    return latency_s, LONG_BYTES / max(long_s - latency_s, 1e-9)


def peers(comm: MPI.Comm, hosts: list[str]) -> tuple[int | None, int | None]:
    """Return a rank on the node of rank 0 and one on another node, if there are any.

    Args:
        hosts: of all ranks.
    """
    others = range(1, comm.size)
    same = next((r for r in others if hosts[r] == hosts[0]), None)
    far = next((r for r in others if hosts[r] != hosts[0]), None)
    return same, far


def allreduce_s(comm: MPI.Comm, num_bytes: int, rounds: int = 5) -> float:
    """Return the seconds of an Allreduce of float32; the slowest rank, the median."""
    from mpi4py import MPI

    send = np.zeros(num_bytes // 4, np.float32)
    receive = np.empty_like(send)
    took = []
    for _ in range(rounds + 1):
        comm.Barrier()
        start_s = clock()
        comm.Allreduce(send, receive)
        took.append(comm.allreduce(clock() - start_s, MPI.MAX))
    return statistics.median(took[1:])


def busy(seconds: float) -> None:
    """Compute for `seconds`, without a call of MPI; other threads may run."""
    square = np.ones((96, 96), np.float32)
    end_s = clock() + seconds
    while clock() < end_s:
        square @ square


def hidden_share(
    exchange: Callable[[], list[Any]],
    compute: Callable[[float], None],
    barrier: Callable[[], None],
) -> float:
    """Return the share of an exchange that is over after computing beside it, 0 to 1.

    Args:
        exchange: starts it; returns its requests.
        compute: computes for so many seconds.
        barrier: waits for the other side.
    """
    shares = []
    for _ in range(4):
        barrier()
        start_s = clock()
        for request in exchange():
            request.Wait()
        alone_s = clock() - start_s
        barrier()
        requests = exchange()
        compute(max(BUSY_S, 2 * alone_s))
        start_s = clock()
        for request in requests:
            request.Wait()
        shares.append(1.0 - min(1.0, (clock() - start_s) / alone_s))
    return statistics.median(shares[1:])


def overlap(comm: Any, peer: int, compute: Callable[[float], None]) -> float | None:
    """Return `hidden_share` of long messages both ways between rank 0 and `peer`.

    None on the other ranks.

    Args:
        comm: of mpi4py or of the world.
    """
    if comm.rank not in (0, peer):
        return None
    other = peer if comm.rank == 0 else 0
    send, receive = np.zeros(LONG_BYTES, np.uint8), np.zeros(LONG_BYTES, np.uint8)
    ping, pong = send[:1].copy(), send[:1].copy()

    def barrier() -> None:
        comm.Sendrecv(ping, other, 8, pong, other, 8)

    def exchange() -> list[Any]:
        return [comm.Irecv(receive, other, 7), comm.Isend(send, other, 7)]

    return hidden_share(exchange, compute, barrier)
