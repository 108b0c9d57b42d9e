"""`mpilm doctor`: what it says of facts, and that it never hangs or crashes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mpilm.commands.doctor import Report
from mpilm.doctor import children, facts
from mpilm.doctor.container import check_container
from mpilm.doctor.facts import Facts
from mpilm.doctor.findings import Finding, ok
from mpilm.doctor.folder import check_folder, existing
from mpilm.doctor.scheduler import check_scheduler

GOOD = dict.fromkeys((*facts.NEEDED, "mpilm"), "1.0")


def ranks(*each, **common):
    """Return facts of ranks in order; each is a dictionary of what is special."""
    settings = {"python": "3.12", "packages": GOOD, "threads": "1", **common}
    return [Facts(**{"rank": rank, **settings, **own}) for rank, own in enumerate(each)]


def test_cores_of_their_own_shared_or_free():
    own = ranks({"cores": (0, 1)}, {"cores": (2, 3)}, host_cores=4)
    free = ranks({"cores": (0, 1, 2, 3)}, {"cores": (0, 1, 2, 3)}, host_cores=4)
    clash = ranks({"cores": (0, 1)}, {"cores": (1, 2)}, host_cores=4)
    apart = ranks({"cores": (0,), "host": "a"}, {"cores": (0,), "host": "b"})
    crowded = ranks({"cores": (0,)}, {"cores": (0,)}, host_cores=4)
    assert facts.check_binding(own).status == "ok"
    assert "each rank its own" in facts.check_binding(own).text
    assert "not bound" in facts.check_binding(free).text
    assert facts.check_binding(apart).status == "ok"
    assert facts.check_binding(crowded).status == "warning"
    found = facts.check_binding(clash)
    assert found.status == "problem"
    assert "ranks 0 and 1 are bound to the same core 1" in found.text


def test_threads_must_fit_on_the_cores():
    cores = (0, 1, 2, 3)
    status = lambda *own: facts.check_threads(ranks(*own, cores=cores)).status  # noqa: E731
    assert status({"threads": "2"}, {"threads": "2"}) == "ok"
    assert status({"threads": "4"}, {"threads": "4"}) == "warning"
    assert status({"threads": "1"}, {"threads": None}) == "warning"
    assert status({"threads": "many"}) == "problem"
    many = facts.check_threads(ranks({"threads": "4"}, {"threads": "4"}, cores=cores))
    assert many.remedy == "export OMP_NUM_THREADS=2"


def test_every_rank_needs_a_gpu():
    two, none = {"gpus": ("H200", "H200")}, {"gpus": ()}
    assert facts.check_gpus(ranks(none, none)).status == "ok"
    assert facts.check_gpus(ranks(two, two)).status == "ok"
    assert facts.check_gpus(ranks(two, two, two)).status == "warning"
    assert facts.check_gpus(ranks(two, none)).status == "problem"
    masked = [{"gpus": ("H200",), "gpu_ids": number} for number in "01"]
    assert facts.check_gpus(ranks(*masked)).status == "ok"


def test_nodes_must_be_alike():
    assert facts.check_nodes(ranks({"host": "a"}, {"host": "b"})).status == "ok"
    uneven = facts.check_nodes(ranks({"host": "a"}, {"host": "a"}, {"host": "b"}))
    assert (uneven.status, uneven.text) == (
        "warning",
        "not the same everywhere: 2 on a, 1 on b",
    )
    assert facts.check_python(ranks({}, {})).status == "ok"
    assert facts.check_python(ranks({}, {"python": "3.10"})).status == "problem"
    assert facts.check_packages(ranks({}, {})).status == "ok"
    other = facts.check_packages(ranks({}, {"packages": {**GOOD, "torch": "2.0"}}))
    assert (other.status, "torch 1.0" in other.text) == ("problem", True)
    without = {name: v for name, v in GOOD.items() if name != "h5py"}
    assert "lacks h5py" in facts.check_packages(ranks({"packages": without})).text
    assert facts.check_clock(ranks({}, {"time_s": 0.1})).status == "ok"
    assert facts.check_clock(ranks({}, {"time_s": 9.0})).status == "warning"


def test_a_world_of_one_where_more_were_started():
    assert facts.check_world(4, {}).status == "ok"
    assert facts.check_world(1, {}).status == "ok"
    assert facts.check_world(1, {"SLURM_NTASKS": "4"}).status == "warning"
    alone = facts.check_world(1, {"SLURM_STEP_NUM_TASKS": "4"})
    assert alone.status == "problem"
    assert "mpirun" in alone.remedy


def test_facts_of_this_process():
    mine = facts.collect(0, [])
    everyone = [mine, replace(mine, rank=1)]
    assert mine.packages["torch"]
    for check in (facts.check_python, facts.check_packages, facts.check_nodes):
        assert check(everyone).status == "ok"


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    found = check_folder(tmp_path / "runs" / "x")
    assert [finding.status for finding in found] in (["ok", "ok"], ["warning", "ok"])
    assert list(tmp_path.iterdir()) == []
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert check_folder(existing(tmp_path / "x"))[0].text.startswith(str(tmp_path))
    (nowhere,) = check_folder(existing(Path("/proc/self/fd")))
    assert nowhere.status == "problem"


@pytest.mark.long
def test_a_child_that_crashes_or_hangs_is_an_answer():
    assert children.python("print('x')") == (0, "x")
    assert children.python("import os; os.abort()")[0] == -6
    assert children.python("import time; time.sleep(60)", limit_s=0.2)[0] == 124
    assert children.child(["/no/such/program"])[0] == 127
    # what it has started holds its output open
    assert children.child(["sh", "-c", "sleep 60 & sleep 60"], limit_s=0.2)[0] == 124


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        ("echo size 2; echo size 2", "ok", "starts 2 ranks"),
        ("echo size 1; echo size 1", "problem", "belongs to another MPI"),
        ("echo 'no slots: error'; exit 3", "problem", "exit code 3: no slots"),
    ],
)
def test_the_mpirun_on_path_is_tried(tmp_path, monkeypatch, script, status, said):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\n{script}\n")
    mpirun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in children.AS_ROOT:
        monkeypatch.setenv(name, "1")
    found = children.check_launcher()
    assert found.status == status
    assert said in found.text


def test_a_child_is_no_rank(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("PMIX_RANK", "1")
    monkeypatch.setenv("OMPI_MCA_btl", "self,sm")
    environment = children.clean_environment()
    assert "OMPI_COMM_WORLD_RANK" not in environment
    assert "PMIX_RANK" not in environment
    assert environment["OMPI_MCA_btl"] == "self,sm"


@pytest.mark.long
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('a\\nb')", "ValueError: a b"),
        ("time.sleep(60)", "no end after 0.3 s"),
    ],
)
def test_an_exception_and_a_hang_are_problems(body, said):
    code = (
        "import sys, time\nfrom mpilm.commands.doctor import Report\n"
        f"def look():\n    {body}\n"
        "report = Report(limit_s=0.3)\nreport.check('x', look)\n"
        "sys.exit(report.end())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert done.stdout.startswith("problem  x ")
    assert said in done.stdout
    assert "Traceback" not in done.stderr


def test_findings_as_json(capsys):
    report = Report(limit_s=5.0, as_json=True)
    report.check("one", lambda: ok("one", "fine"))
    report.check("two", lambda: Finding("two", "problem", "broken", "mend it"))
    assert capsys.readouterr().out == ""
    assert report.end() == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["warning"], found["problem"]) == (1, 0, 1)
    assert found["findings"][1] == {
        "name": "two",
        "status": "problem",
        "text": "broken",
        "remedy": "mend it",
    }


def test_the_scheduler_is_named():
    which = {"sbatch": "/bin/sbatch", "qsub": "/bin/qsub"}.get
    text = check_scheduler({"PBS_JOBID": "5.host"}, which).text
    assert text.startswith("SLURM (/bin/sbatch) and PBS (/bin/qsub); inside its job 5")
    assert text.endswith("submit wants --scheduler")
    assert check_scheduler({"SLURM_JOB_ID": "7"}, {}.get).text == (
        "none (neither sbatch nor qsub); inside a SLURM job 7"
    )


IMAGE = {"SINGULARITY_CONTAINER": "x.sif", "OMPI_COMM_WORLD_RANK": "0"}
OPEN = "Open MPI v5.0.11, package: Open MPI"


@pytest.mark.parametrize(
    ("library", "environment", "status"),
    [
        (OPEN, {"OMPI_VERSION": "5.0.3"}, "ok"),  # no container
        (OPEN, {**IMAGE, "OMPI_VERSION": "5.0.3"}, "ok"),
        (OPEN, {**IMAGE, "OMPI_VERSION": "4.1.4"}, "warning"),
        ("MPICH Version:      5.0.2", IMAGE, "problem"),
        (
            "Intel(R) MPI Library 2021.19",
            {"container": "podman", "PMI_RANK": "1"},
            "ok",
        ),
        (OPEN, {"container": "podman", "PMI_RANK": "1"}, "problem"),
        (OPEN, {"container": "podman"}, "ok"),  # mpirun is inside, or there is none
        ("", IMAGE, "ok"),
    ],
)
def test_mpi_in_a_container_must_be_that_of_its_launcher(library, environment, status):
    found = check_container(library, environment, exists=lambda path: False)
    assert found.status == status
    assert bool(found.remedy) == (status != "ok")
