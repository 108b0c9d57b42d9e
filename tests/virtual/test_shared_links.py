"""Ranks of a node that share its link, in the virtual world."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies import STRATEGIES, strategy
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, run_virtual

# two ranks a node; 4 MB/s a node and direction, which a rank may have alone
SHARED = Machine(
    latency_s=0.5,
    bandwidth_Bps=2e6,
    ranks_per_node=2,
    leader_bandwidth_Bps=4e6,
    node_latency_s=0.0,
    node_bandwidth_Bps=1e9,
    eager_bytes=0,
)
MB = 1_000_000


def ends(
    machine: Machine, sends: dict[int, list[tuple[int, int]]], size: int = 8
) -> dict[tuple[int, int], float]:
    """Send messages at 0, {source: [(dest, bytes), ...]}; return when each has come.

    The key is (source, dest): one message of a pair.
    """
    found: dict[tuple[int, int], float] = {}

    def main(world):
        comm, me = world.comm, world.rank
        mine = [
            comm.Isend(np.zeros(num_bytes, np.uint8), dest, 0)
            for dest, num_bytes in sends.get(me, [])
        ]
        for source, to in sends.items():
            for dest, num_bytes in to:
                if dest == me:
                    comm.Recv(np.empty(num_bytes, np.uint8), source, 0)
                    found[source, me] = world.now_s()
        for request in mine:
            request.Wait()

    run_virtual(main, size, machine=machine)
    return found


def test_one_rank_has_the_whole_link() -> None:
    assert ends(SHARED, {0: [(2, 4 * MB)]}) == {(0, 2): 1.5}


def test_two_ranks_of_a_node_have_half_of_it_each() -> None:
    found = ends(SHARED, {0: [(2, 4 * MB)], 1: [(4, 4 * MB)]})
    assert found == {(0, 2): 2.5, (1, 4): 2.5}


def test_who_is_left_has_all_of_it_again() -> None:
    found = ends(SHARED, {0: [(2, 2 * MB)], 1: [(4, 4 * MB)]})
    assert found == {(0, 2): 1.5, (1, 4): 2.0}


def test_a_rank_sends_one_message_after_the_other() -> None:
    found = ends(SHARED, {0: [(2, 2 * MB), (4, 2 * MB)], 1: [(6, 2 * MB)]})
    assert found == {(0, 2): 1.5, (1, 6): 1.5, (0, 4): 2.0}


def test_two_ranks_of_a_node_receive_half_of_it_each() -> None:
    found = ends(SHARED, {2: [(0, 4 * MB)], 4: [(1, 4 * MB)]})
    assert found == {(2, 0): 2.5, (4, 1): 2.5}


def test_inside_a_node_nobody_shares() -> None:
    found = ends(SHARED, {0: [(1, 1000 * MB)], 2: [(4, 4 * MB)]})
    assert found == {(0, 1): 1.0, (2, 4): 1.5}


def test_ranks_with_cards_of_their_own_share_nothing() -> None:
    machine = dataclasses.replace(SHARED, leader_bandwidth_Bps=2e6)
    assert not machine.shares_link
    found = ends(machine, {0: [(2, 4 * MB)], 1: [(4, 2 * MB)]})
    assert found == {(0, 2): 2.5, (1, 4): 1.5}


def test_a_burst_passes_at_once_after_a_pause() -> None:
    machine = dataclasses.replace(SHARED, burst_bytes=MB)
    found = ends(machine, {0: [(2, 2 * MB), (4, 2 * MB)]})
    assert found == {(0, 2): 0.75, (0, 4): 1.25}


def test_where_all_send_at_once_it_is_as_if_each_had_a_port_of_its_own() -> None:
    """Also beside a reduction: who waits for whom is as there."""

    def main(world):
        comm, there = world.comm, (world.rank + 2) % world.size
        w, x, y, z = (np.zeros(MB, np.float32) for _ in range(4))
        half = MB // 2
        before = [comm.Isend(x[:half], there) for _ in range(2)]
        total = comm.Iallreduce(x, y)
        world.sleep(0.1)
        after = comm.Isend(x[:half], there)
        second = comm.Iallreduce(x, w)  # while `after` waits for the first one
        times = []
        for _ in range(3):
            comm.Recv(z[:half], there)
            times.append(world.now_s())
        for request in (*before, total, after, second):
            request.Wait()
            times.append(world.now_s())
        return times

    shared = run_virtual(main, 4, machine=SHARED)
    ports = dataclasses.replace(SHARED, leader_bandwidth_Bps=0.0)
    assert np.allclose(shared, run_virtual(main, 4, machine=ports))


def test_one_message_alone_takes_as_long_as_by_a_port_of_its_own() -> None:
    machine = dataclasses.replace(SHARED, jitter=0.5, leader_bandwidth_Bps=2e6)
    shared = dataclasses.replace(machine, leader_bandwidth_Bps=2.000001e6)
    assert shared.shares_link
    assert not machine.shares_link
    (found,), (expected,) = (
        ends(kind, {0: [(2, MB)]}).values() for kind in (shared, machine)
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(1.0, rel=1e-2)  # without jitter


def test_messages_of_a_pair_do_not_overtake_whatever_the_latency() -> None:
    machine = dataclasses.replace(SHARED, jitter=1.0)
    order = []

    def main(world):
        comm = world.comm
        if world.rank == 0:
            sizes = np.random.default_rng(7).integers(1, MB, 50)
            requests = [
                comm.Isend(np.full(size, number, np.uint8), 2)
                for number, size in enumerate(sizes)
            ]
            for request in requests:
                request.Wait()
        elif world.rank == 2:
            for _ in range(50):
                buf = np.empty(MB, np.uint8)
                comm.Recv(buf, 0)
                order.append(int(buf[0]))

    simulation = Simulation(4, machine=machine, seed=3)
    simulation.run(main)
    assert order == list(range(50))
    assert simulation.network.undelivered() == []


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_ends_and_leaves_nothing_on_its_way(name: str) -> None:
    machine = dataclasses.replace(SHARED, latency_s=1e-3, step_s=0.01, jitter=0.5)

    def main(world):
        learner = ProtocolLearner(20_000, compute=world.compute, seed=world.rank)
        chosen = strategy(name, world)
        chosen.require(learner)
        chosen.start(learner)
        for _ in range(110):
            chosen.step(learner)
        chosen.retire(learner)
        chosen.finish(learner)
        return world.traffic.bytes_sent

    simulation = Simulation(8, machine=machine)
    sent = simulation.run(main)
    assert (min(sent) > 0) == (name != "local")
    assert simulation.network.undelivered() == []
