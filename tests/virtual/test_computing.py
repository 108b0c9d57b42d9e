"""Computing takes the declared time; parts become ready on the way; faults slow it."""

import msgspec
import numpy as np
import pytest
import torch

from mpilm.errors import WorldError
from mpilm.world.base import IN_PLACE
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual

STEP = Machine(step_s=12.0)


def test_a_step_takes_its_time_and_the_slow_take_longer():
    def main(world):
        results = [world.compute(lambda notify, i=i: i * i) for i in range(3)]
        return results, world.now_s()

    faults = Faults(slow={"1": 2.5})
    assert run_virtual(main, 3, machine=STEP, faults=faults) == [
        ([0, 1, 4], 36.0),
        ([0, 1, 4], 90.0),
        ([0, 1, 4], 36.0),
    ]


def test_parts_are_ready_during_the_backward_two_thirds():
    parts = [slice(6, 8), slice(5, 6), slice(2, 5), slice(0, 2)]

    def main(world):
        seen = []

        def work(notify):
            for part in parts:
                notify(part)
            assert world.now_s() == 0.0
            return "done"

        result = world.compute(work, lambda p: seen.append((p, world.now_s())))
        return result, seen, world.now_s()

    faults = Faults(slow={"1": 10.0})
    for rank, (result, seen, end_s) in enumerate(
        run_virtual(main, 2, machine=STEP, faults=faults)
    ):
        factor = 10.0 if rank else 1.0
        assert result == "done"
        assert end_s == pytest.approx(12.0 * factor)
        assert [part for part, _ in seen] == parts
        assert [time_s / factor for _, time_s in seen] == pytest.approx([6, 7, 10, 12])


def test_parts_without_a_length_count_the_same_and_need_no_listener():
    def main(world):
        times = []
        work = [lambda notify: (notify("a"), notify("b")), lambda notify: None]
        world.compute(work[0], lambda part: times.append((part, world.now_s())))
        world.compute(work[0])
        world.compute(work[1], times.append)
        return times, world.now_s()

    (times, end_s), *_ = run_virtual(main, 1, machine=STEP)
    assert times == [("a", pytest.approx(8.0)), ("b", pytest.approx(12.0))]
    assert end_s == pytest.approx(36.0)


def test_what_ready_starts_overlaps_with_computing():
    def main(world):
        vector, requests = np.ones(4), []

        def work(notify):
            notify(slice(2, 4))
            notify(slice(0, 2))

        def ready(part):
            requests.append(world.comm.Iallreduce(IN_PLACE, vector[part]))

        world.compute(work, ready)
        for request in requests:
            request.Wait()
        return world.now_s(), world.traffic.overlap, vector.tolist()

    machine = Machine(step_s=12.0, latency_s=1.0, bandwidth_Bps=16.0)
    # started at 8 s and 12 s, 2 s each: 2 s of 4 are hidden
    assert run_virtual(main, 2, machine=machine) == [(14.0, 0.5, [2.0] * 4)] * 2


def test_an_error_of_the_work_reaches_the_caller():
    def main(world):
        with pytest.raises(KeyError):
            world.compute(lambda notify: {}["x"])
        world.comm.Barrier()  # blocking is allowed again
        return world.now_s()

    assert run_virtual(main, 1) == [0.0]


def test_jitter_is_of_a_rank_and_has_the_declared_width_and_mean():
    def steps(num_messages):
        def main(world):
            times = [0.0]
            for _ in range(400):
                world.compute(lambda notify: None)
                times.append(world.now_s())
                for _ in range(num_messages):
                    world.comm.Isend(np.ones(1), 1 - world.rank)
            return np.diff(times)

        return run_virtual(main, 2, machine=Machine(step_s=1.0, jitter=0.25), seed=3)

    silent, talking = steps(0), steps(2)
    for a, b in zip(silent, talking, strict=True):
        np.testing.assert_allclose(a, b)  # whatever it communicates
        assert 0.75 <= a.min() < 0.77
        assert 1.23 < a.max() <= 1.25
        assert abs(a.mean() - 1.0) < 0.03
    assert abs(np.corrcoef(silent[0], silent[1])[0, 1]) < 0.15


def test_faults_are_asked_with_rank_time_and_step():
    asked = []

    class Noting(Faults):
        def slowdown(self, rank, time_s, step):
            asked.append((rank, time_s, step))
            return 2.0

    def main(world):
        world.compute(lambda notify: None)
        world.sleep(1.0)
        world.compute(lambda notify: None)

    run_virtual(main, 1, machine=STEP, faults=Noting())
    assert asked == [(0, 0.0, 0), (0, 25.0, 1)]


