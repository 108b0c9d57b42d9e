"""What a person sees while a model trains: rank 0 speaks, the others are silent.

On a terminal a live bar; elsewhere a line every few seconds.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from mpilm.launch import terminal_width

PLAIN_EVERY_S = 5.0  # chosen, not tuned


class Screen:
    """Progress of a run towards `total` samples; silent unless `speaks`.

    Use as a context manager around the loop.
    """

    def __init__(self, total: int, *, samples: int = 0, speaks: bool = True) -> None:
        self.total, self.first, self.speaks = total, samples, speaks
        width = terminal_width() if speaks else None
        self.console = Console(
            file=sys.stdout,
            quiet=not speaks,
            force_terminal=width is not None,
            width=width or 120,
            highlight=False,
        )
        self.bar = (
            RichProgress(
                TextColumn("{task.percentage:>3.0f}%"),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
                refresh_per_second=4,
            )
            if width
            else None
        )
        self.began_s = self.shown_s = time.monotonic()

    def __enter__(self) -> Screen:
        self.began_s = self.shown_s = time.monotonic()
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(
                "", total=self.total, completed=self.first, status=""
            )
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar:
            self.bar.stop()

    def line(self, text: str) -> None:
        """Print a line of its own."""
        self.console.print(text, markup=False, soft_wrap=True)

    def update(self, samples: int, loss: float) -> None:
        """Show how far the run is; `loss` is the last minibatch's, in nats."""
        if not self.speaks:
            return
        now_s = time.monotonic()
        rate = (samples - self.first) / max(now_s - self.began_s, 1e-9)
        left_s = max(self.total - samples, 0) / max(rate, 1e-9)
        status = (
            f"{samples:,} samples  {rate:,.0f}/s  loss {short(loss, 3)}  perplexity"
            f" {short(math.exp(loss), 1)}  {clock(left_s)} left"
        )
        if self.bar:
            self.bar.update(self.task, completed=samples, status=status)
        elif now_s - self.shown_s >= PLAIN_EVERY_S or samples >= self.total:
            self.shown_s = now_s
            self.line(f"{min(1.0, samples / self.total):4.0%}  {status}")

    def done(self) -> None:
        """Show that training has come to its end, whatever was shown last."""
        if self.bar:
            self.bar.update(self.task, completed=self.total)


def count(number: int, what: str) -> str:
    """Return a number of things.

    >>> count(1, "rank"), count(1000, "rank")
    ('1 rank', '1,000 ranks')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def short(value: float, digits: int) -> str:
    """Return a number that fits its place, even where a model diverges.

    >>> short(1234.56, 1), short(1e30, 1)
    ('1,234.6', '1e+30')
    """
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss.

    >>> clock(3725), clock(65)
    ('1:02:05', '1:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
