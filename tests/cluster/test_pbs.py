"""jobs/pbs/train.pbs in the environment that OpenPBS 23.06 was seen to give a job.

The script, mpirun and `mpilm train` are real. qstat, qsub and pbs_tmrsh are stand-ins;
they are found, as on a real node, through the profile of the login shell.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.project import (
    BIN,
    REPOSITORY,
    Project,
    environments,
    samples_at_stop,
    wait_until,
)

SCRIPT = REPOSITORY / "jobs" / "pbs" / "train.pbs"
HOST = socket.gethostname()
MORE = 3_000  # samples of the last leg
# What qstat -f prints; long values are folded and go on after a tab.
QSTAT = """cat <<END
Job Id: $2
    Job_Name = mpilm
    Resource_List.ncpus = 2
    Resource_List.place = scatter
    Resource_List.select = {select}
    Resource_List.walltime = {walltime}
    Output_Path = host:/data/runs/x/
    Account_Name = speech
END"""
QSUB = """printf '%s\\n' "$@" >{folder}/qsub.options
for name in CONFIG RUN SETTINGS PERCENT MPILM_ENV LAUNCH WALLTIME WARN RESUME; do
    echo "$name=${{!name}}" >>{folder}/qsub.environment
done
echo 17.server"""
# Another host has another name; MPI tells hosts apart by it.
TMRSH = """echo "$1" >>{folder}/pbs_tmrsh.hosts
exec unshare --uts -- /bin/bash -c 'hostname "$1"; shift; exec "$@"' bash "$@" """

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not (BIN / "mpirun").exists(), reason="no mpirun here"),
]


class Job:
    """A running job: the script, in a session of its own like PBS's.

    Args:
        project: where it is submitted from.
        hosts: the node file, a line for each rank.
        identifier: the job's.
        select: what was asked of qsub.
        walltime: h:m:s, or "" for none.
        variables: what qsub -v passes on.
    """

    def __init__(
        self,
        project: Project,
        *,
        hosts: list[str],
        identifier: str = "16.server",
        select: str = "1:ncpus=2:mpiprocs=2",
        walltime: str = "00:10:00",
        **variables: str,
    ) -> None:
        self.project = project
        folder = project.folder
        home, self.log = folder / "home", folder / f"job-{time.monotonic_ns()}.log"
        home.mkdir(exist_ok=True)
        (home / ".bash_profile").write_text(f'PATH="{folder}/bin:$PATH"\n')
        project.tool("qstat", QSTAT.format(select=select, walltime=walltime))
        project.tool("qsub", QSUB.format(folder=folder))
        project.tool("pbs_tmrsh", TMRSH.format(folder=folder))
        nodes = folder / f"aux[{identifier}]"
        nodes.write_text("".join(f"{host}\n" for host in hosts))
        with self.log.open("wb") as output:
            self.shell = subprocess.Popen(
                ["/bin/bash", "-l", shutil.copy(SCRIPT, folder / "16.SC")],
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    "HOME": str(home),
                    "PATH": "/bin:/usr/bin",
                    "PBS_ENVIRONMENT": "PBS_BATCH",
                    "PBS_JOBID": identifier,
                    "PBS_JOBNAME": "mpilm",
                    "PBS_NODEFILE": str(nodes),
                    "PBS_O_QUEUE": "workq",
                    "PBS_O_WORKDIR": str(folder),
                    "NCPUS": "8",
                    "OMP_NUM_THREADS": "8",
                    "CONFIG": "train.toml",
                    "MPILM_ENV": str(project.environment),
                    **variables,
                },
            )

    def output(self) -> str:
        """Return what the job has printed so far."""
        return self.log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Return the ids of all processes of the session, as PBS finds them."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                after_name = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            state, session = after_name[0], int(after_name[3])
            if session == self.shell.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the session, as PBS does."""
        for process in self.processes():
            os.kill(process, number)

    def wait_for_training(self) -> None:
        """Return once the ranks have taken their first steps."""

        def started() -> bool:
            assert self.shell.poll() is None, self.output()
            return " perplexity " in self.output()

        wait_until(started, "progress", timeout_s=240)

    def wait(self) -> int:
        """Return the exit code of the job."""
        return self.shell.wait(timeout=120)


