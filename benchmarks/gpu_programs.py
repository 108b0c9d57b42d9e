"""The sections of gpu.py that start programs: `mpilm` as a user does, and pytest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_common import Rows

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/gpu",
    "tests/unit/test_models_lstm.py",
    "tests/unit/test_natural_gradient.py",
    "tests/strategies/test_bad_numbers.py",
)
MPI_TESTS = ("tests/mpi/test_cuda.py",)
CONFIG = """
[data]
corpus = "{corpus}"
[model]
embed = {size}
hidden = {size}
layers = {layers}
dropout = {dropout}
[optim]
name = "adamw"
lr = 0.002
[train]
device = "{device}"
batch = {batch}
unroll = {unroll}
samples = {samples}
test = false
[checkpoint]
every = {every}
"""
AVERAGING = """
[strategy]
name = "model_averaging"
period = 5
[world]
gpu_messages = "auto"
"""
REPLACING = """
[strategy]
name = "{strategy}"
[world]
on_death = "replace"
"""


def call(command: list[str], limit_s: float) -> tuple[int, str]:
    """Return exit code and output of a program, from the project's folder."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no end after {limit_s:.0f} s"
    print(done.stdout, flush=True)
    return done.returncode, done.stdout


def mpirun(ranks: int, *program: str) -> list[str]:
    """Return a command line of Python on some ranks."""
    launcher = os.environ.get("MPILM_MPIRUN") or "mpirun"
    options = ["--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    return [launcher, *options, sys.executable, *program]


def train(args: Any, path: Path) -> None:
    """A run, the same stopped half way and resumed, a profile of the ranks, doctor."""
    from mpilm.data.synthetic import prepare_synthetic
    from mpilm.storage.state_file import read_state

    add, slow = Rows(path), 20.0 if args.smoke else 1.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab, size = (40, 8) if args.smoke else (5000, 256)
        prepare_synthetic(
            folder / "c.h5", vocab=vocab, tokens=60_000, seed=3, branching=4
        )
        batch, unroll = (4, 10) if args.smoke else (16, 20)
        half = 2 * batch * unroll * 30
        values = {"batch": batch, "unroll": unroll, "size": size, "every": half}
        values |= {"corpus": folder / "c.h5", "layers": 2, "dropout": 0.2}
        values |= {"device": args.device}
        for part, samples in (("whole", 2 * half), ("half", half)):
            text = CONFIG.format(samples=samples, **values) + AVERAGING
            (folder / f"{part}.toml").write_text(text)
        whole, parts = str(folder / "whole"), str(folder / "parts")
        mpilm = ["-m", "mpilm"]
        configs = [str(folder / "whole.toml"), str(folder / "half.toml")]
        for what, arguments in {
            "train": ["train", configs[0], "--out", whole, "--profile"],
            "train half": ["train", configs[1], "--out", parts],
            "resume": ["resume", parts, "--set", f"train.samples={2 * half}"],
        }.items():
            began_s = time.monotonic()
            code, text = call(mpirun(2, *mpilm, *arguments), slow * 40.0)
            seconds = time.monotonic() - began_s
            last = [line for line in text.splitlines() if line.strip()] or [""]
            add(program=what, code=code, s=round(seconds, 1), said=last[-1][:150])
        ends = []
        for run in (whole, parts):
            newest = max(Path(run).glob("checkpoints/step-*"), default=None)
            state = read_state(newest / "rank-0001.h5") if newest else {}
            state = {k: v for k, v in state.items() if not k.startswith("totals/")}
            ends.append(state)
        keys = ends[0].keys() | ends[1].keys()
        bad = sorted(k for k in keys if not equal(ends[0].get(k), ends[1].get(k)))
        is_same = bool(keys) and not bad
        columns = {"differs in": ", ".join(bad)[:200], "goal": "to the bit"}
        add(variant="resumed run, all of rank 1's state", **columns, met=is_same)
        profile = Path(whole) / "profile.json"
        found: Counter[str] = Counter()
        if profile.exists():
            for event in json.loads(profile.read_bytes())["traceEvents"]:
                if event.get("ph") in {"X", "b"}:
                    found[str(event.get("cat"))] += 1
                    found[event["name"]] += 1
        kinds = ("kernel", "gpu_memcpy", "cpu_op", "compute", "mix", "stage")
        add(variant="profile.json", **{kind: found[kind] for kind in kinds})
        doctor = call([sys.executable, *mpilm, "doctor"], slow * 60.0)[1]
        for line in doctor.splitlines():
            if "GPU" in line or "CUDA" in line:
                add(doctor=line.strip())


def deaths(args: Any, path: Path) -> None:
    """Of four ranks on the card one is killed, and another joins in its place."""
    from mpilm.data.synthetic import prepare_synthetic

    add = Rows(path)
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "c.h5"
        vocab, size = (40, 8) if args.smoke else (5000, 256)
        prepare_synthetic(corpus, vocab=vocab, tokens=200_000, seed=3, branching=4)
        values = {"corpus": corpus, "size": size, "layers": 1, "dropout": 0.0}
        values |= {
            "batch": 16,
            "device": args.device,
            "unroll": 20,
            "samples": 4_000_000_000,
        }
        values |= {"every": 16 * 20 * 4 * 100}
        limit_s = 300.0 if args.smoke else 40.0
        for strategy in ("model_averaging", "gossip_bmuf", "adpsgd"):
            folder = Path(name) / strategy
            own = REPLACING.format(strategy=strategy)
            folder.with_suffix(".toml").write_text(CONFIG.format(**values) + own)
            add(strategy=strategy, **killed(folder, limit_s))


def killed(folder: Path, limit_s: float) -> dict[str, Any]:
    """Train until a rank that was killed is replaced; return what was seen."""
    from mpilm.storage.checkpoint import complete_checkpoints
    from mpilm.storage.state_file import read_state
    from mpilm.vectors import is_finite
    from tests.soak.goodput import Launch, ended
    from tests.soak.kills import ranks_of

    config = folder.with_suffix(".toml")
    launch = Launch("train", config, "--out", folder, ulfm=True)

    def found() -> list[Path]:
        return complete_checkpoints(folder / "checkpoints")

    def until(ready: Callable[[], Any]) -> float:
        """Return when it is; give up after a while."""
        give_up_s = time.monotonic() + limit_s
        while not ready():
            is_over = launch.process.poll() is not None
            if is_over or time.monotonic() > give_up_s:
                launch.process.kill()
                raise SystemExit(ended(launch, folder))
            time.sleep(0.01)
        return time.monotonic()

    until(found)
    os.kill(ranks_of(launch.process.pid)[1], signal.SIGKILL)
    killed_s = time.monotonic()
    died_s = until(lambda: launch.times(" died; "))
    joined_s = until(lambda: launch.times(" joined; "))
    launch.process.send_signal(signal.SIGUSR1)
    code = launch.process.wait(60)
    states = map(read_state, found()[0].glob("rank-*.h5"))
    return {
        "code": code,
        "recovery (s)": died_s - killed_s,
        "full strength (s)": joined_s - killed_s,
        "finite": all(is_finite(state["learner/theta"]) for state in states),
    }


def checkpoints(args: Any, path: Path) -> None:
    """98 million parameters: a copy of theta, and checkpoints every 5 s or so."""
    import torch

    add, size = Rows(path), 1000 if args.smoke else 97_751_078
    vector = torch.zeros(size, device=args.device)
    pinned = torch.zeros(size, pin_memory=args.device == "cuda")
    for _ in range(2):
        began_s = time.monotonic()
        vector.cpu()
        cpu_s = time.monotonic()
        pinned.copy_(vector)
        pinned_s = time.monotonic()
    add(copy="to new memory", MB=vector.nbytes / 1e6, s=cpu_s - began_s)
    add(copy="to pinned memory", MB=vector.nbytes / 1e6, s=pinned_s - cpu_s)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out.json"
        program = [sys.executable, "benchmarks/bench_checkpoints.py"]
        own = ["--every", "500", "--saves", "2", "--ways", "beside", "waiting"]
        own += ["--device", args.device, "--out", str(out)]
        smoke = ["--smoke"] * args.smoke
        code, text = call([*program, *own, *smoke], 600.0 if args.smoke else 100.0)
        if code:
            raise SystemExit((text.splitlines() or ["no output"])[-1])
        for table in json.loads(out.read_text())["tables"]:
            for row in table["rows"]:
                add(**row)


def equal(one: Any, other: Any) -> bool:
    """Return whether two entries of a state are the same."""
    import numpy as np

    if one is None or other is None:
        return False
    return np.array_equal(np.asarray(one), np.asarray(other))


def tests(args: Any, path: Path) -> None:
    """The tests that are skipped where there is no GPU."""
    add = Rows(path)
    with tempfile.TemporaryDirectory() as name:
        pytest = ["-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider"]
        report = Path(name) / "report.xml"
        junit = f"--junitxml={report}"
        alone = [sys.executable, *pytest, junit, "-m", "gpu", *TESTS]
        limit_s = 600.0 if args.smoke else 80.0
        outcomes(add, "one process", call(alone, limit_s), report)
        if args.smoke:
            return
        report.unlink(missing_ok=True)
        ranks = mpirun(2, "-m", "mpi4py", *pytest, "-x", junit, "-m", "gpu", *MPI_TESTS)
        outcomes(add, "2 ranks", call(ranks, 60.0), report)


def outcomes(add: Rows, where: str, done: tuple[int, str], report: Path) -> None:
    """Add a row for each kind of outcome, and one for each failure."""
    code, text = done
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        last = (text.splitlines() or ["no output"])[-1]
        add(where=where, tests="no report", count=0, what=f"exit code {code}: {last}")
        return
    counts: Counter[str] = Counter()
    for case in cases:
        kinds = {child.tag: child for child in case}
        bad = kinds.get("failure", kinds.get("error"))
        outcome = "passed" if not kinds else "skipped" if bad is None else "failed"
        counts[outcome] += 1
        if bad is not None:
            line = (bad.get("message") or "").splitlines() or [""]
            add(
                where=where,
                tests="failed",
                count=1,
                what=f"{case.get('name')}: {line[0]}",
            )
    for outcome, number in counts.items():
        add(where=where, tests=outcome, count=number, what="")
