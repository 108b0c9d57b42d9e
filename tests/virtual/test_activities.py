"""Activities beside the learner: errors, waiting, locks, who runs when."""

import numpy as np
import pytest

from mpilm.errors import DataError, WorldError
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.world.base import IN_PLACE
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, run_virtual

QUICK = Machine(latency_s=1.0, bandwidth_Bps=8.0, step_s=16.0)


def test_join_raises_what_the_activity_raised():
    def main(world):
        def work():
            world.sleep(1.0)
            raise DataError("bad chunk")

        activity = world.start(work, "reader")
        with pytest.raises(DataError, match="bad chunk"):
            activity.join()
        return world.now_s()

    assert run_virtual(main, 1) == [1.0]


@pytest.mark.parametrize("waits", [True, False])
def test_the_error_of_an_activity_is_not_lost(waits):
    def main(world):
        def work():
            raise DataError("bad chunk")

        world.start(work, "reader")
        if waits:
            world.wait(lambda: None, "a chunk")

    expected = "rank 0, reader: bad chunk" if waits else "rank 0: bad chunk"
    with pytest.raises(DataError, match=expected):
        run_virtual(main, 2)


def test_activities_run_beside_the_learner():
    def main(world):
        seen = []

        def tick():
            for _ in range(3):
                world.sleep(4.0)
                seen.append(world.now_s())

        activity = world.start(tick, "clock")
        world.compute(lambda notify: None)
        before = world.now_s()
        activity.join()
        return seen, before, world.now_s()

    assert run_virtual(main, 1, machine=QUICK) == [([4.0, 8.0, 12.0], 16.0, 16.0)]


def test_only_blocking_calls_hand_over():
    """Between two blocking calls a rank sees no other activity run."""

    def main(world):
        counter = [0]

        def count():
            for _ in range(50):
                counter[0] += 1
                world.sleep(0.0)

        activity = world.start(count, "counting")
        seen = []
        for _ in range(20):
            before = counter[0]
            receive = world.comm.Irecv(np.zeros(1), tag=9)
            send = world.comm.Isend(np.ones(1), world.rank, tag=9)
            request = world.comm.Iallreduce(IN_PLACE, np.ones(3))
            barrier = world.comm.Ibarrier()
            receive.Test(), send.Test(), request.Test(), barrier.Test()
            world.comm.Improbe(tag=1)
            with world.lock("free"):
                pass
            seen.append(counter[0] - before)
            for each in (receive, send, request, barrier):
                each.Wait()
        activity.join()
        return seen, counter[0]

    for seen, count in run_virtual(main, 3):
        assert seen == [0] * 20
        assert count == 50


def test_wait_looks_again_when_a_message_came_or_an_activity_went_on():
    def main(world):
        looks, box = [], []

        def fill():
            world.sleep(3.0)
            box.append("full")
            world.sleep(5.0)

        if world.rank == 1:
            world.sleep(1.0)
            world.comm.Send(np.ones(1), 0)
            return None
        world.start(fill, "filling")

        def ready():
            looks.append(world.now_s())
            return box[0] if box else None

        found = world.wait(ready, "a full box")
        return found, world.now_s(), looks

    (found, now_s, looks), _ = run_virtual(main, 2, machine=QUICK)
    assert (found, now_s) == ("full", 3.0)
    assert looks == [0.0, 0.0, 3.0]  # first, when filling fell asleep, when it went on


def test_wait_accepts_zero_as_an_answer():
    assert run_virtual(lambda world: world.wait(lambda: 0, "zero"), 1) == [0]


def test_two_that_only_look_do_not_wake_each_other_for_ever():
    def main(world):
        box = []
        activity = world.start(lambda: world.wait(lambda: bool(box), "box"), "other")
        world.start(lambda: (world.sleep(1.0), box.append(1)), "filling")
        world.wait(lambda: bool(box), "box")
        activity.join()
        return world.now_s()

    simulation = Simulation(1)
    assert simulation.run(main) == [1.0]
    assert simulation.num_events < 20


def test_what_a_predicate_does_is_seen_by_other_watchers():
    """A predicate that takes a message wakes the watcher of what it took."""

    def main(world):
        inbox = []

        def pump():
            message = world.comm.Improbe()
            if message is not None:
                inbox.append(message)
            return len(inbox) == 2

        if world.rank == 1:
            world.comm.Send(np.ones(1), 0)
            world.sleep(50.0)
            world.comm.Send(np.ones(1), 0)
            return None

        def first():
            world.sleep(0.5)  # it waits after the learner, so it looks before it
            world.wait(lambda: bool(inbox), "first message")

        activity = world.start(first, "first")
        times = []
        world.start(lambda: (activity.join(), times.append(world.now_s())), "noting")
        world.wait(pump, "two messages")
        return times, world.now_s()

    (times, end_s), _ = run_virtual(main, 2, machine=QUICK)
    assert times == [2.0]
    assert end_s == 53.0


def test_locks_are_taken_in_the_order_of_asking():
    def main(world):
        lock, order = world.lock("model"), []

        def take(name, delay_s):
            world.sleep(delay_s)
            with lock:
                order.append((name, world.now_s()))
                world.sleep(10.0)

        activities = [
            world.start(lambda n=n, d=d: take(n, d), n)
            for n, d in (("b", 2.0), ("a", 1.0), ("c", 3.0))
        ]
        for activity in activities:
            activity.join()
        return order

    assert run_virtual(main, 2) == [[("a", 1.0), ("b", 11.0), ("c", 21.0)]] * 2


def test_a_lock_taken_twice_is_refused_and_a_held_one_is_reported():
    def twice(world):
        lock = world.lock("model")
        with lock, lock:
            pass

    with pytest.raises(WorldError, match="rank 0: takes the lock model"):
        run_virtual(twice, 1)

    def held(world):
        lock = world.lock("model")

        def hold():
            with lock:
                world.wait(lambda: None, "nothing")

        world.start(hold, "holding")
        world.sleep(1.0)
        with lock:
            pass

    with pytest.raises(WorldError, match="the lock model, held by holding"):
        run_virtual(held, 1)


def test_activities_that_ended_leave_nothing_behind():
    def main(world):
        for _ in range(50):
            world.start(lambda: world.sleep(1.0), "short").join()
        return len(world.state.activities)

    assert run_virtual(main, 2) == [1, 1]


def test_a_program_that_forgets_to_finish_ends_in_one_line():
    def main(world):
        learner = ProtocolLearner(10, compute=world.compute, seed=world.rank)
        chosen = strategy("adpsgd", world)
        chosen.start(learner)
        for _ in range(5):
            chosen.step(learner)

    with pytest.raises(WorldError, match=r"strategy\.finish\(learner\) was not") as e:
        run_virtual(main, 3)
    assert "\n" not in str(e.value)
