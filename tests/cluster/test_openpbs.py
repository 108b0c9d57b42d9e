"""`mpilm submit` and `sweep` on a real PBS.

CI has none, and there this is skipped. test_pbs.py plays what OpenPBS 23.06 was seen to
do.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from tests.cluster.project import BIN, Project, samples_at_stop, wait_until

MORE = 3_000  # samples of the last leg
SWEEP = """
config = "train.toml"
run = "pbs"
ranks = [2]
set = ["train.samples=2000"]
options = ["--time", "0:10:00", "--ranks-per-node", "2", "--env", "environment.sh"]
[vary]
"strategy.name" = ["allreduce", "dpsgd"]
"optim.lr" = [1.0, 1e30]
"""


def no_pbs() -> str:
    """Return why there is no PBS to submit to; "" if there is one."""
    if shutil.which("qsub") is None or shutil.which("qstat") is None:
        return "no PBS here: no qsub on PATH"
    asked = subprocess.run(
        ["qstat", "-B"], capture_output=True, text=True, timeout=60, check=False
    )
    lines = (asked.stderr or asked.stdout).strip().splitlines()
    return "" if asked.returncode == 0 else f"PBS does not answer: {lines[-1:]}"


@pytest.fixture(autouse=True)
def _pbs() -> None:
    if reason := no_pbs():
        pytest.skip(reason)


def mpilm(project: Project, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's folder."""
    return subprocess.run(
        [BIN / "mpilm", *words],
        cwd=project.folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.timeout(1200)
def test_a_job_is_cut_by_its_walltime_resubmitted_and_finishes(
    project: Project,
) -> None:
    words = ["submit", "train.toml", "--scheduler=pbs", f"--out={project.run}"]
    words += ["--ranks-per-node=2", "--time=0:02:00", "--warn=60"]
    words += ["--env=environment.sh"]
    done = mpilm(project, *words)
    assert done.returncode == 0, done.stderr
    first = done.stdout.strip()

    def logs() -> str:
        found = project.run.glob("*.OU")
        return "\n".join(log.read_text(errors="replace") for log in sorted(found))

    wait_until(lambda: "stopped early at" in logs(), "the walltime", 400)
    # the next job may have begun: then it is the one after that which reads this
    project.shorten(samples_at_stop(logs()) + MORE)
    wait_until((project.run / "summary.json").exists, "the end of the run", 500)
    found = json.loads((project.run / "summary.json").read_text())
    assert found["ranks"] == 2
    last = json.loads((project.run / "job.json").read_text())["job"]
    assert last != first, "it resubmitted itself"
    assert len(list(project.run.glob("*.OU"))) > 1, "each job's output lies there"
    assert not [*project.folder.glob("*.o[0-9]*")]


@pytest.mark.timeout(1200)
def test_a_sweep_is_collected_by_its_last_job(project: Project) -> None:
    """Names and settings with signs that PBS does not take; one strategy diverges."""
    (project.folder / "sweep.toml").write_text(SWEEP)
    began = mpilm(project, "sweep", "sweep.toml", "--out", "swept")
    assert began.returncode == 0, began.stderr
    (number,) = re.findall(r"job (\S+) waits for all others", began.stderr)
    is_over = lambda: number not in subprocess.getoutput("qstat")  # noqa: E731
    wait_until(is_over, "the last job", 900)
    said = (project.folder / "swept" / "collect.log").read_text()
    shown = mpilm(project, "status", "swept").stdout
    assert "2 done, 2 failed" in shown, shown
    assert "2 done, 2 failed" in said
    page = (project.folder / "swept" / "report.html").read_text()
    assert "dpsgd-lr=1-r2" in page


def test_what_a_queue_refuses_is_one_line(project: Project) -> None:
    words = ["submit", "train.toml", "--scheduler=pbs", "--time=0:10:00"]
    words += ["--env=environment.sh", "--out=runs/q"]
    for option in ("--queue=nosuch", "--option=-l nosuch=1"):
        done = mpilm(project, *words, option)
        assert done.returncode == 2
        assert done.stderr.startswith("mpilm: qsub: ")
        assert done.stderr.count("\n") == 1
