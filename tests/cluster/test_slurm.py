"""jobs/slurm/train.sbatch on a real SLURM with four nodes on this host."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cluster.project import (
    BIN,
    REPOSITORY,
    Project,
    environments,
    samples_at_stop,
    wait_until,
)
from tests.cluster.slurm import Cluster, unavailable

SCRIPT = str(REPOSITORY / "jobs" / "slurm" / "train.sbatch")
CORES = len(os.sched_getaffinity(0))
MORE = 3_000  # samples of the last leg
END = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Return a running cluster, or skip and say why there is none."""
    if reason := unavailable():
        pytest.skip(reason)
    with Cluster(cpus=max(2, CORES)) as running:
        yield running


def submit(cluster: Cluster, project: Project, *options: str, **variables: str) -> str:
    """Submit the script, on 2 nodes with 2 ranks each by default; return the id."""
    settings = {
        "CONFIG": "train.toml",
        "RUN": str(project.run),
        "MPILM_ENV": str(project.environment),
        **variables,
    }
    where = ("--nodes=2", "--ntasks=4", "--output=job.log")
    return cluster.submit(*where, *options, SCRIPT, folder=project.folder, **settings)


def log_of(project: Project) -> str:
    """Return what the job has printed so far."""
    log = project.folder / "job.log"
    return log.read_text() if log.exists() else ""


def ranks_of(project: Project) -> dict[int, dict[str, str]]:
    """Return process id -> environment of the ranks (not of mpirun and shells)."""
    found = environments(str(project.run))
    return {pid: env for pid, env in found.items() if "OMPI_COMM_WORLD_RANK" in env}


def wait_for_training(cluster: Cluster, project: Project, job: str) -> None:
    """Return once the ranks have taken their first steps."""

    def started() -> bool:
        assert cluster.job(job)["JobState"] not in END, log_of(project)
        return " perplexity " in log_of(project)

    wait_until(started, "progress", timeout_s=240)


def test_time_limit_requeue_resume(cluster: Cluster, project: Project) -> None:
    """A job on two nodes is cut by its time limit, requeues, goes on and finishes.

    One node is slow: the second start is without it.

    SLURM looks at its clock every 30 s, so the signal comes 30 to 60 s after the start.
    """
    limit = ("--time=2", "--signal=B:USR1@60")
    slow = {"SETTINGS": "faults.slow={2=20.0,3=20.0}", "EXCLUDE": "5"}
    job = submit(cluster, project, *limit, **slow)
    wait_for_training(cluster, project, job)
    nodes = Counter(env["SLURMD_NODENAME"] for env in ranks_of(project).values())
    assert nodes == {"n1": 2, "n2": 2}
    assert {env["OMP_NUM_THREADS"] for env in ranks_of(project).values()} == {"1"}

    requeued = cluster.wait_for(job, "PENDING", *END, timeout_s=120)
    assert requeued["JobState"] == "PENDING", log_of(project)
    assert requeued["Restarts"] == "1"
    assert "slow nodes: the next start is without n2" in log_of(project)
    wait_until(
        lambda: cluster.job(job)["ExcNodeList"] == "n2",
        "n2 to be excluded",
        timeout_s=9,
    )
    assert len(project.checkpoints()) == 1
    assert not (project.run / "summary.json").exists()
    done = samples_at_stop(log_of(project))

    project.shorten(done + MORE)
    (project.folder / "train.toml").write_text("is not read any more")
    # A requeued job waits for two minutes, so that its first start is surely over. Here
    # that is known sooner; but a node refuses a job that starts in the second in which
    # it ended the same job. And this leg is not to be cut again.
    wait_until(cluster.all_idle, "the end of the first start", timeout_s=60)
    time.sleep(3)
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=10")
    ended = cluster.wait_for(job, *END, timeout_s=200)
    log = log_of(project)
    assert ended["JobState"] == "COMPLETED", f"{ended}\n{log}\n{cluster.logs()}"
    assert log.count("train.sbatch: time is nearly up") == 1
    assert re.search(r"restart 1, 4 ranks on n\[[134][,-][34]\]", log)
    summary = json.loads((project.run / "summary.json").read_text())
    assert summary["ranks"] == 4
    assert done + MORE <= summary["samples"] < done + 2 * MORE


