"""`mpilm sweep` and `mpilm status`: many runs from one file, and how they stand.

A point is run by a command of its own: one that fails leaves the others alone.
What lies where in the folder: swept.py.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import tyro

from mpilm.commands import ranks
from mpilm.commands.collect import PAGE, jobs_of, submit_collector
from mpilm.commands.points import SIMULATED, SUBMITTED, Point, Spec
from mpilm.commands.queued import Submitted, make
from mpilm.commands.swept import (
    NAME,
    State,
    Sweep,
    last_line,
    outcome,
    point_table,
    write_table,
)
from mpilm.commands.tuned import Study
from mpilm.errors import (
    STOPPED_EARLY,
    CheckpointError,
    ConfigError,
    WorldError,
    interruption,
    say,
)
from mpilm.storage.files import reason
from mpilm.storage.owner import Owner

SOME_FAILED = 1


def sweep(
    spec: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    dry_run: Annotated[bool, tyro.conf.arg(name="dry-run")] = False,
) -> int:
    """Run every combination of strategies, ranks, stragglers, ... that a file lists.

    Simulated, under mpirun on this machine, or submitted to SLURM or PBS
    (docs/sweep.md). Started again it goes on: what is done stays, what failed or was
    stopped is tried again. `mpilm status OUT` tells how it stands, `mpilm report OUT`
    draws it. The exit code is 1 if a point failed.

    Args:
        spec: TOML file of the sweep
        out: folder for the runs
        dry_run: print the commands and run nothing
    """
    asked = Spec.read(spec)
    points = asked.points()
    first = points
    if asked.tune is not None:
        first = [Study(asked.tune).ask(point) for point in points]
    commands = [_words(asked, point, out) for point in first]
    if dry_run:
        for words in commands:
            print(shlex.join(words))
        return 0
    make(out / "log")
    owner = Owner(out).take()
    try:
        known = Sweep.read(out).points if (out / NAME).exists() else []
        found = _begin(asked, known if asked.tune else points, out)
        before = jobs_of(found)
        found, code = (_run_tuned if asked.tune else _run_all)(found, points)
        if found.spec.run in SUBMITTED and (job := submit_collector(found, before)):
            say(f"job {job} waits for all others, then draws {out / PAGE}")
    finally:
        owner.release()
    for line in point_table(found):
        print(line)
    return code


def status(
    folder: tyro.conf.Positional[Path],
    /,
    *,
    csv: Path | None = None,
    predicted: Path | None = None,
    slow_nodes: Annotated[float, tyro.conf.arg(name="slow-nodes")] = 0.0,
) -> int:
    """Tell how the points of a sweep stand, or the ranks of a run, running or not.

    Of a point: whether it is done, runs, is queued, or failed and why. Of a rank: its
    speed, the shares of its time, and whether it computes slower than the others.

    Args:
        folder: of the sweep, or of the run
        csv: file to write the table to as well, with the results of what is done
        predicted: folder of a simulated sweep of the same points: its samples/s stand
            beside those that were measured
        slow_nodes: print nothing but the hosts of a run, with commas between, on which
            every rank computes over so many times as long as the fastest
    """
    if slow_nodes or (folder / "config.toml").exists():
        if csv is not None:
            raise ConfigError("--csv: is for sweeps; `mpilm report RUN --csv FOLDER`")
        if predicted is not None:
            raise ConfigError("--predicted: is for sweeps")
        run, rows = ranks.read_ranks(folder)
        if slow_nodes:
            print(",".join(ranks.slow_nodes(rows, slow_nodes)))
            return 0
        for line in ranks.rank_table(run, rows):
            print(line)
        return 0
    job = Submitted.read(folder)
    if job and not (folder / NAME).exists():
        is_queued = job.is_queued()
        why = job.waits_for() if is_queued else f"{folder} holds no run"
        stands = "is in the queue" if is_queued else "has ended"
        print(f"job {job.job} {stands}{': ' if why else ''}{why}")
        return 0 if is_queued else SOME_FAILED
    found = Sweep.read(folder)
    found.look()
    if found.spec.run not in SUBMITTED and not _is_at_work(folder):
        for state in found.states.values():
            if state.state == "runs":
                state.state = "stopped"
    beside = Sweep.read(predicted) if predicted is not None else None
    if beside and beside.spec.run not in SIMULATED:
        raise ConfigError(f"--predicted {predicted}: was not simulated")
    if beside and not beside.states.keys() & found.states.keys():
        raise ConfigError(
            f"--predicted {predicted}: no point is called as one of {folder}; both"
            " sweeps need the same [vary] and ranks"
        )
    if beside and beside.digest != found.digest:
        say(
            f"note: {predicted} is of {beside.spec.config}, {folder} of"
            f" {found.spec.config}, or one of them was edited in between"
        )
    for line in point_table(found, beside):
        print(line)
    if csv is not None:
        write_table(found, csv, beside)
    return 0


def _words(spec: Spec, point: Point, out: Path) -> list[str]:
    """Return the whole command of a point.

    Raises:
        WorldError: there is no mpirun.
    """
    words = point.command(spec, out)
    if spec.run != "local":
        return [sys.executable, "-m", "mpilm", *words]
    if launch := shlex.split(os.environ.get("LAUNCH", "")):  # as the job scripts do
        return [*launch, *words]
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.is_file() else shutil.which("mpirun")
    if mpirun is None:
        raise WorldError("no mpirun on PATH")
    return [mpirun, *words]


def _begin(spec: Spec, points: list[Point], out: Path) -> Sweep:
    """Return the sweep as it stands in the folder, or a new one.

    Raises:
        ConfigError: the folder holds points of another sweep under these names.
    """
    try:
        digest = hashlib.sha256(Path(spec.config).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{spec.config}: cannot read: {reason(error)}") from None
    states = {point.name: State() for point in points}
    if (out / NAME).exists():
        old = Sweep.read(out)
        same = old.digest == digest and old.spec.run == spec.run
        before = {point.name: point for point in old.points}
        for point in points:
            state = old.states.get(point.name, State())
            if point.name not in before or state.state in ("waiting", "failed"):
                continue
            if not same or before[point.name] != point:
                raise ConfigError(
                    f"{out}: {point.name} was run with other settings, or from another"
                    f" {spec.config}: take another --out"
                )
            states[point.name] = state
    found = Sweep(out, spec, points, states, digest)
    found.look()
    found.write()
    return found


def _run_all(found: Sweep, points: list[Point]) -> tuple[Sweep, int]:
    """Run the points one after the other; return the sweep and the exit code."""
    for number, point in enumerate(points, 1):
        head = f"{number}/{len(points)} {point.name}"
        if code := _run_point(found, point, head):
            return found, code
    return found, _exit_code(found)


def _run_tuned(found: Sweep, points: list[Point]) -> tuple[Sweep, int]:
    """Run the trials of every point; return the sweep and the exit code."""
    spec, out, tuning = found.spec, found.out, found.spec.tune
    assert tuning is not None
    asked: list[Point] = []
    known = found.points  # of an earlier start
    for number, point in enumerate(points, 1):
        study = Study(tuning)
        for _ in range(tuning.trials):
            trial = study.ask(point)
            asked.append(trial)
            names = {one.name for one in asked}
            later = [one for one in known if one.name not in names]
            found = _begin(spec, [*asked, *later], out)
            head = f"{number}/{len(points)} {trial.name}"
            if code := _run_point(found, trial, head):
                return found, code
            is_done = found.states[trial.name].state == "done"
            result = outcome(found, trial) if is_done else {}
            study.tell(trial, result.get("perplexity"))
        say(f"{number}/{len(points)} {point.name}: {study}")
    return found, _exit_code(found)


def _exit_code(found: Sweep) -> int:
    counts = Counter(state.state for state in found.states.values())
    return SOME_FAILED if counts["failed"] or counts["stopped"] else 0


def _run_point(found: Sweep, point: Point, head: str) -> int:
    """Run a point, unless it is done; return the exit code if a signal has ended it."""
    state = found.states[point.name]
    if state.state in ("done", "queued") or (
        state.state == "runs" and found.spec.run in SUBMITTED
    ):
        say(f"{head}: {state.state}")
        return 0
    found.states[point.name] = state = State("runs")
    found.write()
    start_s = time.monotonic()
    try:
        code = run_logged(_words(found.spec, point, found.out), found.log(point))
    except KeyboardInterrupt as signalled:
        state.state = "stopped"
        found.write()
        say(f"{head}: stopped; the same command goes on")
        return interruption(signalled)[0]
    state.took_s = round(time.monotonic() - start_s, 1)
    if code == 0:
        state.state = "queued" if found.spec.run in SUBMITTED else "done"
    elif code == STOPPED_EARLY:
        state.state = "stopped"
    else:
        state.state = "failed"
        state.why = last_line(found.log(point)) or f"exit code {code}"
    found.write()
    say(f"{head}: {state.state}{': ' if state.why else ''}{state.why}")
    return 0


def run_logged(words: list[str], log: Path) -> int:
    """Run a command, what it says into a file; return its exit code.

    A signal to end ends the command first: a run writes its checkpoint. Another one
    goes to the command, too: nobody leaves it behind.
    """
    with open(log, "wb") as stream:
        try:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it once, from here
            )
        except OSError as error:
            stream.write(f"mpilm: {words[0]}: {reason(error)}\n".encode())
            return 127
        first: KeyboardInterrupt | None = None
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt as signalled:
                first = first or signalled
                with suppress(ProcessLookupError):
                    child.send_signal(signal.SIGTERM)
        if first:
            raise first
        return code


def _is_at_work(out: Path) -> bool:
    try:
        Owner(out).take().release()
    except CheckpointError:
        return True
    return False
