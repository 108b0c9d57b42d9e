"""What every rank did in some steps: computing, waiting, the rest of a step."""

from __future__ import annotations

import html
import math

import numpy as np

from mpilm.report.charts import LETTER, RIGHT, Axis, Scale, chart, sized, words_at
from mpilm.report.reader import Run, Vector

MOST_ROWS = 16  # ranks that are drawn
MOST_SPANS = 1200  # that are drawn of a run; chosen, not tuned: 100 kB of a page
HEIGHT = 15  # of a rank, pixels

# name of the event -> what it is called, its colour; later ones cover earlier ones
KINDS = {
    "step": ("update and mix", "#009e73"),
    "compute": ("compute", "#0072b2"),
    "wait": ("wait", "#e69f00"),
    "stage": ("stage", "#cc79a7"),
    "evaluate": ("evaluate", "#8c564b"),
    "checkpoint": ("checkpoint", "#7a5195"),
    "sync": ("sync", "#b3261e"),
}


def timeline(run: Run) -> str:
    """Draw the middle of the steps whose events were logged; "" if none were."""
    spans = {name: run.activities(name) for name in KINDS}
    steps = {rank: s for rank, s in spans["step"].items() if len(s[0])}
    shown = list(steps)[:MOST_ROWS]
    if not shown:
        return ""
    window = middle(spans, shown)
    if window is None:
        return ""
    begin_s, end_s = window
    drawn = {
        name: {rank: inside(of_rank[rank], begin_s, end_s) for rank in shown}
        for name, of_rank in spans.items()
    }
    used = [name for name in KINDS if any(len(s[0]) for s in drawn[name].values())]
    unit_s, unit = unit_of(end_s - begin_s)

    def draw(width: int, _: int) -> str:
        left = 20 + LETTER * len(str(max(shown)))
        axis = Axis(unit)
        to_unit = (end_s - begin_s) / unit_s
        across = Scale(axis, 0.0, to_unit, left, width - RIGHT)
        parts, y = legend(used, width)
        for rank in shown:
            parts.append(words_at(left - 6, y + HEIGHT - 5, str(rank), "end"))
            for name in used:
                for start_s, stop_s in zip(*drawn[name][rank], strict=True):
                    x = across((start_s - begin_s) / unit_s)
                    wide = max(across((stop_s - begin_s) / unit_s) - x, 0.3)
                    parts.append(
                        f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}"'
                        f' height="{HEIGHT - 3}" fill="{KINDS[name][1]}"/>'
                    )
            y += HEIGHT
        for value in across.ticks():
            x = min(across(value), width - 12)
            parts.append(words_at(x, y + 12, axis.show(value), "middle"))
        name = f"{unit}, after {begin_s:.4g} s"
        parts.append(words_at(width / 2, y + 28, name, "middle", ' class="name"'))
        return sized(y + 34, "".join(parts))

    title = "what each rank did"
    if len(steps) > len(shown):
        title += f", the first {len(shown)} of {len(steps)} ranks"
    return chart(title, draw)


def legend(names: list[str], width: int) -> tuple[list[str], int]:
    """Return what the colours mean, and where it ends."""
    parts, x, y = [], 4.0, 4
    for name in names:
        words, colour = KINDS[name]
        needs = 16 + LETTER * len(words) + 12
        if x > 4 and x + needs > width:
            x, y = 4.0, y + 16
        square = f'<rect x="{x:.0f}" y="{y}" width="11" height="11" fill="{colour}"/>'
        parts += [square, words_at(x + 15, y + 10, html.escape(words))]
        x += needs
    return parts, y + 20


def inside(
    span: tuple[Vector, Vector], begin_s: float, end_s: float
) -> tuple[Vector, Vector]:
    """Return the events that touch a window, cut to it."""
    start_s, stop_s = span
    touch = (stop_s > begin_s) & (start_s < end_s)
    return np.maximum(start_s[touch], begin_s), np.minimum(stop_s[touch], end_s)


def middle(
    spans: dict[str, dict[int, tuple[Vector, Vector]]], shown: list[int]
) -> tuple[float, float] | None:
    """Return a window in the middle with as many events as are drawn; None: too few.

    The first steps are not like the others: caches fill, MPI connects.
    """
    first = [spans["step"][rank] for rank in shown]
    begin_s = min(float(start[0]) for start, _ in first)
    end_s = max(float(stop[-1]) for _, stop in first)
    total = sum(
        int(((of_rank[rank][0] >= begin_s) & (of_rank[rank][0] < end_s)).sum())
        for of_rank in spans.values()
        for rank in shown
    )
    share = min(1.0, MOST_SPANS / max(total, 1))
    if min(len(start) for start, _ in first) > 20:
        share = min(share, 0.4)
    centre, half = (begin_s + end_s) / 2, share * (end_s - begin_s) / 2
    return (centre - half, centre + half) if half > 0.0 else None


def unit_of(seconds: float) -> tuple[float, str]:
    """Return a unit of time in which so many seconds are a number of few digits.

    >>> unit_of(0.02), unit_of(3.0)
    ((0.001, 'milliseconds'), (1.0, 'seconds'))
    """
    if not math.isfinite(seconds) or seconds >= 1.0:
        return 1.0, "seconds"
    return (1e-3, "milliseconds") if seconds >= 1e-3 else (1e-6, "microseconds")
