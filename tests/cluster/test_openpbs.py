"""`mpilm submit` on a real PBS: cut by its walltime, submitted again, finished.

CI has none, and there this is skipped. test_pbs.py plays what OpenPBS 23.06 was seen to
do.
"""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.cluster.project import BIN, Project, samples_at_stop, wait_until

MORE = 3_000  # samples of the last leg


def no_pbs() -> str:
    """Return why there is no PBS to submit to; "" if there is one."""
    if shutil.which("qsub") is None or shutil.which("qstat") is None:
        return "no PBS here: no qsub on PATH"
    asked = subprocess.run(
        ["qstat", "-B"], capture_output=True, text=True, timeout=60, check=False
    )
    lines = (asked.stderr or asked.stdout).strip().splitlines()
    return "" if asked.returncode == 0 else f"PBS does not answer: {lines[-1:]}"


@pytest.mark.timeout(1200)
def test_a_job_is_cut_by_its_walltime_resubmitted_and_finishes(
    project: Project,
) -> None:
    if reason := no_pbs():
        pytest.skip(reason)
    words = ["submit", "train.toml", "--scheduler=pbs", f"--out={project.run}"]
    words += ["--ranks-per-node=2", "--time=0:02:00", "--warn=60"]
    words += ["--env=environment.sh", f"--option=-o{project.folder}/"]
    done = subprocess.run(
        [BIN / "mpilm", *words],
        cwd=project.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first = done.stdout.strip()

    def logs() -> str:
        found = [*project.folder.glob("*.OU"), *project.folder.glob("*.o*")]
        return "\n".join(log.read_text(errors="replace") for log in sorted(found))

    wait_until(lambda: "stopped early at" in logs(), "the walltime", 400)
    # the next job may have begun: then it is the one after that which reads this
    project.shorten(samples_at_stop(logs()) + MORE)
    wait_until((project.run / "summary.json").exists, "the end of the run", 500)
    found = json.loads((project.run / "summary.json").read_text())
    assert found["ranks"] == 2
    last = json.loads((project.run / "job.json").read_text())["job"]
    assert last != first, "it resubmitted itself"
