"""A service in the virtual world: whatever the order of ends, all is answered."""

from itertools import permutations

import numpy as np
import pytest

from mpilm.errors import DataError
from mpilm.world.machine import Machine
from mpilm.world.service import Service
from mpilm.world.virtual import Simulation
from tests.strategies.fleets import assert_quiet

SLOW = Machine(latency_s=0.25, bandwidth_Bps=64.0)


class Doubling(Service):
    """Every rank asks the next ones in turns for the double of a number.

    to_ask   numbers still to ask for
    doubled  what came back
    """

    def __init__(self, world):
        super().__init__(world, world.comm.Dup(), "doubling")
        self.answers = self.comm.Dup()
        self.to_ask, self.doubled, self.num_answered = [], [], 0
        self.under_way = None
        self.number, self.found = np.zeros(1), np.zeros(1)

    @property
    def is_asking(self):
        return self.under_way is not None

    def own_work(self):
        if self.under_way is None:
            return self.ask if self.to_ask else None
        return self.take if self.under_way.Test() else None

    def ask(self):
        self.number[0] = self.to_ask.pop()
        peer = (self.comm.rank + 1 + len(self.doubled)) % self.comm.size
        peer = peer if peer != self.comm.rank else (peer + 1) % self.comm.size
        self.under_way = self.answers.Irecv(self.found, peer)
        self.comm.Send(self.number, peer)

    def take(self):
        self.doubled.append(float(self.found[0]))
        self.under_way = None

    def answer(self, message):
        number = np.zeros(1)
        message.Recv(number)
        self.answers.Send(2.0 * number, message.source)
        self.num_answered += 1

    def put(self, *numbers):
        with self.lock:
            self.to_ask += numbers


def run(main, size, machine=SLOW):
    """Return what every rank's service came to; nothing may stay in flight."""
    simulation = Simulation(size, machine=machine)

    def whole(world):
        service = Doubling(world)
        main(world, service)
        assert not service.is_running
        assert len(world.state.activities) == 1, "an activity that did not end"
        return service

    found = simulation.run(whole)
    assert_quiet(simulation)
    return found


@pytest.mark.parametrize("begins_late", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_it_ends_in_every_order(order, begins_late):
    """Ends are 2 s apart, an answer takes 0.75 s: the last asks when all are silent."""

    def main(world, service):
        rank = world.rank
        if begins_late:
            world.sleep(3.0 * order.index(rank))
        service.begin()
        service.put(1.0, 2.0)
        world.sleep(2.0 * order.index(rank))
        service.put(10.0 + rank)  # just before the end: it is answered
        service.end()

    services = run(main, 3)
    for rank, service in enumerate(services):
        assert sorted(service.doubled) == [2.0, 4.0, 20.0 + 2 * rank]
    assert sum(service.num_answered for service in services) == 9


def test_a_rank_without_questions_answers_until_the_last_has_ended():
    def main(world, service):
        if world.rank == 0:
            service.retire()
            service.end()
            assert world.now_s() > 100.0
            return
        service.begin()
        for second in range(101):
            service.put(float(second))
            world.sleep(1.0)
        service.end()

    idle, busy = run(main, 2)
    assert (idle.num_answered, len(busy.doubled)) == (101, 101)


def test_ranks_begin_again_without_waiting_for_each_other():
    def main(world, service):
        for turn in range(5):
            world.sleep(0.1 * ((world.rank * 3 + turn * 2) % 5))
            service.begin()
            service.begin()  # it runs: nothing happens
            service.put(*range(turn + 1))
            service.end()

    for service in run(main, 4):
        wanted = sorted(2.0 * n for turn in range(5) for n in range(turn + 1))
        assert sorted(service.doubled) == wanted


def test_a_question_waits_for_a_rank_that_has_not_begun():
    def main(world, service):
        if world.rank == 1:
            world.sleep(50.0)
        service.begin()
        if world.rank == 0:
            service.put(4.0)
            world.wait(lambda: bool(service.doubled), "the answer")
            assert world.now_s() > 50.0
        service.end()

    assert run(main, 2)[0].doubled == [8.0]


class Late:
    """A request that says so 5 s after it is done, as a real network may."""

    def __init__(self, world, request):
        self.world, self.request = world, request
        self.done_s = None

    def Test(self):
        if self.done_s is None and self.request.Test():
            self.done_s = self.world.now_s()
            self.world.start(lambda: self.world.sleep(5.0), "alarm")
        return self.done_s is not None and self.world.now_s() >= self.done_s + 5.0


def test_a_question_of_the_next_time_waits_for_the_next_begin():
    """Rank 1 learns of the end 5 s after rank 0, which has begun and asks again."""

    def main(world, service):
        service.begin()
        if world.rank == 1:
            barrier, first = service.comm.Ibarrier, service.comm
            service.comm.Ibarrier = lambda: Late(world, barrier())
        service.end()
        if world.rank == 1:
            first.Ibarrier = barrier
            assert world.now_s() > 5.0
            assert service.num_answered == 0
            world.sleep(20.0)
        service.begin()
        service.put(3.0)
        service.end()
        assert (world.now_s() > 20.0, service.num_answered) == (True, 1)

    for service in run(main, 2):
        assert service.doubled == [6.0]


def test_ranks_on_which_it_does_not_run_take_part_in_the_end():
    def main(world, service):
        if world.rank == 0:
            service.begin()
        world.sleep(1.0 + world.rank)
        service.end()
        assert world.now_s() > 3.0

    run(main, 3)


def test_alone_there_is_nobody_to_serve():
    def main(world, service):
        service.begin()
        assert not service.is_running
        service.retire()
        service.end()

    run(main, 1)


def test_what_the_activity_raises_comes_out_of_the_end():
    def main(world, service):
        def fail(message):
            raise DataError("a question that makes no sense")

        service.answer = fail
        service.begin()
        if world.rank == 0:
            world.comm.Barrier()
            with pytest.raises(DataError, match="makes no sense"):
                service.end()
            raise DataError("enough")
        service.comm.Send(np.zeros(1), 0)
        world.comm.Barrier()
        service.end()

    with pytest.raises(DataError, match="rank 0: enough"):
        Simulation(2).run(lambda world: main(world, Doubling(world)))
