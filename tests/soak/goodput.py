"""Goodput: samples that count a second, while a rank is killed again and again.

    python -m tests.soak.goodput --out build/goodput.json

Four ranks train to the same number of samples in three ways: nobody is killed; a rank
is killed (SIGKILL) every --every seconds and replaced (`world.on_death = "replace"`);
the same, but a death ends the run, and `mpilm resume` goes on from the last checkpoint.
A rank computes for a quarter of a step and sleeps for the rest (declared in [faults]),
so that a machine of two cores has room for what it takes to start a rank.

The ways take turns, --turns of each, for a machine is now quick and now slow; goodput
is the median of the turns' ratios. Nothing else should run.

Seconds count from the first checkpoint to the end of the program. Recovery is from the
kill to the line that says that the others go on; the time to full strength is to the
line that says that another has joined. What stands in --out is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from mpilm.data.synthetic import prepare_synthetic
from mpilm.storage.checkpoint import complete_checkpoints
from tests.soak.kills import BIN, RANKS, ROOT, ranks_of, samples_of

WAYS = ("undisturbed", "replaced", "restarted")
STEP = 20 * 20 * RANKS  # samples of all ranks
Row = dict[str, Any]
GIVE_UP_S = 900.0
CONFIG = """\
[data]
corpus = "{corpus}"
[model]
embed = 64
hidden = 128
[optim]
name = "adamw"
lr = 0.002
[train]
batch = 20
unroll = 20
samples = {samples}
test = false
worst_rank = false
[checkpoint]
every = {period}
[strategy]
name = "model_averaging"
period = 5
[world]
on_death = "{on_death}"
[faults]
profile = [{{kind = "constant", factor = 4.0}}]
"""


class Launch:
    """A run under mpirun, and when it said what."""

    def __init__(self, *arguments: Any, ulfm: bool) -> None:
        mpirun = [BIN / "mpirun", "--oversubscribe", "--bind-to", "none"]
        mpirun += [*(("--with-ft", "ulfm") if ulfm else ()), "-n", RANKS]
        self.process = subprocess.Popen(
            [*map(str, (*mpirun, sys.executable, "-m", "mpilm", *arguments))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ROOT, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        self.said: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append((time.monotonic(), line))

    def times(self, word: str) -> list[float]:
        """Return when it said a word."""
        return [at_s for at_s, line in self.said if word in line]


def ended(launch: Launch, folder: Path) -> str:
    """Return what a run that should have gone on has left to be read."""
    lines = [line for _, line in launch.said]
    lines += [path.read_text() for path in folder.glob("traceback-*.txt")]
    return "".join(lines)


def train(way: str, turn: int, folder: Path, corpus: Path, options: Any) -> Row:
    """Train one way; return what was seen."""
    draw = random.Random(f"{way} {turn}")
    config = folder.with_suffix(".toml")
    samples, period = STEP * options.steps, STEP * options.period
    on_death = "replace" if way == "replaced" else "end"
    config.write_text(
        CONFIG.format(corpus=corpus, samples=samples, period=period, on_death=on_death)
    )
    launch = Launch("train", config, "--out", folder, ulfm=way == "replaced")
    began_s = time.monotonic()
    while not complete_checkpoints(folder / "checkpoints"):
        if time.monotonic() > began_s + GIVE_UP_S or launch.process.poll() is not None:
            raise SystemExit(ended(launch, folder))
        time.sleep(0.05)
    first_s, first = time.monotonic(), samples_of(folder)
    killed_s: list[float] = []
    recovery_s, full_s, restarts = [], [], 0
    while True:
        if time.monotonic() > first_s + GIVE_UP_S:
            launch.process.kill()
            raise SystemExit(f"{folder.name} does not end\n{ended(launch, folder)}")
        if (code := launch.process.poll()) is not None:
            # of a rank that joined and was killed mpirun keeps the exit code
            if code == 0 or (folder / "summary.json").exists():
                break
            if way != "restarted":
                raise SystemExit(ended(launch, folder))
            restarts += 1
            launch = Launch("resume", folder, ulfm=False)
        is_due = time.monotonic() >= first_s + options.every * (len(killed_s) + 1)
        is_full = way == "restarted" or len(launch.times(" joined; ")) == len(killed_s)
        ranks = ranks_of(launch.process.pid)
        if way != "undisturbed" and is_due and is_full and len(ranks) == RANKS:
            os.kill(draw.choice(ranks), signal.SIGKILL)
            killed_s.append(time.monotonic())
        time.sleep(0.02)
    last_s = time.monotonic()
    if way == "replaced":
        for word, found in ((" died; ", recovery_s), (" joined; ", full_s)):
            pairs = zip(killed_s, launch.times(word), strict=False)
            found += [round(at_s - kill_s, 2) for kill_s, at_s in pairs]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "way": way,
        "turn": turn,
        "ranks at the end": summary["ranks"],
        "samples": samples - first,
        "seconds": round(last_s - first_s, 1),
        "samples/s": round((samples - first) / (last_s - first_s), 1),
        "kills": len(killed_s),
        "restarts": restarts,
        "recovery (s)": recovery_s,
        "full strength (s)": full_s,
        "perplexity": summary["valid_perplexity"],
    }


def main() -> int:
    """Do as the header says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=float, default=30.0, help="seconds")
    parser.add_argument("--turns", type=int, default=7, help="of each way")
    parser.add_argument("--steps", type=int, default=5_000, help="of each rank")
    parser.add_argument("--period", type=int, default=60, help="steps to a checkpoint")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    with tempfile.TemporaryDirectory() as place:
        corpus = Path(place) / "c.h5"
        prepare_synthetic(corpus, vocab=200, tokens=400_000, seed=3, branching=6)
        turns = [(way, turn) for turn in range(options.turns) for way in options.ways]
        for way, turn in turns:
            if (way, turn) in {(row["way"], row["turn"]) for row in rows}:
                continue
            folder = Path(place) / f"{way}-{turn}"
            rows.append(train(way, turn, folder, corpus, options))
            config = {"every": options.every, "steps": options.steps}
            config |= {"period": options.period, "cores": os.cpu_count()}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            document = {"config": config, "rows": rows}
            options.out.write_text(json.dumps(document, indent=1) + "\n")
            print(rows[-1], flush=True)
    return verdict(rows)


