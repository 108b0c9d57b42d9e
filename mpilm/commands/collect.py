"""The job that collects a sweep: it waits for all others, then draws the page.

    python -m mpilm.commands.collect OUT

A run that its time limit has cut goes on in a job of its own, which the collector did
not know of. When it has drawn what there is, it looks for such jobs (the command
above), and submits the next collector, which waits for them.

OUT/job.json     which job it is
OUT/collect.log  what it said
OUT/sweep.csv    a row for each point
OUT/report.html  the page
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mpilm.commands.points import Spec
from mpilm.commands.queued import Submitted
from mpilm.commands.submit import Job, start
from mpilm.commands.swept import Sweep
from mpilm.errors import BAD_INPUT, MpilmError, say

TIME = "0:30:00"  # chosen, not tuned: reading some hundred logs takes a minute
MODULE = f"{__package__}.collect"  # which runs as __main__ there
TABLE, PAGE, LOG = "sweep.csv", "report.html", "collect.log"


def jobs_of(found: Sweep) -> list[str]:
    """Return the numbers of the jobs that a sweep has in the queue."""
    states = found.states
    return [
        job.job
        for point in found.points
        if states[point.name].state in ("queued", "runs")
        and (job := Submitted.read(found.out / point.name))
    ]


def submit_collector(found: Sweep, before: Sequence[str]) -> str:
    """Submit the job that collects; return its number. "": there is no need of one.

    Args:
        before: the jobs that an earlier collector knows, if there is one.

    Raises:
        WorldError: the scheduler refuses, or does not answer.
        CheckpointError: its number cannot be written.
    """
    jobs, old = jobs_of(found), Submitted.read(found.out)
    if not jobs or (set(jobs) <= set(before) and old and old.is_queued()):
        return ""
    identifier = start(collector(found.spec, found.out, jobs))
    Submitted(found.spec.run, identifier).write(found.out)
    return identifier


def collector(spec: Spec, out: Path, jobs: Sequence[str]) -> Job:
    """Return the job; it takes queue and account of the others.

    Args:
        jobs: numbers of those that it waits for, whatever becomes of them.
    """
    given = _options(spec.options)
    mpilm = shlex.join([sys.executable, "-m", "mpilm"])
    folder = shlex.quote(str(out))
    script = f"{mpilm} status {folder} --csv {folder}/{TABLE}"
    script += f"; {mpilm} report {folder} --out {folder}/{PAGE}"
    script += f"; {shlex.join([sys.executable, '-m', MODULE])} {folder}"
    if "--env" in given:
        # sh looks for a name without a slash on PATH
        env = shlex.quote(os.path.abspath(given["--env"]))
        script = f". {env} && {{ {script}; }}"
    after, log = ":".join(jobs), out / LOG
    if spec.run == "slurm":
        command = ["sbatch", "--parsable", f"--job-name=collect-{out.name}"]
        command += ["--nodes=1", "--ntasks=1", f"--time={TIME}", "--export=ALL"]
        command += [f"--dependency=afterany:{after}", f"--output={log}"]
        command += [f"--partition={given['--queue']}"] if "--queue" in given else []
        command += [f"--account={given['--account']}"] if "--account" in given else []
        return Job({}, [*command, f"--wrap={script}"])
    command = ["qsub", "-N", "collect", "-l", "select=1:ncpus=1"]
    command += ["-l", f"walltime={TIME}", "-W", f"depend=afterany:{after}"]
    command += ["-j", "oe", "-o", str(log), "-v", "PATH"]  # for qstat and qsub
    command += ["-q", given["--queue"]] if "--queue" in given else []
    command += ["-A", given["--account"]] if "--account" in given else []
    return Job({}, [*command, "--", "/bin/sh", "-c", f"cd {_here()} && {script}"])


def submit_next(out: Path) -> str:
    """Submit the next collector if jobs of a sweep are in the queue; return its number.

    "": there are none. Raises as `submit_collector`.
    """
    found = Sweep.read(out)
    found.look()
    return submit_collector(found, ())


def _options(words: Sequence[str]) -> dict[str, str]:
    """Return the options of `mpilm submit` among words, with their values.

    >>> _options(["--time", "1:00:00", "--queue=long", "--option=--exclusive"])
    {'--time': '1:00:00', '--queue': 'long', '--option': '--exclusive'}
    """
    found, key = {}, ""
    for word in words:
        if word.startswith("--"):
            key, _, value = word.partition("=")
            found[key] = value
        elif key:
            found[key] = word
    return found


def _here() -> str:
    return shlex.quote(os.getcwd())


def follow_up(words: Sequence[str]) -> int:
    """Go on with the sweep in the folder that is named; say so in one line."""
    out = Path(words[0])
    try:
        if job := submit_next(out):
            say(f"jobs go on: job {job} waits for them, then draws {out / PAGE}")
    except MpilmError as error:
        say(f"{error}; `mpilm report {out}` once more when all jobs have ended")
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(follow_up(sys.argv[1:]))
