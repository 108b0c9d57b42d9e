"""A mean on its way: its bits, its buffers, and that what is sent stays as it was."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.strategies.mixing import Mean
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, run_virtual
from mpilm.world.virtual.rare import Rare

P, GUARD = 23, 7.0
# a message is sent only once it is received, and every pace is another
UNEVEN = {
    "machine": Machine(eager_bytes=0, jitter=0.9, latency_s=0.1, bandwidth_Bps=1e3),
    "faults": Faults(slow={"0": 20.0, "3": 5.0}),
}


def vector(rank):
    """Return what a rank averages: numbers whose sum depends on the order."""
    draw = np.random.default_rng(rank)
    return (draw.standard_normal(P) * 10.0 ** draw.integers(-3, 4, P)).astype("f4")


def mean_in_order(members):
    """Return the mean, added in the order of ranks in float32."""
    total = np.zeros(P, np.float32)
    for rank in sorted(members):
        total += vector(rank)
    return total / np.float32(len(members))


def means(groups, *, num_buffers=None, into="out", rounds=1, watch=None, **pace):
    """Return the mean of every rank over the group that it is in, all rounds."""

    def main(world):
        members = next(group for group in groups if world.rank in group)
        x, out = vector(world.rank), np.full(P + 1, GUARD, np.float32)
        num = len(members) - 1 if num_buffers is None else num_buffers
        buffers = [np.full(P, np.nan, np.float32) for _ in range(num)]
        target = {"out": out[:P], "x": x, "vector": x}.get(into, (buffers or [x])[0])
        found = []
        for _ in range(rounds):
            x[:] = vector(world.rank)
            mean = Mean(world.comm, x, members)
            mean.receive(buffers)
            world.compute(lambda notify: None)  # the ranks' paces differ
            if watch:
                watch(mean)
            mean.finish_(None if into == "vector" else target)
            assert all(send.Test() for send in mean.sends)
            found.append(target.copy())
        assert out[P] == GUARD
        return found

    simulation = Simulation(max(map(max, groups)) + 1, **pace)
    results = simulation.run(main)
    assert simulation.undelivered == []
    return results


@pytest.mark.parametrize("into", ["out", "x", "vector", "buffer"])
@pytest.mark.parametrize("num_buffers", [2, 3, 9])
@pytest.mark.parametrize("pace", [{}, UNEVEN], ids=["even", "uneven"])
def test_all_members_get_the_bits_of_the_sum_in_the_order_of_ranks(
    into, num_buffers, pace
):
    groups = [[4, 0, 5, 2], [6, 1], [3], [7, 8, 9]]
    found = means(groups, num_buffers=num_buffers, into=into, rounds=3, **pace)
    for group in groups:
        wanted = mean_in_order(group)
        for rank in group:
            for result in found[rank]:
                assert np.array_equal(result, wanted), (rank, group)
    mixed = mean_in_order([0, 2, 4, 5])
    backwards = sum(vector(rank) for rank in (5, 4, 2, 0)) / np.float32(4)
    assert not np.array_equal(mixed, backwards)  # else this would prove nothing


def test_equal_models_stay_as_they_are_however_often():
    """Times float32(1/3) they would grow by 3e-8 in every round."""

    def main(world):
        theta = vector(0)
        buffers = [np.empty_like(theta) for _ in range(2)]
        for _ in range(1000):
            mean = Mean(world.comm, theta, range(3))
            mean.receive(buffers)
            mean.finish_()
        return theta

    for theta in Simulation(3).run(main):
        np.testing.assert_allclose(theta, vector(0), rtol=3e-7)


def test_two_buffers_hold_any_number_of_members():
    """Never are more messages under way to a rank than it has buffers."""

    def watch(mean):
        started = [request for request, _ in mean.receives]
        assert len(started) == min(2, len(mean.sources))

    found = means([list(range(9))], num_buffers=2, watch=watch)
    assert all(np.array_equal(one, mean_in_order(range(9))) for (one,) in found)


def test_sources_and_destinations_may_differ():
    """A directed ring: each receives from the left and sends to the right."""

    def main(world):
        rank, size = world.rank, world.size
        x, buffer = vector(rank), np.empty(P, np.float32)
        left, right = (rank - 1) % size, (rank + 1) % size
        mean = Mean(world.comm, x, [rank, left], destinations=[right])
        mean.receive([buffer])
        mean.finish_()
        return x

    for rank, found in enumerate(Simulation(5, **UNEVEN).run(main)):
        assert np.array_equal(found, mean_in_order([rank, (rank - 1) % 5]))


def test_it_is_hidden_behind_computing():
    """Exchanges of 1.5 s beside a step of 2 s take nothing beyond the step."""

    def main(world):
        x, buffer = vector(world.rank), np.empty(P, np.float32)
        for _ in range(10):
            mean = Mean(world.comm, x, [0, 1])
            mean.receive([buffer])
            world.compute(lambda notify: None)
            mean.finish_()
        return world.now_s()

    machine = Machine(step_s=2.0, bandwidth_Bps=4 * P / 1.5)
    assert Simulation(2, machine=machine).run(main) == pytest.approx([20.0] * 2, 0.01)


@pytest.mark.parametrize("leaves_out", [False, True])
def test_a_mean_is_done_when_its_sends_are(leaves_out):
    """Who writes over the vector earlier changes what is still on its way."""

    def main(world):
        vector = np.full(5, float(world.rank), np.float32)
        mean = Mean(world.comm, vector, range(3))
        mean.receive([np.zeros(5, np.float32) for _ in range(2)])
        if leaves_out:
            mean.finish_without_({2})
        else:
            mean.finish_()
        return all(send.done for send in mean.sends), vector[0]

    late = Rare(0)
    late.likely, late.pause_s = {"late_send": 1.0}, 1.0
    assert run_virtual(main, 3, rare=late) == [(True, 0.5 if leaves_out else 1.0)] * 3
