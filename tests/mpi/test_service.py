"""A service between real ranks: it ends and begins again, whoever is first."""

from __future__ import annotations

import time

from mpilm.world.mpi import MpiWorld
from tests.virtual.test_service import Doubling

TURNS = 12


def test_ranks_begin_again_without_waiting_for_each_other(
    world: MpiWorld, agree: list[bool]
) -> None:
    service = Doubling(world)
    wanted: list[float] = []
    for turn in range(TURNS):
        if (world.rank + turn) % 3 == 0:
            time.sleep(2e-3)
        service.begin()
        if world.size > 1:
            numbers = [float(number) for number in range((world.rank + turn) % 5)]
            service.put(*numbers)
            wanted += [2.0 * number for number in numbers]
        service.end()
    agree.append(not service.is_running)
    agree.append(sorted(service.doubled) == sorted(wanted))
    answered = sum(world.comm.allgather(service.num_answered))
    agree.append(answered == sum(world.comm.allgather(len(wanted))))