def test_cancelled_job_is_not_requeued(cluster: Cluster, project: Project) -> None:
    """scancel ends the job for good and leaves no process behind."""
    job = submit(cluster, project, "--nodes=1", "--ntasks=2")
    wait_for_training(cluster, project, job)
    cluster.run("scancel", job)
    assert cluster.wait_for(job, *END, timeout_s=30)["JobState"] == "CANCELLED"
    wait_until(lambda: not ranks_of(project), "the ranks to end", timeout_s=15)
    time.sleep(1)
    assert cluster.job(job)["Restarts"] == "0"
    assert "requeue" not in log_of(project)


def test_no_progress_is_not_requeued(cluster: Cluster, project: Project) -> None:
    """A job whose ranks stop early without a new checkpoint ends instead of looping."""
    launch = project.tool("launch", "exit 75")
    job = submit(cluster, project, LAUNCH=str(launch))
    ended = cluster.wait_for(job, *END, timeout_s=30)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")
    assert "without progress" in log_of(project)


def test_error_is_not_requeued(cluster: Cluster, project: Project) -> None:
    """An error of the program is the job's exit code."""
    job = submit(cluster, project, SETTINGS="train.samples=-1")
    ended = cluster.wait_for(job, *END, timeout_s=60)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), log_of(project)
    assert "train.samples" in log_of(project)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CONFIG": ""}, "CONFIG is not set"),
        ({"MPILM_ENV": "missing.sh"}, "cannot source MPILM_ENV=missing.sh"),
    ],
)
def test_bad_submission(
    cluster: Cluster, project: Project, variables: dict[str, str], message: str
) -> None:
    """What is missing is named in one line."""
    job = submit(cluster, project, **variables)
    ended = cluster.wait_for(job, *END, timeout_s=30)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert message in log_of(project)


def test_threads_and_binding(cluster: Cluster, project: Project) -> None:
    """cpus-per-task becomes OMP_NUM_THREADS; settings become --set."""
    launch = project.tool("launch", 'echo "threads $OMP_NUM_THREADS" "$@"')
    job = submit(
        cluster,
        project,
        "--ntasks=2",
        "--cpus-per-task=2",
        LAUNCH=f"{launch} --option",
        SETTINGS="train.seed=3 optim.lr=0.5",
    )
    ended = cluster.wait_for(job, *END, timeout_s=30)
    assert ended["JobState"] == "COMPLETED"
    log = log_of(project)
    assert f"threads 2 --option -n 2 {BIN}/mpilm train train.toml --out" in log
    assert "--resume --set=train.seed=3 --set=optim.lr=0.5" in log


@pytest.mark.skipif(CORES < 2, reason="needs a node with two cores")
@pytest.mark.parametrize("tasks", [CORES, 1])
def test_binding(cluster: Cluster, project: Project, tasks: int) -> None:
    """A job that owns all cores of a node binds, if each rank gets two or more."""
    project.tool("mpirun", 'echo "mpirun $@"')
    with project.environment.open("a") as hook:
        hook.write(f'PATH="{project.folder}/bin:$PATH"\n')
    job = submit(cluster, project, "--nodes=1", f"--ntasks={tasks}", "--exclusive")
    ended = cluster.wait_for(job, *END, timeout_s=60)
    assert ended["JobState"] == "COMPLETED", log_of(project)
    alone = tasks == 1
    assert ("--bind-to none" in log_of(project)) != alone
    bound = f"--map-by slot:PE={CORES}:HWTCPUS --bind-to hwthread"
    assert (bound in log_of(project)) == alone


