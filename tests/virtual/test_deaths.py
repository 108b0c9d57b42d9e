"""Ranks die in the virtual world, and the others leave them behind."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.errors import LeftBehindError, RanksDiedError, WorldError
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.profiles import FailAt
from mpilm.world.virtual import run_virtual

STEP = Machine(step_s=0.1, latency_s=1e-3)


def ring(world, comm):
    """Send to the next rank, receive from the one before."""
    x, y = np.ones(3), np.zeros(3)
    receive = comm.Irecv(y, (comm.rank - 1) % comm.size)
    send = comm.Isend(x, (comm.rank + 1) % comm.size)
    world.compute(lambda notify: None)
    receive.Wait()
    send.Wait()


def reduction(world, comm):
    request = comm.Iallreduce(np.ones(3), np.zeros(3))
    world.compute(lambda notify: None)
    request.Wait()


def barrier(world, comm):
    world.compute(lambda notify: None)
    comm.Barrier()


def objects(world, comm):
    world.compute(lambda notify: None)
    comm.allgather(world.rank)


KINDS = (ring, reduction, barrier, objects)


def survive(world, step, *, steps=8, serve=False):
    """Take steps whatever happens; return who was left after each death."""
    seen, done, comm = [], 0, world.comm.Dup()
    if serve:
        world.start(lambda: world.wait(lambda: None, "nothing, for ever"), "server")
    while done < steps:
        try:
            step(world, comm)
            done += 1
        except RanksDiedError as death:
            seen.append((death.ranks, world.shrink()))
            comm = world.comm.Dup()
            done = max(comm.allgather(done))
    total = np.ones(1)
    world.comm.Allreduce(total.copy(), total)
    return world.rank, world.size, total[0], seen


def run(main, size, *deaths):
    faults = Faults(profile=tuple(FailAt(rank=r, step=s) for r, s in deaths))
    return run_virtual(main, size, machine=STEP, faults=faults, can_shrink=True)


@pytest.mark.parametrize("serve", [False, True])
@pytest.mark.parametrize("step", KINDS)
@pytest.mark.parametrize("dead", [0, 1, 3])
def test_the_others_go_on(step, dead, serve):
    found = run(lambda world: survive(world, step, serve=serve), 4, (dead, 3))
    assert found[dead] is None
    left = [rank for rank in range(4) if rank != dead]
    alive = [found[rank] for rank in left]
    assert [rank for rank, *_ in alive] == [0, 1, 2]
    for _, size, total, seen in alive:
        assert (size, total) == (3, 3.0)
        assert seen == [((dead,), left)]


@pytest.mark.parametrize("step", KINDS)
def test_several_die_one_after_the_other_and_at_once(step):
    deaths = (1, 2), (4, 2), (0, 5)
    found = run(lambda world: survive(world, step), 6, *deaths)
    assert [result is None for result in found] == [
        *(True, True, False, False, True, False),
    ]
    assert [found[rank][:3] for rank in (2, 3, 5)] == [
        *((0, 3, 3.0), (1, 3, 3.0), (2, 3, 3.0)),
    ]
    assert found[2][3][0] == ((1, 4), [0, 2, 3, 5])


def test_the_last_one_is_alone():
    found = run(lambda world: survive(world, barrier), 3, (0, 1), (2, 3))
    assert found[1][:3] == (0, 1, 1.0)


def test_a_death_while_others_close_ends_nothing():
    def main(world):
        for _ in range(5 if world.rank == 1 else 1):
            world.compute(lambda notify: None)
        return world.rank

    assert run(main, 3, (1, 3)) == [0, None, 2]


def test_what_was_made_with_the_dead_is_refused_and_is_no_death():
    """An old communicator that failed was taken for a death: today's were ended."""

    def main(world):
        before = world.comm.Dup()
        with pytest.raises(RanksDiedError):
            barrier(world, before)
        world.shrink()
        refused(before)
        return world.comm.allgather(world.rank)

    assert run(main, 3, (1, 0)) == [[0, 1], None, [0, 1]]


def refused(before):
    """Assert that a communicator of other ranks takes nothing any more."""
    what = "of ranks before others died or joined"
    for use in (
        before.Improbe,
        before.Ibarrier,
        lambda: before.Isend(np.ones(1), 0),
    ):
        with pytest.raises(LeftBehindError, match=what):
            use()


def test_what_was_made_before_a_rank_joined_is_refused():
    def main(world):
        if world.joins:
            return world.comm.allgather(world.rank)
        before = world.comm.Dup()
        if world.rank == 0:
            world.recruit(("another",))
        world.sleep(60.0)  # it is ready by then
        assert world.grow() == 2
        refused(before)
        return world.comm.allgather(world.rank)

    assert run_virtual(main, 2, can_shrink=True) == [[0, 1, 2]] * 3


def test_what_is_done_after_a_death_wakes_nobody_who_waits_for_something_else():
    """A barrier of living ranks, which a death drove out of it, ended meanwhile."""
    slow = Machine(step_s=0.1, latency_s=100.0)

    def main(world):
        living = world.comm.Split(int(world.rank == 2))
        if world.rank == 2:
            world.compute(lambda notify: None)
        request = living.Ibarrier()
        with pytest.raises(RanksDiedError):
            request.Wait()
        assert world.shrink() == [0, 1]
        found = [world.comm.allgather(world.rank) for _ in range(3)]
        began_s = world.now_s()
        world.sleep(1000.0)
        return found, world.now_s() - began_s

    faults = Faults(profile=(FailAt(rank=2, step=0),))
    one, other, dead = run_virtual(
        main, 3, machine=slow, faults=faults, can_shrink=True
    )
    assert one == other == ([[0, 1]] * 3, 1000.0)
    assert dead is None


def test_without_it_a_death_ends_all():
    with pytest.raises(WorldError, match=r"rank 1: dies before step 2"):
        run_virtual(
            lambda world: survive(world, ring), 3,
            machine=STEP, faults=Faults(profile=(FailAt(rank=1, step=2),)),
        )  # fmt: skip
