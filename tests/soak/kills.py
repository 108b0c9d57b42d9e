"""A run killed again and again at random moments, and resumed each time.

    python -m tests.soak.kills --kills 200 --minutes 60 --out kills.json

Four ranks train under mpirun (Open MPI without ULFM). Each time one of them is killed
by SIGKILL after a random time, every other time while a checkpoint is being written;
then `mpilm resume`. Checked each time: all have ended within 30 s; the checkpoints can
be read; none that was there before is gone, so at most one period of training is lost.
At the end of a run, its models are those of a run that nobody killed, to the bit.

What is done is kept in `--out` after each run, and gone on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.data.synthetic import prepare_synthetic
from mpilm.errors import MpilmError
from mpilm.storage.checkpoint import complete_checkpoints, load_shared
from mpilm.storage.state_file import read_state

BIN = Path(sys.executable).parent
RANKS = 4
PERIOD = 4_000  # samples between two checkpoints
SAMPLES = 120_000
LIMIT_S = 30.0  # until all have ended after a death
START_S = 300.0  # until a run that is (re)started writes a checkpoint
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
    )


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


def train(name: str, folder: Path, corpus: Path, draw: Any, until: Any) -> dict:
    """Kill and resume a run until it is over; return what was seen.

    Args:
        draw: random numbers; None: nobody is killed.
        until: seconds of the clock, and kills, after which nobody is killed.
    """
    seen: dict[str, Any] = {"kills": 0, "in_save": 0, "hangs": 0, "unreadable": 0}
    seen |= {"lost": [], "ended_s": [], "resumes": 0}
    config = folder.with_suffix(".toml")
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
        must_kill = draw and time.monotonic() < until[0] and seen["kills"] < until[1]
        when = strike(process, folder, draw, before) if must_kill else "over"
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
        if when == "over" and code == 0:
            return seen
        seen["kills"] += 1
        seen["in_save"] += when == "in a checkpoint"
        seen["ended_s"].append(round(time.monotonic() - struck_s, 2))
        seen["lost"].append(check(folder, there, seen))


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
    until_s = time.monotonic() + 60.0 * options.minutes
    runs: list[dict[str, Any]] = []
    if options.out.exists():
        runs = json.loads(options.out.read_text())["runs"]
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "c.h5"
        prepare_synthetic(corpus, vocab=40, tokens=50_000, seed=3, branching=4)
        while time.monotonic() < until_s:
            left = options.kills - sum(run["kills"] for run in runs)
            if left <= 0:
                break
            number = len(runs)
            name, draw = STRATEGIES[number % len(STRATEGIES)], random.Random(number)
            folder = Path(place) / f"{number}"
            seen = train(name, folder, corpus, draw, (until_s, left))
            whole = Path(place) / f"{name}-whole"
            if not whole.exists():
                train(name, whole, corpus, None, None)
            seen |= {"name": name, "same_bits": same_bits(folder, whole)}
            runs.append(seen)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"runs": runs}, indent=1))
            print(row(seen), flush=True)
    total = {key: sum(run[key] for run in runs) for key in ("kills", "in_save")}
    total |= {key: sum(run[key] for run in runs) for key in ("hangs", "unreadable")}
    total["same_bits"] = all(run["same_bits"] for run in runs)
    total["most_lost"] = max((n for run in runs for n in run["lost"]), default=0)
    total["slowest_end_s"] = max((s for r in runs for s in r["ended_s"]), default=0.0)
    print(total)
    is_good = total["same_bits"] and not total["hangs"] + total["unreadable"]
    return 0 if is_good and total["most_lost"] <= PERIOD else 1


def row(seen: dict[str, Any]) -> str:
    """Return a line on a run."""
    ends = sorted(seen["ended_s"]) or [0.0]
    return (
        f"{seen['name']:<16}{seen['kills']:>4} kills, {seen['in_save']} while saving;"
        f" {seen['hangs']} hangs, {seen['unreadable']} unreadable; ended after"
        f" {ends[len(ends) // 2]:.1f} s (most {ends[-1]:.1f}); lost at most"
        f" {max(seen['lost'], default=0)} samples of a checkpoint;"
        f" {'the same bits' if seen['same_bits'] else 'OTHER BITS'}"
    )


if __name__ == "__main__":
    sys.exit(main())
