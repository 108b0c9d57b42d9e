"""A run killed again and again at random moments, and resumed each time.

    python -m tests.soak.kills --kills 200 --minutes 60 --out kills.json

Four ranks train under mpirun (Open MPI without ULFM). Each time one of them is killed
by SIGKILL after a random time, every other time while a checkpoint is being written;
then `mpilm resume`. Checked each time: all have ended within 30 s; the checkpoints can
be read; none that was there before is gone, so at most one period of training is lost.
At the end of a run, its models are those of a run that nobody killed, to the bit.

What is done is kept in `--out` after each kill, the run itself beside it, and gone on
from there. A run that ends by itself, and not well, is counted as failed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.data.synthetic import prepare_synthetic
from mpilm.errors import MpilmError
from mpilm.storage.checkpoint import complete_checkpoints, load_shared
from mpilm.storage.state_file import read_state
from tests.soak.keeping import read_book, step_aside, table, write_book

BIN = Path(sys.executable).parent
RANKS = 4
PERIOD = 4_000  # samples between two checkpoints
SAMPLES = 120_000
LIMIT_S = 30.0  # until all have ended after a death
START_S = 300.0  # until a run that is (re)started writes a checkpoint
MOST_FAILED = 5  # in one run, then the soak ends
STRATEGIES = ("model_averaging", "bmuf", "gossip_bmuf", "dpsgd", "allreduce")
CONFIG = """\
[model]
embed = 12
hidden = 16
dropout = 0.1
[optim]
name = "adamw"
lr = 0.01
[train]
batch = 4
unroll = 10
samples = {samples}
test = false
worst_rank = false
[checkpoint]
every = {period}
[strategy]
name = "{name}"
[data]
corpus = "{corpus}"
"""
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def start(*arguments: Any) -> subprocess.Popen[bytes]:
    """Start mpilm on all ranks."""
    mpirun = (BIN / "mpirun", "--oversubscribe", "--bind-to", "none", "-n", RANKS)
    command = [*mpirun, sys.executable, "-m", "mpilm", *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ROOT, "OMP_NUM_THREADS": "1"},
        preexec_fn=end_with_parent,  # noqa: PLW1509 - there is one thread
    )


def end_with_parent() -> None:
    """Have Linux end this process (by SIGTERM) when the soak is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def ranks_of(mpirun: int) -> list[int]:
    """Return the processes of the ranks, as far as they are there."""
    try:
        found = Path(f"/proc/{mpirun}/task/{mpirun}/children").read_text()
    except OSError:
        return []
    return [int(pid) for pid in found.split()]


def samples_of(folder: Path) -> int:
    """Return the samples of the newest checkpoint that is whole; 0: there is none."""
    try:
        return int(load_shared(folder / "checkpoints")["samples"])
    except MpilmError:
        return 0


def strike(process: Any, folder: Path, draw: random.Random, before: int) -> str:
    """Kill a rank at a random moment; return when: "over" if it ended before."""
    deadline_s = time.monotonic() + START_S
    in_save = draw.random() < 0.5
    until_s = draw.uniform(0.0, 1.0) if in_save else draw.uniform(0.0, 3.0)
    while samples_of(folder) <= before and process.poll() is None:  # it trains
        if time.monotonic() > deadline_s:
            return "hung at its start"
        time.sleep(0.02)
    until_s += time.monotonic()
    partial = "step-*.partial"
    while process.poll() is None:
        is_saving = in_save and next((folder / "checkpoints").glob(partial), None)
        if time.monotonic() >= until_s and (is_saving or not in_save):
            break
        time.sleep(0.0005 if in_save else 0.01)
    ranks = ranks_of(process.pid)
    if process.poll() is not None or len(ranks) < RANKS:
        return "over"
    os.kill(draw.choice(ranks), signal.SIGKILL)
    return "in a checkpoint" if in_save else "anywhere"


def nothing_seen(name: str) -> dict[str, Any]:
    """Return what is kept of a run that has not begun."""
    seen: dict[str, Any] = {"name": name, "kills": 0, "in_save": 0, "resumes": 0}
    seen |= {"hangs": 0, "unreadable": 0, "failed": 0}
    return seen | {"lost": [], "ended_s": []}


