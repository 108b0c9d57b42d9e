"""What a person sees while a model trains: rank 0 speaks, the others are silent.

On a terminal a live bar; elsewhere a line every few seconds.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from mpilm.launch import terminal_width

T = TypeVar("T")

PLAIN_EVERY_S = 5.0  # chosen, not tuned
ROOMY = 110  # columns; with fewer, less stands behind the bar


class Screen:
    """Progress of a run towards `total` samples; silent unless `speaks`.

    Use as a context manager around the loop. Rates are of training alone: what is
    spent in `watch` counts neither for them nor for the time that is left.

    valid  the quality on valid, in words, where a loss says less than that

    Args:
        total: samples of the run.
        samples: how far it is.
        train_seconds: of training until now, by the world's clock.
        speaks: whether this rank shows anything.
        perplexity: what people know a loss as; else (of frames) the loss and `valid`.
        virtual: the world's clock is that of a declared machine.
    """

    def __init__(
        self,
        total: int,
        *,
        samples: int = 0,
        train_seconds: float = 0.0,
        speaks: bool = True,
        perplexity: bool = True,
        virtual: bool = False,
    ) -> None:
        self.total, self.first, self.speaks = total, samples, speaks
        self.first_s, self.perplexity, self.virtual = train_seconds, perplexity, virtual
        self.valid = ""
        self.watched_s = 0.0  # in `watch`
        width = terminal_width() if speaks else None
        self.is_narrow = width is not None and width < ROOMY
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
                BarColumn(bar_width=None),
                TextColumn("{task.fields[status]}"),
                console=self.console,
                refresh_per_second=4,
                expand=True,
            )
            if width
            else None
        )
        self.task: TaskID | None = None
        self.last = (0.0, math.nan)  # samples/s and loss, as shown last
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

    def update(self, samples: int, loss: float, train_seconds: float) -> None:
        """Show how far the run is; `loss` is the last minibatch's, in nats."""
        if not self.speaks:
            return
        now_s, done = time.monotonic(), samples - self.first
        rate = done / max(train_seconds - self.first_s, 1e-9)
        took_s = now_s - self.began_s - self.watched_s
        left_s = max(self.total - samples, 0) * took_s / max(done, 1)
        self.last = rate, loss
        status = self.status(samples, rate, loss, left_s)
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=samples, status=status)
        elif now_s - self.shown_s >= PLAIN_EVERY_S or samples >= self.total:
            self.shown_s = now_s
            self.line(f"{min(1.0, samples / self.total):4.0%}  {status}")

    def status(self, samples: int, rate: float, loss: float, left_s: float) -> str:
        """Return what stands behind the bar; less on a narrow terminal."""
        parts = [f"{samples:,}{'' if self.is_narrow else ' samples'}"]
        parts.append(f"{rate:,.0f}/{'virtual s' if self.virtual else 's'}")
        error = self.valid if not self.perplexity else ""
        if not (self.is_narrow and (self.perplexity or error)):
            parts.append(f"loss {short(loss, 3)}")
        if self.perplexity:
            parts.append(f"perplexity {short(math.exp(loss), 1)}")
        elif error:
            parts.append(error.removeprefix("valid ") if self.is_narrow else error)
        return "  ".join([*parts, f"{clock(left_s)} left"])

    def watch(self, name: str, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`, and show how many of them are done.

        On a terminal a bar of its own, which is gone afterwards; elsewhere a line every
        few seconds.
        """
        began_s = time.monotonic()
        try:
            if not self.speaks:
                yield from batches
                return
            num = len(batches) if isinstance(batches, Sized) else 0
            with self.phase(name, num) as show:
                for done, batch in enumerate(batches, start=1):
                    yield batch
                    left = ""
                    if num:
                        took_s = time.monotonic() - began_s
                        left = f"  {clock(took_s * (num - done) / done)} left"
                    show(done, num, f"{name}{left}")
        finally:
            self.watched_s += time.monotonic() - began_s

    @contextmanager
    def phase(self, name: str, num: int) -> Iterator[Callable[[int, int, str], None]]:
        """Hide the run's bar behind one of `num` parts; yield what moves that."""
        if self.bar is None:
            yield self._say
            return
        bar, running = self.bar, self.bar.live.is_started
        if not running:
            bar.start()  # after the loop
        if self.task is not None:
            bar.update(self.task, visible=False)
        task = bar.add_task("", total=num or None, status=name)
        try:
            yield lambda done, _, status: bar.update(
                task, completed=done, status=status
            )
        finally:
            bar.remove_task(task)
            if self.task is not None:
                bar.update(self.task, visible=running)
            if not running:
                bar.stop()

    def _say(self, done: int, num: int, status: str) -> None:
        now_s = time.monotonic()
        if now_s - self.shown_s >= PLAIN_EVERY_S:
            self.shown_s = now_s
            self.line(f"{min(1.0, done / num):4.0%}  {status}" if num else status)

    def done(self, samples: int) -> None:
        """Show that training has come to its end, whatever was shown last."""
        if self.bar and self.task is not None:
            status = self.status(samples, *self.last, 0.0)
            self.bar.update(self.task, completed=self.total, status=status)


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