Submit = Callable[..., Job]


@pytest.fixture
def submit(project: Project) -> Iterator[Submit]:
    """Return a function that starts a job; what is left of it is killed at the end."""
    jobs: list[Job] = []

    def start(*hosts: str, **options: str) -> Job:
        jobs.append(Job(project, hosts=list(hosts), **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.signal(signal.SIGKILL)
        job.shell.wait()


def test_time_limit_next_job_resume(submit: Submit, project: Project) -> None:
    """Before its time limit a job stops, submits its like, and that one finishes."""
    first = submit(
        HOST,
        HOST,
        select="2:ncpus=1\n\t:mpiprocs=1",
        walltime="00:01:00",
        RUN="runs/x",
        WARN="30",
        SETTINGS="train.seed=2 optim.lr=0.1 strategy.name=%22bmuf%22",
        PERCENT="1",
    )
    assert first.wait() == 75, first.output()
    assert len(project.checkpoints()) == 1
    options = (project.folder / "qsub.options").read_text().splitlines()
    assert options == [
        *("-N", "mpilm"),
        *("-v", "CONFIG,RUN,SETTINGS,PERCENT,MPILM_ENV,LAUNCH,WALLTIME,WARN,RESUME"),
        *("-W", "depend=afterany:16.server"),
        *("-q", "workq"),
        *("-l", "select=2:ncpus=1:mpiprocs=1"),
        *("-l", "place=scatter"),
        *("-l", "walltime=00:01:00"),
        *("-o", "/data/runs/x/"),
        *("-A", "speech"),
        str(project.folder / "16.SC"),
    ]
    environment = (project.folder / "qsub.environment").read_text().splitlines()
    variables = dict(line.split("=", 1) for line in environment)
    assert variables["SETTINGS"].endswith("strategy.name=%22bmuf%22")
    assert variables["PERCENT"] == "1"
    assert 'name = "bmuf"' in (project.run / "config.toml").read_text()
    assert variables["WALLTIME"] == "00:01:00"

    done = samples_at_stop(first.output())
    assert json.loads((project.run / "job.json").read_text())["job"] == "17.server"
    project.shorten(done + MORE)
    (project.folder / "train.toml").write_text("is not read any more")
    second = submit(HOST, HOST, identifier="17.server", **variables)
    assert second.wait() == 0, second.output()
    summary = json.loads((project.run / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert done + MORE <= summary["samples"] < done + 2 * MORE


def test_qsig_stops_an_array_job(submit: Submit, project: Project) -> None:
    """qsig -s SIGUSR1 reaches every process; its job stops and submits the next."""
    job = submit(HOST, HOST, identifier="16[1].server")
    job.wait_for_training()
    job.signal(signal.SIGUSR1)
    assert job.wait() == 75, job.output()
    assert list((project.folder / "runs/mpilm-16-1/checkpoints").glob("step-*[0-9]"))
    options = (project.folder / "qsub.options").read_text()
    assert "-q\nworkq" in options
    assert "depend" not in options  # PBS knows no dependency on one job of an array


def test_deleted_job_is_not_submitted_again(submit: Submit, project: Project) -> None:
    """qdel ends the job for good and leaves no process behind."""
    job = submit(HOST, HOST, RUN=str(project.run))
    job.wait_for_training()
    job.signal(signal.SIGTERM)
    assert job.wait() != 0
    wait_until(lambda: not job.processes(), "the session to end", timeout_s=15)
    ranks = environments(str(project.run))
    wait_until(lambda: not environments(str(project.run)), f"end of {ranks}", 15)
    assert not (project.folder / "qsub.options").exists()


def test_across_hosts(submit: Submit, project: Project) -> None:
    """Without ssh, mpirun starts its daemons on the other hosts through PBS."""
    probe = ["unshare", "--uts", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("unshare --uts is not permitted here: no second host name")
    project.train(MORE)
    job = submit("hosta", "hosta", "hostb", select="2:ncpus=2:mpiprocs=2", RUN="runs/x")
    assert job.wait() == 0, job.output()
    called = (project.folder / "pbs_tmrsh.hosts").read_text().split()
    assert sorted(called) == ["hosta", "hostb"]
    assert "3 ranks on 2 hosts" in job.output()
    assert json.loads((project.run / "summary.json").read_text())["ranks"] == 3


@pytest.mark.parametrize(
    ("select", "threads"),
    [
        ("2:ncpus=8:mpiprocs=2", "4"),
        ("2:ncpus=3:mpiprocs=2:ngpus=2", "1"),
        ("1:mpiprocs=2:ncpus=2+1:ncpus=16", "1"),
        ("2:ncpus=4", "4"),
        ("2:ncpus=8:mpiprocs=2:ompthreads=2", "2"),
    ],
)
def test_threads(submit: Submit, project: Project, select: str, threads: str) -> None:
    """OMP_NUM_THREADS is a rank's share of its chunk's cores, or as asked."""
    launch = project.tool("launch", 'echo "threads $OMP_NUM_THREADS" "$@"')
    asked = {"OMP_NUM_THREADS": "2"} if "ompthreads=2" in select else {}
    job = submit(HOST, HOST, select=select, LAUNCH=str(launch), RUN="a[1]", **asked)
    assert job.wait() == 0, job.output()
    expected = (
        f"threads {threads} -n 2 {BIN}/mpilm train train.toml --out a[1] --resume"
    )
    assert expected in job.output()


def test_no_progress_is_not_submitted_again(submit: Submit, project: Project) -> None:
    """A job whose ranks stop early without a new checkpoint ends instead of looping."""
    job = submit(HOST, LAUNCH=str(project.tool("launch", "exit 75")))
    assert job.wait() == 75
    assert "without progress" in job.output()
    assert not (project.folder / "qsub.options").exists()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (137, "a rank died (exit code 137)"),  # of Open MPI
        (9, "a rank died (exit code 9)"),  # of MPICH
        (3, "a rank does not answer (exit code 3)"),
        (0, "a node was lost"),  # of Open MPI's mpirun: it ends all, and says 0
    ],
)
@pytest.mark.parametrize("progress", [True, False])
def test_a_rank_that_died_is_followed_by_the_next_job(
    submit: Submit, project: Project, code: int, progress: bool, why: str
) -> None:
    """It goes on from the newest checkpoint, if the job has written one."""
    newest = project.run / "checkpoints/step-000000010"
    script = f"mkdir -p {newest}; exit {code}" if progress else f"exit {code}"
    job = submit(HOST, RUN="runs/x", LAUNCH=str(project.tool("launch", script)))
    assert job.wait() == (75 if progress else code)
    assert (why in job.output()) == (progress or code != 0)
    assert (project.folder / "qsub.options").exists() == progress
    assert (newest.name in job.output()) == progress


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"CONFIG": ""}, 2, "CONFIG is not set"),
        ({"MPILM_ENV": "missing.sh"}, 2, "cannot source MPILM_ENV=missing.sh"),
        ({"walltime": "00:01:00"}, 2, "a time limit of 00:01:00 leaves nothing"),
        ({"SETTINGS": "train.samples=-1"}, 2, "train.samples"),
        ({"walltime": "", "LAUNCH": "true"}, 0, "qstat tells no time limit"),
    ],
)
def test_messages(
    submit: Submit, options: dict[str, str], code: int, message: str
) -> None:
    """What is wrong is named in one line."""
    job = submit(HOST, **options)
    assert job.wait() == code
    assert message in job.output()