def test_faults_come_from_toml():
    text = "slow = {0 = 10.0, 12 = 1}"
    faults = msgspec.toml.decode(text, type=Faults)
    assert faults.slowdown(0, 0.0, 0) == 10.0
    assert faults.slowdown(12, 0.0, 0) == 1.0
    assert faults.slowdown(1, 0.0, 0) == 1.0
    assert msgspec.convert(msgspec.to_builtins(faults), Faults) == faults
    assert msgspec.convert({}, Faults) == Faults()


@pytest.mark.parametrize(
    ("slow", "problem"),
    [
        ({"x": 2.0}, "'x' is not a rank"),
        ({"-1": 2.0}, "'-1' is not a rank"),
        ({"1": 0.5}, "slow.1: 0.5 is not a factor of at least 1"),
        ({"1": float("nan")}, "slow.1: nan is not"),
        ({"1": float("inf")}, "slow.1: inf is not"),
    ],
)
def test_faults_that_make_no_sense_are_refused(slow, problem):
    with pytest.raises(ValueError, match="slow") as caught:
        Faults(slow=slow)
    assert problem in str(caught.value)
    with pytest.raises(msgspec.ValidationError, match="slow"):
        msgspec.convert({"slow": slow}, Faults)


@pytest.mark.parametrize(
    "settings",
    [{"bandwidth_Bps": 0.0}, {"latency_s": -1.0}, {"ranks_per_node": 0}, {"jitter": 2}],
)
def test_machines_that_make_no_sense_are_refused(settings):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(settings, Machine)


def test_nothing_blocks_inside_a_backward_pass():
    def main(world):
        theta = torch.ones(3, requires_grad=True)
        theta.register_hook(lambda grad: world.comm.Barrier())
        (theta * 2.0).sum().backward()

    with pytest.raises(WorldError, match="rank 0: a blocking call inside a backward"):
        run_virtual(main, 2)


def test_a_non_blocking_call_inside_a_backward_pass_is_fine():
    def main(world):
        theta = torch.ones(3, requires_grad=True)
        requests = []

        def hook(grad):
            requests.append(world.comm.Iallreduce(IN_PLACE, grad.clone()))

        theta.register_hook(hook)
        (theta * 2.0).sum().backward()
        requests[0].Wait()
        return theta.grad.tolist()

    assert run_virtual(main, 2) == [[2.0] * 3] * 2


def test_no_grad_of_one_rank_does_not_reach_the_others():
    def main(world):
        seen = []
        if world.rank == 0:
            with torch.no_grad():
                world.comm.Barrier()
                seen.append(torch.is_grad_enabled())
            world.comm.Barrier()
        else:
            world.comm.Barrier()
            seen.append(torch.is_grad_enabled())
            world.comm.Barrier()
        seen.append(torch.is_grad_enabled())
        return seen

    with torch.no_grad():
        results = run_virtual(main, 3)
        assert not torch.is_grad_enabled()
    assert results == [[False, True], [True, True], [True, True]]
    assert torch.is_grad_enabled()


def test_blocking_inside_inference_mode_is_refused():
    def main(world):
        with torch.inference_mode():
            world.comm.Barrier()

    with pytest.raises(WorldError, match="inference_mode"):
        run_virtual(main, 2)


@pytest.mark.parametrize("begun", ["before the gradient", "in it"])
def test_what_follows_a_gradient_hides_no_message_begun_after_it(begun: str) -> None:
    """Steps of 1 s, 0.5 s of optimiser and mixing, a sum of 1.2 s over two ranks.

    begun before the gradient, as delay_by_one does: the 0.5 s come before the sum
    begun in it, as allreduce does: the optimiser waits for the sum
    """
    x = np.zeros(300, np.float32)
    machine = Machine(
        latency_s=0.0, bandwidth_Bps=1000.0, step_s=1.0, update_s=0.3, mix_s=0.2
    )

    def main(world):
        ends = []
        for _ in range(4):
            requests = []

            def begin(_part):
                requests.append(world.comm.Iallreduce(IN_PLACE, x))  # noqa: B023

            if begun == "in it":
                world.compute(lambda notify: notify(slice(0, 1)), ready=begin)
            else:
                begin(None)
                world.compute(lambda _notify: None)
            requests[0].Wait()
            ends.append(world.now_s())
        return np.diff(ends)

    expected = 0.5 + (1.2 if begun == "before the gradient" else 1.0 + 1.2)
    for steps_s in run_virtual(main, 2, machine=machine):
        assert steps_s == pytest.approx(expected)
