"""Stopping early: signals on one rank, agreement of all."""

from __future__ import annotations

import os
import random
import signal

import pytest

from mpilm.train import signals
from mpilm.train.signals import RUNNING, STOP, SYNC, Agreement, StopRequest
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, run_virtual

NAMES = ["SIGTERM", "SIGINT", "SIGUSR1"]


def send(name):
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_a_request(name):
    before = signal.getsignal(getattr(signal, name))
    with StopRequest() as stop:
        assert stop.requested is None
        send(name)
        assert stop.requested == name
    assert signal.getsignal(getattr(signal, name)) == before


def test_signals_may_come_again(monkeypatch):
    monkeypatch.setattr(signals, "ECHO_S", 1e9)
    with StopRequest() as stop:
        for name in ("SIGUSR1", "SIGTERM", "SIGUSR1", "SIGINT", "SIGINT", "SIGTERM"):
            send(name)
        assert stop.requested == "SIGUSR1"


def test_a_second_interrupt_ends_at_once_and_handlers_are_restored(monkeypatch):
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    with pytest.raises(KeyboardInterrupt), StopRequest():
        send("SIGINT")
        send("SIGINT")
        pytest.fail("the second SIGINT was swallowed")
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before


class Rank:
    """What a rank did: the step it stopped at, and how many reductions it started."""

    def __init__(self, world, *, every, lockstep):
        self.request = StopRequest()
        self.agreement = Agreement(
            world, every=every, request=self.request, lockstep=lockstep
        )
        self.started = 0
        start = self.agreement._start

        def counted(choice):
            self.started += 1
            start(choice)

        self.agreement._start = counted

    def train(self, world, num_steps, wish_at=None, *, synchronise=False):
        """Return (last step, stopped, reductions started), nothing left in flight."""
        step = 0
        while step < num_steps:
            step += 1
            if synchronise:
                world.comm.Barrier()
            world.compute(lambda notify: None)
            if step == wish_at:
                self.request.requested = "SIGTERM"
            if self.agreement.poll(step) == STOP:
                assert self.agreement.poll(step) == STOP
                break
        stopped = self.agreement.finish()
        assert self.agreement.reduction is None, "a reduction is left in flight"
        return step, stopped, self.started


MACHINE = Machine(step_s=0.1, jitter=0.3)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("wish_at", [1, 2, 7, 8, 9, 17, 30])
def test_in_lockstep_all_stop_at_the_same_step(size, every, wish_at):
    who = size // 2

    def main(world):
        rank = Rank(world, every=every, lockstep=True)
        return rank.train(world, 1000, wish_at if world.rank == who else None)

    outcomes = set(run_virtual(main, size, machine=MACHINE, seed=wish_at))
    assert len(outcomes) == 1
    step, stopped, _ = outcomes.pop()
    assert stopped
    assert wish_at < step <= wish_at + 2 * every