def train(
    seen: dict[str, Any],
    folder: Path,
    corpus: Path,
    number: int | None,
    *,
    until: tuple[float, int],
    keep: Callable[[], None],
) -> None:
    """Kill and resume a run until it is over; note what was seen.

    Args:
        number: of the run, from which its random numbers are; None: nobody is killed.
        until: seconds of the clock, and kills, after which nobody is killed.
        keep: called after every kill.
    """
    config = folder.with_suffix(".toml")
    name = seen["name"]
    config.write_text(
        CONFIG.format(name=name, corpus=corpus, samples=SAMPLES, period=PERIOD)
    )
    while True:
        before = samples_of(folder)
        if before:
            seen["resumes"] += 1
            process = start("resume", folder)
        else:
            process = start("train", config, "--out", folder, "--resume")
        must_kill = time.monotonic() < until[0] and seen["kills"] < until[1]
        when = "over"
        if must_kill and number is not None:
            draw = random.Random(f"{number} {seen['kills']}")
            when = strike(process, folder, draw, before)
        if when == "hung at its start":
            seen["hangs"] += 1
            process.kill()
        struck_s = time.monotonic()
        there = samples_of(folder)
        try:
            code = process.wait(600.0 if when == "over" else LIMIT_S)
        except subprocess.TimeoutExpired:
            seen["hangs"] += 1
            for rank in ranks_of(process.pid):
                os.kill(rank, signal.SIGKILL)
            process.kill()
            code = process.wait()
        if when == "over":
            if code == 0:
                return
            seen["failed"] += 1
            keep()
            if seen["failed"] > MOST_FAILED:
                raise SystemExit(f"{folder}: ends with {code} again and again")
            continue
        seen["kills"] += 1
        seen["in_save"] += when == "in a checkpoint"
        seen["ended_s"].append(round(time.monotonic() - struck_s, 2))
        seen["lost"].append(check(folder, there, seen))
        keep()


def check(folder: Path, there: int, seen: dict[str, Any]) -> int:
    """Look at the checkpoints after a kill; return the samples lost since one."""
    for path in complete_checkpoints(folder / "checkpoints"):
        try:
            for file in path.iterdir():
                read_state(file)
        except (MpilmError, OSError):
            seen["unreadable"] += 1
    return max(0, there - samples_of(folder))


def same_bits(one: Path, other: Path) -> bool:
    """Return whether the newest checkpoints of two runs hold the same states."""
    newest = [complete_checkpoints(path / "checkpoints")[0] for path in (one, other)]
    for rank in range(RANKS):
        states = [read_state(path / f"rank-{rank:04d}.h5") for path in newest]
        for name, value in states[0].items():
            is_clock = name.startswith("totals/")
            if not is_clock and not np.array_equal(value, states[1].get(name)):
                return False
    return newest[0].name == newest[1].name


def main() -> int:
    """Do as the header says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    step_aside()
    until_s = time.monotonic() + 60.0 * options.minutes
    book = read_book(options.out, {"runs": []})
    runs: list[dict[str, Any]] = book["runs"]
    place = options.out.with_suffix("").resolve()
    place.mkdir(parents=True, exist_ok=True)
    corpus = place / "c.h5"
    if not corpus.exists():
        prepare_synthetic(corpus, vocab=40, tokens=50_000, seed=3, branching=4)

    def keep() -> None:
        write_book(options.out, book)

    while time.monotonic() < until_s:
        left = options.kills - sum(run["kills"] for run in runs)
        if left <= 0 and all("same_bits" in run for run in runs):
            break
        if not runs or "same_bits" in runs[-1]:
            runs.append(nothing_seen(STRATEGIES[len(runs) % len(STRATEGIES)]))
        seen, number = runs[-1], len(runs) - 1
        folder, whole = place / f"{number}", place / f"{seen['name']}-whole"
        until = (until_s, seen["kills"] + left)
        train(seen, folder, corpus, number, until=until, keep=keep)
        if not (whole / "summary.json").exists():
            nobody = nothing_seen(seen["name"])
            train(nobody, whole, corpus, None, until=(0.0, 0), keep=keep)
        seen["same_bits"] = same_bits(folder, whole)
        keep()
        if seen["same_bits"] and not seen["failed"]:
            shutil.rmtree(folder)
        print(page(runs[-1:]).splitlines()[-1], flush=True)
    print(page(runs))
    is_good = all(run.get("same_bits", True) for run in runs)
    is_good &= not any(run[key] for run in runs for key in BAD)
    most = max((n for run in runs for n in run["lost"]), default=0)
    return 0 if is_good and most <= PERIOD else 1


BAD = ("hangs", "unreadable", "failed")


def page(runs: list[dict[str, Any]]) -> str:
    """Return a table: a line for each strategy, and one for all."""
    rows = []
    for name in (*dict.fromkeys(run["name"] for run in runs), "all"):
        own = [run for run in runs if name in ("all", run["name"])]
        ends = sorted(s for run in own for s in run["ended_s"]) or [0.0]
        kills, in_save = (sum(run[key] for run in own) for key in ("kills", "in_save"))
        ended = [run["same_bits"] for run in own if "same_bits" in run]
        rows.append(
            [
                *(name, kills, in_save),
                *(sum(run[key] for run in own) for key in BAD),
                f"{ends[len(ends) // 2]:.1f} ({ends[-1]:.1f})",
                max((n for run in own for n in run["lost"]), default=0),
                f"{sum(ended)} of {len(ended)}",
            ]
        )
    head = ["strategy", "kills", "while saving", *BAD, "ended after, s (most)"]
    return table([*head, "samples of a checkpoint lost", "ends in the same bits"], rows)


if __name__ == "__main__":
    sys.exit(main())
