"""Two ranks: seconds of 1 MB one way, then both ways with one rank 3 ms late."""

from __future__ import annotations

import statistics

import numpy as np

from mpilm.world.mpi import MpiWorld

LATE_S, ROUNDS = 0.003, 7

with MpiWorld() as world:
    comm, other = world.comm, 1 - world.rank
    send, receive = np.ones(250_000, np.float32), np.ones(250_000, np.float32)

    def one_way() -> None:
        """Send it there, and one number back."""
        if world.rank == 0:
            comm.Send(send, other)
            comm.Recv(receive[:1], other)
        else:
            comm.Recv(receive, other)
            comm.Send(send[:1], other)

    def both_ways() -> None:
        """Exchange it."""
        world.sleep(LATE_S * world.rank)
        comm.Sendrecv(send, other, 0, receive, other, 0)

    for call in (one_way, both_ways):
        took = []
        for _ in range(ROUNDS):
            comm.Barrier()
            start_s = world.now_s()
            call()
            took.append(world.now_s() - start_s)
        if world.rank == 0:
            print(statistics.median(took[2:]), flush=True)
