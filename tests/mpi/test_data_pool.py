"""The common pool between real MPI ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mpilm.data.pool import PoolBatches
from mpilm.world.mpi import MpiWorld

BATCH, STEPS, WINDOWS = 2, 3, 4
TOKENS = np.arange(20 * BATCH * STEPS * WINDOWS + 1, dtype=np.uint32)


def pool(world: MpiWorld) -> PoolBatches:
    return PoolBatches(
        TOKENS, BATCH, STEPS, WINDOWS, world.rank, world.size, seed=1, world=world
    )


def draw(source: PoolBatches, number: int, step_s: float) -> list[int]:
    """Draw minibatches; return the leases that began, -1 for one of a wrong chunk."""
    leases = []
    for _ in range(number):
        batch = source.next()
        if batch.start:
            first = source.chunk(source.lease) * BATCH * STEPS * WINDOWS
            leases.append(source.lease if batch.inputs[0, 0] == first else -1)
        time.sleep(step_s)
    return leases


@pytest.mark.mpich
@pytest.mark.mpi(min_size=1)
def test_leases_are_given_once_and_go_on_after_a_checkpoint() -> None:
    """Rank 1 is slow; the pool is saved in the middle of chunks and taken up again."""
    with MpiWorld() as world:
        if world.size > 1 and not world.background:
            pytest.skip("this MPI does not give THREAD_MULTIPLE")
        slow = world.rank == 1
        source = pool(world)
        source.start()
        before = draw(source, 6 if slow else 30, 0.01 if slow else 0.001)
        state = source.state()
        rest = draw(source, 10, 0.001)
        source.close()

        resumed = pool(world)
        resumed.start()
        resumed.load_state(state)
        resumed.synchronise(0)
        again = draw(resumed, 10, 0.001)
        resumed.close()
        ranks = world.comm.allgather((before, rest, again))

    assert [len(first) for first, _, _ in ranks] == [
        2 if rank == 1 else 8 for rank in range(len(ranks))
    ]
    for which in (1, 2):  # what followed without a break, and after it
        leases = [lease for rank in ranks for lease in rank[0] + rank[which]]
        assert -1 not in leases
        assert len(set(leases)) == len(leases)
        missing = set(range(max(leases) + 1)) - set(leases)
        assert len(missing) <= len(ranks) - 1  # asked for and not begun
