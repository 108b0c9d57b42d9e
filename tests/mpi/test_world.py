"""Time, waiting, activities, locks and declared delays of the real world."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from mpilm.errors import ConfigError, DataError, MpilmError, WorldError
from mpilm.world.base import IN_PLACE
from mpilm.world.faults import Faults
from mpilm.world.mpi import MpiWorld


@pytest.fixture(autouse=True)
def threads(world: MpiWorld, request: pytest.FixtureRequest) -> None:
    if "activity" in request.node.name and not world.background:
        pytest.skip("needs MPI_THREAD_MULTIPLE")


def test_the_clock_runs_alike_on_all_ranks(world: MpiWorld, agree: list[bool]) -> None:
    world.comm.Barrier()
    clocks = world.comm.allgather(world.now_s())
    agree.append(max(clocks) - min(clocks) < 1.0)
    before_s = world.now_s()
    world.sleep(0.02)
    agree.append(world.now_s() - before_s >= 0.02)
    with pytest.raises(WorldError, match="sleep"):
        world.sleep(-1.0)


def test_an_activity_wakes_the_learner(world: MpiWorld, agree: list[bool]) -> None:
    found: list[int] = []

    def work() -> None:
        world.sleep(0.02)
        found.append(world.rank)

    activity = world.start(work, "finder")
    agree.append(world.wait(lambda: found or None, "a find") == [world.rank])
    activity.join()


def test_an_activity_talks_beside_the_learner(
    world: MpiWorld, agree: list[bool]
) -> None:
    """Activities pass a token around while the learners reduce."""
    comm, rounds = world.comm.Dup(), 20
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size

    def passer() -> None:
        token = np.zeros(1, np.int64)
        sends = []  # a rank alone sends to itself: to wait first could be for ever
        for n in range(rounds):
            if world.rank > 0 or n > 0:
                message = world.wait(lambda: comm.Improbe(before), "the token")
                message.Recv(token)
            sends.append(comm.Isend(token + 1, after))
        if world.rank == 0:
            comm.Recv(token, before)
            agree.append(token[0] == rounds * world.size)
        for send in sends:
            send.Wait()

    activity = world.start(passer, "passer")
    x = np.ones(50_000)
    for _ in range(rounds):
        world.comm.Allreduce(IN_PLACE, x)
        x /= world.size
    activity.join()
    agree.append(bool(np.all(x == 1.0)))


def test_an_activity_that_fails_is_raised_by_join(
    world: MpiWorld, agree: list[bool]
) -> None:
    def work() -> None:
        raise DataError("the chunk is gone")

    activity = world.start(work, "reader")
    with pytest.raises(DataError, match="the chunk is gone"):
        activity.join()
    agree.append(True)


def test_an_activity_that_fails_is_raised_while_the_learner_waits(
    world: MpiWorld, agree: list[bool]
) -> None:
    def work() -> None:
        raise ValueError("no")

    activity = world.start(work, "failing")
    with pytest.raises(ValueError, match="no"):
        world.wait(lambda: None, "what never comes")
    with pytest.raises(ValueError, match="no"):
        activity.join()
    agree.append(True)


def test_lock_of_learner_and_activity(world: MpiWorld, agree: list[bool]) -> None:
    lock, total = world.lock("total"), [0]

    def work() -> None:
        for _ in range(200):
            with lock:
                seen = total[0]
                time.sleep(0)
                total[0] = seen + 1

    activity = world.start(work, "adder")
    work()
    activity.join()
    agree.append(total[0] == 400)


def test_compute_passes_notifications_through(
    world: MpiWorld, agree: list[bool]
) -> None:
    order: list[Any] = []

    def work(notify: Any) -> str:
        notify(1)
        order.append("work")
        notify(2)
        return "loss"

    agree.append(world.compute(work, order.append) == "loss")
    agree.append(order == [1, "work", 2])
    agree.append(world.compute(work) == "loss")


def test_a_slow_rank_sleeps_in_the_compute_path(
    world: MpiWorld, agree: list[bool]
) -> None:
    slow = world.size - 1
    world.configure(faults=Faults(slow={str(slow): 5.0}))
    events: list[tuple[str, float]] = []

    def note(what: Any) -> None:
        events.append((str(what), world.now_s() - start_s))

    def work(notify: Any) -> None:
        notify(slice(50, 100))
        notify(slice(0, 50))
        time.sleep(0.02)
        note("work")

    start_s = world.now_s()
    world.compute(work, note)
    note("end")
    world.configure(faults=None)
    names = [name for name, _ in events]
    parts = ["slice(50, 100, None)", "slice(0, 50, None)"]
    if world.rank == slow:
        agree.append(names == ["work", *parts, "end"])
        earliest = [0.02, 0.1 * 2 / 3, 0.1, 0.1]
        came = [seconds for _, seconds in events]
        agree.append(bool(np.all(np.array(came) >= np.array(earliest) - 1e-4)))
    else:
        agree.append(names == [*parts, "work", "end"])
    with pytest.raises(ConfigError, match="only"):
        world.configure(faults=Faults(slow={str(world.size): 2.0}))


def test_sleeping_learners(world: MpiWorld, agree: list[bool]) -> None:
    world.step_s = 0.05
    start_s = world.now_s()
    world.compute(lambda notify: None)
    world.step_s = 0.0
    agree.append(world.now_s() - start_s >= 0.05)


def test_devices(world: MpiWorld, agree: list[bool]) -> None:
    torch = pytest.importorskip("torch")
    num_gpus = torch.cuda.device_count()
    agree.append(world.device("cpu") == "cpu")
    if num_gpus:
        want = f"cuda:{world.local_rank % num_gpus}"
        agree.append(world.device() == want == world.device("cuda"))
    else:
        agree.append(world.device("auto") == "cpu")
        with pytest.raises(WorldError, match="no GPU"):
            world.device("cuda")


def test_together_fails_everywhere(world: MpiWorld, agree: list[bool]) -> None:
    with world.all_or_none():
        pass
    with pytest.raises(MpilmError) as caught, world.all_or_none():
        if world.rank == world.size - 1:
            raise DataError("x.h5: truncated")
    one = "" if world.size == 1 else f"rank {world.size - 1}: "
    agree.append(str(caught.value) == f"{one}x.h5: truncated")
    agree.append(caught.value.everywhere)


@pytest.mark.mpich
def test_a_second_world_ends_without_a_trace(
    world: MpiWorld, agree: list[bool]
) -> None:
    num_threads = threading.active_count()
    x = np.ones(10)
    with MpiWorld(world.control) as second:
        second.comm.Dup().Iallreduce(IN_PLACE, x).Wait()
        if second.background:
            second.start(lambda: second.sleep(0.01), "short")
        second.comm.Split(second.rank % 2)
    second.close()  # again: nothing
    agree.append(threading.active_count() == num_threads)
    agree.append(bool(np.all(x == world.size)))
