"""`mpilm sweep` and `mpilm status`: many runs from one file."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpilm.cli import main
from mpilm.commands import collect
from mpilm.commands.collect import collector
from mpilm.commands.points import Spec
from mpilm.commands.queued import Submitted
from mpilm.commands.swept import State, Sweep
from mpilm.data.synthetic import prepare_synthetic

SIMULATED = """
config = "train.toml"
run = "protocol"
ranks = [2, 4]
machines = ["cloud_25g"]
set = ["machine.step_s=0.01"]
options = ["--steps", "5"]
[vary]
"strategy.name" = ["allreduce", "gossip_bmuf"]
"faults.slow" = [{}, {3 = 10.0}]
"""
PROGRAM = [sys.executable, "-m", "mpilm"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    prepare_synthetic(tmp_path / "corpus.h5", vocab=20, tokens=20_000, seed=1)
    (tmp_path / "train.toml").write_text(
        '[data]\ncorpus = "corpus.h5"\n[model]\nembed = 8\nhidden = 8\n'
        "[train]\nbatch = 4\nunroll = 10\nsamples = 800\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, text):
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def test_points_are_all_combinations_ranks_fastest(folder):
    points = Spec.read(write(folder, SIMULATED)).points()
    assert [point.name for point in points] == [
        f"{name}-slow={slow}-cloud_25g-r{ranks}"
        for name in ("allreduce", "gossip_bmuf")
        for slow in ("no", "3x10")
        for ranks in (2, 4)
    ]
    assert points[2].settings == (
        "machine.step_s=0.01",
        'strategy.name="allreduce"',
        'faults.slow={"3"=10}',
    )


def test_a_strategy_with_its_settings_is_one_value(folder):
    text = 'config = "train.toml"\nrun = "local"\nranks = [2]\n'
    text += '[vary]\nstrategy = [{name = "bmuf", period = 5}, {name = "allreduce"}]\n'
    first, second = Spec.read(write(folder, text)).points()
    assert (first.name, second.name) == ("bmuf,period=5-r2", "allreduce-r2")
    assert first.settings == ('strategy.name="bmuf"', "strategy.period=5")


@pytest.mark.long
def test_a_bad_point_says_its_line_and_the_rest_goes_on(folder, capsys):
    spec, out = write(folder, SIMULATED), folder / "out"
    assert main(["sweep", str(spec), "--out", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    why = "faults.slow.3: there are only 2 ranks (from 0)"
    assert [line.split()[1] for line in lines[1:-1]] == [
        "done",
        "done",
        "failed",
        "done",
    ] * 2
    assert lines[3].endswith(why)
    assert lines[-1] == "6 done, 2 failed"
    # what is done stays; what failed is tried again, with what is asked for now
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/simulate.json")}
    assert len(times) == 6
    spec.write_text(SIMULATED.replace("3 = 10.0", "1 = 10.0"))
    assert main(["sweep", str(spec), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "8 done"
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    # the table as a file
    assert main(["status", str(out), "--csv", str(folder / "t.csv")]) == 0
    with open(folder / "t.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    first = json.loads((out / rows[0]["point"] / "simulate.json").read_text())
    speed = first["outcomes"][0]["samples_per_s"]
    assert float(rows[0]["samples_per_s"]) == pytest.approx(speed)
    # and drawn
    assert main(["report", str(out), "--out", str(folder / "page.html")]) == 0


@pytest.mark.long
def test_a_sweep_that_is_ended_goes_on_where_it_was(folder, capsys):
    text = 'config = "train.toml"\nrun = "simulate"\nranks = [2]\n'
    text += '[vary]\n"train.samples" = [800, 40_000_000, 1600]\n'
    out = folder / "out"
    words = [*PROGRAM, "sweep", str(write(folder, text)), "--out", str(out)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        assert "samples=800-r2: done" in child.stderr.readline()
        deadline_s = time.monotonic() + 60
        while not (out / "samples=40000000-r2/ranks-0002/log").exists():
            time.sleep(0.1)
            assert child.poll() is None
            assert time.monotonic() < deadline_s
        refused = subprocess.run(words, check=False, capture_output=True, text=True)
        assert refused.returncode == 2
        assert "is in use by" in refused.stderr
        assert main(["status", str(out)]) == 0
        states = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        assert states[1:4] == ["done", "runs", "waiting"]
        child.send_signal(signal.SIGTERM)
        assert "stopped; the same command goes on" in child.stderr.read()
    assert child.returncode == 143
    assert main(["status", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "1 done, 1 waiting, 1 stopped"
    write(folder, text.replace("40_000_000, ", ""))
    assert main(["sweep", str(folder / "sweep.toml"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 done"


def test_submitted_points_are_words_for_submit(folder, capsys):
    text = 'config = "train.toml"\nrun = "slurm"\nranks = [2, 8]\n'
    text += 'options = ["--time", "1:00:00", "--ranks-per-node", "4"]\n'
    text += '[vary]\n"strategy.name" = ["bmuf"]\n'
    spec = write(folder, text)
    assert main(["sweep", str(spec), "--out", "out", "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    config = folder / "train.toml"
    words = f"submit {config} --scheduler slurm --time 1:00:00 --ranks-per-node 4"
    words += " --ranks 8"
    assert f"{words} --set 'strategy.name=\"bmuf\"' --out out/bmuf" in printed[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ranks = [2, 4]", "ranks = []"), "ranks"),
        (("ranks = [2, 4]", "ranks = [0]"), "ranks"),
        (("ranks = [2, 4]", ""), "ranks"),
        (("ranks = [2, 4]", "rank = [2]"), "rank"),
        (('"protocol"', '"cluster"'), "run"),
        (('"protocol"', '"local"'), 'machines: run = "local" has its own'),
        (('"faults.slow"', '"fault.slow"'), "did you mean 'faults'?"),
        (('"strategy.name"', '"strategy"'), "vary.strategy: write strategy.KEY"),
        (('["allreduce", "gossip_bmuf"]', "[]"), "vary"),
        (('"gossip_bmuf"', '"allreduce"'), "two points of the sweep are allreduce"),
        (("[vary]", "[vary"), "not TOML"),
        (('"train.toml"', '"none.toml"'), "none.toml: cannot read"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, change, message):
    spec = write(folder, SIMULATED.replace(*change))
    assert main(["sweep", str(spec), "--out", str(folder / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.long
def test_what_was_done_is_not_mixed_with_other_settings(folder, capsys):
    text = SIMULATED.replace("[2, 4]", "[4]").replace(', "gossip_bmuf"', "")
    spec, out = write(folder, text), folder / "out"
    assert main(["sweep", str(spec), "--out", str(out)]) == 0
    before = (out / "sweep.json").read_bytes()
    for path, old, new in (
        (spec, "step_s=0.01", "step_s=0.02"),
        (folder / "train.toml", "samples = 800", "samples = 900"),
    ):
        kept = path.read_text()
        path.write_text(kept.replace(old, new))
        capsys.readouterr()
        assert main(["sweep", str(spec), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert "was run with other settings" in said
        assert said.count("\n") == 1
        assert (out / "sweep.json").read_bytes() == before
        path.write_text(kept)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"spec": 3}'])
def test_status_of_what_is_no_sweep_is_one_line(folder, capsys, content):
    if content is not None:
        (folder / "sweep.json").write_bytes(content)
    assert main(["status", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mpilm: {folder / 'sweep.json'}: ")
    assert said.count("\n") == 1


def test_a_prediction_of_other_points_is_refused_of_another_file_named(folder, capsys):
    def begun(name, text, digest="a"):
        spec = Spec.read(write(folder, text))
        points = spec.points()
        states = {point.name: State("done") for point in points}
        (folder / name).mkdir()
        Sweep(folder / name, spec, points, states, digest).write()
        return str(folder / name)

    both = 'config = "train.toml"\nrun = "RUN"\nranks = [2]\n'
    real = begun("real", both.replace("RUN", "local"))
    same = begun("same", both.replace("RUN", "protocol"))
    edited = begun("edited", both.replace("RUN", "protocol"), "b")
    other = both.replace("RUN", "protocol").replace("[2]", "[4]")
    other = begun("other", other)
    for predicted, code, said in (
        (same, 0, ""),
        (edited, 0, "note: "),
        (other, 2, f"--predicted {other}: no point is called as one of {real}"),
        (real, 2, "was not simulated"),
    ):
        assert main(["status", real, "--predicted", predicted]) == code
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == bool(said)


def test_an_mpirun_point_is_one_command(folder, capsys):
    text = 'config = "train.toml"\nrun = "local"\nranks = [2]\n'
    text += 'options = ["--oversubscribe"]\nset = ["train.threads=1"]\n'
    assert main(["sweep", str(write(folder, text)), "--out", "o", "--dry-run"]) == 0
    (printed,) = capsys.readouterr().out.splitlines()
    program, _, words = printed.partition(" ")
    assert os.path.basename(program) == "mpirun"
    assert words == (
        f"--oversubscribe -n 2 {sys.executable} -m mpilm train {folder / 'train.toml'}"
        " --resume"
        " --set train.threads=1 --out o/train-r2"
    )


def test_the_collector_waits_for_all_and_takes_queue_and_account(folder):
    text = 'config = "train.toml"\nrun = "RUN"\nranks = [2]\n'
    text += 'options = ["--time", "1:00:00", "--queue=long", "--account", "me"]\n'
    jobs = ["17", "18"]
    spec = Spec.read(write(folder, text.replace("RUN", "slurm")))
    *command, script = collector(spec, Path("runs/my sweep"), jobs).command
    assert {"--dependency=afterany:17:18", "--partition=long"} < set(command)
    assert "--account=me" in command
    status, report, further = script.removeprefix("--wrap=").split("; ")
    mpilm = f"{sys.executable} -m mpilm"
    assert status == f"{mpilm} status 'runs/my sweep' --csv 'runs/my sweep'/sweep.csv"
    assert report.endswith("report 'runs/my sweep' --out 'runs/my sweep'/report.html")
    assert further == f"{sys.executable} -m mpilm.commands.collect 'runs/my sweep'"
    spec = Spec.read(write(folder, text.replace("RUN", "pbs")))
    command = collector(spec, Path("runs/s"), jobs).command
    assert command[command.index("-W") + 1] == "depend=afterany:17:18"
    assert command[command.index("-q") + 1] == "long"
    assert command[-4:-1] == ["--", "/bin/sh", "-c"]


@pytest.mark.parametrize("queued", [("17", "19"), ("19",), ()])
def test_the_collector_is_followed_by_one_that_waits_for_jobs_that_go_on(
    folder, monkeypatch, capsys, queued
):
    """A run that was cut has submitted job 19; job 17 runs for another, or has ended.

    qstat and qsub are stand-ins.
    """
    text = 'config = "train.toml"\nrun = "pbs"\nranks = [2, 4, 6]\n'
    text += 'options = ["--time", "1:00:00", "--queue=long"]\n'
    spec, out = Spec.read(write(folder, text)), folder / "swept"
    points, jobs = spec.points(), ("17", "18", "19")
    for point, job in zip(points, jobs, strict=True):
        (out / point.name).mkdir(parents=True)
        Submitted("pbs", job).write(out / point.name)
    Submitted("pbs", "20").write(out)  # the collector that runs
    states = {point.name: State("queued") for point in points}
    Sweep(out, spec, points, states, "a").write()
    known = "|".join(queued) or "none"
    for name, does in (
        ("qstat", f'case "$1" in -f) ;; {known}) echo "$1" ;; *) exit 1 ;; esac'),
        ("qsub", f'echo "$@" >> "{folder}/asked"; echo 21'),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    assert collect.follow_up([str(out)]) == 0
    said = capsys.readouterr().err
    if not queued:
        assert not said
        assert not (folder / "asked").exists()
        return
    assert "job 21 waits for them" in said
    (asked,) = (folder / "asked").read_text().splitlines()
    assert f"-W depend=afterany:{':'.join(queued)} " in asked
    assert "-q long" in asked
    assert Submitted.read(out).job == "21"


def test_a_collector_that_cannot_go_on_says_so_in_one_line(folder, capsys):
    assert collect.follow_up([str(folder / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "once more" in said


TUNED = """
config = "train.toml"
run = "simulate"
ranks = [2]
set = ["train.samples=800", "machine.step_s=0.01"]
[vary]
"strategy.name" = ["allreduce", "bmuf"]
[tune]
trials = 1
[tune.range]
"optim.lr" = {low = 0.01, high = 1.0, log = true}
"""


@pytest.mark.long
def test_both_sides_are_tuned_by_one_rule_and_a_sweep_goes_on(folder, capsys):
    pytest.importorskip("optuna", reason="optuna is not here: pip install mpilm[tune]")
    spec, out = write(folder, TUNED), folder / "tuned"
    assert main(["sweep", str(spec), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "2 done"
    assert said.err.count("best of 1: ") == 2
    # it goes on: what was asked is asked again, and is done; one trial more is run
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/simulate.json")}
    spec.write_text(TUNED.replace("trials = 1", "trials = 2"))
    assert main(["sweep", str(spec), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 done"
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    asked = {p.name: p.settings[-1] for p in Sweep.read(out).points}
    assert asked["allreduce-r2-t0"] == asked["bmuf-r2-t0"]  # the same search
    assert asked["bmuf-r2-t0"] != asked["bmuf-r2-t1"]
    rate = float(asked["bmuf-r2-t1"].removeprefix("optim.lr="))
    assert 0.01 <= rate <= 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"simulate"', '"protocol"'), "tune: only with run ="),
        (("low = 0.01", "low = 2.0"), "tune.range.optim.lr: low < high"),
        (("low = 0.01", "low = -1.0"), "above 0 where log = true"),
        (('"optim.lr"', '"optin.lr"'), "did you mean 'optim'?"),
        (("trials = 1", "trials = 0"), "trials"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(folder, capsys, change, message):
    spec = write(folder, TUNED.replace(*change))
    assert main(["sweep", str(spec), "--out", str(folder / "bad")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
