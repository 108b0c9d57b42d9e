"""Rare branches of the virtual world: each is seen, and stays within MPI's promises."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.world.base import ANY_SOURCE
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual
from mpilm.world.virtual.rare import POINTS, Rare, drawn_rare

QUIET = Machine(latency_s=0.0, bandwidth_Bps=float("inf"), jitter=0.0)


def only(point: str, likely: float = 1.0, seed: int = 0) -> Rare:
    """Return rare branches of one kind, of a second at most."""
    rare = Rare(seed)
    rare.likely, rare.pause_s = {point: likely}, 1.0
    return rare


def run(main, size: int, rare: Rare | None):
    return run_virtual(main, size, machine=QUIET, rare=rare)


def one_message(world) -> tuple[float, float]:
    """Return when a message is complete at its two ends (rank 0 sends)."""
    buf = np.ones(1)
    if world.rank == 0:
        world.comm.Isend(buf, 1).Wait()
    else:
        world.comm.Irecv(buf, 0).Wait()
    return world.now_s()


def test_a_send_is_complete_long_after_its_message_has_come() -> None:
    assert run(one_message, 2, None) == [0.0, 0.0]
    sent_s, received_s = run(one_message, 2, only("late_send"))
    assert sent_s > 0.0
    assert received_s == 0.0


def test_a_clogged_link_keeps_the_order() -> None:
    def main(world):
        if world.rank == 0:
            for number in range(20):
                world.comm.Send(np.array([float(number)]), 1)
                world.sleep(0.1)
            return None
        found, buf = [], np.zeros(1)
        for _ in range(20):
            world.comm.Recv(buf, 0)
            found.append((buf[0], world.now_s()))
        return found

    found = run(main, 2, only("clog", likely=0.2))[1]
    assert [number for number, _ in found] == list(range(20))
    late = [at_s - 0.1 * number for number, at_s in found]
    assert max(late) > 0.5
    assert min(late) == pytest.approx(0.0, abs=1e-9)


def test_test_says_no_some_times_and_yes_in_the_end() -> None:
    def main(world):
        buf, asked_s = np.zeros(1), []
        request = world.comm.Irecv(buf, 1 - world.rank)
        world.comm.Send(buf, 1 - world.rank)
        world.sleep(1.0)  # it is there by now

        def ready() -> bool:
            asked_s.append(world.now_s())
            return request.Test()

        world.wait(ready, "a message")
        assert request.Test(), "what is done stays done"
        return asked_s

    assert run(main, 2, None) == [[1.0], [1.0]]
    asked_s = max(run(main, 2, only("not_yet", likely=0.7)), key=len)
    assert len(asked_s) > 1
    assert 1.0 == asked_s[0] < asked_s[-1]
    assert asked_s == sorted(asked_s), "time does not go back"


def test_messages_of_several_ranks_are_found_in_any_order_but_of_one_in_its_own() -> (
    None
):
    def main(world):
        buf = np.zeros(1)
        if world.rank:
            for number in range(3):
                world.comm.Send(np.array([number + 10.0 * world.rank]), 0)
            return None
        world.sleep(1.0)
        found = []
        for _ in range(6):
            message = world.comm.Improbe(ANY_SOURCE)
            message.Recv(buf)
            found.append(buf[0])
        return tuple(found)

    found = {run(main, 3, only("other_order", 0.5, seed))[0] for seed in range(20)}
    assert len(found) > 3
    for order in found:
        for rank in (1, 2):
            own = [number for number in order if number // 10 == rank]
            assert own == sorted(own)
    assert len({run(main, 3, None)[0]}) == 1


def test_an_activity_begins_late() -> None:
    def main(world):
        began = []
        activity = world.start(lambda: began.append(world.now_s()), "a server")
        activity.join()
        return began[0]

    assert run(main, 1, None) == [0.0]
    assert run(main, 1, only("late_start"))[0] > 0.0


def test_a_collective_ends_at_other_times_and_never_before_the_last_has_come() -> None:
    def main(world):
        x = np.array([float(world.rank)])
        world.sleep(float(world.rank))
        world.comm.Allreduce(x.copy(), x)
        return world.now_s(), x[0]

    found = run(main, 4, only("spread_end"))
    assert len({at_s for at_s, _ in found}) == 4
    assert all(at_s >= 3.0 for at_s, _ in found)
    assert [value for _, value in found] == [6.0] * 4


def test_a_seed_decides_all() -> None:
    assert {point for seed in range(30) for point in Rare(seed).likely} == {*POINTS}
    assert [drawn_rare(seed) is None for seed in range(40)].count(True) in range(10, 31)

    def main(world):
        for _ in range(5):
            one_message(world)
        return world.now_s()

    assert run(main, 2, Rare(3)) == run(main, 2, Rare(3))