def test_submitted_by_mpilm(cluster: Cluster, project: Project) -> None:
    """`mpilm submit` prints the job's number; the script gets what it was told."""
    launch = project.tool("launch", 'echo "launched:" "$@"')
    size = ("--nodes=2", "--ranks-per-node=2", "--time=0:10:00")
    more = ("--set=train.seed=3", "--env=environment.sh", "--option=--output=job.log")
    done = subprocess.run(
        [BIN / "mpilm", "submit", "train.toml", "--out=runs/y", *size, *more],
        cwd=project.folder,
        env={**cluster.environment, "LAUNCH": str(launch)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    ended = cluster.wait_for(job, *END, timeout_s=60)
    log = log_of(project)
    assert ended["JobState"] == "COMPLETED", log
    assert ended["JobName"] == "y"
    assert ended["TimeLimit"] == "00:10:00"
    assert "4 ranks on n[1-2]: train.toml -> runs/y" in log
    trained = f"-n 4 {BIN}/mpilm train train.toml --out runs/y --resume"
    assert f"launched: {trained} --set=train.seed=3" in log


def test_what_is_in_the_queue_is_not_submitted_again(
    cluster: Cluster, project: Project
) -> None:
    """A second job for a run folder is refused while the first one waits."""
    held = ("train.toml", "--out=runs/z", "--time=0:10:00", "--option=--hold")

    def submitted() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "mpilm", "submit", *held, "--env=environment.sh"],
            cwd=project.folder,
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    first = submitted()
    assert first.returncode == 0, first.stderr
    second = submitted()
    assert (second.returncode, second.stdout) == (2, "")
    assert f"job {first.stdout.strip()} in the queue is for it" in second.stderr
    cluster.run("scancel", first.stdout.strip())
    third = submitted()
    assert third.returncode == 0, third.stderr
    cluster.run("scancel", third.stdout.strip())


SWEEP = """
config = "train.toml"
run = "slurm"
ranks = [2]
set = ["train.samples=3000", "strategy.name=bmuf"]
options = ["--time", "0:10:00", "--ranks-per-node", "1", "--env", "environment.sh"]
[vary]
"optim.lr" = [1.0, 1e30]
"""


@pytest.mark.timeout(700)
def test_a_sweep_is_collected_by_its_last_job(
    cluster: Cluster, project: Project
) -> None:
    """Two jobs over two nodes each, one of which diverges; then the page."""
    (project.folder / "sweep.toml").write_text(SWEEP)

    def mpilm(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "mpilm", *words],
            cwd=project.folder,
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    began = mpilm("sweep", "sweep.toml", "--out", "swept")
    assert began.returncode == 0, began.stderr
    again = mpilm("sweep", "sweep.toml", "--out", "swept")  # nothing twice
    assert again.returncode == 0, again.stderr
    assert "waits for all others" not in again.stderr
    (number,) = re.findall(r"job (\d+) waits for all others", began.stderr)
    ended = cluster.wait_for(number, *END, timeout_s=500)
    said = (project.folder / "swept" / "collect.log").read_text()
    assert ended["JobState"] == "COMPLETED", said
    shown = mpilm("status", "swept").stdout
    assert "1 done, 1 failed" in shown, shown
    assert "1 done, 1 failed" in said
    assert shown.count("a smaller optim.lr") == 1, shown
    with open(project.folder / "swept" / "sweep.csv", newline="") as stream:
        rows = {row["point"]: row for row in csv.DictReader(stream)}
    assert rows["lr=1e+30-r2"]["state"] == "failed"
    assert float(rows["lr=1-r2"]["samples_per_s"]) > 0.0
    page = (project.folder / "swept" / "report.html").read_text()
    assert "lr=1-r2" in page


RANKS = """
from mpilm.world.mpi import MpiWorld, abort_on_error

with MpiWorld() as world, abort_on_error(world):
    print("ranks:" + ",".join(map(str, world.comm.allgather(world.rank))))
"""


@pytest.mark.parametrize(
    ("kind", "library", "nodes"),
    [("pmi2", "mpich", 2), ("pmix", "openmpi", 1), ("none", "openmpi", 2)],
)
def test_srun_starts_the_ranks_where_the_mpi_can(
    cluster: Cluster, project: Project, kind: str, library: str, nodes: int
) -> None:
    """Two ranks; where they do not find each other, a refusal.

    pmix: on one node, as "nodes" on one host have one folder for its server. pmi2: on
    two: on one MPICH 5.0.2 hung in MPI_Init, in the first job of a cluster only.
    """
    python = {
        "openmpi": BIN / "python",
        "mpich": REPOSITORY / ".venv-mpich/bin/python",
    }[library]
    if not python.exists():
        pytest.skip(f"no {python}: make venv-mpich")
    words = ["srun", f"--mpi={kind}", f"--nodes={nodes}", "--ntasks=2", "--time=5"]
    program = ["-c", RANKS]
    if kind == "none":
        program = ["-m", "mpilm", "train", "train.toml", "--out=runs/srun"]
    done = subprocess.run(
        [*words, str(python), *program],
        cwd=project.folder,
        env={**cluster.environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if "Invalid MPI type" in done.stderr:
        pytest.skip(f"SLURM has no --mpi={kind} here (apt-get install libpmix-dev)")
    if kind == "none":
        assert done.returncode == 2, done
        assert "srun --mpi=pmix (Open MPI)" in done.stderr
        assert not (project.folder / "runs").exists()
        return
    assert done.returncode == 0, done
    assert sorted(done.stdout.split()) == ["ranks:0,1"] * 2
