"""The stall inspector names the ranks that have not come."""

from __future__ import annotations

import re

from .conftest import Launch


def test_a_rank_that_computes_too_long(launch: Launch) -> None:
    run = launch(
        3,
        """
        with MpiWorld(stall_s=1.0) as world:
            if world.rank == 1:
                time.sleep(7.0)
            world.comm.Allreduce(IN_PLACE, x)
        """,
    )
    assert run.returncode == 0
    # At 1, 2 and 4 s, or fewer where ranks 0 and 2 come late on a busy machine. Rank 2
    # waits as well: one reports.
    assert 2 <= len(run.said) <= 3
    for line in run.said:
        assert re.fullmatch(r"rank 0: waiting \d s in Allreduce for rank 1", line)


def test_rank_0_is_missing_from_a_group(launch: Launch) -> None:
    """Ranks are those of the world; the wait is in a queue."""
    run = launch(
        4,
        """
        with MpiWorld(stall_s=1.0) as world:
            turned = world.comm.Split(0, key=-world.rank)
            if world.rank % 3 == 0:
                time.sleep(4.0)
            turned.Iallreduce(IN_PLACE, x).Wait()
        """,
    )
    assert run.returncode == 0
    want = r"rank 2: waiting \d s in Iallreduce for ranks 3, 0"
    assert re.fullmatch(want, run.said[0])


def test_a_dead_rank_is_named_and_the_run_ends(launch: Launch) -> None:
    run = launch(
        3,
        """
        import os, signal
        with MpiWorld(stall_s=1.0, stall_abort_s=3.5) as world:
            if world.rank == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            world.comm.Barrier()
        """,
    )
    assert run.returncode == 3
    want = r"rank 0: waiting \d+ s in Barrier for rank 2 \(no answer from rank 2\)"
    assert re.fullmatch(want + "; aborting", run.said[-1])
    assert all(re.fullmatch(want, line) for line in run.said[:-1])


def test_without_threads_who_does_not_come_is_named_too(launch: Launch) -> None:
    run = launch(
        2,
        """
        with MpiWorld(stall_s=0.5) as world:
            assert not world.background
            if world.rank == 1:
                time.sleep(4.0)
            world.comm.Barrier()
        """,
        MPI4PY_RC_THREAD_LEVEL="funneled",
    )
    assert run.returncode == 0
    assert run.said[0].endswith("s in Barrier for rank 1 (no answer from rank 1)")


def test_what_the_learner_waits_for(launch: Launch) -> None:
    run = launch(
        2,
        """
        with MpiWorld(stall_s=0.5) as world:
            if world.rank == 0:
                world.comm.Recv(x, 1, tag=3)
                world.wait(lambda: world.now_s() > 1.9, "the end of time")
            else:
                time.sleep(0.8)
                world.comm.Send(x, 0, tag=3)
                late = lambda: world.now_s() > 2.0
                world.start(lambda: world.wait(late, "a question"), "a server")
                time.sleep(1.5)
        """,
    )
    assert run.returncode == 0
    want = r"rank 0: waiting \d s for a message from rank 1 \(tag 3\)"
    assert re.fullmatch(want, run.said[0])
    assert "the end of time" in " ".join(run.said)
    assert all(line.startswith("rank 0:") for line in run.said)  # servers may wait