def verdict(rows: list[Row]) -> int:
    """Print what all turns come to; return 1 if a goal is missed."""

    def ratios(way: str, key: str) -> list[float]:
        found = {(row["way"], row["turn"]): row[key] for row in rows}
        turns = [turn for name, turn in found if name == way]
        pairs = [(found[way, t], found.get(("undisturbed", t))) for t in turns]
        return [value / plain for value, plain in pairs if plain]

    shares = {way: ratios(way, "samples/s") for way in WAYS[1:]}
    recovery_s = [s for row in rows for s in row["recovery (s)"]]
    if not recovery_s or not all(shares.values()):
        print("too few kills, or turns, for a verdict")
        return 0
    share = statistics.median(shares["replaced"])
    middle_s = statistics.median(recovery_s)
    worse = statistics.median(ratios("replaced", "perplexity")) - 1.0
    for way, found in shares.items():
        low, middle, high = min(found), statistics.median(found), max(found)
        print(f"{way}: goodput {middle:.1%} of undisturbed ({low:.1%} to {high:.1%})")
    print(
        f"recovery {middle_s:.2f} s, at most {max(recovery_s):.2f} s, of"
        f" {len(recovery_s)}; perplexity {worse:+.1%}"
    )
    return 0 if share >= 0.88 and middle_s <= 1.0 and worse <= 0.03 else 1


if __name__ == "__main__":
    sys.exit(main())
