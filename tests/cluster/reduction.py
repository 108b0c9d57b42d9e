"""Rank 0 prints the seconds of a reduction of 1 MB."""

from __future__ import annotations

import statistics

import numpy as np

from mpilm.world.mpi import MpiWorld

ROUNDS = 7

with MpiWorld() as world:
    x = np.ones(250_000, np.float32)
    took = []
    for _ in range(ROUNDS):
        world.comm.Barrier()
        start_s = world.now_s()
        world.comm.Allreduce(x, x.copy())
        took.append(world.now_s() - start_s)
    if world.rank == 0:
        print(statistics.median(took[2:]), flush=True)
