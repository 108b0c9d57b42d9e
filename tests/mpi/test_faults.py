"""Profiles of faults between real ranks: delays are at least as long as declared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from mpilm.world.base import IN_PLACE
from mpilm.world.faults import Faults
from mpilm.world.mpi import MpiWorld
from mpilm.world.profiles import Periodic, SlowLink

LATE_S = 0.1  # chosen: well above the pauses of whoever polls


@pytest.fixture(autouse=True)
def no_faults_afterwards(world: MpiWorld) -> Iterator[None]:
    yield
    world.configure(faults=None)


def test_a_profile_delays_its_steps_only(world: MpiWorld, agree: list[bool]) -> None:
    world._num_steps = 0
    slow = Periodic(ranks=(0,), factor=5.0, every_steps=2, for_steps=1)
    world.configure(faults=Faults(profile=(slow,)))
    took = []
    for _ in range(4):
        start_s = world.now_s()
        world.compute(lambda notify: world.sleep(0.02))
        took.append(world.now_s() - start_s)
    if world.rank == 0:
        agree.append(min(took[1], took[3]) >= 5 * 0.02 - 1e-4)
    agree.append(min(took) >= 0.02)


def test_messages_over_a_slow_link_come_late_and_in_order(
    world: MpiWorld, agree: list[bool]
) -> None:
    link = SlowLink(ranks=(0,), latency_s=LATE_S, bandwidth_Bps=4e4)
    world.configure(faults=Faults(profile=(link,)))
    comm, last = world.comm.Dup(), world.size - 1
    if last == 0:
        pytest.skip("needs two ranks")
    start_s = world.now_s()
    models = [np.full(500, n, np.float32) for n in range(3)]
    if world.rank == 0:
        sends = [comm.Isend(model, last) for model in models]
        agree.append(not any(send.Test() for send in sends))
        for n, send in enumerate(sends):
            send.Wait()
            # 2,000 bytes in 0.05 s each, one after the other
            agree.append(world.now_s() - start_s >= LATE_S + 0.05 * (n + 1))
        comm.Send(models[0], last, tag=1)
    if world.rank == last:
        found = np.zeros(500, np.float32)
        for n in range(3):
            comm.Recv(found, 0, tag=0)
            agree.append(bool((found == n).all()))
        comm.Recv(found, 0, tag=1)
        agree.append(bool((found == 0).all()))


def test_a_collective_waits_for_a_slow_link(world: MpiWorld, agree: list[bool]) -> None:
    comm, last = world.comm.Dup(), world.size - 1
    if last == 0:
        pytest.skip("needs two ranks")
    link = SlowLink(ranks=(0,), peers=(last,), latency_s=LATE_S)
    world.configure(faults=Faults(profile=(link,)))
    x = np.ones(5, np.float32)
    start_s = world.now_s()
    comm.Allreduce(IN_PLACE, x)
    comm.Iallreduce(IN_PLACE, x).Wait()
    if world.rank in (0, last):
        agree.append(world.now_s() - start_s >= 2 * LATE_S)
    agree.append(bool((x == world.size**2).all()))
