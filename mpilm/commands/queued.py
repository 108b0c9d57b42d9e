"""Which job was submitted for a run folder, and whether it is still to come.

RUN/job.json   {"job": "17", "scheduler": "slurm"}: the one submitted last
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mpilm.errors import CheckpointError, WorldError
from mpilm.storage.files import reason, write_json
from mpilm.storage.owner import JOBS, Owner, Record
from mpilm.storage.owner import NAME as OWNER

NAME = "job.json"
ASK_S = 60.0  # a scheduler that has not answered by then is not well
VARIABLES = {"slurm": "SLURM_JOB_ID", "pbs": "PBS_JOBID"}
# scheduler -> the command that prints a job's state, and fails if there is no such job
STATE = {
    "slurm": ("squeue", "--noheader", "--format=%T", "--jobs"),
    "pbs": ("qstat",),
}
# scheduler -> the command that prints why a job still waits, and how that looks
REASON = {
    "slurm": (("squeue", "--noheader", "--format=%r", "--jobs"), r"^(?!None$)(.+)$"),
    "pbs": (("qstat", "-f", "-w"), r"^ *comment = (.+)$"),
}


@dataclass(frozen=True)
class Submitted:
    """A job that was submitted for a run.

    scheduler  "slurm" or "pbs"
    job        its number
    """

    scheduler: str
    job: str

    @classmethod
    def read(cls, run: Path) -> Submitted | None:
        """Return the job that was submitted last; None: none, as far as is known."""
        try:
            found = json.loads((run / NAME).read_bytes())
            return cls(str(found["scheduler"]), str(found["job"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def of(cls, owner: Record) -> Submitted | None:
        """Return the job that a run's owner belongs to; None: to none."""
        for scheduler, variable in VARIABLES.items():
            word, job = JOBS[variable], owner.job
            if job.startswith(word):
                return cls(scheduler, job.removeprefix(word).strip())
        return None

    def write(self, run: Path) -> None:
        """Note it in the run folder.

        Raises:
            CheckpointError: that cannot be written.
        """
        write_json(run / NAME, {"job": self.job, "scheduler": self.scheduler})

    def is_queued(self) -> bool:
        """Ask the scheduler whether the job waits or runs.

        Raises:
            WorldError: it does not answer.
        """
        if self.scheduler not in STATE:
            return False
        return bool(self._ask(STATE[self.scheduler]).strip())

    def waits_for(self) -> str:
        """Ask the scheduler why the job does not run yet; "": it does not say.

        Raises:
            WorldError: it does not answer.
        """
        if self.scheduler not in REASON:
            return ""
        command, form = REASON[self.scheduler]
        found = re.search(form, self._ask(command), re.M)
        return found[1].strip() if found else ""

    def _ask(self, command: tuple[str, ...]) -> str:
        """Return what it prints of this job; "": it fails, or is not here."""
        try:
            done = subprocess.run(
                [*command, self.job],
                check=False,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=ASK_S,
            )
        except FileNotFoundError:
            return ""  # another cluster's
        except (OSError, subprocess.TimeoutExpired) as error:
            raise WorldError(f"{command[0]}: {reason(error)}") from None
        return done.stdout if done.returncode == 0 else ""


def require_free(run: Path, *, after: str = "") -> None:
    """Raise if another job is at work in a run folder, or will be.

    Args:
        after: the job that the next one waits for.

    Raises:
        CheckpointError: one line that names it.
        WorldError: the scheduler does not answer.
    """
    owner = Record.read(run / OWNER)
    of_owner = Submitted.of(owner) if owner else None
    for found in (Submitted.read(run), of_owner):
        if found and found.job != after and found.is_queued():
            raise CheckpointError(
                f"{run}: job {found.job} in the queue is for it: cancel that one, or"
                f" give --after {found.job}, or another --out"
            )
    if owner and not of_owner:  # a run that no scheduler knows
        Owner(run).take().release()


def make(run: Path) -> None:
    """Make a run folder.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{run}: cannot write: {reason(error)}") from None
