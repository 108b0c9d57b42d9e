"""How well are spoken digits recognised, from wav to word error rate?

    python benchmarks/bench_digits.py --out benchmarks/results/digits.json

Runs the three commands of docs/digits.md on the Free Spoken Digit Dataset, with its own
test split (numbers 0 to 4), on 4 ranks and on one: `prepare wav`, `train` with
jobs/configs/digits_lstm.toml, `decode`. The strings have 3 to 7 digits of one speaker,
joined from recordings of the test split; the insertion penalty is found on strings of
the valid split. The error rates do not depend on the load of the machine; the seconds
do. --smoke: a few recordings, or tones as words where the data are not there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
from harness import parser, report

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("MPILM_DATA", ROOT.parent / "shared" / "data"))
CONFIG = ROOT / "jobs" / "configs" / "digits_lstm.toml"
MOST_WER = 0.03  # the goal: issue C, "Measured quality"

PREPARE = ["--test-names", "_[0-4]$", "--strings", "3-7"]
SMOKE = [
    *("model.hidden=16", "model.layers=1", "train.samples=20_000", "train.batch=2"),
    *("train.valid_every=0", "strategy.period=2"),
]


def run(ranks: int, *arguments: Any) -> float:
    """Run mpilm on some ranks; return the seconds that it took.

    Raises:
        SystemExit: it failed; its output is on the screen.
    """
    launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    command = [sys.executable, "-m", "mpilm", *map(str, arguments)]
    environment = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        **os.environ,
    }
    print("$ mpirun -n", ranks, "mpilm", *command[3:], flush=True)
    began_s = time.monotonic()
    code = subprocess.run(
        [*launcher, *command], env=environment, check=False
    ).returncode
    if code:
        raise SystemExit(f"exit code {code}")
    return time.monotonic() - began_s


def tones(folder: Path) -> Path:
    """Write recordings of two words, 0 and 1: a low and a high tone."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    for word, pitch in (("0", 400.0), ("1", 2500.0)):
        for number in range(15):
            phase = 2 * np.pi * pitch * rng.uniform(0.95, 1.05) * np.arange(2400) / 8000
            samples = 5000 * np.sin(phase) + rng.normal(scale=100, size=len(phase))
            with wave.open(str(folder / f"{word}_tone_{number}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", "not compressed"))
                file.writeframes(samples.astype(np.int16).tobytes())
    return folder


def recordings(args: argparse.Namespace, folder: Path) -> Path:
    """Return the folder of recordings: all of them, a few, or tones."""
    if not args.data.is_dir():
        return tones(folder / "wav")
    if not args.smoke:
        return Path(args.data)
    few = folder / "wav"
    few.mkdir()
    for path in args.data.glob("[01]_jackson_?.wav"):
        (few / path.name).symlink_to(path)
    return few


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__ or "", warmup=0, loops=1)
    arguments.add_argument("--data", type=Path, default=DATA / "fsdd" / "wav")
    arguments.add_argument("--ranks", type=int, nargs="+", default=[4, 1])
    arguments.add_argument("--set", nargs="*", default=[], help="section.key=value")
    args = arguments.parse_args()
    if not args.smoke and not args.data.is_dir():
        print(f"skipped: no {args.data} (set MPILM_DATA, or give --data)")
        return
    ranks = args.ranks[:1] if args.smoke else args.ranks
    rows = []
    with tempfile.TemporaryDirectory(prefix="digits.") as name:
        folder = Path(name)
        corpus = folder / "digits.h5"
        wav = recordings(args, folder)
        strings = ["--train-strings", 4, "--num-strings", 4] if args.smoke else []
        strings = strings or ["--train-strings", 600]
        prepare_s = run(
            1, *("prepare", "wav", "--train", wav, "--out", corpus), *PREPARE, *strings
        )
        for size in ranks:
            out = folder / f"run-{size}"
            settings = [f"data.corpus={corpus}", *args.set]
            settings += SMOKE if args.smoke else []
            sets = [word for setting in settings for word in ("--set", setting)]
            train_s = run(size, "train", CONFIG, "--out", out, *sets)
            splits = ["--split", "test", "--split", "strings"]
            decode_s = run(size, "decode", out, *splits, *("--tune", "valid-strings"))
            rows.append(row(size, out, (prepare_s, train_s, decode_s)))
    args.data = args.data.name  # not where it lies
    report("digits", "spoken digits, from wav to words", rows, args)
    for found in rows:
        if not args.smoke and found["WER strings"] > MOST_WER:
            raise SystemExit(f"WER of strings above {MOST_WER:.0%}")


def row(size: int, out: Path, seconds: tuple[float, ...]) -> dict[str, Any]:
    """Return what the files of a run say."""
    summary = json.loads((out / "summary.json").read_text())
    found = {
        result["split"]: result
        for result in json.loads((out / "decode.json").read_text())
    }
    prepare_s, train_s, decode_s = seconds
    return {
        "ranks": size,
        "samples": summary["samples"],
        "valid frame error": summary["valid_frame_error"],
        "test frame error": summary["test_frame_error"],
        "penalty (nats)": found["strings"]["penalty"],
        "WER valid strings": found["valid-strings"]["wer"],
        "WER single": found["test"]["wer"],
        "WER strings": found["strings"]["wer"],
        "words": found["strings"]["words"],
        "prepare (s)": prepare_s,
        "train (s)": train_s,
        "decode (s)": decode_s,
    }


if __name__ == "__main__":
    main()
