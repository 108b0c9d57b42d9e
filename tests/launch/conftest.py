"""The program as a user starts it: mpirun, mpilm, real signals, real files.

Everything goes through `mpirun` below. What a run prints is judged as a person would:
how it ended, what mpilm said on stderr, and that no traceback is on the screen.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from mpilm.data.synthetic import prepare_synthetic
from mpilm.storage.state_file import State, read_state

T = TypeVar("T")

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMP_NUM_THREADS": "1",
    "TERM": "xterm",
}
TINY = """\
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
samples = 80_000
test = false
[checkpoint]
every = 16_000
"""
TINY_SAMPLES, TINY_STEPS = 80_000, 1000  # on 2 ranks


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: starts several processes with torch")


@dataclass(frozen=True)
class Run:
    """A program that has ended: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines of mpilm on stderr, without its name."""
        lines = (line.partition("mpilm: ") for line in self.err.splitlines())
        return [text for before, name, text in lines if name and not before]

    def refused(self, *words: str, code: int = 2) -> None:
        """Assert one clear line with these words, no traceback, and the exit code."""
        assert len(self.said) == 1, self
        for word in words:
            assert word in self.said[0], self
        self.has_no_traceback()
        assert self.code == code, self

    def has_no_traceback(self) -> None:
        """Assert that the screen shows nothing that is meant for programmers."""
        for text in ("Traceback", 'File "', "Warning"):
            assert text not in self.out + self.err, self


@dataclass(frozen=True)
class Running:
    """A program that runs: the process that mpirun (or mpilm alone) is."""

    pid: int

    @property
    def ranks(self) -> list[int]:
        """Processes of the ranks."""
        return children(self.pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to mpirun, or to mpilm if it is alone."""
        os.kill(self.pid, number)


def children(pid: int) -> list[int]:
    """Return the child processes of `pid`."""
    return [
        int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def wait_for(ready: Callable[[], T], what: str, limit_s: float = 120.0) -> T:
    """Return `ready()` as soon as it is true."""
    deadline_s = time.monotonic() + limit_s
    while not (found := ready()):
        assert time.monotonic() < deadline_s, f"no {what} after {limit_s} s"
        time.sleep(0.01)
    return found


def mpirun(
    ranks: int,
    *arguments: str | Path,
    during: Callable[[Running], None] | None = None,
    program: tuple[str | Path, ...] = (BIN / "mpilm",),
    options: tuple[str, ...] = (),
    terminal: bool = False,
    limit_s: int = 180,
    **environment: str,
) -> Run:
    """Run mpilm on some ranks to its end; fail if it hangs.

    Args:
        ranks: 0: without mpirun.
        arguments: of mpilm.
        during: called while it runs.
        program: what to start in the place of mpilm.
        options: of mpirun.
        terminal: whether stdout is a terminal.
    """
    if found := os.environ.get("PYTHONPATH"):
        own = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{own}{os.pathsep}{found}" if own else found
    launcher = [BIN / "mpirun", "--oversubscribe", "--bind-to", "none"]
    launcher += [*options, "-n", ranks]
    command = [*(launcher if ranks else []), *program, *arguments]
    screen, stdout = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        ["timeout", "-k", "5", str(limit_s), *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT, **environment},
    )
    os.close(stdout)
    began_s = time.monotonic()
    printed: dict[str, bytes] = {}
    readers = [
        threading.Thread(target=lambda: printed.update(out=read_all(screen))),
        threading.Thread(target=lambda: printed.update(err=process.stderr.read())),
    ]
    for reader in readers:
        reader.start()
    try:
        if during is not None:
            during(Running(wait_for(lambda: children(process.pid), "process")[0]))
        code = process.wait(limit_s + 10)
    finally:
        process.kill() if process.poll() is None else None
        for reader in readers:
            reader.join()
        os.close(screen)
    run = Run(code, printed["out"].decode(), printed["err"].decode())
    is_late = time.monotonic() - began_s >= limit_s  # 137: a rank was killed, too
    assert code != 124 and not (code == 137 and is_late), f"hung: {run}"
    return run


def read_all(descriptor: int) -> bytes:
    """Return what comes out of a pipe or terminal until nobody writes to it."""
    found = b""
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:  # how the end of a terminal shows
            return found
        if not data:
            return found
        found += data


def newest(folder: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return max((folder / "checkpoints").glob("step-?????????"))


def training_state(folder: Path, rank: int) -> State:
    """Return a rank's state in the newest checkpoint, but for times and traffic."""
    state = read_state(newest(folder) / f"rank-{rank:04d}.h5")
    return {k: v for k, v in state.items() if not k.startswith("totals/")}


def first_checkpoint(folder: Path) -> None:
    """Wait until a run has written a checkpoint."""
    wait_for(
        lambda: list((folder / "checkpoints").glob("step-?????????")), "checkpoint"
    )


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpora small.h5 and other.h5, and the configuration tiny.toml."""
    folder = tmp_path_factory.mktemp("inputs")
    prepare_synthetic(folder / "small.h5", vocab=40, tokens=50_000, seed=3, branching=4)
    prepare_synthetic(folder / "other.h5", vocab=30, tokens=50_000, seed=4, branching=4)
    corpus = f'[data]\ncorpus = "{folder / "small.h5"}"\n'
    (folder / "tiny.toml").write_text(corpus + TINY)
    return folder


@pytest.fixture(scope="session")
def trained(inputs: Path) -> tuple[Path, Run]:
    """An uninterrupted run of tiny.toml on 2 ranks: its folder, and how it went.

    It was watched on a terminal.
    """
    folder = inputs / "trained"
    arguments = ("train", inputs / "tiny.toml", "--out", folder)
    return folder, mpirun(2, *arguments, terminal=True)
