"""What the soaks share: they go on where they were, out of the way of others.

A soak is stopped at any moment, by SIGKILL too: what it has found stands in a file that
is replaced whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

MEMORY = Path("/dev/shm")  # a file system that no disk is behind, where there is one
NICE = 10  # chosen, not tuned
LIMIT_S = 60.0  # of CPU, for a seed: the longest ones take some seconds
WAITING = 10  # times as long may it take where others have the CPU


class TooLongError(BaseException):
    """A seed has not come to an end."""


@contextlib.contextmanager
def limit_cpu() -> Iterator[None]:
    """End what is done here if it takes too long, by CPU time or by ten times as much.

    Raises:
        TooLongError: it has been ended.
    """

    def give_up(*_: Any) -> None:
        raise TooLongError(f"no end after {LIMIT_S:.0f} s of CPU")

    signal.signal(signal.SIGPROF, give_up)
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, WAITING * LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def memory() -> Path | None:
    """Return where temporary files need no disk; None: the usual place."""
    return MEMORY if os.access(MEMORY, os.W_OK) else None


def step_aside(place: str | None = None) -> None:
    """Let others go first; `place`: where temporary files of this process go."""
    os.nice(max(0, NICE - os.nice(0)))
    if place is not None:
        tempfile.tempdir = os.environ["TMPDIR"] = place


def read_book(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """Return what stands in a file, or `empty`."""
    if not path.exists():
        return empty
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write_book(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole, or leave it as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown; numbers with separators.

    >>> print(table(["name", "seeds"], [["bmuf", 12000]]))
    | name | seeds |
    |---|---|
    | bmuf | 12,000 |
    """
    lines = [list(head), ["---"] * len(head)]
    lines += [[f"{v:,}" if isinstance(v, int) else str(v) for v in r] for r in rows]
    return "\n".join(
        "|" + "|".join(line if line[0] == "---" else [f" {v} " for v in line]) + "|"
        for line in lines
    )
