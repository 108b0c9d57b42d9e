"""`mpilm submit`: the command lines it would run, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpilm.cli import main
from mpilm.commands import submit
from mpilm.commands.queued import Submitted
from mpilm.data.synthetic import prepare_synthetic
from mpilm.storage.owner import Owner, Record

PROGRAM = [sys.executable, "-m", "mpilm", "submit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("submit")
    prepare_synthetic(path / "corpus.h5", vocab=20, tokens=20_000, seed=1)
    text = '[data]\ncorpus = "corpus.h5"\n[train]\nbatch = 4\nunroll = 10\n'
    (path / "train.toml").write_text(text)
    (path / "env.sh").write_text("true\n")
    return path


def run(folder, *arguments, path=None):
    environment = {**os.environ, "PATH": path} if path else None
    done = subprocess.run(
        [*PROGRAM, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env=environment,
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.long
def test_dry_run_of_a_sweep_prints_every_command(folder):
    done = run(
        folder,
        *("train.toml", "--scheduler", "slurm", "--time", "8:00:00", "--dry-run"),
        *("--ranks", "2,8", "--ranks-per-node", "4", "--gpus-per-node", "4"),
        *("--set", "strategy.name=bmuf", "--set", "optim.lr=0.1", "--chain"),
        *("--env", "env.sh", "--queue", "gpu", "--out", "runs/x", "--after", "7"),
        "--option=--exclusive",
    )
    assert done.returncode == 0, done.stderr
    head = "CONFIG=train.toml RUN=runs/x-r{} "
    head += "SETTINGS='strategy.name=bmuf optim.lr=0.1' MPILM_ENV=env.sh "
    head += "sbatch --parsable --job-name=x-r{} "
    tail = f"--exclusive {submit.SCRIPTS['slurm']}"
    assert done.stdout.splitlines() == [
        head.format(2, 2) + "--nodes=1 --ntasks-per-node=2 --cpus-per-task=1"
        " --gpus-per-node=2 --time=8:00:00 --signal=B:USR1@120 --export=ALL"
        " --output=runs/x-r2/job-%j.log"
        " --partition=gpu"
        f" --dependency=afterany:7 {tail}",
        head.format(8, 8) + "--nodes=2 --ntasks-per-node=4 --cpus-per-task=1"
        " --gpus-per-node=4 --time=8:00:00 --signal=B:USR1@120 --export=ALL"
        " --output=runs/x-r8/job-%j.log"
        " --partition=gpu"
        f" --dependency=afterany:JOB_OF_2_RANKS {tail}",
    ]


def test_pbs_gets_chunks_and_names_of_variables(folder):
    variables = submit.script_variables(
        Path("a.toml"), Path("runs/2x"), ("a.b=[1,2]",), folder / "env.sh"
    )
    job = submit.build(
        "pbs",
        submit.Size(2, 4, 4),
        variables=variables,
        time="8:00:00",
        warn=90,
        cpus_per_rank=3,
        account="speech",
    )
    assert job.command == [
        *("qsub", "-N", "r2x"),
        *("-l", "select=2:ncpus=12:mpiprocs=4:ngpus=4", "-l", "place=scatter"),
        *("-l", "walltime=8:00:00", "-o", "runs/2x/", "-A", "speech"),
        *(
            "-v",
            "CONFIG,RUN,SETTINGS,MPILM_ENV,WALLTIME,WARN",
            str(submit.SCRIPTS["pbs"]),
        ),
    ]
    assert job.variables["SETTINGS"] == "a.b=[1,2]"
    assert (job.variables["WALLTIME"], job.variables["WARN"]) == ("8:00:00", "90")
    assert "PERCENT" not in job.variables


def test_pbs_gets_no_quotes(folder):
    settings = 'a.b="x y"', "a.c='z'", "a.d=1%"
    variables = {"RUN": "x", "SETTINGS": " ".join(settings)}
    job = submit.build(
        "pbs", submit.Size(1, 1, 0), variables=variables, time="8:00:00", warn=90
    )
    assert job.variables["SETTINGS"] == "a.b=%22x y%22 a.c=%27z%27 a.d=1%25"
    assert "PERCENT" in job.command[job.command.index("-v") + 1].split(",")
    lines = submit.SCRIPTS["pbs"].read_text().splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("plain=")]
    script = "\n".join([*lines[at : at + 2], 'printf %s "$plain"'])
    environment = {**os.environ, **job.variables}
    done = subprocess.run(
        ["bash", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == " ".join(settings)


def test_the_scripts_are_part_of_the_package():
    for script in submit.SCRIPTS.values():
        assert script.read_text().startswith("#!/bin/bash\n")
        assert Path(submit.__file__).parents[1] in script.parents


@pytest.mark.long
def test_the_number_of_the_job_is_printed_and_the_script_gets_its_variables(folder):
    stand_in = folder / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nenv >"$(dirname "$0")/env"\necho "42;cluster"\n')
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:/usr/bin:/bin"
    options = ("--scheduler", "slurm", "--time", "1:00:00", "--set", "train.seed=3")
    done = run(folder, "train.toml", *options, path=path)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    seen = (stand_in.parent / "env").read_text().splitlines()
    assert {"CONFIG=train.toml", "RUN=runs/train", "SETTINGS=train.seed=3"} <= {*seen}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "optim.lrr=1"], "did you mean 'lr'?"),
        (["--set", "data.corpus=no.h5"], "no.h5: no such file"),
        (["--set", "faults.slow={3=2.0}"], "faults.slow.3"),
        (["--ranks", "2,9", "--ranks-per-node", "4"], "no multiple of"),
        (["--ranks", "2,x"], "write numbers"),
        (["--nodes", "600"], "600 ranks"),
        (["--nodes", "0"], "--nodes 0: must be 1 or more"),
        (["--time", "480"], "--time 480: write hours:minutes:seconds"),
        (
            ["--time", "0:01:30"],
            "--time 0:01:30: the ranks stop --warn 120 s before it",
        ),
        (["--warn", "0"], "--warn 0: must be 1 or more"),
        (["--set", "optim.lr= 0.1"], "cannot pass blanks"),
        (["--env", "no.sh"], "--env no.sh: no such file"),
    ],
)
def test_what_cannot_work_is_one_line_and_nothing_is_submitted(
    folder, capsys, options, message
):
    from mpilm.cli import main

    before = os.getcwd()
    os.chdir(folder)
    try:
        arguments = ["submit", "train.toml", "--scheduler", "slurm", "--dry-run"]
        code = main([*arguments, "--time", "1:00:00", *options])
    finally:
        os.chdir(before)
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.long
def test_a_scheduler_that_is_not_here(folder):
    done = run(folder, "train.toml", "--time", "1:00:00", path="/nowhere")
    assert done.returncode == 2
    assert "neither sbatch nor qsub is on PATH" in done.stderr
    refusing = folder / "refusing" / "qsub"
    refusing.parent.mkdir()
    said = "qsub: Unknown queue\\nusage: qsub [-a date]\\n[-A account]"
    refusing.write_text(f"#!/bin/sh\nprintf '{said}' >&2\nexit 170\n")
    refusing.chmod(0o755)
    path = f"{refusing.parent}:/usr/bin:/bin"
    options = ("--scheduler", "pbs", "--time", "1:00:00")
    done = run(folder, "train.toml", *options, path=path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mpilm: qsub: Unknown queue\n"


@pytest.mark.parametrize(
    "case",
    [
        ("slurm", "Resources", "Resources"),
        ("slurm", "None", ""),
        (
            "pbs",
            "Job Id: 7.host\n    job_state = Q\n"
            "    comment = Can Never Run: Insufficient amount of resource: ncpus\n",
            "Can Never Run: Insufficient amount of resource: ncpus",
        ),
        ("pbs", "Job Id: 7.host\n    job_state = Q\n", ""),
    ],
)
def test_the_scheduler_says_why_a_job_waits(tmp_path, monkeypatch, capsys, case):
    scheduler, answer, why = case
    stand_in = tmp_path / {"slurm": "squeue", "pbs": "qstat"}[scheduler]
    stand_in.write_text(f'#!/bin/sh\ncat <<"END"\n{answer}\nEND\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    job = Submitted(scheduler, "7")
    assert job.waits_for() == why
    job.write(tmp_path)  # of a run that has not begun
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.strip()
    assert shown == f"job 7 is in the queue{': ' if why else ''}{why}"
    stand_in.write_text("#!/bin/sh\nexit 1\n")
    assert main(["status", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith("job 7 has ended: ")


@pytest.fixture
def cluster(folder, tmp_path):
    """Return a PATH with a scheduler whose jobs stay in the queue until told."""
    queue = tmp_path / "queue"
    queue.mkdir()
    number = 'number=$(($(ls "$Q" | wc -l) + 41))'
    sbatch = f'{number}; touch "$Q/$number"; echo $number'
    squeue = 'for job; do :; done; [ -e "$Q/$job" ] && echo PENDING'
    for name, script in {"sbatch": sbatch, "squeue": squeue}.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\nQ="{queue}"\n{script}\n')
        path.chmod(0o755)
    return queue, f"{tmp_path}:/usr/bin:/bin"


@pytest.mark.long
def test_a_sweep_that_is_in_the_queue_is_not_submitted_again(folder, cluster, tmp_path):
    queue, path = cluster
    out = ("--out", str(tmp_path / "x"))
    sweep = ("train.toml", "--scheduler", "slurm", "--time", "1:00:00", *out)
    sweep += ("--ranks-per-node", "4", "--ranks")
    assert run(folder, *sweep, "1,2,2", path=path).stdout == "41\n42\n"
    for ranks in ("1,2", "4,2"):
        again = run(folder, *sweep, ranks, path=path)
        assert (again.returncode, again.stdout) == (2, ""), again
        assert "job 42 in the queue is for it" in again.stderr or ranks == "1,2"
        assert again.stderr.count("\n") == 1
        assert "--after 4" in again.stderr
    (queue / "42").unlink()  # it has ended
    again = run(folder, *sweep, "2", path=path)
    assert (again.returncode, again.stdout) == (0, "42\n"), again.stderr
    after = run(folder, *sweep, "2", "--after", "42", path=path)
    assert (after.returncode, after.stdout) == (0, "43\n"), after.stderr


@pytest.mark.long
def test_a_folder_with_a_run_at_work_is_not_submitted(folder, cluster, tmp_path):
    queue, path = cluster
    command = ("train.toml", "--scheduler", "slurm", "--time", "1:00:00")
    out = tmp_path / "y"
    out.mkdir()
    owner = Owner(out).take()
    refused = run(folder, *command, "--out", str(out), path=path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"y: is in use by pid {os.getpid()} on" in refused.stderr
    owner.release()
    # the owner's job is what counts for a run that belongs to one
    record = dataclasses.replace(Record.here(), boot="far", job="SLURM job 50")
    (out / "owner.json").write_bytes(record.to_bytes())
    (queue / "50").touch()
    refused = run(folder, *command, "--out", str(out), path=path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "job 50 in the queue is for it" in refused.stderr
    (queue / "50").unlink()
    assert run(folder, *command, "--out", str(out), path=path).returncode == 0
