"""What the tests of the job scripts share: a project folder, patience, /proc.

The scripts run the real `mpilm train`. Its first leg never ends by itself; when it has
been stopped, a test lowers `train.samples` of the run and lets the next leg finish.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENDLESS = 10**12
CONFIG = """
[data]
corpus = "corpus.h5"
[model]
embed = 16
hidden = 16
[train]
samples = {samples}
batch = 4
[checkpoint]
agree_every = 2
"""


class Project:
    """A folder from which jobs are submitted, with an environment to source."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self.run = folder / "runs" / "x"
        self.environment = folder / "environment.sh"
        (folder / "corpus.h5").symlink_to(corpus)
        # "nodes" share this host's cores, which mpirun cannot know: no spinning
        self.environment.write_text(
            f'PATH="{BIN}:$PATH"\nexport OMPI_MCA_mpi_yield_when_idle=1\n'
        )
        self.train(ENDLESS)

    def train(self, samples: int) -> None:
        """Set the length of the run."""
        (self.folder / "train.toml").write_text(CONFIG.format(samples=samples))

    def shorten(self, samples: int) -> None:
        """Let the run, which was endless, have this length."""
        config = self.run / "config.toml"
        text = config.read_text()
        assert text.count(str(ENDLESS)) == 1
        config.write_text(text.replace(str(ENDLESS), str(samples)))

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints of the run, oldest first."""
        return sorted((self.run / "checkpoints").glob("step-*[0-9]"))

    def tool(self, name: str, script: str) -> Path:
        """Write an executable bash script into the folder `bin`; return its path."""
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return path


def samples_at_stop(log: str) -> int:
    """Return how far the run was when a signal stopped it, by its own last words."""
    found = re.findall(r"stopped early at ([\d,]+) samples", log)
    assert found, log
    return int(found[-1].replace(",", ""))


def wait_until(ask: Callable[[], T], what: str, timeout_s: float) -> T:
    """Return the first true answer of `ask`."""
    end_s = time.monotonic() + timeout_s
    while not (answer := ask()):
        assert time.monotonic() < end_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.2)
    return answer


def environments(text: str) -> dict[int, dict[str, str]]:
    """Return process id -> environment of processes with `text` in their command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "cmdline").read_bytes():
                block = os.fsdecode((folder / "environ").read_bytes())
                pairs = (line.partition("=") for line in block.split("\0") if line)
                found[int(folder.name)] = {key: value for key, _, value in pairs}
        except OSError:  # it has ended, or is somebody else's
            continue
    return found
