"""The engine: determinism, deadlocks, failures, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest

from mpilm.errors import ConfigError, DataError, MpilmError, WorldError
from mpilm.world.base import IN_PLACE
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, run_virtual

QUICK = Machine(latency_s=1.0, bandwidth_Bps=8.0, step_s=16.0)


def busy(world):
    """Every kind of operation, in an order that jitter decides."""
    received = []
    vector = np.full(5, world.rank + 1.0)

    def chat():
        for _ in range(5):
            world.sleep(0.25)
            world.comm.Send(np.array([world.rank]), (world.rank + 1) % world.size, 3)

    activity = world.start(chat, "chat")
    for _ in range(4):
        world.compute(lambda notify: None)
        world.comm.Allreduce(IN_PLACE, vector)
        vector *= 1.0 / world.size + 0.1
    for _ in range(5):
        number = np.zeros(1, np.int64)
        world.comm.Recv(number, tag=3)
        received.append((int(number[0]), world.now_s()))
    activity.join()
    return received, vector.tobytes(), world.now_s(), world.traffic


def test_the_same_seed_gives_the_same_run_to_the_bit():
    machine = Machine(jitter=0.5, step_s=0.2, latency_s=0.1)
    faults = Faults(slow={"2": 3.0})
    runs = [
        Simulation(7, machine=machine, faults=faults, seed=seed) for seed in (5, 5, 6)
    ]
    first, again, other = (run.run(busy) for run in runs)
    assert first == again
    assert runs[0].num_events == runs[1].num_events
    assert first != other
    assert [vector for _, vector, _, _ in first] == [v for _, v, _, _ in other]


def test_results_come_in_the_order_of_ranks():
    assert run_virtual(lambda world: (world.rank, world.size), 3) == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]


def test_a_deadlock_tells_who_waits_for_what():
    def main(world):
        if world.rank == 0:
            world.comm.Recv(np.zeros(1), source=1, tag=7)
        elif world.rank == 1:
            world.sleep(2.5)
            world.wait(lambda: None, "a sign")
        elif world.rank == 2:
            world.start(lambda: world.comm.Recv(np.zeros(1)), "mixing")
        else:
            world.comm.Allreduce(IN_PLACE, np.zeros(2, np.float32))

    with pytest.raises(WorldError) as caught:
        run_virtual(main, 4)
    assert str(caught.value).splitlines() == [
        "deadlock at 2.5 s of virtual time",
        "  rank 0: the learner waits for a message from rank 1 (tag 7)",
        "  rank 1: the learner waits for a sign",
        "  rank 2: the learner waits for the end of mixing;"
        " mixing waits for a message from any rank (any tag)",
        "  rank 3: the learner waits for ranks 0, 1, 2 in Allreduce of 8 bytes of"
        " float32 (sum) on world (communicator 0)",
    ]


def test_a_deadlock_of_many_ranks_is_not_reported_without_end():
    with pytest.raises(WorldError) as caught:
        run_virtual(lambda world: world.wait(lambda: False, "nothing"), 200)
    lines = str(caught.value).splitlines()
    assert len(lines) == 66
    assert lines[-1] == "  and 136 more ranks"


def test_an_error_ends_all_ranks_and_names_its_rank():
    cleaned = []

    def main(world):
        try:
            world.compute(lambda notify: None)
            if world.rank == 2:
                raise DataError("no such word")
            world.comm.Barrier()
        finally:
            cleaned.append(world.rank)

    with pytest.raises(DataError, match=r"^rank 2: no such word$"):
        run_virtual(main, 4)
    assert sorted(cleaned) == [0, 1, 2, 3]


def test_clean_up_after_an_error_cannot_block():
    def main(world):
        try:
            if world.rank == 1:
                raise KeyError("x")
            world.comm.Barrier()
        finally:
            world.comm.Barrier()

    with pytest.raises(WorldError, match=r"^rank 1: KeyError: 'x'$"):
        run_virtual(main, 3)


def test_an_error_that_is_everywhere_is_told_once():
    def main(world):
        with world.all_or_none():
            if world.rank == 1:
                raise DataError("corpus.h5: empty")

    with pytest.raises(MpilmError, match=r"^rank 1: corpus.h5: empty$"):
        run_virtual(main, 3)


def test_an_interrupt_passes_unchanged():
    def main(world):
        if world.rank == 1:
            raise KeyboardInterrupt
        world.comm.Barrier()

    with pytest.raises(KeyboardInterrupt):
        run_virtual(main, 2)


def test_asking_without_end_is_refused():
    def main(world):
        request = world.comm.Irecv(np.zeros(1))
        while not request.Test():
            pass

    with pytest.raises(WorldError, match=r"rank 0: .*use world\.wait"):
        run_virtual(main, 1)


def test_asking_with_pauses_is_allowed():
    def main(world):
        barrier = world.comm.Ibarrier()
        while not barrier.Test():
            world.sleep(0.25)
        return world.now_s()

    assert run_virtual(main, 2, machine=QUICK) == [1.0, 1.0]


@pytest.mark.parametrize(
    "block",
    [
        lambda world: world.sleep(0.0),
        lambda world: world.comm.Barrier(),
        lambda world: world.comm.Ibarrier().Wait(),
        lambda world: world.comm.Allreduce(IN_PLACE, np.ones(1)),
        lambda world: world.comm.Send(np.ones(1), world.rank),
        lambda world: world.wait(lambda: 1, "one"),
        lambda world: world.lock("free").__enter__(),
        lambda world: world.start(lambda: None, "x").join(),
        lambda world: world.compute(lambda notify: None),
        lambda world: world.comm.Dup(),
    ],
)
@pytest.mark.parametrize("where", ["work", "ready", "predicate"])
def test_nothing_blocks_inside_computing_or_a_predicate(block, where):
    def main(world):
        if where == "work":
            world.compute(lambda notify: block(world))
        elif where == "ready":
            world.compute(lambda notify: notify(slice(0, 1)), lambda part: block(world))
        else:
            world.wait(lambda: block(world), "nothing")

    with pytest.raises(WorldError, match="rank 0: a blocking call inside"):
        run_virtual(main, 1)


def test_a_world_is_used_by_its_own_rank_only():
    worlds = []

    def main(world):
        worlds.append(world)
        world.sleep(1.0)
        if world.rank == 1:
            worlds[0].sleep(1.0)

    with pytest.raises(WorldError, match="rank 1: the world of rank 0"):
        run_virtual(main, 2)
    with pytest.raises(WorldError, match="while run_virtual runs"):
        worlds[0].sleep(1.0)


def test_no_ranks_unknown_ranks_and_negative_time_are_refused():
    with pytest.raises(WorldError, match="0 ranks"):
        run_virtual(lambda world: None, 0)
    with pytest.raises(ConfigError, match=r"faults\.slow\.4: there are only 4 ranks"):
        run_virtual(lambda world: None, 4, faults=Faults(slow={"4": 2.0}))
    with pytest.raises(WorldError, match="rank 0: cannot sleep -1"):
        run_virtual(lambda world: world.sleep(-1.0), 1)


def test_a_simulation_runs_once():
    simulation = Simulation(2)
    simulation.run(lambda world: None)
    with pytest.raises(WorldError, match="only once"):
        simulation.run(lambda world: None)


def test_a_simulation_inside_a_simulation():
    def main(world):
        inner = run_virtual(lambda w: w.comm.allgather(w.rank), 2)
        return inner[1], world.comm.allgather(world.rank)

    assert run_virtual(main, 3) == [([0, 1], [0, 1, 2])] * 3


def test_a_thousand_ranks():
    def main(world):
        vector = np.ones(8, np.float32)
        for _ in range(3):
            world.compute(lambda notify: None)
            world.comm.Allreduce(IN_PLACE, vector)
            vector *= 1.0 / world.size
        return float(vector.sum())

    assert run_virtual(main, 1024) == [8.0] * 1024


def test_worlds_strategies_and_the_protocol_learner_need_no_torch_and_no_mpi():
    code = (
        "import sys, mpilm.world.virtual, mpilm.learner.quadratic, mpilm.strategies;"
        "sys.exit(int(bool({'torch', 'mpi4py.MPI'} & set(sys.modules))))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
