"""How far are all ranks together? Asked in the virtual world, where the truth is known.

A rank's answer is never beyond the truth (what all have drawn), and little behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from mpilm.data.counts import Counter, Turns, counts_of
from mpilm.errors import WorldError
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld, run_virtual

N = 40  # samples of a minibatch
STEP_S = 0.1


@dataclass
class Fleet:
    """Ranks that draw, compute and ask, and what was true meanwhile.

    drawn, done  samples of each rank, so far
    answers      (rank, answer, drawn by all, at the moment of asking)
    ended_s      when each rank ended
    sent         messages of 16 bytes
    """

    goal: int
    size: int
    drawn: dict[int, int] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    answers: list[tuple[int, int, int]] = field(default_factory=list)
    ended_s: dict[int, float] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)

    def ask(self, world: VirtualWorld, counts: Counter, own: int) -> int:
        answer = counts.done(own)
        self.answers.append((world.rank, answer, sum(self.drawn.values())))
        return answer

    def main(self, world: VirtualWorld) -> int:
        rank = world.rank
        counts = Counter(world)
        counts.start(self.goal)
        own = self.drawn[rank] = self.done[rank] = 0
        while self.ask(world, counts, own) < self.goal:
            self.drawn[rank] += N
            counts.drawn(N)
            world.compute(lambda notify: None)
            self.ask(world, counts, own)  # as before an update
            own = self.done[rank] = own + N
        self.ended_s[rank] = world.now_s()
        total = counts.synchronise(own)
        assert counts.done(own) == total
        # but for the Allreduce of 8 K bytes all that was sent is accounted for
        all_of_it, of_counting = world.traffic, counts.traffic
        reduced = 2 * 8 * (self.size - 1)
        assert all_of_it.messages == of_counting.messages + 1
        assert all_of_it.bytes_sent == of_counting.bytes_sent + reduced
        assert all_of_it.bytes_received == of_counting.bytes_received + reduced
        counts.close()
        self.sent[rank] = of_counting.bytes_sent // 16
        return total


def run(size: int, faults: Faults, *, jitter: float = 0.0, rounds: int = 100) -> Fleet:
    fleet = Fleet(goal=rounds * size * N, size=size)
    machine = Machine(step_s=STEP_S, jitter=jitter)
    simulation = Simulation(size, machine=machine, faults=faults, seed=1)
    totals = simulation.run(fleet.main)
    assert simulation.undelivered == []
    assert totals == [sum(fleet.done.values())] * size
    return fleet


@pytest.mark.long
@pytest.mark.parametrize("jitter", [0.0, 0.3])
@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("slow", [0, -1], ids=["rank 0", "last rank"])
@pytest.mark.parametrize("size", [2, 4, 16])
def test_every_rank_knows_how_far_all_are(
    size: int, slow: int, factor: float, jitter: float
) -> None:
    slow %= size
    fleet = run(size, Faults(slow={str(slow): factor}), jitter=jitter)
    for rank, answer, drawn in fleet.answers:
        assert answer <= drawn, rank
        assert drawn - answer <= 2 * size * N, (rank, answer, drawn)
    total = sum(fleet.done.values())
    assert fleet.goal <= total < fleet.goal + size * N
    for rank, ended_s in fleet.ended_s.items():
        own_step_s = (factor if rank == slow else 1.0) * STEP_S * (1 + jitter)
        others_s = max(s for r, s in fleet.ended_s.items() if r != rank)
        assert ended_s - others_s <= own_step_s, rank


@pytest.mark.long
def test_many_ranks_count_seldom_but_near_the_goal() -> None:
    """64 ranks: at first in every 4 steps, so rank 0 takes 16 counts in a step."""
    size, rounds = 64, 300
    fleet = run(size, Faults(slow={"5": 100.0}), jitter=0.1, rounds=rounds)
    total = sum(fleet.done.values())
    assert fleet.goal <= total < fleet.goal + size * N
    for rank, answer, drawn in fleet.answers:
        late, left = (x / (size * N) for x in (drawn - answer, fleet.goal - drawn))
        assert 0 <= late <= 3 + min(4, max(1, left / 64)), (rank, answer, drawn)
    # 44 steps by 4, 64 by 3, 64 by 2, the last 128 one by one: 192 counts in 300 steps
    sent = [number for rank, number in fleet.sent.items() if rank not in {0, 5}]
    assert 185 < np.mean(sent) < 205


def test_a_slow_network_costs_no_time() -> None:
    """Nobody waits for a count; with late answers the end is late by that."""
    machine = Machine(step_s=STEP_S, latency_s=0.25)
    fleet = Fleet(goal=400 * N, size=4)
    blocked_s = {}

    def main(world: VirtualWorld) -> None:
        fleet.main(world)
        # a barrier in start, the Allreduce, the end
        blocked_s[world.rank] = world.traffic.blocked_s

    run_virtual(main, 4, machine=machine)
    assert max(blocked_s.values()) < 20 * 0.25
    assert max(fleet.ended_s.values()) < 100 * STEP_S + 10 * 0.25


def test_rank_0_sends_no_more_than_declared() -> None:
    """A total for every count, and one for each rank when K counts have come."""
    fleet = run(16, Faults(slow={"3": 100.0}), jitter=0.3)
    counted = sum(number for rank, number in fleet.sent.items() if rank != 0)
    steps = sum(fleet.done.values()) // N
    assert counted <= steps
    assert fleet.sent[0] <= counted + steps + 2 * 16  # at the goal, at the end


def test_counts_go_on_after_a_pause_and_a_restart() -> None:
    """`synchronise` says where all are, whatever was on its way."""
    faults = Faults(slow={"2": 7.0})

    def main(world: VirtualWorld) -> list[int]:
        counts = Counter(world)
        counts.start()
        own = 1000 * world.rank  # where a checkpoint was
        totals = [counts.synchronise(own)]
        for _ in range(5):
            for _ in range(3 + world.rank):
                counts.drawn(N)
                assert counts.done(own) >= totals[-1]
                world.compute(lambda notify: None)
                own += N
            totals.append(counts.synchronise(own))
        counts.close()
        return totals

    machine = Machine(step_s=STEP_S, jitter=0.5)
    simulation = Simulation(4, machine=machine, faults=faults)
    first = 6000
    step = (3 + 4 + 5 + 6) * N
    expected = [first + number * step for number in range(6)]
    assert simulation.run(main) == [expected] * 4
    assert simulation.undelivered == []


@pytest.mark.parametrize("seed", range(40))
def test_it_ends_however_the_ranks_end(seed: int) -> None:
    """Ranks stop at different times, before and after the goal, or never begin."""
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 9))
    ends_s = random.choice([0.0, 0.05, 1.0, 7.0], size)
    goal = int(random.choice([0, 1, 10, 300])) * N
    slow = {str(int(random.integers(size))): float(random.choice([1.0, 10.0, 100.0]))}
    machine = Machine(step_s=0.1, jitter=0.9, latency_s=float(random.choice([0, 0.3])))

    def main(world: VirtualWorld) -> int:
        counts = Counter(world)
        counts.start(goal)
        own = 0
        while world.now_s() < ends_s[world.rank]:
            counts.drawn(N)
            world.compute(lambda notify: None)
            own += N
            if random.random() < 0.5:
                counts.done(own)
        if seed % 2:
            counts.synchronise(own)
        counts.close()
        return own

    simulation = Simulation(size, machine=machine, faults=Faults(slow=slow), seed=seed)
    simulation.run(main)
    assert simulation.undelivered == []


def test_in_lockstep_and_alone_nobody_is_asked() -> None:
    turns = counts_of(1, 3, None)
    turns.start(99)
    turns.drawn(N)
    assert turns.done(N) == turns.synchronise(N) == 3 * N
    turns.close()
    assert vars(turns.traffic) == vars(Turns(0, 1).traffic)

    def main(world: VirtualWorld) -> int:
        alone = counts_of(0, 1, world)
        alone.start(99)
        found = alone.done(N)
        alone.close()
        return found if world.traffic.messages == 0 else -1

    assert run_virtual(main, 1) == [N]


def test_without_threads_it_refuses() -> None:
    def main(world: VirtualWorld) -> None:
        world.background = False
        with pytest.raises(WorldError, match="needs MPI_THREAD_MULTIPLE"):
            Counter(world).start()

    run_virtual(main, 2)
