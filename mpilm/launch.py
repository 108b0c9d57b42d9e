"""How this process was started: by which launcher, as which rank, before a terminal.

Nothing here starts MPI.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from mpilm.errors import WorldError


class Launcher(NamedTuple):
    """A program that starts ranks, and the variables by which it numbers them.

    rank  of the process
    size  number of processes that it started; "": it does not say
    """

    name: str
    rank: str
    size: str


# the first whose variable is set counts: an inner launcher stands above srun
LAUNCHERS = (
    Launcher("Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    Launcher("MPICH's mpiexec or a PMI launcher", "PMI_RANK", "PMI_SIZE"),
    Launcher("a PMIx launcher", "PMIX_RANK", ""),
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)

BY_SRUN = (
    "; or srun --mpi=pmix (Open MPI), srun --mpi=pmi2 (MPICH, Intel MPI), where"
    " `srun --mpi=list` has it"
)


def launched(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return rank and number of the processes that a launcher started.

    A number that came with one process is no rank: a shell that `srun --pty` started,
    or a single task, inherits the numbers of what is around it.

    >>> launched({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"})
    (2, 4)
    >>> launched({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "1"})
    (0, 1)
    """
    for launcher in LAUNCHERS:
        rank = environment.get(launcher.rank, "")
        size = environment.get(launcher.size, "")
        if not rank.isdecimal():
            continue
        if launcher.rank == "PMIX_RANK" and rank == environment.get("SLURM_PROCID"):
            size = environment.get("SLURM_STEP_NUM_TASKS", "")
        if launcher.rank == "SLURM_PROCID" and not size:
            size = "1"  # the shell of a batch script
        if not size.isdecimal():
            size = str(int(rank) + 1)  # unknown: at least so many
        return (int(rank), int(size)) if int(size) > 1 else (0, 1)
    return 0, 1


def launched_rank() -> int:
    """Return the rank that a launcher gave this process; 0 without one."""
    return launched(os.environ)[0]


def check_launch(world_size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Raise if a launcher started several processes and MPI sees only one.

    `srun` sets SLURM_STEP_NUM_TASKS, sbatch and salloc do not: a single rank inside an
    allocation is nobody's mistake.

    >>> check_launch(1, {"SLURM_NTASKS": "4"})
    >>> check_launch(1, {"SLURM_STEP_NUM_TASKS": "4", "OMPI_COMM_WORLD_SIZE": "1"})

    Raises:
        WorldError: one line with the remedy.
    """
    if world_size > 1:
        return
    for launcher in LAUNCHERS:
        started = environment.get(launcher.size, "")
        if not started.isdecimal():
            continue
        if int(started) > 1:
            by_srun = BY_SRUN if launcher.name == "srun" else ""
            raise WorldError(
                f"{launcher.name} started {started} processes, but MPI sees a world of"
                " one rank: start with the mpirun of the MPI that mpi4py uses"
                f" (python -m mpi4py --mpi-library), in an sbatch script too{by_srun}",
                everywhere=True,
            )
        return


def terminal_width() -> int | None:
    """Return the columns of the terminal that shows our output, or None.

    Open MPI gives every rank a pseudo-terminal of its own, whatever mpirun writes to;
    the terminal that matters is that of mpirun, the parent process.
    """
    path = (
        f"/proc/{os.getppid()}/fd/1"
        if "OMPI_COMM_WORLD_RANK" in os.environ
        else "/proc/self/fd/1"
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    except OSError:
        return None
    try:
        if not os.isatty(descriptor):
            return None
        return os.get_terminal_size(descriptor).columns or 80
    finally:
        os.close(descriptor)


def about_banner(code: int, environment: Mapping[str, str] = os.environ) -> str:
    """Return what to say where Open MPI's mpirun prints lines of its own about `code`.

    >>> about_banner(75, {"OMPI_COMM_WORLD_SIZE": "2"})
    ' (exit code 75; what mpirun says of it is no error)'
    >>> about_banner(75, {"PMI_SIZE": "2"})
    ''
    """
    if not environment.get("OMPI_COMM_WORLD_SIZE"):
        return ""
    return f" (exit code {code}; what mpirun says of it is no error)"


def node_name(environment: Mapping[str, str]) -> str:
    """Return the name by which the scheduler knows this node, or else its host name.

    >>> node_name({"SLURMD_NODENAME": "gpu07"})
    'gpu07'
    """
    return environment.get("SLURMD_NODENAME") or socket.gethostname()