@pytest.mark.parametrize("num_steps", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_in_lockstep_nothing_is_in_flight_at_the_end(size, num_steps):
    def main(world):
        return Rank(world, every=8, lockstep=True).train(world, num_steps)

    outcomes = set(run_virtual(main, size, machine=MACHINE))
    assert len(outcomes) == 1
    assert outcomes.pop()[:2] == (num_steps, False)


def test_a_wish_in_the_last_steps_does_not_hang():
    for wish_at in range(1, 25):

        def main(world, wish_at=wish_at):
            rank = Rank(world, every=8, lockstep=True)
            return rank.train(world, 24, wish_at if world.rank == 0 else None)

        assert len(set(run_virtual(main, 3, machine=MACHINE))) == 1


def test_agreement_costs_no_time():
    """Behind computing: 100 steps take as long as without it, on a slow network."""
    machine = Machine(step_s=0.1, latency_s=0.05)

    def agreeing(world):
        Rank(world, every=8, lockstep=True).train(world, 100)
        return world.now_s(), world.traffic.blocked_s

    def without(world):
        for _ in range(100):
            world.compute(lambda notify: None)
        return world.now_s()

    expected_s = run_virtual(without, 4, machine=machine)[0]
    for took_s, blocked_s in run_virtual(agreeing, 4, machine=machine):
        assert took_s <= expected_s * 1.03
        assert blocked_s <= expected_s * 0.03


def test_a_reduction_in_every_step_would_be_seen():
    """The measure above does see a reduction that is waited for in every step."""
    machine = Machine(step_s=0.1, latency_s=0.15)

    def main(world):
        Rank(world, every=1, lockstep=True).train(world, 100)
        return world.now_s()

    assert run_virtual(main, 4, machine=machine)[0] > 10.0 * 1.5


@pytest.mark.parametrize("seed", range(60))
def test_out_of_lockstep_any_schedule_ends_and_agrees(seed):
    chance = random.Random(seed)
    size = chance.choice([1, 2, 3, 4, 8])
    steps = [chance.choice([0, 1, 5, 30, 200]) for _ in range(size)]
    slow = {str(chance.randrange(size)): chance.choice([2.0, 10.0, 100.0])}
    wisher = chance.choice([None, chance.randrange(size)])
    wish_at = chance.randrange(1, 40)

    def main(world):
        rank = Rank(world, every=8, lockstep=False)
        wish = wish_at if world.rank == wisher else None
        return rank.train(world, steps[world.rank], wish)

    simulation = Simulation(size, machine=MACHINE, faults=Faults(slow=slow), seed=seed)
    outcomes = simulation.run(main)
    assert len({(stopped, started) for _, stopped, started in outcomes}) == 1
    assert simulation.undelivered == []
    stopped = outcomes[0][1]
    if wisher is None or wish_at > steps[wisher]:
        assert not stopped
    if not stopped:
        assert [last for last, _, _ in outcomes] == steps


def test_out_of_lockstep_a_slow_rank_delays_nobody():
    def main(world):
        rank = Rank(world, every=8, lockstep=False)
        num_steps = 5 if world.rank == 2 else 500
        step = 0
        while step < num_steps:
            step += 1
            world.compute(lambda notify: None)
            rank.agreement.poll(step)
        trained_s = world.now_s()
        rank.agreement.finish()
        return trained_s

    machine, faults = Machine(step_s=0.1), Faults(slow={"2": 50.0})
    for rank, trained_s in enumerate(
        run_virtual(main, 4, machine=machine, faults=faults)
    ):
        alone_s = 0.1 * 500 if rank != 2 else 0.1 * 50 * 5
        assert trained_s == pytest.approx(alone_s, rel=1e-3)


def test_out_of_lockstep_a_finished_rank_lets_the_others_stop():
    """Rank 0 finishes at once; a signal at rank 1 still stops rank 2."""

    def main(world):
        rank = Rank(world, every=8, lockstep=False)
        num_steps = 1 if world.rank == 0 else 1000
        return rank.train(world, num_steps, 100 if world.rank == 1 else None)

    outcomes = run_virtual(main, 3, machine=MACHINE)
    assert all(stopped for _, stopped, _ in outcomes)
    assert outcomes[0][0] == 1
    assert all(100 < last < 130 for last, _, _ in outcomes[1:])


@pytest.mark.parametrize("seed", range(60))
def test_out_of_lockstep_all_ranks_sync_equally_often(seed):
    """Whoever wishes it, and whoever has finished already."""
    chance = random.Random(seed)
    size = chance.choice([1, 2, 3, 4, 8])
    steps = [chance.choice([0, 5, 30, 200]) for _ in range(size)]
    wishes = [
        set(chance.sample(range(1, 200), chance.choice([0, 1, 5]))) for _ in steps
    ]
    slow = {str(chance.randrange(size)): chance.choice([2.0, 10.0, 100.0])}

    def main(world):
        rank = Rank(world, every=8, lockstep=False)
        num_syncs = 0

        def at_sync_point():
            nonlocal num_syncs
            world.comm.Barrier()  # a rank that does not come is a deadlock
            num_syncs += 1

        wish = False
        for step in range(1, steps[world.rank] + 1):
            world.compute(lambda notify: None)
            wish |= step in wishes[world.rank]
            outcome = rank.agreement.poll(step, sync=wish)
            assert outcome in {RUNNING, SYNC}
            if outcome == SYNC:
                at_sync_point()
                wish = False
        assert not rank.agreement.finish(at_sync_point)
        return num_syncs

    simulation = Simulation(size, machine=MACHINE, faults=Faults(slow=slow), seed=seed)
    counts = simulation.run(main)
    assert len(set(counts)) == 1
    assert simulation.undelivered == []
