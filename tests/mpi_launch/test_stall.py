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


def test_who_always_waits_long_is_reported_no_more(launch: Launch) -> None:
    """A limit that does not adapt would report every one of the twenty waits."""
    run = launch(
        2,
        """
        with MpiWorld(stall_s=0.3) as world:
            for _ in range(20):
                if world.rank == 1:
                    time.sleep(0.6)
                world.comm.Allreduce(IN_PLACE, x)
        """,
    )
    assert run.returncode == 0
    # the first eight, by the limit of waits that are not known yet; a few on a busy
    # machine, where a wait may be twice as long as the others
    assert 3 <= len(run.said) <= 14, run.said


def test_who_never_waits_long_is_told_sooner(launch: Launch) -> None:
    """A limit that does not adapt would say nothing in 3 seconds."""
    run = launch(
        2,
        """
        with MpiWorld(stall_s=4.5) as world:
            for number in range(20):
                if world.rank == 1:
                    time.sleep(3.5 if number == 19 else 0.02)
                world.comm.Allreduce(IN_PLACE, x)
        """,
    )
    assert run.returncode == 0
    assert re.fullmatch(r"rank 0: waiting \d s in Allreduce for rank 1", run.said[0])


def test_a_rank_that_is_silent_ends_the_run_and_the_last_words_are_said(
    launch: Launch,
) -> None:
    """Whether a collective or a message is waited for; who computes is not silent."""
    for wait in ("world.comm.Barrier()", "world.comm.Recv(x, 2)"):
        run = launch(
            3,
            f"""
            import os, signal
            with MpiWorld(stall_s=0.5, silence_s=4.0) as world:
                world.last_words = lambda: "; resume from step 7"
                if world.rank == 2:
                    world.comm.Send(x, 0)
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif world.rank == 1:
                    end_s = time.monotonic() + 60.0
                    while time.monotonic() < end_s:
                        x += 1.0
                else:
                    world.comm.Recv(x, 2)
                    {wait}
            """,
        )
        assert run.returncode == 3, run
        want = r"rank 0: no answer from rank 2 for [45] s, waiting in or for .*; ends"
        assert re.fullmatch(want + "; resume from step 7", run.said[-1]), run.said


def test_who_was_suspended_itself_does_not_blame_the_others(launch: Launch) -> None:
    run = launch(
        2,
        """
        import os, signal, subprocess
        with MpiWorld(stall_s=0.5, silence_s=4.0) as world:
            pids = world.comm.allgather(os.getpid())
            if world.rank == 1:
                subprocess.Popen(["sh", "-c", f"sleep 2.5; kill -STOP {pids[0]};"
                    f" sleep 0.3; kill -STOP {pids[1]}; sleep 6;"
                    f" kill -CONT {pids[1]}; sleep 0.3; kill -CONT {pids[0]}"])
                end_s = time.monotonic() + 11.0
                while time.monotonic() < end_s:
                    x += 1.0
            world.comm.Barrier()
        """,
    )
    assert run.returncode == 0, run
    assert not any("ends" in line for line in run.said)
