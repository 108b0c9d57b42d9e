"""Groups of ranks: Dup, Split, Split_node."""

import numpy as np

from mpilm.world.base import IN_PLACE
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual


def test_dup_has_a_message_space_of_its_own():
    def main(world):
        copy = world.comm.Dup()
        assert (copy.rank, copy.size) == (world.rank, world.size)
        if world.rank == 0:
            copy.Send(np.ones(1), 1)
            world.comm.Send(np.zeros(1), 1)
            return None
        first, second = np.full(1, 5.0), np.full(1, 5.0)
        world.sleep(1.0)
        world.comm.Recv(first, 0)
        copy.Recv(second, 0)
        assert world.comm.Improbe() is None
        return first[0], second[0]

    assert run_virtual(main, 2)[1] == (0.0, 1.0)


def test_collectives_on_two_communicators_may_cross():
    def main(world):
        copy = world.comm.Dup()
        a, b = np.ones(1), np.full(1, 2.0)
        first, second = (world.comm, a), (copy, b)
        if world.rank:
            first, second = second, first
        requests = [comm.Iallreduce(IN_PLACE, buf) for comm, buf in (first, second)]
        for request in requests:
            request.Wait()
        return a[0], b[0]

    assert run_virtual(main, 3) == [(3.0, 6.0)] * 3


def test_split_groups_by_color_and_orders_by_key():
    def main(world):
        color = None if world.rank == 4 else world.rank % 2
        group = world.comm.Split(color, key=-world.rank)
        if group is None:
            return None
        total = np.full(1, float(world.rank))
        group.Allreduce(IN_PLACE, total)
        inner = group.Split(0)
        return group.rank, group.size, total[0], inner.size

    assert run_virtual(main, 7) == [
        (2, 3, 8.0, 3),
        (2, 3, 9.0, 3),
        (1, 3, 8.0, 3),
        (1, 3, 9.0, 3),
        None,
        (0, 3, 9.0, 3),
        (0, 3, 8.0, 3),
    ]


def test_split_node_groups_by_node():
    def main(world):
        node = world.comm.Split_node()
        return node.rank, node.size

    machine = Machine(ranks_per_node=2)
    assert run_virtual(main, 5, machine=machine) == [
        (0, 2),
        (1, 2),
        (0, 2),
        (1, 2),
        (0, 1),
    ]


def test_messages_in_a_group_speak_of_its_ranks():
    def main(world):
        group = world.comm.Split(0, key=-world.rank)  # reversed
        if group.rank == 0:
            group.Send(np.full(1, 4.0), dest=2)
            return None
        if group.rank == 2:
            message = world.wait(group.Improbe, "a message")
            message.Recv(np.zeros(1))
            return message.source
        return None

    assert run_virtual(main, 3) == [0, None, None]
