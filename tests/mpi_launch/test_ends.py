"""No failure of one rank leaves the others waiting, and one line says what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpilm.errors import WorldError
from mpilm.launch import check_launch

from .conftest import Launch


def test_an_exception_on_one_rank(launch: Launch, tmp_path: Path) -> None:
    run = launch(
        3,
        """
        with MpiWorld() as world, abort_on_error(world, "out/run"):
            if world.rank == 1:
                raise ValueError("a\\nb")
            world.comm.Allreduce(IN_PLACE, x)
        """,
    )
    assert run.returncode == 1
    path = "out/run/traceback-rank-0001.txt"
    assert run.said == [f"rank 1: ValueError: a; b (traceback: {path})"]
    assert "Traceback" not in run.stderr
    written = tmp_path / "out/run"
    assert [p.name for p in written.iterdir()] == [Path(path).name]
    assert 'raise ValueError("a' in (tmp_path / path).read_text()


def test_an_error_of_the_user_has_no_traceback(launch: Launch, tmp_path: Path) -> None:
    run = launch(
        2,
        """
        with MpiWorld() as world, abort_on_error(world, "out"):
            if world.rank == 0:
                raise DataError("x.h5: truncated")
            world.comm.Dup().Iallreduce(IN_PLACE, x).Wait()
        """,
    )
    assert (run.returncode, run.said) == (2, ["rank 0: x.h5: truncated"])
    assert not (tmp_path / "out").exists()


def test_an_error_on_all_ranks_is_said_once(launch: Launch) -> None:
    run = launch(
        3,
        """
        with MpiWorld() as world, abort_on_error(world):
            with world.all_or_none():
                if world.rank == 2:
                    raise ConfigError("train.batch: 0 is too small")
        """,
    )
    assert (run.returncode, run.said) == (2, ["rank 2: train.batch: 0 is too small"])
    assert "MPI_ABORT" not in run.stderr


def test_an_activity_that_fails_ends_all_ranks(launch: Launch) -> None:
    run = launch(
        2,
        """
        def work():
            world.sleep(0.2)
            raise DataError("no more chunks")

        with MpiWorld() as world, abort_on_error(world):
            if world.rank == 1:
                world.start(work, "reader")
            else:
                world.comm.Allreduce(IN_PLACE, x)
            time.sleep(50)
        """,
    )
    assert (run.returncode, run.said) == (2, ["rank 1: no more chunks"])


UNENDED = """
from mpilm import run_mpi, strategy
from mpilm.learner.quadratic import ProtocolLearner

def train(world):
    learner = ProtocolLearner(100, compute=world.compute, seed=world.rank)
    chosen = strategy("adpsgd", world)
    chosen.start(learner)
    for _ in range(20):
        chosen.step(learner)
"""


@pytest.mark.parametrize("ranks_that_finish", [(), (0,)])
def test_a_program_that_forgets_to_finish(launch: Launch, ranks_that_finish) -> None:
    run = launch(
        2,
        f"""{UNENDED}
    if world.rank in {ranks_that_finish}:
        chosen.finish(learner)

run_mpi(train)
""",
    )
    assert run.returncode == 2
    (line,) = run.said
    assert "strategy.finish(learner) was not called" in line
    assert "Traceback" not in run.stderr


def test_an_error_on_all_ranks_while_a_service_runs(launch: Launch) -> None:
    run = launch(
        2,
        f"""{UNENDED}
    with world.all_or_none():
        raise ConfigError("no more")

run_mpi(train)
""",
    )
    assert (run.returncode, run.said) == (2, ["no more"])


@pytest.mark.parametrize("code", [0, 3])
def test_sys_exit(launch: Launch, code: int) -> None:
    run = launch(
        2,
        f"""
        with MpiWorld() as world, abort_on_error(world):
            if {code} and world.rank == 0:
                world.comm.Barrier()
            sys.exit({code})
        """,
    )
    assert (run.returncode, run.said) == (code, [])


def test_one_rank_alone_ends_without_mpi_abort(launch: Launch) -> None:
    run = launch(
        0,
        """
        with MpiWorld() as world, abort_on_error(world):
            raise ValueError("no")
        """,
    )
    assert (run.returncode, run.said) == (1, ["ValueError: no"])
    assert "Traceback" in run.stderr  # there was no folder for it
    assert "MPI_ABORT" not in run.stderr


def test_a_world_that_nobody_closes(launch: Launch) -> None:
    run = launch(
        2,
        """
        world = MpiWorld()
        y = np.zeros_like(x)
        world.comm.Irecv(y, (world.rank + 1) % 2)  # never arrives
        world.comm.Iallreduce(IN_PLACE, x).Wait()
        world.start(lambda: world.wait(lambda: None, "nothing"), "for ever")
        print("sum", x[0])
        """,
    )
    assert (run.returncode, run.said) == (0, [])
    assert run.stdout.splitlines() == ["sum 2.0"] * 2


@pytest.mark.parametrize("end", ["sys.exit()", "raise ValueError('no')"])
def test_a_rank_that_leaves_while_others_work(launch: Launch, end: str) -> None:
    run = launch(
        2,
        f"""
        mpilm.world.mpi.world.LEAVE_S = 0.5
        world = MpiWorld()
        if world.rank == 1:
            {end}
        world.comm.Allreduce(IN_PLACE, x)
        """,
    )
    assert run.returncode == 1
    assert run.said == ["rank 1: exits while others still work; aborting"]


def test_no_torch_and_no_mpi_before_they_are_needed(launch: Launch) -> None:
    run = launch(
        0,
        """
        assert "mpi4py" not in sys.modules
        with MpiWorld() as world:
            world.comm.Allreduce(IN_PLACE, x)
        print(*{"torch", "greenlet", "h5py"} & set(sys.modules))
        """,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "\n", "")


def test_srun_with_an_mpi_that_it_does_not_know(launch: Launch) -> None:
    program = """
        try:
            MpiWorld().close()
        except WorldError as error:
            print(error)
        """
    run = launch(0, program, SLURM_STEP_NUM_TASKS="4", SLURM_NTASKS="4")
    assert run.stdout.startswith(
        "srun started 4 processes, but MPI sees a world of one"
    )
    run = launch(0, program, SLURM_NTASKS="4")  # inside salloc, alone on purpose
    assert (run.stdout, run.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI's mpirun"),
        ({"PMI_SIZE": "3", "SLURM_STEP_NUM_TASKS": "1"}, "MPICH's mpiexec"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun"),
    ],
)
def test_launchers(environment: dict[str, str], launcher: str) -> None:
    with pytest.raises(WorldError, match=launcher):
        check_launch(1, environment)
    check_launch(2, environment)


def test_a_rank_that_dies_as_declared_ends_all(launch: Launch) -> None:
    run = launch(
        3,
        """
        from mpilm.world.faults import Faults

        faults = Faults(profile=({"kind": "fail_at", "rank": 2, "step": 3},))
        with MpiWorld(faults=faults) as world, abort_on_error(world):
            for _ in range(9):
                world.compute(lambda notify: None)
                world.comm.Allreduce(IN_PLACE, x)
        """,
    )
    assert run.returncode == 4
    assert run.said[0] == "rank 2: dies before step 3, as [faults] declares"
