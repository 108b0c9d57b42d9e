"""A finding: what a check of this machine came to, on one line, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check came to.

    name    what was looked at, some words
    status  "problem": training will fail or be wrong; "warning": it will be slow, or
            may fail later
    text    what was found
    remedy  what to do about it

    >>> print(Finding("threads", "warning", "not set", "export OMP_NUM_THREADS=1"))
    warning  threads          not set
             -> export OMP_NUM_THREADS=1
    """

    name: str
    status: Status
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<8} {self.name:<16} {self.text}"
        return f"{line}\n{'':<8} -> {self.remedy}" if self.remedy else line


def ok(name: str, text: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(name, "ok", text)


def some(values: object, num: int = 4) -> str:
    """Return the first `num` of a sequence as text.

    >>> some([0, 1, 2, 3, 4, 5]), some([7])
    ('0, 1, 2, 3, ...', '7')
    """
    words = [str(value) for value in values]  # type: ignore[attr-defined]
    return ", ".join(words[:num] + (["..."] if len(words) > num else []))


def amount(num_bytes: float) -> str:
    """Return a number of bytes for people.

    >>> amount(4096), amount(3e9)
    ('4.1 KB', '3.0 GB')
    """
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if num_bytes < 1000.0 or unit == "TB":
            break
        num_bytes /= 1000.0
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"


def duration(seconds: float) -> str:
    """Return a short time for people.

    >>> duration(2.5e-6), duration(0.012), duration(3.0)
    ('2.5 us', '12.0 ms', '3.0 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1.0 else f"{seconds:.1f} s"
