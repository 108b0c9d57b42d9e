"""Charts of bars: lying ones with words above them, and upright columns."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpilm.report.charts import (
    BOTTOM,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    Axis,
    Scale,
    axes,
    chart,
    sized,
    words_at,
)


@dataclass(frozen=True)
class Bar:
    """A bar: its value, its colour, what is written behind it, its run or -1."""

    value: float
    colour: str
    note: str = ""
    run: int = -1


def bar_chart(
    title: str, groups: Sequence[tuple[str, Sequence[Bar]]], axis: Axis
) -> str:
    """Return a chart of bars from left to right; "" without one above 0.

    Args:
        groups: what is written above some bars, and these.
    """
    values = [bar.value for _, bars in groups for bar in bars]
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if not largest > 0.0:
        return ""
    notes = max(len(bar.note) for _, bars in groups for bar in bars)

    def draw(width: int, _: int) -> str:
        end = max(width * 0.4, width - RIGHT - notes * LETTER - 8)
        across = Scale(Axis(axis.name, zero=True), 0.0, largest, 2, end)
        parts, y = [], 4.0
        for name, bars in groups:
            letters = int((width - 4) / LETTER)
            y += 13
            parts.append(words_at(2, y, shortened(name, letters), more=' class="name"'))
            y += 4
            for bar in bars:
                if not math.isfinite(bar.value):
                    continue
                run = f' data-run="{bar.run}"' if bar.run >= 0 else ""
                long = max(across(bar.value) - 2, 1.0)
                about = html.escape(f"{name}: {bar.note}")
                parts.append(
                    f'<g{run}><title>{about}</title><rect x="2" y="{y:.0f}"'
                    f' width="{long:.1f}" height="11" fill="{bar.colour}"/>'
                    f"{words_at(long + 8, y + 9.5, bar.note)}</g>"
                )
                y += 14
            y += 3
        return sized(y + 6, "".join(parts))

    return chart(title, draw)


def shortened(words: str, letters: int) -> str:
    """Return words that fit.

    >>> shortened("a long name", 8), shortened("name", 8)
    ('a lon...', 'name')
    """
    return words if len(words) <= letters else words[: max(letters - 3, 1)] + "..."


def column_chart(
    title: str, columns: Sequence[Sequence[tuple[float, str]]], *, x: Axis, y: Axis
) -> str:
    """Return a chart of upright bars, each of parts upon each other.

    Args:
        columns: of each number from 0: heights and colours of its parts.
    """
    tops = [sum(height for height, _ in parts) for parts in columns]
    if not columns or not max(tops) > 0.0:
        return ""

    def draw(width: int, height: int) -> str:
        room = (width - LEFT - RIGHT) / len(columns)
        most = max(1, math.ceil(len(columns) * 30 / (width - LEFT - RIGHT)))
        ticks = tuple(map(float, range(0, len(columns), most)))
        centre = Axis(x.name, show=x.show, ticks=ticks)
        ends = -0.5, len(columns) - 0.5
        across = Scale(centre, *ends, LEFT, width - RIGHT)
        up = Scale(y, 0.0, max(tops), height - BOTTOM, TOP - 14)
        parts = [axes(across, up, width, height)]
        wide = max(room * 0.8, 0.8)
        for number, heights in enumerate(columns):
            base = 0.0
            for value, colour in heights:
                if value <= 0.0:
                    continue
                top = up(base + value)
                parts.append(
                    f'<rect x="{across(number) - wide / 2:.1f}" y="{top:.1f}"'
                    f' width="{wide:.1f}" height="{up(base) - top:.1f}"'
                    f' fill="{colour}"/>'
                )
                base += value
        return "".join(parts)

    return chart(title, draw)
