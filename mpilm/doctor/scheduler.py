"""Which batch system is here, and is this one of its jobs?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping

from mpilm.doctor.findings import Finding, ok

# name -> the command that submits to it, the variable that numbers its jobs
SCHEDULERS = {"SLURM": ("sbatch", "SLURM_JOB_ID"), "PBS": ("qsub", "PBS_JOBID")}


def check_scheduler(
    environment: Mapping[str, str] = os.environ,
    which: Callable[[str], str | None] = shutil.which,
) -> Finding:
    """Return what `mpilm submit` would find.

    >>> where = {"sbatch": "/usr/bin/sbatch"}.get
    >>> check_scheduler({"SLURM_JOB_ID": "7"}, where).text
    'SLURM (/usr/bin/sbatch); inside its job 7'
    >>> check_scheduler({}, {}.get).text
    'none (neither sbatch nor qsub): start with mpirun'
    """
    here = {
        name: path
        for name, (command, _) in SCHEDULERS.items()
        if (path := which(command)) is not None
    }
    jobs = [
        f"inside {'its' if name in here else f'a {name}'} job {job}"
        for name, (_, variable) in SCHEDULERS.items()
        if (job := environment.get(variable))
    ]
    found = " and ".join(f"{name} ({path})" for name, path in here.items())
    if len(here) > 1:
        jobs.append("submit wants --scheduler")
    if not found:
        found = "none (neither sbatch nor qsub)" + (
            "" if jobs else ": start with mpirun"
        )
    return ok("scheduler", "; ".join([found, *jobs]))
